"""Joins this process to its run: `initialize`, the first call of a training program."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType

from lepton_xla.errors import LaunchError, first_line
from lepton_xla.launch import coordinator
from lepton_xla.launch.heartbeat import beat
from lepton_xla.launch.membership import ADDRESS, ALONE, CLUSTER, COUNT, INDEX, Membership, explicit, slurm

_log = logging.getLogger("lepton_xla.launch")

_NONE = "none"
# JAX aborts the process when its own wait ends. Ours ends first, because it can say why.
_MARGIN_S = 30.0


def initialize(*, cluster: str | None = None, timeout_s: float = 300.0, heartbeat_s: float = 100.0) -> Membership:
    """Join this process to the others of its run. Call it first, before anything that touches a device.

    The place in the run comes from the variables that `leptonx launch` sets, else from SLURM, else from JAX's detection
    of TPU slices, Kubernetes Jobs and Open MPI. Without any of them this is the only process, and nothing is done. A
    second call only returns the place again.

    The coordinator's address is tried first, because JAX aborts the process if it cannot be reached. In a run of
    several processes an exception that nothing catches ends its process at once; by default JAX would wait five minutes
    for the others, which wait for this process.

    Args:
        cluster: `none`: run by itself, whatever the environment says; or the name of one of JAX's detection methods,
            such as `gcetpu`. The environment variable `LEPTON_CLUSTER` is the default.
        timeout_s: how long to wait for the other processes.
        heartbeat_s: how soon a process that has died ends the others.

    Raises:
        LaunchError: if variables are missing or contradict each other, the coordinator does not answer, its port is
            in use, or JAX has already touched the devices.

    >>> lx.launch.initialize(cluster="none")
    Membership(index=0, count=1, coordinator=None, local_devices=None)
    """
    import jax

    if jax.distributed.is_initialized():
        return Membership(jax.process_index(), jax.process_count())
    cluster = cluster or os.environ.get(CLUSTER) or None
    place = ALONE if cluster == _NONE else _place(os.environ, cluster)
    if place == ALONE:
        return ALONE
    beat(0, "start")
    began = time.monotonic()
    if place is not None:
        assert place.coordinator is not None
        if place.index == 0:
            coordinator.check_free(place.coordinator)
        else:
            coordinator.wait_for(place.coordinator, timeout_s, f"process {place.index} of {place.count}")
    with _Deadline(place, max(1.0, timeout_s - (time.monotonic() - began))):
        _join(place, cluster, timeout_s, heartbeat_s)
    found = Membership(jax.process_index(), jax.process_count(), place.coordinator if place else None)
    if found.count > 1:
        sys.excepthook = _end_at_once
    return found


def _place(environ: Mapping[str, str], cluster: str | None) -> Membership | None:
    """Where this process is in its run; None if JAX has to find it."""
    if cluster not in (None, "slurm"):
        return None
    place = (explicit(environ) if cluster is None else None) or slurm(environ)
    if place is not None:
        return place
    from lepton_xla._compat import cluster_is_detected

    if cluster_is_detected():
        return None
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        if importlib.util.find_spec("kubernetes") is not None:
            return None
        raise LaunchError(
            "this is a pod of an indexed Kubernetes Job, but nothing says where the others are: set "
            f"{ADDRESS}, {COUNT} and {INDEX} (`leptonx launch jobset` writes a manifest that does), or install "
            f"jax[k8s], or set {CLUSTER}=none to run one process by itself"
        )
    if environ.get(ADDRESS):
        raise LaunchError(f"{ADDRESS} is set, but {COUNT} and {INDEX} are missing: they belong together")
    return ALONE


def _join(place: Membership | None, cluster: str | None, timeout_s: float, heartbeat_s: float) -> None:
    import jax

    wait_s, alive_s = int(timeout_s + _MARGIN_S), max(1, int(heartbeat_s))
    try:
        if place is None:
            jax.distributed.initialize(
                cluster_detection_method=cluster, initialization_timeout=wait_s, heartbeat_timeout_seconds=alive_s
            )
        else:
            jax.distributed.initialize(
                place.coordinator,
                place.count,
                place.index,
                place.local_devices,
                cluster_detection_method="deactivate",
                initialization_timeout=wait_s,
                heartbeat_timeout_seconds=alive_s,
            )
    except (RuntimeError, ValueError) as error:
        raise LaunchError(f"JAX cannot join the run: {first_line(error)}") from error


class _Deadline:
    """Ends the process with a clear line if the others do not come in time.

    JAX waits in C++ and then aborts, so no exception can do this.
    """

    def __init__(self, place: Membership | None, timeout_s: float) -> None:
        who = "this process" if place is None else f"process {place.index} of {place.count} at {place.coordinator}"
        self._text = f"leptonx: {who} has waited {timeout_s:.0f} s for the others of its run; did all of them start?"
        self._timer = threading.Timer(timeout_s, self._end)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()

    def _end(self) -> None:
        os.write(2, f"{self._text}\n".encode())
        os._exit(1)


def _end_at_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an exception that nothing caught, and end the process without JAX's wait for the others."""
    sys.__excepthook__(kind, error, trace)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(1)
