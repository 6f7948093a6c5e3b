"""Reading weights: each chunk is verified, then decoded in memory into its place in an array that XLA can use as it is.

A local folder and an object store take the same path, no byte is decoded whose digest was not checked, and no more than
a chunk or two a thread is held beside the arrays themselves.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
import tensorstore as ts

from lepton_xla.compiler.manifest import WeightLeaf
from lepton_xla.compiler.packing import packed_size, unpack
from lepton_xla.compiler.storage import VerifiedFiles
from lepton_xla.compiler.weights import SCRATCH, open_array, plain_codecs
from lepton_xla.errors import ArtifactError

# XLA:CPU reads a host array in place only where it starts on such a boundary.
_ALIGNMENT = 64


def read_all(leaves: Sequence[WeightLeaf], files: VerifiedFiles) -> list[np.ndarray]:
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
    plain: bool
    out: np.ndarray

    @classmethod
    def open(cls, leaf: WeightLeaf, files: VerifiedFiles) -> _OpenLeaf:
        name = f"{leaf.folder}/zarr.json"
        metadata = files.read(name)
        context = ts.Context()
        kv = ts.KvStore.open(SCRATCH, context=context).result()
        kv.write("zarr.json", metadata).result()
        try:
            handle = open_array(context, open=True)
            codecs = msgspec.json.decode(metadata)["codecs"]
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
        plain = codecs == plain_codecs(dtype.itemsize) and sys.byteorder == "little"
        return cls(leaf, files, kv, handle, plain, aligned_empty(shape, dtype))

    def chunks(self) -> list[tuple[int, ...]]:
        return list(np.ndindex(*_grid(self.out.shape, self._chunk_shape())))

    def read(self, index: tuple[int, ...]) -> None:
        """Verifies and decodes one chunk."""
        key = "/".join(("c", *map(str, index)))
        name = f"{self.leaf.folder}/{key}"
        data, chunk = self.files.read(name), self._chunk_shape()
        region = tuple(
            slice(i * n, min((i + 1) * n, size)) for i, n, size in zip(index, chunk, self.out.shape, strict=True)
        )
        try:
            if self.plain:
                # What zarr would decode to; a float model loads a third faster for not asking it.
                elements = np.frombuffer(data, self.out.dtype).reshape(chunk)
                self.out[region] = elements[tuple(slice(part.stop - part.start) for part in region)]
                return
            self.kv.write(key, data).result()
            ts.array(self.out[region]).write(self.handle[region]).result()
            self.kv.write(key, None).result()
        except Exception as error:  # TensorStore's own kinds
            raise ArtifactError(f"{name} cannot be decoded: {error}") from error

    def finish(self) -> np.ndarray:
        """The whole leaf, once every chunk is read."""
        return unpack(self.out, self.leaf.shape, self.leaf.dtype) if self.leaf.packed else self.out

    def _chunk_shape(self) -> tuple[int, ...]:
        return tuple(size or 1 for size in self.handle.chunk_layout.read_chunk.shape or ())


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialised array whose memory XLA:CPU can use without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _grid(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-size // part) for size, part in zip(shape, chunk, strict=True))
