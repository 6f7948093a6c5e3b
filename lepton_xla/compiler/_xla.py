"""The compiler's only contact with XLA's client below JAX's public API.

Serialized executables go through the client's own format, never through `jax.experimental.serialize_executable`, which
pickles. Everything here was read and run on jaxlib 0.12; a JAX release that moves one of these names breaks this file
and no other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jaxlib.version
import numpy as np
from jax._src import compilation_cache
from jax._src.core import ShapedArray
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]

from lepton_xla.errors import ExecutionError, first_line

ERROR = jax.errors.JaxRuntimeError
"""What XLA raises where it cannot compile, write or run something."""

_CACHE = threading.Lock()

type Device = Any
"""A `jax.Device`; JAX's own name for it is no type to a type checker."""

type Loaded = Any
"""A `LoadedExecutable` of XLA's client, on one device."""


def first_device() -> Device:
    """This process's first device.

    Raises:
        ExecutionError: where JAX finds none, such as for a platform in `JAX_PLATFORMS` that this machine lacks.
    """
    try:
        return jax.devices()[0]
    except Exception as error:  # an AssertionError for one platform, a RuntimeError for the next
        asked = jax.config.jax_platforms
        raise ExecutionError(
            f"JAX finds no device{f' of the platforms {asked!r} (JAX_PLATFORMS)' if asked else ''}: {reason(error)}"
        ) from error


def reason(error: BaseException) -> str:
    """An error's kind and its first line."""
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def without_cache() -> Generator[None, None, None]:
    """A block in which JAX compiles, and takes nothing from its cache on disk.

    Code that was read from bytes has lost the functions that it hands to XLA's runtime, such as a sort's comparison:
    it runs, but written once more it does not (jaxlib 0.12).
    """
    if not (jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir):
        yield
        return
    with _CACHE:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # it asks whether it is enabled once only
        try:
            yield
        finally:
            jax.config.update("jax_enable_compilation_cache", True)
            compilation_cache.reset_cache()


def loaded(compiled: jax.stages.Compiled) -> Loaded:
    """The runtime executable behind a compiled function."""
    return compiled.runtime_executable()


def serialize(executable: Loaded) -> bytes:
    """Compiled code in the client's own format."""
    return bytes(executable.serialize())


def deserialize(blob: bytes, device: Device) -> Loaded:
    """Compiled code made ready to run on `device`; nothing is compiled.

    The bytes must come from a source that is trusted to run code here: loading them may execute it.
    """
    if device.platform == "cpu" and b"lapack_" in blob:
        _register_lapack()
    return device.client.deserialize_executable(blob, executable_devices=_jax.DeviceList((device,)))


def _register_lapack() -> None:
    """Makes LAPACK's routines known; compiled code that calls one that is not jumps to address zero.

    Only where it is needed, because it imports SciPy, which takes a third of a second.
    """
    from jaxlib import lapack

    lapack._lapack.initialize()  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]


def jaxlib_version() -> str:
    """The version that compiled code belongs to."""
    return jaxlib.version.__version__


def platform_version(device: Device) -> str:
    """What the client says about its runtime: a CUDA version, a libtpu build, or just `cpu`."""
    return str(device.client.platform_version)


def putter(shape: Sequence[int], dtype: Any, device: Device) -> Callable[[np.ndarray], jax.Array]:
    """A function from a NumPy array of this shape and dtype to an array on `device`.

    On the CPU an array aligned to 64 bytes is not copied: the device array keeps it alive and reads the same memory, so
    it must not be written to while that device array is in use. A tenth of `jax.device_put`'s time a call.
    """
    aval = ShapedArray(tuple(shape), np.dtype(dtype))
    sharding = jax.sharding.SingleDeviceSharding(device)
    devices = [device]
    put = _jax.batched_device_put
    return lambda array: put(aval, sharding, [array], devices, True)


def executor(executable: Loaded) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """A function that runs the executable on device arrays; it may return before the results are ready.

    It raises XLA's `ERROR` where the code fails, and so does reading a result; `failed` says it in our words.
    """
    execute = executable.execute_sharded

    def run(arguments: list[jax.Array]) -> list[jax.Array]:
        return [shards[0] for shards in execute(arguments).disassemble_into_single_device_arrays()]

    return run


def failed(error: BaseException, what: str = "the compiled model") -> ExecutionError:
    """What to raise where code fails when it is run."""
    return ExecutionError(f"{what} failed when it was run: {reason(error)}")
