"""Attention in one pass against NumPy in float64, and which jaxprs it is found in."""

import hashlib
import subprocess
import sys

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limited import ON_ONE_CORE, here

import lepton_xla as lx
from lepton_xla.kernels import attention, installation, integer_product
from lepton_xla.kernels.epilogue import Epilogue
from lepton_xla.passes.alternatives import attending, autotuning
from lepton_xla.passes.core.timing import Timer
from lepton_xla.quant import quantize

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def array(*shape, seed=1):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def reference(query, key, value, bias=None, scale=1.0, *, masks=False):
    query, key, value = (each.astype(np.float64) for each in (query, key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) * scale
    if bias is not None:
        scores = np.where(bias == 0, scores, bias) if masks else scores + bias
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
        return np.einsum("bhqk,bkhe->bqhe", weights / weights.sum(axis=-1, keepdims=True), value)


def operands(batch, queries, keys, heads, depth, width):
    return (
        array(batch, queries, heads, depth, seed=1),
        array(batch, keys, heads, depth, seed=2),
        array(batch, keys, heads, width, seed=3),
    )


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 20),
    keys=st.integers(1, 70),
    heads=st.integers(1, 3),
    depth=st.integers(1, 40),
    width=st.integers(1, 40),
    scale=st.sampled_from([1.0, -0.3, 0.1]),
    biased=st.sampled_from(["", "b", "hk", "q", "bhqk"]),
    heads_first=st.booleans(),
    dtypes=st.sampled_from([("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]),
)
def test_every_shape(variants, batch, queries, keys, heads, depth, width, scale, biased, heads_first, dtypes):
    given_operands = [jnp.asarray(each, dtypes[0]) for each in operands(batch, queries, keys, heads, depth, width)]
    shape = (batch, *(size if axis in biased else 1 for axis, size in zip("hqk", (heads, queries, keys), strict=True)))
    bias = array(*shape) if biased else None
    expected = reference(*map(np.asarray, given_operands), bias, scale)
    query, *rows = given_operands
    rows = [jnp.swapaxes(each, 1, 2) if heads_first else each for each in rows]
    params = {"scale": scale, "heads_first": heads_first, "dtype": dtypes[1]}
    # A result of 16 bits is the same, rounded: by 1 / 256 at most.
    tolerance = TOLERANCE if dtypes[1] == "float32" else {"rtol": 2**-8 + 1e-5, "atol": 1e-5}
    for _ in variants():
        got = attention.attend(query, *rows, None if bias is None else jnp.asarray(bias), **params)
        np.testing.assert_allclose(got.astype("float32"), expected, **tolerance)


# By heads, by queries, and of single queries.
@pytest.mark.parametrize("shape", [(2, 130, 130, 6, 32, 32), (1, 200, 300, 1, 64, 17), (4, 1, 200, 6, 32, 40)])
def test_attention_that_is_spread_over_threads(variants, shape):
    given_operands = operands(*shape)
    for _ in variants():
        got = attention.attend(*map(jnp.asarray, given_operands), scale=0.2)
        np.testing.assert_allclose(got, reference(*given_operands, scale=0.2), **TOLERANCE)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("score", [-2e38, -1e9, -np.inf])
def test_masks(variants, queries, score):
    """What is masked has no weight; where all is masked, all have the same or are NaN, as in XLA's operations."""
    given_operands = operands(2, queries, 101, 2, 8, 8)
    bias = np.where(np.random.default_rng(0).random((2, 1, queries, 101)) < 0.5, np.float32(score), np.float32(0))
    bias[0, 0, -1], bias[1, 0, 0, 40:] = score, score
    expected = reference(*given_operands, bias, masks=True)
    if np.isfinite(score):
        np.testing.assert_allclose(expected[0, -1], given_operands[2][0].mean(axis=0), **TOLERANCE)
    assert np.isnan(expected[0, -1]).all() == np.isinf(score)
    for _ in variants():
        got = attention.attend(*map(jnp.asarray, given_operands), jnp.asarray(bias), masks=True)
        np.testing.assert_allclose(got, expected, **TOLERANCE)


def test_what_a_single_query_does_not_see_is_not_read(variants):
    query, key, value = operands(2, 1, 50, 3, 20, 20)
    bias = np.where(np.arange(50) < np.array([[30], [7]]), np.float32(0), np.float32(-1e9))[:, None, None]
    expected = reference(query, key, value, bias, masks=True)
    key[1, 7:], value[0, 30:] = np.nan, np.inf
    for _ in variants():
        got = attention.attend(*map(jnp.asarray, (query, key, value)), jnp.asarray(bias), masks=True)
        np.testing.assert_allclose(got, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("shape", "dtype", "heads_first"),
    [
        ((2, 19, 33, 3, 32, 32), "float32", False),
        ((1, 8, 128, 2, 40, 17), "float32", True),
        ((1, 5, 512, 1, 7, 64), "bfloat16", False),
        ((1, 9, 20, 2, 8, 8), "bfloat16", True),
    ],
)
def test_rounded_operands(variants, shape, dtype, heads_first):
    """To within some steps of the largest magnitude; what is infinite or NaN shows as in float."""
    query, key, value = (np.array(jnp.asarray(each, dtype), np.float32) for each in operands(*shape))
    query[0, 0] *= 2.0**-66
    bias = array(shape[0], 1, 1, shape[2])
    bias[0, 0, 0, 1:3] = -1e9, -np.inf
    expected, large = reference(query, key, value, bias, 0.3), 2.0**30
    strange, infinite = query.copy(), value.copy()
    infinite[0, 4, 0, 0] = np.inf
    strange[0, 1, 0, 0], strange[0, 2, 0, 0] = np.nan, np.inf

    def attended(query, key, value, bias=None, *, scale=0.3, rounds=True):
        rows = (np.swapaxes(each, 1, 2) if heads_first else each for each in (key, value))
        given_operands = [jnp.asarray(each, dtype) for each in (query, *rows)]
        params = {"scale": scale, "heads_first": heads_first, "rounds": rounds, "dtype": "float32"}
        return np.asarray(attention.attend(*given_operands, None if bias is None else jnp.asarray(bias), **params))

    for name in variants():
        got = attended(query, key * large, value * large, bias, scale=0.3 / large)
        np.testing.assert_allclose(got / large, expected, rtol=0, atol=3e-3)
        same = np.array_equal(got, attended(query, key * large, value * large, bias, scale=0.3 / large, rounds=False))
        assert same is (name != "avx512")
        got = attended(strange, key, value, bias)
        assert np.isnan(got[0, 1:3, 0]).all()
        np.testing.assert_allclose(got[0, 3:], expected[0, 3:], rtol=0, atol=3e-3)
        assert np.isinf(attended(query, key, infinite)[0, :, 0, 0]).all()


@pytest.mark.parametrize("keys", [128, 384, 512])
@pytest.mark.parametrize("sink", [5.0, 8.4, 12.0])
def test_many_small_weights_do_not_vanish(variants, keys, sink):
    """Half a step for 16 keys that have the same weight."""
    query, key, value = np.ones((1, 5, 1, 1)), np.zeros((1, keys, 1, 1)), np.ones((1, keys, 1, 1))
    key[0, 3], value[0, 3] = sink, 0
    for _ in variants():
        got = attention.attend(*(jnp.asarray(each, jnp.float32) for each in (query, key, value)), rounds=True)
        np.testing.assert_allclose(got, reference(query, key, value), rtol=0, atol=keys / 32 / 32767 + 1e-5)


@pytest.mark.parametrize("spread", [0.0, 0.2, 1.0, 4.0])
def test_means_of_rounded_operands_are_between_the_values(variants, spread):
    query, key, value = operands(1, 8, 512, 1, 16, 8)
    value = 1 + np.abs(value) / 8
    key[0, 100:105, 0] *= 3
    expected, step = reference(query, key, value, scale=spread), value.max() / 2047
    for _ in variants():
        got = np.asarray(attention.attend(*map(jnp.asarray, (query, key, value)), scale=spread, rounds=True))
        assert np.all(got > value.min(axis=1, keepdims=True) - step)
        assert np.all(got < value.max(axis=1, keepdims=True) + step)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3)


def test_products_of_codes_are_rounded_once_more():
    """Where query, key and value all are; one that is not, or has a float matrix added, keeps all in float."""
    weight = quantize(jnp.asarray(array(8, 8)), "int8").by_columns()
    made = {
        "codes": lambda x: integer_product.multiply(x, weight, None, Epilogue(bias=x[0], activation="relu")),
        "with a matrix": lambda x: integer_product.multiply(x, weight, None, Epilogue(residual=x)),
        "float": lambda x: x,
    }

    def attended(*names):
        def fn(x):
            query, key, value = (made[name](x).reshape(1, -1, 2, 4) for name in names)
            weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
            return jnp.einsum("bhqk,bkhe->bqhe", weights, value)

        (pattern,) = attending.find(jax.make_jaxpr(attending.flat(fn))(jnp.ones((6, 8))))
        return pattern.params["rounds"]

    assert attended("codes", "codes", "codes")
    assert not attended("codes", "codes", "float")
    assert not attended("codes", "with a matrix", "codes")


def test_huge_scores_nan_and_infinities(variants):
    query, key, value = operands(1, 6, 19, 1, 4, 4)
    query[0, 1] *= 1e18
    query[0, 2, 0, 0], query[0, 3, 0, 1] = np.nan, np.inf
    expected = reference(query, key, value)
    assert np.isnan(expected[0, [2, 3]]).all()
    blocked = np.full((1, 1, 6, 1), 0, np.float32)
    blocked[0, 0, 5] = -np.inf
    for _ in variants():
        got = np.asarray(attention.attend(*map(jnp.asarray, (query, key, value))))
        np.testing.assert_allclose(got, expected, **TOLERANCE)
        hidden = attention.attend(*map(jnp.asarray, (query, key, value, blocked)))
        assert np.isnan(np.asarray(hidden)[0, 5]).all()
        np.testing.assert_array_equal(np.asarray(hidden)[0, :5], got[0, :5])
        for at in range(6):  # a single query is computed in another way
            alone = attention.attend(jnp.asarray(query[:, at : at + 1]), jnp.asarray(key), jnp.asarray(value))
            np.testing.assert_allclose(alone, expected[:, at : at + 1], **TOLERANCE)


@pytest.mark.parametrize("shape", [(0, 3, 3, 2, 4, 4), (2, 0, 3, 2, 4, 4), (2, 3, 0, 2, 4, 4), (2, 3, 3, 2, 0, 4)])
def test_nothing_of_something(variants, shape):
    given_operands = operands(*shape)
    expected = np.zeros((shape[0], shape[1], shape[3], shape[5]))
    if shape[2]:
        expected = reference(*given_operands)
    for _ in variants():
        np.testing.assert_allclose(attention.attend(*map(jnp.asarray, given_operands)), expected, **TOLERANCE)


def test_transformations_and_the_fallback(kernels, monkeypatch):
    query, key, value = (np.stack([each, each[::-1]]) for each in operands(2, 3, 5, 2, 4, 4))
    bias = array(2, 1, 3, 5)
    expected = np.stack([reference(*each, bias) for each in zip(query, key, value, strict=True)])
    mapped = jax.vmap(attention.attend, in_axes=(0, 0, 0, None))
    assert "lepton_kernel_attention" in jax.jit(mapped).lower(query, key, value, bias).as_text()
    np.testing.assert_allclose(jax.jit(mapped)(query, key, value, bias), expected, **TOLERANCE)
    _, scanned = jax.jit(lambda *each: jax.lax.scan(lambda _, x: (0, attention.attend(*x)), 0, each))(query, key, value)
    np.testing.assert_allclose(scanned[1], reference(query[1], key[1], value[1]), **TOLERANCE)
    monkeypatch.setenv(installation.VARIABLE, "off")
    off = jax.vmap(lambda *each: attention.attend(*each), in_axes=(0, 0, 0, None))
    assert "custom_call" not in jax.jit(off).lower(query, key, value, bias).as_text()
    np.testing.assert_allclose(jax.jit(off)(query, key, value, bias), expected, **TOLERANCE)


def digest():
    """Of results that parts for several threads were computed of."""
    found = hashlib.sha256()
    many, single = (2, 130, 130, 3, 32, 32), (8, 1, 300, 3, 32, 32)
    for shape, rounds in (many, False), (many, True), (single, False):
        got = attention.attend(*map(jnp.asarray, operands(*shape)), scale=0.2, rounds=rounds)
        found.update(np.asarray(got).tobytes())
    return found.hexdigest()


def test_the_number_of_threads_changes_nothing(kernels):
    script = ON_ONE_CORE.format(here=here(), module="test_attending")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest()


def by_hand(query, key, value, mask):
    """As BERT spells it, with axes for heads that are cut and swapped."""
    bias = (1.0 - mask[:, None, None, :].astype(jnp.float32)) * -1e9
    query, key, value = (jnp.transpose(each, (0, 2, 1, 3)) for each in (query, key, value))
    scores = jax.nn.softmax(query @ jnp.swapaxes(key, 2, 3) * 0.5 + bias, -1)
    return jnp.transpose(scores @ value, (0, 2, 1, 3))


def by_keys(query, key, value, mask):
    """Scores with the keys first."""
    scores = jnp.einsum("bkhd,bqhd->bhkq", key, query) / 2.0 + jnp.where(mask, 0.0, -1e9)[:, None, :, None]
    return jnp.einsum("bhkq,bkhe->behq", jax.nn.softmax(scores, axis=-2), value)


def a_cache(query, key, value, mask):
    """The last query, of keys and values by heads, to which it adds."""
    kept = [jnp.swapaxes(each, 1, 2).at[jnp.arange(2), :, 6].set(each[:, 6] * 2) for each in (key, value)]
    scores = jnp.einsum("bhqd,bhkd->bhqk", jnp.swapaxes(query[:, 6:], 1, 2), kept[0]) / 2
    seen = jax.nn.softmax(jnp.where(mask[:, None, None].astype(bool), scores, -1e9))
    return jnp.einsum("bhqk,bhke->bqhe", seen, kept[1])


def a_sequence(query, key, value, mask):
    """An example of its own, with an axis of size one."""
    given_operands = (each[None] for each in (query[6:], key, value))
    return flax.linen.dot_product_attention(*given_operands, mask=mask[None, None, None].astype(bool))[0]


SPELLINGS = {
    "by hand": by_hand,
    "keys first": by_keys,
    "jax.nn": lambda query, key, value, mask: jax.nn.dot_product_attention(
        query, key, value, mask=mask[:, None, None, :].astype(bool)
    ),
    "causal": lambda query, key, value, _mask: jax.nn.dot_product_attention(query, key, value, is_causal=True),
    "flax": lambda query, key, value, mask: flax.linen.dot_product_attention(
        query, key, value, mask=mask[:, None, None, :].astype(bool)
    ),
    "a small score instead": lambda query, key, value, _mask: jnp.einsum(
        "bhqk,bkhe->bqhe",
        jax.nn.softmax(jnp.where(jnp.tri(7, dtype=bool), jnp.einsum("bqhd,bkhd->bhqk", query, key), -3.0)),
        value,
    ),
    "a cache": a_cache,
    "one sequence at a time": jax.vmap(a_sequence),
    "no axes": lambda query, key, value, _mask: (
        jax.nn.softmax(query[0, :, 0] @ key[0, :, 0].T) @ value[0, :, 0] * jnp.float32(2)
    ),
}


@pytest.mark.parametrize("fn", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_spellings_of_attention_are_found(kernels, fn):
    given_operands = operands(2, 7, 7, 3, 4, 4)
    mask = np.array([[1] * 7, [1] * 3 + [0] * 4])
    found = attending.attend(fn, lambda _pattern: True)
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(found)(*given_operands, mask).eqns]
    assert (names.count("attention"), names.count("dot_general"), names.count("exp")) == (1, 0, 0)
    expected = jax.jit(fn)(*given_operands, mask)
    np.testing.assert_allclose(jax.jit(found)(*given_operands, mask), expected, **TOLERANCE)


def test_what_is_timed_is_the_same(kernels):
    given_operands, mask = operands(2, 7, 7, 3, 4, 4), np.array([[1] * 7, [1] * 3 + [0] * 4])
    (found,) = attending.find(jax.make_jaxpr(attending.flat(a_cache))(*given_operands, mask))
    drawn = [array(*shape.shape, seed=seed) for seed, shape in enumerate(found.shapes)]
    by_xla, by_kernel = (np.asarray(jax.jit(way)(*drawn)) for way in found.ways)
    np.testing.assert_allclose(by_kernel, by_xla, **TOLERANCE)
    hidden = jax.jit(found.ways[0])(*drawn[:3], drawn[3] - 50)
    np.testing.assert_allclose(hidden, reference(drawn[0], *(np.swapaxes(x, 1, 2)[:, :4] for x in drawn[1:3]),
                                                 scale=0.5), **TOLERANCE)  # fmt: skip


def nn_narrow(*given_operands):
    with jax.numpy_dtype_promotion("standard"):  # it computes scores in float32
        return SPELLINGS["jax.nn"](*given_operands)


NARROW = {
    "jax.nn": nn_narrow,
    "flax": SPELLINGS["flax"],
    "products alone": lambda query, key, value, mask: lx.passes.cast(
        lx.trace(
            lambda _w, *given: by_hand(*given), {}, {
                **dict.fromkeys(("query", "key", "value"), lx.TensorSpec((2, 7, 3, 4), "float32")),
                "mask": lx.TensorSpec((2, 7), "int32"),
            },
        ),
        "bfloat16",
    ).fn({}, *(each.astype(jnp.float32) for each in (query, key, value)), mask),
}  # fmt: skip


@pytest.mark.parametrize("fn", NARROW.values(), ids=NARROW.keys())
def test_attention_of_bfloat16_is_found(kernels, fn):
    given_operands = [jnp.asarray(each, jnp.bfloat16) for each in operands(2, 7, 7, 3, 4, 4)]
    mask = np.array([[1] * 7, [1] * 3 + [0] * 4])
    found = attending.attend(fn, lambda _pattern: True)
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(found)(*given_operands, mask).eqns]
    assert (names.count("attention"), names.count("dot_general"), names.count("exp")) == (1, 0, 0)
    expected = jax.jit(fn)(*given_operands, mask).astype("float32")
    np.testing.assert_allclose(jax.jit(found)(*given_operands, mask).astype("float32"), expected, atol=0.02)


def test_float32_attention_of_bfloat16_is_not_rounded_where_there_is_no_kernel():
    def fn(query, key, value):
        wide = [each.astype("float32") for each in (query, key, value)]
        return jax.nn.softmax(wide[0] @ jnp.swapaxes(wide[1], 1, 2)) @ wide[2]

    given_operands = [jnp.asarray(array(2, 7, 4, seed=seed), jnp.bfloat16) for seed in range(3)]
    found = attending.attend(fn, lambda _pattern: True)
    assert "attention" in str(jax.make_jaxpr(found)(*given_operands))
    np.testing.assert_allclose(jax.jit(found)(*given_operands), jax.jit(fn)(*given_operands), rtol=1e-5, atol=1e-5)


def both(query, key, value):
    scores = query @ jnp.swapaxes(key, 1, 2)
    return jax.nn.softmax(scores) @ value + scores[..., :4]


NO_ATTENTION = {
    "scores are read": both,
    "weights are read": lambda query, key, value: (
        (weights := jax.nn.softmax(query @ jnp.swapaxes(key, 1, 2))) @ value + weights[..., :4]
    ),
    "scores are a result": lambda query, key, value: (
        jax.nn.softmax(scores := query @ jnp.swapaxes(key, 1, 2)) @ value,
        scores,
    ),
    "weights are rounded": lambda query, key, value: (
        jax.nn.softmax(query @ jnp.swapaxes(key, 1, 2)).astype("float16").astype("float32") @ value
    ),
    "weights are chosen": lambda query, key, value: (
        (jax.nn.softmax(query @ jnp.swapaxes(key, 1, 2)) + 0.5).astype("int32").astype("float32") @ value
    ),
    "the sum is rounded": lambda query, key, value: (
        (e := jnp.exp((s := query @ jnp.swapaxes(key, 1, 2)) - s.max(-1, keepdims=True)))
        / e.sum(-1, keepdims=True).astype("float16").astype("float32")
        @ value
    ),
    "over queries": lambda query, key, value: (
        jax.nn.softmax(query @ jnp.swapaxes(key, 1, 2), axis=1) @ value  # each key is shared among queries
    ),
    "over examples": lambda query, key, value: jax.nn.softmax(query @ jnp.swapaxes(key, 1, 2), axis=0) @ value,
    "not divided": lambda query, key, value: jnp.exp(query @ jnp.swapaxes(key, 1, 2)) @ value,
    "scaled after the bias": lambda query, key, value: (
        jax.nn.softmax((query @ jnp.swapaxes(key, 1, 2) + jnp.tril(jnp.ones((1, 7, 7)))) * 2) @ value
    ),
    "zero instead": lambda query, key, value: (
        jax.nn.softmax(jnp.where(jnp.tri(7, dtype=bool)[None], query @ jnp.swapaxes(key, 1, 2), jnp.float32(0))) @ value
    ),
}


@pytest.mark.parametrize("fn", NO_ATTENTION.values(), ids=NO_ATTENTION.keys())
def test_what_is_not_attention_stays(kernels, fn):
    given_operands = [array(2, 7, 4, seed=seed) for seed in range(3)]
    found = attending.attend(fn, lambda _pattern: True)
    assert "attention" not in str(jax.make_jaxpr(found)(*given_operands))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(found)(*given_operands), jax.jit(fn)(*given_operands))


def test_axes_that_are_moved_twice_are_not_moved(kernels):
    """Of one example, from which a product drops the axis of examples between the two."""
    given_operands = operands(1, 7, 7, 3, 4, 4)
    found = attending.attend(by_hand, lambda _pattern: True)
    made = jax.make_jaxpr(jax.jit(found))(*given_operands, np.ones((1, 7))).eqns[0].params["jaxpr"]
    kernel = next(eqn for eqn in made.eqns if eqn.primitive.name == "attention")
    assert {"transpose"}.isdisjoint(eqn.primitive.name for eqn in made.eqns if eqn.outvars[0] in kernel.invars)
    np.testing.assert_allclose(
        jax.jit(found)(*given_operands, np.ones((1, 7))), reference(*given_operands, scale=0.5), **TOLERANCE
    )


def attentive(weights, x):
    heads = jnp.reshape(x @ weights["w"], (x.shape[0], x.shape[1], 2, 4))
    return by_hand(heads, heads, heads, jnp.ones(x.shape[:2]))


def attentive_in_codes(weights, x):
    product = integer_product.multiply(jnp.reshape(x, (-1, 8)), quantize(weights["w"], "int8").by_columns())
    heads = jnp.reshape(product, (x.shape[0], x.shape[1], 2, 4))
    return by_hand(heads, heads, heads, jnp.ones(x.shape[:2]))


@pytest.mark.parametrize(
    ("fn", "whole", "chosen", "reason"),
    [
        (attentive, 1.0, "a kernel", "0.50 of the time of XLA's own"),
        (attentive, 3.0, "XLA's own", "alone another way is faster, but not in the whole program"),
        (attentive_in_codes, 1.0, "a kernel", "0.50 of the time of XLA's own; AVX-512 VNNI rounds its operands"),
    ],
    ids=["kept", "refused", "of codes"],
)
def test_attention_is_chosen_by_measurement(kernels, monkeypatch, fn, whole, chosen, reason):
    """Alone the kernel takes half the time; it also has to make the whole program faster."""
    program = lx.trace(fn, {"w": jnp.eye(8)}, {"x": lx.TensorSpec(("batch", 6, 8), "float32")})
    monkeypatch.setattr(
        autotuning,
        "time_programs",
        lambda functions, inputs, *_: [2.0, 1.0] if len(inputs) == 4 else [2.0, whole],
    )
    tuned = lx.passes.autotune(program, sizes=[{"batch": 1}, {"batch": 3}], timer=Timer())
    (report,) = [site for site in tuned.history[-1].sites if site.site == "attention#0"]
    assert report.action == chosen
    assert report.reason.partition(", products of int8")[0] == reason
    x = array(3, 6, 8)
    assert ("attention" in str(jax.make_jaxpr(tuned.fn)(tuned.weights, x))) is (chosen == "a kernel")
    expected = jax.jit(program.fn)(program.weights, x)
    # Rounded operands are off by some steps of their largest magnitude.
    tolerance = {"rtol": 0.0, "atol": 3e-3} if fn is attentive_in_codes else TOLERANCE
    np.testing.assert_allclose(jax.jit(tuned.fn)(tuned.weights, x), expected, **tolerance)


def test_what_is_read_more_than_once(autotuned):
    def fn(query, key, value, bias):
        def scores(factor):
            return factor * query @ jnp.swapaxes(key, 1, 2)

        def ends(scores):
            return jax.nn.softmax(scores) @ value

        weights = jax.nn.softmax(scores(2.5))
        raised = jnp.exp((s := scores(3.5)) - (most := s.max(-1, keepdims=True)))
        return {
            "as it is": ends(scores(1)),
            "query, key and value are one": jax.nn.softmax(query @ jnp.swapaxes(query, 1, 2)) @ query,
            "added to itself": ends((s := scores(2)) + s),
            "its square is added": ends((s := scores(4)) + s * s),
            "masked by itself": ends(jnp.where((s := scores(5)) > 0, s, -9.0)),
            "weights times weights": weights @ weights,
            "squared weights": ((w := jax.nn.softmax(scores(6))) * w) @ value,
            "the greatest is read again": raised / raised.sum(-1, keepdims=True) @ value + most,
            "spread over heads": jax.nn.softmax(scores(7)[:, None] + bias[:, :, None]) @ value[:, None],
            "one key for all examples": (
                jax.nn.softmax(query @ jnp.swapaxes(jnp.broadcast_to(key[:1], key.shape), 1, 2)) @ value
            ),
            "biases of keys": ends(scores(8) + bias[:, :1]),
            "biases of queries": ends(scores(9) + bias[:, 0, :, None]),
            "two scores that are added": ends(scores(10) + jnp.float32(0.1) * key @ jnp.swapaxes(query, 1, 2)),
            "a bias that is a result": ends(scores(0.5) + (s := scores(0.25))) + s[..., :4],
        }

    names = autotuned(fn, *(array(2, 7, 4, seed=seed) for seed in range(3)), array(2, 3, 7))
    assert names.count("attention") >= 5
