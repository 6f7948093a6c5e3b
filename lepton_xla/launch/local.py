"""The options of `leptonx launch local`, and the environment that each process gets."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
from collections.abc import Generator, Mapping

from lepton_xla.errors import LaunchError
from lepton_xla.launch import coordinator
from lepton_xla.launch.membership import ADDRESS, COUNT, INDEX
from lepton_xla.launch.watchdog import Limits

HOST = "127.0.0.1"

# Where a process that is alone on its machine finds its number in a larger run: for messages, not for joining it.
_NUMBERS = (INDEX, "SLURM_PROCID", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to start on this machine, and when to start it again.

    Attributes:
        command: the program and its arguments.
        processes: how many. One process joins the run of the environment it is in, such as SLURM's, or none.
        devices: of each process: CPU devices, and with several processes its share of the machine's accelerators; None
            leaves both to JAX.
        limits: the watchdog's; None for no watchdog.
        max_restarts: how often in a row all processes are started again after one of them has failed or hangs.
        restart_preempted: whether processes that ended by exit code 75 are started again too.
        grace_s: after a signal to stop, how long processes may take before they are killed.
        port: the coordinator's; 0 picks a free one.

    Raises:
        LaunchError: if a number is out of range, or there is no such command.

    >>> Options(("python", "train.py"), processes=2).processes
    2
    """

    command: tuple[str, ...]
    processes: int = 1
    devices: int | None = None
    limits: Limits | None = None
    max_restarts: int = 0
    restart_preempted: bool = False
    grace_s: float = 60.0
    port: int = 0

    def __post_init__(self) -> None:
        for name, least in (("processes", 1), ("devices", 1), ("max_restarts", 0), ("grace_s", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise LaunchError(f"{name} must be at least {least}, not {value}")
        if not 0 <= self.port < 65536:
            raise LaunchError(f"port must be 0 to 65535, not {self.port}")
        if not self.command:
            raise LaunchError("give the command to start, such as `-- python train.py`")
        if shutil.which(self.command[0]) is None:
            there = os.path.exists(self.command[0])
            raise LaunchError(f"{self.command[0]}: {'this file is not executable' if there else 'no such command'}")


def numbers(options: Options, environ: Mapping[str, str]) -> list[int]:
    """The number of each process in its run."""
    if options.processes > 1:
        return list(range(options.processes))
    texts = (environ.get(name, "") for name in _NUMBERS)
    return [next((int(text) for text in texts if text.isascii() and text.isdigit()), 0)]


def is_member(environ: Mapping[str, str]) -> bool:
    """Whether a single process seems to be one of a larger run."""
    return any(name in environ for name in _NUMBERS)


@contextlib.contextmanager
def coordinated(options: Options, environ: Mapping[str, str]) -> Generator[list[dict[str, str]], None, None]:
    """The environment of each process. The coordinator's port is kept for them inside the block.

    Raises:
        LaunchError: if the port is in use.
    """
    base = {"PYTHONUNBUFFERED": "1", **environ}
    if options.devices is not None:
        base["JAX_NUM_CPU_DEVICES"] = str(options.devices)
    if options.processes == 1:
        yield [base]
        return
    with _reserved(options.port) as held:
        address = f"{HOST}:{held.getsockname()[1]}"
        base |= {
            ADDRESS: address,
            "JAX_COORDINATOR_BIND_ADDRESS": address,  # other machines need not reach it
            COUNT: str(options.processes),
        }
        yield [base | {INDEX: str(rank)} | _accelerators(options, rank) for rank in range(options.processes)]


def _reserved(port: int) -> socket.socket:
    if port:
        coordinator.check_free(f"{HOST}:{port}")
    try:
        return coordinator.reserve(port)
    except OSError as error:
        raise LaunchError(f"the coordinator's port {port} cannot be had: {error.strerror}") from error


def _accelerators(options: Options, rank: int) -> dict[str, str]:
    each = options.devices
    if each is None:
        return {}
    return {"JAX_LOCAL_DEVICE_IDS": ",".join(str(rank * each + device) for device in range(each))}
