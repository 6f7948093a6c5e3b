"""Small models that generate, in plain JAX, Linen and NNX, and how their frameworks decode them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

VOCABULARY, WIDTH, HEADS, LONGEST = 23, 16, 2, 32


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / np.sqrt(shape[0]))


def attend(q, k, v, mask):
    """`q[B, T, D]` to `k, v[B, S, D]`; `mask[B, T, S]` says what is seen."""

    def split(x):
        return x.reshape(*x.shape[:2], HEADS, -1)

    scores = jnp.einsum("bthd,bshd->bhts", split(q), split(k)) / np.sqrt(WIDTH // HEADS).astype(np.float32)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, jnp.float32(-1e9)), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, split(v)).reshape(q.shape)


def decoder_weights(layers=2):
    def layer(i):
        names = ("q", "k", "v", "o")
        w = {name: normal(10 * i + n, WIDTH, WIDTH) for n, name in enumerate(names)}
        return w | {"up": normal(10 * i + 5, WIDTH, 32), "down": normal(10 * i + 6, 32, WIDTH)}

    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *[layer(i) for i in range(layers)])
    return {"embed": normal(100, VOCABULARY, WIDTH) * 4, "places": normal(101, 32, WIDTH) * 4, "layers": stacked}


def part(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def block(w, x, k, v, mask):
    x = x + attend(x @ w["q"], k, v, mask) @ w["o"]
    return x + jax.nn.gelu(x @ w["up"]) @ w["down"]


class Decoder:
    """A decoder-only Transformer whose layers are a scanned stack or a Python loop."""

    def __init__(self, scanned):
        self.scanned = scanned

    def over(self, w, x, cache, body):
        """`body(w, x, cache of a layer) -> x, cache` over all layers."""
        if self.scanned:
            return jax.lax.scan(lambda x, wc: body(wc[0], x, wc[1]), x, (w["layers"], cache))
        layers = w["layers"]["q"].shape[0]
        after = []
        for i in range(layers):
            x, made = body(part(w["layers"], i), x, part(cache, i))
            after.append(made)
        return x, jax.tree.map(lambda *parts: jnp.stack(parts), *after)

    def init_cache(self, w, B, S):
        shape = (w["layers"]["q"].shape[0], B, S, WIDTH)
        return {"k": jnp.zeros(shape, "float32"), "v": jnp.zeros(shape, "float32")}

    def prefill(self, w, tokens, length):
        B, S = tokens.shape
        x = w["embed"][tokens] + w["places"][:S][None]
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool))[None], (B, S, S))

        def body(layer, x, cache):
            k, v = x @ layer["k"], x @ layer["v"]
            return block(layer, x, k, v, mask), {"k": k, "v": v}

        x, cache = self.over(w, x, self.init_cache(w, B, S), body)
        last = jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)[:, 0]
        return last @ w["embed"].T, cache

    def decode(self, w, cache, token, position):
        x = (w["embed"][token] + w["places"][position])[:, None]
        S = cache["k"].shape[2]
        mask = (jnp.arange(S)[None] <= position[:, None])[:, None]
        rows = jnp.arange(token.shape[0])

        def body(layer, x, cache):
            k = cache["k"].at[rows, position].set((x @ layer["k"])[:, 0])
            v = cache["v"].at[rows, position].set((x @ layer["v"])[:, 0])
            return block(layer, x, k, v, mask), {"k": k, "v": v}

        x, cache = self.over(w, x, cache, body)
        return x[:, 0] @ w["embed"].T, cache

    def reference(self, w, prompt, count):
        """Greedy tokens by reading everything anew for each token, without a cache."""
        tokens, read = list(prompt), jax.jit(self.prefill)
        for _ in range(count):
            padded = np.array([tokens + [0] * (LONGEST - len(tokens))], "int32")
            logits, _ = read(w, padded, np.array([len(tokens)], "int32"))
            tokens.append(int(np.argmax(logits[0])))
        return tokens[len(prompt) :]


START = 1


def seq2seq_weights():
    names = ("eq", "ek", "ev", "eo", "q", "k", "v", "o", "cq", "ck", "cv", "co")
    w = {name: normal(200 + n, WIDTH, WIDTH) for n, name in enumerate(names)}
    return w | {
        "embed": normal(250, VOCABULARY, WIDTH) * 4,
        "places": normal(251, 32, WIDTH) * 8,
        "out": normal(252, WIDTH, VOCABULARY),
    }


class Seq2Seq:
    """An encoder-decoder in the manner of T5: the decoder attends to itself and to the encoded prompt."""

    def encode(self, w, tokens, length):
        B, S = tokens.shape
        x = w["embed"][tokens] + w["places"][:S][None]
        seen = jnp.broadcast_to((jnp.arange(S)[None] < length[:, None])[:, None], (B, S, S))
        return x + attend(x @ w["eq"], x @ w["ek"], x @ w["ev"], seen) @ w["eo"]

    def init_cache(self, w, B, S):
        def kv():
            return jnp.zeros((B, S, WIDTH), "float32")

        return {"k": kv(), "v": kv(), "ck": kv(), "cv": kv(), "length": jnp.zeros(B, "int32")}

    def prefill(self, w, tokens, length):
        B, S = tokens.shape
        encoded = self.encode(w, tokens, length)
        cache = self.init_cache(w, B, S) | {"ck": encoded @ w["ck"], "cv": encoded @ w["cv"], "length": length}
        return self.decode(w, cache, jnp.full(B, START, "int32"), jnp.zeros(B, "int32"))

    def decode(self, w, cache, token, position):
        x = (w["embed"][token] + w["places"][position])[:, None]
        rows, S = jnp.arange(token.shape[0]), cache["k"].shape[1]
        k = cache["k"].at[rows, position].set((x @ w["k"])[:, 0])
        v = cache["v"].at[rows, position].set((x @ w["v"])[:, 0])
        x = x + attend(x @ w["q"], k, v, (jnp.arange(S)[None] <= position[:, None])[:, None]) @ w["o"]
        told = (jnp.arange(cache["ck"].shape[1])[None] < cache["length"][:, None])[:, None]
        x = x + attend(x @ w["cq"], cache["ck"], cache["cv"], told) @ w["co"]
        return x[:, 0] @ w["out"], cache | {"k": k, "v": v}

    def reference(self, w, prompt, count):
        """Greedy tokens by decoding the whole output anew for each token, without a cache."""
        tokens = np.array([list(prompt) + [0] * (LONGEST - len(prompt))], "int32")
        length, out, read = np.array([len(prompt)], "int32"), [START], jax.jit(self.whole)
        for _ in range(count):
            logits = read(w, tokens, length, np.array([out + [0] * (LONGEST - len(out))], "int32"))
            out.append(int(np.argmax(logits[0, len(out) - 1])))
        return out[1:]

    def whole(self, w, tokens, length, out):
        encoded, T = self.encode(w, tokens, length), out.shape[1]
        x = w["embed"][out] + w["places"][:T][None]
        x = x + attend(x @ w["q"], x @ w["k"], x @ w["v"], jnp.tril(jnp.ones((T, T), bool))[None]) @ w["o"]
        told = jnp.broadcast_to((jnp.arange(tokens.shape[1])[None] < length[:, None])[:, None], (1, T, tokens.shape[1]))
        return (x + attend(x @ w["cq"], encoded @ w["ck"], encoded @ w["cv"], told) @ w["co"]) @ w["out"]


class LinenDecoder(nn.Module):
    @nn.compact
    def __call__(self, token, position):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(token) + nn.Embed(32, WIDTH, name="places")(position)
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(HEADS, decode=True)(nn.LayerNorm()(x))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(32)(x)))
        return nn.Dense(VOCABULARY)(x)


def linen_decoder():
    module = LinenDecoder()
    one = jnp.ones((1, 1), "int32")
    return module, module.init(jax.random.key(3), one, one)


def linen_reference(module, variables, prompt, count, capacity):
    """Greedy tokens as Flax decodes: a token at a time, its own cache and counter."""
    whole = jnp.zeros((1, capacity), "int32")
    cache = module.init(jax.random.key(0), whole, whole)["cache"]
    step = jax.jit(
        lambda cache, token, position: module.apply(
            {"params": variables["params"], "cache": cache}, token, position, mutable=["cache"]
        )
    )
    tokens, out = list(prompt), []
    for place in range(len(prompt) + count - 1):
        logits, after = step(cache, jnp.asarray([[tokens[place]]], "int32"), jnp.asarray([[place]], "int32"))
        cache = after["cache"]
        if place >= len(prompt) - 1:
            out.append(int(jnp.argmax(logits[0, -1])))
            tokens.append(out[-1])
    return out


class NnxDecoder(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.places = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), nnx.Embed(32, WIDTH, rngs=rngs)
        self.attention = nnx.List([nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=rngs) for _ in range(2)])
        self.out = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, token, positions):
        x = self.embed(token) + self.places(positions)
        for attention in self.attention:
            x = x + attention(x)
        return self.out(x)


def nnx_reference(module, prompt, count, capacity):
    """Greedy tokens as NNX decodes."""
    module = nnx.clone(module)
    for attention in module.attention:
        attention.init_cache((1, capacity, WIDTH))
    step = nnx.jit(lambda module, token, place: module(token, place))
    tokens, out = list(prompt), []
    for place in range(len(prompt) + count - 1):
        logits = step(module, np.array([[tokens[place]]], "int32"), np.array([[place]], "int32"))
        if place >= len(prompt) - 1:
            out.append(int(np.argmax(logits[0, -1])))
            tokens.append(out[-1])
    return out
