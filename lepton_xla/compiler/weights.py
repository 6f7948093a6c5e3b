"""Writing weights: one zarr array a leaf, in zarr's own layout, encoded in memory a chunk at a time.

Encoding happens in a `memory://` store, so that every byte gets its digest before it goes to a disk or an object store.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from lepton_xla.compiler.manifest import WeightLeaf
from lepton_xla.compiler.packing import needs_packing, pack

CHUNK_BYTES = 4 << 20
_ZSTD_LEVEL = 3
_SAMPLE_BYTES = 256 << 10
_WORTHWHILE = 0.85
SCRATCH = {"driver": "memory", "path": "leaf/"}


def describe(path: str, index: int, array: Any) -> WeightLeaf:
    """The manifest's entry of a leaf; its folder is named after the path, and numbered so that no two can collide."""
    dtype = jnp.dtype(array.dtype).name
    readable = re.sub(r"[^A-Za-z0-9_-]+", ".", path).strip(".")[-100:]
    return WeightLeaf(
        path=path,
        shape=tuple(array.shape),
        dtype=dtype,
        packed=needs_packing(dtype),
        folder=f"weights/{index:05d}-{readable}".rstrip("-."),
    )


def encode(leaf: WeightLeaf, array: Any) -> Iterator[tuple[str, bytes]]:
    """The files of one leaf: `(name, content)`, one at a time."""
    stored = np.asarray(array)
    if leaf.packed:
        stored = pack(stored)
    shape = [max(size, 1) for size in chunk_shape(stored.shape, stored.dtype.itemsize)]
    # Every chunk is a file, also one of zeros: a chunk that is absent is then always damage.
    metadata = {
        "data_type": stored.dtype.name,
        "shape": list(stored.shape),
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "codecs": _codecs(stored),
    }
    # A context of its own: the scratch store is freed with it.
    context = ts.Context()
    handle = open_array(context, metadata=metadata, create=True)
    kv = ts.KvStore.open(SCRATCH, context=context).result()
    yield f"{leaf.folder}/zarr.json", kv.read("zarr.json").result().value
    for region in _regions(stored.shape, shape):
        handle[region].write(stored[region]).result()
        yield from _drain(kv, leaf.folder)


def chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """A chunk of at most 4 MiB: whole trailing dimensions, the first ones cut, so that a chunk is contiguous.

    >>> chunk_shape((30522, 384), 4)
    (2544, 384)
    """
    sizes = list(shape)
    for axis, size in enumerate(sizes):
        size_bytes = int(np.prod(sizes, dtype=np.int64)) * itemsize
        if size_bytes <= CHUNK_BYTES:
            break
        # Chunks of nearly equal size, because zarr fills the last one up.
        chunks = -(-size // max(1, size * CHUNK_BYTES // size_bytes))
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


def _codecs(stored: np.ndarray) -> list[dict[str, Any]]:
    """zstd where it pays: decoding it is most of a load's time, and float weights shrink by a tenth at best."""
    plain = plain_codecs(stored.itemsize)
    compressed = [*plain, {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL}}]
    flat = stored.reshape(-1)
    middle = max(0, (flat.size - _SAMPLE_BYTES // stored.itemsize) // 2)
    sample = flat[middle : middle + _SAMPLE_BYTES // stored.itemsize]
    if not sample.size:
        return plain
    context = ts.Context()
    metadata = {"data_type": sample.dtype.name, "shape": list(sample.shape), "codecs": compressed}
    open_array(context, metadata=metadata, create=True).write(sample).result()
    kv = ts.KvStore.open(SCRATCH, context=context).result()
    return compressed if len(kv.read("c/0").result().value) <= _WORTHWHILE * sample.nbytes else plain


def _regions(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    parts = [
        [slice(start, min(start + part, size)) for start in range(0, size, part)]
        for size, part in zip(shape, chunk, strict=True)
    ]
    return itertools.product(*parts)


def _drain(kv: ts.KvStore, folder: str) -> Iterator[tuple[str, bytes]]:
    """Moves the chunks written so far out of the scratch store."""
    for key in kv.list().result():
        if key != b"zarr.json":
            yield f"{folder}/{key.decode()}", kv.read(key).result().value
            kv.write(key, None).result()
