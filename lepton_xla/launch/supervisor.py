"""Starts the processes of a run on this machine, watches them, and starts all of them again if one fails or hangs.

A run of JAX shares one fate: if a process dies, the others abort sooner or later, and if one is stuck, they wait for
good. So whatever happens to one, all are ended and all are started again, and training goes on from its last
checkpoint. This process imports no JAX.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import signal
import sys
import tempfile
from collections.abc import Mapping
from typing import TextIO

from lepton_xla.launch import local
from lepton_xla.launch.logs import Lines
from lepton_xla.launch.processes import Group, Rank
from lepton_xla.launch.watchdog import Watchdog

PREEMPTED = 75
"""Exit code of a process that saved a checkpoint and stopped because it was told to."""
HUNG = 124
"""Exit code of the launcher if the watchdog ended the run for good; that of `timeout`."""
# Exit code of what was called wrongly, in any shell. Starting it again would not help.
_MISUSED = 2

# After a failure the others can do nothing useful any more.
_ENDING_S = 5.0
_LONGEST_POLL_S = 1.0
_LONGEST_PAUSE_S = 30.0
_LINGER_S = 3.0
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How the processes ended once.

    Attributes:
        code: the exit code for the launcher.
        why: which process failed or hangs; empty if all went well.
        resumed_at: the least step at which a process went on; -1 if one of them told none.
        step: the last step that was told.
    """

    code: int
    why: str
    resumed_at: int
    step: int


class Supervisor:
    """Runs the processes of one run.

    Args:
        options: what to start.
        environ: the environment to start from.
        out: where their standard output goes, by default to this process's.

    Attributes:
        attempts: how each attempt ended.
    """

    def __init__(self, options: local.Options, environ: Mapping[str, str], *, out: TextIO | None = None) -> None:
        self._options = options
        self._environ = environ
        self._numbers = local.numbers(options, environ)
        self._outputs = _lines(out or sys.stdout), _lines(sys.stderr)
        self.attempts: list[Attempt] = []
        self._group: Group | None = None
        self._stopped = 0
        self._signal = signal.SIGTERM

    def run(self) -> int:
        """Runs until all is done or nothing more can be done; returns the exit code.

        That is the one of the first process that failed, 128 and its number for a signal, or 124 if the watchdog ended
        the run. Blocks. Signals to stop are passed on to the processes.

        Raises:
            LaunchError: if the port is in use or the command cannot be started.
        """
        return asyncio.run(self._to_the_end())

    async def _to_the_end(self) -> int:
        code = await self._main()
        if code == PREEMPTED and self._options.processes == 1:
            # One of several tasks that a scheduler ends as soon as one has ended: the others are about to end, too, and
            # their exit code must not become that of a signal.
            await asyncio.sleep(_LINGER_S if local.is_member(self._environ) else 0.0)
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)  # nor may this process's
        return code

    async def _main(self) -> int:
        loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        for number in _STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                loop.add_signal_handler(number, self._stop, number)
        for number in _PASSED_ON:
            loop.add_signal_handler(number, self._pass_on, number)
        restarts, resumed_at = 0, -1
        while True:
            outcome = await self._attempt()
            self.attempts.append(outcome)
            if outcome.resumed_at > resumed_at >= 0:
                restarts = 0  # a newer checkpoint than the attempt before had: the run gets on
            resumed_at = max(resumed_at, outcome.resumed_at)
            if not self._again(outcome) or restarts >= self._options.max_restarts:
                return outcome.code
            restarts += 1
            await self._pause(min(2.0 ** (restarts - 1), _LONGEST_PAUSE_S))
            if self._stopped:
                return outcome.code
            self._say(f"starting again from the last checkpoint: restart {restarts} of {self._options.max_restarts}")

    def _again(self, outcome: Attempt) -> bool:
        """Whether this is an ending after which a run is started again."""
        if self._stopped or outcome.code in (0, _MISUSED):
            return False
        return outcome.code != PREEMPTED or self._options.restart_preempted

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), seconds)

    # One attempt.

    async def _attempt(self) -> Attempt:
        with (
            tempfile.TemporaryDirectory(prefix="leptonx-", ignore_cleanup_errors=True) as folder,
            local.coordinated(self._options, self._environ) as environs,
        ):
            group = Group(
                self._options.command,
                environs,
                self._numbers,
                pathlib.Path(folder),
                self._outputs,
                prefixed=len(environs) > 1,
            )
            async with group:
                self._group = group
                try:
                    return await self._watch(group)
                finally:
                    self._group = None

    async def _watch(self, group: Group) -> Attempt:
        """Waits for the end of an attempt and brings it about if one process fails or hangs."""
        waiting = {asyncio.create_task(group.wait(rank)) for rank in group.ranks}
        stopping = asyncio.create_task(self._wake.wait())
        loop = asyncio.get_running_loop()
        limits = self._options.limits
        dog = None if limits is None else Watchdog(limits, self._numbers, loop.time())
        poll_s = None if limits is None else min(_LONGEST_POLL_S, limits.least_s / 4)
        try:
            while waiting:
                before_s = loop.time()
                done, _ = await asyncio.wait({*waiting, stopping}, timeout=poll_s, return_when=asyncio.FIRST_COMPLETED)
                if stopping in done:
                    group.signal(self._signal)
                    return await self._drain(group, waiting, self._options.grace_s)
                waiting -= done
                failed = _first_failed(group)
                if failed is not None:
                    return await self._fail(group, waiting, failed)
                if dog is None or poll_s is None or not waiting:
                    continue
                slept_s = loop.time() - before_s - poll_s
                if slept_s > max(_LONGEST_POLL_S, poll_s):
                    dog.forgive(slept_s)
                hang = dog.look(
                    loop.time(), [rank.beat() for rank in group.ranks], [rank.code is None for rank in group.ranks]
                )
                if hang:
                    self._say(f"{hang}; all are ended")
                    group.signal(signal.SIGTERM)
                    await self._drain(group, waiting, _ENDING_S)
                    return _attempt(group, HUNG, hang)
            return _attempt(group, 0)
        finally:
            stopping.cancel()

    async def _fail(self, group: Group, waiting: set[asyncio.Task[Rank]], failed: Rank) -> Attempt:
        preempted = failed.code == PREEMPTED
        if not preempted:
            group.signal(signal.SIGTERM)
        who = "the command" if len(group.ranks) == 1 else f"rank {failed.number}"
        then = "" if not waiting else "; the others are saving too" if preempted else "; all are ended"
        why = f"{who} {failed.ending}"
        self._say(f"{why}{then}")
        await self._drain(group, waiting, self._options.grace_s if preempted else _ENDING_S)
        return _attempt(group, _shell_code(failed), why)

    async def _drain(self, group: Group, waiting: set[asyncio.Task[Rank]], seconds: float) -> Attempt:
        """Waits for processes that should end; kills those that take too long, or all at the second signal to stop."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        first = _first_failed(group)
        while waiting and self._stopped < 2 and loop.time() < began_s + seconds:
            self._wake.clear()
            woken = asyncio.create_task(self._wake.wait())
            timeout_s = began_s + seconds - loop.time()
            done, _ = await asyncio.wait({*waiting, woken}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            woken.cancel()
            if woken in done and self._stopped == 1:
                group.signal(self._signal)
                seconds = max(seconds, loop.time() - began_s + self._options.grace_s)
            waiting -= done
            first = first or _first_failed(group)
        if waiting:
            slow = ", ".join(str(rank.number) for rank in group.ranks if rank.code is None)
            self._say(f"killing rank {slow}, which has not ended within {loop.time() - began_s:.1f} s")
            group.kill()
            await asyncio.wait(waiting)
        first = first or _first_failed(group)
        return _attempt(group, _shell_code(first) if first else 0, f"stopped by {self._signal.name}")

    # Signals.

    def _stop(self, number: signal.Signals) -> None:
        self._stopped += 1
        self._signal = number
        self._wake.set()

    def _pass_on(self, number: int) -> None:
        if self._group is not None:
            self._group.signal(number)

    def _say(self, text: str) -> None:
        self._outputs[1].write(None, f"leptonx: {text}".encode())


def _first_failed(group: Group) -> Rank | None:
    return next((rank for rank in group.ranks if rank.code), None)


def _shell_code(rank: Rank) -> int:
    """The exit code as shells give it."""
    assert rank.code is not None
    return rank.code if rank.code >= 0 else 128 - rank.code


def _attempt(group: Group, code: int, why: str = "") -> Attempt:
    beats = [rank.beat() for rank in group.ranks]
    first_steps = [-1 if beat is None else beat.first_step for beat in beats]
    return Attempt(code, why, min(first_steps), max(-1 if beat is None else beat.step for beat in beats))


def _lines(stream: TextIO) -> Lines:
    return Lines(stream.buffer, colour=stream.isatty())
