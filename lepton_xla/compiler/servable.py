"""A loaded model: maps named arrays of any size to named arrays, on compiled code of fixed sizes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lepton_xla.certificates import Certificate
from lepton_xla.compiler import _xla
from lepton_xla.compiler.buckets import BucketSizes, next_size, pad
from lepton_xla.compiler.manifest import Manifest
from lepton_xla.compiler.runtime import Runner, Runtime
from lepton_xla.compiler.stepping import Stepper
from lepton_xla.conversion import Conversion, Converter
from lepton_xla.conversion.huggingface import HuggingFace
from lepton_xla.dtypes import is_integer
from lepton_xla.errors import InputError, ModelError
from lepton_xla.generation.engine import Engine
from lepton_xla.profiles import Profile
from lepton_xla.program import TensorSpec
from lepton_xla.rows import row_symbol

if TYPE_CHECKING:
    from jaxtyping import Shaped


class Servable:
    """A model ready to run; thread-safe.

    Attributes:
        name, version: the model's.
        inputs, outputs: name -> spec, in order.
        buckets: symbolic dimension -> the sizes that are loaded, ascending.
        row_symbol: the row dimension, along which batches may be joined and split; None if the model has none.
        route: `executables` if compiled code was loaded, `stablehlo` if it was compiled on loading, `shared` if it is
            that of another.
        manifest: the artifact's manifest.
        expander: the code that unpacks stored weights, if the artifact has such code.
        stepper: the steps of generation, if it generates.
        tokenizer: its tokenizer's JSON; empty without one.
        conversion: what it takes and gives instead of some inputs and outputs, if anything.
        converter: does that.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> servable = lx.compile(program, {"batch": (1, 8)}).servable()
    >>> servable(x=np.ones((3, 4), np.float32))["output"].shape  # padded to 8 rows, cut to 3
    (3, 4)
    >>> servable.run({"batch": 1}, [np.ones((1, 4), np.float32)])[0].shape, servable.weights_bytes
    ((1, 4), 64)
    """

    def __init__(
        self,
        manifest: Manifest,
        buckets: BucketSizes,
        runtime: Runtime,
        route: str,
        expander: _xla.Loaded | None = None,
        stepper: Stepper | None = None,
        tokenizer: bytes = b"",
        conversion: Conversion | None = None,
    ) -> None:
        self.name = manifest.name
        self.version = manifest.version
        self.inputs = manifest.input_specs()
        self.outputs = manifest.output_specs()
        self.buckets = {name: tuple(compiled_sizes) for name, compiled_sizes in buckets.items()}
        self.row_symbol = row_symbol(self.inputs)
        self.route = route
        self.manifest = manifest
        self.runtime = runtime
        self.expander = expander
        self.stepper = stepper
        self.tokenizer = tokenizer
        self.conversion = conversion
        self.converter = None
        if conversion is not None:
            self.converter = Converter(conversion, {name: spec.shape for name, spec in self.inputs.items()})
        self._making = threading.Lock()
        self._engine: Engine | None = None

    @property
    def generator(self) -> Engine:
        """Generates tokens: `generate(prompts, ...)` and `stream(prompt, ...)`.

        Raises:
            ModelError: if the model does not generate: it was not made by `Generator`.
            ArtifactError: if its tokenizer cannot be read.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> lx.compile(program, {"batch": (1,)}, name="plain").servable().generator
        Traceback (most recent call last):
        lepton_xla.errors.ModelError: 'plain' does not generate tokens: make it with lx.Generator
        """
        if self.stepper is None:
            raise ModelError(f"{self.name!r} does not generate tokens: make it with lx.Generator")
        with self._making:  # two would use one cache
            if self._engine is None:
                self._engine = Engine(self.stepper, HuggingFace(self.tokenizer) if self.tokenizer else None)
            return self._engine

    @property
    def profile(self) -> Profile | None:
        """What known inputs and outputs look like, if that was stored.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> lx.compile(program, {"batch": (1,)}).servable().profile is None
        True
        """
        return self.manifest.profile

    @property
    def certificate(self) -> Certificate | None:
        """What was found of the compressed model when it was made, if that was stored.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> lx.compile(program, {"batch": (1,)}).servable().certificate is None
        True
        """
        return self.manifest.certificate

    @property
    def device_count(self) -> int:
        """Number of devices that it runs on together.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> lx.compile(program, {"batch": (1,)}).servable().device_count
        1
        """
        return len(self.runtime.devices.all)

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights on one device."""
        total = sum(array.on_device_size_in_bytes() for array in self.runtime.weights)
        return total // len(self.runtime.devices.all)

    @property
    def nbytes(self) -> int:
        """Bytes of weights, compiled code and cache on one device; of the code an estimate, since XLA does not tell.

        Copies of weights that kernels pack when they first need them are counted from then on. Code that several loaded
        models run is in memory once, and each counts an equal part of it.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> servable = lx.compile(program, {"batch": (1,)}).servable()
        >>> servable.nbytes > servable.weights_bytes
        True
        """
        return self._own_bytes + self.runtime.code_bytes + self.runtime.packed_bytes

    @functools.cached_property
    def _own_bytes(self) -> int:
        # Kept, because the memory of a server is summed up again and again; new weights take what the old ones took.
        return self.weights_bytes + (self.stepper.cache_bytes if self.stepper is not None else 0)

    def run(
        self, sizes: Mapping[str, int], arrays: Sequence[Shaped[np.ndarray, "*_"]]
    ) -> list[Shaped[np.ndarray, "*_"]]:
        """Run one bucket without padding or splitting: the fast path.

        Args:
            sizes: the bucket, such as `{"batch": 8}`.
            arrays: one per input, in order, of exactly its dtype and shape at `sizes`. Do not write to them during the
                call.

        Returns:
            One read-only array per output, in order, of its shape at `sizes`.

        Raises:
            KeyError: where there is no such bucket.
            InputError: if an array does not have the bucket's shape and dtype.
        """
        return self.runtime.run(sizes, arrays)

    def runner(self, sizes: Mapping[str, int]) -> Runner:
        """Return `run` for one bucket, which saves the lookup: `runner(sizes)(arrays)`.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> run = lx.compile(program, {"batch": (1,)}).servable().runner({"batch": 1})
        >>> run([np.ones((1, 4), np.float32)])[0].shape
        (1, 4)
        """
        return self.runtime.runner(sizes)

    def bind(
        self, sizes: Mapping[str, int], arrays: Sequence[Shaped[np.ndarray, "*_"]]
    ) -> Callable[[], list[Shaped[np.ndarray, "*_"]]] | None:
        """Return a function that runs one bucket on what these arrays hold when it is called.

        It saves handing them over each time.

        Args:
            sizes: of each symbol, those of a bucket.
            arrays: of exactly the shapes and dtypes of the bucket, in the order of the inputs.

        Returns:
            The function, whose outputs are read-only and in order; None where the device does not read the arrays in
            place: only a CPU does, and only what starts on a 64-byte boundary.

        Raises:
            KeyError: if there is no such bucket.
            InputError: if an array has another shape or dtype.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> memory = np.zeros(64 + 16, np.uint8)
        >>> x = memory[-memory.ctypes.data % 64 :][:16].view(np.float32).reshape(1, 4)
        >>> run = lx.compile(program, {"batch": (1,)}).servable().bind({"batch": 1}, [x])
        >>> x[...] = 3
        >>> run()
        [array([[3., 3., 3., 3.]], dtype=float32)]
        """
        return self.runtime.bind(sizes, arrays)

    def __call__(self, /, **inputs: Any) -> dict[str, Shaped[np.ndarray, "*_"]]:
        """Run the model on named inputs: pads them to a bucket, splits larger batches, removes the padding.

        Args:
            **inputs: every input of the model: an array of its dtype, or nested lists of numbers. If it has a
                conversion, the texts, files or words that this takes, or what it would make of them.

        Returns:
            Outputs by name, names of classes in the place of their indices; a batch without rows gives outputs without
            rows.

        Raises:
            InputError: if a name is missing or unknown, a dtype, rank or size is wrong, sizes disagree between inputs,
                or a dimension other than the rows exceeds the largest bucket.
        """
        if self.converter is None:
            return self.compute(**inputs)
        return self.converter.named(self.compute(**self.converter(inputs)))

    def compute(self, /, **inputs: Any) -> dict[str, Shaped[np.ndarray, "*_"]]:
        """As a call, but of the compiled part alone: without what the host does before and after it.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> lx.compile(program, {"batch": (1,)}).servable().compute(x=np.ones((2, 4), np.float32))["output"].shape
        (2, 4)
        """
        arrays = self._arrays(inputs)
        sizes = self._sizes(arrays)
        padded_sizes = self._padded_sizes(sizes)
        if padded_sizes == sizes and 0 not in sizes.values():  # exactly a bucket: nothing to pad or split
            whole = [array if array.flags.c_contiguous else array.copy() for array in arrays]
            return dict(zip(self.outputs, (out.copy() for out in self.runtime.run(sizes, whole)), strict=True))
        rows = sizes[self.row_symbol] if self.row_symbol is not None else 1
        results = [np.empty(spec.shape_at(sizes), np.dtype(spec.dtype)) for spec in self.outputs.values()]
        if 0 in sizes.values():
            return dict(zip(self.outputs, (np.zeros_like(result) for result in results), strict=True))
        start = 0
        while start < rows:
            count = 1
            if self.row_symbol is not None:
                compiled_sizes = self.buckets[self.row_symbol]
                count = min(rows - start, compiled_sizes[-1])
                padded_sizes[self.row_symbol] = next_size(compiled_sizes, count) or compiled_sizes[-1]
            self._run_part(arrays, results, start, count, padded_sizes)
            start += count
        return dict(zip(self.outputs, results, strict=True))

    def _run_part(
        self, arrays: Sequence[np.ndarray], results: Sequence[np.ndarray], start: int, count: int, sizes: dict[str, int]
    ) -> None:
        part: list[np.ndarray] = []
        for array, spec in zip(arrays, self.inputs.values(), strict=True):
            if self.row_symbol is not None and self.row_symbol in spec.symbols:
                array = array[start : start + count]
            part.append(np.asarray(pad(array, spec.shape_at(sizes)), order="C"))
        for result, output in zip(results, self.runtime.run(sizes, part), strict=True):
            if self.row_symbol is not None:
                result = result[start : start + count]
            result[...] = output[tuple(slice(size) for size in result.shape)]

    def _arrays(self, inputs: Mapping[str, Any]) -> list[np.ndarray]:
        for name in inputs:
            if name not in self.inputs:
                raise InputError(f"unknown input {name!r}; the model takes {', '.join(map(repr, self.inputs))}")
        arrays: list[np.ndarray] = []
        for name, spec in self.inputs.items():
            if name not in inputs:
                raise InputError(f"input {name!r} is missing; the model takes it as {spec}")
            arrays.append(_as_array(name, spec, inputs[name]))
        return arrays

    def _sizes(self, arrays: Sequence[np.ndarray]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        first: dict[str, str] = {}
        for (name, spec), array in zip(self.inputs.items(), arrays, strict=True):
            if array.ndim != len(spec.shape):
                raise InputError(f"input {name!r} has {array.ndim} dimensions, shape {array.shape}; expected {spec}")
            for axis, (dim, size) in enumerate(zip(spec.shape, array.shape, strict=True)):
                if isinstance(dim, int):
                    if size != dim:
                        raise InputError(
                            f"input {name!r}: dimension {axis} is {size}, expected {dim}: got shape {array.shape}, the "
                            f"model takes {spec}"
                        )
                elif sizes.setdefault(dim, size) != size:
                    raise InputError(
                        f"input {name!r}: dimension {axis} ({dim}) is {size}, but it is {sizes[dim]} in input "
                        f"{first[dim]!r}; {dim} must be the same everywhere"
                    )
                else:
                    first.setdefault(dim, name)
        return sizes

    def _padded_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        padded: dict[str, int] = {}
        for name, compiled_sizes in self.buckets.items():
            size = next_size(compiled_sizes, sizes[name])
            if size is None and name != self.row_symbol:
                raise InputError(
                    f"dimension {name!r} is {sizes[name]}, larger than the largest compiled size {compiled_sizes[-1]}; "
                    "shorten the input, or compile with a larger bucket"
                )
            padded[name] = compiled_sizes[-1] if size is None else size
        return padded


def _as_array(name: str, spec: TensorSpec, value: Any) -> np.ndarray:
    """Returns an array of exactly the input's dtype; lists of numbers are converted if no value changes."""
    dtype = np.dtype(spec.dtype)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        array = np.asarray(value)
        if array.dtype != dtype:
            raise InputError(
                f"input {name!r} has dtype {array.dtype}, expected {dtype}; cast it with .astype({str(dtype)!r})"
            )
        return array
    try:
        array = np.asarray(value)
        if array.dtype == object or array.dtype.kind in "USOMm":
            raise InputError(f"input {name!r} holds {array.dtype} values, expected {spec}")
        if array.dtype.kind == "c" and dtype.kind != "c":
            raise InputError(f"input {name!r} holds complex values, expected {spec}")
        with np.errstate(invalid="ignore", over="ignore"):
            converted = array.astype(dtype)
    except (TypeError, ValueError) as error:
        raise InputError(f"input {name!r} cannot be made an array, expected {spec}: {error}") from error
    discrete = dtype == np.dtype(bool) or is_integer(dtype)
    if array.size and discrete and not (converted.astype(array.dtype) == array).all():
        raise InputError(f"input {name!r} holds values that {dtype} cannot represent; the model takes {spec}")
    return converted
