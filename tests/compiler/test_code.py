"""Compiled code, its bytes, and messages if XLA cannot compile, serialize or run it."""

import logging
import re

import compiler_models as models
import jax
import numpy as np
import pytest

from lepton_xla import compiler
from lepton_xla.cli import main
from lepton_xla.compiler import _xla
from lepton_xla.errors import ArtifactError, CompileError, ExecutionError
from lepton_xla.optimization.pipeline import optimize
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe


def fail(*_args, **_kwargs):
    raise _xla.ERROR("UNIMPLEMENTED: no such thing here.\n  a stack\n  that nobody reads")


def test_what_xla_cannot_write_is_compiled_on_loading(monkeypatch, caplog, tmp_path):
    """Only the bucket at fault is compiled; the artifact, the log and `inspect` say which, and why."""
    real = _xla.serialize
    count = iter(range(100))
    monkeypatch.setattr(_xla, "serialize", lambda executable: real(executable) if next(count) != 1 else fail())
    with caplog.at_level(logging.WARNING):
        manifest = compiler.compile(models.dense(), {"batch": (1, 4)}).save(tmp_path / "a.lepton")
    why = "JaxRuntimeError: UNIMPLEMENTED: no such thing here."
    assert (
        f"cannot serialize the code of bucket batch=4, so loading will compile it from StableHLO: {why}" in caplog.text
    )
    (entry,) = manifest.executables.values()
    assert (set(entry.files), entry.unwritten) == ({"batch=1"}, {"batch=4": why})
    monkeypatch.undo()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        servable = compiler.load(tmp_path / "a.lepton")
    assert f"compiling 1 buckets from StableHLO: XLA could not serialize the code of batch=4: {why}" in caplog.text
    assert servable.route == "stablehlo"
    x = np.random.default_rng(0).standard_normal((5, 12)).astype(np.float32)
    np.testing.assert_allclose(servable(x=x)["output"], models.dense_reference(x), rtol=1e-5, atol=1e-6)
    from click.testing import CliRunner

    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "a.lepton")]).stdout
    assert f"XLA could not serialize the code of batch=4: {why}" in shown
    # Written back where XLA can after all, it is there for the next one.
    compiler.load(tmp_path / "a.lepton", write_back=True)
    assert compiler.load(tmp_path / "a.lepton").route == "executables"


def test_code_that_fails_when_it_is_run_is_said_in_one_line(dense_artifact, monkeypatch):
    monkeypatch.setattr(_xla, "executor", lambda _: fail)
    servable = dense_artifact.servable()
    with pytest.raises(ExecutionError, match=r"^the compiled model failed when it was run: .*no such thing here\.$"):
        servable(x=np.ones((2, 12), np.float32))


def test_code_that_fails_while_it_is_checked(monkeypatch):
    monkeypatch.setattr(_xla, "executor", lambda _: fail)
    with pytest.raises(ExecutionError, match="failed when it was run"):
        compiler.compile(models.dense(), {"batch": (1, 2)})


def test_what_xla_does_not_compile_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(CompileError, match=r"does not compile for bucket batch=1: .*no such thing here\.$"):
        compiler.compile(models.dense(), {"batch": (1, 2)})


def test_code_that_cannot_be_read_here(copy_dense, monkeypatch):
    monkeypatch.setattr(_xla, "deserialize", fail)
    with pytest.raises(ArtifactError, match=r"the executable of bucket batch=\d cannot be loaded here: .*here\.$"):
        compiler.load(copy_dense())


def test_weights_that_are_gone():
    weights = {"w": jax.device_put(np.ones(4, np.float32)) + 1}
    program = trace(lambda w, x: x * w["w"][None], weights, {"x": TensorSpec(("batch", 4), "float32")})
    program.weights["w"].delete()
    with pytest.raises(CompileError, match=r"weight 'w' cannot be put on .*deleted"):
        compiler.compile(program, {"batch": (1,)})


@pytest.mark.parametrize("kind", [AssertionError, RuntimeError])
def test_no_device(saved_dense, monkeypatch, kind):
    def none():
        raise kind("cannot initialize\nmore")

    monkeypatch.setattr(jax, "devices", none)
    for use in (lambda: compiler.load(saved_dense), lambda: compiler.compile(models.dense(), {"batch": (1,)})):
        with pytest.raises(ExecutionError, match=re.escape("JAX finds no device of the platforms 'cpu'")):
            use()


def test_a_typed_key_that_a_model_closes_over():
    key = jax.random.key(4)
    program = trace(lambda w, x: x + jax.random.normal(key, (1, 4)), {}, {"x": TensorSpec(("batch", 4), "float32")})
    found = compiler.compile(program, {"batch": (1,)}).servable()(x=np.zeros((1, 4), np.float32))
    np.testing.assert_allclose(found["output"], jax.random.normal(key, (1, 4)), rtol=1e-6)


def test_what_xla_refuses_while_optimizing_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(ExecutionError, match=r"^XLA failed in the last step that began: .*no such thing here\.$"):
        optimize(models.dense(), Recipe.load("int8"))


def test_what_xla_refuses_in_a_command_is_one_line(saved_dense, monkeypatch):
    from click.testing import CliRunner

    from lepton_xla.cli import inspect

    monkeypatch.setattr(inspect, "_route", fail)
    done = CliRunner().invoke(main, ["inspect", str(saved_dense)])
    assert (done.exit_code, done.stderr.splitlines()) == (
        2,
        ["leptonx: XLA failed: UNIMPLEMENTED: no such thing here."],
    )
