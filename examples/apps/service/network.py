"""An encoder-decoder Transformer in plain JAX, as the functions of `lx.Generator`.

The encoder is BERT's, as wide and deep as its weights are (Devlin et al. 2018). The decoder reads the encoded question
(Vaswani et al. 2017). Its first token is the kind of the question, which no text shows: by it the model decides, before
a word is told, whether it knows a reply: `unknown` is a kind too, and is said where no other is certain enough.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from words import Words

type Weights = Mapping[str, Any]
HEAD, LAYERS, WIDTH, PLACES = 32, 2, 128, 128  # a head's size; the decoder's; longest question and reply
SMALL_LAYERS, SMALL_WIDTH = 2, 128  # of an encoder that is trained from nothing
CACHED = ("k", "v", "ck", "cv")
_NEVER = -1e9


def read_encoder(folder: pathlib.Path) -> dict[str, jax.Array]:
    """MiniLM's weights, by the names of `encode`."""
    from safetensors.numpy import load_file

    raw = load_file(folder / "model.safetensors")
    words = raw["embeddings.word_embeddings.weight"]
    places = raw["embeddings.position_embeddings.weight"][:PLACES] + raw["embeddings.token_type_embeddings.weight"][0]
    names = {
        "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
        "out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
        "norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm",
    }  # fmt: skip
    found = {"encoder/words": words, "encoder/places": places}
    found |= {f"encoder/norm/{part}": raw[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")}
    for layer in range(sum(name.endswith("intermediate.dense.bias") for name in raw)):
        for name, long in names.items():
            for part in ("weight", "bias"):
                array = raw[f"encoder.layer.{layer}.{long}.{part}"]
                found[f"encoder/{layer}/{name}/{part}"] = array.T if array.ndim == 2 else array
    return {name: jnp.asarray(array) for name, array in found.items()}


def small_encoder(tokens: int, seed: int) -> dict[str, jax.Array]:
    """Random weights of a small encoder."""
    random, D = np.random.default_rng([seed, 1]), SMALL_WIDTH
    shapes = {"query": (D, D), "key": (D, D), "value": (D, D), "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}
    found = {"encoder/words": random.standard_normal((tokens, D)), "encoder/places": np.zeros((PLACES, D))}
    norms = ["encoder/norm", *(f"encoder/{layer}/norm{n}" for layer in range(SMALL_LAYERS) for n in (1, 2))]
    for layer in range(SMALL_LAYERS):
        for name, shape in shapes.items():
            found[f"encoder/{layer}/{name}/weight"] = random.standard_normal(shape) / np.sqrt(shape[0])
            found[f"encoder/{layer}/{name}/bias"] = np.zeros(shape[1])
    found |= {f"{name}/weight": np.ones(D) for name in norms} | {f"{name}/bias": np.zeros(D) for name in norms}
    return {name: jnp.asarray(array, jnp.float32) for name, array in found.items()}


def decoder(words: Words, encoded: int, seed: int) -> dict[str, jax.Array]:
    """Random weights of the decoder, for an encoder of so many features."""
    random, D = np.random.default_rng([seed, 2]), WIDTH
    shapes = dict.fromkeys(("q", "k", "v", "o", "cq", "co"), (D, D))
    shapes |= {"ck": (encoded, D), "cv": (encoded, D), "up": (D, 4 * D), "down": (4 * D, D)}
    found = {
        "decoder/start": random.standard_normal(D),
        "decoder/words": random.standard_normal((words.count, D)),
        "decoder/places": random.standard_normal((PLACES, D)) * 0.5,
        "decoder/norm": np.ones(D),
        "decoder/out": random.standard_normal((D, words.count)) / np.sqrt(D),
        "decoder/bias": np.zeros(words.count),
        "threshold": np.zeros(()),
    }
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            found[f"decoder/{layer}/{name}"] = random.standard_normal(shape) / np.sqrt(shape[0])
        found |= {f"decoder/{layer}/norm{n}": np.ones(D) for n in (1, 2, 3)}
    return {name: jnp.asarray(array, jnp.float32) for name, array in found.items()}


def _norm(x: jax.Array, scale: jax.Array, bias: Any = 0.0) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-12) * scale + bias


def _heads(x: jax.Array) -> jax.Array:
    """`[B, T, D]` as `[B, H, T, d]`."""
    return x.reshape(*x.shape[:2], -1, HEAD).swapaxes(1, 2)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """`q[B, T, D]` to `k, v[B, H, S, d]`, where `seen`, bool `[B or 1, T or 1, S]`."""
    scores = jnp.einsum("bhtd,bhsd->bhts", _heads(q), k) * HEAD**-0.5
    shares = jax.nn.softmax(jnp.where(seen[:, None], scores, _NEVER), -1)
    return jnp.einsum("bhts,bhsd->bhtd", shares, v).swapaxes(1, 2).reshape(q.shape)


def encode(w: Weights, tokens: jax.Array, length: jax.Array) -> jax.Array:
    """Questions `tokens[B, S]` of `length[B]` tokens to `[B, S, features]`."""

    def dense(name: str, x: jax.Array) -> jax.Array:
        return x @ w[f"encoder/{name}/weight"] + w[f"encoder/{name}/bias"]

    def normed(name: str, x: jax.Array) -> jax.Array:
        return _norm(x, w[f"encoder/{name}/weight"], w[f"encoder/{name}/bias"])

    table, S = w["encoder/words"], tokens.shape[1]
    known = jnp.where(tokens < table.shape[0], tokens, 1)  # a token of the replies is no word of a question
    x = normed("norm", table[known] + w["encoder/places"][:S][None])
    seen = (jnp.arange(S)[None] < length[:, None])[:, None]
    layer = 0
    while f"encoder/{layer}/up/bias" in w:
        q, k, v = (dense(f"{layer}/{name}", x) for name in ("query", "key", "value"))
        x = normed(f"{layer}/norm1", x + dense(f"{layer}/out", _attend(q, _heads(k), _heads(v), seen)))
        wide = jax.nn.gelu(dense(f"{layer}/up", x), approximate=False)
        x = normed(f"{layer}/norm2", x + dense(f"{layer}/down", wide))
        layer += 1
    return x


def asked(w: Weights, layer: int, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a layer of the decoder attends to of an encoded question."""
    return _heads(states @ w[f"decoder/{layer}/ck"]), _heads(states @ w[f"decoder/{layer}/cv"])


def _layer(w: Weights, layer: int, x: jax.Array, own: Any, own_seen: jax.Array, other: Any, seen: jax.Array) -> Any:
    """One layer of the decoder; `own(k, v)` adds these to what it attends to of the reply itself."""

    def at(name: str) -> jax.Array:
        return w[f"decoder/{layer}/{name}"]

    y = _norm(x, at("norm1"))
    k, v = own(_heads(y @ at("k")), _heads(y @ at("v")))
    x = x + _attend(y @ at("q"), k, v, own_seen) @ at("o")
    x = x + _attend(_norm(x, at("norm2")) @ at("cq"), other[0], other[1], seen) @ at("co")
    return x + jax.nn.gelu(_norm(x, at("norm3")) @ at("up")) @ at("down"), (k, v)


def _logits(w: Weights, x: jax.Array) -> jax.Array:
    return _norm(x, w["decoder/norm"]) @ w["decoder/out"] + w["decoder/bias"]


def replay(w: Weights, states: jax.Array, seen: jax.Array, said: jax.Array) -> jax.Array:
    """Logits of each token of replies, `[B, T + 1, tokens]`, if those before are `said[B, T]`.

    Args:
        w: the weights.
        states: the encoded questions.
        seen: which of their tokens there are, bool `[B, S]`.
        said: tokens counted from the first of the replies.
    """
    start = jnp.broadcast_to(w["decoder/start"], (said.shape[0], 1, WIDTH))
    x = jnp.concatenate([start, w["decoder/words"][said]], 1) + w["decoder/places"][: said.shape[1] + 1][None]
    before = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None]
    for layer in range(LAYERS):
        x, _ = _layer(w, layer, x, lambda *made: made, before, asked(w, layer, states), seen[:, None])
    return _logits(w, x)


def decided(w: Weights, logits: jax.Array, words: Words) -> jax.Array:
    """Logits of the first token, which is a kind: `unknown` where none is as likely as the threshold."""
    places = jnp.arange(words.count)[None]
    kinds = jnp.where(places < words.kinds, logits, _NEVER)
    unknown = jnp.where(places == words.kinds - 1, 0.0, _NEVER)
    return jnp.where(certainty(logits, words) >= w["threshold"], kinds, unknown)


def certainty(logits: jax.Array, words: Words) -> jax.Array:
    """The probability of the most likely kind that has a reply, `[B, 1]`."""
    return jax.nn.softmax(logits[:, : words.kinds], -1)[:, :-1].max(-1, keepdims=True)


def steps(words: Words) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """`init_cache`, `prefill` and `decode` of `lx.Generator`."""

    def init_cache(w: Any, B: int, S: int) -> Any:
        empty = jnp.zeros((B, WIDTH // HEAD, S, HEAD), jnp.float32)
        return {"length": jnp.zeros(B, jnp.int32), "layers": [dict.fromkeys(CACHED, empty) for _ in range(LAYERS)]}

    def one(w: Any, cache: Any, x: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        x = (x + w["decoder/places"][position])[:, None]
        rows, S = jnp.arange(len(position)), cache["layers"][0]["k"].shape[2]
        before = (jnp.arange(S)[None] <= position[:, None])[:, None]
        seen = (jnp.arange(S)[None] < cache["length"][:, None])[:, None]
        layers = []
        for layer, kept in enumerate(cache["layers"]):

            def own(k: jax.Array, v: jax.Array, kept: Any = kept) -> tuple[jax.Array, jax.Array]:
                at = (rows, slice(None), position)
                return kept["k"].at[at].set(k[:, :, 0]), kept["v"].at[at].set(v[:, :, 0])

            x, (k, v) = _layer(w, layer, x, own, before, (kept["ck"], kept["cv"]), seen)
            layers.append({**kept, "k": k, "v": v})
        return _logits(w, x[:, 0]), {**cache, "layers": layers}

    def spread(logits: jax.Array) -> jax.Array:
        """Logits of all tokens: those of questions are never said."""
        return jnp.concatenate([jnp.full((logits.shape[0], words.first), _NEVER), logits], 1)

    def prefill(w: Any, tokens: jax.Array, length: jax.Array) -> tuple[jax.Array, Any]:
        states = encode(w, tokens, length)
        cache = init_cache(w, *tokens.shape)
        for layer, kept in enumerate(cache["layers"]):
            kept["ck"], kept["cv"] = asked(w, layer, states)
        start = jnp.broadcast_to(w["decoder/start"], (tokens.shape[0], WIDTH))
        logits, cache = one(w, {**cache, "length": length}, start, jnp.zeros(tokens.shape[0], jnp.int32))
        return spread(decided(w, logits, words)), cache

    def decode(w: Any, cache: Any, token: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
        said = w["decoder/words"][jnp.clip(token - words.first, 0, words.count - 1)]
        logits, cache = one(w, cache, said, position)
        return spread(logits), cache

    return init_cache, prefill, decode
