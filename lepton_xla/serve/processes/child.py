"""A worker process: as the supervisor has it, and how it starts."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from lepton_xla.errors import LeptonError
from lepton_xla.serve.observe.logs import configure
from lepton_xla.serve.processes import control
from lepton_xla.serve.processes.control import Control

ENDING_S = 5.0
"""How long a worker may take to exit once its socket is closed, or beyond its own time for stopping."""

_MODULE = "lepton_xla.serve.processes.worker"


class Child:
    """A worker as the supervisor sees it.

    Attributes:
        name: name in the log.
        control: the socket to it; None while it does not run.
        process: the last one started.
        ready: whether it has reported that it is ready since it was started.
        reason: why it could not go on, as it reported.
        counts: the counts it last reported.
        counting: those of a report of which more is to come.
        labels: feedback of which more is to come.
        open: the number of client connections it last reported.
        heard_s: when its last message came.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.control: Control | None = None
        self.process: asyncio.subprocess.Process | None = None
        self.forget()

    def forget(self) -> None:
        """Resets what was known of the previous process."""
        self.ready = False
        self.reason = ""
        self.counts: dict[str, Any] = {}
        self.counting: dict[str, Any] = {}
        self.labels = control.Labels()
        self.open = 0
        self.heard_s = -math.inf

    def send(self, message: control.Message) -> None:
        """Sends a message, if the worker runs."""
        if self.control is not None:
            self.control.send(message)

    def count(self, message: control.Counts) -> None:
        """Takes a report, or a part of one."""
        self.counting |= message.counts
        if message.last:
            self.counts, self.counting = self.counting, {}

    async def start(self, end: socket.socket) -> asyncio.subprocess.Process:
        """Starts the process with one end of a pair."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, *_python_flags(), "-m", _MODULE, str(end.fileno()),
            stdin=asyncio.subprocess.DEVNULL, stdout=sys.stderr, pass_fds=(end.fileno(),),
            process_group=0,  # a terminal's Ctrl-C is for the supervisor, which stops them in order
        )  # fmt: skip
        return self.process


async def ended(process: asyncio.subprocess.Process) -> int:
    """Waits for a process that should exit by itself, kills it if it takes too long, and returns its exit code."""
    try:
        return await asyncio.wait_for(process.wait(), ENDING_S)
    except TimeoutError:
        process.kill()
        return await process.wait()


def _python_flags() -> list[str]:
    """Flags that keep a new process from importing modules of the working directory, if this one would not."""
    return [] if os.getcwd() in sys.path or "" in sys.path else ["-P"]


def run_child(main: Callable[[control.Settings, socket.socket], Awaitable[bool]]) -> int:
    """Runs a worker from its command line on; returns its exit code.

    Args:
        main: called with the server's settings and this end of the pair; returns whether all went well.
    """
    # Until there is something to reload.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end = socket.socket(fileno=int(sys.argv[1]))
    settings = control.settings_of(end)
    configure(settings.json_logs)

    async def run() -> bool:
        return await main(settings, end)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return 0 if runner.run(run()) else 1
    except LeptonError as error:
        control.say(end, control.Failed(str(error)))
        return 1
