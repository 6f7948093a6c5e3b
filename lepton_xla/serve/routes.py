"""Everything but infer and health: what the server says about itself and its model.

Sources: Open Inference Protocol v2 (metadata), Triton's model configuration and statistics extensions.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from lepton_xla.serve.metrics import Histogram, Metrics
from lepton_xla.serve.signature import Signature, Tensor

SERVER_NAME = "lepton_xla"
OPEN_PATHS = frozenset((b"/v2/health/live", b"/v2/health/ready"))
EXTENSIONS = ("binary_tensor_data", "model_configuration", "statistics", "model_repository")


@functools.cache
def server_metadata() -> dict[str, Any]:
    """The answer to `GET /v2`."""
    return {"name": SERVER_NAME, "version": importlib.metadata.version("lepton-xla"), "extensions": EXTENSIONS}


def model_metadata(signature: Signature) -> dict[str, Any]:
    """The answer to `GET /v2/models/{name}`; -1 is a dimension that varies."""

    def tensor(given: Tensor) -> dict[str, Any]:
        return {"name": given.name, "datatype": given.datatype.name, "shape": _dims(given)}

    return {
        "name": signature.name,
        "versions": [signature.version],
        "platform": "jax_xla",
        "inputs": [tensor(given) for given in signature.inputs],
        "outputs": [tensor(given) for given in signature.outputs],
    }


def model_config(signature: Signature, max_delay_us: int) -> dict[str, Any]:
    """The answer to `GET /v2/models/{name}/config`: dimensions without the batch, as Triton writes them."""
    skip = 0 if signature.batch is None else 1

    def tensor(given: Tensor) -> dict[str, Any]:
        return {"name": given.name, "data_type": f"TYPE_{given.datatype.name}", "dims": _dims(given)[skip:]}

    config: dict[str, Any] = {
        "name": signature.name,
        "platform": "jax_xla",
        "backend": SERVER_NAME,
        "max_batch_size": 0 if signature.batch is None else signature.ladder[-1],
        "input": [tensor(given) for given in signature.inputs],
        "output": [tensor(given) for given in signature.outputs],
    }
    if signature.batch is not None:
        config["dynamic_batching"] = {
            "preferred_batch_size": signature.ladder,
            "max_queue_delay_microseconds": max_delay_us,
        }
    return config


def model_stats(signature: Signature, metrics: Metrics) -> dict[str, Any]:
    """The answer to `GET /v2/models/{name}/stats`; every figure only ever grows."""
    none = _leaf(0, 0.0)
    batches = metrics.batch_rows.count
    return {
        "model_stats": [
            {
                "name": signature.name,
                "version": signature.version,
                "last_inference": int(metrics.last_s * 1e3),
                "inference_count": metrics.rows,
                "execution_count": batches,
                "inference_stats": {
                    "success": _sum(metrics.request_s),
                    "fail": _leaf(metrics.failures, 0.0),
                    "queue": _sum(metrics.queue_s),
                    "compute_input": _leaf(batches, metrics.input_s),
                    "compute_infer": _sum(metrics.compute_s),
                    "compute_output": none,
                    "cache_hit": none,
                    "cache_miss": none,
                },
                "batch_stats": [
                    {"batch_size": size, "compute_input": none, "compute_infer": _leaf(*cost), "compute_output": none}
                    for size, cost in sorted(metrics.by_size.items())
                ],
                "memory_usage": [],
                "response_stats": {},
            }
        ]
    }


def scope_of(parts: Sequence[str]) -> str:
    """What a token has to be good for on the route of these path segments; "health" needs no token."""
    match parts:
        case ["v2", "health", _]:
            return "health"
        case ["v2", "models", *_, "infer"]:
            return "infer"
        case ["metrics"] | ["v2"] | ["v2", ""] | ["v2", "models", *_] | ["v2", "repository", "index"]:
            return "read"
        case _:
            return "admin"


def _dims(tensor: Tensor) -> list[int]:
    return [-1 if isinstance(dim, str) else dim for dim in tensor.shape]


def _leaf(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": round(seconds * 1e9)}


def _sum(histogram: Histogram) -> dict[str, int]:
    return _leaf(histogram.count, histogram.total)
