"""Tests of kernels run with the kernels, if they are installed; all other tests run without."""

import pytest

from lepton_xla.kernels import installation

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
