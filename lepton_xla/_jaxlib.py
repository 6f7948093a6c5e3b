"""XLA's CPU client without JAX, whose import takes longer than loading a small model and answering.

For each array that it makes, jaxlib tries to import what JAX calls a sharding, and does without where that fails. It
uses the `__import__` of the module that calls it, so that of this module refuses JAX, and nothing else notices. Tried
with jaxlib 0.12; with others JAX's client is used.
"""

from __future__ import annotations

import builtins
import ctypes
import importlib.metadata
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")  # as JAX does before it loads jaxlib
from jaxlib import _jax, version, xla_client  # pyright: ignore[reportAttributeAccessIssue]

ERROR = _jax.JaxRuntimeError
VERSION = version.__version__
batched_device_put = _jax.batched_device_put
device_list = _jax.DeviceList


def _import(name: str, *rest: Any, **more: Any) -> Any:
    if name.partition(".")[0] == "jax":
        raise ImportError(name)
    return builtins.__import__(name, *rest, **more)


__builtins__: dict[str, Any] = {**vars(builtins), "__import__": _import}

# Of jaxlib: what begins so.
_TRIED = ("0.12.",)
# Variables of JAX that do not change what its CPU client is. With any other, JAX makes the client.
_HARMLESS = (
    "JAX_PLATFORMS", "JAX_CPU_ENABLE_ASYNC_DISPATCH", "JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE",
    "JAX_DISABLE_MOST_OPTIMIZATIONS",
)  # fmt: skip
_ASYNC = "JAX_CPU_ENABLE_ASYNC_DISPATCH"
# What JAX and jaxlib register for CPUs beside what is always there: code that calls it needs JAX.
_REGISTERED = (b"lapack_", b"blas_", b"_ffi", b"python_cpu_callback")

_lock = threading.Lock()
_found: list[Any] = []


def quick_device() -> Any:
    """The CPU, as a device of a client that was made without JAX; None if JAX is to make it.

    JAX makes it if it is imported already, if its settings are not the plain ones, if there may be other devices than
    one CPU, or if this jaxlib does not work so.
    """
    if "jax" in sys.modules:
        return None
    with _lock:
        if not _found:
            _found.append(_made() if _is_plain() else None)
        return _found[0]


def is_quick(device: Any) -> bool:
    """Whether a device is one of `quick_device`."""
    return bool(_found) and device is _found[0]


def needs_jax(blob: bytes) -> bool:
    """Whether serialized code calls routines that only JAX registers."""
    return any(name in blob for name in _REGISTERED)


def run_on_calling_thread() -> None:
    """Have the CPU client, which must not be made yet, run code on the thread that calls it."""
    os.environ[_ASYNC] = "false"
    if (jax := sys.modules.get("jax")) is not None:
        jax.config.update(_ASYNC.lower(), False)


def register_target(name: str, handler: Any) -> None:
    """Register a C function, as a `ctypes` pointer, as a target of XLA's typed calls on CPUs."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    xla_client.register_custom_call_target(name, new(handler, None, None), platform="cpu", api_version=1)


def _is_plain() -> bool:
    names = {name for name in os.environ if name.startswith("JAX_") and not name.startswith(_HARMLESS)}
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if names or platforms not in ("", "cpu"):
        return False
    return platforms == "cpu" or not _other_devices()


def _other_devices() -> bool:
    """Whether something is installed with which JAX may find other devices."""
    if any(importlib.util.find_spec(name) is not None for name in ("jax_plugins", "libtpu")):
        return True
    return bool(importlib.metadata.entry_points(group="jax_plugins"))


def _made() -> Any:
    if not VERSION.startswith(_TRIED):
        return None
    try:
        client = xla_client.make_cpu_client(
            asynchronous=os.environ.get(_ASYNC, "true").lower() not in ("n", "no", "f", "false", "off", "0")
        )
        device, *others = client.local_devices()
        probe = np.arange(3, dtype=np.float32)
        same = np.array_equal(to_host(putter(probe.shape, probe.dtype, device)(probe)), probe)
        if same and not others and "jax" not in sys.modules:
            return device
    except (AttributeError, ImportError, TypeError, RuntimeError):  # another jaxlib
        pass
    return None


def putter(shape: Sequence[int], dtype: Any, device: Any) -> Any:
    """As `compiler._xla.putter`, for `quick_device()`."""
    aval = SimpleNamespace(shape=tuple(shape), dtype=np.dtype(dtype), weak_type=False)
    sharding, devices, put = _jax.SingleDeviceSharding(device), [device], _jax.batched_device_put
    return lambda array: put(aval, sharding, [array], devices, True, enable_x64=True)


def executor(executable: Any) -> Callable[[list[Any]], list[Any]]:
    """As `compiler._xla.executor`, for code on `quick_device()`."""
    execute = executable.execute_sharded
    return lambda arguments: [shards[0] for shards in execute(arguments).disassemble_into_single_device_arrays()]


def to_host(array: Any) -> np.ndarray:
    """The elements of an array that is on one device, read-only; waits for them. On a CPU they are not copied.

    As a buffer, which takes a third of the time that jaxlib's own way takes: as long as half a small execution.
    """
    try:
        return np.asarray(memoryview(array))
    except BufferError:  # a dtype that buffers do not know, such as bfloat16
        return array._single_device_array_to_np_array_did_copy()[0]


def address(array: Any) -> int:
    """Where the elements of an array on `quick_device()` are."""
    return array.unsafe_buffer_pointer()
