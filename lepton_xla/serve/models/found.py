"""What a repository holds of one model."""

from __future__ import annotations

import dataclasses
import pathlib

from lepton_xla.serve.models.settings import ModelSettings
from lepton_xla.serve.protocol.traffic import Plan

type Stamp = tuple[int, int, int, int]
"""Device, inode, time of the last change in ns, and size of a file: they differ where it was replaced."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a repository holds of one model.

    Attributes:
        name: the model's.
        versions: version -> folder of its artifact, ascending by number.
        settings: its `model.toml`; the defaults where there is none, or it cannot be read.
        problem: why the model's folder or its `model.toml` cannot be used; None if it can. Whoever serves the model
            then keeps what it has: `versions` and `settings` do not say what is wanted.
        stamps: version -> stamp of its manifest; another one means that the version was replaced.
        plan: its `traffic.json`.
        ignored: entries of the folder that look like versions and are none, such as `v3.lepton`.
    """

    name: str
    versions: dict[str, pathlib.Path] = dataclasses.field(default_factory=dict[str, pathlib.Path])
    settings: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    problem: str | None = None
    stamps: dict[str, Stamp] = dataclasses.field(default_factory=dict[str, Stamp])
    ignored: tuple[str, ...] = ()
    plan: Plan = dataclasses.field(default_factory=Plan)

    @property
    def wanted(self) -> tuple[str, ...]:
        """The versions that the settings or the traffic ask for and that are there, ascending."""
        return self.settings.wanted(self.versions, self.plan.arms)
