"""Keeps requests with their answers and feedback in files, to learn from: on a thread of its own, within bounds."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep, time

import msgspec

from lepton_xla.errors import SampleError
from lepton_xla.files.copies import write_whole
from lepton_xla.generation.rows import REPLY
from lepton_xla.samples import Kept, LabelHead, SampleHead, record
from lepton_xla.serve.monitor.sampling import Sampling
from lepton_xla.serve.monitor.segments import Segments
from lepton_xla.serve.protocol.monitoring import RightAnswers
from lepton_xla.serve.protocol.signature import Signature, Tensor
from lepton_xla.serve.protocol.wire import InferRequest

_log = logging.getLogger("lepton_xla.serve")

_KEY, _BOUNDS = ".key", ".bounds.json"
# Records that wait for the disk. What comes beyond is not kept: answers never wait for it.
_MOST_WAITING = 16 << 20
# A record takes about so many, beside its tensors, its id and its texts.
_RECORD_BYTES = 512
_TIDY_S = 30.0
# Records are written together.
_GATHER_S, _MOST_GATHERED, _WRITE_BYTES = 0.02, 4096, 1 << 20
# After a write that failed.
_PAUSE_S = 10.0
_CLOSE_S = 5.0

type _Record = Callable[[], bytes]
type Counts = dict[str, int]
"""What became of records: `kept`, `left_out`, `lost`."""


class Sampler:
    """Samples the requests of one model version. Called on the event loop.

    Args:
        signature: the model's.
        sampling: what is kept.
        rate: share of requests where that does not say.
        key: of the hashes.
        reserve: gives whether there is room for about so many bytes, which are then expected.
        put: takes a record to be written, and its bytes as reserved.
    """

    def __init__(
        self,
        signature: Signature,
        sampling: Sampling,
        rate: float,
        key: bytes,
        reserve: Callable[[int], bool],
        put: Callable[[_Record, int], None],
    ) -> None:
        self._version = signature.version
        self._sampling = sampling
        self._key = key
        self._reserve = reserve
        self._put = put
        self._batched = signature.batch is not None
        # With the names of their dtypes, which NumPy puts together anew each time.
        self._outputs = [(each, each.dtype.name) for each in signature.outputs]
        # Of every 2**64 hashes of ids.
        self._below = int((rate if sampling.rate is None else sampling.rate) * 2**64)
        self._inputs = [
            (index, each, each.dtype.name)
            for index, each in enumerate(signature.inputs)
            if each.name not in sampling.drop
        ]
        self._dropped = frozenset(sampling.drop)

    def _takes(self, request_id: str) -> bool:
        """Whether requests with this id are kept: a matter of the id alone, so that all processes agree."""
        digest = hashlib.blake2b(_encoded(request_id), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self._below

    def answered(self, request: InferRequest, outputs: Sequence[bytes | memoryview]) -> None:
        """Keeps a request and its answer.

        Args:
            request: with an id. Its tensors are not changed later.
            outputs: the bytes of each output that was asked for, valid until this returns.
        """
        spec = request.spec
        if spec.id is not None and self._takes(spec.id):
            asked = [index for index, _ in spec.outputs]
            self._keep(spec.id, request.tensors, request.nbytes, asked, outputs, spec.sizes)

    def replied(
        self,
        request_id: str,
        inputs: Sequence[bytes],
        outputs: Sequence[bytes],
        sizes: Mapping[str, int],
    ) -> None:
        """Keeps a prompt and its reply.

        Args:
            request_id: what feedback will call it.
            inputs, outputs: the bytes of all of them.
            sizes: of the symbols of the signature.
        """
        if self._takes(request_id):
            nbytes = sum(map(len, inputs))
            self._keep(request_id, inputs, nbytes, range(len(outputs)), outputs, sizes)

    def _keep(
        self,
        request_id: str,
        tensors: Sequence[bytes | memoryview],
        nbytes: int,
        asked: Sequence[int],
        outputs: Sequence[bytes | memoryview],
        sizes: Mapping[str, int],
    ) -> None:
        wanted = [
            (self._outputs[index], data)
            for index, data in zip(asked, outputs, strict=True)
            if self._outputs[index][0].name not in self._dropped
        ]
        size = _RECORD_BYTES + len(_encoded(request_id)) + nbytes + sum(len(data) for _, data in wanted)
        if not self._reserve(size):  # before anything is copied
            return
        given = [(output, bytes(data)) for output, data in wanted]
        now_s = time()

        def made() -> bytes:
            inputs = [self._kept(tensor, dtype, tensors[index], sizes) for index, tensor, dtype in self._inputs]
            answers = [self._kept(tensor, dtype, data, sizes) for (tensor, dtype), data in given]
            head = SampleHead(
                self._id(request_id), self._version, now_s,
                tuple(each for each, _ in inputs), tuple(each for each, _ in answers),
            )  # fmt: skip
            return record(head, b"".join(data for _, data in (*inputs, *answers)))

        self._put(made, size)

    def labelled(self, labels: RightAnswers) -> None:
        """Keeps feedback of this version's answers. A right reply is kept as replies themselves are, or not at all."""
        now_s = time()
        for request_id, right in labels.items():
            texts = [each for each in right if isinstance(each, str)]
            if not self._takes(request_id) or (texts and REPLY in (*self._dropped, *self._sampling.hash)):
                continue
            classes = tuple(each for each in right if not isinstance(each, str))
            head = LabelHead(self._id(request_id), self._version, now_s, classes, texts[0] if texts else None)
            size = _RECORD_BYTES + 8 * len(right) + sum(len(_encoded(each)) for each in (request_id, *texts))
            if self._reserve(size):
                self._put(lambda head=head: record(head), size)

    def _kept(
        self, tensor: Tensor, dtype: str, data: bytes | memoryview, sizes: Mapping[str, int]
    ) -> tuple[Kept, bytes]:
        shape = tensor.at(sizes)
        if tensor.name not in self._sampling.hash:
            return Kept(tensor.name, dtype, shape), bytes(data)
        rows = shape[0] if self._batched else 1
        step = len(data) // max(rows, 1)
        view = memoryview(data)
        digests = b"".join(self._hashed(bytes(view[row * step : (row + 1) * step])) for row in range(rows))
        return Kept(tensor.name, "sha256", (rows,)), digests

    def _hashed(self, data: bytes) -> bytes:
        return hmac.digest(self._key, data, "sha256")

    def _id(self, request_id: str) -> str:
        return self._hashed(_encoded(request_id)).hex() if self._sampling.hash_id else request_id


class SampleWriter:
    """Writes the samples of all models of a process, on a thread of its own.

    Args:
        folder: where to; made if it is missing, for this user alone.
        rate: of the requests with an id, the share that is kept where a model's settings do not say.

    Raises:
        SampleError: if nothing can be written there.
    """

    def __init__(self, folder: Path, rate: float = 1.0) -> None:
        self._folder = folder
        self._rate = rate
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._key = _shared_key(folder / _KEY)
        except OSError as error:
            raise SampleError(f"{folder}: samples cannot be kept there: {error.strerror}") from error
        # The event loop adds to the one, the writing thread to the other: neither waits for a lock.
        self._put_bytes = self._done_bytes = 0
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._segments: dict[str, Segments] = {}
        self._gathered: dict[str, list[tuple[bytes, Counts]]] = {}
        self._gathered_bytes = 0
        self._paused_until_s = 0.0
        self._thread: threading.Thread | None = None

    def sampler(self, signature: Signature, sampling: Sampling, counts: Counts) -> Sampler:
        """Makes the sampler of a model version. On the event loop.

        Args:
            signature: the model's.
            sampling: what is kept.
            counts: what becomes of records: `kept` in files; `left_out`, since the disk was too slow; or `lost`, since
                it refused them, or they are too long.

        Raises:
            SampleError: for settings that do not fit the model.
        """
        sampling.check([each.name for each in (*signature.inputs, *signature.outputs)])
        name = signature.name
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="lepton-samples", daemon=True)
            self._thread.start()
        self._waiting.put(lambda: self._begin(name, sampling))
        return Sampler(
            signature, sampling, self._rate, self._key,
            lambda size: self._reserve(size, counts), lambda made, size: self._put(name, made, size, counts),
        )  # fmt: skip

    def _reserve(self, size: int, counts: Counts) -> bool:
        if self._put_bytes - self._done_bytes + size > _MOST_WAITING:
            counts["left_out"] += 1
            return False
        self._put_bytes += size
        return True

    def _put(self, name: str, made: _Record, size: int, counts: Counts) -> None:
        self._waiting.put(lambda: self._write(name, made, size, counts))

    # On the thread that writes.

    def _work(self) -> None:
        tidied_s = -_TIDY_S
        ended = False
        while not ended:
            with contextlib.suppress(queue.Empty):
                works = [self._waiting.get(timeout=_TIDY_S)]
                # Waking up for each record would take the interpreter from the event loop each time.
                sleep(_GATHER_S)
                with contextlib.suppress(queue.Empty):
                    while len(works) < _MOST_GATHERED:
                        works.append(self._waiting.get_nowait())
                ended = None in works
                for work in works:
                    if work is not None:
                        work()
                for name in self._segments:
                    self._flush(name)
            if monotonic() - tidied_s > _TIDY_S:
                tidied_s = monotonic()
                self._tidy()
        for segments in self._segments.values():
            segments.close()

    def _begin(self, name: str, sampling: Sampling) -> None:
        if name in self._segments:
            self._flush(name)
            self._segments[name].close()
        self._segments[name] = Segments(self._folder / name, sampling.max_bytes, sampling.max_age_s)
        self._gathered[name] = []
        with contextlib.suppress(OSError):
            (self._folder / name).mkdir(mode=0o700, exist_ok=True)
            write_whole(self._folder / name / _BOUNDS, msgspec.json.encode(sampling))

    def _tidy(self) -> None:
        """Removes samples that are too old or too many, those of models that are not served any more too."""
        with contextlib.suppress(OSError):
            for folder in self._folder.iterdir():
                if folder.name in self._segments or not folder.is_dir():
                    continue
                try:
                    sampling = msgspec.json.decode((folder / _BOUNDS).read_bytes(), type=Sampling)
                except (OSError, msgspec.MsgspecError):
                    sampling = Sampling()
                Segments(folder, sampling.max_bytes, sampling.max_age_s).remove_old()
        for segments in self._segments.values():
            with contextlib.suppress(OSError):
                segments.remove_old()

    def _write(self, name: str, made: _Record, size: int, counts: Counts) -> None:
        """Makes a record, to be written with others."""
        most = self._segments[name].most
        try:
            data = made()
            if len(data) > most:
                counts["lost"] += 1
                return
            if self._gathered_bytes + len(data) > min(most, _WRITE_BYTES):
                self._flush(name)
            self._gathered[name].append((data, counts))
            self._gathered_bytes += len(data)
        except Exception:
            counts["lost"] += 1
            _log.exception("a sample of %s could not be kept", name)
        finally:
            self._done_bytes += size

    def _flush(self, name: str) -> None:
        gathered, self._gathered[name] = self._gathered[name], []
        if not gathered:
            return
        data = b"".join(each for each, _ in gathered)
        self._gathered_bytes -= len(data)
        result = "lost"
        try:
            if monotonic() >= self._paused_until_s:
                self._segments[name].write(data)
                result = "kept"
        except OSError as error:
            self._paused_until_s = monotonic() + _PAUSE_S
            _log.warning("samples of %s are not kept for %.0f s: %s", name, _PAUSE_S, error.strerror)
        for _, counts in gathered:
            counts[result] += 1

    def close(self) -> None:
        """Writes what waits, for a while, and ends."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(_CLOSE_S)
            self._thread = None


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _shared_key(path: Path) -> bytes:
    """The key of the hashes in a folder, the same for all processes; made if there is none."""
    made = path.with_name(f"{path.name}.{os.getpid()}")
    if not path.exists():
        made.unlink(missing_ok=True)
        with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        try:
            os.link(made, path)  # fails where another process was first
        except FileExistsError:
            pass
        finally:
            made.unlink()
    return path.read_bytes()
