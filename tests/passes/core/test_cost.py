"""Costs against cases worked out by hand and against XLA's own count where the two count alike."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lepton_xla.errors import ModelError
from lepton_xla.passes.core.costs import cost
from lepton_xla.passes.core.sites import find_sites
from lepton_xla.program import TensorSpec, trace
from lepton_xla.quant import quantize

ROWS = {"x": TensorSpec(("batch", 6), "float32")}
IMAGES = {"image": TensorSpec(("batch", 8, 8, 4), "float32")}
NHWC = ("NHWC", "HWIO", "NHWC")


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def xla_flops(program, sizes):
    """XLA's count for the compiled program."""
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in program.weights.values()]
    weights = dict(zip(program.weights, shapes, strict=True))
    compiled = jax.jit(program.fn).lower(weights, *program.abstract_inputs(sizes)).compile()
    return compiled.cost_analysis()["flops"]


def convolution(padding, groups=1, stride=1, dilation=1):
    def fn(weights, image):
        return lax.conv_general_dilated(
            image,
            weights["kernel"],
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=NHWC,
            feature_group_count=groups,
        )

    return trace(fn, {"kernel": array(3, 3, 4 // groups, 8)}, IMAGES)


def test_a_dense_layer_by_hand():
    program = trace(lambda w, x: jax.nn.relu(x @ w["k"] + w["b"][None]), {"k": array(6, 4), "b": array(4)}, ROWS)
    report = cost(program, {"batch": 10})
    [site] = report.sites
    assert (site.site, site.kind, site.repeats, site.container) == ("k", "dot_general", 1, "")
    assert site.flops == 2 * 10 * 6 * 4
    assert (site.parameters, site.weights_bytes) == (24, 96)
    assert (site.weights_read_bytes, site.inputs_bytes, site.outputs_bytes) == (96, 4 * 60, 4 * 40)
    assert site.bytes_moved == report.bytes_moved == 96 + 240 + 160
    assert report.other_flops == 2 * 40  # the addition and the maximum
    assert (report.flops, report.site_flops) == (480 + 80, 480)
    assert (report.parameters, report.weights_bytes) == (28, 112)
    assert (report.sizes, report.uncounted) == ({"batch": 10}, ())


def test_products_against_xla():
    def fn(weights, a, b):
        scores = jnp.einsum("bqhd,bkhd->bhqk", a, b)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", scores, b)
        return jnp.einsum("bqhd,hdo->bqo", mixed, weights["out"])

    spec = TensorSpec(("batch", 5, 2, 3), "float32")
    program = trace(fn, {"out": array(2, 3, 7)}, {"a": spec, "b": spec})
    report = cost(program, {"batch": 4})
    one = 2 * 4 * 2 * 5 * 5 * 3
    assert [site.flops for site in report.sites] == [one, one, 2 * 4 * 5 * 6 * 7]
    assert [site.parameters for site in report.sites] == [0, 0, 42]
    assert [site.inputs_bytes for site in report.sites] == [4 * 4 * 60, 4 * 4 * (50 + 30), 4 * 4 * 30]
    assert report.flops == xla_flops(program, {"batch": 4})


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("stride", "dilation", "out"), [(1, 1, 6), (2, 1, 3), (1, 2, 4)])
def test_convolutions_against_xla(groups, stride, dilation, out):
    program = convolution("VALID", groups, stride, dilation)
    report = cost(program, {"batch": 3})
    [site] = report.sites
    assert site.flops == 2 * (3 * out * out * 8) * (9 * 4 // groups)
    assert site.parameters == 9 * (4 // groups) * 8
    assert site.outputs_bytes == 4 * 3 * out * out * 8
    assert report.flops == xla_flops(program, {"batch": 3})


def test_padding_counts_the_whole_window():
    same, valid = convolution("SAME"), convolution("VALID")
    assert cost(same, {"batch": 1}).flops == 2 * 64 * 8 * 36
    assert cost(valid, {"batch": 1}).flops == 2 * 36 * 8 * 36
    # XLA counts what falls on the image only: 22 of the 24 window rows an axis at three taps and eight positions.
    assert xla_flops(same, {"batch": 1}) == 2 * 22 * 22 * 4 * 8


def test_a_scanned_stack():
    def fn(weights, x):
        def layer(x, w):
            return jnp.tanh(x @ w) @ weights["shared"], None

        return lax.scan(layer, x, weights["stack"])[0]

    program = trace(fn, {"stack": array(5, 6, 6), "shared": array(6, 6)}, ROWS)
    report = cost(program, {"batch": 2})
    stack, shared = report.sites
    one = 2 * 2 * 6 * 6
    assert (stack.site, stack.repeats, stack.container) == ("stack", 5, "scan")
    assert (stack.flops, shared.flops) == (5 * one, 5 * one)
    assert (stack.parameters, shared.parameters) == (180, 36)
    assert (stack.weights_bytes, stack.weights_read_bytes) == (720, 720)
    assert (shared.weights_bytes, shared.weights_read_bytes) == (144, 720)  # read at every step
    assert stack.inputs_bytes == stack.outputs_bytes == 5 * 4 * 12
    assert report.other_flops == 5 * 12
    assert (report.parameters, report.weights_bytes) == (216, 864)

    unrolled = trace(
        lambda w, x: fn({"stack": w["stack"][:1], "shared": w["shared"]}, x) @ w["shared"], dict(program.weights), ROWS
    )
    assert cost(unrolled, {"batch": 2}).site_flops == 3 * one


def test_a_stack_against_xla():
    def fn(weights, x):
        for step in range(3):
            x = x @ weights["stack"][step]
        return x

    def scanned(weights, x):
        return lax.scan(lambda x, w: (x @ w, None), x, weights["stack"])[0]

    weights = {"stack": array(3, 6, 6)}
    unrolled = trace(fn, weights, ROWS)
    report = cost(unrolled, {"batch": 4})
    assert [site.site for site in report.sites] == ["stack", "stack#1", "stack#2"]
    assert [site.weights_read_bytes for site in report.sites] == [144] * 3
    assert report.flops == xla_flops(unrolled, {"batch": 4}) == cost(trace(scanned, weights, ROWS), {"batch": 4}).flops
    assert report.parameters == 108


def test_an_embedding_reads_its_rows_only():
    def fn(weights, tokens):
        return jnp.take(weights["table"], tokens, axis=0) @ weights["table"].T

    program = trace(fn, {"table": array(100, 8)}, {"tokens": TensorSpec(("batch",), "int32")})
    lookup, logits = cost(program, {"batch": 3}).sites
    assert (lookup.site, lookup.kind, lookup.flops) == ("table", "gather", 0)
    assert (lookup.parameters, lookup.weights_bytes, lookup.weights_read_bytes) == (800, 3200, 3 * 8 * 4)
    assert (lookup.inputs_bytes, lookup.outputs_bytes) == (3 * 4, 3 * 8 * 4)
    assert (logits.site, logits.flops, logits.weights_read_bytes) == ("table#1", 2 * 3 * 8 * 100, 3200)
    assert cost(program, {"batch": 3}).parameters == 800


def test_ragged_products_share_their_rows():
    program = trace(
        lambda w, x, sizes: lax.ragged_dot(x, w["experts"], sizes),
        {"experts": array(4, 6, 3)},
        ROWS | {"sizes": TensorSpec((4,), "int32")},
    )
    [site] = cost(program, {"batch": 10}).sites
    assert (site.flops, site.parameters) == (2 * 10 * 6 * 3, 72)


def test_quantized_weights_count_their_real_bytes_and_keep_their_names():
    weights = {"int": quantize(array(6, 4), "int8", "channel"), "only": quantize(array(4, 6), "int8", "channel")}

    def fn(weights, x):
        codes = jnp.round(x).astype(jnp.int8)
        hidden = lax.dot(codes, weights["int"].values, preferred_element_type=jnp.int32).astype(jnp.float32)
        return (hidden * weights["int"].scale) @ weights["only"].dequantize()

    program = trace(lambda w, x: fn(weights, x), {}, ROWS).replace(fn=fn, weights=weights)
    report = cost(program, {"batch": 2})
    assert [site.site for site in report.sites] == ["int", "only"]
    integer, dequantized = report.sites
    assert (integer.flops, dequantized.flops) == (96, 96)
    assert (integer.parameters, dequantized.parameters) == (24, 24)
    assert (integer.weights_bytes, dequantized.weights_bytes) == (24 + 4 * 4, 24 + 4 * 6)
    assert (integer.inputs_bytes, integer.outputs_bytes) == (12, 2 * 4 * 4)
    assert (report.parameters, report.weights_bytes) == (48, 88)
    # Rounding the input, scaling the result, and rebuilding the float weight.
    assert report.other_flops == 12 + 8 + 24


def test_arithmetic_elsewhere():
    def fn(weights, x):
        pooled = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3), (1, 3), "VALID")  # 2 windows of 3 a row
        total = x.sum(1)  # 6 a row
        folded = weights["a"] @ weights["b"]  # 2 * 6 * 3 * 6
        moved = x.reshape(-1, 2, 3).transpose(0, 2, 1)
        added = x.at[:, 0].add(total)  # one a row
        return pooled, moved, added, x @ folded

    program = trace(fn, {"a": array(6, 3), "b": array(3, 6)}, ROWS)
    report = cost(program, {"batch": 5})
    assert report.other_flops == 5 * 6 + 5 * 6 + 5 + 2 * 6 * 3 * 6
    [site] = report.sites
    assert (site.site, site.flops) == ("a", 2 * 5 * 36)


def test_control_flow_counts_each_branch_and_one_round():
    def fn(weights, x):
        x = lax.while_loop(lambda x: jnp.sum(x) < 0, lambda x: x @ weights["loop"], x)
        return lax.cond(x[0, 0] > 0, lambda x: x @ weights["yes"], lambda x: x @ weights["no"], x)

    program = trace(fn, {"loop": array(6, 6), "yes": array(6, 6), "no": array(6, 6)}, ROWS)
    sites = {site.site: site for site in cost(program, {"batch": 2}).sites}
    assert {name: (site.container, site.flops) for name, site in sites.items()} == {
        "loop": ("while", 144),
        "yes": ("cond", 144),
        "no": ("cond", 144),
    }


def test_what_cannot_be_looked_into_is_named():
    def fn(weights, x):
        y = jax.pure_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return jnp.fft.fft(y).real @ weights["w"]

    report = cost(trace(fn, {"w": array(6, 6)}, ROWS), {"batch": 2})
    assert report.uncounted == ("pure_callback", "fft")
    assert [site.site for site in report.sites] == ["w"]
    assert str(report).endswith("not counted: pure_callback, fft")


def test_sites_are_those_that_are_found():
    def fn(weights, x):
        with jax.named_scope("mix"):
            x = (x @ x.T) @ x
        return jax.jit(lambda x: jax.nn.silu(x @ weights["a"]) @ weights["b"].T @ weights["a"])(x)

    program = trace(fn, {"a": array(6, 6), "b": array(6, 6)}, ROWS)
    report = cost(program)
    assert [site.site for site in report.sites] == [site.name for site in find_sites(program)]
    assert [site.site for site in report.sites] == ["mix/dot_general#0", "mix/dot_general#1", "a", "b", "a#1"]
    assert report.sizes == {"batch": 16}


def test_a_missing_size_is_named():
    with pytest.raises(ModelError, match="no size given for dimension 'batch'"):
        cost(convolution("SAME"), {"seq": 3})


def test_json_and_table():
    program = trace(lambda w, x: x @ w["layer"]["k"], {"layer": {"k": array(6, 4000)}}, ROWS)
    report = cost(program, {"batch": 50})
    data = json.loads(json.dumps(report.to_json()))
    assert data["flops"] == data["site_flops"] == data["sites"][0]["flops"] == 2 * 50 * 6 * 4000
    assert data["bytes_moved"] == data["sites"][0]["bytes_moved"] == 4 * (24000 + 300 + 200000)
    assert data["sizes"] == {"batch": 50}
    assert data["uncounted"] == []
    lines = str(report).splitlines()
    assert lines[0] == "cost of one call at batch=50"
    assert lines[1].split() == ["site", "kind", "runs", "FLOPs", "parameters", "weights", "moved"]
    assert lines[3].split() == ["layer/k", "dot_general", "1", "2.40", "M", "24.0", "k", "96.0", "kB", "897", "kB"]
    assert lines[4].split() == ["elsewhere", "0"]
    assert lines[6].split() == ["total", "2.40", "M", "24.0", "k", "96.0", "kB", "897", "kB"]
    ends = [
        line.index(text) + len(text) for line, text in ((lines[1], "FLOPs"), (lines[3], "2.40 M"), (lines[6], "2.40 M"))
    ]
    assert len(set(ends)) == 1
    assert math.isclose(report.flops / 1e6, 2.4)
