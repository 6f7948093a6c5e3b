"""The documents that say how requests for a model are shared among its versions: traffic, and rollouts.

The same documents are sent, answered, and kept in the repository, in `traffic.json` beside `model.toml`.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

import msgspec

from lepton_xla.serve.protocol.adjustment import Adjustment, AdjustmentRequest
from lepton_xla.serve.protocol.uploads import parse_change

_BODY_BYTES = 1 << 16
_MOST_ARMS = 16
_MOST_RULES = 32
_ROUNDING = 1e-6
# A label, or a version.
_ARM = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}|[1-9][0-9]{0,17}")
_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}")
# These differ on every request, and are taken out of a head before its route is found.
_FLEETING = re.compile(r"traceparent|tracestate|x-request-id|b3|x-b3-[a-z]+")

_LEAST_SHARE, _MOST_SHARE = 0, 1
type Share = Annotated[float, msgspec.Meta(ge=_LEAST_SHARE, le=_MOST_SHARE)]
# The same, looked at by `Traffic`, which knows whose it is.
_BOUNDS = msgspec.Meta(extra_json_schema={"minimum": _LEAST_SHARE, "maximum": _MOST_SHARE})
type _Part = Annotated[float, _BOUNDS]
type State = Literal["shadow", "canary", "promoted", "rolled back", "stopped"]

RUNNING = ("shadow", "canary")
"""States of a rollout that goes on."""


def check_sticky(name: str) -> str:
    """Return what requests stick by, if they can.

    Raises:
        ValueError: for what is no name of a header, or of one that differs on every request.
    """
    if name and not _HEADER.fullmatch(name):
        raise ValueError(f"sticky = {name[:80]!r}: expected 'id', or the name of a request header in lower case")
    if _FLEETING.fullmatch(name):
        raise ValueError(f"sticky = {name!r}: that header differs on every request; use another, or 'id'")
    return name


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of documents that clients send; unknown or mistyped keys are errors."""


class Shadow(_Struct, frozen=True, kw_only=True):
    """Requests that another version is asked too, after the answer has been sent; its answer is compared, and dropped.

    Attributes:
        to: the label or version that is asked.
        fraction: of the requests.
    """

    to: str
    fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0


class Bandit(_Struct, frozen=True, kw_only=True):
    """Shares that follow the feedback, by Thompson sampling.

    Attributes:
        least: the smallest share of an arm, so that every one goes on being tried and estimates stay possible.
        every_s: seconds between two updates.
        promote: have `stable` moved to the arm that is surely the best, by an off-policy estimate.
        since_s: when it began, seconds since the epoch; set by whoever begins it.
    """

    least: Annotated[float, msgspec.Meta(gt=0, le=0.5)] = 0.02
    every_s: Annotated[float, msgspec.Meta(ge=1, le=3600)] = 10.0
    promote: bool = False
    since_s: Annotated[float, msgspec.Meta(ge=0, le=1e12)] = 0.0


class Traffic(_Struct, frozen=True, kw_only=True):
    """Which version answers requests that name none.

    Attributes:
        shares: label or version -> its share; they add up to 1. Empty for all to the default version.
        sticky: what keeps equal clients at one version: the name of a request header, or `id` for the request's id.
            Empty draws for each request.
        shadow: a version that is asked too.
        bandit: has the shares follow the feedback; those given are where it starts.

    >>> Traffic(shares={"stable": 0.9, "canary": 0.2})
    Traceback (most recent call last):
    ValueError: the shares add up to 1.1, not to 1
    """

    shares: dict[str, _Part] = {}
    sticky: str = ""
    shadow: Shadow | None = None
    bandit: Bandit | None = None

    def __post_init__(self) -> None:
        for arm in self.arms:
            if not _ARM.fullmatch(arm):
                raise ValueError(f"{arm[:80]!r} is neither a label nor a version")
        if len(self.shares) > _MOST_ARMS:
            raise ValueError(f"{len(self.shares)} shares; at most {_MOST_ARMS} are possible")
        for name, share in self.shares.items():
            if not _LEAST_SHARE <= share <= _MOST_SHARE:
                raise ValueError(f"the share of {name[:64]!r} is {share:.6g}; write a part of 1, such as 0.2")
        total = math.fsum(self.shares.values())
        if self.shares and abs(total - 1) > _ROUNDING:
            raise ValueError(f"the shares add up to {total:.6g}, not to 1")
        check_sticky(self.sticky)
        if self.bandit is not None:
            if len(self.shares) < 2:
                raise ValueError("a bandit needs at least two shares to start from")
            if self.bandit.least * len(self.shares) > 1:
                raise ValueError(f"{len(self.shares)} shares cannot all be at least {self.bandit.least:g}")

    @property
    def arms(self) -> tuple[str, ...]:
        """The labels and versions that it names."""
        return (*self.shares, *(() if self.shadow is None else (self.shadow.to,)))


class Stage(_Struct, frozen=True, kw_only=True):
    """One step of a rollout. It ends when the new version has given enough answers and the time has passed.

    Attributes:
        share: of the requests that name no version, which the new version answers; 0 has it asked as a shadow only.
        shadow: fraction of the other requests that it is asked too.
        answers: how many the new version must give in this stage, those of a shadow included.
        seconds: how long it lasts at least.
    """

    share: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    shadow: Share = 0.0
    answers: Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] = 100
    seconds: Annotated[float, msgspec.Meta(ge=0, le=1e7)] = 0.0

    def __post_init__(self) -> None:
        if not (self.share or self.shadow):
            raise ValueError("a stage needs a share or a shadow, or the new version is not asked")


DEFAULT_STAGES = (
    Stage(shadow=0.2, answers=200),
    Stage(share=0.05, answers=200),
    Stage(share=0.25, answers=500),
    Stage(share=0.5, answers=1000),
)
DEFAULT_ROLLBACK = (
    "errors > stable + 1%",
    "p99 > stable * 3 for 10s",
    "accuracy < stable surely",
)


class RolloutRequest(_Struct, frozen=True, kw_only=True):
    """How a new version takes the place of the one that the label `stable` stands on.

    Attributes:
        version: the new one, or a label that stands on it.
        stages: one after the other.
        rollback: rules, each of which ends the rollout as soon as it holds for the new version.
        promote: rules that must all hold after the last stage.
        sticky: as in `Traffic`.
        most_s: the rollout is rolled back when it has taken so long.
    """

    version: str
    stages: Annotated[tuple[Stage, ...], msgspec.Meta(min_length=1, max_length=32)] = DEFAULT_STAGES
    rollback: Annotated[tuple[str, ...], msgspec.Meta(max_length=_MOST_RULES)] = DEFAULT_ROLLBACK
    promote: Annotated[tuple[str, ...], msgspec.Meta(max_length=_MOST_RULES)] = ()
    sticky: str = ""
    most_s: Annotated[float, msgspec.Meta(gt=0, le=1e8)] = 86400.0

    def __post_init__(self) -> None:
        if not _ARM.fullmatch(self.version):
            raise ValueError(f"{self.version[:80]!r} is neither a label nor a version")
        check_sticky(self.sticky)


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided in a rollout.

    Attributes:
        time: UTC, ISO 8601.
        who: the name of the token that asked, or `rollout`.
        state: that it was in afterwards.
        stage: that it was in, counted from 0.
        reason: why.
        figures: what it was decided on, such as `accuracy` of the new version and `stable accuracy`.
    """

    time: str
    who: str
    state: State
    stage: int
    reason: str
    figures: dict[str, float] = {}


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout and how far it is.

    Attributes:
        plan: what was asked for.
        version: the new version.
        stable: the version in whose place it comes.
        state: `shadow` and `canary` go on; the others are ends.
        stage: the stage that it is in, counted from 0.
        share: of the requests, that the new version answers.
        reason: why it is in this state.
        started_s: when it began, seconds since the epoch.
        stage_s: when the stage began.
        decisions: all so far, the latest last.
    """

    plan: RolloutRequest
    version: str
    stable: str
    state: State
    stage: int = 0
    share: Share = 0.0
    reason: str = ""
    started_s: float = 0.0
    stage_s: float = 0.0
    decisions: tuple[Decision, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.stage < len(self.plan.stages):
            raise ValueError(f"a rollout of {len(self.plan.stages)} stages has no stage {self.stage}, counted from 0")

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.state in RUNNING

    def traffic(self) -> Traffic:
        """How requests are shared while it goes on."""
        stage = self.plan.stages[self.stage]
        shares = {self.stable: 1 - stage.share, self.version: stage.share} if stage.share else {}
        shadow = Shadow(to=self.version, fraction=stage.shadow) if stage.shadow else None
        return Traffic(shares=shares, sticky=self.plan.sticky, shadow=shadow)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What `traffic.json` holds.

    Attributes:
        traffic: as it was set.
        rollout: the last one.
        adjustment: the last one.
    """

    traffic: Traffic = Traffic()
    rollout: Rollout | None = None
    adjustment: Adjustment | None = None

    @property
    def in_force(self) -> Traffic:
        """How requests are shared now: as the rollout says while there is one."""
        return self.rollout.traffic() if self.rollout is not None and self.rollout.running else self.traffic

    @property
    def arms(self) -> frozenset[str]:
        """The labels and versions that it needs."""
        found = set(self.in_force.arms)
        if self.rollout is not None and self.rollout.running:
            found |= {self.rollout.version, self.rollout.stable}
        return frozenset(found)


class ArmFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one version: since it was loaded first, requests that named it included.

    The estimate is of the accuracy that the version would have if it got all requests, by those that were shared out.
    """

    version: str
    labels: list[str]
    share: float
    requests: int
    failures: int
    p50_s: float | None
    p99_s: float | None
    feedback_rows: int
    accuracy: float | None
    mirrored_rows: int
    agreement: float | None
    estimate: float | None
    estimate_error: float | None


class TrafficShown(msgspec.Struct, frozen=True, kw_only=True):
    """Traffic of a model, its last rollout and adjustment, and the figures of each loaded version."""

    model: str
    traffic: Traffic
    rollout: Rollout | None
    adjustment: Adjustment | None
    versions: list[ArmFigures]


def parse_body[T: (Traffic, RolloutRequest, AdjustmentRequest)](body: bytes | bytearray, kind: type[T]) -> T:
    """Read the body of a request, which may have 64 KiB.

    Raises:
        HTTPError: 400 if it is something else, 413 if it is larger.

    >>> parse_body(b'{"shares": {"stable": 0.95, "canary": 0.05}}', Traffic).shares["canary"]
    0.05
    """
    return parse_change(body, kind, _BODY_BYTES)
