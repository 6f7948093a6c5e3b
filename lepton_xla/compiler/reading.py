"""Reads weights: each file is verified, then decoded in memory into arrays that XLA can use without a copy.

Local folders and object stores take the same path. No byte is decoded before its digest is checked. Besides the arrays,
each thread holds at most two files of about 4 MiB.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
import tensorstore as ts

from lepton_xla.compiler import entropy
from lepton_xla.compiler.manifest import Piece, WeightLeaf
from lepton_xla.compiler.packing import from_words, packed_size, unpack, words_of
from lepton_xla.compiler.storage import VerifiedFiles
from lepton_xla.compiler.weights import SCRATCH, open_array, pieces, plain_codecs
from lepton_xla.errors import ArtifactError
from lepton_xla.trees import leaf_bytes

# XLA:CPU uses a host array in place only if it starts on such a boundary.
_ALIGNMENT = 64


def read_all(leaves: Sequence[WeightLeaf], files: VerifiedFiles) -> list[np.ndarray]:
    """Read leaves into new arrays that start on a 64-byte boundary, in parallel over files.

    Raises:
        ArtifactError: if a file is missing, damaged, or not what the manifest says; names the file, and the leaf if the
            file holds several.
    """
    _check_memory(leaves)
    workers = min(8, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers, "lepton-weights") as pool:
        opened = list(pool.map(lambda leaf: _open(leaf, files), leaves))
        arrays = [leaf for leaf in opened if isinstance(leaf, _ZarrLeaf)]
        packed = [leaf for leaf in opened if isinstance(leaf, _PackedLeaf)]
        tasks = [pool.submit(leaf.read, index) for leaf in arrays for index in leaf.chunks()]
        tasks += [pool.submit(_read_pack, name, parts, files) for name, parts in _by_pack(packed).items()]
        try:
            for task in concurrent.futures.as_completed(tasks):
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            task = None  # break the cycle: the task's error has a traceback with this frame, and so with the weights
            tasks.clear()
    return [leaf.finish() for leaf in opened]


def _check_memory(leaves: Sequence[WeightLeaf]) -> None:
    """Check that the declared sizes fit into memory before allocating: a few bytes can encode any number of zeros."""
    declared = sum(leaf_bytes(leaf.shape, leaf.dtype) for leaf in leaves)
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if declared > present:
        raise ArtifactError(f"the weights take {declared} bytes, and this machine has {present} bytes of memory")


def _open(leaf: WeightLeaf, files: VerifiedFiles) -> _ZarrLeaf | _PackedLeaf:
    return _ZarrLeaf.open(leaf, files) if leaf.is_zarr else _PackedLeaf.open(leaf)


@dataclasses.dataclass(frozen=True)
class _PackedLeaf:
    """A leaf that is read from pieces of shared files: the array of its words, and the part for each piece."""

    leaf: WeightLeaf
    out: np.ndarray
    parts: tuple[np.ndarray, ...]

    @classmethod
    def open(cls, leaf: WeightLeaf) -> _PackedLeaf:
        shape, word = words_of(leaf.shape, leaf.dtype)
        out = aligned_empty(shape, word)
        regions = pieces(shape, word.itemsize)
        if len(leaf.pieces) != len(regions):
            what = f"{leaf.dtype}{list(leaf.shape)}"
            raise ArtifactError(f"weight {leaf.path!r}: {len(leaf.pieces)} pieces; {what} has {len(regions)}")
        return cls(leaf, out, tuple(out[region] for region in regions))

    def read(self, data: memoryview, part: np.ndarray) -> None:
        """Decode one piece."""
        if self.leaf.encoding != "raw":
            entropy.decode(data, part, gaps=self.leaf.encoding == "gaps")
        elif len(data) != part.nbytes:
            raise ArtifactError(f"{len(data)} bytes, not {part.nbytes}")
        else:
            part[...] = np.frombuffer(data, part.dtype).reshape(part.shape)

    def finish(self) -> np.ndarray:
        """Return the leaf, after all pieces were read."""
        return from_words(self.out, self.leaf.shape, self.leaf.dtype)


def _by_pack(leaves: Sequence[_PackedLeaf]) -> dict[str, list[tuple[_PackedLeaf, Piece, np.ndarray]]]:
    packs: dict[str, list[tuple[_PackedLeaf, Piece, np.ndarray]]] = {}
    for leaf in leaves:
        for piece, part in zip(leaf.leaf.pieces, leaf.parts, strict=True):
            packs.setdefault(piece.file, []).append((leaf, piece, part))
    return packs


def _read_pack(name: str, parts: Sequence[tuple[_PackedLeaf, Piece, np.ndarray]], files: VerifiedFiles) -> None:
    """Verify a file and decodes all its pieces."""
    data = memoryview(files.read(name))
    for leaf, piece, part in parts:
        try:
            leaf.read(data[piece.start : piece.start + piece.size], part)
        except ArtifactError as error:
            raise ArtifactError(f"{name}: weight {leaf.leaf.path!r} cannot be decoded: {error}") from error


@dataclasses.dataclass(frozen=True)
class _ZarrLeaf:
    """A zarr array that is being read: its verified metadata, and the array for its chunks."""

    leaf: WeightLeaf
    files: VerifiedFiles
    kv: ts.KvStore
    handle: ts.TensorStore
    plain: bool
    out: np.ndarray

    @classmethod
    def open(cls, leaf: WeightLeaf, files: VerifiedFiles) -> _ZarrLeaf:
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
        """Verify and decodes one chunk."""
        key = "/".join(("c", *map(str, index)))
        name = f"{self.leaf.folder}/{key}"
        data, chunk = self.files.read(name), self._chunk_shape()
        region = tuple(
            slice(i * n, min((i + 1) * n, size)) for i, n, size in zip(index, chunk, self.out.shape, strict=True)
        )
        try:
            if self.plain:
                # Decoded here as zarr would; without TensorStore a float model loads a third faster.
                elements = np.frombuffer(data, self.out.dtype).reshape(chunk)
                self.out[region] = elements[tuple(slice(part.stop - part.start) for part in region)]
                return
            self.kv.write(key, data).result()
            ts.array(self.out[(*region, ...)]).write(self.handle[region]).result()
            self.kv.write(key, None).result()
        except Exception as error:  # TensorStore's own kinds
            raise ArtifactError(f"{name} cannot be decoded: {error}") from error

    def finish(self) -> np.ndarray:
        """Return the leaf, after all chunks were read."""
        return unpack(self.out, self.leaf.shape, self.leaf.dtype) if self.leaf.packed else self.out

    def _chunk_shape(self) -> tuple[int, ...]:
        return tuple(size or 1 for size in self.handle.chunk_layout.read_chunk.shape or ())


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialized array whose memory XLA:CPU can use without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _grid(shape: Sequence[int], chunk: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-size // part) for size, part in zip(shape, chunk, strict=True))
