"""A server for one model, several, or a repository: warms up, listens, serves, and drains on stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import uvloop

from lepton_xla.errors import ServeError
from lepton_xla.serve.app.frontend import HTTPFrontEnd
from lepton_xla.serve.app.options import Options, url_of
from lepton_xla.serve.batching.batcher import Batcher
from lepton_xla.serve.batching.costs import Costs, Measured
from lepton_xla.serve.batching.device import Device
from lepton_xla.serve.batching.engine import Engine
from lepton_xla.serve.batching.scheduler import Call, Scheduler
from lepton_xla.serve.http.arrivals import Listener
from lepton_xla.serve.http.drain import Stop
from lepton_xla.serve.loader import ArtifactLoader, Warm, devices_of_process
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.models.host import Host
from lepton_xla.serve.models.manager import Manager
from lepton_xla.serve.models.memory import Memory
from lepton_xla.serve.models.records import Records
from lepton_xla.serve.models.registry import Registry
from lepton_xla.serve.models.remote import open_repository
from lepton_xla.serve.models.settings import Serving
from lepton_xla.serve.monitor.monitor import Monitor
from lepton_xla.serve.monitor.replies import Replies, signature_of_replies
from lepton_xla.serve.monitor.sampler import SampleWriter
from lepton_xla.serve.observe.health import STALL_S
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.protocol.signature import LoadedModel, Signature, signature_of
from lepton_xla.serve.runtime import settle

_log = logging.getLogger("lepton_xla.serve")

_BACKLOG = 1024
# Seconds of warm-up before the first request can be answered. What takes longer, large batches of slow models, is run
# between requests, with a small part of the device's time.
_WARM_UP_S = 0.1
# They begin after so long, since whoever waits for the server asks at once.
_REST_WEIGHT, _REST_AFTER_S = 0.1, 1.0


class Server:
    """Serves a model, or several, over HTTP.

    `run` serves on the calling thread until `stop` or a signal; `start` serves on a thread of its own. As a context
    manager it starts and stops.

    Args:
        models: the model, or the models. Those of one name need different versions.
        options: how to run.
        repository: folder of a repository, whose models are served beside those.

    Attributes:
        address: host and port, once listening, of the first address; the path and 0 of a Unix socket.
        metrics: what was counted so far.
        models: the models served, once listening. Change them on the event loop only.
        devices: what executes them. All devices of the process where there is a repository, else the first.
        memory: loads models on demand and evicts them, where there is a budget.

    Raises:
        ServeError: if the model cannot be served, see `signature_of`, or would be open to all, see `Access`.

    >>> from lepton_xla.serve import Client, Options, Server
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> servable = lx.compile(program, {"batch": (1, 8)}, name="tiny").servable()
    >>> with Server(servable, Options(port=0)) as server, Client(server.url) as client:
    ...     server.name, server.loading, client.infer("tiny", x=np.float32([[1, 2, 3, 4]]))["output"]
    ('tiny', False, array([[1., 2., 3., 4.]], dtype=float32))
    """

    def __init__(
        self,
        models: LoadedModel | Sequence[LoadedModel] = (),
        options: Options | None = None,
        *,
        repository: str | os.PathLike[str] | None = None,
    ) -> None:
        self.options = options or Options()
        self._access = self.options.access()
        self.options.rules()  # what is wrong with them is said before models are loaded
        self.address: tuple[str, int] = (self.options.host, self.options.port)
        self._engines = _engines(models if isinstance(models, Sequence) else [models], self.options.name)
        self.metrics = ServerMetrics()
        self.models = Registry()
        self.devices = [Device()] if repository is None else devices_of_process()
        self._samples = sample_writer(self.options)
        self._manager: Manager | None = None
        self.memory: Memory | None = None
        self._repository = "" if repository is None or "://" in os.fsdecode(repository) else os.fsdecode(repository)
        if repository is not None:
            loader = ArtifactLoader(self.options, self.metrics, self._open, self.devices)
            self._host = Host(self.models, loader, self.metrics, trims=self.options.memory is None)
            self._records = Records(self.options.audit_log)
            self._manager = Manager(
                open_repository(repository), self._host,
                explicit=self.options.explicit or self.options.memory is not None,
                watched=not self.options.explicit, poll_s=self.options.repository_poll_s, record=self._records,
            )  # fmt: skip
            if self.options.memory is not None:
                self.memory = Memory(
                    self._manager, self.models, self.options.memory, self.options.load_wait_s, len(self.devices)
                )  # fmt: skip
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
        """The model's name on the wire; several are separated by commas."""
        return ", ".join(self.models.names() or [signature.name for signature, _ in self._engines])

    @property
    def loading(self) -> bool:
        """Whether a thread still loads a version of the repository, for which the end of the process would wait."""
        return self._manager is not None and self._host.loading > 0

    def run(self, *, signals: bool = True, on_ready: Callable[[Server], None] | None = None) -> bool:
        """Serve until stopped.

        Args:
            signals: whether SIGTERM and SIGINT stop it (main thread only), a second one at once, and SIGHUP has it read
                its files again.
            on_ready: called once it listens.

        Returns:
            Whether everything accepted was answered before the deadline.

        Raises:
            ServeError: if the address cannot be listened on or the model does not run.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> server = Server(lx.compile(program, {"batch": (1,)}).servable(), Options(port=0))
        >>> server.run(signals=False, on_ready=Server.stop)  # everything accepted was answered
        True
        """
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._main(signals, on_ready))

    def start(self, timeout_s: float = 120.0) -> Self:
        """Serve on a thread of its own; returns once it listens.

        Raises:
            ServeError: as `run`.

        >>> program = lx.trace(lambda w, x: x @ w, jnp.eye(4), {"x": lx.TensorSpec(("batch", 4), "float32")})
        >>> server = Server(lx.compile(program, {"batch": (1,)}).servable(), Options(port=0)).start()
        >>> server.url.startswith("http://127.0.0.1:")
        True
        >>> server.stop()
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
        """Stop as on SIGTERM; returns when everything accepted is answered. May be called from any thread."""
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
        options, models, access = self.options, self.models, self._access
        loop = self._loop = asyncio.get_running_loop()
        stop = self._stop = Stop()
        if signals:
            stop.listen(loop)
            loop.add_signal_handler(signal.SIGHUP, access.reload)
        listening = access.listen()
        for device in self.devices:
            device.start(loop)
        try:
            # On another thread, so that signals are handled during a long warm-up.
            if self._manager is not None:
                await self._start_models(self._manager, stop)
            measured = [
                await loop.run_in_executor(None, functools.partial(engine.warm_up, within_s=_WARM_UP_S))
                for _, engine in self._engines
            ]
            stop.warming = False
            if stop.asked.is_set():
                listening.close()
                self._close_models()
                self._stop_devices()
                return True
            schedulers: list[Scheduler] = []
            for (signature, engine), costs in zip(self._engines, measured, strict=True):
                handle = open_model(
                    engine, costs, signature, options, self.metrics, self.devices[0], samples=self._samples
                )  # fmt: skip
                models.put(handle)
                schedulers.append(handle.scheduler)
            frontend = HTTPFrontEnd(
                models, self.metrics, options, access, control=self.memory or self._manager,
                repository=self._repository, bring=self.memory,
            )  # fmt: skip
            listener = Listener(frontend.state, listening, _BACKLOG, access.tls_options(options.limits))
            listener.open()
        except BaseException:
            listening.close()
            self._close_models()
            self._stop_devices(0.0)
            raise

        if signals:
            settle()  # only where the whole process is the server's
        watching = loop.create_task(self._watch())
        rest = loop.create_task(self._warm_up_rest(schedulers, stop))
        addresses = listening.addresses
        self.address = addresses[0]
        _log.info(
            "serving %s on %s", self.name or "no model yet", " and ".join(url_of(each, options) for each in addresses)
        )
        finished = False
        try:
            finished = await frontend.serve(listener, stop, lambda: None if on_ready is None else on_ready(self))
            return finished
        finally:
            watching.cancel()
            self._close_models()
            self._stop_devices(5.0 if finished else 0.0)
            await rest

    async def _start_models(self, manager: Manager, stop: Stop) -> None:
        """Loads what the repository asks for, or less if a stop is asked for meanwhile."""
        starting, asked = (
            asyncio.ensure_future(each) for each in (manager.start(self.options.load), stop.asked.wait())
        )  # fmt: skip
        await asyncio.wait([starting, asked], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if starting.done():
            starting.result()
        else:
            starting.cancel()
            self._close_models()

    async def _warm_up_rest(self, schedulers: Sequence[Scheduler], stop: Stop) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.asked.wait(), _REST_AFTER_S)
            return
        await asyncio.get_running_loop().run_in_executor(None, self._run_rest, schedulers, stop)

    def _run_rest(self, schedulers: Sequence[Scheduler], stop: Stop) -> None:
        """Runs what the warm-up left, on a thread beside the one that serves."""
        with self.devices[0].guest(_REST_WEIGHT) as run:

            def unless_stopped(function: Callable[[], object]) -> None:
                if stop.asked.is_set():
                    raise ServeError("the server stops")
                run(function)

            for scheduler in schedulers:
                try:
                    scheduler.engine.warm_up_rest(unless_stopped, scheduler.learn)
                except Exception:  # whatever the model raises
                    if not stop.asked.is_set():
                        _log.exception("a model could not be run at its larger sizes")

    def _stop_devices(self, timeout_s: float | None = None) -> None:
        for device in self.devices:
            device.stop(timeout_s)

    def _close_models(self) -> None:
        if self._samples is not None:
            self._samples.close()
        if self._manager is not None:
            self._manager.close()
            self._host.close()
            self._records.close()

    async def _watch(self) -> None:
        if self._manager is not None:
            await asyncio.gather(self._manager.watch(), *(() if self.memory is None else (self.memory.watch(),)))

    def _open(self, warm: Warm) -> ModelHandle:
        return open_model(
            warm.engine, warm.measured, warm.signature, warm.options, self.metrics, warm.device or self.devices[0],
            None, warm.model, warm.serving, self._samples,
        )  # fmt: skip


def _engines(models: Sequence[LoadedModel], name: str | None) -> list[tuple[Signature, Engine[Call]]]:
    if name is not None and len(models) != 1:
        raise ServeError(f"one name, {name!r}, is given for {len(models)} models")
    found: dict[tuple[str, str], tuple[Signature, Engine[Call]]] = {}
    for model in models:
        signature = signature_of(model, name)
        if (signature.name, signature.version) in found:
            raise ServeError(f"two models are called {signature.name!r} version {signature.version!r}")
        found[signature.name, signature.version] = signature, Engine(model, signature)
    return list(found.values())


def sample_writer(options: Options) -> SampleWriter | None:
    """What writes samples, if the options ask for it.

    Raises:
        SampleError: if nothing can be written where they say.
    """
    return None if options.samples is None else SampleWriter(options.samples, options.samples_rate)


def open_model(
    engine: Engine[Call],
    measured: Measured,
    signature: Signature,
    options: Options,
    metrics: ServerMetrics,
    device: Device,
    cores: int | None = None,
    model: LoadedModel | None = None,
    serving: Serving | None = None,
    samples: SampleWriter | None = None,
) -> ModelHandle:
    """The handle of a model whose engine is warm, for the running event loop. Stop its scheduler after use.

    Args:
        engine: the engine.
        measured: the costs that the warm-up measured.
        signature: the model's.
        options: of the server.
        metrics: of the server. Told of the handle's end by `ServerMetrics.closed`.
        device: executes the model, among others.
        cores: number of cores that this process may use; None for all.
        model: what the engine runs, for others to share its executables.
        serving: its limits and weight beside other models.
        samples: writes samples of requests; None keeps none.

    Raises:
        SampleError: if the settings of samples do not fit the model.
    """
    serving = serving or Serving()
    steps = getattr(engine.model, "stepper", None)
    watched = signature if steps is None else signature_of_replies(signature, steps)
    if samples is not None:
        # Before anything is counted of the version, since settings that do not fit are refused.
        serving.samples.check([each.name for each in (*watched.inputs, *watched.outputs)])
    counted = metrics.opened(signature.name, signature.version)
    sampler = None if samples is None else samples.sampler(watched, serving.samples, counted.samples)
    if options.monitor:
        profile = engine.profile
        monitor = counted.monitor
        if monitor is None or (monitor.signature, monitor.profile) != (watched, profile):
            monitor = counted.monitor = Monitor(watched, profile, before=monitor, generates=steps is not None)
        if profile is not None and steps is None:
            engine.saw = monitor.saw
        if monitor.feedback is not None:
            monitor.feedback.taken = None if sampler is None else sampler.labelled
    batcher: Batcher[Call] = Batcher(
        signature.bucket_sizes,
        costs=Costs(signature.bucket_sizes, measured),
        levels=options.priority_levels,
        max_delay_s=options.max_delay_us * 1e-6,
        max_rows=options.max_queue_rows,
        max_bytes=options.max_queue_bytes,
    )
    scheduler = Scheduler(
        signature, batcher, engine, counted, asyncio.get_running_loop(), device,
        weight=serving.weight, levels=options.priority_levels,
        default_timeout_s=options.default_timeout_s, max_timeout_s=options.max_timeout_s,
        rate=serving.rate, max_concurrency=serving.max_concurrency,
        cores=cores or len(os.sched_getaffinity(0)),
    )  # fmt: skip
    stall_s = STALL_S + 100 * max(max(costs.values()) for costs in measured.values())
    handle = ModelHandle(signature, scheduler, counted, options.limits, stall_s, model, pinned=serving.pinned)
    if steps is None:
        handle.sampler = sampler
    else:
        handle.replies = Replies(steps, counted.monitor, sampler)
    handle.monitor = counted.monitor
    return handle


def serve(model: LoadedModel, options: Options | None = None) -> bool:
    """Serve a model until SIGTERM or SIGINT; see `Server.run`.

    >>> from lepton_xla.serve import Options, Server, serve
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> servable = lx.compile(program, {"batch": (1,)}).servable()
    >>> with Server(servable, Options(port=0)) as server:
    ...     serve(servable, Options(port=server.address[1]))  # would block, but the port is taken
    Traceback (most recent call last):
    lepton_xla.errors.ServeError: cannot listen on 127.0.0.1:...: Address already in use
    """
    return Server(model, options).run()
