"""Whether a rollout goes on, back, or has ended: decided on what was seen, without looking at anything itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lepton_xla.serve.models.plans import decided
from lepton_xla.serve.monitor.comparisons import Verdict
from lepton_xla.serve.protocol.traffic import Rollout

WHO = "rollout"
"""Who decides, for the audit log."""


class Seen(NamedTuple):
    """What is known at one moment.

    Attributes:
        now_s: seconds since the epoch.
        stands_on: the version that the label `stable` stands on; None for none.
        on_disk: the versions that are in the repository.
        trouble: why the new version cannot be loaded; empty while nothing is wrong.
        loaded: whether the new version is.
        answers: of the new version, in this stage.
        verdicts: rule -> what it says, those that have to hold for a time included only once they did.
    """

    now_s: float
    stands_on: str | None
    on_disk: frozenset[str]
    trouble: str
    loaded: bool
    answers: float
    verdicts: Mapping[str, Verdict]


def next_step(rollout: Rollout, seen: Seen) -> Rollout | None:
    """The rollout after the next decision; None if nothing is to be decided yet.

    A rollout that is promoted here still needs its label moved, which has to happen first: if a process is killed in
    between, the label stands on the new version, and the next look ends the rollout.
    """
    version, plan, now_s = rollout.version, rollout.plan, seen.now_s
    if seen.stands_on == version:
        return decided(rollout, WHO, now_s, "promoted", f"the label 'stable' stands on version {version}")
    if seen.stands_on != rollout.stable:
        text = f"the label 'stable' was moved from version {rollout.stable} to {seen.stands_on or 'nothing'}"
        return decided(rollout, WHO, now_s, "stopped", text)
    if rollout.stable not in seen.on_disk:
        return decided(rollout, WHO, now_s, "stopped", f"version {rollout.stable} is gone from the repository")
    if version not in seen.on_disk:
        return decided(rollout, WHO, now_s, "rolled back", f"version {version} is gone from the repository")
    if seen.trouble:
        return decided(rollout, WHO, now_s, "rolled back", f"version {version} cannot be loaded: {seen.trouble}")
    for rule in plan.rollback:
        verdict = seen.verdicts.get(rule)
        if verdict is not None and verdict.holds:
            return decided(rollout, WHO, now_s, "rolled back", rule, verdict.figures)
    if now_s - rollout.started_s > plan.most_s:
        return decided(rollout, WHO, now_s, "rolled back", f"it has taken more than {plan.most_s:g} s")
    stage = plan.stages[rollout.stage]
    if not seen.loaded or seen.answers < stage.answers or now_s - rollout.stage_s < stage.seconds:
        return None
    figures = {"answers": seen.answers}
    if rollout.stage + 1 < len(plan.stages):
        after = plan.stages[rollout.stage + 1]
        text = f"stage {rollout.stage + 1} is over: {_share_of(after.share, after.shadow)}"
        return decided(rollout, WHO, now_s, None, text, figures, rollout.stage + 1)
    verdicts = [seen.verdicts.get(rule) for rule in plan.promote]
    for verdict in verdicts:
        if verdict is None or not verdict.holds:
            return None
        figures |= verdict.figures
    text = " and ".join(plan.promote) if plan.promote else "all stages are over, and no rule speaks against it"
    return decided(rollout, WHO, now_s, "promoted", text, figures)


def _share_of(share: float, shadow: float) -> str:
    return f"{share:.4g} of the requests are next" if share else f"a shadow of {shadow:.4g} of the requests is next"
