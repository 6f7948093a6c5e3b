"""The weights report: every original weight occurs once, and bytes add up."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.adapters import from_linen
from lepton_xla.passes import fold, weights_report
from lepton_xla.passes.planning import resolve
from lepton_xla.program import TensorSpec, trace
from lepton_xla.trees import tree_bytes


def recipe(text):
    return lx.Recipe.parse(f'measure = false\non_unsupported = "keep"\n{text}', name="r")


INT8 = '[[quantize]]\nsites = ".*"\nactivations = "none"\n'


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (3,), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.LayerNorm()(nn.relu(x))
        x = nn.RNN(nn.OptimizedLSTMCell(16))(x)
        return nn.Dense(5)(x[:, -1])


def net():
    module = Net()
    variables = module.init(jax.random.key(0), jnp.ones((1, 4, 8)))
    return from_linen(module, variables, {"x": TensorSpec(("batch", 4, 8), "float32")})


def tied():
    weights = {
        "embedding": jnp.asarray(np.random.default_rng(0).normal(size=(20, 8)), jnp.float32),
        "bias": jnp.zeros((1, 20)),
        "unread": jnp.zeros(7),
    }
    look = {"x": TensorSpec(("batch",), "int32")}
    return trace(lambda w, x: w["embedding"][x] @ w["embedding"].T + w["bias"], weights, look)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (net, 'fold = false\n[[prune]]\nsites = ".*"\nsparsity = 0.5\n' + INT8),
        (tied, ""),
        (tied, INT8),
        (tied, 'cast = "bfloat16"\n' + INT8.replace('".*"', '"embedding.*"')),
    ],
    ids=["pruned", "folded", "tied", "cast"],
)
def test_every_weight_is_told_once_and_bytes_add_up(make, text):
    program = make()
    small = lx.optimize(program, recipe(text))
    report = weights_report(small)
    told = [line.site for line in report.sites]
    assert sorted(told) == sorted({*program.weights, *small.weights})
    assert told[: len(program.weights)] == list(program.weights)
    assert sum(line.bytes_before for line in report.sites) == program.weights_bytes
    assert sum(line.bytes_after for line in report.sites) == small.weights_bytes
    for line in report.sites:
        assert line.bytes_before == (tree_bytes(program.weights[line.site]) if line.site in program.weights else 0)
        assert line.bytes_after == (tree_bytes(small.weights[line.site]) if line.site in small.weights else 0)


def test_what_became_of_each_weight():
    small = lx.optimize(net(), recipe(INT8))
    lines = {line.site: (line.action, line.reason) for line in weights_report(small).sites}
    cell, joined = "params/OptimizedLSTMCell_0", "concatenate:hi/kernel+hf/kernel+hg/kernel+ho/kernel"
    gates = ", ".join(f"{cell}/{gate}/kernel" for gate in ("hi", "hf", "hg", "ho"))
    assert lines[f"{cell}/hg/kernel"] == (f"part of {cell}/{joined}", "")
    assert lines[f"{cell}/{joined}"] == ("int8", f"computed ahead from {gates}")
    assert lines["params/Dense_0/kernel"] == ("int8", "")
    assert lines["params/Conv_0/kernel"] == ("int8", "scale and shift folded in")
    assert lines["batch_stats/BatchNorm_0/var"] == ("folded into params/Conv_0/kernel", "")
    assert lines["params/LayerNorm_0/scale"] == ("float32", "not multiplied")
    assert lines["params/Conv_0/kernel:bias"] == ("float32", "added by a pass")


def test_what_a_weight_is_computed_into_on_each_call():
    w = jnp.ones((8, 8))
    rows = {"x": TensorSpec(("batch", 8), "float32")}
    program = trace(
        lambda w, x: x @ jnp.hstack([w["a"], w["b"]]) + w["bias"], {"a": w, "b": w, "bias": w[:1, :1]}, rows
    )
    lines = {line.site: (line.action, line.reason) for line in weights_report(program).sites}
    joined = "computed on each call into concatenate:a+b"
    assert lines == {"a": ("float32", joined), "b": ("float32", joined), "bias": ("float32", "not multiplied")}


def test_reasons_and_unread_weights():
    text = '[[quantize]]\nsites = ".*"\nweights = "int4"\ngranularity = "group:7"\nactivations = "none"\n'
    small = lx.optimize(tied(), recipe(text))
    lines = {line.site: (line.action, line.reason) for line in weights_report(small).sites}
    assert lines["unread"] == ("removed: nothing reads it", "")
    assert lines["embedding"][0] == "float32"
    assert "'group:7' does not divide the 8 rows" in lines["embedding"][1]


def test_a_tied_weight_counts_once_in_the_reports_of_passes():
    weights = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}
    twice = trace(lambda w, x: jnp.tanh(x @ w["w"]) @ w["w"], weights, {"x": TensorSpec(("batch", 8), "float32")})
    pruned = '[[prune]]\nsites = ".*"\nsparsity = 0.5\n' + INT8
    for program, path, text in ((tied(), "embedding", INT8), (twice, "w", pruned)):
        small = lx.optimize(program, recipe(text))
        for report in small.history[1:]:
            assert len(report.sites) == 2
            assert sum(site.bytes_before for site in report.sites) == tree_bytes(program.weights[path])
    plan = resolve(recipe(INT8), tied())
    lines = {line.site: line.reason for line in weights_report(tied(), plan).sites}
    assert lines["embedding"] == "to be int8 weights"
    assert lines["bias"] == "not multiplied"


def test_shrunk_weights():
    small = lx.optimize(net(), recipe(INT8 + "[shrink]\nsparsity = 0.5\n"))
    lines = {line.site: (line.action, line.reason) for line in weights_report(small).sites}
    assert lines["params/Dense_0/kernel"] == ("int8", "shrunk to 0.5 of its 80 elements")
    assert sum(line.bytes_before for line in weights_report(small).sites) == net().weights_bytes


def test_weights_with_one_fate_are_told_apart_by_what_passes_did_to_them():
    weights = {"w": jnp.ones((4, 6)), "bias": jnp.ones((1, 6)), "scale": jnp.ones((1, 6)), "unused": jnp.ones(3)}
    program = trace(
        lambda w, x: x @ (w["w"] * w["scale"]) + w["bias"], weights, {"x": TensorSpec(("batch", 4), "float32")}
    )
    fates = {site.site: site.metrics["fate"] for site in weights_report(fold(program)).sites}
    part = "part of a weight that is computed ahead"
    computed = next(name for name in fates if name not in weights)
    assert fates == {
        "w": part, "scale": part, "unused": "removed: nothing reads it", "bias": "float32, not multiplied",
        computed: "float32, computed ahead",
    }  # fmt: skip
