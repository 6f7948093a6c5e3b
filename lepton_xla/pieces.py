"""Long work in short pieces, so that a thread that does it lets others have its core in between.

Between two ticks of the kernel, 4 ms where `HZ` is 250, a thread keeps the core that it got, whatever its priority.
Whoever answers requests on that core waits so long, unless the other rests.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import hashlib
from collections.abc import Callable, Generator

from lepton_xla.environment.machine import usable_cores

# Reading or hashing so much takes a core 0.1 to 0.2 ms.
PIECE_BYTES = 1 << 18

_resting: contextvars.ContextVar[Callable[[], object] | None] = contextvars.ContextVar("rest", default=None)


@contextlib.contextmanager
def resting(between: Callable[[], object]) -> Generator[None, None, None]:
    """Has what the calling thread does in a block call a function after each piece of work.

    >>> with resting(lambda: print("rests")):
    ...     _ = sha256(bytes(2 * PIECE_BYTES))
    rests
    rests
    """
    token = _resting.set(between)
    try:
        yield
    finally:
        _resting.reset(token)


def rest() -> None:
    """Called after each piece of work; does nothing outside of `resting`."""
    between = _resting.get()
    if between is not None:
        between()


def is_resting() -> bool:
    """Whether the calling thread works in pieces."""
    return _resting.get() is not None


def piece_bytes(size: int) -> int:
    """How much of so many bytes to take at once: all, outside of `resting`."""
    return PIECE_BYTES if is_resting() else size


def sha256(data: bytes | memoryview) -> str:
    """The SHA-256 of bytes, in hexadecimal.

    >>> sha256(b"abc")[:8]
    'ba7816bf'
    """
    if not is_resting():
        return hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256()
    view = memoryview(data)
    for start in range(0, len(view), PIECE_BYTES):
        digest.update(view[start : start + PIECE_BYTES])
        rest()
    return digest.hexdigest()


class _AtOnce(concurrent.futures.Executor):
    """Does work on the thread that asks for it, before `submit` returns."""

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> concurrent.futures.Future[T]:
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


def executor(most: int, name: str) -> concurrent.futures.Executor:
    """A thread for each core that this process may use. Where work rests, half as many, and not one of its own for one.

    Args:
        most: number of threads.
        name: how their names begin.

    >>> with executor(4, "example") as pool:
    ...     list(pool.map(abs, [-1, 2]))
    [1, 2]
    """
    between, count = _resting.get(), min(most, usable_cores())
    if between is None:
        return concurrent.futures.ThreadPoolExecutor(count, name)
    if count < 4:
        return _AtOnce()
    return concurrent.futures.ThreadPoolExecutor(count // 2, name, _resting.set, (between,))
