"""A worker process: a whole server of its own, which has its connections from the supervisor.

It is started by the supervisor, as `python -m lepton_xla.serve.split.worker`, with one end of a pair.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys

from lepton_xla.errors import ServeError
from lepton_xla.serve.batching.engine import Engine
from lepton_xla.serve.batching.scheduler import Call
from lepton_xla.serve.observe.metrics import Metrics
from lepton_xla.serve.process import count_on_cores, run_on_calling_thread
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.server import schedule, watch
from lepton_xla.serve.split import control
from lepton_xla.serve.split.child import run_child
from lepton_xla.serve.split.http_process import HttpProcess


def check_device() -> None:
    """Refuses to be one of several on a device that the others would want whole too.

    Raises:
        ServeError: where models do not run on the CPU.
    """
    import jax

    platform = jax.default_backend()
    if platform != "cpu":
        raise ServeError(
            f"each of --workers holds the model, and here it would run on the {platform}: use --frontends, which share "
            "one that has the device, or set JAX_PLATFORMS=cpu"
        )


async def _main(settings: control.Settings, end: socket.socket) -> bool:
    from lepton_xla.compiler import load

    cores = max(1, len(os.sched_getaffinity(0)) // settings.workers)
    run_on_calling_thread()
    count_on_cores(cores)
    check_device()
    servable = load(settings.artifact)
    signature = signature_of(servable, settings.options.name)
    engine: Engine[Call] = Engine(servable, signature)
    measured = engine.warm_up()
    metrics = Metrics(signature.name)
    scheduler = schedule(engine, measured, signature, settings.options, metrics, cores)
    process = HttpProcess(settings, metrics, end, asyncio.get_running_loop())
    scheduler.start()
    finished = False
    try:
        ready = control.Ready(signature.name, servable.manifest.sha256)
        finished = await process.serve(signature, scheduler, ready, watch(scheduler, measured, metrics))
        return finished
    finally:
        scheduler.stop(5.0 if finished else 0.0)


if __name__ == "__main__":
    sys.exit(run_child(_main))
