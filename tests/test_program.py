"""Programs: specs, inference of outputs, and the ways to make one."""

import dataclasses
import gc
import re
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lepton_xla.adapters import from_linen, from_nnx
from lepton_xla.errors import ModelError
from lepton_xla.program import Expansion, Program, TensorSpec, trace
from lepton_xla.report import PassReport
from lepton_xla.trees import leaf_bytes, name_leaves, tree_bytes

ROWS = {"x": TensorSpec(("batch", 3), "float32")}
W = {"w": jnp.asarray(np.arange(6, dtype=np.float32).reshape(3, 2))}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


# Specs.


def test_a_spec_prints_its_shape_and_fills_in_sizes():
    spec = TensorSpec(["batch", 28, "seq"], "bfloat16")
    assert str(spec) == "bfloat16[batch, 28, seq]"
    assert spec.shape == ("batch", 28, "seq")
    assert spec.symbols == ("batch", "seq")
    filled = spec.at({"batch": 2, "seq": 5, "unused": 1})
    assert (filled.shape, filled.dtype) == ((2, 28, 5), jnp.bfloat16)
    assert TensorSpec((), jnp.float32).dtype == "float32"
    assert TensorSpec(("batch",), "float32") == TensorSpec(("batch",), np.float32)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((-1, 3), "float32", "dimension -1 is neither a size >= 0 nor a name"),
        (("", 3), "float32", "dimension '' is neither"),
        (("2b", 3), "float32", "dimension '2b' is neither"),
        ((1.5,), "float32", "dimension 1.5 is neither"),
        ((None,), "float32", "dimension None is neither"),
        ((3,), "float33", "unknown dtype 'float33'"),
        ((3,), None, "unknown dtype None"),
        ("batch", "float32", "the shape 'batch' is not a tuple such as"),
        (3, "float32", "the shape 3 is not a tuple"),
    ],
)
def test_malformed_specs_are_refused(shape, dtype, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        TensorSpec(shape, dtype)


def test_a_missing_size_is_named():
    with pytest.raises(ModelError, match=r"no size given for dimension 'seq'; sizes given: \{'batch': 2\}"):
        TensorSpec(("batch", "seq"), "int32").at({"batch": 2})


# Names of leaves, and their bytes.


def test_paths_of_leaves():
    tree = {"a": [1, {"b": 2}], "c": (3,)}
    assert name_leaves(tree) == {"a/0": 1, "a/1/b": 2, "c/0": 3}
    assert name_leaves(5, single="output") == {"output": 5}
    assert name_leaves((1, [2, 3]), single="output") == {"output_0": 1, "output_1/0": 2, "output_1/1": 3}
    with pytest.raises(ModelError, match="two leaves have the path 'a/b'"):
        name_leaves({"a": {"b": 1}, "a/b": 2})


def test_bytes_count_what_is_held():
    assert leaf_bytes((3, 5), "float32") == 60
    assert leaf_bytes((3, 5), "bfloat16") == 30
    assert leaf_bytes((3, 5), "int8") == 15
    assert leaf_bytes((3, 5), "int4") == 8  # 15 half bytes
    assert leaf_bytes((), "float32") == 4
    assert leaf_bytes((0, 5), "float32") == 0
    assert tree_bytes({"a": jnp.zeros((2, 3)), "b": [jnp.zeros(4, jnp.int8)]}) == 28


# `trace`.


def test_trace_runs_the_function_on_named_weights():
    weights = {"layer": {"w": W["w"], "b": jnp.ones(2)}}
    program = trace(lambda w, x: x @ w["layer"]["w"] + w["layer"]["b"][None], weights, ROWS)
    assert list(program.weights) == ["layer/b", "layer/w"]
    assert program.outputs == {"output": TensorSpec(("batch", 2), "float32")}
    assert program.symbols == ("batch",)
    assert program.weights_bytes == 4 * 8
    x = jnp.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(program(program.weights, x), [[17, 23]])
    np.testing.assert_array_equal(program.named_outputs(program.weights, x)["output"], [[17, 23]])
    # Weights are arguments: other ones give another result.
    zeros = jax.tree.map(jnp.zeros_like, program.weights)
    np.testing.assert_array_equal(program(zeros, x), [[0, 0]])
    assert not program.jaxpr({"batch": 4}).consts
    assert program.jaxpr({"batch": 4}).out_avals[0].shape == (4, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        program.weights = {}
    report = PassReport("fold")
    assert program.replace(history=(report,)).history == (report,)
    assert program.history == ()


def test_a_bare_array_or_a_list_of_weights():
    assert list(trace(lambda w, x: x @ w, W["w"], ROWS).weights) == ["weights"]
    assert list(trace(lambda w, x: x @ w[0] + w[1][None], [W["w"], jnp.ones(2)], ROWS).weights) == ["0", "1"]


def test_outputs_in_a_tree():
    def fn(weights, x):
        return {"logits": x @ weights["w"], "extra": (jnp.argmax(x, 1), jnp.float32(0)), "none": None}

    assert trace(fn, W, ROWS).outputs == {
        "extra/0": TensorSpec(("batch",), "int32"),
        "extra/1": TensorSpec((), "float32"),
        "logits": TensorSpec(("batch", 2), "float32"),
    }
    several = trace(lambda w, x: (x, {"y": x > 0}), W, ROWS)
    assert several.outputs == {
        "output_0": TensorSpec(("batch", 3), "float32"),
        "output_1/y": TensorSpec(("batch", 3), "bool"),
    }
    assert list(several.named_outputs(W, jnp.ones((1, 3)))) == ["output_0", "output_1/y"]


def test_two_symbols_are_told_apart_and_fixed_sizes_stay_fixed():
    inputs = {
        "tokens": TensorSpec(("batch", "seq"), "int32"),
        "mask": TensorSpec(("batch", "seq"), "bool"),
        "bias": TensorSpec(("seq",), "float32"),
    }

    def fn(weights, tokens, mask, bias):
        x = jnp.take(weights["w"], tokens, axis=0) * mask[..., None].astype(jnp.float32)
        scores = jnp.einsum("bqd,bkd->bqk", x, x) + bias[None, None]
        return {"hidden": x, "scores": scores, "pooled": x.sum(1), "square": jnp.zeros((16, 32)), "bias": bias[::-1]}

    program = trace(fn, W, inputs)
    assert program.symbols == ("batch", "seq")
    assert {name: spec.shape for name, spec in program.outputs.items()} == {
        "bias": ("seq",),
        "hidden": ("batch", "seq", 2),
        "pooled": ("batch", 2),
        "scores": ("batch", "seq", "seq"),
        "square": (16, 32),
    }
    sizes = {"batch": 5, "seq": 7}
    shapes = jax.eval_shape(fn, W, *program.abstract_inputs(sizes))
    assert {name: spec.at(sizes).shape for name, spec in program.outputs.items()} == {
        name: leaf.shape for name, leaf in shapes.items()
    }


def test_a_short_table_of_positions_is_no_obstacle():
    """Sequences of eight and more do not fit: small sizes are tried too."""

    def fn(weights, tokens):
        return tokens.astype(jnp.float32) + weights["positions"][: tokens.shape[1]][None]

    program = trace(fn, {"positions": array(6)}, {"tokens": TensorSpec(("batch", "seq"), "int32")})
    assert program.outputs["output"].shape == ("batch", "seq")


def test_a_program_without_symbols():
    program = trace(lambda w, x: x @ w["w"], W, {"x": TensorSpec((4, 3), "float32")})
    assert (program.symbols, program.outputs["output"].shape) == ((), (4, 2))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (
            lambda w, x: jnp.concatenate([x, x]),
            r"dimension 0 is 32 at batch=16 and 48 at batch=24; an output dimension",
        ),
        (lambda w, x: x[1:], "dimension 0 is 15 at batch=16"),
        (lambda w, x: x.reshape(-1), "dimension 0 is 48 at batch=16"),
    ],
)
def test_an_output_size_that_is_not_its_symbol_is_refused(fn, message):
    with pytest.raises(ModelError, match=message):
        trace(fn, W, ROWS)


def test_outputs_that_change_with_the_size_are_refused():
    with pytest.raises(ModelError, match="names or ranks of the outputs change with the size of 'batch'"):
        trace(lambda w, x: {f"y{len(x)}": x}, W, ROWS)
    with pytest.raises(ModelError, match="names or ranks of the outputs change with the size of 'batch'"):
        trace(lambda w, x: x if len(x) > 16 else x.sum(1), W, ROWS)
    with pytest.raises(ModelError, match="the model returns nothing"):
        trace(lambda w, x: None, W, ROWS)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda w, x: x @ w["w"].T, "TypeError: dot_general requires contracting dimensions"),
        (lambda w, x: w["missing"], "KeyError: 'missing'"),
        (lambda w, x: x if x[0, 0] > 0 else -x, "TracerBoolConversionError: Attempted boolean conversion"),
        (lambda w: w, "TypeError: .* takes 1 positional argument but 2 were given"),
    ],
)
def test_a_function_that_cannot_be_traced_is_refused_in_one_line(fn, reason):
    with pytest.raises(
        ModelError, match=rf"cannot be traced with inputs {{x: float32\[batch, 3\]}} at .*: {reason}"
    ) as e:
        trace(fn, W, ROWS)
    assert "\n" not in str(e.value)
    assert '"' not in str(e.value)


def test_an_error_without_a_message_is_named():
    def fn(weights, x):
        raise NotImplementedError

    with pytest.raises(ModelError, match="NotImplementedError: no message"):
        trace(fn, W, ROWS)


def test_weights_that_are_not_arrays_are_refused():
    with pytest.raises(ModelError, match="weight 'act/name' is a str, not an array"):
        trace(lambda w, x: x, {"act": {"name": "relu"}, "w": W["w"]}, ROWS)
    with pytest.raises(ModelError, match="weight 'scale' is a float, not an array"):
        trace(lambda w, x: x, {"scale": 0.5}, ROWS)


def test_disabled_dtypes_are_refused():
    with pytest.raises(ModelError, match="input 'x' is int64, which JAX computes as int32 unless jax_enable_x64"):
        trace(lambda w, x: x, W, {"x": TensorSpec(("batch",), "int64")})


# Flax.


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, train, *, deterministic: bool = False):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(4, name="up")(x))
        x = nn.Dropout(0.5, deterministic=deterministic)(x)
        return {"logits": nn.Dense(2, name="head")(x)}


class Two(nn.Module):
    def setup(self):
        self.dense = nn.Dense(2)

    def __call__(self, x):
        return self.dense(x)

    def twice(self, x, *, factor):
        return self.dense(x) * factor


def test_from_linen_sets_inference_mode_and_takes_all_collections_as_weights():
    module = Classifier()
    x = array(5, 3)
    variables = module.init(jax.random.key(0), x, False, deterministic=True)
    stats = {"norm": {"mean": array(4, seed=1), "var": array(4, seed=2) ** 2 + 1}}
    variables = {**variables, "batch_stats": stats}
    program = from_linen(module, variables, ROWS)
    assert sorted(program.weights) == [
        "batch_stats/norm/mean", "batch_stats/norm/var", "params/head/bias", "params/head/kernel",
        "params/norm/bias", "params/norm/scale", "params/up/bias", "params/up/kernel",
    ]  # fmt: skip
    assert program.outputs == {"logits": TensorSpec(("batch", 2), "float32")}
    want = module.apply(variables, x, False, deterministic=True)
    np.testing.assert_array_equal(program(program.weights, x)["logits"], want["logits"])

    # By hand, in float64: the running statistics are used, and nothing is dropped.
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    hidden = np.asarray(x) @ p["params"]["up"]["kernel"] + p["params"]["up"]["bias"]
    normed = (hidden - p["batch_stats"]["norm"]["mean"]) / np.sqrt(p["batch_stats"]["norm"]["var"] + 1e-5)
    np.testing.assert_allclose(want["logits"], normed @ p["params"]["head"]["kernel"], rtol=1e-4, atol=1e-5)

    # State is a weight like any other.
    moved = program.weights | {"batch_stats/norm/mean": program.weights["batch_stats/norm/mean"] + 1}
    assert float(jnp.abs(program(moved, x)["logits"] - want["logits"]).max()) > 0.1


def test_from_linen_arguments_given_win():
    module = Classifier()
    variables = module.init(jax.random.key(0), array(5, 3), False, deterministic=True)
    with pytest.raises(ModelError, match=r"cannot be traced .* ModifyScopeVariableError"):
        from_linen(module, variables, ROWS, train=True)
    with pytest.raises(ModelError, match=r"cannot be traced .* InvalidRngError"):
        from_linen(module, variables, ROWS, deterministic=False)


def test_from_linen_with_another_method():
    variables = Two().init(jax.random.key(0), array(1, 3))
    program = from_linen(Two(), variables, ROWS, method="twice", factor=3)
    x = array(4, 3)
    np.testing.assert_array_equal(program(program.weights, x), 3 * Two().apply(variables, x))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.List([nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x, *, scale=1):
        return self.out[0](self.drop(self.norm(self.dense(x)))) * scale


def test_from_nnx_runs_a_copy_in_inference_mode():
    module = NNXNet(nnx.Rngs(0))
    module(array(6, 3, seed=3))  # moves the running statistics
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    program = from_nnx(module, ROWS)
    assert sorted(program.weights) == [
        "dense/bias", "dense/kernel", "norm/bias", "norm/mean", "norm/scale", "norm/var", "out/0/bias", "out/0/kernel",
    ]  # fmt: skip

    assert not module.drop.deterministic
    assert not module.norm.use_running_average
    x = array(5, 3)
    got = program(program.weights, x)
    np.testing.assert_array_equal(program(program.weights, x), got)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngState))))
    jax.tree.map(np.testing.assert_array_equal, before, after)

    scaled = from_nnx(module, ROWS, scale=2)
    module.eval()
    np.testing.assert_allclose(got, module(x), rtol=1e-6)
    np.testing.assert_allclose(scaled(scaled.weights, x), 2 * got, rtol=1e-6)
    assert np.abs(before["norm"]["mean"]).max() > 0

    zeros = jax.tree.map(jnp.zeros_like, program.weights)
    np.testing.assert_array_equal(program(zeros, x), np.zeros((5, 2)))
    assert program.jaxpr({"batch": 2}).out_avals[0].shape == (2, 2)


def test_a_program_is_plain_data():
    assert [field.name for field in dataclasses.fields(Program)] == [
        "fn", "weights", "inputs", "outputs", "masks", "history", "expansion", "origin", "axes", "derivation",
        "generation", "conversion",
    ]  # fmt: skip


def test_a_new_function_drops_the_expansion_of_the_old_one():
    program = trace(lambda w, x: x * w, np.float32(2), ROWS)
    unpacked = program.replace(expansion=Expansion(lambda weights: weights, program.fn))
    assert unpacked.expansion is not None
    assert unpacked.replace(history=()).expansion is unpacked.expansion
    assert unpacked.replace(fn=program.fn).expansion is None


def test_masks_of_another_model_are_refused() -> None:
    rows = {"x": TensorSpec(("batch", 6), "float32")}
    program = trace(lambda w, x: x @ w["a"] @ w["b"], {"a": jnp.ones((6, 8)), "b": jnp.ones((8, 3))}, rows)
    masks = {"a": jnp.ones((6, 8), bool)}
    assert program.replace(masks=masks).masks is masks
    for other, message in (
        ({"a": jnp.ones((8, 6), bool)}, r"mask of weight 'a' has shape \(8, 6\), the weight \(6, 8\); use masks"),
        ({"c": jnp.ones((6, 8), bool)}, "mask 'c' has no weight; the weights are a, b"),
    ):
        with pytest.raises(ModelError, match=message):
            program.replace(masks=other)
    # Weights that take the place of the pruned ones must be theirs too.
    with pytest.raises(ModelError, match=r"mask of weight 'a' has shape \(6, 8\), the weight \(6, 4\)"):
        program.replace(masks=masks).replace(weights={"a": jnp.ones((6, 4)), "b": jnp.ones((4, 3))})


def test_weights_that_others_replaced_are_freed():
    """A function that holds on to them would keep the float weights of every optimized model in memory."""
    rows = {"x": TensorSpec(("batch", 6), "float32")}
    program = trace(lambda w, x: x @ w["a"], {"a": jnp.ones((6, 8))}, rows)
    held = weakref.ref(program.weights["a"])
    other = program.replace(weights={"a": jnp.zeros((6, 8))})
    assert held() is not None
    del program
    gc.collect()
    assert held() is None
    assert jnp.all(other.fn(other.weights, jnp.ones((2, 6))) == 0)
