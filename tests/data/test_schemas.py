"""Statistics of training rows: found by hand, carried by the artifact, the same for training and serving."""

import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.data import Category, Number, Schema, batches, split, unique

ROWS = {
    "age": [20.0, 30.0, None, 40.0, 1000.0, 30.0],
    "city": ["Rom", "Bern", "Rom", "", "Paris", None],
    "label": [0, 1, 0, 1, 0, 1],
}
SCHEMA = Schema({"age": Number(quantiles=(0.0, 0.75)), "city": Category(most=2)})


def network(prepared):
    inputs = {"age": lx.TensorSpec(("batch",), "float32"), "city": lx.TensorSpec(("batch",), "int32")}
    program = lx.trace(lambda w, age, city: {"age": age, "city": city, "sum": age * w[city]}, jnp.arange(3.0), inputs)
    return prepared.attach(program)


def test_statistics_are_those_of_the_known_numbers():
    prepared = SCHEMA.fit(ROWS)
    clipped = np.float64([20, 30, 40, 40, 30])  # three quarters of five numbers are at most 40
    np.testing.assert_allclose(prepared.numbers["age"], [30, 20, 40, clipped.mean(), clipped.std()], rtol=1e-6)
    expected = (np.float64([20, 30, 40]) - clipped.mean()) / clipped.std()
    found = prepared({"age": [-5.0, None, 41.0], "city": ["Rom"] * 3})["age"]  # clipped, missing, clipped
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert prepared.vocabularies == {"city": ("Rom", "Bern")}


def test_training_and_serving_get_equal_tensors(tmp_path):
    """Raw rows, those that nobody has seen included, by both roads; the second from a saved artifact."""
    prepared = SCHEMA.fit(ROWS)
    random = np.random.default_rng(0)
    age = random.normal(30, 40, 200).astype(np.float32)
    age[::7] = np.nan
    city = random.choice(["Rom", "Bern", "Paris", "nowhere", ""], 200).astype(object)
    trained = prepared({"age": age, "city": city})
    lx.compile(network(prepared), {"batch": (1, 64)}, name="net").save(tmp_path / "net.lepton")
    served = lx.load(tmp_path / "net.lepton")(age=age, city=list(city))
    np.testing.assert_array_equal(served["age"], trained["age"])
    np.testing.assert_array_equal(served["city"], trained["city"])
    assert np.isfinite(served["age"]).all()


def test_other_rows_do_not_change_what_was_fitted():
    prepared = SCHEMA.fit(ROWS)
    before = prepared({"age": [30.0], "city": ["Rom"]})
    prepared({"age": [9e9, -9e9], "city": ["new", "new"]})
    np.testing.assert_array_equal(prepared({"age": [30.0], "city": ["Rom"]})["age"], before["age"])


def test_quantized_programs_carry_statistics_too():
    prepared = Schema({"age": Number()}).fit({"age": np.arange(100.0)})
    inputs = {"age": lx.TensorSpec(("batch",), "float32")}
    weights = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(1, 64)), jnp.float32)}
    program = lx.trace(lambda w, age: age[:, None] @ w["w"], weights, inputs)
    small = lx.optimize(program, lx.Recipe.load("int8-weight-only"))
    model = lx.compile(prepared.attach(small), {"batch": (1, 4)}).servable()
    expected = prepared({"age": [3.0, np.nan]})["age"][:, None] @ np.asarray(weights["w"])
    np.testing.assert_allclose(model(age=[3.0, np.nan])["output"], expected, atol=0.02)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"age": [1.0]}, "column 'city' is missing"),
        ({"age": [1.0, "x"], "city": ["a", "b"]}, "'age'"),
        ({"age": [1.0], "city": ["a", "b"]}, "has others"),
        ({"age": [1.0], "city": [7]}, "row 0: 7 is no word"),
        ({"age": [np.inf], "city": ["a"]}, "row 0: inf is no number"),
        ({"age": [], "city": []}, "no rows"),
        ({"age": [np.nan], "city": ["a"]}, "no number at all"),
    ],
)
def test_rows_that_do_not_fit(rows, said):
    with pytest.raises(lx.InputError, match=said):
        SCHEMA.fit(rows)


def test_numbers_beyond_what_can_be_are_no_outliers():
    with pytest.raises(lx.InputError, match="row 1: 200 is more than 150"):
        Schema({"age": Number(most=150)}).fit({"age": [1, 200]})
    with pytest.raises(lx.InputError, match="row 1: the number is missing"):
        Schema({"age": Number(missing=None)}).fit({"age": [1.0, None]})


def test_columns_are_attached_once_and_to_their_inputs():
    prepared = SCHEMA.fit(ROWS)
    with pytest.raises(lx.ModelError):
        prepared.attach(network(prepared))
    other = lx.trace(lambda w, x: x, {}, {"x": lx.TensorSpec(("batch",), "float32")})
    with pytest.raises(lx.ModelError, match="no input 'age'"):
        prepared.attach(other)


def test_duplicates_are_dropped_before_a_split():
    rows = unique({"a": [1.0, np.nan, 1.0, np.nan, 2.0], "b": ["x", "x", "x", "x", "y"]})
    assert len(rows["a"]) == 3
    train, test = split({"a": np.arange(100)}, 0.3, seed=1)
    assert sorted([*train["a"], *test["a"]]) == list(range(100))
    with pytest.raises(lx.InputError):
        split({"a": [1]}, 0.5)


def test_batches_take_every_row_once_in_orders_of_their_own():
    pytest.importorskip("grain")
    batch = batches({"x": np.arange(12)}, 4, seed=3)
    epochs = [np.concatenate([batch(step)["x"] for step in range(3 * epoch, 3 * epoch + 3)]) for epoch in range(2)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    noisy = batches({"x": np.zeros(8)}, 4, augment=lambda random, rows: {"x": rows["x"] + random.random(4)})
    np.testing.assert_array_equal(noisy(5)["x"], noisy(5)["x"])
    assert not np.array_equal(noisy(5)["x"], noisy(6)["x"])
    with pytest.raises(lx.TrainingError, match="give fewer"):
        batches({"x": [1]}, 2)
    with pytest.raises(lx.InputError, match="column 'label' has 9 rows; 'x' has others"):
        batches({"x": np.zeros(8), "label": np.zeros(9)}, 4)
