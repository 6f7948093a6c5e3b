"""XLA's client below JAX's public API. No other file uses it.

Executables are serialized in the client's own format, never by `jax.experimental.serialize_executable`, which pickles.
Written for jaxlib 0.12; a JAX release that moves one of these names breaks only this file. What loads compiled code
onto the device of `_jaxlib`, and runs it there, imports no JAX.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from lepton_xla import _jaxlib
from lepton_xla.deferred import jax
from lepton_xla.errors import ExecutionError, first_line
from lepton_xla.kernels import installation

ERROR = _jaxlib.ERROR
"""The error that XLA raises if it cannot compile, serialize or run something."""

_CACHE = threading.Lock()

is_quick = _jaxlib.is_quick
needs_jax = _jaxlib.needs_jax

type Device = Any
"""A `jax.Device`; type checkers do not accept JAX's own name as a type."""

type Loaded = Any
"""XLA's `LoadedExecutable`."""


def first_device() -> Device:
    """This process's first device.

    Raises:
        ExecutionError: if JAX finds none, for example because this machine lacks a platform in `JAX_PLATFORMS`.
    """
    try:
        return jax.devices()[0]
    except Exception as error:  # the type differs by platform: AssertionError, RuntimeError
        asked = jax.config.jax_platforms
        raise ExecutionError(
            f"JAX finds no device{f' of the platforms {asked!r} (JAX_PLATFORMS)' if asked else ''}: {reason(error)}"
        ) from error


def device_numbered(number: int, *, quick: bool = False) -> Device:
    """One of this process's devices, counted from 0.

    Args:
        number: its number.
        quick: whether it may be that of a client without JAX, which loads and runs compiled code.

    Raises:
        ExecutionError: if JAX finds none, or fewer.
    """
    if quick and (found := _jaxlib.quick_device()) is not None:
        here = [found]
    else:
        first_device()  # tells why there is none
        here = jax.local_devices()
    if not 0 <= number < len(here):
        raise ExecutionError(f"there is no device {number}: JAX finds {len(here)}, counted from 0")
    return here[number]


def count_devices() -> int:
    """Number of this process's devices.

    Raises:
        ExecutionError: if JAX finds none.
    """
    if _jaxlib.quick_device() is not None:
        return 1
    first_device()
    return len(jax.local_devices())


def is_first(device: Device) -> bool:
    """Whether a device is the first of its client in this process."""
    return device == device.client.local_devices()[0]


def memory_bytes(device: Device) -> int | None:
    """Bytes of memory that XLA may use on a device; None if it does not say, as on a CPU."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else int(limit)


def reason(error: BaseException) -> str:
    """An error's kind and its first line."""
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def without_cache() -> Generator[None, None, None]:
    """Disable JAX's persistent compilation cache in a block.

    Deserialized code lacks the functions that it passes to XLA's runtime, such as the comparison of a sort. It runs,
    but it does not survive a second serialization (jaxlib 0.12).
    """
    from jax._src import compilation_cache

    if not (jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir):
        yield
        return
    with _CACHE:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX reads the setting only once
        try:
            yield
        finally:
            jax.config.update("jax_enable_compilation_cache", True)
            compilation_cache.reset_cache()


def loaded(compiled: jax.stages.Compiled) -> Loaded:
    """The runtime executable behind a compiled function."""
    return compiled.runtime_executable()


def serialize(executable: Loaded) -> bytes:
    """Serialize compiled code in the client's own format."""
    return bytes(executable.serialize())


def deserialize(blob: bytes, devices: Sequence[Device]) -> Loaded:
    """Load serialized code onto devices, without compiling.

    The bytes must come from a trusted source: loading them may execute code.
    """
    if devices[0].platform == "cpu" and b"lapack_" in blob:
        _register_lapack()
    if calls_kernels(blob) and installation.installed() is None:
        raise ExecutionError(f"it calls kernels of {installation.PACKAGE}, which is not installed here")
    options = None
    if len(devices) == 1 and not is_first(devices[0]):
        from jax._src import compiler

        # Code names the device that it was compiled for, which is the first.
        options = compiler.get_compile_options(1, 1, device_assignment=np.array([[devices[0].id]]))
    return devices[0].client.deserialize_executable(
        blob, executable_devices=_jaxlib.device_list(tuple(devices)), compile_options=options
    )


def calls_kernels(blob: bytes) -> bool:
    """Whether serialized code calls kernels of this project, which must be registered first."""
    return installation.PREFIX.encode() in blob


def kernels_called(blob: bytes) -> list[str]:
    """The names of this project's kernels in serialized code, as often as they are there."""
    # Other bytes come at once behind a name.
    name = re.escape(installation.PREFIX.encode()) + rb"[a-z]+(?:_[a-z]+)*(?:_\d)?"
    return sorted(found.decode() for found in re.findall(name, blob))


def _register_lapack() -> None:
    """Register LAPACK's routines; compiled code that calls an unregistered one jumps to address zero.

    Called only if needed, because it imports SciPy, which takes a third of a second.
    """
    from jaxlib import lapack

    lapack._lapack.initialize()  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]


def program_text(exported: jax.export.Exported) -> str:
    """The StableHLO of an exported program, without the lines of Python that it came from."""
    from jax.interpreters import mlir
    from jaxlib.mlir import ir

    with mlir.make_ir_context():
        return str(ir.Module.parse(exported.mlir_module()).operation.get_asm(enable_debug_info=False))


_WITHOUT_COMPOSITES = "builtin.module(func.func(stablehlo-legalize-composite-to-call))"


def module_for_others(exported: jax.export.Exported, version: str) -> bytes:
    """The StableHLO of an exported program for tools of an older StableHLO, without JAX's checks of symbolic sizes.

    Composite operations become what they stand for: TensorFlow cannot find the shapes of one with two symbolic sizes.

    Raises:
        Exception: of MLIR's own types, if that version has not all of its operations.
    """
    from jax.interpreters import mlir
    from jaxlib.mlir import ir, passmanager
    from jaxlib.mlir.dialects import stablehlo

    checks: list[Any] = []

    def visit(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call" and "shape_assertion" in str(
            operation.attributes["call_target_name"]
        ):
            checks.append(operation)
        return ir.WalkResult.ADVANCE

    with mlir.make_ir_context():
        module = ir.Module.parse(exported.mlir_module())
        module.operation.walk(visit)
        for check in checks:
            check.erase()
        stablehlo.register_stablehlo_passes()
        passmanager.PassManager.parse(_WITHOUT_COMPOSITES).run(module.operation)
        return bytes(stablehlo.serialize_portable_artifact(module, version))


def jaxlib_version() -> str:
    """The version that compiled code belongs to."""
    return _jaxlib.VERSION


def platform_version(device: Device) -> str:
    """The runtime's version, as the client reports it: a CUDA version, a libtpu build, or just `cpu`."""
    # A client that is loaded as a plugin puts this line before what a client that only compiles says.
    return str(device.client.platform_version).removeprefix("PJRT C API\n" if device.platform == "tpu" else "")


def putter(shape: Sequence[int], dtype: Any, device: Device) -> Callable[[np.ndarray], jax.Array]:
    """Make a function that puts NumPy arrays of this shape and dtype on `device`.

    On the CPU, an array aligned to 64 bytes is not copied: the device array keeps it alive and shares its memory, so do
    not write to it while the device array is in use. A call takes a tenth of `jax.device_put`'s time.
    """
    if is_quick(device):
        return _jaxlib.putter(shape, dtype, device)
    from jax._src.core import ShapedArray

    aval = ShapedArray(tuple(shape), np.dtype(dtype))
    sharding = jax.sharding.SingleDeviceSharding(device)
    devices = [device]
    put = _jaxlib.batched_device_put
    return lambda array: put(aval, sharding, [array], devices, True)


def executor(executable: Loaded) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """Make a function that runs the executable on device arrays; it may return before the results are ready.

    The function, and reading a result, raise `ERROR` if the code fails; `failed` converts it.
    """
    if is_quick(executable.local_devices()[0]):
        return _jaxlib.executor(executable)
    execute = executable.execute_sharded

    def run(arguments: list[jax.Array]) -> list[jax.Array]:
        return [shards[0] for shards in execute(arguments).disassemble_into_single_device_arrays()]

    return run


def executor_of_several(
    executable: Loaded, outputs: Sequence[tuple[tuple[int, ...], jax.sharding.Sharding]]
) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """As `executor`, for an executable on several devices.

    Args:
        executable: the executable.
        outputs: of each output, how many pieces its first axes are in, and its sharding.
    """
    execute = executable.execute_sharded

    def run(arguments: list[jax.Array]) -> list[jax.Array]:
        made = execute(arguments).disassemble_into_single_device_arrays()
        return [
            jax.make_array_from_single_device_arrays(_whole_shape(shards[0].shape, pieces), sharding, shards)
            for (pieces, sharding), shards in zip(outputs, made, strict=True)
        ]

    return run


def _whole_shape(part: Sequence[int], pieces: Sequence[int]) -> tuple[int, ...]:
    return tuple(size * count for size, count in itertools.zip_longest(part, pieces, fillvalue=1))


def reader(device: Device) -> Callable[[jax.Array], np.ndarray]:
    """The function that gives the elements of an array on this device, read-only, and waits for them.

    On a CPU they are not copied.
    """
    return _jaxlib.to_host if is_quick(device) else np.asarray


def read_back(array: jax.Array, device: Device) -> np.ndarray:
    """The elements of an array that is on this one device; no copy of them stays with the array."""
    return _jaxlib.to_host(array) if is_quick(device) else np.asarray(array.addressable_shards[0].data)


def known(array: jax.Array, device: Device) -> jax.Array:
    """An output of `executor` as JAX makes arrays, on this one device.

    Where code has run without JAX before it was imported, jaxlib makes outputs that have no shape and dtype for JAX.
    """
    return array if array.aval is not None else jax.device_put(_jaxlib.to_host(array), device)


def failed(error: BaseException, what: str = "the compiled model") -> ExecutionError:
    """Convert an error of running code to an `ExecutionError`."""
    return ExecutionError(f"{what} failed when it was run: {reason(error)}")
