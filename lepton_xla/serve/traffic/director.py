"""Carries rollouts and bandits out: looks at versions once a second, decides, and has every process follow.

One process of a server does so. All that it needs to go on after a kill is in the repository: `traffic.json` says how
far a rollout is, and a file beside it what both versions have done since it began.
"""

from __future__ import annotations

import asyncio
import logging
import pathlib
from collections.abc import Callable, Mapping
from time import time
from typing import Any

import msgspec

from lepton_xla.errors import LeptonError, RepositoryError
from lepton_xla.profiles import Profile
from lepton_xla.serve.models.found import Found
from lepton_xla.serve.models.manager import Entry
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.monitor.alerts import Subject
from lepton_xla.serve.monitor.comparisons import Verdict, judge, parse_comparison
from lepton_xla.serve.monitor.history import Counts
from lepton_xla.serve.protocol.traffic import Plan, Rollout
from lepton_xla.serve.traffic.allocation import Allocation
from lepton_xla.serve.traffic.evidence import Saved, Tally, answers, read_evidence, write_evidence
from lepton_xla.serve.traffic.stages import WHO, Seen, next_step

_log = logging.getLogger("lepton_xla.serve")

_STABLE = "stable"
_SAVE_S = 5.0
# A version that cannot be loaded is tried again by the manager: a worker may have been killed meanwhile.
_PATIENCE_S = 10.0


type Known = tuple[Counts, tuple[float, ...], Profile | None]
"""What is known of a loaded version: its counters, the upper bounds of the bins of `request_s`, and its profile."""


class _Run:
    """A rollout that goes on, and what is known of its versions."""

    def __init__(self, rollout: Rollout, saved: Saved | None) -> None:
        kept = saved if saved is not None and saved.started_s == rollout.started_s else None
        counts = {} if kept is None else kept.counts
        self.started_s = rollout.started_s
        self.tallies = {version: Tally(counts.get(version)) for version in (rollout.version, rollout.stable)}
        self.rules = {rule: parse_comparison(rule) for rule in (*rollout.plan.rollback, *rollout.plan.promote)}
        self.held_since: dict[str, float] = {}
        self.stage, self.before = (-1, 0.0) if kept is None else (kept.stage, kept.before)
        self.trouble_since: float | None = None
        self.saved_s = 0.0

    def answers_in(self, rollout: Rollout) -> float:
        """Answers of the new version in the stage that its rollout is in."""
        given = answers(self.tallies[rollout.version].history.now)
        if self.stage != rollout.stage:
            self.stage, self.before = rollout.stage, given
        return given - self.before

    def saved(self) -> Saved:
        """What the next process needs to go on."""
        counts = {version: tally.kept() for version, tally in self.tallies.items()}
        return Saved(self.started_s, self.stage, self.before, counts)

    def verdicts(self, rollout: Rollout, now_s: float, known: Mapping[str, Known]) -> dict[str, Verdict]:
        """What the rules say."""
        subjects = {
            version: Subject(self.tallies[version].history, bounds, profile)
            for version, (_, bounds, profile) in known.items()
            if version in self.tallies
        }
        found: dict[str, Verdict] = {}
        if len(subjects) < len(self.tallies):
            return found
        for rule, comparison in self.rules.items():
            verdict = judge(comparison, subjects[rollout.version], subjects[rollout.stable])
            if verdict.holds:
                since = self.held_since.setdefault(rule, now_s)
                verdict = Verdict(now_s - since >= comparison.condition.hold_s, verdict.figures)
            elif verdict.holds is not None:
                self.held_since.pop(rule, None)
            found[rule] = verdict
        return found


class Director:
    """Carries the rollouts and bandits of a repository out.

    Args:
        folder: of the repository.
        index: gives the versions and their states.
        reroute: has all processes share requests as the repository says now, for a name of whom asks for it.
        record: told of every decision, as `Audit.record` is.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        index: Callable[[], Any],
        reroute: Callable[[str, str], Any],
        record: Callable[..., object],
        clock: Callable[[], float] = time,
    ) -> None:
        self._repository = Repository(folder)
        self._index = index
        self._reroute = reroute
        self._record = record
        self._clock = clock
        self._runs: dict[str, _Run] = {}
        self._allocation = Allocation(self._repository, reroute, record)

    async def look(self, models: Mapping[str, Mapping[str, Known]]) -> None:
        """Decides what is to be decided now.

        Args:
            models: name -> version -> what is known of it, of models whose requests are shared.
        """
        for name in [name for name in self._runs if name not in models]:
            del self._runs[name]
        for name, known in models.items():
            try:
                await self._look(name, known)
            except (LeptonError, OSError) as error:
                _log.error("the rollout of model %s cannot be carried out now: %s", name, error)

    async def revoke(self, name: str, version: str) -> bool:
        """Moves the label `stable` from a version whose certificate does not hold back to the one before.

        Returns:
            Whether to try again if it stands there still: not where it never stood elsewhere, say.
        """
        try:
            found = await asyncio.to_thread(self._repository.find, name)
            if found.settings.labels.get(_STABLE) != version:
                return True
            _, before = await asyncio.to_thread(self._repository.rollback, name, _STABLE, version)
        except (RepositoryError, OSError) as error:
            _log.error(
                "version %s of model %s keeps its label, though its certificate does not hold: %s", version, name, error
            )
            self._record("certificate", "rollback", f"{name}/{version}", "failed", reason=str(error))
            return isinstance(error, OSError) or error.kind == "failed"
        _log.warning(
            "the certificate of version %s of model %s does not hold: back to version %s", version, name, before
        )
        self._record("certificate", "rollback", f"{name}/{version}", "done", reason=f"back to version {before}")
        try:
            await self._reroute(name, "certificate")
        except RepositoryError as error:
            _log.error("the label of model %s has moved, and is not followed yet: %s", name, error)
        return True

    async def _look(self, name: str, known: Mapping[str, Known]) -> None:
        found = await asyncio.to_thread(self._repository.find, name)
        rollout, now_s = found.plan.rollout, self._clock()
        if found.problem or rollout is None or not rollout.running:
            self._runs.pop(name, None)
            if found.problem or found.plan.traffic.bandit is None:
                self._allocation.forget(name)
            else:
                counts = {version: each[0] for version, each in known.items()}
                await self._allocation.look(name, found, now_s, counts)
            return
        run = self._runs.get(name)
        if run is None or run.started_s != rollout.started_s:
            run = self._runs[name] = _Run(rollout, await asyncio.to_thread(read_evidence, self._repository, name))
        for version, tally in run.tallies.items():
            if version in known:
                tally.look(now_s, known[version][0])
        seen = Seen(
            now_s=now_s,
            stands_on=found.settings.labels.get(_STABLE),
            on_disk=frozenset(found.versions),
            trouble=await self._trouble(name, rollout, run, now_s, known),
            loaded=rollout.version in known,
            answers=run.answers_in(rollout),
            verdicts=run.verdicts(rollout, now_s, known),
        )
        after = next_step(rollout, seen)
        if after is not None:
            await self._decide(name, rollout, after)
        if after is not None or now_s - run.saved_s >= _SAVE_S:
            run.saved_s = now_s
            await asyncio.to_thread(write_evidence, self._repository, name, run.saved())

    async def _trouble(self, name: str, rollout: Rollout, run: _Run, now_s: float, known: Mapping[str, Known]) -> str:
        """Why the new version cannot be loaded, once that has been so for a while."""
        if rollout.version in known:
            run.trouble_since = None
            return ""
        entries: list[Entry] = await self._index()
        reasons = [
            each.reason for each in entries
            if each.name == name and each.version == rollout.version and each.state == "UNAVAILABLE"
        ]  # fmt: skip
        if not reasons:
            run.trouble_since = None
            return ""
        if run.trouble_since is None:
            run.trouble_since = now_s
        return reasons[0] or "no reason is known" if now_s - run.trouble_since >= _PATIENCE_S else ""

    async def _decide(self, name: str, before: Rollout, after: Rollout) -> None:
        if after.state == "promoted":
            await asyncio.to_thread(self._repository.promote, name, after.version)

        def change(plan: Plan, found: Found) -> Plan:
            # Somebody may have stopped it just now, or another server that has the same repository has decided.
            return msgspec.structs.replace(plan, rollout=after) if plan.rollout == before else plan

        plan = await asyncio.to_thread(self._repository.replan, name, change)
        if plan.rollout != after:
            return
        outcome = after.state if not after.running else "stage"
        _log.info("rollout of model %s version %s: %s: %s", name, after.version, outcome, after.reason)
        figures = {key.replace(" ", "_"): value for key, value in after.decisions[-1].figures.items()}
        self._record(
            WHO, "rollout", f"{name}/{after.version}", outcome,
            reason=after.reason, stage=after.stage + 1, share=after.share, **figures,
        )  # fmt: skip
        await self._reroute(name, WHO)
