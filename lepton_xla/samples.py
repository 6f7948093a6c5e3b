"""Samples: requests that a server answered, kept in files with their answers and the feedback that came later.

A folder has a folder for each model, and that has files `START-PROCESS.samples`, each written by one process. A file
is a sequence of records, and nothing is ever written but at its end:

    4 bytes   "LxS1"
    4 bytes   length of the head           all four numbers
    4 bytes   length of the body           are uint32,
    4 bytes   CRC-32 of the head           little-endian
    4 bytes   CRC-32 of the body
    head      JSON: a sample, or labels
    body      the tensors of a sample one after another, C order, little-endian

So a process may be killed at any time: of the record that it was writing a part is there, which is passed over. Labels
name the request by its id, and may be in the file of another process.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import msgspec
import numpy as np

from lepton_xla.errors import SampleError

SUFFIX = ".samples"
_MAGIC = b"LxS1"
_FRAME = struct.Struct("<4s4I")
_MOST_HEAD = 1 << 22
_SEARCHED = 1 << 16
_MOST_OPEN = 16
_DTYPES: dict[str, np.dtype[Any]] = {
    "bool": np.dtype(np.bool_),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **{f"float{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    **{f"{kind}{bits}": np.dtype(f"<{kind[0]}{bits // 8}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}


class Kept(msgspec.Struct, frozen=True):
    """A tensor of a sample: what its bytes in the body are.

    Attributes:
        name: of the input or output.
        dtype: of its elements; `sha256` for digests of 32 bytes, one for each row, in place of the values.
        shape: its shape; of digests that of what was hashed, cut after the rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the body."""
        return math.prod(self.shape) * (32 if self.dtype == "sha256" else _dtype(self.dtype).itemsize)


class SampleHead(msgspec.Struct, frozen=True, tag="sample"):
    """Head of a sample: its request's id, the version that answered, the time, and the tensors of the body in order."""

    id: str
    version: str
    time_s: float
    inputs: tuple[Kept, ...]
    outputs: tuple[Kept, ...]


class LabelHead(msgspec.Struct, frozen=True, tag="labels", omit_defaults=True):
    """Feedback that came: the right class of each row of a request, or the right reply; and who answered it."""

    id: str
    version: str
    time_s: float
    labels: tuple[int, ...]
    reply: str | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """A request that was answered.

    Attributes:
        id: of the request; hashed if the model's settings say so.
        version: of the model that answered.
        time_s: when, seconds since the epoch.
        inputs, outputs: by name; without those that are dropped. Of those that are hashed, a uint8 array `[rows, 32]`.
        hashed: names of those.
        labels: the right class of each row, or None while there was no feedback.
        reply: the right reply, of a model that generates.
    """

    id: str
    version: str
    time_s: float
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    hashed: frozenset[str]
    labels: tuple[int, ...] | None
    reply: str | None = None


class Samples:
    """The samples of one model in a folder, to be read as often as needed.

    Servers may go on writing meanwhile: what they add after this is made may be missing.

    Args:
        folder: what `leptonx serve --samples` was given.
        model: name of the model.

    Attributes:
        count: samples that are there.
        labelled: samples with labels.
        damaged_bytes: bytes of files that hold no whole record, but for what may be in the course of being written.

    Raises:
        SampleError: if there is no such folder, or it cannot be read.

    >>> head = SampleHead("a", "3", 1e9, (Kept("x", "float32", (1, 2)),), (Kept("y", "int32", (1,)),))
    >>> body = np.float32([[0.5, 1.0]]).tobytes() + np.int32([7]).tobytes()
    >>> pathlib.Path("kept/digits").mkdir(parents=True)
    >>> _ = pathlib.Path("kept/digits/1-1.samples").write_bytes(
    ...     record(head, body) + record(LabelHead("a", "3", 1e9 + 5, (4,)))
    ... )
    >>> (sample,) = Samples("kept", "digits")
    >>> sample.id, sample.version, sample.inputs["x"].tolist(), sample.outputs["y"].tolist(), sample.labels
    ('a', '3', [[0.5, 1.0]], [7], (4,))
    """

    def __init__(self, folder: str | os.PathLike[str], model: str) -> None:
        self._folder = pathlib.Path(folder) / model
        self.count = self.labelled = self.damaged_bytes = 0
        asked: dict[tuple[str, str], list[tuple[float, int, int]]] = {}
        told: list[LabelHead] = []
        self._places: list[tuple[float, pathlib.Path, int]] = []
        for file in self._files():
            for place, head in self._heads(file):
                if isinstance(head, LabelHead):
                    told.append(head)
                else:
                    asked.setdefault((head.id, head.version), []).append((head.time_s, len(self._places), _rows(head)))
                    self._places.append((head.time_s, file, place))
        self.count = len(self._places)
        self._labels = _joined(asked, told)
        self.labelled = len(self._labels)

    def __iter__(self) -> Iterator[Sample]:
        """The samples in the order of their time, without damaged ones and those of files that are gone by now."""
        return self._read(range(self.count))

    def with_labels(self, most: int | None = None) -> Iterator[Sample]:
        """The samples that have labels, in the order of their time.

        Args:
            most: only so many, the latest.
        """
        chosen = sorted(self._labels, key=lambda index: self._places[index][0])
        return self._read(chosen if most is None else chosen[max(0, len(chosen) - most) :])

    def _read(self, indices: Sequence[int]) -> Iterator[Sample]:
        with contextlib.ExitStack() as stack:
            # Those of one time are mostly in one file of each process.
            opened: dict[pathlib.Path, BinaryIO | None] = {}
            for index in sorted(indices, key=lambda index: self._places[index][0]):
                _, path, place = self._places[index]
                try:
                    if path not in opened:
                        if len(opened) >= _MOST_OPEN:
                            stack.close()
                            opened.clear()
                        opened[path] = _opened(path, stack)
                    file = opened[path]
                    found = None if file is None else _read_sample(file, place, self._labels.get(index))
                except OSError as error:
                    raise SampleError(f"{path}: samples cannot be read: {error.strerror}") from error
                if found is not None:
                    yield found

    def _files(self) -> list[pathlib.Path]:
        try:
            return sorted(entry for entry in self._folder.iterdir() if entry.name.endswith(SUFFIX))
        except FileNotFoundError:
            raise SampleError(
                f"{self._folder}: there are no samples of this model: start the server with --samples "
                f"{self._folder.parent}, and send requests with an id"
            ) from None
        except OSError as error:
            raise SampleError(f"{self._folder}: samples cannot be read: {error.strerror}") from error

    def _heads(self, path: pathlib.Path) -> Iterator[tuple[int, SampleHead | LabelHead]]:
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                place = 0
                while place < size:
                    head, stop = _read_head(file, place, size)
                    if head is not None:
                        yield place, head
                    elif stop < size or place == 0:
                        self.damaged_bytes += stop - place
                    place = stop
        except FileNotFoundError:
            return
        except OSError as error:
            raise SampleError(f"{path}: samples cannot be read: {error.strerror}") from error


def _opened(path: pathlib.Path, stack: contextlib.ExitStack) -> BinaryIO | None:
    """A file, or None if retention has removed it."""
    try:
        return stack.enter_context(open(path, "rb"))
    except FileNotFoundError:
        return None


def record(head: SampleHead | LabelHead, body: bytes = b"") -> bytes:
    """The bytes of a record.

    >>> record(LabelHead("a", "1", 0.0, (3,)))[20:]
    b'{"type":"labels","id":"a","version":"1","time_s":0.0,"labels":[3]}'
    """
    told = msgspec.json.encode(head)
    return b"".join((_FRAME.pack(_MAGIC, len(told), len(body), zlib.crc32(told), zlib.crc32(body)), told, body))


class _Frame(NamedTuple):
    head: bytes
    body_place: int
    body_bytes: int
    body_crc: int


def _read_frame(file: BinaryIO, place: int, size: int) -> _Frame | None:
    """The record at a place, or None if there is no whole one."""
    file.seek(place)
    start = file.read(_FRAME.size)
    if len(start) < _FRAME.size:
        return None
    magic, head_bytes, body_bytes, head_crc, body_crc = _FRAME.unpack(start)
    # Sizes are compared with the file's before anything is read by them.
    if magic != _MAGIC or head_bytes > _MOST_HEAD or place + _FRAME.size + head_bytes + body_bytes > size:
        return None
    head = file.read(head_bytes)
    if len(head) != head_bytes or zlib.crc32(head) != head_crc:
        return None
    return _Frame(head, place + _FRAME.size + head_bytes, body_bytes, body_crc)


def _read_head(file: BinaryIO, place: int, size: int) -> tuple[SampleHead | LabelHead | None, int]:
    """The head of the record at a place, None if there is none, and where the next one may be."""
    frame = _read_frame(file, place, size)
    if frame is not None:
        stop = frame.body_place + frame.body_bytes
        try:
            head = msgspec.json.decode(frame.head, type=SampleHead | LabelHead)
            tensors = () if isinstance(head, LabelHead) else (*head.inputs, *head.outputs)
            if all(size >= 0 for each in tensors for size in each.shape) and (
                sum(each.nbytes for each in tensors) == frame.body_bytes
            ):
                return head, stop
        except (msgspec.MsgspecError, TypeError, UnicodeDecodeError):
            pass
        return None, stop
    return None, _next_magic(file, place + 1, size)


def _next_magic(file: BinaryIO, place: int, size: int) -> int:
    """Where the next record may begin; the end of the file if none does."""
    while place < size:
        file.seek(place)
        part = file.read(_SEARCHED)
        found = part.find(_MAGIC)
        if found >= 0:
            return place + found
        if len(part) < _SEARCHED:
            break
        place += len(part) - len(_MAGIC) + 1
    return size


def _read_sample(file: BinaryIO, place: int, told: LabelHead | None) -> Sample | None:
    size = os.fstat(file.fileno()).st_size
    frame = _read_frame(file, place, size)
    if frame is None:
        return None
    body = file.read(frame.body_bytes)
    if zlib.crc32(body) != frame.body_crc:
        return None
    head = msgspec.json.decode(frame.head, type=SampleHead)
    arrays: list[dict[str, np.ndarray]] = []
    start = 0
    for tensors in (head.inputs, head.outputs):
        found: dict[str, np.ndarray] = {}
        for each in tensors:
            stop = start + each.nbytes
            if each.dtype == "sha256":
                found[each.name] = np.frombuffer(body[start:stop], np.uint8).reshape(*each.shape, 32)
            else:
                found[each.name] = np.frombuffer(body[start:stop], _dtype(each.dtype)).reshape(each.shape)
            start = stop
        arrays.append(found)
    hashed = frozenset(each.name for each in (*head.inputs, *head.outputs) if each.dtype == "sha256")
    reply = None if told is None else told.reply
    labels = None if told is None or reply is not None else told.labels
    return Sample(head.id, head.version, head.time_s, arrays[0], arrays[1], hashed, labels, reply)


def _joined(
    asked: Mapping[tuple[str, str], Sequence[tuple[float, int, int]]], told: Sequence[LabelHead]
) -> dict[int, LabelHead]:
    """Index of a sample -> its feedback. An id that was used again means the last request before the labels came."""
    labels: dict[int, LabelHead] = {}
    for each in sorted(told, key=lambda each: each.time_s):
        candidates = sorted(asked.get((each.id, each.version), ()))
        at = bisect.bisect_right(candidates, each.time_s, key=lambda candidate: candidate[0])
        if at:
            _, index, rows = candidates[at - 1]
            if rows in (len(each.labels) if each.reply is None else 1, 0):
                labels[index] = each
    return labels


def _rows(head: SampleHead) -> int:
    """Rows of a sample; 0 if nothing says how many."""
    tensors = (*head.outputs, *head.inputs)
    return tensors[0].shape[0] if tensors and tensors[0].shape else 0


def _dtype(name: str) -> np.dtype[Any]:
    """A dtype by its name. Raises `TypeError` for one that no request has."""
    if name not in _DTYPES:
        raise TypeError(name)
    return _DTYPES[name]
