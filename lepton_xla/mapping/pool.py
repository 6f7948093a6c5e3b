"""Worker processes on this machine: each runs one part at a time, and one that dies is replaced."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

import msgspec

from lepton_xla.errors import ExecutionError, InputError
from lepton_xla.mapping.work import Work
from lepton_xla.mapping.worker import Report

TRIES = 3
"""So often a part is given to a process that dies of it, or fails."""


def run_here(work: Work, parts: Sequence[int], processes: int, tell: Callable[[int], None]) -> int:
    """Run parts in worker processes.

    Args:
        work: what the parts are of.
        parts: their numbers.
        processes: how many workers; they share the cores.
        tell: called with the number of each part that is done.

    Returns:
        How often a part was tried again.

    Raises:
        InputError: for rows that do not fit the model.
        ExecutionError: if a part, or the start of a worker, fails again and again.
    """
    pool = _Pool(work, parts, tell)
    cores = sorted(os.sched_getaffinity(0))
    count = min(processes, len(parts))
    threads = [
        threading.Thread(target=pool.work, args=(set(cores[at::count]) or {cores[at % len(cores)]},), daemon=True)
        for at in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        pool.stop()
        raise
    if pool.error is not None:
        raise pool.error
    return pool.again


class _Pool:
    """What the threads share: one thread a worker."""

    def __init__(self, work: Work, parts: Sequence[int], tell: Callable[[int], None]) -> None:
        self.error: InputError | ExecutionError | None = None
        self.again = 0
        self._work = work
        self._tell = tell
        self._todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for part in parts:
            self._todo.put(part)
        self._left = len(parts)
        self._tries: dict[int, int] = {}
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()
        if not parts:
            self._over.set()

    def stop(self, error: InputError | ExecutionError | None = None) -> None:
        """Ends all workers."""
        with self._lock:
            self.error = self.error or error
            self._over.set()
            for process in self._running:
                process.kill()

    def work(self, cores: set[int]) -> None:
        """Keeps one worker at work until nothing is left."""
        deaths = 0
        while not self._over.is_set():
            code, did = self._run(cores)
            deaths = 0 if did else deaths + 1
            if deaths >= TRIES and not self._over.is_set():
                self.stop(ExecutionError(f"a worker process ends before it has run anything: {_ended(code)}"))

    def _run(self, cores: set[int]) -> tuple[int, bool]:
        """One worker from its start to its end: how it ended, and whether it was of any use."""
        command = [sys.executable, "-m", "lepton_xla.mapping.worker", str(self._work.folder)]
        with self._lock:
            if self._over.is_set():
                return 0, True
            try:
                process = subprocess.Popen(  # noqa: S603 (our own command)
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
                )
            except OSError as error:  # out of processes, descriptors or memory
                self.error = self.error or ExecutionError(f"a worker process cannot be started: {error.strerror}")
                self._over.set()
                return 0, True
            self._running.add(process)
        part = None
        is_ready = False
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            os.sched_setaffinity(process.pid, cores)
            for line in process.stdout:
                self._hear(msgspec.json.decode(line, type=Report))
                is_ready, part = True, None
                part = self._next()
                if part is None:
                    break
                process.stdin.write(b"%d\n" % part)
                process.stdin.flush()
        except OSError:
            pass  # it is gone, as its end will say
        finally:
            process.kill()
            code = process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what could not be written any more
                    pipe.close()
            with self._lock:
                self._running.discard(process)
        if part is not None:
            self._lost(part, _ended(code))
        return code, is_ready

    def _next(self) -> int | None:
        """The next part; None when all are done. Waits while others may still give one back."""
        while not self._over.is_set():
            try:
                return self._todo.get(timeout=0.1)
            except queue.Empty:
                continue
        return None

    def _hear(self, report: Report) -> None:
        if report.error:
            self.stop(InputError(report.error))
        elif report.failed:
            self._lost(report.part, report.failed)
        elif report.part >= 0:
            with self._lock:
                self._left -= 1
                self._tell(report.part)
                if not self._left:
                    self._over.set()

    def _lost(self, part: int, why: str) -> None:
        if self._over.is_set():
            return
        with self._lock:
            self._tries[part] = self._tries.get(part, 0) + 1
            self.again += 1
        if self._tries[part] < TRIES:
            self._todo.put(part)
            return
        rows = self._work.plan.parts[part]
        self.stop(
            ExecutionError(
                f"rows {rows.start} to {rows.start + rows.count - 1} (counted from 0) failed {TRIES} times; the last "
                f"time: {why}. Fewer rows at a time (--part-rows) take less memory"
            )
        )


def _ended(code: int) -> str:
    """How a process ended, in words."""
    return f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"
