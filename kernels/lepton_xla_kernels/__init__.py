"""Kernels for CPUs, as targets of XLA's foreign function interface."""

import ctypes
import pathlib
from typing import Any

INTERFACE = 11
"""Changes whenever targets are added, take other operands, or give results that differ by more than rounding.

lepton-xla asks for its own.
"""

_LIBRARY = ctypes.CDLL(str(pathlib.Path(__file__).with_name("_library.so")))
_LIBRARY.lepton_variant.restype = ctypes.c_char_p
_LIBRARY.lepton_use.restype = ctypes.c_bool
_LIBRARY.lepton_use.argtypes = [ctypes.c_char_p]
_LIBRARY.lepton_keep.restype = _LIBRARY.lepton_release.restype = None
_LIBRARY.lepton_keep.argtypes = [ctypes.c_void_p, ctypes.c_int64]
_LIBRARY.lepton_release.argtypes = _LIBRARY.lepton_packed_bytes.argtypes = [ctypes.c_void_p]
_LIBRARY.lepton_packed_bytes.restype = ctypes.c_int64
_NAMES = (
    "attention",
    "convolution",
    "excitation",
    "expanding",
    "integer_convolution",
    "integer_product",
    "norm",
    "weight_only_8",
    "weight_only_4",
)


def ffi_version() -> tuple[int, int]:
    """The version of XLA's FFI that the kernels were compiled for: major and minor."""
    return divmod(_LIBRARY.lepton_ffi_version(), 1000)


def handlers() -> dict[str, Any]:
    """The addresses of the kernels, as `ctypes` function pointers, by name."""
    return {name: getattr(_LIBRARY, f"lepton_{name}") for name in _NAMES}


def keep(address: int, size_bytes: int) -> None:
    """Say that a weight in memory does not change until `release` was called as often, so that it is packed once."""
    _LIBRARY.lepton_keep(address, size_bytes)


def release(address: int) -> None:
    """End one `keep`."""
    _LIBRARY.lepton_release(address)


def packed_bytes(address: int) -> int:
    """The bytes of the packed copies of a weight that is kept."""
    return _LIBRARY.lepton_packed_bytes(address)


def variant() -> str:
    """The instruction set in use: `avx512`, `avx2`, `dotprod` or `portable`."""
    return _LIBRARY.lepton_variant().decode()


def use(name: str = "") -> None:
    """Use the kernels for an instruction set, by default for the best one; for tests.

    Raises:
        ValueError: if this machine lacks it.
    """
    if not _LIBRARY.lepton_use(name.encode()):
        raise ValueError(f"this machine cannot run the kernels for {name!r}")
