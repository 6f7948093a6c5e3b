"""Which process of which run this is, read from environment variables. Pure: opens no connection, imports no JAX."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from lepton_xla.errors import LaunchError

ADDRESS = "JAX_COORDINATOR_ADDRESS"  # JAX's own
COUNT = "LEPTON_NUM_PROCESSES"
INDEX = "LEPTON_PROCESS_ID"
CLUSTER = "LEPTON_CLUSTER"

# SLURM sets all of them in the tasks that srun starts. An ssh session into a node, or a batch script, has some of them.
_SLURM_TASK = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# As JAX does: a port of the dynamic range for each job.
_FIRST_PORT, _PORTS = 61440, 4096


@dataclasses.dataclass(frozen=True)
class Membership:
    """A process's place in a run.

    Attributes:
        index: number of this process, from 0.
        count: number of processes in the run.
        coordinator: `host:port` where process 0 listens; None if this is the only process, or JAX found it by itself.
        local_devices: numbers of the accelerators that this process may use; None for all it can see.

    >>> from lepton_xla.launch import Membership
    >>> Membership(index=1, count=4, coordinator="node1:1234").count
    4
    """

    index: int
    count: int
    coordinator: str | None = None
    local_devices: tuple[int, ...] | None = None


ALONE = Membership(0, 1)


def explicit(environ: Mapping[str, str]) -> Membership | None:
    """The place that `leptonx launch` wrote into the variables, None if it wrote none.

    Raises:
        LaunchError: if some of the variables are missing or no numbers.
    """
    if COUNT not in environ and INDEX not in environ:
        return None
    if environ.get(COUNT) == "1":
        return ALONE
    missing = [name for name in (ADDRESS, COUNT, INDEX) if not environ.get(name)]
    if missing:
        raise LaunchError(f"{ADDRESS}, {COUNT} and {INDEX} belong together, but {' and '.join(missing)} is missing")
    count, index = _number(environ, COUNT), _number(environ, INDEX)
    return _checked(Membership(index, count, environ[ADDRESS]))


def slurm(environ: Mapping[str, str]) -> Membership | None:
    """The place of a task that `srun` started, None outside SLURM and in jobs of one task.

    Raises:
        LaunchError: if this process is inside a job but no task of `srun`, as in an ssh session into one of its nodes.
    """
    if "SLURM_JOB_ID" not in environ:
        return None
    missing = [name for name in _SLURM_TASK if not environ.get(name)]
    if missing:
        if environ.get("SLURM_NTASKS", environ.get("SLURM_JOB_NUM_NODES")) == "1":
            return None
        raise LaunchError(
            f"SLURM_JOB_ID={environ['SLURM_JOB_ID']} says that this is inside a SLURM job, but {', '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} missing, so srun has not started this process (an ssh session, or "
            f"the batch script itself?): start it with srun, or set {CLUSTER}=none to run one process by itself"
        )
    count = _number(environ, "SLURM_NTASKS")
    if count == 1:
        return None
    port = environ.get("JAX_COORDINATOR_PORT") or _FIRST_PORT + _number(environ, "SLURM_JOB_ID") % _PORTS
    address = environ.get(ADDRESS) or f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}"
    return _checked(Membership(_number(environ, "SLURM_PROCID"), count, address, _share_of_devices(environ)))


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list.

    >>> [first_host(nodes) for nodes in ("node7", "n[008-011,3],m1", "gpu[1-2]-ib0,x")]
    ['node7', 'n008', 'gpu1-ib0']
    """
    found = re.match(r"([^\[,]+)(?:\[([^\]\-,]+)[^\]]*\]([^\[,]*))?", nodes)
    if not found:
        raise LaunchError(f"SLURM_STEP_NODELIST={nodes!r} names no node")
    prefix, number, suffix = found.groups()
    return prefix + (number or "") + (suffix or "")


def _share_of_devices(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """This task's part of the GPUs that all tasks of its node see; None if it sees only its own."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = len(visible.split(",")) if visible else _count(environ.get("SLURM_GPUS_ON_NODE", ""))
    tasks = _tasks_on_node(environ)
    if environ.get("JAX_LOCAL_DEVICE_IDS") or tasks <= 1 or gpus <= 1:
        return None
    if gpus % tasks:
        raise LaunchError(
            f"{gpus} GPUs cannot be divided among the {tasks} tasks of this node: set JAX_LOCAL_DEVICE_IDS for each, "
            "or choose --ntasks-per-node"
        )
    each, local = gpus // tasks, _number(environ, "SLURM_LOCALID")
    return tuple(range(local * each, (local + 1) * each))


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    """From SLURM's compressed list, such as `8(x2),4`, the entry of this node."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1"
    counts: list[int] = []
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(repeats or 1)
    node = _count(environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 1


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not text.isascii() or not text.isdigit():
        raise LaunchError(f"{name}={text!r} is not a whole number")
    return int(text)


def _checked(place: Membership) -> Membership:
    if place.index >= place.count:
        raise LaunchError(f"process {place.index} of {place.count}: processes are numbered from 0")
    return place
