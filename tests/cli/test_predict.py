import json

import cli_models as models
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.cli import _arrays


@pytest.fixture(scope="module")
def artifact(cli, plain, tmp_path_factory):
    """The float model, so that NumPy tells what must come out."""
    path = tmp_path_factory.mktemp("float") / "float.lepton"
    cli.ok("compile", plain, "--no-evaluate", "-o", path)
    return path


@pytest.fixture
def save(tmp_path):
    def save(array, name="x.npy"):
        np.save(tmp_path / name, array, allow_pickle=array.dtype == object)
        return tmp_path / name

    return save


def same(outputs, x):
    np.testing.assert_allclose(np.asarray(outputs, np.float64), models.reference(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 11])
def test_npy_in_json_out(cli, artifact, save, rows):
    x = models.data()[:rows]
    found = json.loads(cli.ok("predict", artifact, "--input", f"x={save(x)}"))
    assert list(found) == ["output"]
    same(found["output"], x)


def test_npz_in_npz_out(cli, artifact, tmp_path):
    x = models.data()[:6]
    np.savez(tmp_path / "in.npz", x=x)
    out = tmp_path / "out.npz"
    text = cli.ok("predict", artifact, "--input", tmp_path / "in.npz", "-o", out)
    assert "6, 4" in text
    with np.load(out, allow_pickle=False) as found:
        assert (list(found), found["output"].dtype) == (["output"], np.float32)
        same(found["output"], x)
    told = cli.json("predict", artifact, "--input", tmp_path / "in.npz", "-o", out)
    assert told == {"output": str(out), "outputs": {"output": {"dtype": "float32", "shape": [6, 4]}}}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.npz", "out.npz"]


@pytest.mark.parametrize("from_file", [False, True])
def test_json_in(cli, artifact, tmp_path, from_file):
    x = models.data()[:2]
    text = json.dumps({"x": x.tolist()})
    (tmp_path / "in.json").write_text(text)
    found = cli.json("predict", artifact, "--input", tmp_path / "in.json" if from_file else "-", input=text)
    same(found["output"], x)


def test_no_rows_give_no_rows(cli, artifact, save):
    x = np.zeros((0, models.IN), np.float32)
    assert cli.json("predict", artifact, "--input", f"x={save(x)}") == {"output": []}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "stdin: not JSON"),
        ("{", "stdin: not JSON"),
        ("[1]", "expected a JSON object such as {'image': [[0, 1]]}, got a list"),
        ('{"x": [[NaN]]}', "NaN is not JSON"),
        ('{"x": [[1e39, 0]]}', "input 'x' holds 1e+39, which float32 cannot represent"),
        ('{"x": [[1e999]]}', "input 'x' holds inf, which float32 cannot represent"),
        ('{"x": [[1, 2], [3]]}', "input 'x' is not a nested list of numbers"),
        ('{"x": [["a"]]}', "input 'x' is not a nested list of numbers"),
        ('{"x": {"y": 1}}', "input 'x' is not a nested list of numbers"),
        ('{"x": [[1, 2]]}', "dimension 1 is 2, expected 16"),
        ('{"x": 1}', "input 'x' has 0 dimensions"),
        ('{"y": [[1]]}', "unknown input 'y'; the model takes 'x'"),
        ("{}", "input 'x' is missing"),
        ("[" * 100_000, "stdin: not JSON"),
    ],
)
def test_json_that_is_no_input(cli, artifact, text, part):
    assert part in cli.refused("predict", artifact, "--input", "-", input=text)


def test_npy_that_is_no_input(cli, artifact, save, tmp_path):
    x = models.data()[:2]
    wrong = save(x.astype(np.float64), "wrong.npy")
    assert "dtype float64, expected float32" in cli.refused("predict", artifact, "--input", f"x={wrong}")
    code = save(np.array([print], dtype=object), "code.npy")
    assert "code.npy: not an .npy or .npz file of plain numbers" in cli.refused(
        "predict", artifact, "--input", f"x={code}"
    )
    short = save(x, "short.npy")
    short.write_bytes(short.read_bytes()[:-9])
    assert "short.npy" in cli.refused("predict", artifact, "--input", f"x={short}")
    (tmp_path / "empty.npy").write_bytes(b"")
    assert "empty.npy" in cli.refused("predict", artifact, "--input", f"x={tmp_path / 'empty.npy'}")
    (tmp_path / "text.npz").write_text("hello")
    assert "text.npz" in cli.refused("predict", artifact, "--input", tmp_path / "text.npz")
    assert "missing.npy: No such file" in cli.refused("predict", artifact, "--input", "x=missing.npy")
    fine = save(x)
    assert "'x' is given twice" in cli.refused("predict", artifact, "--input", f"x={fine}", "--input", f"x={fine}")
    assert "expected NAME=FILE.npy" in cli.refused("predict", artifact, "--input", fine)
    np.savez(tmp_path / "x.npz", x=x)
    assert "whose arrays have names already" in cli.refused("predict", artifact, "--input", f"x={tmp_path / 'x.npz'}")


def test_outputs_that_cannot_be_written_leave_nothing(cli, artifact, save, tmp_path):
    x = save(models.data()[:2])
    out = tmp_path / "folder.npz"
    out.mkdir()
    assert "folder.npz: cannot be written" in cli.refused("predict", artifact, "--input", f"x={x}", "-o", out)
    assert "cannot be written" in cli.refused(
        "predict", artifact, "--input", f"x={x}", "-o", tmp_path / "no" / "out.npz"
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.npz", "x.npy"]
    assert list(out.iterdir()) == []


def test_outputs_that_json_cannot_carry(cli, variant, tmp_path):
    target = variant(
        "fn=divide, calibration=None", "def divide(weights, x): return jnp.stack([x[:, 0], 1 / x[:, 1]], 1)"
    )
    path = tmp_path / "x.lepton"
    cli.ok("compile", target, "--no-evaluate", "-o", path)
    text = json.dumps({"x": [[0.0] * models.IN]})
    assert "write it with --output FILE.npz" in cli.refused("predict", path, "--input", "-", input=text)
    cli.ok("predict", path, "--input", "-", "-o", tmp_path / "out.npz", input=text)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        assert found["output"].tolist() == [[0.0, np.inf]]


def test_integers_from_json_are_exact(cli):
    spec = {"ids": lx.TensorSpec(("batch",), "bfloat16"), "n": lx.TensorSpec(("batch",), "int32")}
    found = _arrays.as_declared({"ids": [1, 2.5], "n": [1, 2]}, spec)
    assert found["ids"].dtype == jnp.bfloat16
    assert found["ids"].tolist() == [1.0, 2.5]
    assert found["n"] == [1, 2]  # left to the model, which refuses what an int32 cannot hold


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_narrow_floats_survive_files(tmp_path, dtype):
    values = np.array([0.5, -3.0, 240.0]).astype(jnp.dtype(dtype))
    np.save(tmp_path / "x.npy", values)
    loaded = _arrays.read(f"x={tmp_path / 'x.npy'}")
    [found] = _arrays.as_declared(loaded, {"x": lx.TensorSpec((3,), dtype)}).values()
    assert found.dtype == values.dtype
    assert found.tolist() == values.tolist()
    _arrays.write_npz(str(tmp_path / "out.npz"), {"file": values, "a/b": values.astype(np.float32)})
    with np.load(tmp_path / "out.npz", allow_pickle=False) as written:
        assert set(written) == {"file", "a/b"}
        assert written["file"].dtype == np.float32
        assert written["file"].tolist() == values.tolist()
