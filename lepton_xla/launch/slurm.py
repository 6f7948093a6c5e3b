"""An sbatch script for a run on the machines of a SLURM cluster."""

from __future__ import annotations

import dataclasses
import subprocess

from lepton_xla.errors import LaunchError
from lepton_xla.launch.rendering import MARGIN_S, block, one_line, render, shell, supervised


@dataclasses.dataclass(frozen=True)
class SlurmJob:
    """A run on a SLURM cluster.

    Attributes:
        command: what each task runs.
        nodes: machines.
        gpus_per_node: GPUs of each machine that the job gets; 0 to train on CPUs.
        tasks_per_node: processes on each machine; by default one for each GPU, or one.
        name: the job's name.
        cpus_per_task: CPUs of each task; None leaves it to the cluster.
        time: time limit, in a form that sbatch takes, such as `24:00:00`.
        partition: where to queue.
        account: whom to charge.
        more: further options of sbatch, such as `--qos=high`.
        setup: lines of shell that come first, such as `source .venv/bin/activate`.
        watch: the watchdog's options of `leptonx launch local`.
        max_restarts: how often all tasks are started again after a failure or a hang.
        warn_s: how long before the time limit tasks are told to save.

    Raises:
        LaunchError: if a number is out of range or a text is not one line.

    >>> print(SlurmJob(("python", "train.py"), nodes=2, gpus_per_node=8).script())
    #!/bin/bash
    # Trains on 2 machines with 8 GPUs each: 16 tasks.
    ...
    """

    command: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    tasks_per_node: int | None = None
    name: str = "train"
    cpus_per_task: int | None = None
    time: str = ""
    partition: str = ""
    account: str = ""
    more: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    watch: tuple[str, ...] = ()
    max_restarts: int = 3
    warn_s: int = 120

    def __post_init__(self) -> None:
        least = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "max_restarts": 0}
        for field, bound in {**least, "warn_s": MARGIN_S + 1}.items():
            value = getattr(self, field)
            if value is not None and value < bound:
                raise LaunchError(f"{field} must be at least {bound}, not {value}")
        for field in ("name", "time", "partition", "account"):
            value = one_line(field, getattr(self, field))
            if value.split() != [value] and value:
                raise LaunchError(f"{field} {value!r} may not have blanks")
        for option in self.more:
            if not one_line("an option of sbatch", option).startswith("-"):
                raise LaunchError(f"{option!r} is no option of sbatch: expected a form such as --qos=high")
        for line in self.setup:
            one_line("a line of setup", line)

    def script(self) -> str:
        """The script."""
        tasks = self.tasks_per_node or max(1, self.gpus_per_node)
        machines = "1 machine" if self.nodes == 1 else f"{self.nodes} machines"
        gpus = f" with {self.gpus_per_node} GPU{'s' * (self.gpus_per_node > 1)} each" if self.gpus_per_node else ""
        each = supervised(self.command, watch=self.watch, grace_s=self.warn_s - MARGIN_S)
        return render(
            "slurm.sh",
            title=f"Trains on {machines}{gpus}: {self.nodes * tasks} task{'s' * (self.nodes * tasks > 1)}.",
            name=self.name,
            nodes=self.nodes,
            tasks=tasks,
            gpus=self.gpus_per_node or "",
            cpus=self.cpus_per_task or "",
            time=self.time,
            partition=self.partition,
            account=self.account,
            more=block([f"#SBATCH {option}" for option in self.more]),
            warn_s=self.warn_s,
            setup=block(self.setup),
            command=shell(each),
            max_restarts=self.max_restarts,
        )


def send(script: str) -> str:
    """Hand a script to sbatch; returns what sbatch says.

    Raises:
        LaunchError: if there is no sbatch, or it refuses the script.
    """
    try:
        done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)  # noqa: S607
    except OSError as error:
        raise LaunchError(
            f"sbatch cannot be started: {error.strerror}; submit from a machine of the cluster"
        ) from error
    if done.returncode:
        raise LaunchError(f"sbatch refused the script: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()
