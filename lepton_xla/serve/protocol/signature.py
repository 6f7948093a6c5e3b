"""What is served: the model a server needs, and its inputs and outputs as the wire sees them."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lepton_xla.conversion import Converter
from lepton_xla.errors import ServeError
from lepton_xla.serve.protocol.datatypes import DATATYPES, Datatype, datatype_of

if TYPE_CHECKING:
    from jaxtyping import Shaped

_SEPARATORS = frozenset("/\\")


class Spec(Protocol):
    """Shape and dtype of an input or output."""

    @property
    def shape(self) -> tuple[int | str, ...]: ...
    @property
    def dtype(self) -> str: ...


class LoadedModel(Protocol):
    """A loaded model with one executable for each combination of bucket sizes.

    >>> class Double:
    ...     name, version, buckets = "double", "1", {"batch": (1, 8)}
    ...     inputs = outputs = {"x": lx.TensorSpec(("batch", 4), "float32")}
    ...     def run(self, sizes, arrays):
    ...         return [2 * arrays[0]]
    >>> signature_of(Double()).bucket_sizes
    (1, 8)
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def inputs(self) -> Mapping[str, Spec]: ...
    @property
    def outputs(self) -> Mapping[str, Spec]: ...
    @property
    def buckets(self) -> Mapping[str, tuple[int, ...]]: ...

    def run(
        self, sizes: Mapping[str, int], arrays: Sequence[Shaped[np.ndarray, "*_"]]
    ) -> Sequence[Shaped[np.ndarray, "*_"]]:
        """Run the executable of these sizes on inputs of exactly that shape, in order; gives the outputs in order."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output: its name, datatype and shape, where a name in the shape is a dimension that varies.

    Attributes:
        name, datatype, shape: of what the model computes with.
        labels: names that are sent in the place of the elements, which are indices; empty if these are sent.
    """

    name: str
    datatype: Datatype
    shape: tuple[int | str, ...]
    labels: tuple[str, ...] = ()

    @property
    def sent(self) -> Datatype:
        """The datatype on the wire."""
        return DATATYPES["BYTES"] if self.labels else self.datatype

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of its elements."""
        assert self.datatype.dtype is not None
        return self.datatype.dtype

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape at these sizes of its symbolic dimensions."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.shape)

    def row_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of one index of the leading dimension."""
        return math.prod(self.at(sizes)[1:]) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Signature:
    """The inputs, outputs and compiled sizes of a model, checked once so that requests can be checked fast.

    Attributes:
        name: model name, as in the URL.
        version: model version, as in the URL.
        inputs: in the order the executable takes them.
        outputs: in the order the executable gives them.
        batch: the symbol that leads every input and output, whose rows of different requests may share a run; None
            where there is none, and then every request runs alone.
        bucket_sizes: compiled sizes of `batch`, ascending; `(1,)` where `batch` is None.
        others: the other symbols, padded up to their next compiled size within a request.
        buckets: symbol -> compiled sizes, ascending.
        converter: makes some of the inputs of what clients send instead; None if they send all themselves.
    """

    name: str
    version: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    batch: str | None
    bucket_sizes: tuple[int, ...]
    others: tuple[str, ...]
    buckets: dict[str, tuple[int, ...]]
    converter: Converter | None = dataclasses.field(default=None, compare=False)

    @property
    def sent(self) -> tuple[Tensor, ...]:
        """The inputs as clients send them: BYTES in the place of those that are made of these."""
        if self.converter is None:
            return self.inputs
        conversion, found = self.converter.conversion, dict[str, Tensor]()
        for tensor in self.inputs:
            raw = conversion.made.get(tensor.name)
            if raw is not None:
                tensor = Tensor(raw, DATATYPES["BYTES"], self.converter.shape_of(raw))
            found[tensor.name] = tensor
        return tuple(found.values())

    def fit(self, symbol: str, size: int) -> int | None:
        """The smallest compiled size of `symbol` that holds `size`, or None."""
        sizes = self.buckets[symbol]
        index = bisect.bisect_left(sizes, size)
        return sizes[index] if index < len(sizes) else None

    def shape_keys(self) -> Iterator[tuple[int, ...]]:
        """Every combination of compiled sizes of the other symbols."""
        return itertools.product(*(self.buckets[symbol] for symbol in self.others))

    def sizes(self, rows: int, key: Sequence[int]) -> dict[str, int]:
        """The size of every symbol, for a batch of `rows` and the sizes `key` of the others."""
        sizes = dict(zip(self.others, key, strict=True))
        if self.batch is not None:
            sizes[self.batch] = rows
        return sizes


def signature_of(model: LoadedModel, name: str | None = None, version: str | None = None) -> Signature:
    """The signature of a model.

    Args:
        model: the model, or what describes one that runs elsewhere.
        name: what to call it on the wire, if not its own name.
        version: its version there, if not its own.

    Raises:
        ServeError: for a name that cannot be part of a URL, a dtype the protocol cannot carry, or a symbolic
            dimension without compiled sizes.
    """
    name = model.name if name is None else name
    version = model.version if version is None else version
    for what, value in (("model name", name), ("model version", version)):
        if not is_safe(value):
            raise ServeError(f"{what} {value!r} cannot be part of a URL: no separators, blanks at the ends or controls")
    if name == "stats":
        raise ServeError("a model cannot be called 'stats': /v2/models/stats is the statistics route")
    inputs = tuple(Tensor(key, datatype_of(spec.dtype), spec.shape) for key, spec in model.inputs.items())
    converter: Converter | None = getattr(model, "converter", None)
    labels = {} if converter is None else converter.conversion.outputs
    outputs = tuple(
        Tensor(key, datatype_of(spec.dtype), spec.shape, labels[key].names if key in labels else ())
        for key, spec in model.outputs.items()
    )
    symbols = tuple(dict.fromkeys(dim for tensor in inputs for dim in tensor.shape if isinstance(dim, str)))
    buckets = {symbol: tuple(sizes) for symbol, sizes in model.buckets.items() if symbol in symbols}
    for symbol in symbols:
        sizes = buckets.get(symbol, ())
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
            raise ServeError(f"dimension {symbol!r} needs ascending compiled sizes, got {sizes}")
    batch = _batch_symbol(inputs, outputs)
    return Signature(
        name=name,
        version=version,
        inputs=inputs,
        outputs=outputs,
        batch=batch,
        bucket_sizes=(1,) if batch is None else buckets[batch],
        others=tuple(symbol for symbol in symbols if symbol != batch),
        buckets=buckets,
        converter=converter,
    )


def _batch_symbol(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str | None:
    leading = {tensor.shape[0] if tensor.shape else None for tensor in (*inputs, *outputs)}
    inner = {dim for tensor in (*inputs, *outputs) for dim in tensor.shape[1:]}
    only = leading.pop() if len(leading) == 1 else None
    return only if isinstance(only, str) and only not in inner else None


def is_safe(name: str) -> bool:
    """Tell whether a name may appear in a URL, a log line and a metric label.

    >>> is_safe("digits-v2"), is_safe("a/b"), is_safe("..")
    (True, False, False)
    """
    return (
        0 < len(name) <= 255
        and name == name.strip()
        and name not in (".", "..")
        and name.isprintable()
        and not _SEPARATORS & set(name)
    )
