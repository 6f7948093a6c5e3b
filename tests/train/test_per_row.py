"""Rows of one batch choose adapters: each gets what its adapter alone gives, whatever the others chose."""

import json
import urllib.error
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla import train
from lepton_xla.serve import Options, Server

RANDOM = np.random.default_rng(0)
FLOATS = {"x": lx.TensorSpec(("batch", 6), "float32")}
IDS = {"ids": lx.TensorSpec(("batch", 5), "int32")}
IMAGES = {"x": lx.TensorSpec(("batch", 6, 6, 4), "float32")}


def normal(*shape):
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


def convolved(w, x, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w["k"], (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )  # fmt: skip


def stacked(w, x):
    return jax.lax.scan(lambda carry, layer: (jnp.tanh(carry @ layer), None), x, w["w"])[0]


def stacked_second(w, x):
    return stacked({"w": jnp.moveaxis(w["w"], 1, 0)}, x)


def tied(w, ids):
    return jnp.tanh(w["e"][ids] @ w["d"]) @ w["e"].T


# Name -> function, weights, inputs, and weights that each adapter has as a whole.
MODELS = {
    "product": (lambda w, x: x @ w["w"] + w["b"][None], {"w": normal(6, 5), "b": normal(5)}, FLOATS, []),
    "transposed": (lambda w, x: x @ w["w"].T, {"w": normal(5, 6)}, FLOATS, []),
    "weight first": (lambda w, x: jnp.einsum("oi,bi->bo", w["w"], x), {"w": normal(5, 6)}, FLOATS, []),
    "heads": (lambda w, x: jnp.einsum("bi,ihd->bhd", x, w["w"]), {"w": normal(6, 2, 4)}, FLOATS, []),
    "bfloat16": (lambda w, x: x @ w["w"].astype(jnp.bfloat16).astype(jnp.float32), {"w": normal(6, 5)}, FLOATS, []),
    "convolution": (convolved, {"k": normal(3, 3, 4, 8)}, IMAGES, []),
    "grouped": (lambda w, x: convolved(w, x, 4), {"k": normal(3, 3, 1, 8)}, IMAGES, ["k"]),
    "stacked": (stacked, {"w": normal(3, 6, 6)}, FLOATS, []),
    "stacked along its second axis": (stacked_second, {"w": normal(6, 3, 6)}, FLOATS, ["w"]),
    "tied embedding": (tied, {"e": normal(7, 4), "d": normal(4, 4)}, IDS, []),
    "read twice": (lambda w, x: x @ w["w"] + w["w"].sum(0, keepdims=True), {"w": normal(6, 5)}, FLOATS, ["w"]),
}


@pytest.fixture(autouse=True)
def _the_same_numbers_whatever_ran_before():
    RANDOM.bit_generator.state = np.random.default_rng(1).bit_generator.state


def adapted(program, rank, **options):
    made = train.low_rank(program, rank, **options).program
    weights = {
        path: 4 * normal(*leaf.shape) if path.endswith("/right") else leaf for path, leaf in made.weights.items()
    }
    return made.replace(weights=weights)


def merged(adapter, program):
    """The weights of an adapter, by hand."""
    found = {}
    for path, leaf in program.weights.items():
        left, right = (np.float64(adapter.weights.get(f"{path}:low_rank/{side}", 0.0)) for side in ("left", "right"))
        more = (left @ right).reshape(leaf.shape) if left.ndim else 0.0
        found[path] = np.float32(leaf + more)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_each_row_gets_what_its_adapter_alone_gives(name):
    fn, weights, inputs, whole = MODELS[name]
    program = lx.trace(fn, weights, inputs)
    adapters = {"one": adapted(program, 1), "none": program, "two": adapted(program, 2)}
    made = train.per_row(adapters, program)
    assert [path for path in made.weights if path.endswith(":of_each")] == [f"{path}:of_each" for path in whole]
    assert sum(path in made.weights for path in weights) == len(weights) - len(whole)
    ((_, spec),) = inputs.items()
    x = np.asarray(RANDOM.integers(0, 7, (4, 5)) if inputs is IDS else RANDOM.standard_normal((4, *spec.shape[1:])))
    x = jnp.asarray(x, spec.dtype)
    chosen = ["two", "none", "one", "two"]
    found = jax.jit(made.fn)(made.weights, x, made.converted({"adapter": chosen})["adapter.index"])
    tolerance, alone = 0.05 if name == "bfloat16" else 1e-4, jax.jit(program.fn)
    given = {called: np.asarray(alone(merged(adapter, program), x)) for called, adapter in adapters.items()}
    for row, called in enumerate(chosen):
        np.testing.assert_allclose(found[row], given[called][row], rtol=tolerance, atol=tolerance)
    assert np.abs(found[0] - given["none"][0]).max() > 0.3


def test_weights_that_were_trained_as_a_whole_are_each_adapters_own():
    program = lx.trace(lambda w, x: jnp.tanh(x @ w["w"]) @ w["last"], {"w": normal(6, 5), "last": normal(5, 3)}, FLOATS)
    other = adapted(program, 1, include=["w"], also_train=["last"])
    other = other.replace(weights={**other.weights, "last": normal(5, 3)})
    made = train.per_row({"none": program, "other": other}, program, alpha=4.0)
    assert {path: leaf.shape for path, leaf in made.weights.items()} == {
        "w": (6, 5), "last:of_each": (2, 5, 3), "w:low_rank/left": (2, 6, 1), "w:low_rank/right": (2, 1, 5),
    }  # fmt: skip
    x = normal(2, 6)
    found = made(made.weights, x, jnp.array([1, 0]))
    whole = train.merge(other, program, alpha=4.0)
    np.testing.assert_allclose(found[0], whole(whole.weights, x)[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1], program(program.weights, x)[1], rtol=1e-5, atol=1e-5)
    # What no client can send is no other adapter's answer either.
    for number in (2, -1):
        assert np.isnan(made(made.weights, x, jnp.array([number, 0]))[0]).all()


def test_a_vector_of_each_adapter_is_no_embedding_that_a_recipe_would_round():
    program = lx.trace(lambda w, x: (x @ w["w"]) * w["s"][None], {"w": normal(6, 5), "s": normal(5)}, FLOATS)
    other = adapted(program, 1, include=["w"], also_train=["s"])
    other = other.replace(weights={**other.weights, "s": normal(5)})
    made = train.per_row({"none": program, "other": other}, program)
    assert "s:of_each" in made.weights
    assert {site.path for site in lx.find_sites(made)} == {"w", None}


def test_a_weight_that_is_used_otherwise_at_another_size_is_refused_there():
    def fn(w, x):
        return (x @ (w["w"] if x.shape[1] < 100 else w["w"][:, ::-1][:, ::-1])).sum(1)

    program = lx.trace(fn, {"w": normal(6, 5)}, {"x": lx.TensorSpec(("batch", "seq", 6), "float32")})
    made = train.per_row({"one": adapted(program, 1)}, program)
    assert made(made.weights, normal(1, 3, 6), jnp.zeros(1, "int32")).shape == (1, 5)
    with pytest.raises(lx.ModelError, match="at these sizes weight 'w' is used for more than products"):
        made(made.weights, normal(1, 200, 6), jnp.zeros(1, "int32"))


def test_a_served_batch_holds_rows_of_several_adapters_and_others_are_refused(tmp_path):
    program = lx.trace(lambda w, x: x @ w["w"], {"w": normal(6, 5)}, FLOATS)
    adapters = {"german": adapted(program, 2), "none": program}
    made = train.per_row(adapters, program)
    lx.compile(made, {"batch": (4,)}, name="net").save(tmp_path / "net.lepton")
    x = RANDOM.standard_normal((3, 6)).astype(np.float32)
    server = Server(lx.load(tmp_path / "net.lepton"), Options(port=0)).start()

    def asked(names, datatype="BYTES", called="adapter"):
        inputs = [{"name": "x", "datatype": "FP32", "shape": [len(names), 6], "data": x[: len(names)].tolist()}]
        inputs.append({"name": called, "datatype": datatype, "shape": [len(names)], "data": names})
        url = f"http://{server.address[0]}:{server.address[1]}/v2/models/net/infer"
        try:
            with urllib.request.urlopen(url, json.dumps({"inputs": inputs}).encode(), timeout=60) as answer:
                return np.array(json.load(answer)["outputs"][0]["data"]).reshape(-1, 5)
        except urllib.error.HTTPError as refusal:
            return refusal.code, json.load(refusal)["error"]

    try:
        found = asked(["german", "none", "german"])
        for row, called in enumerate(["german", "none", "german"]):
            alone = adapters[called](adapters[called].weights, x[row : row + 1])[0]
            np.testing.assert_allclose(found[row], alone, rtol=1e-4, atol=1e-4)
        assert np.abs(found[0] - x[0] @ np.asarray(program.weights["w"])).max() > 0.5
        assert asked(["none", "french"]) == (400, "input 'adapter', element 1: 'french' is not in the vocabulary")
        assert asked([7], "INT32")[0] == 400
    finally:
        server.stop()


def more(program):
    return program.replace(weights={**program.weights, "b": normal(5)})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda program, _: train.per_row({}, program), "there are no adapters"),
        (lambda program, _: train.per_row({"a": program}, program, name="x"), "has an input 'x' already"),
        (lambda program, _: train.per_row({7: program}, program), "adapter 7 is Program; expected names"),
        (lambda program, _: train.per_row({"a": object()}, program), "adapter 'a' is object; expected names"),
        (lambda program, other: train.per_row({"a": other}, program), "adapter 'a' is not what low_rank made of"),
        (lambda program, _: train.per_row({"a": more(program)}, program), "adapter 'a' is not what low_rank made of"),
        (
            lambda program, _: train.per_row({"a": program}, program.replace(inputs={})),
            "the base's inputs have no rows",
        ),
    ],
)
def test_what_is_refused(call, said):
    program = lx.trace(lambda w, x: x @ w["w"], {"w": normal(6, 5)}, FLOATS)
    other = lx.trace(lambda w, x: x @ w["w"], {"w": normal(6, 4)}, FLOATS)
    with pytest.raises(lx.ModelError, match=said):
        call(program, other)
