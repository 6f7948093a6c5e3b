"""Has the shares of a bandit follow the feedback, and promotes the arm that is surely the best if it may."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from lepton_xla.serve.models.found import Found
from lepton_xla.serve.models.repository import Repository
from lepton_xla.serve.monitor.history import Counts
from lepton_xla.serve.protocol.traffic import Plan, Traffic
from lepton_xla.serve.traffic.bandit import Estimate, Rewards, off_policy, propensities, surely_best
from lepton_xla.serve.traffic.evidence import Saved, Tally, read_evidence, write_evidence

WHO = "bandit"
"""Who decides, for the audit log."""

# Shares that differ by less are the same: each change goes to all processes.
_LEAST_CHANGE = 0.005
_NONE = (0.0,) * 5


class _Run:
    """A bandit, and what is known of its versions."""

    def __init__(self, since_s: float, saved: Saved | None) -> None:
        self.since_s = since_s
        self.counts = {} if saved is None or saved.started_s != since_s else saved.counts
        self.tallies: dict[str, Tally] = {}
        self.updated_s = -1.0

    def grown(self, version: str, counts: Counts | None) -> dict[str, Any]:
        """The feedback that a version has had since the bandit began."""
        tally = self.tallies.setdefault(version, Tally(self.counts.get(version)))
        if counts is None:
            return tally.last
        return tally.grown(counts)


class Allocation:
    """Carries bandits out.

    Args:
        repository: where they are written.
        reroute: has all processes share requests as the repository says now, for a name of whom asks for it.
        record: told of every change of the shares, as `Audit.record` is.
    """

    def __init__(
        self, repository: Repository, reroute: Callable[[str, str], Any], record: Callable[..., object]
    ) -> None:
        self._repository = repository
        self._reroute = reroute
        self._record = record
        self._runs: dict[str, _Run] = {}

    def forget(self, name: str) -> None:
        """A model has no bandit."""
        self._runs.pop(name, None)

    async def look(self, name: str, found: Found, now_s: float, counts: Mapping[str, Counts]) -> None:
        """Updates the shares of a model if it is time.

        Args:
            name: the model's.
            found: what the repository holds of it; its traffic has a bandit.
            now_s: seconds since the epoch.
            counts: version -> what the server has counted, of loaded ones.
        """
        traffic, bandit = found.plan.traffic, found.plan.traffic.bandit
        assert bandit is not None
        run = self._runs.get(name)
        if run is None or run.since_s != bandit.since_s:
            run = self._runs[name] = _Run(
                bandit.since_s, await asyncio.to_thread(read_evidence, self._repository, name)
            )
        versions = {arm: found.settings.labels.get(arm, arm) for arm in traffic.shares}
        if len(set(versions.values())) < len(versions):  # a label has moved, perhaps by its promotion before a kill
            if await self._write(name, traffic, Traffic()):
                self._record(WHO, "bandit", name, "ended", reason="two of its shares are of one version now")
            return
        feedback = {
            arm: run.grown(version, counts.get(version)).get("feedback", {}) for arm, version in versions.items()
        }
        if now_s - run.updated_s < bandit.every_s:
            return
        run.updated_s = now_s
        rewards = {arm: Rewards(each.get("right", 0), each.get("wrong", 0)) for arm, each in feedback.items()}
        estimates = {arm: off_policy(each.get("weighted", _NONE)) for arm, each in feedback.items()}
        saved = Saved(run.since_s, 0, 0.0, {version: tally.kept() for version, tally in run.tallies.items()})
        await asyncio.to_thread(write_evidence, self._repository, name, saved)
        best = surely_best(estimates) if bandit.promote else None
        if best is not None:
            await self._promote(name, traffic, best, versions[best], estimates)
            return
        shares = propensities(rewards, bandit.least, seed=int(now_s))
        if max(abs(share - traffic.shares[arm]) for arm, share in shares.items()) >= _LEAST_CHANGE:
            after = msgspec.structs.replace(traffic, shares=shares)
            if await self._write(name, traffic, after):
                self._tell(name, "shares", estimates, **{f"share_{arm}": share for arm, share in shares.items()})

    async def _promote(
        self, name: str, traffic: Traffic, arm: str, version: str, estimates: Mapping[str, Estimate]
    ) -> None:
        await asyncio.to_thread(self._repository.promote, name, version)
        if await self._write(name, traffic, Traffic()):
            self._tell(name, "promoted", estimates, arm=arm, version=version)

    async def _write(self, name: str, before: Traffic, after: Traffic) -> bool:
        """Writes another traffic, unless somebody else did meanwhile; returns whether it was written."""

        def change(plan: Plan, found: Found) -> Plan:
            same = plan.traffic == before and not (plan.rollout is not None and plan.rollout.running)
            return msgspec.structs.replace(plan, traffic=after) if same else plan

        plan = await asyncio.to_thread(self._repository.replan, name, change)
        if plan.traffic != after:
            return False
        await self._reroute(name, WHO)
        return True

    def _tell(self, name: str, outcome: str, estimates: Mapping[str, Estimate], **more: str | float) -> None:
        for arm, each in estimates.items():
            if each.rows:
                more |= {f"estimate_{arm}": round(each.value, 6), f"error_{arm}": round(each.error, 6)}
        self._record(WHO, "bandit", name, outcome, **more)
