"""Writes weights: each leaf with the smallest encoding, as a zarr array or as pieces of shared files.

Large leaves that are not pruned are zarr arrays in zarr's own layout. They are encoded in memory chunk by chunk, so
that the digest of every byte is known before it is written. The others are split into pieces that share files, because
zarr's metadata alone is larger than a bias.
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
from lepton_xla.trees import leaf_bytes

CHUNK_BYTES = 4 << 20
# Smaller than a chunk, because decoding a piece temporarily takes several times its size.
PIECE_BYTES = 1 << 20
_PACK_BYTES = 1 << 20
# For leaves up to this size, zarr's half kilobyte of metadata would dominate.
_RAW_BYTES = 8 << 10
_ZARR_BYTES = 450
_ZSTD_LEVEL = 3
_SAMPLE_BYTES = 256 << 10
# Bytes that a 100 MB/s network delivers in the time of decoding one byte of zstd, or one symbol of `entropy`. An
# encoding must save more than that, or it makes loading slower.
_ZSTD_COST, _SYMBOL_COST = 0.15, 0.35
# Models up to this size are decoded in about ten milliseconds, so only bytes matter.
_SMALL_MODEL_BYTES = 4 << 20
_SMALL_MODEL_FACTOR = 0.1
_ZSTD = {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL}}
SCRATCH = {"driver": "memory", "path": "leaf/"}


def write_all(
    leaves: Sequence[WeightLeaf], arrays: Sequence[Any], write: Callable[[str, bytes], None]
) -> tuple[WeightLeaf, ...]:
    """Write all leaves of an artifact, each with its smallest encoding.

    Args:
        leaves: results of `describe`.
        arrays: their arrays, in the same order; they are copied to the host one at a time.
        write: `write(name, content)` writes a file.

    Returns:
        The leaves with their encodings and locations.
    """
    is_small = sum(leaf_bytes(leaf.shape, leaf.dtype) for leaf in leaves) <= _SMALL_MODEL_BYTES
    haste = _SMALL_MODEL_FACTOR if is_small else 1.0
    packs = _Packs(write)
    stored: list[WeightLeaf] = []
    for leaf, given in zip(leaves, arrays, strict=True):
        array = np.asarray(given)
        words = to_words(array)
        leaf = msgspec.structs.replace(leaf, encoding=_choose(words, haste))
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
    """Make the manifest's entry of a leaf; its folder is named after its path and a number, to be unique."""
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
    """Encode a leaf as a zarr array; yields `(name, content)` of its files."""
    stored = np.asarray(array)
    if leaf.packed:
        stored = pack(stored)
    shape = [max(size, 1) for size in chunk_shape(stored.shape, stored.dtype.itemsize)]
    codecs = plain_codecs(stored.itemsize)
    if leaf.encoding == "zstd":
        codecs.append(_ZSTD)
    # Chunks of zeros are stored too, so that a missing chunk always means damage.
    metadata = {
        "data_type": stored.dtype.name,
        "shape": list(stored.shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "codecs": codecs,
    }
    # A separate context, so that the scratch store is freed with it.
    context = ts.Context()
    handle = open_array(context, metadata=metadata, create=True)
    kv = ts.KvStore.open(SCRATCH, context=context).result()
    yield f"{leaf.folder}/zarr.json", kv.read("zarr.json").result().value
    for region in _regions(stored.shape, shape):
        handle[region].write(stored[region]).result()
        yield from _drain(kv, leaf.folder)


def chunk_shape(shape: Sequence[int], itemsize: int, limit_bytes: int = CHUNK_BYTES) -> tuple[int, ...]:
    """Shape of contiguous chunks of at most `limit_bytes`: splits leading dimensions and keeps trailing ones whole.

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


def plain_codecs(itemsize: int) -> list[dict[str, Any]]:
    """zarr's codecs for uncompressed elements."""
    return [{"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}]


def open_array(context: ts.Context, **options: Any) -> ts.TensorStore:
    """Open or creates the zarr array in a context's scratch store."""
    spec = {"driver": "zarr3", "kvstore": SCRATCH, "store_data_equal_to_fill_value": True}
    if "metadata" in options:
        spec["metadata"] = options.pop("metadata")
    return ts.open(spec, context=context, **options).result()


def pieces(shape: Sequence[int], itemsize: int) -> list[tuple[slice, ...]]:
    """The parts of an array of words that become a piece each, in order."""
    chunk = [max(size, 1) for size in chunk_shape(shape, itemsize, PIECE_BYTES)]
    return list(_regions(shape, chunk))


def _regions(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The part of an array in each chunk, in order."""
    parts = [
        [slice(start, min(start + part, size)) for start in range(0, size, part)]
        for size, part in zip(shape, chunk, strict=True)
    ]
    return itertools.product(*parts)


def _choose(words: np.ndarray, haste: float) -> Encoding:
    """Choose the encoding with the lowest cost of bytes and decoding time, measured on a part of a large leaf.

    Args:
        words: the leaf.
        haste: weight of the decoding time.
    """
    whole, is_small = words.nbytes, words.nbytes <= _RAW_BYTES
    if not whole:
        return "raw"
    costs: dict[Encoding, float] = {"raw": whole} if is_small else {"plain": whole + _ZARR_BYTES}
    costs["zstd"] = (zstd_share(words) + haste * _ZSTD_COST) * whole + _ZARR_BYTES
    parts = pieces(words.shape, words.itemsize)
    sample = words[parts[len(parts) // 2]]
    scale = whole / sample.nbytes
    cost = lambda size, symbols: (size + haste * _SYMBOL_COST * symbols) * scale  # noqa: E731
    # Skip encodings that cannot win by their counts, except for biases of small models, whose exponents compress.
    if (is_small and haste < 1) or cost(*entropy.estimate(sample)) < min(costs.values()):
        for encoding in ("gaps", "deflate"):
            data, symbols = entropy.encode(sample, gaps=encoding == "gaps")
            costs[encoding] = cost(len(data), symbols)
    return min(costs, key=lambda encoding: costs[encoding])


def zstd_share(words: np.ndarray) -> float:
    """Compression ratio of zstd on a leaf, measured on a part from its middle."""
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
        yield part.tobytes() if encoding == "raw" else entropy.encode(part, gaps=encoding == "gaps").data


class _Packs:
    """Writes pieces into files, one file after the other."""

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
        """Write the last, partly filled file."""
        if self._content:
            self._write(Piece(pack=self._number, start=0, size=0).file, bytes(self._content))
            self._number += 1
            self._content = bytearray()


def _drain(kv: ts.KvStore, folder: str) -> Iterator[tuple[str, bytes]]:
    """Move the chunks written so far out of the scratch store."""
    for key in kv.list().result():
        if key != b"zarr.json":
            yield f"{folder}/{key.decode()}", kv.read(key).result().value
            kv.write(key, None).result()
