"""Inputs and weights that JAX allows, all the way: compiled, optimized, loaded, run from files and served."""

import concurrent.futures
import json

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.cli import load, rollout
from lepton_xla.errors import ModelError
from lepton_xla.serve import Client, Options, Server
from lepton_xla.serve.models.settings import parse_settings
from lepton_xla.serve.monitor.rules import Rules
from lepton_xla.trust import keys
from lepton_xla.tuning.deployments import Prices

SCALAR = """
import jax.numpy as jnp
import numpy as np
import lepton_xla as lx

random = np.random.default_rng(5)
weights = {"w": random.standard_normal((16, 64)).astype(np.float32)}
rows = (1.5 * random.standard_normal((64, 16))).astype(np.float32)
model = lx.ModelSpec(
    fn=lambda w, x, temperature, cold: jnp.where(cold, 0.0, x @ w["w"] / temperature),
    weights=weights,
    inputs={
        "x": lx.TensorSpec(("batch", 16), "float32"),
        "temperature": lx.TensorSpec((), "float32"),
        "cold": lx.TensorSpec((), "bool"),
    },
    buckets={"batch": (1, 4)},
    calibration=[{"x": rows, "temperature": np.float32(2.0), "cold": np.bool_(False)}],
)
"""
INT8 = """
measure = false
[[quantize]]
sites = ".*"
dynamic = false
"""


def expected(x, temperature):
    w = np.random.default_rng(5).standard_normal((16, 64)).astype(np.float32).astype(np.float64)
    return x.astype(np.float64) @ w / temperature


@pytest.fixture(scope="module")
def scalar(cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scalar")
    (folder / "scalar_model.py").write_text(SCALAR)
    (folder / "int8.toml").write_text(INT8)
    cli.ok("compile", f"{folder}/scalar_model.py:model", "-o", folder / "float.lepton")
    cli.ok("compile", f"{folder}/scalar_model.py:model", "--recipe", folder / "int8.toml", "-o", folder / "int8.lepton")
    return folder


def test_an_input_without_dimensions_from_files(cli, scalar, tmp_path):
    x = np.random.default_rng(1).standard_normal((6, 16)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x, temperature=np.float32(3.0), cold=np.bool_(False))
    for path, tolerance in ((scalar / "float.lepton", 1e-4), (scalar / "int8.lepton", 0.2)):
        from_files = json.loads(cli.ok("predict", path, "--input", tmp_path / "in.npz"))["output"]
        np.testing.assert_allclose(from_files, expected(x, 3.0), atol=tolerance)
        document = json.dumps({"x": x.tolist(), "temperature": 0.5, "cold": False})
        from_json = json.loads(cli.ok("predict", path, "--input", "-", input=document))["output"]
        np.testing.assert_allclose(from_json, expected(x, 0.5), atol=6 * tolerance)
    found = cli.json("bench", scalar / "float.lepton", "--target", f"{scalar}/scalar_model.py:model")
    assert [each["rows"] for each in found["buckets"]] == [1, 4]


def test_requests_with_an_input_without_rows_never_share_a_batch(scalar):
    """Each of many at once gets the answer for its own temperature."""
    x = np.random.default_rng(2).standard_normal((3, 16)).astype(np.float32)
    with Server(lx.load(scalar / "float.lepton"), Options(port=0)) as server, Client(server.url) as client:

        def ask(number):
            rows, temperature = x[: 1 + number % 3], np.float32(1 + number)
            inputs = {"x": rows, "temperature": temperature, "cold": np.bool_(number % 5 == 0)}
            found = client.infer(server.name, inputs)["output"]
            wanted = expected(rows, float(temperature)) * (number % 5 != 0)
            np.testing.assert_allclose(found, wanted, atol=1e-5)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(60)))


@pytest.mark.parametrize("name", ["self", "kwargs", "class", "weights", "fn", "inputs", "a b", "a/b", "größe"])
def test_inputs_of_any_printable_name(name):
    program = lx.trace(lambda w, x: x * 2, {}, {name: lx.TensorSpec(("batch", 2), "float32")})
    servable = lx.compile(program, {"batch": np.array([1, 2])}).servable()
    assert servable(**{name: [[1.0, 2.0]]})["output"].tolist() == [[2.0, 4.0]]


@pytest.mark.parametrize("name", ["", " x", "x\n", "x\0", 5])
def test_inputs_that_cannot_be_named_are_refused(name):
    with pytest.raises(ModelError, match=r"input name .*: expected printable text"):
        lx.trace(lambda w, x: x, {}, {name: lx.TensorSpec((2,), "float32")})


@pytest.mark.parametrize(
    "inputs", [[("x", lx.TensorSpec((2,), "int8"))], {"x": ("batch", 4)}, {"x": jax.ShapeDtypeStruct((2,), np.int8)}]
)
def test_inputs_that_are_no_specs_are_refused(inputs):
    with pytest.raises(ModelError, match=r"a mapping such as|input 'x' is a \w+, not a TensorSpec"):
        lx.trace(lambda w, x: x, {}, inputs)


def test_dimensions_are_named_as_files_are():
    with pytest.raises(ModelError, match="'größe' is neither"):
        lx.TensorSpec(("größe", 2), "float32")


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "bfloat16", "complex64", "int4", "float8_e4m3fn"])
def test_inputs_of_any_dtype(dtype, tmp_path):
    program = lx.trace(lambda w, x: {"same": x}, {}, {"x": lx.TensorSpec(("batch", 0, 3), dtype)})
    assert program.outputs["same"].shape == ("batch", 0, 3)
    program = lx.trace(lambda w, x: {"first": x[:, 0], "last": x[:, -1:]}, {}, {"x": lx.TensorSpec(("n", 3), dtype)})
    lx.compile(program, {"n": (2,)}).save(tmp_path / "a.lepton")
    x = np.arange(6).reshape(2, 3).astype(jnp.dtype(dtype))
    found = lx.load(tmp_path / "a.lepton")(x=x)
    assert (found["first"].dtype, found["first"].shape, found["last"].shape) == (x.dtype, (2,), (2, 1))
    assert (found["last"].astype(np.complex64) == x[:, -1:].astype(np.complex64)).all()


def test_a_typed_key_among_the_weights(tmp_path):
    weights = {"key": jax.random.key(7), "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3), "w": np.ones(4)}
    weights["w"] = weights["w"].astype(np.float32)

    def fn(w, x):
        return x @ jax.random.normal(w["key"], (4, 2)) + jax.random.uniform(w["keys"][1], (1, 2)) * w["w"][0]

    program = lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 4), "float32")})
    small = lx.optimize(program, msgspec.structs.replace(lx.Recipe.load("int8-weight-only"), measure=False))
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    for each in (program, small):
        lx.compile(each, {"batch": (1, 2)}).save(tmp_path / "a.lepton", overwrite=True)
        np.testing.assert_allclose(lx.load(tmp_path / "a.lepton")(x=x)["output"], fn(weights, x), rtol=2e-5)


def test_what_cannot_be_a_weight_is_refused_by_name():
    with pytest.raises(ModelError, match=r"weight 'w', object\[1\], cannot be made a JAX array"):
        lx.trace(lambda w, x: x, {"w": np.array([object()])}, {"x": lx.TensorSpec((2,), "float32")})


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (load._prompts, "How do I pay?\nWhere?"),
        (rollout._read, "stages = [10]"),
        (lambda path: parse_settings(path.read_text("utf-8")), "[serving]\nweight = 2"),
        (lambda path: Rules.load(path).rules, '[[rule]]\nname = "slow"\nwhen = "p99 > 50ms over 1m for 2m"'),
        (Prices.load, "[per_hour]\ncpu = 0.2"),
        (lambda path: keys._not_before_s(path.read_bytes(), "policy"), "not_before = 2026-11-28T00:00:00Z"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_a_file(read, text, tmp_path):
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    plain.write_text(text, "utf-8")
    marked.write_text(text, "utf-8-sig")
    assert read(marked) == read(plain)
