"""Adjustments as pure functions from one document to the next, and where their files are."""

from __future__ import annotations

import math
import pathlib
from datetime import UTC, datetime

import msgspec

from lepton_xla.errors import RepositoryError
from lepton_xla.serve.models.found import Found
from lepton_xla.serve.protocol.adjustment import Adjustment, AdjustmentRequest, AdjustmentStep
from lepton_xla.serve.protocol.traffic import Plan, Traffic

LABEL = "stable"
TARGET, STEP = "target.lepton", "step.lepton"
_FOLDER = ".adjustment"
_MOST_DECISIONS = 200


def folder_of(root: pathlib.Path, name: str) -> pathlib.Path:
    """Where the files of a model's adjustment are, which a scan of the repository ignores."""
    return root / name / _FOLDER


def serving(found: Found) -> str:
    """The version that answers requests without a version: that of the label `stable`, else the greatest wanted one.

    Raises:
        RepositoryError: kind `conflict`, if there is none, or a new greatest version would not be loaded.
    """
    stands = found.settings.labels.get(LABEL)
    if stands is not None and stands in found.versions:
        return stands
    newest = max(found.versions, key=int, default="")
    if not newest or newest not in found.wanted:
        raise RepositoryError(
            "conflict",
            f"nobody knows which version of model {found.name!r} to adjust: put the label 'stable' on the one that "
            "serves",
        )
    return newest


def refuse(found: Found) -> None:
    """Refuse an adjustment beside another change of the same model.

    Raises:
        RepositoryError: kind `conflict`.
    """
    plan = found.plan
    if plan.adjustment is not None and plan.adjustment.running:
        raise RepositoryError("conflict", f"model {found.name!r} is being adjusted: wait for the end, or stop it")
    if (plan.rollout is not None and plan.rollout.running) or plan.in_force != Traffic():
        raise RepositoryError("conflict", f"model {found.name!r} has a rollout or traffic shares: end that first")


def begun(plan: Plan, found: Found, asked: AdjustmentRequest, who: str, now_s: float) -> Plan:
    """The plan with an adjustment that begins.

    Raises:
        RepositoryError: kind `conflict`, see `refuse` and `serving`.
    """
    refuse(found)
    base = serving(found)
    first = Adjustment(
        plan=asked,
        base=base,
        version=base,
        started_s=now_s,
        next_s=now_s,
        labelled_stable=LABEL in found.settings.labels,
    )
    return msgspec.structs.replace(plan, adjustment=decided(first, now_s, f"{who or 'a client'} asked for it"))


def stopped(plan: Plan, found: Found, who: str, now_s: float) -> Plan:
    """The plan with its adjustment stopped; the last step goes on serving.

    Raises:
        RepositoryError: kind `missing`, where none goes on.
    """
    adjustment = plan.adjustment
    if adjustment is None or not adjustment.running:
        raise RepositoryError("missing", f"model {found.name!r} has no adjustment that goes on")
    ended = msgspec.structs.replace(adjustment, state="stopped")
    return msgspec.structs.replace(plan, adjustment=decided(ended, now_s, f"{who or 'a client'} asked to stop"))


def interfered(found: Found, now: Adjustment) -> str:
    """What somebody changed meanwhile, so that it cannot go on; empty if nothing."""
    if found.plan.rollout is not None and found.plan.rollout.running:
        return "a rollout began"
    if now.version not in found.versions:
        return f"version {now.version} was removed"
    try:
        serves = serving(found)
    except RepositoryError as error:
        return str(error)
    if serves != now.version:
        return f"version {serves} was put in the place of version {now.version}"
    return ""


def fell(now: Adjustment, right: int, wrong: int, *, least: int) -> bool:
    """Whether feedback says that accuracy fell by more than may be, by more than two standard errors.

    >>> asked = AdjustmentRequest(manifest="0" * 64, max_drop=0.01)
    >>> now = Adjustment(plan=asked, base="1", version="2", started_s=0, next_s=0, feedback_before=0.9)
    >>> fell(now, 85, 15, least=100), fell(now, 750, 250, least=100), fell(now, 5, 5, least=100)
    (False, True, False)
    """
    rows = right + wrong
    if now.feedback_before is None or rows < least:
        return False
    share = right / rows
    error = math.sqrt(max(share * (1 - share), 1 / rows) / rows)
    return share + 2 * error < now.feedback_before - now.plan.max_drop


def decided(now: Adjustment, now_s: float, reason: str, accuracy: float | None = None) -> Adjustment:
    """An adjustment after a decision, which is noted."""
    stamp = datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    step = AdjustmentStep(time=stamp, step=now.step, version=now.version, accuracy=accuracy, reason=reason)
    return msgspec.structs.replace(now, reason=reason, decisions=(*now.decisions, step)[-_MOST_DECISIONS:])
