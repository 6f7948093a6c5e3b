"""A process under the supervisor."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import sys
from typing import Any

from lepton_xla.serve.split import control
from lepton_xla.serve.split.control import Control

ENDING_S = 5.0
"""How long a process has to end once its socket is closed, and beyond its own time for stopping."""


class Child:
    """A process and what is known of it.

    Attributes:
        name: for the log.
        module: what it runs.
        control: the socket to it; None while it is not there.
        process: the last one started.
        ready: whether it has said so since it was started.
        reason: why it could not go on, in its own words.
        counts: what it has counted, as far as known.
        open: connections of clients, as far as known.
        heard_s: when it last said anything.
    """

    def __init__(self, name: str, module: str) -> None:
        self.name = name
        self.module = module
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
            sys.executable, *_python_flags(), "-m", self.module, str(end.fileno()),
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
