"""What a run decided about its compression, as data: with it, and the original model, a stage is built again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import msgspec
import numpy as np
from jax.experimental import multihost_utils

from lepton_xla.errors import CheckpointError
from lepton_xla.passes.shrinking.groups import Masks
from lepton_xla.report import PassReport, SiteReport


@dataclasses.dataclass(frozen=True)
class Decisions:
    """What was decided up to a step.

    Attributes:
        passed: the changes that are done: `shrink`, `quantize`, `freeze`.
        cuts: which slices of weights and model state stay.
        ranges: site name -> frozen range of its activation.
        report: what shrinking removed; None before.
    """

    passed: tuple[str, ...] = ()
    cuts: Masks = dataclasses.field(default_factory=dict[str, Any])
    ranges: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict[str, Any])
    report: PassReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and texts."""
        cuts = {
            path: [None if mask is None else {"shape": list(mask.shape), "bits": _hex(mask)} for mask in masks]
            for path, masks in self.cuts.items()
        }
        ranges = {name: np.asarray(value, np.float32).tolist() for name, value in self.ranges.items()}
        report = self.report.to_json() if self.report is not None else None
        return {"passed": list(self.passed), "cuts": cuts, "ranges": ranges, "report": report}

    @staticmethod
    def from_json(data: Any, shapes: Mapping[str, Any]) -> Decisions:
        """Read what `to_json` wrote, for weights and model state of these shapes.

        Raises:
            CheckpointError: if it is nothing of the kind, or belongs to other weights.
        """
        try:
            cuts = {
                path: tuple(None if mask is None else _mask(mask) for mask in masks)
                for path, masks in data["cuts"].items()
            }
            ranges = {name: np.asarray(value, np.float32) for name, value in data["ranges"].items()}
            report = _report(data["report"]) if data["report"] is not None else None
            found = Decisions(tuple(data["passed"]), cuts, ranges, report)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"what a checkpoint says of its compression cannot be read: {error!r}") from error
        for path, masks in cuts.items():
            sizes = [None if mask is None else mask.shape[mask.ndim - 1] for mask in masks]
            have = shapes[path].shape if path in shapes else None
            if (
                have is None
                or len(have) != len(sizes)
                or any(size not in (None, dimension) for size, dimension in zip(sizes, have, strict=True))
            ):
                raise CheckpointError(
                    f"the checkpoint's run has shrunk {path!r}, which this model has not, or in another shape; resume "
                    "it with the model that it began with"
                )
        return found


def agreed(decisions: Decisions, shapes: Mapping[str, Any]) -> Decisions:
    """The decisions of the first process, in all: others may have rounded, and so ranked, differently."""
    if jax.process_count() == 1:
        return decisions
    text = np.frombuffer(msgspec.json.encode(decisions.to_json()), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    mine = text if jax.process_index() == 0 else np.zeros(size, np.uint8)
    given = np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8)
    return Decisions.from_json(msgspec.json.decode(given.tobytes()), shapes)


def _hex(mask: np.ndarray) -> str:
    return np.packbits(mask.astype(bool)).tobytes().hex()


def _mask(data: Mapping[str, Any]) -> np.ndarray:
    count = int(np.prod(data["shape"], dtype=np.int64))
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(data["bits"]), np.uint8), count=count)
    return bits.astype(bool).reshape(data["shape"])


def _report(data: Mapping[str, Any]) -> PassReport:
    sites: list[SiteReport] = []
    for site in data["sites"]:
        fields: dict[str, Any] = {**site, "notes": tuple(site["notes"])}
        sites.append(SiteReport(**fields))
    return PassReport(data["name"], data["seconds"], tuple(sites), data["metrics"])
