"""What a client reads in the answers of a repository, which may have more; another server's answers have less.

Answers whose documents refuse nothing and have nothing that may be missing are looked at by those of the protocol.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from lepton_xla.serve.protocol.traffic import ArmFigures

type _Size = Annotated[int, msgspec.Meta(ge=0)]


class Named(TypedDict):
    """A model or a version of one."""

    name: str


class IndexedTold(TypedDict):
    """A version that is loaded, or is to be."""

    name: str
    version: NotRequired[str]
    state: NotRequired[str]
    reason: NotRequired[str]


class _Tensor(TypedDict):
    name: str
    datatype: str
    shape: list[int | str]


class MetadataTold(TypedDict):
    """What a model takes."""

    name: str
    inputs: list[_Tensor]


class MovedTold(TypedDict):
    """Where a label stood and stands."""

    stood_on: str | None
    stands_on: str


class PushedTold(TypedDict):
    """The version that was made."""

    version: str


class SizesTold(TypedDict):
    """How much of each file is there."""

    sizes: dict[str, _Size]


class PieceTold(TypedDict):
    """How much of a file is there."""

    size: _Size


class _Shared(TypedDict):
    shares: dict[str, float]
    sticky: str
    shadow: dict[str, Any] | None


class TrafficTold(TypedDict):
    """How requests for a model are shared."""

    model: str
    traffic: _Shared
    rollout: dict[str, Any] | None
    versions: list[ArmFigures]


class _Stages(TypedDict):
    stages: list[dict[str, Any]]


class _Decision(TypedDict):
    time: str
    who: str
    state: str
    stage: int
    reason: str
    figures: dict[str, float | None]  # JSON has no NaN


class RolloutTold(TypedDict):
    """A rollout and how far it is."""

    plan: _Stages
    version: str
    stable: str
    state: str
    stage: int
    share: float
    reason: str
    decisions: list[_Decision]


class _Steps(TypedDict):
    alpha: float
    steps: int
    every_s: float


class AdjustmentTold(TypedDict):
    """An adjustment and how far it is."""

    plan: _Steps
    base: str
    version: str
    state: str
