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
"""How long a process has to end once its socket is closed, and beyond its own time for stopping."""

_MODULE = "lepton_xla.serve.processes.worker"


class Child:
    """A process and what is known of it.

    Attributes:
        name: for the log.
        control: the socket to it; None while it is not there.
        process: the last one started.
        ready: whether it has said so since it was started.
        reason: why it could not go on, in its own words.
        counts: what it has counted, as far as known.
        open: connections of clients, as far as known.
        heard_s: when it last said anything.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.control: Control | None = None
        self.process: asyncio.subprocess.Process | None = None
        self.forget()

    def forget(self) -> None:
        """A new process knows nothing of the last."""
        self.ready = False
        self.reason = ""
        self.counts: dict[str, Any] = {}
        self.open = 0
        self.heard_s = -math.inf

    def send(self, message: control.Message) -> None:
        """Sends a message, if there is somebody to send it to."""
        if self.control is not None:
            self.control.send(message)

    async def start(self, end: socket.socket) -> asyncio.subprocess.Process:
        """Starts it, with one end of a pair."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, *_python_flags(), "-m", _MODULE, str(end.fileno()),
            stdin=asyncio.subprocess.DEVNULL, stdout=sys.stderr, pass_fds=(end.fileno(),),
            process_group=0,  # a terminal's Ctrl-C is for the supervisor, which stops them in order
        )  # fmt: skip
        return self.process


async def ended(process: asyncio.subprocess.Process) -> int:
    """The exit code of a process that should end by itself now."""
    try:
        return await asyncio.wait_for(process.wait(), ENDING_S)
    except TimeoutError:
        process.kill()
        return await process.wait()


def _python_flags() -> list[str]:
    """What keeps a new process from importing what this one would not: modules of the working directory."""
    return [] if os.getcwd() in sys.path or "" in sys.path else ["-P"]


def run_child(main: Callable[[control.Settings, socket.socket], Awaitable[bool]]) -> int:
    """What such a process does, from its command line on; gives its exit code.

    Args:
        main: gets what the server was told, and the process's end of the pair; gives whether all went well.
    """
    # Those that have something to read again take it later.
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
