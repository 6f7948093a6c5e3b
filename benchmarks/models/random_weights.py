"""Models with random weights, for what does not depend on what was learned: how long optimizing takes, and memory."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lepton_xla as lx

# GPT-2 (124 M): layers, width, heads, words, positions.
LAYERS, WIDTH, HEADS, WORDS, POSITIONS = 12, 768, 12, 50257, 1024
CHANNELS = (3, 24, 48, 96, 144)


def mlp() -> lx.ModelSpec:
    """64-128-64-32-10, 80 kB."""
    random = np.random.default_rng(0)
    sizes = (64, 128, 64, 32, 10)
    weights = [
        {"kernel": _normal(random, a, b) / a**0.5, "bias": np.zeros(b, np.float32)}
        for a, b in itertools.pairwise(sizes)
    ]

    def fn(weights: Any, x: jax.Array) -> jax.Array:
        for index, layer in enumerate(weights):
            x = (jax.nn.relu(x) if index else x) @ layer["kernel"] + layer["bias"]
        return x

    inputs = {"x": lx.TensorSpec(("batch", sizes[0]), "float32")}
    data = [{"x": _normal(random, 8, sizes[0])} for _ in range(4)]
    return lx.ModelSpec(fn=fn, weights=weights, inputs=inputs, buckets={"batch": (1, 32)}, calibration=data)


def unet() -> lx.ModelSpec:
    """A U-Net of four levels on 64 x 64 pixels, 15 convolutions, 3.5 MB."""
    random = np.random.default_rng(0)
    levels = range(len(CHANNELS) - 1)

    def pair(inputs: int, outputs: int) -> list[dict[str, np.ndarray]]:
        return [
            {"kernel": _normal(random, 3, 3, a, outputs) / (9 * a) ** 0.5, "bias": np.zeros(outputs, np.float32)}
            for a in (inputs, outputs)
        ]

    weights = {
        "down": [pair(CHANNELS[k], CHANNELS[k + 1]) for k in levels],
        "up": [pair(CHANNELS[k + 1] + CHANNELS[k], CHANNELS[k]) for k in levels[:0:-1]],
        "out": _normal(random, 1, 1, CHANNELS[1], 1),
    }

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def both(x: jax.Array, layers: Any) -> jax.Array:
        for layer in layers:
            x = jax.nn.relu(conv(x, layer["kernel"]) + layer["bias"])
        return x

    def fn(weights: Any, x: jax.Array) -> jax.Array:
        skipped: list[jax.Array] = []
        for layers in weights["down"]:
            if skipped:
                x = jax.lax.reduce_window(skipped[-1], -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            skipped.append(both(x, layers))
        x = skipped.pop()
        for layers in weights["up"]:
            x = both(jnp.concatenate([jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), skipped.pop()], -1), layers)
        return conv(x, weights["out"])

    inputs = {"x": lx.TensorSpec(("batch", 64, 64, 3), "float32")}
    data = [{"x": random.random((2, 64, 64, 3)).astype(np.float32)} for _ in range(2)]
    return lx.ModelSpec(fn=fn, weights=weights, inputs=inputs, buckets={"batch": (1, 8)}, calibration=data)


def gpt2() -> lx.ModelSpec:
    """GPT-2 (124 M) on 32 tokens, its table of words tied to the last product."""
    random = np.random.default_rng(0)
    norm = lambda: {"scale": np.ones(WIDTH, np.float32), "bias": np.zeros(WIDTH, np.float32)}  # noqa: E731

    def dense(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        return {"kernel": 0.02 * _normal(random, inputs, outputs), "bias": np.zeros(outputs, np.float32)}

    layers = [
        {
            "norms": [norm(), norm()],
            "qkv": dense(WIDTH, 3 * WIDTH),
            "out": dense(WIDTH, WIDTH),
            "wide": dense(WIDTH, 4 * WIDTH),
            "narrow": dense(4 * WIDTH, WIDTH),
        }
        for _ in range(LAYERS)
    ]
    words, positions = 0.02 * _normal(random, WORDS, WIDTH), 0.02 * _normal(random, POSITIONS, WIDTH)
    weights = {"words": words, "positions": positions, "layers": layers, "norm": norm()}

    def normed(p: Any, x: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]

    def applied(p: Any, x: jax.Array) -> jax.Array:
        return x @ p["kernel"] + p["bias"]

    def fn(weights: Any, ids: jax.Array) -> jax.Array:
        batch, seq = ids.shape
        x = weights["words"][ids] + weights["positions"][:seq]
        mask = jnp.where(jnp.tril(jnp.ones((seq, seq), bool)), 0.0, -1e9)
        for layer in weights["layers"]:
            parts = jnp.split(applied(layer["qkv"], normed(layer["norms"][0], x)), 3, -1)
            query, key, value = (part.reshape(batch, seq, HEADS, -1).transpose(0, 2, 1, 3) for part in parts)
            scores = query @ key.transpose(0, 1, 3, 2) * (WIDTH // HEADS) ** -0.5 + mask
            mixed = (jax.nn.softmax(scores, -1) @ value).transpose(0, 2, 1, 3).reshape(batch, seq, WIDTH)
            x = x + applied(layer["out"], mixed)
            x = x + applied(layer["narrow"], jax.nn.gelu(applied(layer["wide"], normed(layer["norms"][1], x))))
        return normed(weights["norm"], x) @ weights["words"].T

    data = [{"ids": random.integers(0, WORDS, (2, 32)).astype(np.int32)} for _ in range(2)]
    inputs = {"ids": lx.TensorSpec(("batch", 32), "int32")}
    return lx.ModelSpec(fn=fn, weights=weights, inputs=inputs, buckets={"batch": (1, 8)}, calibration=data)


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, np.float32)


MODELS = {"mlp": mlp, "unet": unet, "gpt2": gpt2}
