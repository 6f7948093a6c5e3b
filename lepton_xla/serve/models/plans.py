"""`traffic.json`: how requests for a model are shared among its versions, and the rollout of a new one.

Pure functions from one plan to the next; the repository writes what they return, under its lock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime

import msgspec

from lepton_xla.errors import RepositoryError, ServeError, first_line
from lepton_xla.serve.models.found import Found
from lepton_xla.serve.models.settings import check_version, is_version
from lepton_xla.serve.monitor.comparisons import parse_comparison
from lepton_xla.serve.protocol.traffic import Decision, Plan, Rollout, RolloutRequest, State, Traffic

PLAN = "traffic.json"
_STABLE = "stable"
_MOST_DECISIONS = 200


def read_plan(text: str | None) -> Plan:
    """Read the text of a `traffic.json`; the default where there is none.

    Raises:
        RepositoryError: kind `invalid`.
    """
    if text is None:
        return Plan()
    try:
        return msgspec.json.decode(text, type=Plan)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise RepositoryError("invalid", f"{PLAN}: {first_line(error)}") from error


def write_plan(plan: Plan) -> bytes:
    """The bytes of a `traffic.json`."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n"


def versions_of(arms: Collection[str], labels: Mapping[str, str]) -> set[str]:
    """The versions that labels or versions stand for; labels that stand on nothing are left out.

    >>> sorted(versions_of(["stable", "7", "gone"], {"stable": "3"}))
    ['3', '7']
    """
    return {labels.get(arm, arm) for arm in arms if arm in labels or is_version(arm)}


def with_traffic(plan: Plan, found: Found, traffic: Traffic, now_s: float = 0.0) -> Plan:
    """The plan with another traffic; a bandit begins now.

    Raises:
        RepositoryError: `missing` for an arm that is not there, `conflict` within a rollout, or for a bandit with one
            version twice.
    """
    _refuse_beside_changes(plan, found)
    versions = {arm: resolve(arm, found) for arm in traffic.arms}
    if traffic.bandit is not None:
        chosen = [versions[arm] for arm in traffic.shares]
        if len(set(chosen)) < len(chosen):
            twice = next(version for version in chosen if chosen.count(version) > 1)
            raise RepositoryError("conflict", f"a bandit chooses among versions, and two shares are of version {twice}")
        traffic = msgspec.structs.replace(traffic, bandit=msgspec.structs.replace(traffic.bandit, since_s=now_s))
    return msgspec.structs.replace(plan, traffic=traffic)


def resolve(arm: str, found: Found) -> str:
    """The version that a label or version stands for.

    Raises:
        RepositoryError: kind `missing`, if there is none.
    """
    labels = found.settings.labels
    if arm not in labels and not is_version(arm):
        known = ", ".join(labels) or "none"
        raise RepositoryError("missing", f"model {found.name!r} has no label {arm!r}; there: {known}")
    version = labels.get(arm, arm)
    if version not in found.versions:
        stands = f", which the label {arm!r} stands on" if arm in labels else ""
        there = ", ".join(found.versions) or "none"
        raise RepositoryError("missing", f"model {found.name!r} has no version {version}{stands}; there: {there}")
    return version


def with_rollout(plan: Plan, found: Found, asked: RolloutRequest, who: str, now_s: float) -> Plan:
    """The plan with a rollout that begins.

    Raises:
        RepositoryError: `missing` for a version or a label that is not there, `invalid` for rules that do not parse,
            `conflict` where there is a rollout or traffic already, or the version is the stable one.
    """
    for rule in (*asked.rollback, *asked.promote):
        try:
            parse_comparison(rule)
        except ServeError as error:
            raise RepositoryError("invalid", str(error)) from error
    _refuse_beside_changes(plan, found)
    if plan.traffic != Traffic():
        raise RepositoryError(
            "conflict", f"model {found.name!r} has traffic shares, which a rollout would set: clear them first"
        )
    version = resolve(asked.version, found)
    stable = found.settings.labels.get(_STABLE)
    if stable is None:
        raise RepositoryError(
            "conflict",
            f"the label 'stable' of model {found.name!r} stands nowhere, so nobody knows what to go back to: promote "
            "the version that serves now",
        )
    check_version(stable)
    resolve(_STABLE, found)
    if version == stable:
        raise RepositoryError("conflict", f"version {version} of model {found.name!r} is the stable one already")
    first = asked.stages[0]
    rollout = Rollout(
        plan=asked, version=version, stable=stable, state="canary" if first.share else "shadow", share=first.share,
        started_s=now_s, stage_s=now_s,
    )  # fmt: skip
    begun = decided(rollout, who, now_s, reason=f"version {version} is to take the place of version {stable}")
    return msgspec.structs.replace(plan, rollout=begun)


def with_stop(plan: Plan, found: Found, who: str, now_s: float) -> Plan:
    """The plan with its rollout stopped: all requests go to the stable version again.

    Raises:
        RepositoryError: kind `missing`, where none goes on.
    """
    rollout = plan.rollout
    if rollout is None or not rollout.running:
        raise RepositoryError("missing", f"model {found.name!r} has no rollout that goes on")
    return msgspec.structs.replace(plan, rollout=decided(rollout, who, now_s, "stopped", "asked to"))


def decided(
    rollout: Rollout,
    who: str,
    now_s: float,
    state: State | None = None,
    reason: str = "",
    figures: Mapping[str, float] | None = None,
    stage: int | None = None,
) -> Rollout:
    """A rollout after a decision, which is noted.

    Args:
        rollout: before.
        who: decided.
        now_s: when, seconds since the epoch.
        state: afterwards; None for that of the stage.
        reason: why.
        figures: what it was decided on.
        stage: the stage that begins; None if none does.
    """
    at = rollout.stage if stage is None else stage
    share = rollout.plan.stages[at].share
    if state is None:
        state = "canary" if share else "shadow"
    time = datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds")
    decision = Decision(time=time, who=who, state=state, stage=at, reason=reason, figures=dict(figures or {}))
    return msgspec.structs.replace(
        rollout,
        state=state,
        stage=at,
        share=share if state in ("shadow", "canary") else float(state == "promoted"),
        reason=reason,
        stage_s=rollout.stage_s if stage is None else now_s,
        decisions=(*rollout.decisions, decision)[-_MOST_DECISIONS:],
    )


def refuse_in_use(plan: Plan, found: Found, version: str) -> None:
    """Refuse to remove a version that requests are sent to.

    Raises:
        RepositoryError: kind `conflict`.
    """
    if version in versions_of(plan.arms, found.settings.labels):
        what = "rollout" if plan.rollout is not None and plan.rollout.running else "traffic"
        raise RepositoryError(
            "conflict", f"version {version} of model {found.name!r} has a part in its {what}: end that first"
        )


def _refuse_beside_changes(plan: Plan, found: Found) -> None:
    """Refuses what cannot begin while an adjustment or a rollout goes on."""
    if plan.adjustment is not None and plan.adjustment.running:
        raise RepositoryError("conflict", f"model {found.name!r} is being adjusted: wait for the end, or stop it")
    if plan.rollout is not None and plan.rollout.running:
        raise RepositoryError(
            "conflict",
            f"model {found.name!r} has a rollout of version {plan.rollout.version} that goes on: wait for its end, or "
            "stop it",
        )
