"""A server in its own process group: start, request, pause, measure, end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping, Sequence

import psutil

START_S = 180.0


class Server:
    """A server in a process group of its own.

    Args:
        name: in the table.
        command: what starts it.
        port: where it listens.
        path: of the route.
        request: body and header fields of one request; without a body it is a GET.
        env: further environment.
        idles: whether it takes no processor time while nothing is asked; else it is stopped (SIGSTOP) meanwhile.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        path: str,
        request: tuple[bytes | None, dict[str, str]],
        env: Mapping[str, str] | None = None,
        *,
        idles: bool = True,
    ) -> None:
        self.name, self.port, self.path, self.request, self.idles = name, port, path, request, idles
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        self._process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def ask(self) -> bytes:
        """The body of the answer to one request.

        Raises:
            OSError: if there is none.
        """
        body, fields = self.request
        with urllib.request.urlopen(urllib.request.Request(self.url, body, fields), timeout=10) as answer:
            return answer.read()

    def wait(self) -> bytes:
        """Waits for the first answer and returns it.

        Raises:
            RuntimeError: if the server ends or does not answer in time.
        """
        deadline = time.monotonic() + START_S
        while True:
            try:
                return self.ask()
            except (OSError, urllib.error.URLError) as error:
                ended = self._process.poll() is not None
                if ended or time.monotonic() > deadline:
                    self._log.seek(0)
                    said = [line for line in self._log.read().decode(errors="replace").splitlines() if "Error" in line][
                        -1:
                    ]
                    raise RuntimeError(f"{'ended' if ended else error}: {' '.join(said)[:300]}") from error
            time.sleep(0.3)

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def signal(self, number: int) -> None:
        """Sends a signal to all its processes."""
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def cpu_s(self) -> float:
        """Processor seconds of all its processes so far."""
        used = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                used += times.user + times.system
        return used

    def memory(self) -> int:
        """Bytes of memory of all its processes; shared pages are divided among them (PSS)."""
        total = 0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def resident(self) -> int:
        """Bytes of memory that its processes have, those that they share with others included."""
        total = 0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def stop(self) -> None:
        """Ends the server and all its processes."""
        self.signal(signal.SIGCONT)
        family = self._family()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        self._log.close()


@contextlib.contextmanager
def turn(server: Server) -> Generator[None]:
    """Resumes a paused server for a while."""
    if server.idles:
        yield
        return
    server.signal(signal.SIGCONT)
    try:
        server.wait()  # some take it for the end of their connections, or of their other processes
        yield
    finally:
        server.signal(signal.SIGSTOP)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
