"""Weights on disk: one zarr array a leaf, in zarr's own layout, written and read through memory.

Encoding and decoding happen in a `memory://` store, so that every byte that is decoded has passed its digest first, a
local folder and an object store take the same path, and no more than a chunk a thread is held beside the array itself.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from lepton_xla.compiler.manifest import WeightLeaf
from lepton_xla.compiler.packing import needs_packing, pack, packed_size, unpack
from lepton_xla.compiler.storage import VerifiedFiles
from lepton_xla.errors import ArtifactError

CHUNK_BYTES = 4 << 20
# XLA:CPU reads a host array in place only where it starts on such a boundary.
_ALIGNMENT = 64
_ZSTD_LEVEL = 3
_SCRATCH = {"driver": "memory", "path": "leaf/"}


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
        "codecs": _codecs(stored.dtype),
    }
    # A context of its own: the scratch store is freed with it.
    context = ts.Context()
    handle = _open(context, metadata=metadata, create=True)
    kv = ts.KvStore.open(_SCRATCH, context=context).result()
    yield f"{leaf.folder}/zarr.json", kv.read("zarr.json").result().value
    for region in _regions(stored.shape, shape):
        handle[region].write(stored[region]).result()
        yield from _drain(kv, leaf.folder)


def decode_all(leaves: Sequence[WeightLeaf], files: VerifiedFiles) -> list[np.ndarray]:
    """Reads leaves into new arrays that start on a 64-byte boundary, in parallel over chunks.

    Raises:
        ArtifactError: naming the file that is missing, damaged, or not what the manifest says.
    """
    workers = min(8, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers, "lepton-weights") as pool:
        opened = list(pool.map(lambda leaf: _OpenLeaf.open(leaf, files), leaves))
        tasks = [pool.submit(leaf.read, index) for leaf in opened for index in leaf.chunks()]
        try:
            for task in concurrent.futures.as_completed(tasks):
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [leaf.finish() for leaf in opened]


@dataclasses.dataclass(frozen=True)
class _OpenLeaf:
    """A leaf being read: its verified zarr metadata, and the array its chunks go to."""

    leaf: WeightLeaf
    files: VerifiedFiles
    kv: ts.KvStore
    handle: ts.TensorStore
    out: np.ndarray

    @classmethod
    def open(cls, leaf: WeightLeaf, files: VerifiedFiles) -> _OpenLeaf:
        name = f"{leaf.folder}/zarr.json"
        context = ts.Context()
        kv = ts.KvStore.open(_SCRATCH, context=context).result()
        kv.write("zarr.json", files.read(name)).result()
        try:
            handle = _open(context, open=True)
        except Exception as error:  # TensorStore's own kinds
            raise ArtifactError(f"{name} is not valid zarr metadata: {error}") from error
        if leaf.packed:
            shape, dtype = (packed_size(leaf.shape, leaf.dtype),), np.dtype(np.uint8)
        else:
            shape, dtype = leaf.shape, jnp.dtype(leaf.dtype)
        if tuple(handle.shape) != shape or handle.dtype.numpy_dtype != dtype:
            raise ArtifactError(
                f"{name}: holds {handle.dtype.name}{list(handle.shape)}; the manifest says {dtype.name}{list(shape)}"
            )
        return cls(leaf, files, kv, handle, aligned_empty(shape, dtype))

    def chunks(self) -> list[tuple[int, ...]]:
        return list(np.ndindex(*_grid(self.out.shape, self._chunk_shape())))

    def read(self, index: tuple[int, ...]) -> None:
        """Verifies and decodes one chunk."""
        key = "/".join(("c", *map(str, index)))
        self.kv.write(key, self.files.read(f"{self.leaf.folder}/{key}")).result()
        shape = self._chunk_shape()
        region = tuple(
            slice(i * n, min((i + 1) * n, size)) for i, n, size in zip(index, shape, self.out.shape, strict=True)
        )
        try:
            self.out[region] = self.handle[region].read().result()
        except Exception as error:  # TensorStore's own kinds
            raise ArtifactError(f"{self.leaf.folder}/{key} cannot be decoded: {error}") from error
        self.kv.write(key, None).result()

    def finish(self) -> np.ndarray:
        """The whole leaf, once every chunk is read."""
        return unpack(self.out, self.leaf.shape, self.leaf.dtype) if self.leaf.packed else self.out

    def _chunk_shape(self) -> tuple[int, ...]:
        return tuple(self.handle.chunk_layout.read_chunk.shape or ())


def chunk_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """A chunk of at most 4 MiB: whole trailing dimensions, the first ones cut, so that a chunk is contiguous.

    >>> chunk_shape((30522, 384), 4)
    (2730, 384)
    """
    sizes = list(shape)
    for axis, size in enumerate(sizes):
        rest = int(np.prod(sizes, dtype=np.int64)) * itemsize
        if rest <= CHUNK_BYTES:
            break
        sizes[axis] = max(1, size * CHUNK_BYTES // rest)
    return tuple(sizes)


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialised array whose memory XLA:CPU can use without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _codecs(dtype: np.dtype) -> list[dict[str, Any]]:
    endian = {"name": "bytes", "configuration": {"endian": "little"}} if dtype.itemsize > 1 else {"name": "bytes"}
    return [endian, {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL}}]


def _grid(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-size // part) for size, part in zip(shape, chunk, strict=True))


def _regions(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    parts = [
        [slice(start, min(start + part, size)) for start in range(0, size, part)]
        for size, part in zip(shape, chunk, strict=True)
    ]
    return itertools.product(*parts)


def _open(context: ts.Context, **options: Any) -> ts.TensorStore:
    spec = {"driver": "zarr3", "kvstore": _SCRATCH, "store_data_equal_to_fill_value": True}
    if "metadata" in options:
        spec["metadata"] = options.pop("metadata")
    return ts.open(spec, context=context, **options).result()


def _drain(kv: ts.KvStore, folder: str) -> Iterator[tuple[str, bytes]]:
    """Moves the chunks written so far out of the scratch store."""
    for key in kv.list().result():
        if key != b"zarr.json":
            yield f"{folder}/{key.decode()}", kv.read(key).result().value
            kv.write(key, None).result()
