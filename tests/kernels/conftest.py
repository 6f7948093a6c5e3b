"""Tests of kernels run with the kernels, if they are installed; all other tests run without."""

import jax
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.kernels import installation
from lepton_xla.passes.alternatives import autotuning
from lepton_xla.passes.core.timing import Timer

VARIANTS = ("avx512", "avx2", "dotprod", "portable")


@pytest.fixture
def kernels(monkeypatch):
    """The package of kernels, in use."""
    found = pytest.importorskip("lepton_xla_kernels", reason="the kernels are not built: there is no C++ compiler")
    monkeypatch.setenv(installation.VARIABLE, "")
    assert installation.usable(), "the kernels are there but do not fit: make kernels"
    yield found
    found.use()


@pytest.fixture
def variants(kernels):
    """The instruction sets that this machine has kernels for, one after the other in use."""

    def each():
        for name in VARIANTS:
            try:
                kernels.use(name)
            except ValueError:
                continue
            assert kernels.variant() == name
            yield name

    return each


@pytest.fixture
def autotuned(kernels, monkeypatch):
    """Checks functions with all kernels that `autotune` finds for them, against plain JAX; returns the primitives."""

    def times(functions, *_):
        return [1.0 / (1 + at) for at in range(len(functions))]  # a kernel is the last alternative

    monkeypatch.setattr(autotuning, "time_programs", times)

    def check(fn, *operands):
        inputs = {f"x{at}": lx.TensorSpec(each.shape, each.dtype.name) for at, each in enumerate(operands)}
        program = lx.trace(lambda _weights, *given: fn(*given), {}, inputs)
        tuned = autotuning.autotune(program, sizes=[{}], timer=Timer()).fn
        expected = jax.jit(fn)(*operands)
        for name, got in jax.jit(tuned)({}, *operands).items():
            np.testing.assert_allclose(got, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)
        return [eqn.primitive.name for eqn in jax.make_jaxpr(tuned)({}, *operands).eqns]

    return check
