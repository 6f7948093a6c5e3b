"""Computed weights: named in plans, stored small, and equal in training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import lepton_xla as lx
from lepton_xla.adapters import from_linen
from lepton_xla.errors import UnsupportedError
from lepton_xla.passes import fake_quant, find_sites, initial_scales, masked, precompute, quantize
from lepton_xla.passes.planning import resolve
from lepton_xla.program import TensorSpec, trace

INT8 = lx.Recipe.parse('measure = false\non_unsupported = "keep"\n[[quantize]]\nsites = ".*"\n', name="int8")
ROWS = {"x": TensorSpec(("batch", 16), "float32")}
STEPS = {"x": TensorSpec(("batch", 3, 16), "float32")}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.3, shape), jnp.float32)


W, V = array(16, 16), array(16, 16, seed=1)
QKV, TALLER = jnp.concatenate([W, V, W + V], axis=1), array(17, 16, seed=5)
TALL, WIDE = array(16, 4, seed=2), array(4, 16, seed=3)


def linen(module, **kwargs):
    variables = module.init(jax.random.key(0), jnp.ones((1, 3, 16)), **kwargs)
    return from_linen(module, variables, STEPS, **kwargs)


def scanned(w, x):
    def body(h, step):
        kernel, scale = step
        return h @ (kernel * scale) @ (kernel * w["all"]), None

    return jax.lax.scan(body, x, (w["kernel"], w["scale"]))[0]


def branches(w, x):
    return jax.lax.cond(x.sum() > 0, lambda: x @ -w["k"], lambda: x @ (w["k"] + w["v"]))


def split_attention(w, x):
    q, k, v = jnp.split(w["qkv"], 3, axis=1)
    return jnp.tanh(x @ q) * (x @ k) + x @ v


def torch_attention(w, x):
    q, k, v = (x @ w["qkv"][at : at + 16].T + w["b"][None, at : at + 16] for at in (0, 16, 32))
    return jnp.tanh(q) * k + v


def unrolled(w, x):
    for layer in range(2):
        x = jnp.tanh(x @ w["kernel"][layer] + w["b"][None, layer * 16 : layer * 16 + 16])
    return x


def split_in_a_scan(w, x):
    def body(h, kernel):
        left, right = jnp.split(kernel, 2)
        return jnp.concatenate([h[:, :8] @ left, h[:, 8:] @ right], 1)[:, :16], None

    return jax.lax.scan(body, x, w["pairs"])[0]


def standardize(kernel):
    centred = kernel - kernel.mean(0, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(0, keepdims=True) + 1e-5)


STACKED = {"kernel": jnp.stack([W, V]), "scale": array(2, 1, 16, seed=4), "all": V}

# What is computed, the names of its sites, and the largest share of the weights' bytes that int8 may leave. Where the
# same weight is read in other ways too, all of these stand for weights of their own.
MODELS = {
    "optimized_lstm": (
        lambda: linen(nn.RNN(nn.OptimizedLSTMCell(32))),
        ["params/cell/concatenate:hi/kernel+hf/kernel+hg/kernel+ho/kernel",
         "params/cell/concatenate:ii/kernel+if/kernel+ig/kernel+io/kernel"],
        0.32,
    ),
    "weight_norm": (
        lambda: linen(nn.WeightNorm(nn.Dense(64))),
        ["params/layer_instance/mul:kernel+kernel/scale"],
        0.37,
    ),
    "spectral_norm": (
        lambda: linen(nn.SpectralNorm(nn.Dense(64)), update_stats=False),
        ["params/layer_instance/div:kernel+batch_stats/layer_instance/kernel/u"],
        0.37,
    ),
    "masked_conv": (
        lambda: linen(nn.Conv(16, (3,), mask=jnp.asarray(np.eye(16, dtype=np.float32)[None].repeat(3, 0)))),
        ["params/mul:kernel"],
        0.30,
    ),
    "flipped_conv": (lambda: linen(nn.ConvTranspose(16, (3,), transpose_kernel=True)), ["params/rev:kernel"], 0.30),
    "standardized": (
        lambda: trace(lambda w, x: x @ standardize(w["k"]), {"k": W}, ROWS),
        ["div:k"],
        0.32,
    ),
    "merged_lora": (
        lambda: trace(lambda w, x: x @ (w["k"] + w["a"] @ w["b"]), {"k": W, "a": TALL, "b": WIDE}, ROWS),
        ["add:k+a+b"],
        0.22,
    ),
    "lora": (
        lambda: trace(lambda w, x: x @ w["k"] + (x @ w["a"]) @ w["b"], {"k": W, "a": TALL, "b": WIDE}, ROWS),
        ["k", "a", "b"],
        0.35,
    ),
    "fused_qkv": (
        lambda: trace(lambda w, x: sum(jnp.split(x @ jnp.hstack(w), 2, axis=1)), [W, V], ROWS),
        ["concatenate:0+1"],
        0.32,
    ),
    "scaled_and_negated": (
        lambda: trace(lambda w, x: x @ (w["a"] * 0.5) @ (w["a"] * 0.25) @ -w["b"], {"a": W, "b": V}, ROWS),
        ["mul:a", "mul.2:a", "neg:b"],
        0.48,
    ),
    "custom_derivative": (lambda: trace(lambda w, x: x @ jax.nn.relu(w["k"]), {"k": W}, ROWS), ["custom_jvp:k"], 0.32),
    "causal": (lambda: trace(lambda w, x: x @ jnp.tril(w["k"]), {"k": W}, ROWS), ["select_n:k"], 0.32),
    "rematerialized": (
        lambda: trace(lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ (w["k"] * 2)))(x), {"k": W}, ROWS),
        ["mul:k"],
        0.32,
    ),
    "scanned": (lambda: trace(scanned, STACKED, ROWS), ["mul:kernel+scale", "mul:kernel+all"], 0.42),
    "branches": (lambda: trace(branches, {"k": W, "v": V}, ROWS), ["add:k+v", "neg:k"], 0.32),
    "split": (
        lambda: trace(split_attention, {"qkv": QKV}, ROWS), ["split:qkv", "split.2:qkv", "split.3:qkv"], 0.32
    ),
    "sliced": (
        lambda: trace(torch_attention, {"qkv": QKV.T, "b": QKV[0]}, ROWS),
        ["slice:qkv", "slice.2:qkv", "slice.3:qkv"],
        0.36,
    ),
    "unrolled": (lambda: trace(unrolled, STACKED | {"b": QKV[0]}, ROWS), ["slice:kernel", "slice.2:kernel"], 0.45),
    "split_in_a_scan": (
        lambda: trace(split_in_a_scan, {"pairs": array(2, 16, 8)}, ROWS), ["split:pairs", "split.2:pairs"], 0.45
    ),
    "with_its_bias": (lambda: trace(lambda w, x: x @ w["k"][:-1] + w["k"][-1:], {"k": TALLER}, ROWS), ["slice:k"], 0.4),
    "handed_on": (
        lambda: trace(
            lambda w, x: (
                x
                @ jax.lax.stop_gradient(w["a"])
                @ checkpoint_name(w["b"], "kept")
                @ jax.lax.optimization_barrier(w["c"])
                @ jax.device_put(w["d"])
            ),
            dict(zip("abcd", (W, V, W, V), strict=True)),
            ROWS,
        ),
        ["a", "b", "c", "d"],
        0.32,
    ),
}  # fmt: skip


def largest_difference(found, wanted):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_computed_from_weights_is_a_weight(name):
    make, names, share = MODELS[name]
    program = make()
    x = array(*(2 if dim == "batch" else dim for dim in program.inputs["x"].shape), seed=9)
    wanted = program.fn(program.weights, x)

    ahead = precompute(program)
    plan = resolve(INT8, program)
    assert [site.name for site in find_sites(ahead)] == [entry.site.name for entry in plan.sites] == names
    assert largest_difference(ahead.fn(ahead.weights, x), wanted) < 1e-5

    small = lx.optimize(program, INT8)
    served = jax.jit(small.fn)(small.weights, x)
    assert small.weights_bytes <= share * program.weights_bytes
    assert 0 < largest_difference(served, wanted) < 0.04

    trained = jax.jit(fake_quant(program.fn, plan))(program.weights, x)
    assert largest_difference(trained, served) < 1e-6


def test_trained_scales_fit_the_computed_weight():
    program = MODELS["scanned"][0]()
    plan = resolve(INT8, program)
    x = array(2, 16, seed=9)
    scales = jax.tree.map(lambda scale: scale + 0.3, initial_scales(program.weights, plan))
    assert scales["mul:kernel+scale"]["log2_scale"].shape == (2, 1, 16)
    served = quantize(program, plan, scales=scales)
    faked = fake_quant(program.fn, plan)
    np.testing.assert_allclose(
        jax.jit(faked)(program.weights, x, scales=scales), jax.jit(served.fn)(served.weights, x), rtol=1e-6
    )
    gradient = jax.grad(lambda scales: faked(program.weights, x, scales=scales).sum())(scales)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient))


def test_a_gradient_reaches_all_that_a_weight_is_computed_from():
    program = MODELS["merged_lora"][0]()
    faked = fake_quant(program.fn, resolve(INT8, program))
    x = array(3, 16, seed=9)
    found = jax.grad(lambda w: faked(w, x).sum())(program.weights)
    through = np.asarray(x).sum(0)[:, None] * np.ones((1, 16))  # the gradient of `sum(x @ k)` by k
    a, b = np.asarray(program.weights["a"]), np.asarray(program.weights["b"])
    for path, wanted in (("k", through), ("a", through @ b.T), ("b", a.T @ through)):
        np.testing.assert_allclose(found[path], wanted, rtol=0.03, atol=0.03)


def test_what_depends_on_the_sizes_of_inputs_is_computed_on_each_call():
    def fn(weights, x):
        return x @ (weights["k"] / x.shape[0]) + x @ (weights["v"] * jnp.arange(16.0)[None])

    program = trace(fn, {"k": W, "v": V}, ROWS)
    found = {site.name: site for site in find_sites(program)}
    assert list(found) == ["dot_general#0", "mul:v"]
    assert found["dot_general#0"].why_made == "computed on each call from k and the sizes of the inputs"
    ahead = precompute(program)
    assert set(ahead.weights) == {"k", "mul:v"}
    for rows in (1, 5):
        x = array(rows, 16, seed=9)
        np.testing.assert_allclose(ahead.fn(ahead.weights, x), fn(program.weights, x), rtol=1e-5, atol=1e-6)


def test_a_product_of_low_rank_matrices_is_not_stored():
    weights = {"a": array(64, 2), "b": array(2, 64)}
    program = trace(lambda w, x: x @ (w["a"] @ w["b"]), weights, {"x": TensorSpec(("batch", 64), "float32")})
    assert precompute(program) is program
    (entry,) = resolve(INT8, program).sites
    assert entry.not_quantized == (
        "dot_general of an activation and what is computed on each call from a, b: computed ahead it would take 16 "
        "times their bytes, which products = 'weights' leaves float"
    )


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: w + jax.random.normal(jax.random.key(0), w.shape),
        lambda w: jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(w.shape, w.dtype), w),
    ],
    ids=["random", "callback"],
)
def test_what_draws_numbers_or_calls_out_is_left_alone(compute):
    program = trace(lambda w, x: x @ compute(w["k"]), {"k": W}, ROWS)
    assert precompute(program) is program
    assert [site.path for site in find_sites(program)] == [None]


def test_a_weight_that_is_read_elsewhere_stays_too():
    program = trace(lambda w, x: (x + w["k"][:1]) @ (w["k"] * 2) @ w["v"], {"k": W, "v": V}, ROWS)
    ahead = precompute(program)
    assert set(ahead.weights) == {"k", "v", "mul:k"}
    assert ahead.history[-1].metrics == {"weights_bytes_before": 2048, "weights_bytes_after": 3072, "weights": {}}
    (line,) = ahead.history[-1].sites
    assert (line.site, line.action, line.reason) == ("mul:k", "computed ahead", "from k")


@pytest.mark.parametrize(
    ("fn", "sites"),
    [
        (lambda w, x: x @ w["k"] + x @ w["k"][::-1] + x @ w["k"][:, :8].repeat(2, 1), ["k", "rev:k", "k#1"]),
        (lambda w, x: x @ w["k"][:8].T @ w["k"][8:] * jnp.sum(w["k"]), ["k", "k#1"]),
        (lambda w, x: sum(x[:, :8] @ w["k"][at : at + 8] for at in range(5)), ["k", "k#1", "k#2", "k#3", "k#4"]),
    ],
    ids=["multiplied as a whole", "summed as a whole", "overlapping"],
)
def test_parts_that_would_only_add_to_a_weight_are_left_in_it(fn, sites):
    program = trace(fn, {"k": W}, ROWS)
    assert [site.name for site in find_sites(program)] == sites
    assert "k" in precompute(program).weights


def test_a_weight_that_others_are_computed_from_is_not_changed_for_them():
    def fn(w, x):
        return (x @ w["k"]) * w["scale"] + x @ (w["k"] * 2)

    weights = {"k": W, "scale": array(1, 16, seed=4)}
    program = trace(fn, weights, ROWS)
    x = array(3, 16, seed=9)
    folded = lx.passes.fold(program)
    assert [(report.name, len(report.sites)) for report in folded.history] == [("precompute", 1), ("fold", 1)]
    np.testing.assert_allclose(folded.fn(folded.weights, x), fn(weights, x), rtol=1e-5, atol=1e-6)
    half = lx.passes.cast(program, "bfloat16")
    assert {path: leaf.dtype.name for path, leaf in half.weights.items()} == {
        "k": "bfloat16", "mul:k": "bfloat16", "scale": "float32"
    }  # fmt: skip
    assert largest_difference(half.fn(half.weights, x), fn(weights, x)) < 0.01


def test_masks_are_kept_where_zeros_are():
    kept, lost = W.min() != W, V > 0
    weights = {"k": jnp.where(kept, W, 0), "v": jnp.where(lost, V, 0), "s": array(1, 16)}

    def fn(w, x):
        joined = jnp.concatenate([w["k"] * w["s"], -w["v"].T], axis=1)
        return (x @ joined)[:, :16] @ jnp.exp(w["v"]).T

    program = trace(fn, weights, ROWS).replace(masks={"k": kept, "v": lost})
    ahead = precompute(program)
    np.testing.assert_array_equal(ahead.masks["concatenate:k+v+s"], np.concatenate([kept, lost.T], axis=1))
    assert set(ahead.masks) == {"concatenate:k+v+s"}
    assert "the mask of v is not kept" in ahead.history[-1].sites[1].reason


def test_masks_of_what_a_weight_is_computed_from_hold_in_training():
    program = MODELS["fused_qkv"][0]()
    plan, masks, x = resolve(INT8, program), {"0": W > 0, "1": V > 0.1}, array(2, 16, seed=9)
    held = {path: jnp.where(masks[path], leaf, 0) for path, leaf in program.weights.items()}
    served = quantize(program.replace(weights=held, masks=masks), plan)
    assert float(served.masks["concatenate:0+1"].mean()) < 0.5
    wanted = served.fn(served.weights, x)
    for faked in (masked(fake_quant(program.fn, plan), masks), fake_quant(masked(program.fn, masks), plan)):
        np.testing.assert_allclose(faked(program.weights, x), wanted, rtol=1e-5, atol=1e-6)


def test_a_computed_weight_that_a_function_lacks_is_refused():
    program = trace(lambda w, x: x @ -w["k"], {"k": W}, ROWS)
    plan = resolve(INT8, program)
    with pytest.raises(UnsupportedError, match="weight 'neg:k' is changed before it reaches its product"):
        fake_quant(lambda w, x: x @ jnp.sin(w["k"]), plan)(program.weights, array(2, 16))


def test_weights_that_only_other_sizes_read_are_asked_for():
    def fn(weights, x):
        return x @ -weights["k"] if x.shape[0] != 3 else x @ weights["k"]

    program = trace(fn, {"k": W}, ROWS)
    ahead = precompute(program)
    with pytest.raises(UnsupportedError, match=r"reads k, .* precompute\(sizes=...\)"):
        ahead.fn(ahead.weights, array(3, 16))
    both = precompute(program, sizes=[{"batch": 3}])
    np.testing.assert_array_equal(both.fn(both.weights, array(3, 16)), fn(program.weights, array(3, 16)))


class Tagger(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.RNN(self.cell(64))(x))


def test_a_recurrent_model_takes_a_quarter_in_int8():
    program = linen(Tagger(nn.GRUCell))
    small = lx.optimize(program, INT8)
    assert small.weights_bytes <= 0.29 * program.weights_bytes  # a scale a channel, of 16 and 64 rows


def test_an_lstm_shrinks():
    program = linen(Tagger(nn.OptimizedLSTMCell))
    name = next(path for path in program.weights if "Cell_0" in path).split("/")[1]
    removed = np.random.default_rng(0).permutation(64)[:32]
    weights = {}
    for path, leaf in program.weights.items():  # units that no weight reads or writes: what is left gives the same
        values = np.array(leaf)
        if name in path:
            values[..., removed] = 0
            if path.split("/")[2].startswith("h") and path.endswith("kernel"):
                values[removed] = 0
        elif path.endswith("Dense_0/kernel"):
            values[removed] = 0
        weights[path] = jnp.asarray(values)
    program = program.replace(weights=weights)
    small = lx.optimize(program, lx.Recipe.parse("measure = false\n[shrink]\nsparsity = 0.5\n", name="half"))
    x = array(2, 3, 16, seed=9)
    np.testing.assert_allclose(small.fn(small.weights, x), program.fn(weights, x), rtol=1e-5, atol=1e-6)
    assert small.weights["params/Dense_0/kernel"].shape == (32, 4)
    gates = 4 * 32
    assert sum(leaf.size for leaf in small.weights.values()) == (16 + 32 + 1) * gates + (32 + 1) * 4


def test_a_plan_for_a_computed_weight_does_not_prune_what_it_is_computed_from():
    program = MODELS["fused_qkv"][0]()
    plan = resolve(lx.Recipe.parse('[[prune]]\nsites = ".*"\nsparsity = 0.5\n', name="half"), program)
    pruned = lx.passes.prune(program, plan)
    assert float(pruned.masks["concatenate:0+1"].mean()) == 0.5
