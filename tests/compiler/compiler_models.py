"""Small models with known answers, shared by the compiler's tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.certificates import Certificate
from lepton_xla.program import Program, TensorSpec, trace

VOCABULARY, WIDTH, CLASSES = 50, 16, 8
CERTIFICATE = Certificate(
    metric="accuracy", float_value=0.98, value=0.97, drop=1.0, low=0.5, high=1.5, rows=500, all_rows=1000,
    data="0" * 64, weights_bytes=1, float_bytes=4, recipe="int8", promised=0.95,
)  # fmt: skip


def dense_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    return {
        "kernel": random.standard_normal((12, 5)).astype(np.float32),
        "bias": random.standard_normal(5).astype(np.float32),
        "large": random.standard_normal((50, 60)).astype(np.float32),
    }


def dense() -> Program:
    """`tanh(x @ kernel + bias)`, rows of 12 to rows of 5; `large` has no part in it but to be stored as zarr."""

    def fn(weights: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ weights["kernel"] + weights["bias"][None])

    return trace(fn, dense_weights(), {"x": TensorSpec(("batch", 12), "float32")})


def dense_reference(x: np.ndarray) -> np.ndarray:
    weights = {name: value.astype(np.float64) for name, value in dense_weights().items()}
    return np.tanh(x.astype(np.float64) @ weights["kernel"] + weights["bias"])


def text_weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {
        "table": random.standard_normal((VOCABULARY, WIDTH)).astype(np.float32),
        "head": random.standard_normal((WIDTH, CLASSES)).astype(np.float32),
    }


def text() -> Program:
    """Masked mean of embeddings, and a head on each token: two inputs, two outputs, two symbolic dimensions."""

    def fn(weights: Any, ids: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        hidden = jnp.tanh(weights["table"][ids]) * mask[..., None]
        pooled = hidden.sum(1) / mask.sum(1, keepdims=True)
        return {"pooled": pooled, "tokens": hidden @ weights["head"]}

    inputs = {"ids": TensorSpec(("batch", "seq"), "int32"), "mask": TensorSpec(("batch", "seq"), "float32")}
    return trace(fn, text_weights(), inputs)


def text_inputs(batch: int, seq: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch * 100 + seq)
    mask = (random.random((batch, seq)) < 0.8).astype(np.float32)
    mask[:, :1] = 1.0
    return {"ids": random.integers(0, VOCABULARY, (batch, seq)).astype(np.int32), "mask": mask}


def text_reference(ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    weights = {name: value.astype(np.float64) for name, value in text_weights().items()}
    hidden = np.tanh(weights["table"][ids]) * mask[..., None].astype(np.float64)
    return {"pooled": hidden.sum(1) / mask.sum(1, keepdims=True), "tokens": hidden @ weights["head"]}
