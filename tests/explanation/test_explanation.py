"""Attributions against cases by hand, axioms, and brute force in NumPy."""

import io
import json

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

PICTURE = lx.trace(
    lambda w, image: image.mean((1, 2)) @ w, np.ones((1, 2), np.float32),
    {"image": lx.TensorSpec(("batch", 8, 4, 1), "float32")},
)  # fmt: skip


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


def test_a_file_of_an_image_is_explained_by_the_pixels_that_the_model_saw():
    """A linear model of 8 x 4 pixels, weights rounded: attributions by hand, in both ways."""
    image, weight = pytest.importorskip("PIL.Image"), np.zeros((8, 4, 1, 2), np.float32)
    weight[5, 2, 0], weight[0, 0, 0] = (0, 127), (0, -127)  # which int8 has as they are
    inputs = {"image": lx.TensorSpec(("batch", 8, 4, 1), "float32")}
    program = lx.trace(lambda w, image: image.reshape(image.shape[0], -1) @ w.reshape(-1, 2), weight, inputs)
    program = lx.take_images(program, "image", canvas=(8, 4), scale=1.0)
    small = lx.optimize(program, lx.Recipe.load("int8-weight-only"), buckets={"batch": (1,)})
    held = io.BytesIO()
    image.fromarray(np.full((8, 4), 3, np.uint8)).save(held, "PNG")
    expected = np.zeros((8, 4))
    expected[5, 2], expected[0, 0] = 3 * 127, -3 * 127
    for explained in (integrated_gradients(small, steps=1), occlusion(small)):  # windows of one pixel
        sent = explained.converted({"image": [held.getvalue()], "target": np.int32([1])})
        found = run(explained, *(sent[name] for name in explained.inputs))
        np.testing.assert_allclose(found["attribution/image.pixels"][0, ..., 0], expected, rtol=1e-4, atol=1e-3)
        assert found["seen/image.size"].tolist() == [[8, 4]]
        assert (found["seen/image.pixels"] == 3).all()
        assert "attribution/image.size" not in found
    wide = occlusion(lx.take_images(PICTURE, "image", canvas=(32, 16)))
    pixels, size = np.full((1, 32, 16, 1), 9, np.uint8), np.int32([[32, 16]])
    found = run(wide, pixels, size, np.int32([0]))["attribution/image.pixels"]
    assert len(np.unique(found.round(4))) > 1, "windows of 4 x 2"


def test_tokens_come_back_by_name_and_classes_too():
    words = {"[PAD]": 0, "[UNK]": 1, "lost": 2, "card": 3}
    tokenizer = {
        "version": "1.0", "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
    }  # fmt: skip
    table = np.float32([[0, 1], [0, 0], [0, 4], [2, 0]])
    inputs = {name: lx.TensorSpec(("batch", 4), "int32") for name in ("tokens", "mask")}

    def twice(weights, tokens, mask):
        scores = (weights[tokens] * mask[..., None].astype(jnp.float32)).sum(1)
        return {"output": scores, "scores": scores}

    program = lx.take_texts(lx.trace(twice, table, inputs), json.dumps(tokenizer), mask="mask")
    explained = occlusion(lx.give_labels(program, ["fine", "broken"]))
    found = lx.compile(explained, {"batch": (1,)}).servable()(text=["lost card"], target=np.int32([-1]))
    assert found["label"].tolist() == ["broken"]
    assert found["seen/tokens"].tolist() == [["lost", "card", "[PAD]", "[PAD]"]]
    # A token is covered by the one of padding, which is worth 1 for the class; the mask stays as it is.
    assert found["attribution/tokens"].tolist() == [[3, -1, 0, 0]]


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
