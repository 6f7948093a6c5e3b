"""Writing weights: each leaf by the encoding that measures smallest, as a zarr array or as pieces of shared files.

Large leaves that are not pruned are zarr arrays in zarr's own layout, encoded in memory a chunk at a time, so that
every byte gets its digest before it goes to a disk or an object store. The others are cut into pieces, which fill files
one after the other: zarr's metadata alone takes more than a bias.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
import tensorstore as ts

from lepton_xla.compiler import entropy
from lepton_xla.compiler.manifest import Encoding, Piece, WeightLeaf
from lepton_xla.compiler.packing import needs_packing, pack, to_words
from lepton_xla.program import leaf_bytes

CHUNK_BYTES = 4 << 20
# Smaller than a chunk, because a piece that is decoded takes several times its size for a moment.
PIECE_BYTES = 1 << 20
_PACK_BYTES = 4 << 20
# Up to this size, a leaf is mostly the half kilobyte of zarr's metadata that it does without.
_RAW_BYTES = 8 << 10
_ZARR_BYTES = 450
_ZSTD_LEVEL = 3
_SAMPLE_BYTES = 256 << 10
# What decoding must leave of a leaf to be worth its time. A model of this size is decoded in ten milliseconds.
_SMALL_MODEL_BYTES = 4 << 20
_WORTHWHILE, _WORTHWHILE_SMALL = 0.85, 0.97
# zstd where it is nearly the smallest, for it is what other tools read.
_NEARLY = 1.05
_ZSTD = {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL}}
SCRATCH = {"driver": "memory", "path": "leaf/"}


def write_all(
    leaves: Sequence[WeightLeaf], arrays: Sequence[Any], write: Callable[[str, bytes], None]
) -> tuple[WeightLeaf, ...]:
    """Writes all leaves of an artifact, each as it is smallest.

    Args:
        leaves: as `describe` gives them.
        arrays: their arrays, in the same order; one at a time is brought to the host.
        write: `write(name, content)` of a file.

    Returns:
        The leaves with how and where they are stored.
    """
    small_model = sum(leaf_bytes(leaf.shape, leaf.dtype) for leaf in leaves) <= _SMALL_MODEL_BYTES
    packs = _Packs(write)
    stored: list[WeightLeaf] = []
    for leaf, given in zip(leaves, arrays, strict=True):
        array = np.asarray(given)
        words = to_words(array)
        leaf = msgspec.structs.replace(leaf, encoding=_choose(array, words, small_model=small_model))
        if leaf.is_zarr:
            for name, data in encode(leaf, array):
                write(name, data)
        else:
            placed = tuple(packs.add(data) for data in _encode_pieces(words, leaf.encoding))
            leaf = msgspec.structs.replace(leaf, folder="", pieces=placed)
        stored.append(leaf)
    packs.close()
    return tuple(stored)


def describe(path: str, index: int, array: Any) -> WeightLeaf:
    """The manifest's entry of a leaf; its folder is named after the path, and numbered so that no two can collide."""
    dtype = jnp.dtype(array.dtype).name
    readable = re.sub(r"[^A-Za-z0-9_-]+", ".", path).strip(".")[-100:]
    return WeightLeaf(
        path=path,
        shape=tuple(array.shape),
        dtype=dtype,
        packed=needs_packing(dtype),
        encoding="plain",
        folder=f"weights/{index:05d}-{readable}".rstrip("-."),
    )


def encode(leaf: WeightLeaf, array: Any) -> Iterator[tuple[str, bytes]]:
    """The files of a leaf that is a zarr array: `(name, content)`, one at a time."""
    stored = np.asarray(array)
    if leaf.packed:
        stored = pack(stored)
    shape = [max(size, 1) for size in chunk_shape(stored.shape, stored.dtype.itemsize)]
    codecs = plain_codecs(stored.itemsize)
    if leaf.encoding == "zstd":
        codecs.append(_ZSTD)
    # Every chunk is a file, also one of zeros: a chunk that is absent is then always damage.
    metadata = {
        "data_type": stored.dtype.name,
        "shape": list(stored.shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "codecs": codecs,
    }
    # A context of its own: the scratch store is freed with it.
    context = ts.Context()
    handle = open_array(context, metadata=metadata, create=True)
    kv = ts.KvStore.open(SCRATCH, context=context).result()
    yield f"{leaf.folder}/zarr.json", kv.read("zarr.json").result().value
    for region in _regions(stored.shape, shape):
        handle[region].write(stored[region]).result()
        yield from _drain(kv, leaf.folder)


def chunk_shape(shape: Sequence[int], itemsize: int, limit_bytes: int = CHUNK_BYTES) -> tuple[int, ...]:
    """A chunk of at most so many bytes: whole trailing dimensions, the first ones cut, so that a chunk is contiguous.

    >>> chunk_shape((30522, 384), 4)
    (2544, 384)
    """
    sizes = list(shape)
    for axis, size in enumerate(sizes):
        size_bytes = int(np.prod(sizes, dtype=np.int64)) * itemsize
        if size_bytes <= limit_bytes:
            break
        # Chunks of nearly equal size, because zarr fills the last one up.
        chunks = -(-size // max(1, size * limit_bytes // size_bytes))
        sizes[axis] = -(-size // chunks)
    return tuple(sizes)


def plain_codecs(itemsize: int) -> list[dict[str, Any]]:
    """zarr's codecs for elements as they are in memory."""
    return [{"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}]


def open_array(context: ts.Context, **options: Any) -> ts.TensorStore:
    """Opens or creates the zarr array in a context's scratch store."""
    spec = {"driver": "zarr3", "kvstore": SCRATCH, "store_data_equal_to_fill_value": True}
    if "metadata" in options:
        spec["metadata"] = options.pop("metadata")
    return ts.open(spec, context=context, **options).result()


def pieces(shape: Sequence[int], itemsize: int) -> list[tuple[slice, ...]]:
    """The parts of an array of words that are stored as a piece each, in order."""
    chunk = [max(size, 1) for size in chunk_shape(shape, itemsize, PIECE_BYTES)]
    return list(_regions(shape, chunk))


def _regions(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The parts of an array that its chunks hold, in order."""
    parts = [
        [slice(start, min(start + part, size)) for start in range(0, size, part)]
        for size, part in zip(shape, chunk, strict=True)
    ]
    return itertools.product(*parts)


def _choose(array: np.ndarray, words: np.ndarray, *, small_model: bool) -> Encoding:
    """The encoding that measures smallest on the leaf, or on a part from its middle where it is large.

    One that has to be decoded must be worth it: reading float weights that zstd shrinks by a tenth took twice as long.
    """
    whole, is_small = words.nbytes, words.nbytes <= _RAW_BYTES
    if not whole:
        return "raw"
    limit = (_WORTHWHILE_SMALL if small_model else _WORTHWHILE) * whole
    sizes: dict[Encoding, float] = {"zstd": _zstd_share(words) * whole + _ZARR_BYTES}
    parts = pieces(words.shape, words.itemsize)
    sample = words[parts[len(parts) // 2]]
    scale = whole / sample.nbytes
    if (is_small and small_model) or entropy.estimate(sample) * scale <= limit:
        sizes["gaps"] = len(entropy.encode(sample, gaps=True)) * scale
        sizes["deflate"] = len(entropy.encode(sample, gaps=False)) * scale
    smallest = min(sizes, key=lambda encoding: sizes[encoding])
    if sizes[smallest] > limit:
        return "raw" if is_small else "plain"
    return "zstd" if sizes["zstd"] <= _NEARLY * sizes[smallest] else smallest


def _zstd_share(words: np.ndarray) -> float:
    """What zstd leaves of a leaf, measured on a part from its middle."""
    flat = words.reshape(-1)
    middle = max(0, (flat.size - _SAMPLE_BYTES // words.itemsize) // 2)
    sample = flat[middle : middle + _SAMPLE_BYTES // words.itemsize]
    context = ts.Context()
    codecs = [*plain_codecs(sample.itemsize), _ZSTD]
    metadata = {"data_type": sample.dtype.name, "shape": list(sample.shape), "codecs": codecs}
    open_array(context, metadata=metadata, create=True).write(sample).result()
    kv = ts.KvStore.open(SCRATCH, context=context).result()
    return len(kv.read("c/0").result().value) / sample.nbytes


def _encode_pieces(words: np.ndarray, encoding: Encoding) -> Iterator[bytes]:
    for region in pieces(words.shape, words.itemsize):
        part = words[region]
        yield part.tobytes() if encoding == "raw" else entropy.encode(part, gaps=encoding == "gaps")


class _Packs:
    """Files that pieces fill one after the other."""

    def __init__(self, write: Callable[[str, bytes], None]) -> None:
        self._write = write
        self._number = 0
        self._content = bytearray()

    def add(self, data: bytes) -> Piece:
        if self._content and len(self._content) + len(data) > _PACK_BYTES:
            self.close()
        piece = Piece(pack=self._number, start=len(self._content), size=len(data))
        self._content += data
        return piece

    def close(self) -> None:
        """Writes the file that is not full."""
        if self._content:
            self._write(Piece(pack=self._number, start=0, size=0).file, bytes(self._content))
            self._number += 1
            self._content = bytearray()


def _drain(kv: ts.KvStore, folder: str) -> Iterator[tuple[str, bytes]]:
    """Moves the chunks written so far out of the scratch store."""
    for key in kv.list().result():
        if key != b"zarr.json":
            yield f"{folder}/{key.decode()}", kv.read(key).result().value
            kv.write(key, None).result()
