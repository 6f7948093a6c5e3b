"""The documents of an adjustment: a model's weights move towards others in steps, while it serves."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

_SHA256 = r"\A[0-9a-f]{64}\Z"


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of documents that clients send; unknown or mistyped keys are errors."""


class AdjustmentRequest(_Struct, frozen=True, kw_only=True):
    """What begins an adjustment.

    Attributes:
        manifest: digest of the manifest of an artifact whose files were sent, with the float master to move towards.
        alpha: the part of the way that each step goes.
        steps: how many.
        every_s: seconds between two steps.
        max_drop: how much accuracy may fall, 0.01 for one of a hundred rows.
        nearest: whether codes that were chosen for calibration data may be rounded to nearest.
    """

    manifest: Annotated[str, msgspec.Meta(pattern=_SHA256)]
    alpha: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.2
    steps: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    every_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 10.0
    max_drop: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01
    nearest: bool = False


class AdjustmentStep(_Struct, frozen=True, kw_only=True):
    """One thing that was done, or decided.

    Attributes:
        time: RFC 3339, UTC.
        step: the last step that was completed then; 0 before the first.
        version: what serves then.
        accuracy: on labelled golden rows, of the step; None without any.
        reason: what happened.
    """

    time: str
    step: int
    version: str
    accuracy: float | None = None
    reason: str = ""


class Adjustment(_Struct, frozen=True, kw_only=True):
    """An adjustment and how far it is.

    Attributes:
        plan: what was asked for.
        base: the version that served before.
        state: `running`; `done`; `stopped` by somebody, or because the next step would be worse: the last step serves;
            `went back`: the base serves.
        version: the version that serves.
        pending: the version that is being made, so that a server that was killed knows it.
        pending_digest: SHA-256 of that one's manifest: another's push may have had its number in the meantime.
        step: steps that were completed.
        labelled_stable: whether the label `stable` stands on what serves, and moves with each step.
        labelled: rows with labels that accuracy is taken on.
        accuracy_before: on those rows, of the base; None without any.
        feedback_before: share of right answers of the base by feedback, when it began; None without enough.
        started_s: when it began, seconds since the epoch.
        next_s: when the next step is due.
        reason: the last decision.
        decisions: all of them.
    """

    plan: AdjustmentRequest
    base: str
    state: Literal["running", "done", "stopped", "went back"] = "running"
    version: str
    pending: str = ""
    pending_digest: str = ""
    step: int = 0
    labelled: int = 0
    labelled_stable: bool = False
    accuracy_before: float | None = None
    feedback_before: float | None = None
    started_s: float
    next_s: float
    reason: str = ""
    decisions: tuple[AdjustmentStep, ...] = ()

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.state == "running"
