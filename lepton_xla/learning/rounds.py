"""What a learner has on the disk: its float weights, the round under way, and the rounds that ended.

    FOLDER/MODEL/
      master.npz       float weights of the version that the learner had promoted last
      serving.lepton   those weights as they are served
      serving.json     its version
      round.json       the round under way, and how far it is
      round/           its checkpoints, float weights and artifact
      history.jsonl    rounds that ended
      split.key        what decides, with a request's id, whether it is trained on or judges

Every file is replaced by a rename, and what a step did is noted before the next begins. So a learner that was killed
goes on with the round, and never does a step twice that others see.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Generator
from time import time
from typing import Any, Literal

import msgspec

from lepton_xla.errors import LearningError
from lepton_xla.files.folders import flush, held

type Phase = Literal["train", "judge", "push", "rollout", "promoted", "refused", "rolled back", "stopped", "kept"]

_SECRET_BYTES = 16

ENDS = ("promoted", "refused", "rolled back", "stopped", "kept")
"""Phases of rounds that ended: `kept` where there is no server to push to."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt to learn.

    Attributes:
        number: counts the rounds of a model.
        phase: what is done next, or how it ended.
        began_s, ended_s: seconds since the epoch.
        rows, held_out: labelled rows to train on, and to judge by.
        newest_s: time of the newest of their requests.
        version: that the result was pushed as.
        reason: why it ended so.
        verdict: the figures of `Verdict`.
        notes: what else is worth knowing.
    """

    number: int
    phase: Phase = "train"
    began_s: float = 0.0
    ended_s: float = 0.0
    rows: int = 0
    held_out: int = 0
    newest_s: float = 0.0
    version: str = ""
    reason: str = ""
    verdict: dict[str, Any] = {}
    notes: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.phase in ENDS


class Rounds:
    """The folder of a learner.

    Args:
        folder: of all models; made if it is missing.
        model: name of the model.

    Raises:
        LearningError: if it cannot be written or read.

    >>> with Rounds("learning", "digits").locked() as rounds:
    ...     begun = rounds.save(Round(number=rounds.next_number, rows=300))
    ...     _ = rounds.end(begun, "refused", "not better")
    ...     rounds.current, [(each.number, each.phase) for each in rounds.history()]
    (None, [(1, 'refused')])
    """

    def __init__(self, folder: str | os.PathLike[str], model: str) -> None:
        self.folder = pathlib.Path(folder) / model
        self.work = self.folder / "round"
        self.master = self.folder / "master.npz"
        self.serving = self.folder / "serving.lepton"

    @contextlib.contextmanager
    def locked(self) -> Generator[Rounds, None, None]:
        """Keep other learners out, and tidy up after one that was killed."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
        with held(self.folder) as free:
            if not free:
                raise LearningError(f"{self.folder} is in use: another learner works there")
            current = self.current
            if current is not None and current.ended:
                self.end(current, current.phase, current.reason)
            elif current is None:
                shutil.rmtree(self.work, ignore_errors=True)
            yield self

    @property
    def current(self) -> Round | None:
        """The round under way."""
        return self._read("round.json", Round)

    @property
    def next_number(self) -> int:
        """Number of a round that would begin now."""
        return 1 + max((each.number for each in self.history()), default=0)

    @property
    def serving_version(self) -> str:
        """The version that `master` and `serving` are; empty if the learner has not had one promoted."""
        found: dict[str, str] | None = self._read("serving.json", dict[str, str])
        return "" if found is None else found.get("version", "")

    def secret(self) -> bytes:
        """What the ids of requests are hashed with: whoever chooses an id cannot choose what it is used for."""
        path = self.folder / "split.key"
        if not path.exists():
            self._write(path.name, secrets.token_bytes(_SECRET_BYTES))
        try:
            found = path.read_bytes()
        except OSError as error:
            raise LearningError(f"{path} cannot be read: {error.strerror}") from error
        if len(found) != _SECRET_BYTES:
            raise LearningError(f"{path} is damaged: remove {self.folder} to begin with the model's own weights")
        return found

    def save(self, found: Round) -> Round:
        """Notes how far a round is."""
        self._write("round.json", msgspec.json.encode(found))
        return found

    def change(self, found: Round, **changes: Any) -> Round:
        """Notes what changed in a round."""
        return self.save(msgspec.structs.replace(found, **changes))

    def end(self, found: Round, phase: Phase, reason: str) -> Round:
        """Ends a round: keeps its weights if it was promoted, and notes it in the history. May be done again."""
        ended = found if found.ended else msgspec.structs.replace(found, phase=phase, reason=reason, ended_s=time())
        self.save(ended)
        with self._writing():
            if ended.phase == "promoted" and (self.work / "master.npz").exists():
                if (self.work / "update.lepton").exists():
                    shutil.rmtree(self.serving, ignore_errors=True)
                    os.rename(self.work / "update.lepton", self.serving)
                self._write("serving.json", msgspec.json.encode({"version": ended.version}))
                os.replace(self.work / "master.npz", self.master)
            if not any(each.number == ended.number for each in self.history()):
                with open(self.folder / "history.jsonl", "ab") as file:
                    # A line that a killed process left half is ended first.
                    file.write(b"\n" * self._is_cut() + msgspec.json.encode(ended) + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            (self.folder / "round.json").unlink(missing_ok=True)
            flush(self.folder)
        if ended.phase != "kept":
            shutil.rmtree(self.work, ignore_errors=True)
        return ended

    def drop(self) -> None:
        """Forgets the round under way, which cannot be gone on with."""
        with self._writing():
            (self.folder / "round.json").unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def forget(self) -> None:
        """Forgets the weights: another version than the learner's serves now."""
        shutil.rmtree(self.serving, ignore_errors=True)
        with self._writing():
            # The version goes last: while it is there, whoever was killed in between forgets the rest too.
            for path in (self.master, self.folder / "serving.json"):
                path.unlink(missing_ok=True)
                flush(self.folder)

    def history(self) -> list[Round]:
        """The rounds that ended, in their order."""
        found: list[Round] = []
        try:
            lines = (self.folder / "history.jsonl").read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LearningError(f"{self.folder}/history.jsonl cannot be read: {error.strerror}") from error
        for line in lines:
            with contextlib.suppress(msgspec.MsgspecError):  # half a line of a process that was killed
                found.append(msgspec.json.decode(line, type=Round))
        return found

    def _is_cut(self) -> bool:
        try:
            data = (self.folder / "history.jsonl").read_bytes()
        except FileNotFoundError:
            return False
        return bool(data) and not data.endswith(b"\n")

    def _read[T](self, name: str, kind: type[T]) -> T | None:
        try:
            return msgspec.json.decode((self.folder / name).read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError) as error:
            raise LearningError(f"{self.folder / name} cannot be read ({error}): remove it to begin anew") from error

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.folder / f".{name}.tmp"
        with self._writing():
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
            flush(self.folder)

    @contextlib.contextmanager
    def _writing(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            raise LearningError(f"{self.folder} cannot be written: {error.strerror}") from error
