"""The steps of generation as compiled code: a prompt into a slot of the cache, and one token for each slot.

Both take the cache and give it back changed; its memory is donated, so they write where it lies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.compiler import _xla
from lepton_xla.compiler.buckets import BucketSizes, bucket_name, combinations, next_size
from lepton_xla.compiler.devices import Devices
from lepton_xla.compiler.manifest import DECODE, GenerationEntry, Manifest, prefill_name
from lepton_xla.compiler.portable import Portable
from lepton_xla.compiler.runtime import Runtime
from lepton_xla.deferred import jax
from lepton_xla.errors import InputError
from lepton_xla.program import TensorSpec
from lepton_xla.trees import leaf_bytes

type _Execute = Callable[[list[jax.Array]], list[jax.Array]]
type _Put = Callable[[np.ndarray], jax.Array]


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """What an artifact in memory has for generation, beside executables.

    Attributes:
        prefill: the portable programs that read a prompt into a slot.
        decode: the portable program that reads one token for each slot.
        tokenizer: the tokenizer's JSON; empty without one.
    """

    prefill: tuple[Portable, ...]
    decode: tuple[Portable, ...]
    tokenizer: bytes = b""


def prefill_specs(cache: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    """Inputs of the first step, after the weights."""
    tokens = {"tokens": TensorSpec((1, "length"), "int32"), "lengths": TensorSpec((1,), "int32")}
    return {**tokens, "slot": TensorSpec((), "int32"), **_named(cache)}


def decode_specs(slots: int, cache: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    """Inputs of the second step, after the weights."""
    one = TensorSpec((slots,), "int32")
    return {"token": one, "position": one, **_named(cache)}


def prefill_inputs(entry: GenerationEntry, sizes: Mapping[str, int]) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the first step's inputs at a length."""
    return [spec.at(sizes) for spec in prefill_specs(_specs(entry)).values()]


def decode_inputs(entry: GenerationEntry) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the second step's inputs."""
    return [spec.at({}) for spec in decode_specs(entry.slots, _specs(entry)).values()]


def donation(
    weights: Sequence[Any], before: int, inputs: Sequence[Any], devices: Devices | None = None
) -> dict[str, Any]:
    """The options of `jax.jit` by which the cache is changed where it lies: it follows `before` other inputs.

    Args:
        weights: come first.
        before: number of inputs between them and the cache.
        inputs: all inputs, the cache included.
        devices: where it is to run, if that is not where JAX runs by itself.
    """
    count = len(weights) + len(inputs)
    options: dict[str, Any] = {"donate_argnums": tuple(range(len(weights) + before, count))}
    if devices is not None and not devices.is_usual:
        options["in_shardings"] = (devices.sharding(),) * count
    return options


def _named(cache: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    return {f"cache/{index}": spec for index, spec in enumerate(cache)}


def _specs(entry: GenerationEntry) -> list[TensorSpec]:
    return [TensorSpec(tensor.shape, tensor.dtype) for tensor in entry.cache]


class Stepper:
    """Runs the steps of a model. One thread at a time; the cache is in it.

    Args:
        entry: what the manifest says.
        prefills: length -> code, ascending.
        decode: code.
        runtime: has the weights, which may be replaced at any time, and the device.

    Attributes:
        slots, capacity, vocabulary, first_position, end_tokens: as of the entry.
        most_beams: largest number of beams; 1 for an artifact that does not say which axes are those of slots.
        longest_prompt: in tokens.
    """

    def __init__(
        self, entry: GenerationEntry, prefills: Mapping[int, _xla.Loaded], decode: _xla.Loaded, runtime: Runtime
    ) -> None:
        self.slots, self.capacity, self.vocabulary = entry.slots, entry.capacity, entry.vocabulary
        self.most_beams = entry.slots if entry.axes else 1
        self.first_position, self.end_tokens = entry.first_position, entry.end_tokens
        self.longest_prompt = min(max(prefills), entry.capacity)
        self._entry, self._runtime = entry, runtime
        self._codes = dict(prefills), decode
        device = runtime.devices.first

        def put(shape: Sequence[int]) -> _Put:
            return _xla.putter(shape, np.dtype(np.int32), device)

        self._lengths = tuple(prefills)
        self._prefills: dict[int, tuple[_Put, _Execute]] = {
            length: (put((1, length)), _xla.executor(code)) for length, code in prefills.items()
        }
        self._decode = _xla.executor(decode)
        self._put_one, self._put_slot, self._put_slots = put((1,)), put(()), put((entry.slots,))
        self._cache: list[jax.Array] | None = None

    @classmethod
    def of(
        cls, manifest: Manifest, bucket_sizes: BucketSizes, codes: Mapping[str, _xla.Loaded], runtime: Runtime
    ) -> Stepper:
        """The stepper of loaded code, which is found by its names."""
        assert manifest.generation is not None
        prefills = {sizes["length"]: codes[prefill_name(bucket_name(sizes))] for sizes in combinations(bucket_sizes)}
        return cls(manifest.generation, prefills, codes[DECODE], runtime)

    def sharing(self, runtime: Runtime) -> Stepper:
        """A stepper with the same code, other weights, and a cache of its own."""
        return Stepper(self._entry, *self._codes, runtime)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of all slots."""
        return sum(leaf_bytes(spec.at({}).shape, spec.dtype) for spec in _specs(self._entry))

    def reset(self) -> None:
        """Empty the cache, and give its memory back until it is needed."""
        self._cache = None

    def prefill(self, tokens: Sequence[int], slot: int) -> np.ndarray:
        """Read a prompt into a slot, whatever was there; give the logits of the next token, `[tokens]`.

        Raises:
            InputError: if the prompt is longer than the longest compiled length.
            ExecutionError: if the code fails; the cache is lost then, and `reset` is called for.
        """
        length = next_size(self._lengths, len(tokens))
        if length is None:
            raise InputError(f"the prompt has {len(tokens)} tokens; the longest compiled length is {self._lengths[-1]}")
        put, execute = self._prefills[length]
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(tokens)] = tokens
        where = np.array([len(tokens)], np.int32), np.array(slot, np.int32)
        inputs = [put(padded), self._put_one(where[0]), self._put_slot(where[1])]
        return self._run(execute, inputs)[0]

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """Read one token for each slot; give the logits of the next ones, `[slots, tokens]`.

        Raises:
            ExecutionError: if the code fails; the cache is lost then, and `reset` is called for.
        """
        arrays = np.array(tokens, np.int32), np.array(positions, np.int32)
        return self._run(self._decode, [self._put_slots(array) for array in arrays])

    def copy(self, sources: Mapping[int, int]) -> None:
        """Make slots copies of others. The cache goes through the host's memory.

        Args:
            sources: slot -> the one that it becomes a copy of, as that is before.
        """
        if self._cache is None:
            return
        targets, copied = list(sources), list(sources.values())
        after: list[jax.Array] = []
        for leaf, axis in zip(self._cache, self._entry.axes, strict=True):
            array = np.array(leaf)
            rows = np.moveaxis(array, axis, 0)
            rows[targets] = rows[copied]
            after.append(self._put(array))
        self._cache = after

    def _run(self, execute: _Execute, inputs: list[jax.Array]) -> np.ndarray:
        cache = self._cache if self._cache is not None else self._empty()
        self._cache = None  # it is donated
        try:
            logits, *self._cache = execute([*self._runtime.weights, *inputs, *cache])
            return np.asarray(logits)
        except _xla.ERROR as error:
            self._cache = None
            raise _xla.failed(error) from error

    def _empty(self) -> list[jax.Array]:
        # Nothing reads it: a prefill fills a slot whole, and what other slots compute meanwhile is thrown away.
        return [self._put(np.zeros(spec.at({}).shape, np.dtype(spec.dtype))) for spec in _specs(self._entry)]

    def _put(self, array: np.ndarray) -> jax.Array:
        """An array of the cache, which may be donated: it shares no memory with NumPy."""
        return jax.device_put(array, self._runtime.devices.first, may_alias=False)
