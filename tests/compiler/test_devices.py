"""Loading onto a device that is not the first."""

import jax
import msgspec
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla import compiler
from lepton_xla.compiler import loading, make_update
from lepton_xla.errors import ExecutionError

X = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)


def program(scale):
    weights = {"w": scale * np.arange(24, dtype=np.float32).reshape(6, 4)}
    return lx.trace(lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", 6), "float32")})


def pretend_elsewhere(monkeypatch):
    other = msgspec.structs.replace(compiler.Fingerprint.of(), machine="another")
    monkeypatch.setattr(loading.Fingerprint, "of", staticmethod(lambda device=None, count=1: other))


def where(model):
    return {device.id for array in model.runtime.weights for device in array.devices()}


@pytest.mark.parametrize("code", [True, False])
def test_an_artifact_runs_on_the_device_that_is_asked_for(tmp_path, code, monkeypatch):
    compiler.compile(program(1.0), {"batch": (1, 4)}).save(tmp_path / "a.lepton")
    if not code:
        pretend_elsewhere(monkeypatch)
    first, second = (compiler.load(tmp_path / "a.lepton", device=number) for number in range(2))
    assert [first.route, second.route] == 2 * ["executables" if code else "stablehlo"]
    assert [where(first), where(second)] == [{jax.devices()[0].id}, {jax.devices()[1].id}]
    expected = X.astype(np.float64) @ np.arange(24).reshape(6, 4)
    for model in (second, first, second):
        np.testing.assert_allclose(model(x=X)["output"], expected, rtol=1e-5)


def test_weights_alone_go_to_the_device_of_their_base(tmp_path):
    compiler.compile(program(1.0), {"batch": (1, 4)}).save(tmp_path / "a.lepton")
    base = compiler.load(tmp_path / "a.lepton", device=1)
    make_update(base, program(2.0)).save(tmp_path / "u.lepton")
    update = compiler.load(tmp_path / "u.lepton", base=base)
    assert where(update) == {jax.devices()[1].id}
    np.testing.assert_allclose(update(x=X)["output"], 2 * X.astype(np.float64) @ np.arange(24).reshape(6, 4), rtol=1e-5)


@pytest.mark.parametrize("number", [-1, 2])
def test_a_device_that_is_not_there_is_refused_by_number(tmp_path, number):
    compiler.compile(program(1.0), {"batch": (1,)}).save(tmp_path / "a.lepton")
    with pytest.raises(ExecutionError, match=rf"there is no device {number}: JAX finds 2, counted from 0"):
        compiler.load(tmp_path / "a.lepton", device=number)


def test_code_for_another_device_is_not_written_back(tmp_path, monkeypatch, caplog):
    compiler.compile(program(1.0), {"batch": (1,)}).save(tmp_path / "a.lepton")
    before = sorted(path.name for path in (tmp_path / "a.lepton").rglob("*"))
    pretend_elsewhere(monkeypatch)
    compiler.load(tmp_path / "a.lepton", device=1, write_back=True)
    assert "was not written back: it names" in caplog.text
    assert sorted(path.name for path in (tmp_path / "a.lepton").rglob("*")) == before
