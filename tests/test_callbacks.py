"""Calls back into Python, and outputs without rows: refused before any work, or left out where they only debug."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import lepton_xla as lx
from lepton_xla.errors import CompileError, UnsupportedError
from lepton_xla.optimization import pipeline
from lepton_xla.passes.planning import resolve

INT8 = lx.Recipe.parse("measure = false\n[[quantize]]\nsites = '.*'\ndynamic = false", name="static")
WEIGHTS = {"w": np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)}
ROWS = {"x": lx.TensorSpec(("batch", 16), "float32")}


def debugging(w, x):
    """Prints at every depth, and one that has to come in order."""
    jax.debug.print("in {}", x, ordered=True)

    @jax.jit
    def inner(x):
        jax.debug.callback(lambda _: sys.stdout.write("inner"), x)
        return x @ w["w"]

    def step(carry, _):
        jax.debug.print("step")
        return jax.lax.cond(carry.sum() > 1e9, lambda c: (jax.debug.print("large"), c * 2)[1], lambda c: c, carry), None

    def going(carry):
        jax.debug.print("going {}", carry[0])
        return carry[0] < 3

    out = jax.checkpoint(inner)(x)
    out = jax.lax.while_loop(going, lambda c: (c[0] + 1, c[1] + 1.0), (0, out))[1]
    return jax.lax.scan(step, out, None, length=2)[0]


def test_calls_for_debugging_are_left_out_and_said(capfd, tmp_path):
    program = lx.trace(debugging, WEIGHTS, ROWS)
    x = np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)
    calibrated = lx.optimize(program, INT8, calibration=[{"x": x}], buckets={"batch": (1,)})
    lx.compile(calibrated, {"batch": (1,)}).save(tmp_path / "int8.lepton")
    lx.compile(program, {"batch": (1,)}).save(tmp_path / "float.lepton")
    expected = x.astype(np.float64) @ WEIGHTS["w"] + 3
    np.testing.assert_allclose(lx.load(tmp_path / "float.lepton")(x=x)["output"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lx.load(tmp_path / "int8.lepton")(x=x)["output"], expected, atol=0.3)
    jax.effects_barrier()
    assert capfd.readouterr().out == ""
    for path in ("float.lepton", "int8.lepton"):
        (report,) = [r for r in lx.load(tmp_path / path).manifest.reports if r["name"] == "debugging"]
        (places,) = report["metrics"].values()
        assert places.count("test_callbacks.py") == 5
    program(program.weights, x)
    jax.effects_barrier()
    assert "inner" in capfd.readouterr().out, "the program itself goes on printing, as in training"


def called_name(a):
    return a


@pytest.mark.parametrize(
    ("fn", "primitive"),
    [
        (lambda w, x: jax.pure_callback(called_name, jax.ShapeDtypeStruct(x.shape, x.dtype), x), "pure_callback"),
        (lambda w, x: jax.jit(lambda x: io_callback(called_name, jax.typeof(x), x, ordered=True))(x), "io_callback"),
    ],
)
def test_callbacks_are_refused_by_name_before_any_work(fn, primitive):
    program = lx.trace(lambda w, x: fn(w, x) @ w["w"], WEIGHTS, ROWS)
    for use in (lambda: lx.optimize(program, INT8, progress=pytest.fail), lambda: lx.compile(program, {"batch": (1,)})):
        with pytest.raises(CompileError, match=rf"calls 'called_name' in Python \({primitive} at .*test_callbacks"):
            use()


def test_an_output_without_rows_is_refused_before_any_work():
    program = lx.trace(lambda w, x: {"y": x @ w["w"], "mean": jnp.mean(x)}, WEIGHTS, ROWS)
    told: list[str] = []
    for use in (
        lambda: lx.optimize(program, INT8, buckets={"batch": (1, 4)}, progress=told.append),
        lambda: lx.compile(program, {"batch": (1, 4)}, progress=lambda *stage: told.append(stage)),
    ):
        with pytest.raises(CompileError, match=r"output 'mean' is float32\[\], so it does not have one result per row"):
            use()
    assert told == []
    assert pipeline.plan_for(program, INT8)  # nobody said that it will be compiled for sizes


def test_a_complex_weight_is_no_float():
    program = lx.trace(
        lambda w, x: (x.astype(jnp.complex64) @ w["w"]).real, {"w": WEIGHTS["w"].astype(np.complex64)}, ROWS
    )
    with pytest.raises(UnsupportedError, match="its weight is complex64, no float"):
        resolve(INT8, program)
