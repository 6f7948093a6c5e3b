"""Writes weights: each leaf in the encoding that measures smallest.

A large leaf that is not pruned is a zarr array of its own. All others share one zarr array of bytes, since zarr's
metadata alone takes more than a bias; its rows hold one kind of bytes each, which compress best by themselves. Arrays
are encoded in memory a chunk at a time, so every byte has its digest before it goes to a disk or an object store.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import tensorstore as ts

from lepton_xla.compiler import gaps
from lepton_xla.compiler.devices import MeshEntry, Spec, part_shape
from lepton_xla.compiler.elements import to_bytes, to_words, zarr_lacks
from lepton_xla.compiler.manifest import PACKED, Encoding, Piece, WeightLeaf
from lepton_xla.trees import leaf_bytes

CHUNK_BYTES = 4 << 20
# Smaller than a chunk, because decoding a part takes several times its size for a moment; the streams of a part, which
# may have four codes a byte, always fit a row of a chunk's size.
PART_BYTES = 512 << 10
# A leaf of up to this size is never worth half a kilobyte of zarr's metadata.
_TINY_BYTES = 8 << 10
_ZARR_BYTES = 450
_SAMPLE_BYTES = 256 << 10
# Bytes that a network of 100 MB/s brings while zstd makes one byte, and while one byte of gaps or codes is placed. An
# encoding must save more than that, or loading takes longer for it.
_ZSTD_COST, _GAPS_COST = 0.15, 0.35
# All weights of a model up to this size are decoded in some ten milliseconds, so there smaller is better than faster.
_SMALL_MODEL_BYTES = 4 << 20
_SMALL_MODEL_FACTOR = 0.1
# The largest stream of codes with which gaps are tried, of the bytes of the leaf.
_MOST_LEFT = 0.8
_FAST_LEVEL, _SMALL_LEVEL = 3, 19
SCRATCH = {"driver": "memory", "path": "leaf/"}


def write_all(
    leaves: Sequence[WeightLeaf],
    arrays: Sequence[Any],
    write: Callable[[str, bytes], None],
    mesh: MeshEntry | None = None,
    model_bytes: int | None = None,
) -> tuple[tuple[WeightLeaf, ...], tuple[int, ...]]:
    """Write all leaves of an artifact, each in its smallest encoding.

    Args:
        leaves: results of `describe`.
        arrays: their arrays, in the same order; they are copied to the host one at a time.
        write: `write(name, content)` writes a file.
        mesh: the mesh that cuts the leaves.
        model_bytes: of all weights of the model in memory, if these are not all; small models are packed tighter.

    Returns:
        The leaves with how and where they are stored, and the bytes used in each row of the packed array.
    """
    if model_bytes is None:
        model_bytes = sum(leaf_bytes(leaf.shape, leaf.dtype) for leaf in leaves)
    is_small = model_bytes <= _SMALL_MODEL_BYTES
    rows = _Rows()
    stored: list[WeightLeaf] = []
    for leaf, given in zip(leaves, arrays, strict=True):
        array = np.asarray(given)
        words = to_words(array)
        cut = bool(leaf.spec) and not leaf.packed  # needs an array of its own, so that parts can be read alone
        leaf = msgspec.structs.replace(leaf, encoding=_choose(words, is_small, cut=cut))
        if leaf.is_zarr:
            part = part_shape(leaf.shape, leaf.spec, mesh) if cut and mesh is not None else None
            for name, data in zarr_files(leaf, array, part):
                write(name, data)
        else:
            placed = tuple(rows.add(kind, data) for kind, data in _streams(words, leaf.encoding))
            leaf = msgspec.structs.replace(leaf, folder="", pieces=placed)
        stored.append(leaf)
    for name, data in rows.zarr_files(_SMALL_LEVEL if is_small else _FAST_LEVEL):
        write(name, data)
    return tuple(stored), rows.sizes


def stored_bytes(arrays: Mapping[str, Any], model_bytes: int | None = None) -> int:
    """Count the bytes of the files that `write_all` would write; nothing is written.

    Args:
        arrays: weights by path.
        model_bytes: as of `write_all`.

    >>> stored_bytes({"w": np.zeros((512, 64), np.float32)}) < 1000  # zeros compress well
    True
    """
    total = 0

    def count(_name: str, content: bytes) -> None:
        nonlocal total
        total += len(content)

    leaves = [describe(path, index, array) for index, (path, array) in enumerate(arrays.items())]
    write_all(leaves, [*arrays.values()], count, model_bytes=model_bytes)
    return total


def describe(path: str, index: int, array: Any, spec: Spec = ()) -> WeightLeaf:
    """Make the manifest's entry of a leaf; its folder is named after its path and a number, to be unique."""
    dtype = np.dtype(array.dtype).name
    readable = re.sub(r"[^A-Za-z0-9_-]+", ".", path).strip(".")[-100:]
    return WeightLeaf(
        path=path,
        shape=tuple(array.shape),
        dtype=dtype,
        packed=zarr_lacks(dtype),
        encoding="plain",
        spec=spec,
        folder=f"weights/{index:05d}-{readable}".rstrip("-."),
    )


def zarr_files(leaf: WeightLeaf, array: Any, part: Sequence[int] | None = None) -> Iterator[tuple[str, bytes]]:
    """Make the files of a leaf that is a zarr array of its own: `(name, content)`, one at a time.

    Args:
        leaf: the leaf.
        array: its array.
        part: the shape of the part that one device holds, if the leaf is cut; each chunk then belongs to one part.
    """
    stored = np.asarray(array)
    if leaf.packed:
        stored = to_bytes(stored)
    if part is not None:
        chunk = part_chunk(part, stored.dtype.itemsize)
    else:
        chunk = [max(size, 1) for size in chunk_shape(stored.shape, stored.dtype.itemsize)]
    level = _FAST_LEVEL if leaf.encoding == "zstd" else None
    parts = ((region, stored[region]) for region in _regions(stored.shape, chunk))
    yield from _zarr_files(leaf.folder, stored.shape, stored.dtype, chunk, level, parts)


def _zarr_files(
    folder: str,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    chunk: Sequence[int],
    level: int | None,
    parts: Iterable[tuple[tuple[slice, ...], np.ndarray]],
) -> Iterator[tuple[str, bytes]]:
    """Make the files of a zarr array, `(name, content)`, from its chunks; `level` is zstd's, None for no zstd."""
    metadata = {
        "data_type": dtype.name,
        "shape": list(shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "codecs": [*plain_codecs(dtype.itemsize), *([_zstd(level)] if level is not None else [])],
    }
    # A separate context, so that the scratch store is freed with it.
    context = ts.Context()
    handle = open_array(context, metadata=metadata, create=True)
    kv = ts.KvStore.open(SCRATCH, context=context).result()
    yield f"{folder}/zarr.json", kv.read("zarr.json").result().value
    for region, part in parts:
        handle[region].write(part).result()
        yield from _drain(kv, folder)


def _zstd(level: int) -> dict[str, Any]:
    return {"name": "zstd", "configuration": {"level": level}}


def chunk_shape(shape: Sequence[int], itemsize: int, limit_bytes: int = CHUNK_BYTES) -> tuple[int, ...]:
    """Choose the shape of contiguous chunks of at most `limit_bytes`, by splitting leading dimensions first.

    >>> chunk_shape((30522, 384), 4)
    (2544, 384)
    """
    sizes = list(shape)
    for axis, size in enumerate(sizes):
        size_bytes = int(np.prod(sizes, dtype=np.int64)) * itemsize
        if size_bytes <= limit_bytes:
            break
        # Nearly equal chunks, because zarr pads the last one.
        chunks = -(-size // max(1, size * limit_bytes // size_bytes))
        sizes[axis] = -(-size // chunks)
    return tuple(sizes)


def part_chunk(part: Sequence[int], itemsize: int, limit_bytes: int = CHUNK_BYTES) -> list[int]:
    """Shape of chunks of at most `limit_bytes` that divide a part of an array, so that each belongs to one part.

    >>> part_chunk((30522, 96), 4)
    [10174, 96]
    """
    sizes = list(part)
    for axis, size in enumerate(sizes):
        rest = math.prod(sizes) // max(size, 1) * itemsize
        sizes[axis] = max((n for n in range(1, size + 1) if size % n == 0 and n * rest <= limit_bytes), default=1)
    return [max(size, 1) for size in sizes]


def plain_codecs(itemsize: int) -> list[dict[str, Any]]:
    """Name zarr's codecs for uncompressed elements."""
    return [{"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}]


def open_array(context: ts.Context, **options: Any) -> ts.TensorStore:
    """Open or create the zarr array in a context's scratch store."""
    spec = {"driver": "zarr3", "kvstore": SCRATCH, "store_data_equal_to_fill_value": True}
    if "metadata" in options:
        spec["metadata"] = options.pop("metadata")
    return ts.open(spec, context=context, **options).result()


def part_regions(shape: Sequence[int], itemsize: int) -> list[tuple[slice, ...]]:
    """Cut an array of words into the parts that are placed in the packed array one by one, in order."""
    chunk = [max(size, 1) for size in chunk_shape(shape, itemsize, PART_BYTES)]
    return list(_regions(shape, chunk))


def _regions(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """List the part of an array that each chunk holds, in order."""
    parts = [
        [slice(start, min(start + part, size)) for start in range(0, size, part)]
        for size, part in zip(shape, chunk, strict=True)
    ]
    return itertools.product(*parts)


def _choose(words: np.ndarray, is_small: bool, *, cut: bool = False) -> Encoding:
    """Choose the encoding with the least cost of bytes and of time to decode; of a large leaf a part is measured.

    Args:
        words: the leaf.
        is_small: whether the whole model is small, so that bytes count for more than time.
        cut: whether devices read parts of the leaf, so that it needs a zarr array of its own.
    """
    whole, haste = words.nbytes, _SMALL_MODEL_FACTOR if is_small else 1.0
    if not whole:
        return "packed"
    if cut:
        return "zstd" if zstd_share(words) + haste * _ZSTD_COST < 1 else "plain"
    regions = part_regions(words.shape, words.itemsize)
    sample = words[regions[len(regions) // 2]]
    scale = whole / sample.nbytes
    costs: dict[Encoding, float]
    if whole <= _TINY_BYTES:
        costs = {"packed": _zstd_bytes(gaps.to_planes(sample), _SMALL_LEVEL) + haste * _ZSTD_COST * whole}
    else:
        costs = {"plain": whole + _ZARR_BYTES, "zstd": (zstd_share(words) + haste * _ZSTD_COST) * whole + _ZARR_BYTES}
    streams = gaps.to_streams(sample)
    if len(streams.codes) <= _MOST_LEFT * sample.nbytes:
        size = sum(_zstd_bytes(stream, _FAST_LEVEL) for stream in streams)
        costs["gaps"] = (size + haste * _GAPS_COST * sum(map(len, streams))) * scale
    return min(costs, key=lambda encoding: costs[encoding])


def zstd_share(words: np.ndarray) -> float:
    """Measure to what share of its bytes zstd compresses a leaf, on a part from its middle."""
    flat = words.reshape(-1)
    middle = max(0, (flat.size - _SAMPLE_BYTES // words.itemsize) // 2)
    sample = flat[middle : middle + _SAMPLE_BYTES // words.itemsize]
    return _zstd_bytes(sample.tobytes(), _FAST_LEVEL) / sample.nbytes


def _zstd_bytes(data: bytes, level: int) -> int:
    """Count the bytes that zstd compresses some data to."""
    array = np.frombuffer(data, np.uint8)
    if not array.size:
        return 0
    files = _zarr_files("", array.shape, array.dtype, array.shape, level, [((slice(None),), array)])
    return len(dict(files)["/c/0"])


def _streams(words: np.ndarray, encoding: Encoding) -> Iterator[tuple[str, bytes]]:
    """Make the streams of a leaf's parts in order, each with its kind."""
    for region in part_regions(words.shape, words.itemsize):
        if encoding == "gaps":
            yield from zip(("gaps", "codes"), gaps.to_streams(words[region]), strict=True)
        else:
            yield "planes", gaps.to_planes(words[region])


class _Rows:
    """The packed array: each row holds streams of one kind, one after the other."""

    def __init__(self) -> None:
        self._rows: list[bytearray] = []
        self._open: dict[str, int] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        """The bytes used in each row."""
        return tuple(map(len, self._rows))

    def add(self, kind: str, data: bytes) -> Piece:
        """Append a stream to the row of its kind, or to a new one if that row would grow beyond a chunk."""
        row = self._open.get(kind)
        if not data:
            return Piece(row=row or 0, start=0, size=0)
        if row is None or len(self._rows[row]) + len(data) > CHUNK_BYTES:
            row = self._open[kind] = len(self._rows)
            self._rows.append(bytearray())
        start = len(self._rows[row])
        self._rows[row] += data
        return Piece(row=row, start=start, size=len(data))

    def zarr_files(self, level: int) -> Iterator[tuple[str, bytes]]:
        """Make the files of the packed array: `(name, content)`, one chunk per row."""
        if not self._rows:
            return
        length = max(self.sizes)

        def parts() -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
            for index, row in enumerate(self._rows):
                yield (slice(index, index + 1), slice(0, len(row))), np.frombuffer(row, np.uint8)[None]

        yield from _zarr_files(PACKED, (len(self._rows), length), np.dtype(np.uint8), (1, length), level, parts())


def _drain(kv: ts.KvStore, folder: str) -> Iterator[tuple[str, bytes]]:
    """Move the chunks written so far out of the scratch store."""
    for key in kv.list().result():
        if key != b"zarr.json":
            yield f"{folder}/{key.decode()}", kv.read(key).result().value
            kv.write(key, None).result()
