"""Bodies of the routes that take feedback, and tell of drift, accuracy and alerts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from lepton_xla.errors import first_line
from lepton_xla.serve.errors import HTTPError

MAX_ID = 512
"""Characters of the id of a request that feedback may be for."""

_FEEDBACK_BODY = 1 << 20


type RightAnswers = Mapping[str, Sequence[int | str]]
"""Request id -> the right class of each row, or the one right reply."""


class FeedbackEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The right answer of one request: its class, or one for each of its rows; or the right reply, a text."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID, description="The `id` of the request.")]
    label: (
        Annotated[int, msgspec.Meta(ge=0)]
        | Annotated[tuple[int, ...], msgspec.Meta(min_length=1, max_length=65536)]
        | str
    )


class FeedbackRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Right answers of earlier requests: all are taken, or none."""

    feedback: Annotated[list[FeedbackEntry], msgspec.Meta(min_length=1, max_length=1000)]


class FeedbackTaken(msgspec.Struct, frozen=True):
    """How many rows were judged."""

    rows: int


class FeatureDrift(msgspec.Struct, frozen=True):
    """How far a feature has drifted from the profile: over the last 500 rows."""

    feature: str
    psi: float
    ks: float
    missing: float
    noise: Annotated[float, msgspec.Meta(description="The psi that chance makes of so many rows at most.")]


class LabelFigures(msgspec.Struct, frozen=True):
    """Feedback of one class, since the start."""

    label: int
    rows: int
    recall: float | None
    precision: float | None


class ModelMonitor(msgspec.Struct, frozen=True):
    """What is known of the answers of a model: drift if the artifact has a profile, accuracy if there is feedback."""

    name: str
    version: str
    drift: list[FeatureDrift]
    feedback_rows: int
    accuracy: Annotated[float | None, msgspec.Meta(description="Of the last 1,000 rows with feedback.")]
    labels: list[LabelFigures]


class AlertEntry(msgspec.Struct, frozen=True):
    """An alert rule, applied to a model version."""

    rule: str
    model: str
    version: str
    when: str
    severity: str
    state: Literal["unknown", "ok", "pending", "firing"]
    value: float | None
    since: Annotated[float, msgspec.Meta(description="When the state began, seconds since the epoch.")]


class Alerts(msgspec.Struct, frozen=True):
    """All alerts."""

    alerts: list[AlertEntry]


def feedback(body: bytes | bytearray) -> RightAnswers:
    """Decodes a feedback request.

    Raises:
        HTTPError: 400 for another body, or an id that it has twice; 413 for one far too large.
    """
    if len(body) > _FEEDBACK_BODY:
        raise HTTPError(413, f"feedback may have {_FEEDBACK_BODY} bytes; send it in parts")
    try:
        entries = msgspec.json.decode(body, type=FeedbackRequest).feedback
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPError(
            400, f'the body must be an object such as {{"feedback": [{{"id": "a", "label": 3}}]}}: {first_line(error)}'
        ) from error
    labels: RightAnswers = {
        entry.id: entry.label if isinstance(entry.label, tuple) else (entry.label,) for entry in entries
    }
    if len(labels) != len(entries):
        raise HTTPError(400, "the feedback has an id twice")
    return labels
