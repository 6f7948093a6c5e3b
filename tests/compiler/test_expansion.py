"""Weights that are stored small and unpacked once, on loading."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_xla import compiler
from lepton_xla.program import Expansion, Program, TensorSpec, trace
from lepton_xla.sharding import Rules

CODES = np.random.default_rng(0).integers(-127, 128, (6, 3)).astype(np.int8)
SCALE = np.linspace(0.1, 0.3, 3, dtype=np.float32)[None]
X = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
WANT = X.astype(np.float64) @ (CODES.astype(np.float64) * SCALE)


def unpack(weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {"dense": weights["codes"].astype(jnp.float32) * weights["scale"]}


@pytest.fixture
def program() -> Program:
    weights = {"codes": jnp.asarray(CODES), "scale": jnp.asarray(SCALE)}
    stored = trace(lambda w, x: x @ unpack(w)["dense"], weights, {"x": TensorSpec(("batch", 6), "float32")})
    return stored.replace(expansion=Expansion(unpack, lambda w, x: x @ w["dense"]))


def check(servable: compiler.Servable) -> None:
    np.testing.assert_allclose(servable(x=X)["output"], WANT, rtol=1e-5)
    assert [leaf.dtype for leaf in servable.runtime.weights] == [np.float32]
    assert servable.weights_bytes == 6 * 3 * 4


def test_stored_small_run_unpacked_by_every_route(
    program: Program, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.lepton"
    artifact = compiler.compile(program, {"batch": (1, 4)})
    check(artifact.servable())
    manifest = artifact.save(path)
    assert {leaf.path: leaf.dtype for leaf in manifest.weights} == {"codes": "int8", "scale": "float32"}
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: compiled.append(event))
    servable = compiler.load(path)
    assert servable.route == "executables"
    check(servable)
    assert not [event for event in compiled if "backend_compile" in event]

    elsewhere = compiler.Fingerprint.of()
    elsewhere = type(elsewhere)(**{**{k: getattr(elsewhere, k) for k in elsewhere.__struct_fields__}, "jaxlib": "0"})
    monkeypatch.setattr(compiler.Fingerprint, "of", lambda *_: elsewhere)
    portable = compiler.load(path, write_back=True)
    assert portable.route == "stablehlo"
    check(portable)
    again = compiler.load(path, buckets={"batch": (4,)})
    assert again.route == "executables"
    check(again)


def test_damaged_unpacking_code_is_found(program: Program, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.lepton"
    manifest = compiler.compile(program, {"batch": (1,)}).save(path)
    assert manifest.expand is not None
    (digest,) = manifest.executables
    for name in (manifest.expand.file, manifest.executables[digest].files["expand"]):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(compiler.artifact.ArtifactError, match="expand"):
            compiler.load(path)
        (path / name).write_bytes(whole)


@pytest.mark.parametrize("cut", [("model",), ()], ids=["cut", "whole"])
def test_on_a_mesh_the_unpacked_weights_are_cut_too(
    program: Program, cut: tuple[str, ...], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = Rules([("codes", cut)])
    path = tmp_path / "model.lepton"
    compiler.compile(program, {"batch": (1, 4)}, mesh="model=2", rules=rules).save(path)

    def check_on_mesh(route: str) -> None:
        servable = compiler.load(path)
        assert servable.route == route
        np.testing.assert_allclose(servable(x=X)["output"], WANT, rtol=1e-5)
        (weight,) = servable.runtime.weights
        assert weight.dtype == np.float32
        assert weight.sharding.spec == jax.P(*cut)
        assert servable.manifest.unpacked == ((("model",),) if cut else (),)
        assert servable.weights_bytes == 6 * 3 * 4 // (2 if cut else 1)

    check_on_mesh("executables")
    here = compiler.Fingerprint.of(None, 2)
    elsewhere = type(here)(**{**{k: getattr(here, k) for k in here.__struct_fields__}, "jaxlib": "0"})
    monkeypatch.setattr(compiler.Fingerprint, "of", lambda *_: elsewhere)
    check_on_mesh("stablehlo")
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    check(compiler.load(path))
