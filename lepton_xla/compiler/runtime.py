"""Runs the executables of a model, which share its weights, on arrays of exactly a bucket's sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lepton_xla.compiler import _xla
from lepton_xla.compiler.devices import Devices, Spec
from lepton_xla.compiler.sharing import Shared
from lepton_xla.deferred import jax
from lepton_xla.errors import InputError
from lepton_xla.kernels.keeping import Kept
from lepton_xla.program import TensorSpec

type Runner = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""`runner(inputs) -> outputs`, in order, with the exact shapes of one bucket."""


# What an executable adds to the resident size of a process beside its code: see the test of memory.
_EXECUTABLE_BYTES = 300 << 10

type _Slot = tuple[str, tuple[int, ...], np.dtype, Callable[[np.ndarray], jax.Array]]
type _Execute = Callable[[list[jax.Array]], list[jax.Array]]


class Runtime:
    """Runs compiled code; thread-safe.

    Args:
        inputs: the model's inputs, in call order.
        outputs: its outputs, in order.
        weights: device arrays, in argument order.
        devices: the devices of the weights and the code.
        code: what others may run too of the code, that of steps and of unpacking included.

    Attributes:
        devices: the devices.
        weights: the device arrays, which do not change.
    """

    def __init__(
        self,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        weights: Sequence[jax.Array],
        devices: Devices,
        code: Sequence[Shared] = (),
    ) -> None:
        self.weights = list(weights)
        self._code = code
        for each in code:
            each.users.add(self)
        self._kept = Kept(self.weights)
        self._inputs = dict(inputs)
        self._symbols = tuple(dict.fromkeys(name for spec in inputs.values() for name in spec.symbols))
        self.devices = devices
        self._read = devices.read
        self._outputs = dict(outputs)
        # Not the runners themselves, which refer to this: weights must not wait for the collector of cycles.
        self._parts: dict[tuple[int, ...], tuple[Sequence[_Slot], _Execute]] = {}
        self._executables: list[tuple[dict[str, int], _xla.Loaded]] = []

    def add(self, sizes: Mapping[str, int], executable: _xla.Loaded) -> None:
        """Add the executable of a bucket."""
        self._executables.append((dict(sizes), executable))
        slots: list[_Slot] = []
        puts = self.devices.putters(self._inputs, sizes)
        for (name, spec), put in zip(self._inputs.items(), puts, strict=True):
            shape, dtype = spec.shape_at(sizes), np.dtype(spec.dtype)
            slots.append((name, shape, dtype, put))
        execute = self.devices.executor(executable, self.devices.row_specs(self._outputs, self._inputs))
        self._parts[self._key(sizes)] = slots, execute

    @property
    def packed_bytes(self) -> int:
        """Bytes of the copies that kernels have packed of the weights so far."""
        return self._kept.nbytes

    @property
    def code_bytes(self) -> int:
        """An estimate of its loaded code's bytes: of code that four run, a quarter each."""
        shared = {id(each.loaded) for each in self._code}
        own = sum(id(loaded) not in shared for _, loaded in self._executables)
        parts = sum((each.nbytes + _EXECUTABLE_BYTES) // max(len(each.users), 1) for each in self._code)
        return own * _EXECUTABLE_BYTES + parts

    def sharing(self, weights: Sequence[jax.Array]) -> Runtime:
        """A runtime with the same executables and other weights of equal shapes and dtypes."""
        other = Runtime(self._inputs, self._outputs, weights, self.devices, self._code)
        for sizes, executable in self._executables:
            other.add(sizes, executable)
        return other

    def runner(self, sizes: Mapping[str, int]) -> Runner:
        """Return the function that runs one bucket, so that a caller can save the lookup.

        Raises:
            KeyError: where there is no such bucket.
        """
        return functools.partial(self._execute, *self._parts[self._key(sizes)])

    def bind(self, sizes: Mapping[str, int], arrays: Sequence[np.ndarray]) -> Callable[[], list[np.ndarray]] | None:
        """Return a function that runs one bucket on what these arrays hold when it is called.

        None where the device does not read them in place, as a CPU does that starts on a 64-byte boundary.

        Raises:
            KeyError, InputError: as `run`.
        """
        slots, execute = self._parts[self._key(sizes)]
        if self.devices.first.platform != "cpu":
            return None
        placed: list[jax.Array] = []
        for slot, array in zip(slots, arrays, strict=True):
            placed.append(_put(slot, array))
            there = self._read(placed[-1])
            if there.ctypes.data != array.ctypes.data or there.nbytes != array.nbytes:
                return None

        def run() -> list[np.ndarray]:
            return self._outputs_of(execute, [*self.weights, *placed])

        return run

    def run(self, sizes: Mapping[str, int], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run one bucket on arrays of exactly its shapes and dtypes, in order. Returns read-only outputs, in order.

        No other thread may write to the input arrays during the call.

        Raises:
            KeyError: where there is no such bucket.
            InputError: if an array does not have exactly the bucket's shape and dtype.
            ExecutionError: where the code fails, such as for want of memory.
        """
        return self._execute(*self._parts[self._key(sizes)], arrays)

    def _key(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple([sizes[name] for name in self._symbols])

    def _execute(
        self,
        slots: Sequence[_Slot],
        execute: _Execute,
        arrays: Sequence[np.ndarray],
    ) -> list[np.ndarray]:
        arguments = list(self.weights)
        for slot, array in zip(slots, arrays, strict=True):
            arguments.append(_put(slot, array))
        return self._outputs_of(execute, arguments)

    def _outputs_of(self, execute: _Execute, arguments: list[jax.Array]) -> list[np.ndarray]:
        try:
            return [self._read(output) for output in execute(arguments)]
        except _xla.ERROR as error:
            raise _xla.failed(error) from error


def _put(slot: _Slot, array: np.ndarray) -> jax.Array:
    """An input on the device. XLA trusts its size, so a wrong one would read memory outside of it."""
    name, shape, dtype, put = slot
    if array.shape != shape or array.dtype != dtype:
        raise InputError(f"input {name!r}: got {array.dtype}{array.shape}, expected {dtype}{shape}")
    return put(array)


def run_expand(
    code: _xla.Loaded, stored: Sequence[jax.Array], devices: Devices, specs: Sequence[Spec]
) -> list[jax.Array]:
    """Unpack the stored weights to those that the buckets' programs take.

    Args:
        code: the code that does it.
        stored: the stored weights, in argument order.
        devices: where they are.
        specs: how the unpacked weights are cut; empty for one device.

    Raises:
        ExecutionError: where the code fails, such as for want of memory.
    """
    try:
        return [array.block_until_ready() for array in devices.executor(code, specs)(list(stored))]
    except _xla.ERROR as error:
        raise _xla.failed(error, "the unpacking of the weights") from error
