"""Carries changes of models out in all workers of a server at once; an `Executor` of `Manager`.

One worker prepares a change first, then the others, and only when all have prepared it are all told to commit. So a bad
artifact takes the time of one worker, and one that ends a process ends one. A worker that is started meanwhile catches
up before it gets connections.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from lepton_xla.serve.models.changes import Change, State, difference
from lepton_xla.serve.processes import control
from lepton_xla.serve.processes.child import Child
from lepton_xla.serve.processes.roster import Roster

_log = logging.getLogger("lepton_xla.serve")


class Fleet:
    """The workers of a server, as those that hold models.

    Args:
        workers: all of them.
        caught_up: called with a worker that holds what all others hold; makes it ready.

    Attributes:
        roster: what all of them hold, with its size.
    """

    def __init__(self, workers: Sequence[Child], caught_up: Callable[[Child], object]) -> None:
        self._workers = workers
        self.roster = Roster(workers)
        self._caught_up = caught_up
        self._states: dict[str, State] = {}
        self._holds: dict[Child, dict[str, State]] = {child: {} for child in workers}
        self._waiting: dict[tuple[Child, int, bool], asyncio.Future[dict[str, str]]] = {}
        self._own = itertools.count(-1, -1)  # changes that only one worker carries out
        self._tasks: dict[Child, asyncio.Task[None]] = {}

    # For the manager.

    async def prepare(self, number: int, change: Change) -> dict[str, str]:
        """Has every worker load the versions of a change; returns why some could not be: version -> reason."""
        failed: dict[str, str] = {}
        asked: set[Child] = set()
        left = change
        # Until every ready worker has prepared: others may have become ready meanwhile.
        while missing := [child for child in self._workers if child.ready and child not in asked]:
            now = missing if asked else missing[:1]
            asked.update(now)
            told = await asyncio.gather(*(self._ask(child, control.Prepare(number, left)) for child in now))
            for each in told:
                failed |= each
            # What one cannot load the others are not asked for; all else they have to have when it is put.
            load = {version: source for version, source in change.load.items() if version not in failed}
            if "" in failed or (failed and not load):
                break
            left = msgspec.structs.replace(change, load=load)
        if not asked:
            # Nobody knows whether they can be loaded, and a worker that starts would have to.
            failed[""] = "no worker is ready to load it"
        if "" in failed:
            return {version: failed.get(version, failed[""]) for version in change.load}
        return failed

    def commit(self, number: int, change: Change) -> Awaitable[object]:
        """Has all workers put what they have prepared; ends when all have freed what it replaces."""
        state = self._states.get(change.name, State()).after(change)
        self._states[change.name] = state
        leaving = self.roster.committed(number, change)
        ended: list[asyncio.Future[dict[str, str]]] = []
        for child in self._workers:
            if child.ready:
                self._holds[child][change.name] = state
                ended.append(self._ask(child, control.Commit(number, change)))
        freed = asyncio.gather(*ended)
        freed.add_done_callback(lambda _: leaving.clear())
        return freed

    # For the supervisor.

    def joined(self, child: Child) -> None:
        """A worker has started, and holds no model yet."""
        self._holds[child] = {}
        self._tasks[child] = asyncio.get_running_loop().create_task(self._catch_up(child))

    def gone(self, child: Child) -> None:
        """A worker has ended."""
        task = self._tasks.pop(child, None)
        if task is not None:
            task.cancel()
        for key in [key for key in self._waiting if key[0] is child]:
            self._answered(key, {"": f"{child.name} has ended while it was loaded"})

    def prepared(self, child: Child, number: int, failed: dict[str, str], sizes: dict[str, int]) -> None:
        """A worker has prepared a change."""
        if number > 0:
            self.roster.prepared(number, sizes)
        self._answered((child, number, False), failed)

    def freed(self, child: Child, number: int) -> None:
        """A worker has freed what a change replaced."""
        self._answered((child, number, True), {})

    def _answered(self, key: tuple[Child, int, bool], failed: dict[str, str]) -> None:
        waiting = self._waiting.pop(key, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(failed)

    def _ask(self, child: Child, message: control.Prepare | control.Commit) -> asyncio.Future[dict[str, str]]:
        """Sends a change; the answer says what could not be loaded, under "" if the worker has ended."""
        key = (child, message.number, isinstance(message, control.Commit))
        waiting = self._waiting[key] = asyncio.get_running_loop().create_future()
        child.send(message)
        return waiting

    async def _catch_up(self, child: Child) -> None:
        """Has a worker load what the others hold, whatever that is by then."""
        held = self._holds[child]
        while changes := self._missing(held):
            for change in changes:
                number = next(self._own)
                failed = await self._ask(child, control.Prepare(number, change))
                if failed:
                    version, reason = next(iter(failed.items()))
                    child.reason = f"{change.name} version {version} cannot be loaded: {reason}"
                    if child.process is not None:
                        child.process.kill()  # it would answer otherwise than the others; it is started again
                    return
                held[change.name] = held.get(change.name, State()).after(change)
                child.send(control.Commit(number, change))
        self._caught_up(child)

    def _missing(self, held: dict[str, State]) -> list[Change]:
        changes = (difference(name, held.get(name, State()), state) for name, state in self._states.items())
        return [change for change in changes if change is not None]
