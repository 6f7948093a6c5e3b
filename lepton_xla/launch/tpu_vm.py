"""A script of gcloud commands for a run on a Cloud TPU slice without Kubernetes."""

from __future__ import annotations

import dataclasses
import re
import shlex

from lepton_xla.errors import LaunchError
from lepton_xla.launch.rendering import label, one_line, render, shell, supervised

# The machines have this long to save after `stop`, or before a spot machine is taken away.
_GRACE_S = 25.0


# On each machine: a virtual environment, and a file that says that setup is done.
_READY = "/opt/train"
# The machines' own Python is too old.
_SETUP = (
    "python3 -m pip install uv",
    f"uv venv --allow-existing --python 3.12 {_READY}",
    f"uv pip install --python {_READY} 'lepton-xla[tpu,train]'",
)


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """A run on one TPU slice.

    Attributes:
        command: what each machine runs, in `folder`.
        accelerator: type and size, such as `v5litepod-16`.
        version: the machines' image, such as `v2-alpha-tpuv5-lite`.
        zone: where the slice is.
        project: whose; empty for gcloud's own setting.
        name: the slice's name.
        spot: whether it is cheaper, and may be taken away.
        folder: where the program is on the machines, from their home folder.
        setup: lines of shell that each machine runs as root when it boots. By default they install Python and leptonx.
        watch: the watchdog's options of `leptonx launch local`.
        max_restarts: how often all machines are started again after a failure or a hang.

    Raises:
        LaunchError: if a text cannot be what it is for, or a number is out of range.

    >>> print(TpuVm(("python", "train.py"), "v5litepod-16", "v2-alpha-tpuv5-lite", "us-east5-a").script())
    #!/bin/bash
    # Trains on the TPU slice train, v5litepod-16.
    ...
    """

    command: tuple[str, ...]
    accelerator: str
    version: str
    zone: str
    project: str = ""
    name: str = "train"
    spot: bool = False
    folder: str = "train"
    setup: tuple[str, ...] = _SETUP
    watch: tuple[str, ...] = ()
    max_restarts: int = 3

    def __post_init__(self) -> None:
        label("name", self.name)
        for field in ("accelerator", "version", "zone"):
            value = getattr(self, field)
            if not re.fullmatch(r"[a-z0-9][-a-z0-9.]*", value):
                raise LaunchError(f"{field} {value!r}: expected lower-case letters, digits and dashes")
        if self.project and not re.fullmatch(r"[a-z][-a-z0-9:.]*", self.project):
            raise LaunchError(f"project {self.project!r}: expected lower-case letters, digits and dashes")
        if not re.fullmatch(r"[\w.~-][\w./~-]*", self.folder, re.ASCII):
            raise LaunchError(f"folder {self.folder!r}: expected a path without blanks")
        if self.max_restarts < 0:
            raise LaunchError(f"max_restarts must be at least 0, not {self.max_restarts}")
        for line in self.setup:
            if one_line("a line of setup", line) == "STARTUP":
                raise LaunchError("a line of setup may not be STARTUP, which ends the startup script")

    def script(self) -> str:
        """The script."""
        each = shell(supervised(self.command, watch=self.watch, grace_s=_GRACE_S))
        return render(
            "tpu-vm.sh",
            title=f"Trains on the TPU slice {self.name}, {self.accelerator}.",
            name=self.name,
            where=f"--zone={self.zone}" + (f" --project={self.project}" if self.project else ""),
            accelerator=self.accelerator,
            version=self.version,
            spot="--spot" if self.spot else "",
            setup="\n".join(self.setup),
            folder=self.folder,
            command=shlex.quote(f"cd {self.folder} && PATH={_READY}/bin:$PATH exec {each}"),
            ready=_READY,
            max_restarts=self.max_restarts,
        )
