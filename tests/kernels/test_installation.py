"""Kernels that are missing or do not fit: XLA's own code runs, and the log says why."""

import hashlib
import sys
import types

import jax.numpy as jnp
import pytest

from lepton_xla.kernels import installation, weight_only
from lepton_xla.passes.core.targets import Target
from lepton_xla.quant import quantize


@pytest.fixture
def fresh(monkeypatch):
    """Looks for the kernels again."""
    monkeypatch.setenv(installation.VARIABLE, "")
    monkeypatch.setattr(installation.importlib.metadata, "version", lambda _name: "9.9")
    caches = installation.installed, installation.examine, installation.build
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def refuses():
    raise RuntimeError("INVALID_ARGUMENT: unsupported API version")


@pytest.mark.parametrize(
    ("package", "said"),
    [
        (None, "cannot be loaded"),
        (types.SimpleNamespace(), "cannot be loaded"),
        (types.SimpleNamespace(INTERFACE=99, handlers=dict), "has interface 99"),
        (
            types.SimpleNamespace(INTERFACE=installation.INTERFACE, handlers=lambda: {"x": object()}),
            "does not fit this jaxlib",
        ),
    ],
)
def test_what_does_not_fit_is_told_and_not_used(fresh, monkeypatch, caplog, package, said):
    monkeypatch.setitem(sys.modules, "lepton_xla_kernels", package)
    assert not installation.usable()
    assert not installation.usable()
    (record,) = caplog.records  # once
    assert said in record.getMessage()
    assert weight_only.multiply(jnp.ones((1, 2)), quantize(jnp.eye(2), "int8")).tolist() == [[1.0, 1.0]]


def test_a_package_that_is_not_installed_is_no_matter(fresh, monkeypatch, caplog):
    def missing(name):
        raise installation.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation.importlib.metadata, "version", missing)
    assert not installation.usable()
    assert not caplog.records


def test_times_of_another_build_do_not_hold(kernels, monkeypatch, tmp_path):
    before = Target.here()
    (tmp_path / "_library.so").write_bytes(b"another build")
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
    installation.build.cache_clear()
    try:
        after = Target.here()
    finally:
        installation.build.cache_clear()
    assert before.digest != after.digest
    assert hashlib.sha256(b"another build").hexdigest()[:16] in after.versions
