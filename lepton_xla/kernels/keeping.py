"""Tells kernels which weights stay as they are, so that each is packed for them once, and not on each call."""

from __future__ import annotations

import importlib
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np

from lepton_xla import _jaxlib
from lepton_xla.kernels import installation


class Kept:
    """Weights that do not change while this lives, or until it is closed.

    They take no memory before a kernel packs them; then some take about their size once more. The arrays are held as
    long, so that nothing else can be where they are.

    Args:
        arrays: arrays, of which those matter that a kernel multiplies: int8 on one CPU.

    >>> import jax.numpy as jnp
    >>> with Kept([jnp.ones((4, 4), jnp.int8)]) as kept:
    ...     kept.count in (0, 1)  # 0 without kernels
    True
    """

    def __init__(self, arrays: Iterable[Any]) -> None:
        small = [array for array in arrays if _is_matrix(array)]
        package: Any = importlib.import_module("lepton_xla_kernels") if small and installation.usable() else None
        found: list[tuple[int, Any]] = []
        if hasattr(package, "packed_bytes"):  # older ones pack on each call
            for array in small:
                address = _address(array)
                if address is not None:
                    package.keep(address, math.prod(array.aval.shape))
                    found.append((address, array))
        self.count = len(found)
        self._package, self._found = package, found
        self._close = weakref.finalize(self, _release, package, found)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed copies that there are now; of a weight that others keep too, each counts them."""
        if not self._close.alive:
            return 0
        return sum(self._package.packed_bytes(address) for address, _ in self._found)

    def close(self) -> None:
        """From now on they may change; a second time does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_matrix(array: Any) -> bool:
    """Whether it is an int8 array of JAX with several axes; one that was made without JAX has but its `aval`."""
    aval: Any = getattr(array, "aval", None)
    return getattr(aval, "dtype", None) == np.int8 and len(aval.shape) > 1


def _address(array: Any) -> int | None:
    """Where an array is; None if it is not on one CPU."""
    try:
        if not hasattr(array, "devices"):  # made without JAX
            return _jaxlib.address(array)
        (device,) = array.devices()
        return array.unsafe_buffer_pointer() if device.platform == "cpu" else None
    except (AttributeError, ValueError, RuntimeError):  # not an array of JAX, on several devices, or traced
        return None


def _release(package: Any, found: Sequence[tuple[int, Any]]) -> None:
    for address, _ in found:
        package.release(address)
