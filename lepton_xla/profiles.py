"""What a model's inputs and outputs look like: histograms of features of each row, made from known data.

`compile` stores the profile of the calibration data in the artifact. A server counts the rows that it answers into the
same bins and compares, so it notices that the data has drifted. Counts of several processes are added.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import numpy as np

from lepton_xla.errors import LeptonError

if TYPE_CHECKING:
    from jaxtyping import Float64, Shaped

# A tensor with at most this many elements a row has a feature for each of them.
_MOST_ELEMENTS = 16
_PROJECTIONS = 8
# Quantiles of the known data that cut a feature into bins of equal shares.
_BINS = 10
# Outputs with more classes have no feature for the class.
_MOST_CLASSES = 128
_MOST_FEATURES = 4096
# Values of integers, such as tokens, that are told apart; others count as one of these.
_VALUES = 1 << 12
# Elements that statistics are made of at a time: OpenBLAS uses one thread up to 2**18 multiplications.
_MOST_AT_ONCE = (1 << 18) // _PROJECTIONS
# Of a tensor with more elements a row, the statistics are of this many of them, evenly spaced.
_MOST_READ = 1 << 14


class Feature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The distribution of one number a row.

    Attributes:
        name: `image:mean` is the mean of the tensor `image`, `x[3]` an element, `image:projection 2` a fixed random
            direction, `output:class` the index of the largest output, `output:confidence` its probability. Of tokens,
            `tokens:projection 2` is the mean of one fixed random number for each.
        edges: ascending; bin i holds the values above edge i - 1 and up to edge i, one more bin those above the last.
            The last count is of values that are not finite.
        counts: of the known data, by bin.
    """

    name: str
    edges: tuple[float, ...]
    counts: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.edges) + 2:
            raise ValueError(f"feature {self.name!r} has {len(self.edges)} edges and {len(self.counts)} counts")
        if any(not low < high for low, high in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"the edges of feature {self.name!r} do not ascend")

    @property
    def tensor(self) -> str:
        """The tensor that it is of."""
        return tensor_of(self.name)


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, dict=True):
    """Distributions of all features of a model's inputs and outputs.

    Attributes:
        rows: number of rows that they were made from.
        logits: outputs that are logits; the values of other outputs that have a class are probabilities.
        padded: tensors whose rows vary in length and are padded with zeros, which no feature counts.
        features: by tensor, inputs first.

    >>> rows = np.float32([[0, 1], [2, 3], [4, 5]])
    >>> profile = profile_of({"x": rows}, {"output": rows})
    >>> profile.rows, [feature.name for feature in profile.features]
    (3, ['x[0]', 'x[1]', 'output:class', 'output:confidence'])
    """

    rows: Annotated[int, msgspec.Meta(ge=1)]
    logits: tuple[str, ...] = ()
    padded: tuple[str, ...] = ()
    features: Annotated[tuple[Feature, ...], msgspec.Meta(max_length=_MOST_FEATURES)]

    def __post_init__(self) -> None:
        if len({feature.name for feature in self.features}) != len(self.features):
            raise ValueError("two features of the profile have the same name")

    @functools.cached_property
    def bins(self) -> str:
        """Identifies what is counted, and into which bins: counts may be added and compared where it is the same."""
        edges = [(feature.name, feature.edges) for feature in self.features]
        return hashlib.sha256(msgspec.json.encode([self.logits, self.padded, edges])).hexdigest()[:16]


class _Kinds(NamedTuple):
    """How tensors are read; the attributes of a profile."""

    logits: tuple[str, ...]
    padded: tuple[str, ...]


def tensor_of(name: str) -> str:
    """The tensor of a feature.

    >>> tensor_of("image:projection 2"), tensor_of("x[3]")
    ('image', 'x')
    """
    head, colon, _ = name.rpartition(":")
    return head if colon else name.rpartition("[")[0]


def profile_of(
    inputs: Mapping[str, Shaped[np.ndarray, "rows ..."]],
    outputs: Mapping[str, Shaped[np.ndarray, "rows ..."]],
    padded: Sequence[str] = (),
) -> Profile:
    """The profile of known rows.

    Args:
        inputs: name -> array, rows first.
        outputs: what the model made of them.
        padded: names of those whose rows vary in length and are padded with zeros.

    Raises:
        LeptonError: without rows, or if tensors differ in their number.

    >>> x = np.float32(np.random.default_rng(0).normal(size=(100, 2)))
    >>> profile_of({"x": x}, {"y": x[:, :1]}).features[0].counts  # ten bins of equal shares; nothing is not finite
    (10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 0)
    """
    rows = {len(array) if array.ndim else -1 for array in (*inputs.values(), *outputs.values())}
    if len(rows) != 1 or min(rows) < 1:
        raise LeptonError(f"a profile needs tensors with the same number of rows, at least one, got {sorted(rows)}")
    logits = tuple(name for name, array in outputs.items() if _has_classes(array) and not _sums_to_one(array))
    kinds = _Kinds(logits, tuple(padded))
    features = tuple(_feature(name, found) for name, found in _features(inputs, outputs, kinds))
    return Profile(rows=rows.pop(), logits=logits, padded=kinds.padded, features=features[:_MOST_FEATURES])


class Sketch:
    """Counts rows into the bins of a profile.

    Args:
        profile: whose bins.

    >>> rows = np.float32([[0, 1], [2, 3], [4, 5]])
    >>> sketch = Sketch(profile_of({"x": rows}, {"output": rows}))
    >>> sketch.add({"x": rows + 10}, {"output": rows})
    >>> sketch.counts["x[0]"]
    [0, 0, 0, 0, 3, 0]
    """

    def __init__(self, profile: Profile) -> None:
        self._kinds = _Kinds(profile.logits, profile.padded)
        self._bins = {
            feature.name: (np.array(feature.edges), np.zeros(len(feature.counts), np.int64))
            for feature in profile.features
        }

    @property
    def counts(self) -> dict[str, list[int]]:
        """Feature -> rows by bin; the last bin has those that are not finite. Add those of several sketches."""
        return {name: counts.tolist() for name, (_, counts) in self._bins.items()}

    def add(
        self,
        inputs: Mapping[str, Shaped[np.ndarray, "rows ..."]],
        outputs: Mapping[str, Shaped[np.ndarray, "rows ..."]],
    ) -> None:
        """Counts rows. Tensors that the profile does not know are left out."""
        for name, values in _features(inputs, outputs, self._kinds):
            found = self._bins.get(name)
            if found is None:
                continue
            edges, counts = found
            bins = np.searchsorted(edges, values)
            finite = np.isfinite(values)
            if not finite.all():
                bins[~finite] = len(edges) + 1
            counts += np.bincount(bins, minlength=len(counts))


def _feature(name: str, values: Float64[np.ndarray, " rows"]) -> Feature:
    finite = values[np.isfinite(values)]
    distinct = np.unique(finite)
    few = len(distinct) <= _BINS or name.endswith(":class")
    # Of few values each has a bin of its own; what lies between two is counted to the upper one.
    edges = distinct if few else np.quantile(finite, np.arange(1, _BINS) / _BINS)
    if few and len(edges):
        # So that what is below all known values is told from the least of them.
        edges = np.concatenate([[np.nextafter(edges[0], -math.inf)], edges])
    edges = np.unique(edges[np.isfinite(edges)])  # between huge values there may be no quantile
    bins = np.bincount(np.searchsorted(edges, finite), minlength=len(edges) + 1)
    return Feature(name=name, edges=tuple(edges.tolist()), counts=(*bins.tolist(), len(values) - len(finite)))


def _features(
    inputs: Mapping[str, Shaped[np.ndarray, "rows ..."]],
    outputs: Mapping[str, Shaped[np.ndarray, "rows ..."]],
    kinds: _Kinds,
) -> Iterable[tuple[str, Float64[np.ndarray, " rows"]]]:
    """Name and values of each feature."""
    for name, array in inputs.items():
        yield from _statistics(name, array, padded=name in kinds.padded)
    for name, array in outputs.items():
        if name not in kinds.padded and _has_classes(array):
            yield from _classes(name, array, logits=name in kinds.logits)
        else:
            yield from _statistics(name, array, padded=name in kinds.padded)


def _statistics(
    name: str, array: Shaped[np.ndarray, "rows ..."], *, padded: bool
) -> Iterable[tuple[str, Float64[np.ndarray, " rows"]]]:
    sampled = _sampled(array)
    if sampled is None or not sampled.shape[1]:
        return
    if not padded and sampled.shape[1] > _MOST_ELEMENTS:
        yield from _summaries(name, sampled)
        return
    flat = sampled.astype(np.float64)
    if padded:
        used = (flat != 0).sum(axis=1)
        yield f"{name}:length", used.astype(np.float64)
        yield f"{name}:mean", flat.sum(axis=1) / np.maximum(used, 1)
        if np.issubdtype(sampled.dtype, np.integer):
            sums = _summed(sampled % _VALUES)
            yield from ((f"{name}:projection {index}", each / np.maximum(used, 1)) for index, each in enumerate(sums))
        return
    yield from ((f"{name}[{index}]", column) for index, column in enumerate(flat.T))


def _summaries(
    name: str, sampled: Shaped[np.ndarray, "rows elements"]
) -> Iterable[tuple[str, Float64[np.ndarray, " rows"]]]:
    # Rows that fit a processor's cache at a time, and that NumPy's BLAS multiplies on one thread: its others spin, and
    # on a machine that is busy the product of a server's rows took a hundred times as long.
    step = max(1, _MOST_AT_ONCE // sampled.shape[1])
    directions = _directions(sampled.shape[1])
    found = np.empty((2 + _PROJECTIONS, len(sampled)))
    for start in range(0, len(sampled), step):
        flat = sampled[start : start + step].astype(np.float64)
        part = found[:, start : start + step]
        part[0], part[2:] = flat.mean(axis=1), (flat @ directions).T
        flat -= part[0][:, None]
        part[1] = np.sqrt(np.einsum("ij,ij->i", flat, flat) / flat.shape[1])  # in place, where `std` takes copies
    kinds = ("mean", "deviation", *(f"projection {index}" for index in range(_PROJECTIONS)))
    yield from ((f"{name}:{kind}", values) for kind, values in zip(kinds, found, strict=True))


def _summed(values: Shaped[np.ndarray, "rows elements"]) -> Float64[np.ndarray, "projections rows"]:
    """The sums of the random numbers of the values of each row; zero has none."""
    numbers = _directions(_VALUES).copy()
    numbers[0] = 0
    step = max(1, _MOST_AT_ONCE // max(1, values.shape[1]))
    parts = [numbers[values[start : start + step]].sum(axis=1) for start in range(0, len(values), step)]
    return np.concatenate(parts).T if parts else np.empty((_PROJECTIONS, 0))


def _sampled(array: Shaped[np.ndarray, "rows ..."]) -> Shaped[np.ndarray, "rows elements"] | None:
    """Rows as vectors, of a sample of the elements if there are many; None for what has no order."""
    if array.dtype == object or np.issubdtype(array.dtype, np.complexfloating):
        return None
    flat = array.reshape(len(array), -1)
    if flat.shape[1] > _MOST_READ:
        flat = flat[:, :: -(-flat.shape[1] // _MOST_READ)]
    return flat


@functools.lru_cache(maxsize=64)
def _directions(elements: int) -> Float64[np.ndarray, "elements projections"]:
    """Fixed random directions of unit length: the same in every process."""
    drawn = np.random.default_rng(elements).normal(size=(elements, _PROJECTIONS))
    return drawn / np.linalg.norm(drawn, axis=0)


def _has_classes(array: Shaped[np.ndarray, "rows ..."]) -> bool:
    return array.ndim == 2 and array.shape[1] >= 2 and _is_float(array.dtype)


def _is_float(dtype: np.dtype[Any]) -> bool:
    # ml_dtypes' bfloat16 and float8 are no NumPy floats.
    return np.issubdtype(dtype, np.floating) or dtype.name.startswith(("bfloat", "float8"))


def _sums_to_one(array: Shaped[np.ndarray, "rows classes"]) -> bool:
    values = array.astype(np.float64)
    return bool((values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-2))


def _classes(
    name: str, array: Shaped[np.ndarray, "rows classes"], *, logits: bool
) -> Iterable[tuple[str, Float64[np.ndarray, " rows"]]]:
    values = array.astype(np.float64)
    top = values.argmax(axis=1)
    largest = values[np.arange(len(values)), top]
    confidence = largest
    if logits:
        with np.errstate(invalid="ignore", over="ignore"):
            confidence = 1 / np.exp(values - largest[:, None]).sum(axis=1)
    if values.shape[1] <= _MOST_CLASSES:
        # A row with a NaN has no largest output.
        yield f"{name}:class", np.where(np.isfinite(largest), top, np.nan)
    yield f"{name}:confidence", confidence
