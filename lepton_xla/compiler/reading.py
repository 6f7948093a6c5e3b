"""Reads weights: each file is verified, then decoded in memory into arrays that XLA can use without a copy.

A local folder and an object store take the same path, and no byte is decoded before its digest is checked. Beside the
arrays themselves, memory holds a file or two a thread, of some 4 MiB, and the packed array until it is decoded.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import tensorstore as ts

from lepton_xla.compiler import _xla, gaps
from lepton_xla.compiler.devices import Devices
from lepton_xla.compiler.elements import flat_bytes, from_bytes, from_words, words_of
from lepton_xla.compiler.manifest import PACKED, Piece, WeightLeaf
from lepton_xla.compiler.storage import VerifiedFiles
from lepton_xla.compiler.weights import SCRATCH, open_array, part_regions, plain_codecs
from lepton_xla.deferred import jax
from lepton_xla.errors import ArtifactError
from lepton_xla.pieces import executor, is_resting, piece_bytes, rest
from lepton_xla.trees import leaf_bytes

# Arrays that differ mostly do so in their first bytes, so the rest need not be read.
_GLANCE_BYTES = 64
# XLA:CPU uses a host array in place only if it starts on such a boundary.
_ALIGNMENT = 64
# Arrays of at least so many bytes have memory of their own, which the system gets back with the array.
_MAPPED_BYTES = 1 << 20
_MOST_THREADS = 8
_KEYS = ({"name": "default"}, {"name": "default", "configuration": {"separator": "/"}})
_HUGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)


def read_all(leaves: Sequence[WeightLeaf], packed_rows: Sequence[int], files: VerifiedFiles) -> list[np.ndarray]:
    """Read leaves into new arrays that start on a 64-byte boundary, in parallel over files.

    Args:
        leaves: the manifest's.
        packed_rows: bytes used in each row of the packed array.
        files: the artifact's.

    Raises:
        ArtifactError: naming the file that is missing, damaged, or not what the manifest says, and the leaf, if the
            file holds several.
    """
    rows_leaf = _packed_array(packed_rows)
    _check_memory([*leaves, *([rows_leaf] if rows_leaf else [])])
    with executor(_MOST_THREADS, "lepton-weights") as pool:
        rows = _ZarrLeaf.open(rows_leaf, files) if rows_leaf else None
        opened = list(pool.map(lambda leaf: _open(leaf, files), leaves))
        arrays = [leaf for leaf in opened if isinstance(leaf, _ZarrLeaf)]
        packed = [leaf for leaf in opened if isinstance(leaf, _PackedLeaf)]
        # The rows first: packed leaves are decoded from them.
        _finish(pool, [pool.submit(rows.read, index) for index in rows.chunks()] if rows else [])
        streams = rows.finish() if rows else np.empty((1, 0), np.uint8)
        tasks = [pool.submit(leaf.read, index) for leaf in arrays for index in leaf.chunks()]
        tasks += [pool.submit(leaf.read, streams) for leaf in packed]
        _finish(pool, tasks)
    return [leaf.finish() for leaf in opened]


def check_placed(path: str, host: np.ndarray, placed: jax.Array, device: _xla.Device) -> None:
    """Read an array back from its device, and compare it with what was to be put there, bit for bit.

    On a CPU both are the same memory, which takes no time to see.

    Raises:
        ArtifactError: naming the weight, if they differ.

    >>> check_placed("w", np.float32([1.0, 2.0]), jax.device_put(np.float32([1.0, 3.0])), jax.devices()[0])
    Traceback (most recent call last):
    lepton_xla.errors.ArtifactError: weight 'w': what is on the device is not what was read from the artifact
    """
    there = _xla.read_back(placed, device)
    if there.ctypes.data == host.ctypes.data and there.nbytes == host.nbytes:
        return
    if not _equal(host, there):
        raise ArtifactError(f"weight {path!r}: what is on the device is not what was read from the artifact")


def shared(
    arrays: Sequence[jax.Array], known: Sequence[jax.Array], read: Callable[[jax.Array], np.ndarray]
) -> list[jax.Array]:
    """Take what is known already, bit for bit, in place of the new arrays, so that memory holds it once.

    Args:
        arrays: on a CPU.
        known: of the same shapes and dtypes, in the same order.
        read: gives the elements of each: without JAX, NumPy gets none of those whose dtype it has no buffers of.

    >>> one, same, other = (jax.device_put(np.float32(each)) for each in ([1, 2], [1, 2], [1, 3]))
    >>> [array is one for array in shared([same, other], [one, one], np.asarray)]
    [True, False]
    """
    return [before if _equal(read(array), read(before)) else array for array, before in zip(arrays, known, strict=True)]


def _equal(array: np.ndarray, other: np.ndarray) -> bool:
    """Whether arrays are of one shape and the same bit for bit; rests as `pieces` says."""
    one, two = (np.ascontiguousarray(each).reshape(-1).view(np.uint8) for each in (array, other))
    if array.shape != other.shape or not np.array_equal(one[:_GLANCE_BYTES], two[:_GLANCE_BYTES]):
        return False
    step = max(1, piece_bytes(len(one)))
    for start in range(0, len(one), step):
        if not np.array_equal(one[start : start + step], two[start : start + step]):
            return False
        rest()
    return True


def read_parts(
    leaves: Sequence[WeightLeaf],
    packed_rows: Sequence[int],
    files: VerifiedFiles,
    devices: Devices,
    *,
    read_back: bool = False,
) -> list[jax.Array]:
    """Read leaves onto several devices; of a leaf that is cut, the host reads one part at a time.

    Args:
        leaves: the manifest's.
        packed_rows: bytes used in each row of the packed array.
        files: the artifact's.
        devices: where the leaves go.
        read_back: whether to check each part on its device, see `check_placed`.

    Raises:
        ArtifactError: as `read_all` and `check_placed`.
    """
    rest = [leaf for leaf in leaves if not _is_parted(leaf)]
    whole = dict(zip((leaf.path for leaf in rest), read_all(rest, packed_rows, files), strict=True))
    placed: list[jax.Array] = []
    for leaf in leaves:
        sharding = devices.sharding(leaf.spec)
        if not _is_parted(leaf):
            placed.append(jax.device_put(whole.pop(leaf.path), sharding))
            continue
        places: dict[tuple[tuple[int, int], ...], list[Any]] = {}
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
            bounds = [part.indices(size)[:2] for part, size in zip(index or (), leaf.shape, strict=True)]
            places.setdefault(tuple(bounds), []).append(device)
        arrays: list[jax.Array] = []
        for bounds, holders in places.items():
            part = _read_part(leaf, files, tuple(slice(*bound) for bound in bounds))
            put = [_xla.putter(part.shape, part.dtype, device)(part) for device in holders]
            for array, device in zip(put, holders, strict=True) if read_back else ():
                check_placed(leaf.path, part, array, device)
            arrays += put
        placed.append(jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays))
    return placed


def _is_parted(leaf: WeightLeaf) -> bool:
    """Whether parts of a leaf can be read alone."""
    return bool(leaf.spec) and leaf.is_zarr and not leaf.packed


def _read_part(leaf: WeightLeaf, files: VerifiedFiles, region: tuple[slice, ...]) -> np.ndarray:
    """Read one part of a leaf that has a zarr array of its own."""
    _check_memory([msgspec.structs.replace(leaf, shape=tuple(part.stop - part.start for part in region))])
    opened = _ZarrLeaf.open(leaf, files, region)
    with executor(_MOST_THREADS, "lepton-weights") as pool:
        _finish(pool, [pool.submit(opened.read, index) for index in opened.chunks()])
    return opened.finish()


def _finish(pool: concurrent.futures.Executor, tasks: list[concurrent.futures.Future[None]]) -> None:
    """Wait for tasks, and empty the list; the first error ends them all."""
    try:
        for task in concurrent.futures.as_completed(tasks):
            task.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        task = None  # a task holds its error, whose traceback leads back to this frame and the weights in it
        tasks.clear()


def _packed_array(rows: Sequence[int]) -> WeightLeaf | None:
    """Describe the array that packed leaves share, as a leaf; None if there is none."""
    if not rows:
        return None
    shape = (len(rows), max(rows))
    return WeightLeaf(path="", shape=shape, dtype="uint8", packed=False, encoding="zstd", folder=PACKED)


def _check_memory(leaves: Sequence[WeightLeaf]) -> None:
    """Check declared sizes before memory is taken for them: a few bytes can stand for any number of zeros."""
    declared = sum(leaf_bytes(leaf.shape, leaf.dtype) for leaf in leaves)
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if declared > present:
        raise ArtifactError(f"the weights take {declared} bytes, and this machine has {present} bytes of memory")


def _open(leaf: WeightLeaf, files: VerifiedFiles) -> _ZarrLeaf | _PackedLeaf:
    return _ZarrLeaf.open(leaf, files) if leaf.is_zarr else _PackedLeaf.open(leaf)


@dataclasses.dataclass(frozen=True)
class _PackedLeaf:
    """A leaf being read from the packed array: the array of its words, and each part of it with its pieces."""

    leaf: WeightLeaf
    out: np.ndarray
    parts: tuple[tuple[np.ndarray, tuple[Piece, ...]], ...]

    @classmethod
    def open(cls, leaf: WeightLeaf) -> _PackedLeaf:
        shape, word = words_of(leaf.shape, leaf.dtype)
        out = aligned_empty(shape, word)
        regions = part_regions(shape, word.itemsize)
        each = 2 if leaf.encoding == "gaps" else 1
        if len(leaf.pieces) != each * len(regions):
            what = f"{leaf.dtype}{list(leaf.shape)} in {leaf.encoding!r}"
            raise ArtifactError(f"weight {leaf.path!r}: {len(leaf.pieces)} pieces; {what} has {each * len(regions)}")
        groups = (leaf.pieces[each * index : each * (index + 1)] for index in range(len(regions)))
        return cls(leaf, out, tuple((out[region], group) for region, group in zip(regions, groups, strict=True)))

    def read(self, rows: np.ndarray) -> None:
        """Decode all parts from the packed array, uint8 `[rows, length]`."""
        for part, group in self.parts:
            streams = [rows[piece.row, piece.start : piece.start + piece.size] for piece in group]
            try:
                if self.leaf.encoding == "gaps":
                    gaps.from_streams(streams[0], streams[1], part)
                elif streams[0].size != part.nbytes:
                    raise ArtifactError(f"{streams[0].size} bytes, not {part.nbytes}")
                else:
                    part[...] = gaps.from_planes(streams[0], part.dtype).reshape(part.shape)
            except ArtifactError as error:
                raise ArtifactError(f"{PACKED}: weight {self.leaf.path!r} cannot be decoded: {error}") from error

    def finish(self) -> np.ndarray:
        """Return the leaf, after all parts were read."""
        return from_words(_filled(self.out), self.leaf.shape, self.leaf.dtype)


class _Grid(msgspec.Struct):
    configuration: dict[str, tuple[Annotated[int, msgspec.Meta(ge=1)], ...]]
    name: Literal["regular"]


class _KeyEncoding(msgspec.Struct, forbid_unknown_fields=True):
    name: Literal["default"]


class _PlainArray(msgspec.Struct, forbid_unknown_fields=True):
    """Metadata of an array that this package wrote without compression; other valid metadata is TensorStore's."""

    zarr_format: Literal[3]
    node_type: Literal["array"]
    shape: tuple[int, ...]
    data_type: str
    chunk_grid: _Grid
    chunk_key_encoding: _KeyEncoding
    codecs: list[dict[str, Any]]
    fill_value: Any

    @classmethod
    def read(cls, metadata: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, ...] | None:
        """The shape of its chunks; None if this is none, or of another shape or dtype."""
        try:
            array = msgspec.json.decode(metadata, type=cls)
        except msgspec.MsgspecError:
            return None
        chunk = array.chunk_grid.configuration.get("chunk_shape", ())
        known = array.shape == shape and array.data_type == dtype.name and len(chunk) == len(shape)
        return chunk if known and array.codecs == plain_codecs(dtype.itemsize) and sys.byteorder == "little" else None


@dataclasses.dataclass(frozen=True)
class _ZarrLeaf:
    """A zarr array that is being read: its verified metadata, and the array for its chunks.

    One that is not compressed is read without TensorStore, which takes several times as long and many threads to open.
    """

    leaf: WeightLeaf
    files: VerifiedFiles
    scratch: tuple[ts.KvStore, ts.TensorStore] | None
    chunk: tuple[int, ...]
    out: np.ndarray
    region: tuple[slice, ...]

    @classmethod
    def open(cls, leaf: WeightLeaf, files: VerifiedFiles, region: tuple[slice, ...] | None = None) -> _ZarrLeaf:
        """Open an array; `region` is the part of it that is read, by default all."""
        name = f"{leaf.folder}/zarr.json"
        metadata = files.read(name)
        if leaf.packed:
            shape, dtype = (flat_bytes(leaf.shape, leaf.dtype),), np.dtype(np.uint8)
        else:
            shape, dtype = leaf.shape, np.dtype(leaf.dtype)
        chunk, scratch = _PlainArray.read(metadata, shape, dtype), None
        if chunk is None:
            scratch = _opened(name, metadata, shape, dtype)
            chunk = tuple(size or 1 for size in scratch[1].chunk_layout.read_chunk.shape or ())
        region = tuple(slice(0, size) for size in shape) if region is None else region
        out = aligned_empty([part.stop - part.start for part in region], dtype)
        return cls(leaf, files, scratch, chunk, out, region)

    def chunks(self) -> list[tuple[int, ...]]:
        """The chunks that overlap the region."""
        ranges = [range(part.start // n, -(-part.stop // n)) for part, n in zip(self.region, self.chunk, strict=True)]
        return list(itertools.product(*ranges)) if self.out.size else []

    def read(self, index: tuple[int, ...]) -> None:
        """Verify and decode one chunk."""
        key = "/".join(("c", *map(str, index)))
        name = f"{self.leaf.folder}/{key}"
        chunk = self.chunk
        starts = [place * size for place, size in zip(index, chunk, strict=True)]
        # Where the chunk and the region overlap: in the whole array, in the region, and in the chunk.
        found = tuple(
            slice(max(start, part.start), min(start + size, part.stop))
            for start, size, part in zip(starts, chunk, self.region, strict=True)
        )
        target = _moved(found, [part.start for part in self.region])
        part = self.out[(*target, ...)]  # an array, even without axes
        in_place = self.scratch is None and part.shape == chunk and part.flags.c_contiguous
        if in_place and self.files.read_into(name, part):
            return
        data = self.files.read(name)
        try:
            if self.scratch is None:
                elements = np.frombuffer(data, self.out.dtype).reshape(chunk)
                self.out[target] = elements[_moved(found, starts)]
                return
            kv, handle = self.scratch
            kv.write(key, data).result()
            ts.array(self.out[(*target, ...)]).write(handle[found]).result()
            kv.write(key, None).result()
        except Exception as error:  # TensorStore's own kinds
            raise ArtifactError(f"{name} cannot be decoded: {error}") from error

    def finish(self) -> np.ndarray:
        """Return the leaf, after all chunks were read."""
        out = _filled(self.out)
        return from_bytes(out, self.leaf.shape, self.leaf.dtype) if self.leaf.packed else out


def _opened(
    name: str, metadata: bytes, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[ts.KvStore, ts.TensorStore]:
    """Have TensorStore open an array by its metadata, whose chunks come later."""
    context = ts.Context()
    kv = ts.KvStore.open(SCRATCH, context=context).result()
    kv.write("zarr.json", metadata).result()
    try:
        handle = open_array(context, open=True)
        keys = msgspec.json.decode(metadata)["chunk_key_encoding"]
    except Exception as error:  # TensorStore's own kinds
        raise ArtifactError(f"{name} is not valid zarr metadata: {error}") from error
    if keys not in _KEYS:
        # Its chunks would have other names, and TensorStore takes what it does not find for zeros.
        raise ArtifactError(f"{name}: chunks are named by {keys}, not by {_KEYS[0]}")
    if tuple(handle.shape) != shape or handle.dtype.numpy_dtype != dtype:
        raise ArtifactError(
            f"{name}: holds {handle.dtype.name}{list(handle.shape)}; the manifest says {dtype.name}{list(shape)}"
        )
    return kv, handle


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Make an uninitialized array whose memory XLA:CPU can use without a copy.

    >>> aligned_empty((3, 5), "float32").ctypes.data % 64
    0
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size >= _MAPPED_BYTES:
        # Not from the allocator: it keeps what is given back to it, in pools of the threads that read.
        mapped = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A fault for 2 MiB and not for each 4 KiB: that is a third of the time that reading takes. But one for 2 MiB
        # takes up to 5 ms, without a rest, where the memory was never used before.
        if not is_resting():
            _have_huge_pages(mapped)
        return np.frombuffer(mapped, np.uint8).view(dtype).reshape(shape)
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _have_huge_pages(mapped: mmap.mmap) -> None:
    if _HUGE is not None:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapped.madvise(_HUGE)


def _filled(array: np.ndarray) -> np.ndarray:
    """An array of `aligned_empty` that is filled: the kernel may merge its pages, in its own time."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    if isinstance(base, mmap.mmap) and is_resting():
        _have_huge_pages(base)
    return array


def _moved(region: Sequence[slice], starts: Sequence[int]) -> tuple[slice, ...]:
    """A region counted from other starts."""
    return tuple(slice(part.start - start, part.stop - start) for part, start in zip(region, starts, strict=True))
