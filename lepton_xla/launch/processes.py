"""The processes of one attempt: started together, in a process group of their own, and all ended together."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence

from lepton_xla.errors import LaunchError
from lepton_xla.launch import guard
from lepton_xla.launch.heartbeat import FILE_VARIABLE, Beat, Heartbeat
from lepton_xla.launch.logs import Lines, pump

# How long the output of processes that have ended may still come, from descendants that left the group.
_LAST_WORDS_S = 1.0


@dataclasses.dataclass
class Rank:
    """One process.

    Attributes:
        number: its number in the run.
        process: the process.
        heartbeat: its file of progress.
        code: its exit code, or minus the number of the signal that killed it; None while it runs.
    """

    number: int
    process: asyncio.subprocess.Process
    heartbeat: pathlib.Path
    code: int | None = None

    @property
    def ending(self) -> str:
        """How it ended, for people."""
        assert self.code is not None
        if self.code < 0:
            return f"was killed by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}"

    def beat(self) -> Beat | None:
        """What it last told of its progress."""
        return Heartbeat.read(self.heartbeat)


class Group:
    """The processes of one attempt. Use as an asynchronous context manager; nothing of them is left after it.

    All are in one process group, which the guard leads. So whatever they start themselves is ended too, and the guard
    ends all of it if the launcher is killed.

    Args:
        command: the program and its arguments.
        environs: the environment of each process.
        numbers: the number of each process in its run.
        folder: an empty folder for their heartbeats; the guard removes it if the launcher is killed.
        outputs: where their stdout and stderr go.
        prefixed: whether lines begin with the number of the process.
    """

    def __init__(
        self,
        command: Sequence[str],
        environs: Sequence[Mapping[str, str]],
        numbers: Sequence[int],
        folder: pathlib.Path,
        outputs: tuple[Lines, Lines],
        *,
        prefixed: bool,
    ) -> None:
        self._command = command
        self._environs = environs
        self._numbers = numbers
        self._folder = folder
        self._outputs = outputs
        self._prefixed = prefixed
        self._pumps: list[asyncio.Task[None]] = []
        self._transports: list[asyncio.BaseTransport] = []
        self.ranks: list[Rank] = []

    async def __aenter__(self) -> Group:
        self._guard = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", guard.__file__, str(self._folder),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, process_group=0,
        )  # fmt: skip
        try:
            for number, environ in zip(self._numbers, self._environs, strict=True):
                self.ranks.append(await self._start(number, environ))
        except BaseException:
            await self._end()
            raise
        return self

    async def _start(self, number: int, environ: Mapping[str, str]) -> Rank:
        heartbeat = self._folder / f"rank-{number}"
        shown = number if self._prefixed else None
        # Pipes of our own: with asyncio's, a process counts as running until its children close theirs too.
        out, err = [await self._pipe(shown, lines) for lines in self._outputs]
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=err,
                env={**environ, FILE_VARIABLE: str(heartbeat)}, process_group=self._guard.pid,
            )  # fmt: skip
        except OSError as error:
            raise LaunchError(f"{self._command[0]} cannot be started: {error.strerror}") from error
        finally:
            os.close(out)
            os.close(err)
        return Rank(number, process, heartbeat)

    async def _pipe(self, shown: int | None, lines: Lines) -> int:
        """A pipe whose lines are copied; returns the end to write to."""
        read_end, write_end = os.pipe()
        reader = asyncio.StreamReader()
        source = os.fdopen(read_end, "rb", buffering=0)  # closed by the transport
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), source
        )
        self._transports.append(transport)
        self._pumps.append(asyncio.create_task(pump(reader, shown, lines)))
        return write_end

    async def __aexit__(self, *exc: object) -> None:
        await self._end()

    async def wait(self, rank: Rank) -> Rank:
        """Waits until a process has ended."""
        rank.code = await rank.process.wait()
        return rank

    def signal(self, number: int) -> None:
        """Sends a signal to each process that runs, not to what these have started: their loaders, say, must live until
        the last step."""
        for rank in self.ranks:
            if rank.code is None:
                with contextlib.suppress(ProcessLookupError):
                    rank.process.send_signal(number)

    def kill(self) -> None:
        """Kills the whole group, guard included. It has not been waited for, so its number is still its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._guard.pid, signal.SIGKILL)

    async def _end(self) -> None:
        self.kill()
        for rank in self.ranks:
            await self.wait(rank)
        await self._guard.wait()
        if self._pumps:
            _, late = await asyncio.wait(self._pumps, timeout=_LAST_WORDS_S)
            for task in late:
                task.cancel()
        for transport in self._transports:
            transport.close()
