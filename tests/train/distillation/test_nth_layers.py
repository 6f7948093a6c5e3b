"""Students that start from some layers of their teacher."""

import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.errors import TrainingError
from lepton_xla.train import every_nth_layer

FLAT = {
    **{f"encoder.layer.{k}.out.weight": np.full((2, 2), k) for k in range(12)},
    "encoder.layer.1x": np.zeros(1),
    "head": np.ones(3),
}
NESTED = {
    "params": {
        **{f"layer_{k}": {"w": np.full(2, k), "norm": {"scale": np.full(1, k)}} for k in range(4)},
        "out": np.ones(1),
    },
    "batch_stats": {f"layer_{k}": {"mean": np.full(1, 10 + k)} for k in range(4)},
}


def test_paths_are_numbered_anew():
    found = every_nth_layer(FLAT, "encoder.layer.{}", 4)
    assert list(found) == [f"encoder.layer.{k}.out.weight" for k in range(3)] + ["encoder.layer.1x", "head"]
    assert [int(found[f"encoder.layer.{k}.out.weight"][0, 0]) for k in range(3)] == [3, 7, 11]
    assert found["head"] is FLAT["head"]
    chosen = every_nth_layer(FLAT, "encoder.layer.{}", layers=[0, 5, 10])
    assert [int(chosen[f"encoder.layer.{k}.out.weight"][0, 0]) for k in range(3)] == [0, 5, 10]


def test_nested_variables_stay_nested():
    found = every_nth_layer(NESTED, "params/layer_{}", 2)
    found = every_nth_layer(found, "batch_stats/layer_{}", 2)
    assert set(found["params"]) == {"layer_0", "layer_1", "out"}
    assert [int(found["params"][f"layer_{k}"]["norm"]["scale"][0]) for k in range(2)] == [1, 3]
    assert [int(found["batch_stats"][f"layer_{k}"]["mean"][0]) for k in range(2)] == [11, 13]


def test_stacks_lose_slices():
    stacked = {"layers/w": jnp.arange(12).reshape(6, 2), "layers/b": jnp.arange(6), "layers_norm": jnp.ones(6)}
    found = every_nth_layer(stacked, "layers", 2)
    assert found["layers/b"].tolist() == [1, 3, 5]
    assert found["layers/w"].tolist() == [[2, 3], [6, 7], [10, 11]]
    assert found["layers_norm"].shape == (6,)
    with pytest.raises(TrainingError, match="the leaves of the stack 'layers' have different numbers of layers"):
        every_nth_layer({**stacked, "layers/scale": jnp.ones(5)}, "layers", 2)


def test_a_student_of_all_layers_is_its_teacher():
    inputs = {"x": lx.TensorSpec(("batch", 3), "float32")}

    def network(layers):
        weights = {
            f"layer_{k}": jnp.asarray(np.random.default_rng(k).standard_normal((3, 3)), jnp.float32)
            for k in range(layers)
        }

        def fn(w, x):
            for k in range(layers):
                x = jnp.tanh(x @ w[f"layer_{k}"])
            return x

        return lx.trace(fn, weights, inputs)

    teacher, student = network(4), network(2)
    x = jnp.asarray(np.random.default_rng(9).standard_normal((5, 3)), jnp.float32)
    whole = every_nth_layer(teacher.weights, "layer_{}", 1)
    np.testing.assert_array_equal(teacher(whole, x), teacher(teacher.weights, x))
    started = student.replace(weights=every_nth_layer(teacher.weights, "layer_{}", layers=[0, 3]))
    by_hand = np.tanh(np.tanh(np.asarray(x) @ teacher.weights["layer_0"]) @ teacher.weights["layer_3"])
    np.testing.assert_allclose(started(started.weights, x), by_hand, rtol=1e-5)


@pytest.mark.parametrize(
    ("stack", "given", "message"),
    [
        ("decoder.layer.{}", {"n": 2}, r"there are no layers 'decoder\.layer\.\{\}'; the weights are encoder"),
        ("encoder.layer.{}", {"n": 13}, r"n = 13, but 'encoder.layer.\{\}' has the 12 layers 0 to 11"),
        ("encoder.layer.{}", {"n": 0}, "n = 0"),
        ("encoder.layer.{}", {"layers": [0, 12]}, r"layers = \[0, 12\]"),
        ("encoder.layer.{}", {"layers": []}, r"layers = \[\]"),
        ("encoder.layer.{}", {"layers": ["a"]}, r"layers = \['a'\]"),
        ("encoder.layer.{}", {}, "give either n, such as 2, or layers"),
        ("encoder.layer.{}", {"n": 2, "layers": [1]}, "give either n"),
        ("missing", {"n": 2}, "there are no layers 'missing'"),
    ],
)
def test_bad_arguments_are_named(stack, given, message):
    with pytest.raises(TrainingError, match=message):
        every_nth_layer(FLAT, stack, **given)


def test_a_gap_in_the_numbers_is_named():
    weights = {f"layer_{k}": np.ones(1) for k in (0, 1, 3)}
    with pytest.raises(TrainingError, match=r"have the numbers \[0, 1, 3\]; expected all from 0 on"):
        every_nth_layer(weights, "layer_{}", 2)
