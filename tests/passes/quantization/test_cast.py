"""Products on 16-bit floats, compared with float64 on rounded operands; reports on every weight."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from lepton_xla.errors import RecipeError, UnsupportedError
from lepton_xla.passes import cast, quantize
from lepton_xla.passes.planning import resolve
from lepton_xla.program import Expansion, TensorSpec, trace
from lepton_xla.recipe import Recipe

ROWS = {"x": TensorSpec(("batch", 6), "float32")}
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def rounded(values, dtype):
    """To the nearest number the dtype has, as float64."""
    return np.asarray(values, np.float32).astype(DTYPES[dtype]).astype(np.float64)


def product(x, w, dtype):
    return rounded(x, dtype) @ rounded(w, dtype)


def actions(program):
    return {site.site: (site.action, site.reason) for site in program.history[-1].sites}


def run(program, *inputs):
    return jax.jit(program.fn)(program.weights, *inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_narrow_and_the_rest_is_not(dtype):
    def fn(w, x):
        hidden = jnp.tanh(x @ w["a"] + w["bias"][None])
        scaled = hidden * lax.rsqrt(jnp.mean(hidden**2, axis=-1, keepdims=True)) * w["scale"][None]
        return scaled @ w["b"]

    weights = {"a": array(6, 32), "bias": array(32, seed=1), "scale": array(32, seed=2), "b": array(32, 5, seed=3)}
    program = trace(fn, weights, ROWS)
    small = cast(program, dtype)
    x = array(8, 6, seed=4)
    hidden = np.tanh(product(x, weights["a"], dtype) + np.asarray(weights["bias"], np.float64))
    scaled = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True)) * np.asarray(weights["scale"], np.float64)
    out = run(small, x)
    assert out.dtype == jnp.float32
    # Where float32 and float64 round to different 16-bit neighbours, one element is off by a unit in its last place.
    np.testing.assert_allclose(out, product(scaled, weights["b"], dtype), atol=4e-3 if dtype == "bfloat16" else 5e-4)
    exact = run(program, x)
    error = np.linalg.norm(np.asarray(out) - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < (1e-2 if dtype == "bfloat16" else 1e-3)
    assert (small.inputs, small.outputs) == (program.inputs, program.outputs)
    kept = ("kept", "no product takes it")
    assert actions(small) == {"a": (dtype, ""), "b": (dtype, ""), "bias": kept, "scale": kept}
    assert {name: leaf.dtype.name for name, leaf in small.weights.items()} == {
        "a": dtype, "b": dtype, "bias": "float32", "scale": "float32",
    }  # fmt: skip
    report = small.history[-1]
    assert report.metrics["weights_bytes_before"] - report.metrics["weights_bytes_after"] == 2 * (6 * 32 + 32 * 5)
    sizes = {site.site: (site.bytes_before, site.bytes_after) for site in report.sites}
    assert sizes["a"] == (6 * 32 * 4, 6 * 32 * 2)
    assert sizes["bias"] == (128, 128)


def test_sums_are_in_float32():
    # 4096 ones: in bfloat16, 256 + 1 is 256.
    program = cast(
        trace(lambda w, x: x @ w["w"], {"w": jnp.ones((4096, 2))}, {"x": TensorSpec(("b", 4096), "float32")})
    )
    np.testing.assert_array_equal(run(program, jnp.ones((3, 4096))), np.full((3, 2), 4096))


def test_the_compiled_text_has_narrow_products():
    program = cast(
        trace(lambda w, x: jnp.tanh(x @ w["w"]), {"w": array(256, 256)}, {"x": TensorSpec(("b", 256), "float32")})
    )
    lowered = jax.jit(program.fn).lower(program.weights, jnp.ones((32, 256)))
    dots = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(dots) == 1
    assert re.search(r"\(tensor<32x256xbf16>, tensor<256x256xbf16>\) -> tensor<32x256xf32>", dots[0])
    text = lowered.compile().as_text()
    (body,) = [part for part in text.split("\n\n") if re.search(r"\bdot\(", part)]
    assert "bf16[256,256]" in body
    assert "f32[256,256]" not in text  # the weight is not widened on each call


def test_convolutions_embeddings_and_attention():
    def fn(w, ids, image):
        tokens = w["table"][ids]
        scores = jnp.einsum("bsd,btd->bst", tokens, tokens)
        mixed = jnp.einsum("bst,btd->bsd", jax.nn.softmax(scores), tokens)
        features = lax.conv_general_dilated(
            image, w["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return {"mixed": mixed, "features": features, "ids": ids + 1}

    weights = {"table": array(10, 8), "kernel": array(3, 3, 2, 4, seed=1)}
    specs = {"ids": TensorSpec(("batch", "seq"), "int32"), "image": TensorSpec(("batch", 6, 6, 2), "float32")}
    program = trace(fn, weights, specs)
    small = cast(program)
    ids, image = jnp.asarray([[1, 2, 3], [4, 5, 9]]), array(2, 6, 6, 2, seed=2)
    found = run(small, ids, image)
    tokens = rounded(weights["table"], "bfloat16")[np.asarray(ids)]
    scores = np.einsum("bsd,btd->bst", tokens, tokens)
    share = np.exp(scores - scores.max(-1, keepdims=True))
    share = rounded(share / share.sum(-1, keepdims=True), "bfloat16")
    np.testing.assert_allclose(found["mixed"], np.einsum("bst,btd->bsd", share, tokens), atol=2e-2)
    exact = fn(
        {"table": weights["table"], "kernel": jnp.asarray(rounded(weights["kernel"], "bfloat16"), jnp.float32)},
        ids,
        jnp.asarray(rounded(image, "bfloat16"), jnp.float32),
    )
    np.testing.assert_allclose(found["features"], exact["features"], atol=1e-4)
    np.testing.assert_array_equal(found["ids"], ids + 1)
    done = actions(small)
    assert done["table"] == done["kernel"] == ("bfloat16", "")
    assert sorted(action for action, _ in done.values()) == ["bfloat16"] * 2 + ["bfloat16 product"] * 2
    assert small.outputs == program.outputs


def ragged(w, x):
    return lax.ragged_dot(x, w["experts"], jnp.asarray([2, 6], jnp.int32))


def test_ragged_products():
    program = cast(trace(ragged, {"experts": array(2, 6, 3)}, {"x": TensorSpec((8, 6), "float32")}))
    x, experts = array(8, 6, seed=1), array(2, 6, 3)
    expected = np.concatenate([product(x[:2], experts[0], "bfloat16"), product(x[2:], experts[1], "bfloat16")])
    np.testing.assert_allclose(run(program, x), expected, atol=1e-5)
    assert program.weights["experts"].dtype == jnp.bfloat16


# Containers. A reference runs the same function with each product written out on rounded operands.


def narrow(x, w):
    return lax.dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def scanned(dot):
    def fn(w, x):
        def step(carry, w):
            hidden = carry + jnp.tanh(dot(carry, w["w"])) * w["scale"][None]
            return hidden, jnp.sum(hidden)

        return lax.scan(step, x, {"w": w["stack"], "scale": w["scale"]})

    return fn, {"stack": array(3, 6, 6), "scale": array(3, 6)}, {"stack"}


def looped(dot):
    def fn(w, x):
        return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(dot(s[1], w["w"]))), (0, x))[1]

    return fn, {"w": array(6, 6)}, {"w"}


def branching(dot):
    def fn(w, x):
        return lax.cond(x[0, 0] > 0, lambda x: dot(x, w["yes"]), lambda x: dot(x, w["no"]), x)

    return fn, {"yes": array(6, 4), "no": array(6, 4, seed=1)}, {"yes", "no"}


def nested(dot):
    def fn(w, x):
        @jax.custom_jvp
        def activation(x):
            return jnp.maximum(dot(x, w["a"]), 0)

        activation.defjvp(lambda primals, tangents: (activation(*primals), tangents[0]))
        return jax.checkpoint(jax.jit(lambda x: dot(activation(x), w["b"].T)))(x)

    return fn, {"a": array(6, 6), "b": array(4, 6, seed=1)}, {"a", "b"}


def sharded(dot):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(w, x):
        body = lambda w, x: lax.psum(dot(x, w), "x")  # noqa: E731
        return jax.shard_map(body, mesh=mesh, in_specs=(P("x"), P(None, "x")), out_specs=P())(w["w"], x)

    return fn, {"w": array(6, 4)}, {"w"}


def carried(dot):
    """The weight itself is carried along, and so kept as it is; the product is narrow all the same."""

    def fn(w, x):
        def step(carry, _):
            x, w = carry
            return (jnp.tanh(dot(x, w)), w * jnp.float32(0.5)), None

        return lax.scan(step, (x, w["w"]), None, length=3)[0][0]

    return fn, {"w": array(6, 6)}, set()


@pytest.mark.parametrize("make", [scanned, looped, branching, nested, sharded, carried])
def test_containers(make):
    fn, weights, stored = make(lax.dot)
    small = cast(trace(fn, weights, ROWS))
    reference, _, _ = make(narrow)
    for sign in (1, -1):
        x = sign * array(8, 6, seed=7)
        found, expected = run(small, x), jax.jit(reference)(weights, x)
        assert jax.tree.map(lambda leaf: leaf.dtype, found) == jax.tree.map(lambda leaf: leaf.dtype, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    assert {name for name, leaf in small.weights.items() if leaf.dtype == jnp.bfloat16} == stored


# What stays.


def test_sites_named_in_keep_stay():
    program = trace(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], {"a": array(6, 8), "b": array(8, 3)}, ROWS)
    small = cast(program, keep=["b"])
    assert actions(small)["b"] == ("kept", "site 'b' stays as it is: named in keep")
    x = array(5, 6)
    expected = np.tanh(product(x, program.weights["a"], "bfloat16")) @ np.asarray(program.weights["b"], np.float64)
    np.testing.assert_allclose(run(small, x), expected, atol=1e-5)
    both = cast(program, keep=["a", "b"])
    np.testing.assert_array_equal(run(both, x), run(program, x))


def test_a_weight_that_two_products_share_is_narrow_only_if_both_are():
    program = trace(lambda w, x: jnp.tanh(x @ w["w"]) @ w["w"], {"w": array(6, 6)}, ROWS)
    assert cast(program).weights["w"].dtype == jnp.bfloat16
    half = cast(program, keep=["w#1"])
    assert actions(half)["w"] == ("kept", "site 'w#1' stays as it is: named in keep")
    x = array(5, 6)
    expected = np.tanh(product(x, program.weights["w"], "bfloat16")) @ np.asarray(program.weights["w"], np.float64)
    np.testing.assert_allclose(run(half, x), expected, atol=1e-5)


def test_weights_that_are_used_elsewhere_or_do_not_fit_stay():
    def fn(w, x):
        return x @ w["huge"] + jnp.sum(w["both"]) + x @ w["both"] + (x @ w["whole"].astype(jnp.float32))

    weights = {"huge": array(6, 3) * 1e5, "both": array(6, 3), "whole": jnp.ones((6, 3), jnp.int8)}
    small = cast(trace(fn, weights, ROWS), "float16")
    done = actions(small)
    assert done["both"] == ("kept", "it is also used where no product is")
    assert done["huge"][0] == "kept"
    assert re.fullmatch(r"its largest magnitude, .*e\+05, is more than float16 holds", done["huge"][1])
    assert done["whole"] == ("kept", "it is int8")


def test_integer_and_narrow_products_are_left_alone():
    def fn(w, x):
        codes = jnp.round(x).astype(jnp.int8)
        integer = lax.dot(codes, w["codes"], preferred_element_type=jnp.int32)
        return integer.astype(jnp.float32) + lax.dot(x.astype(jnp.bfloat16), w["narrow"]).astype(jnp.float32)

    weights = {"codes": jnp.ones((6, 3), jnp.int8), "narrow": array(6, 3).astype(jnp.bfloat16)}
    program = trace(fn, weights, ROWS)
    small = cast(program)
    assert str(small.jaxpr({"batch": 4})) == str(program.jaxpr({"batch": 4}))
    assert actions(small) == {"codes": ("kept", "it is int8"), "narrow": ("kept", "it is bfloat16 already")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_weights_keep_their_codes_and_are_narrow_once_unpacked(dtype):
    program = trace(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], {"a": array(6, 32), "b": array(32, 5, seed=3)}, ROWS)
    rules = '[[quantize]]\nsites = "a"\nweights = "int4"\nactivations = "none"\ngranularity = "group:3"'
    lowered = quantize(program, resolve(Recipe.parse(rules, name="rules"), program))
    expand = lambda weights: {"a": weights["a"].dequantize(), "b": weights["b"]}  # noqa: E731
    small = cast(lowered.replace(expansion=Expansion(expand, program.fn)), dtype)
    assert actions(small) == {
        "a": ("kept", "it is quantized"),
        "b": (dtype, ""),
        "dot_general#0": (f"{dtype} product", ""),
    }
    assert small.weights["b"].dtype == dtype
    np.testing.assert_array_equal(small.weights["a"].values, lowered.weights["a"].values)
    x = array(8, 6, seed=4)
    expected = product(np.tanh(product(x, lowered.weights["a"].dequantize(), dtype)), program.weights["b"], dtype)
    on_each_call = run(small, x)
    np.testing.assert_allclose(on_each_call, expected, atol=8e-3 if dtype == "bfloat16" else 2e-3)
    error = np.linalg.norm(on_each_call - expected) / np.linalg.norm(expected)
    assert error < 0.2 * np.linalg.norm(run(lowered, x) - expected) / np.linalg.norm(expected)
    unpacked = small.expansion.expand(small.weights)
    assert {name: leaf.dtype.name for name, leaf in unpacked.items()} == {"a": dtype, "b": dtype}
    np.testing.assert_array_equal(jax.jit(small.expansion.fn)(unpacked, x), on_each_call)


def test_integer_products_stay_integer_after_lowering():
    program = trace(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], {"a": array(6, 32), "b": array(32, 5, seed=3)}, ROWS)
    plan = resolve(Recipe.parse('[[quantize]]\nsites = "a"', name="rules"), program)
    small = cast(quantize(program, plan))
    x = array(8, 6, seed=4)
    assert str(small.jaxpr({"batch": 8})).count("preferred_element_type=int32") == 1
    hidden = np.tanh(np.asarray(run(quantize(program.replace(fn=lambda w, x: x @ w["a"]), plan), x), np.float64))
    np.testing.assert_allclose(run(small, x), product(hidden, program.weights["b"], "bfloat16"), atol=4e-3)


def test_outputs_keep_the_dtype_the_product_had():
    spec = {"x": TensorSpec(("batch", 6), "float16")}
    program = trace(
        lambda w, x: lax.dot(x.astype(jnp.float32), w["w"], preferred_element_type=jnp.float16),
        {"w": array(6, 3)},
        spec,
    )
    small = cast(program)
    assert small.outputs == program.outputs
    assert run(small, array(4, 6).astype(jnp.float16)).dtype == jnp.float16


def test_a_precision_asked_for_is_dropped():
    with jax.default_matmul_precision("highest"):
        small = cast(trace(lambda w, x: x @ w["w"], {"w": array(6, 3)}, ROWS))
        assert "HIGHEST" not in str(small.jaxpr({"batch": 4}))


def test_casting_twice_changes_nothing_more():
    once = cast(trace(lambda w, x: x @ w["w"], {"w": array(6, 3)}, ROWS))
    twice = cast(once)
    assert actions(twice)["w"] == ("kept", "it is bfloat16 already")
    x = array(4, 6)
    np.testing.assert_array_equal(run(twice, x), run(once, x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is none of bfloat16, float16"),
        ({"keep": ["b("]}, r"keep 'b\(' is not a regular expression"),
        ({"keep": ["c"]}, "keep 'c' matches none of the program's 1 sites: w"),
    ],
)
def test_what_cannot_be_done(changes, message):
    program = trace(lambda w, x: x @ w["w"], {"w": array(6, 3)}, ROWS)
    with pytest.raises(RecipeError, match=message) as caught:
        cast(program, **changes)
    assert "\n" not in str(caught.value)


def test_a_product_that_cannot_be_reached():
    def fn(w, x):
        solved = lax.custom_linear_solve(lambda v: v @ w["inner"], x[0], lambda _, b: b, symmetric=True)
        return x @ w["w"] + jnp.sum(solved)

    program = trace(fn, {"w": array(6, 3), "inner": jnp.eye(6)}, ROWS)
    with pytest.raises(UnsupportedError, match="custom_linear_solve"):
        cast(program)
    small = cast(program, on_unsupported="keep")
    assert actions(small)["w"] == ("bfloat16", "")
    assert small.weights["inner"].dtype == jnp.float32
    assert run(small, array(4, 6)).shape == (4, 3)
