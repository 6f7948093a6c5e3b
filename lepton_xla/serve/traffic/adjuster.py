"""Carries adjustments out: makes the next weights on a thread, looks at their accuracy, and puts them as a version.

Each step is a version of weights alone in the repository, so it is put as any other is: checked, by all workers at
once, and there after a kill. `traffic.json` says how far an adjustment is. One process of a server carries it out.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import hashlib
import logging
import pathlib
import shutil
from collections.abc import Callable, Sequence
from time import time
from typing import TYPE_CHECKING, Any

import msgspec

from lepton_xla.adjustments import move_weights
from lepton_xla.errors import ArtifactError, LeptonError, RepositoryError
from lepton_xla.files.copies import listing_of
from lepton_xla.serve.models import movements
from lepton_xla.serve.models.found import Found
from lepton_xla.serve.models.manager import Entry
from lepton_xla.serve.models.plans import PLAN
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.protocol.adjustment import Adjustment
from lepton_xla.serve.protocol.traffic import Plan

if TYPE_CHECKING:
    from lepton_xla.compiler import Servable

_log = logging.getLogger("lepton_xla.serve")

WHO = "adjustment"
# Rows with feedback, of the version that serves, from which on it is believed.
_LEAST_JUDGED = 100
# Seconds in which a version that was put must be loaded.
_PATIENCE_S = 60.0
# A disk that is full, say, is tried again after so long.
_RETRY_S = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOTHING_PENDING = {"pending": "", "pending_digest": ""}

type Judged = Callable[[str, str], tuple[int, int]]
"""Rows that feedback calls right and wrong, of a model and version."""


@dataclasses.dataclass(frozen=True)
class _Made:
    """The next step, beside the versions."""

    path: pathlib.Path
    accuracy: float | None
    before: float | None
    labelled: int


class Adjuster:
    """Carries the adjustments of a repository out.

    Args:
        folder: of the repository.
        index: gives the versions and their states.
        reroute: has all processes load what the repository says now, for a name of whom asks for it.
        loaded: models of this process with a name, on whose code weights can run.
        judged: what feedback says.
        record: told of every step, as `Audit.record` is.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        index: Callable[[], Any],
        reroute: Callable[[str, str], Any],
        loaded: Callable[[str], Sequence[Any]],
        judged: Judged,
        record: Callable[..., object],
        clock: Callable[[], float] = time,
    ) -> None:
        self._repository = Repository(folder)
        self._index = index
        self._reroute = reroute
        self._loaded = loaded
        self._judged = judged
        self._record = record
        self._clock = clock
        self._not_before: dict[str, float] = {}
        self._steps: dict[str, tuple[str, int]] = {}
        self._cleared: dict[str, float] = {}  # when the adjustment began that ended, whose files are gone

    def step_of(self, name: str, version: str) -> int:
        """How many steps of an adjustment a version is; 0 for one that no adjustment has put."""
        serves, step = self._steps.get(name, ("", 0))
        return step if serves == version else 0

    async def look(self, names: Sequence[str]) -> None:
        """Does what is to be done now for models of these names."""
        for name in await asyncio.to_thread(self._planned, names):
            if self._clock() < self._not_before.get(name, 0.0):
                continue
            try:
                found = await asyncio.to_thread(self._repository.find, name)
                adjustment = found.plan.adjustment
                if adjustment is not None:
                    self._steps[name] = adjustment.version, adjustment.step if adjustment.state != "went back" else 0
                if found.problem is None and adjustment is not None and adjustment.running:
                    await self._look(name, found, adjustment)
                elif adjustment is not None and self._cleared.get(name) != adjustment.started_s:
                    await asyncio.to_thread(self._clear, name)
                    self._cleared[name] = adjustment.started_s
            except (RepositoryError, OSError) as error:
                self._not_before[name] = self._clock() + _RETRY_S
                _log.error("the adjustment of model %s cannot be carried out now: %s", name, error)
            except Exception:  # the other models' adjustments go on
                self._not_before[name] = self._clock() + _RETRY_S
                _log.exception("the adjustment of model %s cannot be carried out now", name)

    def _planned(self, names: Sequence[str]) -> list[str]:
        """Those that may have an adjustment; most models never have one, and are not read for it."""
        return [name for name in names if (self._repository.root / name / PLAN).exists()]

    async def _look(self, name: str, found: Found, now: Adjustment) -> None:
        if now.pending:  # a server was killed while it put a step
            put = found.versions.get(now.pending)
            if put is not None and now.pending_digest and await asyncio.to_thread(_digest, put) == now.pending_digest:
                await self._put(name, now, now.pending, None)
                return
            now = msgspec.structs.replace(now, **_NOTHING_PENDING)
        other = movements.interfered(found, now)
        if other:
            await self._end(name, now, "stopped", other)
            return
        if now.feedback_before is None and now.step == 0:
            right, wrong = self._judged(name, now.base)
            if right + wrong >= _LEAST_JUDGED:
                now = await self._write(
                    name, now, msgspec.structs.replace(now, feedback_before=right / (right + wrong))
                )
        if movements.fell(now, *self._judged(name, now.version), least=_LEAST_JUDGED) and now.step:
            await self._go_back(name, now, "feedback says that fewer answers are right than before")
            return
        if self._clock() < now.next_s:
            return
        if now.step == now.plan.steps:
            await self._end(name, now, "done", f"all {now.plan.steps} steps were made")
            return
        await self._step(name, found, now)

    async def _step(self, name: str, found: Found, now: Adjustment) -> None:
        try:
            made = await asyncio.to_thread(self._make, name, found, now)
        except RepositoryError:
            raise
        except LeptonError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL:
                raise error.__cause__ from error
            await self._end(name, now, "stopped", f"the next step cannot be made: {error}")
            return
        before = made.before if now.accuracy_before is None else now.accuracy_before
        now = msgspec.structs.replace(now, accuracy_before=before, labelled=made.labelled)
        if before is not None and made.accuracy is not None and made.accuracy < before - now.plan.max_drop:
            rows = f"{made.labelled} golden rows"
            why = f"the next step would be right on {made.accuracy:.4g} of {rows}; {before:.4g} is where it began"
            await self._end(name, now, "stopped", why, accuracy=made.accuracy)
            return
        version = str(max(map(int, found.versions)) + 1)
        digest = await asyncio.to_thread(_digest, made.path)
        pending = await self._write(name, now, msgspec.structs.replace(now, pending=version, pending_digest=digest))
        if pending.pending != version:  # somebody stopped it
            return
        try:
            await asyncio.to_thread(self._repository.commit, made.path, name, version)
        except RepositoryError:  # somebody's push was faster: it is seen when the adjustment is looked at again
            await self._write(name, pending, msgspec.structs.replace(pending, **_NOTHING_PENDING))
            raise
        await self._put(name, pending, version, made.accuracy)

    async def _put(self, name: str, now: Adjustment, version: str, accuracy: float | None) -> None:
        """Has a step that is in the repository serve."""
        if now.labelled_stable:
            await asyncio.to_thread(self._repository.promote, name, version, movements.LABEL)
        await self._reroute(name, WHO)
        trouble = await self._trouble(name, version)
        if trouble:
            await self._leave(name, now, version, now.version)
            await self._end(name, now, "stopped", f"step {now.step + 1} cannot be loaded: {trouble}")
            return
        step = now.step + 1
        after = msgspec.structs.replace(
            now, version=version, **_NOTHING_PENDING, step=step,
            next_s=max(now.next_s, self._clock()) + now.plan.every_s,
        )  # fmt: skip
        after = movements.decided(after, self._clock(), f"step {step} of {now.plan.steps} serves", accuracy)
        written = await self._write(name, now, after)
        figures = {} if accuracy is None else {"accuracy": accuracy}
        self._record(WHO, "adjust", f"{name}/{version}", "done", step=step, alpha=now.plan.alpha, **figures)
        _log.info("model %s version %s: %s", name, version, after.reason)
        if now.version != now.base:
            await self._remove(name, now.version)
        if not written.running and written.state == "went back":
            await self._leave(name, written, version, written.base)

    async def _trouble(self, name: str, version: str) -> str:
        """Why a version does not serve; empty once it does."""
        until = self._clock() + _PATIENCE_S
        while True:
            entries: list[Entry] = await self._index()
            for each in entries:
                if (each.name, each.version) == (name, version):
                    if each.state == "READY":
                        return ""
                    if each.state == "UNAVAILABLE":
                        return each.reason or "no reason is known"
            if self._clock() >= until:
                return f"not within {_PATIENCE_S:g} s"
            await asyncio.sleep(0.1)

    async def _go_back(self, name: str, now: Adjustment, why: str) -> None:
        await self._leave(name, now, now.version, now.base)
        await self._end(name, msgspec.structs.replace(now, version=now.base), "went back", why)

    async def _leave(self, name: str, now: Adjustment, version: str, to: str) -> None:
        """Takes a version out, so that another serves again."""
        if now.labelled_stable:
            await asyncio.to_thread(self._repository.promote, name, to, movements.LABEL)
        await self._remove(name, version)
        await self._reroute(name, WHO)

    async def _remove(self, name: str, version: str) -> None:
        try:
            await asyncio.to_thread(self._repository.remove, name, version)
        except RepositoryError as error:  # another label stands on it
            _log.info("model %s version %s stays: %s", name, version, error)

    async def _end(self, name: str, now: Adjustment, state: Any, why: str, **figures: float) -> None:
        after = movements.decided(msgspec.structs.replace(now, state=state), self._clock(), why)
        written = await self._write(name, now, after)
        if written == after:
            self._record(WHO, "adjust", f"{name}/{after.version}", state, reason=why, step=after.step, **figures)
            _log.info("adjustment of model %s: %s: %s", name, state, why)
        await asyncio.to_thread(self._clear, name)

    async def _write(self, name: str, before: Adjustment, after: Adjustment) -> Adjustment:
        """Writes how far it is; gives what is written, which is another if somebody stopped it just now."""

        def change(plan: Plan, found: Found) -> Plan:
            there = plan.adjustment
            if there is None or there.started_s != before.started_s:
                return plan
            if not there.running:  # asked to stop meanwhile: what was done is noted, and no more
                after_stop = msgspec.structs.replace(there, version=after.version, step=after.step, **_NOTHING_PENDING)
                return msgspec.structs.replace(plan, adjustment=after_stop)
            return msgspec.structs.replace(plan, adjustment=after)

        plan = await asyncio.to_thread(self._repository.replan, name, change)
        assert plan.adjustment is not None
        return plan.adjustment

    # On a thread.

    def _clear(self, name: str) -> None:
        """Removes the files of an adjustment that has ended."""
        folder = movements.folder_of(self._repository.root, name)

        def change(plan: Plan, found: Found) -> Plan:
            # Under the lock, because another may begin just now.
            if plan.adjustment is None or not plan.adjustment.running:
                shutil.rmtree(folder, ignore_errors=True)
            return plan

        if folder.exists():
            self._repository.replan(name, change)

    def _make(self, name: str, found: Found, now: Adjustment) -> _Made:
        """Makes the next step.

        Raises:
            LeptonError: if it cannot be made.
        """
        from lepton_xla.compiler import load
        from lepton_xla.compiler.requantizing import read_kept, with_weights

        folder = movements.folder_of(self._repository.root, name)
        current = found.versions[now.version]
        mine, target = read_kept(current), read_kept(folder / movements.TARGET)
        weights = move_weights(mine.master.weights, target.master.weights, now.plan.alpha)
        rows = target.golden if target.golden is not None and target.golden.label is not None else mine.golden
        rows = None if rows is None or rows.label is None else rows
        path = folder / movements.STEP
        shutil.rmtree(path, ignore_errors=True)
        kept = dataclasses.replace(mine, golden=rows)
        with_weights(kept, weights, version=str(now.step + 1), nearest=now.plan.nearest).save(path)
        base = self._base(name, now, mine.manifest.fit)
        servable = load(path, base=base)
        accuracy = before = None
        if rows is not None and rows.label is not None:
            accuracy = rows.accuracy(servable)
            if now.accuracy_before is None:
                before = rows.accuracy(load(current, base=base))
        return _Made(path, accuracy, before, 0 if rows is None or rows.label is None else len(rows.label))

    def _base(self, name: str, now: Adjustment, fit: str) -> Servable:
        """A model whose code the weights run on."""
        from lepton_xla.compiler import Servable, load

        for model in self._loaded(name):
            if isinstance(model, Servable) and model.manifest.fit == fit:
                return model
        return load(self._repository.find_base(name, now.version) or self._repository.find(name).versions[now.version])


def _digest(artifact: pathlib.Path) -> str:
    """Of its manifest, which names all that it holds; empty if that cannot be read."""
    try:
        return hashlib.sha256(listing_of(artifact)[1]).hexdigest()
    except ArtifactError:
        return ""


def check_target(folder: pathlib.Path, current: pathlib.Path, *, nearest: bool) -> None:
    """Checks that weights can move from those of a version to those of an artifact.

    Args:
        folder: the artifact.
        current: the version.
        nearest: as `AdjustmentRequest` has it.

    Raises:
        LeptonError: naming the first thing that differs or cannot be done.
    """
    from lepton_xla.compiler.fitting import check_fit
    from lepton_xla.compiler.requantizing import read_kept

    one, two = read_kept(current), read_kept(folder)
    for each in (one, two):
        if each.manifest.encryption is not None:
            raise ArtifactError("an encrypted artifact is not adjusted: its steps would not be encrypted")
    check_fit(two.manifest, one.manifest, "the new weights")
    one.master.check(nearest=nearest)
    move_weights(one.master.weights, one.master.checked(two.master.weights, "the new weights"), 1.0)
