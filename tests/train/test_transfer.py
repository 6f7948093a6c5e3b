"""Frozen weights stay bit for bit, low-rank ones are what they should be by hand, and both train."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_xla as lx
from lepton_xla import train
from lepton_xla.compiler import make_update

ROWS = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
BATCH = {"x": ROWS, "label": (ROWS[:, 0] > ROWS[:, 1]).astype(np.int32)}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train)(nn.relu(nn.Dense(8, name="first")(x)))
        return nn.Dense(4, name="last")(x)


def model():
    net = Net()
    return train.from_linen(net, net.init(jax.random.key(0), ROWS), {"x": lx.TensorSpec(("batch", 6), "float32")})


def fitted(trained, steps=30):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # optax' Adam
        return train.fit(trained, train.supervised(trained), optax.adam(0.05), lambda step: BATCH, steps=steps)


def test_frozen_weights_stay_bit_for_bit_and_have_no_moments():
    base = model()
    frozen = train.freeze(base, ["params/first/.*"])
    assert sorted(frozen.weights) == [
        "params/BatchNorm_0/bias", "params/BatchNorm_0/scale", "params/last/bias", "params/last/kernel",
    ]  # fmt: skip
    result = fitted(frozen)
    for path, weight in base.program.weights.items():
        same = np.array_equal(result.program.weights[path], weight)
        assert same == path.startswith("params/first"), path
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(result.state.optimizer)]
    assert (8, 4) in shapes
    assert (6, 8) not in shapes


def test_low_rank_weights_begin_with_the_same_function():
    base = model()
    made = train.low_rank(base, 2)
    found = made.program(made.program.weights, ROWS)
    np.testing.assert_array_equal(found, base.program(base.program.weights, ROWS))


def test_low_rank_training_by_hand():
    """A linear model: the merged weight is `w + 2 left right`, in NumPy."""
    weights = {"w": jnp.asarray(ROWS[:6, :4])}
    program = lx.trace(lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", 6), "float32")})
    made = train.low_rank(program, 2, alpha=4.0, key=jax.random.key(1))
    result = fitted(made)
    left, right = (np.float64(result.program.weights[f"w:low_rank/{side}"]) for side in ("left", "right"))
    expected = np.float64(weights["w"]) + 2 * left @ right
    assert np.abs(expected - np.float64(weights["w"])).max() > 0.1
    merged = train.merge(result.program, program, alpha=4.0)
    np.testing.assert_allclose(merged.weights["w"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        merged(merged.weights, ROWS), result.program(result.program.weights, ROWS), rtol=1e-5, atol=1e-5
    )
    assert np.linalg.matrix_rank(expected - np.float64(weights["w"]), tol=1e-4) == 2


def test_only_what_is_asked_for_is_trained():
    base = model()
    made = train.low_rank(base, 2, include=["params/first/kernel"], also_train=["params/last/.*"])
    assert sorted(made.weights) == [
        "params/first/kernel:low_rank/left", "params/first/kernel:low_rank/right", "params/last/bias",
        "params/last/kernel",
    ]  # fmt: skip
    result = fitted(made)
    np.testing.assert_array_equal(result.program.weights["params/first/kernel"], base.weights["params/first/kernel"])
    merged = train.merge(result.program, base)
    accuracy = np.mean(np.argmax(merged(merged.weights, ROWS), -1) == BATCH["label"])
    assert accuracy > 0.9
    np.testing.assert_allclose(
        merged(merged.weights, ROWS), result.program(result.program.weights, ROWS), rtol=1e-4, atol=1e-4
    )


def test_convolutions_and_stacked_layers_have_ranks_of_their_own():
    inputs = {"x": lx.TensorSpec(("batch", 6, 6, 3), "float32")}
    kernel = {"k": jnp.ones((3, 3, 3, 8))}
    convolution = lx.trace(
        lambda w, x: jax.lax.conv_general_dilated(
            x, w["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).mean((1, 2)),
        kernel,
        inputs,
    )
    made = train.low_rank(convolution, 2)
    assert {each.shape for each in made.weights.values()} == {(27, 2), (2, 8)}

    def stack(w, x):
        return jax.lax.scan(lambda carry, layer: (jnp.tanh(carry @ layer), None), x, w["w"])[0]

    stacked = lx.trace(stack, {"w": jnp.ones((5, 4, 4))}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    made = train.low_rank(stacked, 1)
    assert {each.shape for each in made.weights.values()} == {(5, 4, 1), (5, 1, 4)}


def test_several_adapters_share_the_code_of_one_base(tmp_path):
    base = model()
    served = lx.compile(base.program, {"batch": (1, 8)}, name="net").servable()
    adapted = train.merge(fitted(train.low_rank(base, 1), steps=3).program, base)
    make_update(served, adapted, version="2").save(tmp_path / "two.lepton")
    other = lx.load(tmp_path / "two.lepton", base=served)
    assert other.route == "shared"
    np.testing.assert_allclose(other(x=ROWS)["output"], adapted(adapted.weights, ROWS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda base: train.freeze(base, [".*"]), "nothing is left"),
        (lambda base: train.freeze(base, ["nothing"]), "'nothing' matches no weight"),
        (lambda base: train.freeze(base, ["("]), "no regular expression"),
        (lambda base: train.low_rank(base, 6), "rank 6 is not smaller"),
        (lambda base: train.low_rank(base, 0), "rank 0 is not at least 1"),
        (lambda base: train.low_rank(base, 1, include=["params/last/bias"]), "no site has a weight"),
        (lambda base: train.merge(base.program, base), "not what low_rank made"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(lx.ModelError, match=said):
        call(model())
