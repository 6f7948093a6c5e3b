"""Attributions against cases by hand, axioms, and brute force in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.explanation import integrated_gradients, occlusion

random = np.random.default_rng(0)
W1, W2 = (random.standard_normal(shape).astype(np.float32) for shape in ((6, 16), (16, 3)))
X = random.standard_normal((5, 6)).astype(np.float32)


def network(weights, x):
    return jax.nn.softplus(x @ weights["one"]) @ weights["two"]


PROGRAM = lx.trace(network, {"one": W1, "two": W2}, {"x": lx.TensorSpec(("batch", 6), "float32")})


def run(explained, *inputs):
    return jax.device_get(jax.jit(explained.named_outputs)(explained.weights, *map(jnp.asarray, inputs)))


def exact(x):
    wide = x.astype(np.float64) @ W1
    return np.logaddexp(wide, 0) @ W2.astype(np.float64)


def test_a_linear_model_is_explained_by_its_terms():
    linear = lx.trace(lambda w, x: x @ w + 7.0, W1[:, :3], {"x": lx.TensorSpec(("batch", 6), "float32")})
    target = np.array([0, 1, 2, 0, 1], np.int32)
    explained = integrated_gradients(linear, steps=1, baseline={"x": 0.5})
    found = run(explained, X, target)
    np.testing.assert_allclose(found["attribution/x"], (X - 0.5) * W1[:, target].T, rtol=1e-5, atol=1e-6)
    covered = run(occlusion(linear, fill={"x": 0.5}), X, target)
    np.testing.assert_allclose(covered["attribution/x"], (X - 0.5) * W1[:, target].T, rtol=1e-4, atol=1e-5)


def test_integrated_gradients_are_complete():
    found = run(integrated_gradients(PROGRAM), X, np.full(5, -1, np.int32))
    values = exact(X)
    assert found["target"].tolist() == values.argmax(1).tolist()
    np.testing.assert_allclose(found["score"], values.max(1), rtol=1e-5)
    np.testing.assert_allclose(found["baseline"], exact(np.zeros((1, 6)))[0][values.argmax(1)], rtol=1e-5)
    np.testing.assert_allclose(found["attribution/x"].sum(1), found["score"] - found["baseline"], rtol=1e-4, atol=1e-4)


def test_integrated_gradients_are_the_integral():
    """Against a fine sum of the exact gradient in float64."""
    found = run(integrated_gradients(PROGRAM, steps=16), X, np.full(5, 2, np.int32))["attribution/x"]
    total = np.zeros(X.shape)
    for point in (np.arange(4000) + 0.5) / 4000:
        gates = 1 / (1 + np.exp(-(point * X.astype(np.float64)) @ W1))
        total += (gates * W2[:, 2]) @ W1.T.astype(np.float64) / 4000
    np.testing.assert_allclose(found, total * X, rtol=1e-4, atol=1e-5)


def test_rows_do_not_affect_each_other_and_it_compiles_like_the_rest():
    explained = integrated_gradients(PROGRAM, steps=4)
    servable = lx.compile(explained, {"batch": (1, 8)}, name="why").servable()
    target = np.array([0, 1, 2, 1, 0], np.int32)
    found, alone = servable(x=X, target=target), servable(x=X[2:3], target=target[2:3])
    np.testing.assert_allclose(found["attribution/x"][2:3], alone["attribution/x"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["attribution/x"], run(explained, X, target)["attribution/x"], rtol=1e-4, atol=1e-5)


def test_windows_cover_a_picture_as_brute_force_does():
    weight = random.standard_normal((20, 2)).astype(np.float32)
    picture = random.standard_normal((2, 4, 5)).astype(np.float32)
    program = lx.trace(
        lambda w, x: jnp.tanh(x.reshape(x.shape[0], -1)) @ w, weight, {"x": lx.TensorSpec(("batch", 4, 5), "float32")}
    )
    explained = occlusion(program, windows={"x": (2, 3)}, strides={"x": (2, 1)}, fill={"x": 0.25})
    found = run(explained, picture, np.array([0, 1], np.int32))["attribution/x"]
    for row, target in enumerate((0, 1)):
        total, count = np.zeros((4, 5)), np.zeros((4, 5))
        score = lambda x, target=target: np.tanh(x.reshape(-1).astype(np.float64)) @ weight[:, target]  # noqa: E731
        for top in (0, 2):
            for left in (0, 1, 2):
                hidden = picture[row].copy()
                hidden[top : top + 2, left : left + 3] = 0.25
                total[top : top + 2, left : left + 3] += score(picture[row]) - score(hidden)
                count[top : top + 2, left : left + 3] += 1
        np.testing.assert_allclose(found[row], total / count, rtol=1e-4, atol=1e-5)


def test_tokens_of_a_quantized_model_are_explained_by_occlusion():
    table = random.standard_normal((9, 8)).astype(np.float32)
    program = lx.trace(
        lambda w, ids: w["table"][ids].mean(1) @ w["head"],
        {"table": table, "head": random.standard_normal((8, 3)).astype(np.float32)},
        {"ids": lx.TensorSpec(("batch", 4), "int32")},
    )
    small = lx.optimize(program, lx.Recipe.load("int8-weight-only"), buckets={"batch": (1,)})
    ids = np.array([[1, 5, 0, 7]], np.int32)
    found = run(occlusion(small), ids, np.array([1], np.int32))["attribution/ids"]
    run_small = lambda ids: float(small(small.weights, jnp.asarray(ids))[0, 1])  # noqa: E731
    for place in range(4):
        hidden = ids.copy()
        hidden[0, place] = 0
        assert found[0, place] == pytest.approx(run_small(ids) - run_small(hidden), abs=1e-5)
    with pytest.raises(lx.ModelError, match="none has a gradient; use occlusion"):
        integrated_gradients(small)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: integrated_gradients(PROGRAM, output="other"), "output 'other' has no classes"),
        (lambda: integrated_gradients(PROGRAM, inputs=["y"]), "there is no input 'y'"),
        (lambda: integrated_gradients(PROGRAM, steps=0), "steps is 0"),
        (lambda: integrated_gradients(PROGRAM, baseline={"y": 1.0}), "baseline names 'y', which is no input"),
        (lambda: occlusion(PROGRAM, fill={"y": 1.0}), "fill names 'y', which is no input"),
        (lambda: occlusion(PROGRAM, strides={"y": (1,)}), "strides names 'y', which is no input"),
        (lambda: occlusion(PROGRAM, windows={"x": (2, 2)}), "it takes 1 sizes"),
        (lambda: occlusion(PROGRAM, windows={"x": (7,)}), "the window of input 'x' is .7,., and a row of it .6,."),
    ],
)
def test_what_cannot_be_explained_is_named(make, said):
    with pytest.raises(lx.ModelError, match=said):
        make()
