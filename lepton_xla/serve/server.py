"""A server for one model: it warms the model up, listens, and on stopping answers what it accepted."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import uvloop

from lepton_xla.errors import ServeError
from lepton_xla.serve.access.entrance import Access
from lepton_xla.serve.access.tls import TlsFiles
from lepton_xla.serve.app.front import Front
from lepton_xla.serve.batching.batcher import Batcher
from lepton_xla.serve.batching.costs import Costs, Measured
from lepton_xla.serve.batching.engine import Engine
from lepton_xla.serve.batching.scheduler import Call, Scheduler
from lepton_xla.serve.http.arrivals import Entrance
from lepton_xla.serve.http.drain import Stop
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.observe.health import STALL_S, Health
from lepton_xla.serve.observe.metrics import Metrics
from lepton_xla.serve.observe.tracing import check_endpoint
from lepton_xla.serve.protocol.metadata import SERVER_NAME
from lepton_xla.serve.protocol.routes import OPEN_PATHS
from lepton_xla.serve.protocol.signature import Servable, Signature, signature_of
from lepton_xla.serve.runtime import settle

_log = logging.getLogger("lepton_xla.serve")

_BACKLOG = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How a server runs.

    Attributes:
        host: address to listen on; only this machine can reach the default.
        port: 0 picks a free one.
        unix_socket: file of a Unix socket to listen on, instead of host and port.
        name: model name on the wire, if not the model's own.
        server_name: what the server's metadata calls it; some clients look for "triton".
        max_delay_us: how long a request may wait for company while the engine is idle, in microseconds.
        max_queue_rows: rows that may wait; more get 503. Also the most rows of one request.
        max_queue_bytes: memory of the requests that may wait; more get 503.
        default_timeout_s: for requests that give no timeout; None waits for ever.
        max_timeout_s: the longest wait for any request; longer timeouts are cut to it. None sets no bound.
        priority_levels: the parameter `priority` may be 1, which is the highest, to this. Requests that do not say are
            on the middle level, the lower of two.
        compress_bytes: the smallest answer worth compressing for a client that accepts it.
        lame_duck_s: how long after a stop is asked for new connections are still taken and idle ones kept, readiness
            already being 503.
        stop_timeout_s: how long after that a stop waits for answers.
        access_log_sample: of the requests, 0 to 1, that the log gets a line of.
        otel_endpoint: URL of a collector of OpenTelemetry traces, over HTTP; None has the standard variables say.
        limits: what clients may send.
        token_file: the tokens to ask for, see `leptonx token`; None asks for none.
        tls: certificates to listen with; None speaks plain HTTP.
        insecure_public: listen on an address that other machines can reach though neither a token file nor the
            certificates of clients say who may ask.

    Raises:
        ServeError: for a value out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    unix_socket: Path | None = None
    name: str | None = None
    server_name: str = SERVER_NAME
    max_delay_us: int = 0
    max_queue_rows: int = 4096
    max_queue_bytes: int = 256 << 20
    default_timeout_s: float | None = None
    max_timeout_s: float | None = None
    priority_levels: int = 3
    compress_bytes: int = 4096
    lame_duck_s: float = 0.0
    stop_timeout_s: float = 30.0
    access_log_sample: float = 0.0
    otel_endpoint: str | None = None
    limits: Limits = dataclasses.field(default_factory=Limits)
    token_file: Path | None = None
    tls: TlsFiles | None = None
    insecure_public: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ServeError(f"port must be 0 to 65535, not {self.port}")
        for name, least in (
            ("max_delay_us", 0), ("max_queue_rows", 1), ("max_queue_bytes", 1), ("priority_levels", 1),
            ("lame_duck_s", 0), ("stop_timeout_s", 0),
        ):  # fmt: skip
            if not least <= getattr(self, name) < math.inf:
                raise ServeError(f"{name} must be at least {least} and finite, not {getattr(self, name)!r}")
        if self.otel_endpoint is not None:
            check_endpoint(self.otel_endpoint)
        if not 0 <= self.access_log_sample <= 1:
            raise ServeError(f"access_log_sample must be 0 to 1, not {self.access_log_sample!r}")
        for name in ("default_timeout_s", "max_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ServeError(f"{name} must be positive, or None for no bound, not {value!r}")

    def access(self) -> Access:
        """Reads the files that say who may ask.

        Raises:
            ServeError: see `Access`.
        """
        return Access(
            self.host, self.port,
            token_file=self.token_file, tls=self.tls, open_paths=OPEN_PATHS, public=self.insecure_public,
            unix_socket=self.unix_socket,
        )  # fmt: skip


class Server:
    """Serves a model over HTTP.

    `run` serves on the calling thread until `stop` or a signal; `start` serves on a thread of its own. As a context
    manager it starts and stops.

    Args:
        servable: the model.
        options: how to run.

    Attributes:
        address: host and port, once listening, of the first address; the path and 0 of a Unix socket.
        metrics: what was counted so far.

    Raises:
        ServeError: if the model cannot be served, see `signature_of`, or would be open to all, see `Access`.
    """

    def __init__(self, servable: Servable, options: Options | None = None) -> None:
        self.options = options or Options()
        self._access = self.options.access()
        self.address: tuple[str, int] = (self.options.host, self.options.port)
        self._signature = signature_of(servable, self.options.name)
        self._engine: Engine[Call] = Engine(servable, self._signature)
        self.metrics = Metrics(self._signature.name)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: Stop | None = None
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        """Where it listens, such as `http://127.0.0.1:8000` or `http+unix://%2Frun%2Fdigits.sock`."""
        return url_of(self.address, self.options)

    @property
    def name(self) -> str:
        """The model's name on the wire."""
        return self._signature.name

    def run(self, *, signals: bool = True, on_ready: Callable[[Server], None] | None = None) -> bool:
        """Serves until stopped.

        Args:
            signals: whether SIGTERM and SIGINT stop it (main thread only), a second one at once, and SIGHUP has it read
                its files again.
            on_ready: called once it listens.

        Returns:
            Whether everything accepted was answered before the deadline.

        Raises:
            ServeError: if the address cannot be listened on or the model does not run.
        """
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._main(signals, on_ready))

    def start(self, timeout_s: float = 120.0) -> Self:
        """Serves on a thread of its own; returns once it listens.

        Raises:
            ServeError: as `run`.
        """
        self._thread = threading.Thread(target=self._run_thread, name="lepton-serve", daemon=True)
        self._thread.start()
        if not self._started.wait(timeout_s):
            raise ServeError(f"the server did not start within {timeout_s} s")
        failure, self._failure = self._failure, None
        try:
            if failure is not None:
                raise failure
        finally:
            failure = None  # its traceback leads back to this frame
        return self

    def stop(self, timeout_s: float | None = None) -> None:
        """Stops as on SIGTERM; returns when everything accepted is answered. May be called from any thread."""
        loop, stop = self._loop, self._stop
        if loop is not None and stop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(stop.asked.set)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run_thread(self) -> None:
        try:
            self.run(signals=False, on_ready=lambda _: self._started.set())
        except BaseException as error:
            self._failure = error
            self._started.set()

    async def _main(self, signals: bool, on_ready: Callable[[Server], None] | None) -> bool:
        options, metrics, access = self.options, self.metrics, self._access
        loop = self._loop = asyncio.get_running_loop()
        stop = self._stop = Stop()
        if signals:
            stop.listen(loop)
            loop.add_signal_handler(signal.SIGHUP, access.reload)
        listening = access.listen()
        try:
            # Off the loop, so that a signal during a long warm-up is seen as soon as it ends.
            measured = await loop.run_in_executor(None, self._engine.warm_up)
            stop.warming = False
            if stop.asked.is_set():
                listening.close()
                return True
            scheduler = schedule(self._engine, measured, self._signature, options, metrics)
            health = watch(scheduler, measured, metrics)
            front = Front(self._signature, scheduler, metrics, options, access, health)
            entrance = Entrance(front.hub, listening, _BACKLOG, access.tls_options(options.limits))
            entrance.open()
        except BaseException:
            listening.close()
            raise

        if signals:
            settle()  # the process is the server's
        scheduler.start()
        addresses = listening.addresses
        self.address = addresses[0]
        _log.info(
            "serving %s on %s", self._signature.name, " and ".join(url_of(each, options) for each in addresses)
        )  # fmt: skip
        finished = False
        try:
            finished = await front.serve(entrance, stop, lambda: None if on_ready is None else on_ready(self))
            return finished
        finally:
            scheduler.stop(5.0 if finished else 0.0)


def url_of(address: tuple[str, int], options: Options) -> str:
    """The URL of a server that listens there."""
    host, port = address
    if options.unix_socket is not None:
        return f"{'http' if options.tls is None else 'https'}+unix://{quote(host, safe='')}"
    scheme = "http" if options.tls is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def schedule(
    engine: Engine[Call],
    measured: Measured,
    signature: Signature,
    options: Options,
    metrics: Metrics,
    cores: int | None = None,
) -> Scheduler:
    """The scheduler of a warm engine, to be used on the event loop that runs.

    Args:
        engine: the engine.
        measured: what executions took on it.
        signature: the model's.
        options: how the server runs.
        metrics: what is counted.
        cores: of this machine, as many as this process may count on; None for all.
    """
    batcher: Batcher[Call] = Batcher(
        signature.ladder,
        costs=Costs(signature.ladder, measured),
        levels=options.priority_levels,
        max_delay_s=options.max_delay_us * 1e-6,
        max_rows=options.max_queue_rows,
        max_bytes=options.max_queue_bytes,
    )
    return Scheduler(
        signature, batcher, engine, metrics, asyncio.get_running_loop(),
        levels=options.priority_levels,
        default_timeout_s=options.default_timeout_s, max_timeout_s=options.max_timeout_s,
        cores=cores or len(os.sched_getaffinity(0)),
    )  # fmt: skip


def watch(scheduler: Scheduler, measured: Measured, metrics: Metrics) -> Health:
    """What tells whether a scheduler works."""
    return Health(scheduler, metrics, STALL_S + 100 * max(max(costs.values()) for costs in measured.values()))


def serve(servable: Servable, options: Options | None = None) -> bool:
    """Serves a model until SIGTERM or SIGINT; see `Server.run`."""
    return Server(servable, options).run()
