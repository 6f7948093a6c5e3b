"""Checkpoints of a training run, by Orbax: saved while training goes on, read only if they are whole."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lepton_xla.errors import CheckpointError, first_line
from lepton_xla.train.agreement import Agreement, problem_of
from lepton_xla.train.checksums import find_damage
from lepton_xla.train.stored_state import StateRestore, StateSave, describe, digest, without_empty

LOG = logging.getLogger(__name__)

_LOCK = "lepton.lock"
# What each process writes before a save, to see whether it can: the lock of the folder is the first one's alone.
_PROBE, _PROBE_BYTES = "lepton.probe", 4096


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where and when a run is saved.

    Attributes:
        folder: a folder of its own for each run; it is made if it is missing.
        every: steps between checkpoints. The last step, and a run that is told to end, are saved too.
        keep: number of newest checkpoints to keep.
        keep_every: checkpoints of multiples of this step are kept for ever; None for none.
        resume: whether a run that the folder has goes on; if not, a folder that has one is refused.

    Raises:
        CheckpointError: if a number is below 1.

    >>> lx.train.Checkpoints("runs/digits", every=0)
    Traceback (most recent call last):
    lepton_xla.errors.CheckpointError: checkpoints: every = 0; expected a whole number of at least 1
    """

    folder: str | os.PathLike[str]
    every: int = 500
    keep: int = 3
    keep_every: int | None = None
    resume: bool = True

    def __post_init__(self) -> None:
        for name in ("every", "keep", "keep_every"):
            value = getattr(self, name)
            if name == "keep_every" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CheckpointError(f"checkpoints: {name} = {value!r}; expected a whole number of at least 1")


class CheckpointFolder:
    """The checkpoints of one run. Enter it to take the folder's lock; no two runs write to one folder.

    Saving is asynchronous: `save` copies the state, and writes it while training goes on. A checkpoint gets its name
    when it is complete, so what a killed process leaves is never read. A failed save, for instance on a full disk, is
    logged, and the next one tries again; checkpoints that were complete stay. Checksums of all files are part of a
    checkpoint, and are compared before it is read.

    Of several processes all enter it, save and read together. What one of them cannot do fails in all, with the same
    error or the same line in the log, and none waits for another.

    >>> options = Checkpoints("run", every=10)
    >>> with CheckpointFolder(options, {"model": "a"}) as folder:
    ...     folder.save(10, {"w": jnp.ones(3)}, {"data": 10})
    ...     folder.wait()
    ...     target = {"w": jax.ShapeDtypeStruct((3,), "float32")}
    ...     folder.latest(), folder.about(10), folder.restore(10, target)["w"].tolist()
    (10, {'data': 10}, [1.0, 1.0, 1.0])
    """

    def __init__(self, options: Checkpoints, identity: Mapping[str, str]) -> None:
        """Name the folder.

        Args:
            options: where it is, and what is kept.
            identity: what must be equal for a run to go on, such as a digest of the model, by name.
        """
        self._options = options
        self._identity = dict(identity)
        self._path = pathlib.Path(os.path.abspath(options.folder))
        self._lock = -1
        self._manager: Any = None
        self._agreement = Agreement()

    def __enter__(self) -> Self:
        try:
            self._agree(self._claim())
            self._agree(self._probe())
            self._open()
            if not self._options.resume and self.latest() is not None:
                raise CheckpointError(
                    f"{self._path} has checkpoints; give another folder, or continue their run (resume=True, --resume)"
                )
        except BaseException:
            self._close()
            self._unlock()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            # After an error other processes may be anywhere.
            self._settle(alone=error is not None)
        finally:
            self._close()
            self._unlock()

    @property
    def every(self) -> int:
        """Steps between checkpoints."""
        return self._options.every

    def latest(self) -> int | None:
        """The newest complete checkpoint's step; None if there is none. Waits for one that is being saved."""
        self._settle()
        step = self._agreement.first(str(self._opened().latest_step()))
        return int(step) if step.isdigit() else None

    def about(self, step: int) -> dict[str, Any]:
        """Read what was saved beside the state.

        Raises:
            CheckpointError: if there is no such checkpoint, it cannot be read, or it is of another run.
        """
        return self._described(step)["extra"]

    def restore(self, step: int, target: Any) -> Any:
        """Read a state.

        Args:
            step: the step of a checkpoint.
            target: a tree of `jax.ShapeDtypeStruct`. Each leaf is put where its `sharding` says, which need not be
                where it was when it was saved; without one on the default device.

        Raises:
            CheckpointError: if the checkpoint is missing, damaged, or has other leaves; the message names one.
        """
        leaves = self._described(step)["leaves"]
        wanted = describe(target)
        for name in sorted(leaves.keys() | wanted.keys()):
            if leaves.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"checkpoint {step} in {self._path}: {name!r} is {leaves.get(name, 'missing')} there, and "
                    f"{wanted.get(name, 'missing')} in this run"
                )
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here),
            target,
        )
        found = self._read(step, "state", StateRestore(without_empty(placed)))
        return jax.tree.map(
            lambda leaf, read: read if leaf.size else jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
            placed,
            found,
        )

    def check(self, state: Any) -> None:
        """Check that a state, or one of such shapes, can be saved.

        Raises:
            CheckpointError: if a leaf cannot; names it.
        """
        describe(state)

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Begin to save a state. Waits for the save before it, which may have failed.

        Args:
            step: the step; a checkpoint that is there already is not written again.
            state: a tree of arrays. They may be donated as soon as this returns.
            extra: what else to keep, as JSON.
        """
        self._settle()
        about: dict[str, Any] = {"identity": self._identity, "leaves": describe(state), "extra": dict(extra)}
        about["digest"] = digest(about)
        parts = ocp.args.Composite(state=StateSave(without_empty(state)), about=ocp.args.JsonSave(about))
        several = jax.process_count() > 1
        if several and (problem := self._agreement.problem(self._probe())) is not None:
            self._failed(step, problem)
            return
        try:
            manager = self._opened()
            if step not in manager.all_steps():
                self._agreement.begin_save()
                manager.save(step, args=parts, force=True)
        except Exception as error:  # the file system's, through several libraries, each with its own class
            if several:
                raise CheckpointError(
                    f"checkpoint {step} in {self._path} could not be begun: {first_line(error)}. The other processes "
                    "wait for this one, so start all of them again"
                ) from error
            self._failed(step, problem_of(error))

    def wait(self) -> None:
        """Wait until what is being saved is complete, or has failed."""
        self._settle()

    def _described(self, step: int) -> dict[str, Any]:
        """The identity, leaves and extra of a checkpoint, if it is whole and of this run."""
        found = self._read(step, "about", ocp.args.JsonRestore())
        if not isinstance(found, dict) or found.pop("digest", None) != digest(found):
            raise CheckpointError(self._damaged(step, "its description was changed", "about"))
        given, here = found["identity"], self._identity
        different = [name for name in here.keys() | given.keys() if given.get(name) != here.get(name)]
        if different:
            which = " and the ".join(sorted(different)) + (" differs" if len(different) == 1 else " differ")
            raise CheckpointError(
                f"checkpoint {step} in {self._path} is of another run: the {which}; give this run a folder of its own"
            )
        return found

    def _open(self) -> None:
        kept: list[Any] = [preservation_policy.LatestN(self._options.keep)]
        if self._options.keep_every is not None:
            kept.append(preservation_policy.EveryNSteps(self._options.keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(
                # If a thread fails to make a folder, others wait for it: five minutes, at the process's end too.
                create_directories_asynchronously=False,
                barrier_sync_fn=self._agreement.barrier if jax.process_count() > 1 else None,
            ),
        )
        try:
            self._manager = ocp.CheckpointManager(self._path, options=options)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self._path} cannot be used for checkpoints: {first_line(error)}") from error

    def _opened(self) -> Any:
        if self._manager is None:
            self._open()
        return self._manager

    def _close(self) -> None:
        with contextlib.suppress(Exception):  # what failed to be written was logged
            if self._manager is not None:
                self._manager.close()
        self._manager = None

    def _settle(self, *, alone: bool = False) -> None:
        """Wait until a save is complete, or has failed in one process and so in all."""
        problem = None
        try:
            if self._manager is not None:
                self._manager.wait_until_finished()
        except Exception as error:
            problem = problem_of(error)
        if not alone:
            problem = self._agreement.problem(problem)
        if problem is not None:
            self._failed(None, problem)

    def _failed(self, step: int | None, problem: str) -> None:
        """Log a failed save. The next use opens a new manager: the old one counts the failed step as there."""
        which = "a checkpoint" if step is None else f"checkpoint {step}"
        LOG.warning("%s could not be saved: %s; training goes on, and the next one is tried", which, problem)
        self._close()

    def _read(self, step: int, part: str, args: Any) -> Any:
        manager = self._opened()
        if step not in (steps := list(manager.all_steps())):
            raise CheckpointError(f"{self._path} has no checkpoint of step {step}; it has {steps}")
        if part == "state":
            share = jax.process_index(), jax.process_count()
            damage = self._agreement.problem(find_damage(self._path / str(step) / part, share))
            if damage is not None:
                raise CheckpointError(self._damaged(step, damage, part, args))
        try:
            return manager.restore(step, args=ocp.args.Composite(**{part: args}))[part]
        except Exception as error:  # each storage library below has errors of its own
            raise CheckpointError(self._damaged(step, first_line(error), part, args)) from error

    def _damaged(self, step: int, why: str, part: str, args: Any = None) -> str:
        """What to say of a damaged checkpoint: the newest older one from which the same can be read."""
        older = sorted((other for other in self._opened().all_steps() if other < step), reverse=True)
        whole = next((other for other in older if self._is_readable(other, part, args)), None)
        text = f"checkpoint {step} in {self._path} cannot be read: {why}. "
        if whole is None:
            return text + "No older one is whole; give the run a new folder"
        remove = ", ".join(str(other) for other in sorted({*older, step}) if other > whole)
        return f"{text}Remove the folder {remove} to go on from step {whole}, which is whole"

    def _is_readable(self, step: int, part: str, args: Any) -> bool:
        if find_damage(self._path / str(step) / "state") is not None:
            return False
        try:
            self._opened().restore(step, args=ocp.args.Composite(**{part: args or ocp.args.JsonRestore()}))
        except Exception:  # as in `_read`
            return False
        return True

    def _claim(self) -> str | None:
        """Make the folder and take its lock, in the first process; returns what is wrong."""
        if jax.process_index() != 0:
            return None
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"{self._path} is in use by another run; wait for it, or give this one a folder of its own"
        except (OSError, ValueError) as error:
            return f"{self._path} cannot be used for checkpoints: {first_line(error)}"
        return None

    def _probe(self) -> str | None:
        """Write and remove a small file, as each of several processes; returns what is wrong."""
        if jax.process_count() == 1:
            return None
        path = self._path / f"{_PROBE}.{jax.process_index()}"
        try:
            if not (self._path / _LOCK).exists():
                return f"{self._path} is not the folder of the first process; all need one that they share"
            path.write_bytes(bytes(_PROBE_BYTES))
            path.unlink()
        except OSError as error:
            return f"{self._path} cannot be written: {first_line(error)}"
        return None

    def _agree(self, problem: str | None) -> None:
        found = self._agreement.problem(problem)
        if found is not None:
            raise CheckpointError(found)

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
