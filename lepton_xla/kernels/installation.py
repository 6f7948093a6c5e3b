"""Finds the optional package of kernels, and registers them with XLA."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import pathlib
from collections.abc import Generator

from lepton_xla import _jaxlib

_LOG = logging.getLogger(__name__)

PACKAGE = "lepton-xla-kernels"
# The version of the kernels' operands and results that this version of lepton_xla knows.
INTERFACE = 11
# Names of the targets of XLA's custom calls begin with this; compiled code contains them as text.
PREFIX = "lepton_kernel_"
VARIABLE = "LEPTON_KERNELS"

_allowed = contextvars.ContextVar("kernels allowed", default=True)


@contextlib.contextmanager
def without_kernels() -> Generator[None, None, None]:
    """Lower what is lowered in a block without kernels, so that it runs where they are not installed."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def usable() -> bool:
    """Whether kernels are installed, and not excluded by `without_kernels` or `LEPTON_KERNELS=off`.

    >>> with without_kernels():
    ...     usable()
    False
    """
    return _allowed.get() and os.environ.get(VARIABLE, "") != "off" and installed() is not None


@functools.cache
def installed() -> str | None:
    """The version of the installed kernels, which are registered with XLA; None, and a line in the log, if unusable."""
    version, problem = examine()
    if problem:
        _LOG.warning("%s %s %s. XLA's own code is used; install the package again", PACKAGE, version, problem)
        return None
    return version


@functools.cache
def build() -> str:
    """A digest of the installed kernels' code: times of one build do not hold for another; empty if there are none.

    >>> len(build()) in (0, 16)
    True
    """
    if installed() is None:
        return ""
    digest = hashlib.sha256()
    for folder in importlib.import_module("lepton_xla_kernels").__path__:
        for library in sorted(pathlib.Path(folder).glob("*.so")):
            digest.update(library.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def examine() -> tuple[str | None, str]:
    """The version of the kernels, None if there are none, and why they cannot be used, if so; registers them with XLA.

    >>> version, problem = examine()
    >>> isinstance(problem, str)
    True
    """
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None, ""
    try:
        found = importlib.import_module("lepton_xla_kernels")

        interface, handlers = found.INTERFACE, found.handlers()
    except (ImportError, OSError, AttributeError) as error:  # of another architecture or system, or incomplete
        return version, f"cannot be loaded: {error}"
    if interface != INTERFACE:
        return version, f"has interface {interface}, and this version of lepton-xla needs {INTERFACE}"
    try:
        for name, handler in handlers.items():
            _jaxlib.register_target(PREFIX + name, handler)
    except Exception as error:  # XLA refuses kernels that were compiled for another version of its interface
        return version, f"does not fit this jaxlib: {error}"
    return version, ""
