"""A JobSet manifest for a run on the GPUs or TPU slices of a Kubernetes cluster."""

from __future__ import annotations

import dataclasses
import json
import math
import re

from lepton_xla.errors import LaunchError
from lepton_xla.launch.rendering import MARGIN_S, block, label, one_line, render, supervised

_PORT = 8476
_GPU_SELECTOR = "cloud.google.com/gke-accelerator"


@dataclasses.dataclass(frozen=True)
class JobSet:
    """A run on a Kubernetes cluster: on `hosts` machines with `gpus` each, or on TPU slices of a `topology`.

    Attributes:
        command: what each pod runs.
        image: the container's image; it holds the command and leptonx.
        hosts: machines with GPUs; 0 for TPUs.
        gpus: GPUs of each machine.
        accelerator: value of the node label for the kind of accelerator, such as `tpu-v5-lite-podslice`.
        topology: of a TPU slice in chips, such as `4x4`.
        chips: TPU chips of each machine.
        slices: TPU slices.
        name: the JobSet's name.
        namespace: where it runs; empty for the present one.
        selector: further node labels.
        claims: persistent volume claims by the path at which they are mounted, such as one for checkpoints.
        watch: the watchdog's options of `leptonx launch local`.
        max_restarts: how often all pods are started again after a failure or a hang.
        warn_s: time from SIGTERM until a pod is killed.

    Raises:
        LaunchError: if a number is out of range, or a text cannot be what it is for.

    >>> print(JobSet(("python", "train.py"), "example/train:1", topology="4x4", accelerator="tpu-v5-lite-podslice")
    ...       .manifest())
    # Trains on 1 TPU slice of 4x4 chips: 4 machines each.
    ...
    """

    command: tuple[str, ...]
    image: str
    hosts: int = 0
    gpus: int = 8
    accelerator: str = ""
    topology: str = ""
    chips: int = 4
    slices: int = 1
    name: str = "train"
    namespace: str = ""
    selector: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    claims: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    watch: tuple[str, ...] = ()
    max_restarts: int = 10
    warn_s: int = 120

    def __post_init__(self) -> None:
        least = {"hosts": 0, "gpus": 1, "chips": 1, "slices": 1, "max_restarts": 0, "warn_s": MARGIN_S + 1}
        for field, bound in least.items():
            if getattr(self, field) < bound:
                raise LaunchError(f"{field} must be at least {bound}, not {getattr(self, field)}")
        if bool(self.topology) == bool(self.hosts):
            raise LaunchError("give either hosts, for GPUs, or a topology such as 4x4, for TPUs")
        if self.topology:
            if not self.accelerator:
                raise LaunchError("a TPU topology needs the kind of TPU, such as tpu-v5-lite-podslice")
            hosts_of(self.topology, self.chips)
        label("name", self.name)
        if self.namespace:
            label("namespace", self.namespace, longest=63)
        for text in (self.image, self.accelerator, *self.selector, *self.selector.values(), *self.claims):
            one_line("the manifest's text", text)
        if not self.image:
            raise LaunchError("give the container's image")
        for path, claim in self.claims.items():
            label("the claim", claim, longest=63)
            if not path.startswith("/"):
                raise LaunchError(f"the claim {claim!r} is mounted at {path!r}: expected an absolute path")

    def manifest(self) -> str:
        """The manifest, as YAML."""
        mounts = [f"- {{name: claim-{i}, mountPath: {json.dumps(path)}}}" for i, path in enumerate(self.claims)]
        volumes = [
            f"- {{name: claim-{i}, persistentVolumeClaim: {{claimName: {json.dumps(claim)}}}}}"
            for i, claim in enumerate(self.claims.values())
        ]
        shared: dict[str, object] = {
            "name": json.dumps(self.name),
            "namespace": json.dumps(self.namespace) if self.namespace else "",
            "image": json.dumps(self.image),
            "command": json.dumps(supervised(self.command, watch=self.watch, grace_s=self.warn_s - MARGIN_S)),
            "max_restarts": self.max_restarts,
            "warn_s": self.warn_s,
        }
        return self._on_tpus(mounts, volumes, shared) if self.topology else self._on_gpus(mounts, volumes, shared)

    def _on_gpus(self, mounts: list[str], volumes: list[str], shared: dict[str, object]) -> str:
        machines = "1 machine" if self.hosts == 1 else f"{self.hosts} machines"
        chosen = {_GPU_SELECTOR: self.accelerator} if self.accelerator else {}
        return render(
            "jobset-gpu.yaml",
            title=f"Trains on {machines} with {self.gpus} GPU{'s' * (self.gpus > 1)} each.",
            hosts=self.hosts,
            gpus=self.gpus,
            coordinator=f"{self.name}-worker-0-0.{self.name}:{_PORT}",
            port=_PORT,
            selector=_mapping({**chosen, **self.selector}),
            mounts=block(mounts, " " * 20),
            volumes=block(volumes, " " * 16),
            **shared,
        )

    def _on_tpus(self, mounts: list[str], volumes: list[str], shared: dict[str, object]) -> str:
        hosts = hosts_of(self.topology, self.chips)
        chosen = {
            "cloud.google.com/gke-tpu-accelerator": self.accelerator,
            "cloud.google.com/gke-tpu-topology": self.topology,
        }
        slices = f"{self.slices} TPU slice{'s' * (self.slices > 1)} of {self.topology} chips"
        return render(
            "jobset-tpu.yaml",
            title=f"Trains on {slices}: {hosts} machine{'s' * (hosts > 1)} each.",
            slices=self.slices,
            hosts=hosts,
            chips=min(self.chips, math.prod(_dimensions(self.topology))),
            selector=_mapping({**chosen, **self.selector}),
            mounts=block(["volumeMounts:", *(f"  {line}" for line in mounts)] if mounts else [], " " * 18),
            volumes=block(["volumes:", *(f"  {line}" for line in volumes)] if volumes else [], " " * 14),
            **shared,
        )


def hosts_of(topology: str, chips: int) -> int:
    """Machines of a TPU slice.

    Raises:
        LaunchError: if the topology is none, or its chips do not fill whole machines.

    >>> hosts_of("4x4", 4), hosts_of("2x2x4", 4), hosts_of("1x1", 4)
    (4, 4, 1)
    """
    total = math.prod(_dimensions(topology))
    if total > chips and total % chips:
        raise LaunchError(f"the {total} chips of the topology {topology} do not fill machines of {chips} chips each")
    return max(1, total // chips)


def _dimensions(topology: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology, re.ASCII):
        raise LaunchError(f"{topology!r} is no TPU topology: expected a form such as 4x4 or 2x2x4")
    return [int(size) for size in topology.split("x")]


def _mapping(labels: dict[str, str]) -> str:
    return json.dumps(labels) if labels else ""
