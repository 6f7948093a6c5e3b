"""Triton's names for what the server counts, so that dashboards and alerts made for Triton work unchanged.

Written out here because `prometheus_client` ends the names of counters in `_total`, which Triton's do not.

Source: Triton Inference Server, `docs/user_guide/metrics.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lepton_xla.serve.observe.metrics import Metrics

_FAILURES: dict[str, Callable[[Metrics], int]] = {
    "REJECTED": lambda metrics: metrics.rejected,
    "CANCELED": lambda metrics: metrics.cancelled,
    "BACKEND": lambda metrics: metrics.failures,
    "OTHER": lambda metrics: metrics.expired,
}
_FIGURES: tuple[tuple[str, str, str, Callable[[Metrics], int]], ...] = (
    ("count", "counter", "Number of inferences performed, a row each", lambda metrics: metrics.rows),
    ("exec_count", "counter", "Number of executions", lambda metrics: metrics.batch_rows.count),
    ("request_duration_us", "counter", "Cumulative time of requests", lambda metrics: _us(metrics.request_s.total)),
    ("queue_duration_us", "counter", "Cumulative time in the queue", lambda metrics: _us(metrics.queue_s.total)),
    ("compute_input_duration_us", "counter", "Cumulative time of copying inputs",
     lambda metrics: _us(metrics.input_s)),
    ("compute_infer_duration_us", "counter", "Cumulative time of execution", lambda metrics: _us(metrics.infer_s)),
    ("compute_output_duration_us", "counter", "Cumulative time of writing outputs",
     lambda metrics: _us(metrics.output_s)),
    ("pending_request_count", "gauge", "Requests in the queue",
     lambda metrics: int(metrics.now.get("queue_requests", 0))),
)  # fmt: skip


def render(models: Sequence[Metrics]) -> bytes:
    """The metrics of models in Prometheus' text format."""
    if not models:
        return b""
    labelled = [({"model": each.model, "version": each.version}, each) for each in models]
    lines = [
        *_family("nv_inference_request_success", "counter", "Number of successful inference requests"),
        *(_sample("nv_inference_request_success", labels, each.requests) for labels, each in labelled),
        *_family("nv_inference_request_failure", "counter", "Number of failed inference requests"),
        *(
            _sample("nv_inference_request_failure", labels | {"reason": reason}, count(each))
            for labels, each in labelled
            for reason, count in _FAILURES.items()
        ),
    ]
    for name, kind, text, read in _FIGURES:
        lines += _family(f"nv_inference_{name}", kind, text)
        lines += [_sample(f"nv_inference_{name}", labels, read(each)) for labels, each in labelled]
    return "".join(lines).encode()


def _us(seconds: float) -> int:
    return int(seconds * 1e6)


def _family(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}\n", f"# TYPE {name} {kind}\n"


def _sample(name: str, labels: dict[str, str], value: int) -> str:
    shown = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    return f"{name}{{{shown}}} {value}\n"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
