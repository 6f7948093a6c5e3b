"""A worker process: a whole server of its own, which has its connections from the supervisor.

The supervisor starts it, as `python -m lepton_xla.serve.processes.worker`, with one end of a pair. It does not listen:
the supervisor takes the connections and deals them out. Of several event loops at one listening socket, one gets nearly
all.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from lepton_xla.errors import RepositoryError, ServeError
from lepton_xla.serve.app.frontend import HTTPFrontEnd
from lepton_xla.serve.batching.engine import Engine
from lepton_xla.serve.batching.scheduler import Call
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.arrivals import Arrivals
from lepton_xla.serve.http.drain import Stop
from lepton_xla.serve.loader import ArtifactLoader, Warm, devices_of_process
from lepton_xla.serve.models.changes import Change
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.models.host import Host
from lepton_xla.serve.models.manager import Entry
from lepton_xla.serve.models.registry import Registry
from lepton_xla.serve.models.trimming import Trimmer
from lepton_xla.serve.monitor.feedback import divide, rows_of, unknown_answer
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.processes import control
from lepton_xla.serve.processes.child import run_child
from lepton_xla.serve.processes.control import Control
from lepton_xla.serve.processes.on_demand import OnDemand
from lepton_xla.serve.processes.packets import close_all
from lepton_xla.serve.protocol.monitoring import RightAnswers
from lepton_xla.serve.protocol.signature import signature_of
from lepton_xla.serve.runtime import count_on_cores, keep_memory, leave, run_on_calling_thread, settle
from lepton_xla.serve.server import open_model, sample_writer

_log = logging.getLogger("lepton_xla.serve")


@dataclasses.dataclass(slots=True)
class _Question:
    """A request to the supervisor, and what has come of the answer."""

    answer: asyncio.Future[list[Entry]]
    entries: list[Entry]


class Worker:
    """Connections to the models of this process, and the supervisor that hands them over.

    Args:
        settings: what the server was told.
        metrics: what is counted here.
        models: what answers requests.
        host: changes those, of a repository; None where there is one artifact.
        end: of the pair whose other end the supervisor has.
        loop: the event loop.
    """

    def __init__(
        self,
        settings: control.Settings,
        metrics: ServerMetrics,
        models: Registry,
        host: Host[Warm] | None,
        end: socket.socket,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._models = models
        self._host = host
        self._tasks: set[asyncio.Task[None]] = set()
        self._questions: dict[int, _Question] = {}
        self._labels = control.Labels()
        self._verdicts: dict[int, asyncio.Future[control.Judged]] = {}
        self._options = settings.options
        self.explicit = settings.options.explicit or settings.options.memory is not None
        self._bring: OnDemand | None = None
        self._trimmer = Trimmer()
        if settings.options.memory is not None:
            self._bring = OnDemand(models, lambda name: self._ask("bring", name=name), settings.options.load_wait_s)
        self._repository = settings.repository
        self._sends_alerts = settings.sends_alerts
        self._access = settings.options.access()
        self._metrics = metrics
        self._loop = loop
        self._stop = Stop()
        self._stop.listen(loop)
        self._stop.warming = False
        loop.add_signal_handler(signal.SIGHUP, self._access.reload)
        self._no_more = asyncio.Event()
        self._askers: dict[int, Callable[[ServerMetrics], object]] = {}
        self._counting: dict[str, Any] = {}
        self._asked = 0
        self._arrivals: Arrivals | None = None
        self._control = Control(end, self._told, self._orphaned, loop)

    async def serve(self, name: str, digest: str) -> bool:
        """Serves until stopped; gives whether everything accepted was answered.

        Args:
            name: of the model; empty for a repository.
            digest: of its artifact's manifest.
        """
        frontend = HTTPFrontEnd(
            self._models, self._metrics, self._options, self._access, self._gather,
            None if self._host is None else self, self._repository, bring=self._bring,
            sends=self._sends_alerts, others=self,
        )  # fmt: skip
        self._arrivals = Arrivals(frontend.state, self._access.tls_options(self._options.limits))
        settle()
        reporting = self._loop.create_task(self._report(frontend))
        try:
            return await frontend.serve(
                self, self._stop, lambda: self._control.send(control.Ready(name, digest))
            )  # fmt: skip
        finally:
            reporting.cancel()
            self._send_counts()
            self._control.close()

    async def close(self) -> None:
        """Takes the connections that the supervisor has accepted already, and no more."""
        self._control.send(control.Leaving())
        await self._no_more.wait()
        if self._arrivals is not None:
            await self._arrivals.settle()

    # From the supervisor.

    def _told(self, message: control.Message, fds: list[int]) -> None:
        match message:
            case control.Connections():
                for fd in fds:
                    self._take(socket.socket(fileno=fd))
            case control.Stop(hurried):
                self._stop.asked.set()
                if hurried:
                    self._stop.hurried.set()
            case control.Reload():
                self._access.reload()
            case control.Closed():
                self._no_more.set()
            case control.Count(number):
                self._send_counts(number)
            case control.Counts(counts, number, last):
                self._counting |= counts
                if last:
                    others, self._counting = self._counting, {}
                    self._show(others, number)
            case control.Prepare(number, change):
                self._begin(self._prepare(number, change))
            case control.Commit(number, change):
                assert self._host is not None
                self._begin(self._free(number, self._host.commit(number, change)))
            case control.Told():
                self._answered(message)
            case control.Judge(number, model, _, count):
                labels = self._labels.add(message)
                if labels is not None:
                    self._control.send(self._judged(number, model, labels, count=count))
            case control.Judged(number):
                verdict = self._verdicts.pop(number)
                if not verdict.done():  # whoever asked may be gone
                    verdict.set_result(message)
            case control.Known(names, last):
                if self._bring is not None:
                    self._bring.told(names, last)
            case _:
                close_all(fds)

    def _orphaned(self) -> None:
        _log.error("the supervisor is gone")
        self._no_more.set()
        self._stop.asked.set()

    def _take(self, client: socket.socket) -> None:
        if self._arrivals is None:
            client.close()
        else:
            self._arrivals.take(client)

    # Models.

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _prepare(self, number: int, change: Change) -> None:
        assert self._host is not None
        failed = await self._host.prepare(number, change)
        self._control.send(control.Prepared(number, failed, self._host.sizes(number)))

    async def _free(self, number: int, ended: Awaitable[object]) -> None:
        await ended
        if self._bring is not None:
            await self._trimmer.trim()
        self._control.send(control.Freed(number))

    async def index(self) -> list[Entry]:
        """The models of the repository, as the supervisor knows them."""
        return await self._ask("index")

    async def load(self, name: str, overrides: Mapping[str, int | None], who: str) -> None:
        """Has all workers load a model."""
        await self._ask("load", name=name, overrides=dict(overrides), who=who)

    async def unload(self, name: str, who: str) -> None:
        """Has all workers unload a model."""
        await self._ask("unload", name=name, who=who)

    async def reroute(self, name: str, who: str) -> None:
        """Has all workers share the requests for a model as the repository says now."""
        await self._ask("reroute", name=name, who=who)

    async def _ask(self, action: str, **more: Any) -> list[Entry]:
        number = self._asked = self._asked + 1
        question = self._questions[number] = _Question(self._loop.create_future(), [])
        self._control.send(control.Ask(number, action, **more))
        return await question.answer

    def _answered(self, told: control.Told) -> None:
        question = self._questions[told.number]
        question.entries.extend(told.entries)
        if told.last:
            del self._questions[told.number]
            if question.answer.done():  # nobody waits any more
                return
            if told.kind:
                question.answer.set_exception(RepositoryError(told.kind, told.error))
            else:
                question.answer.set_result(question.entries)

    # Feedback.

    async def judge(self, model: str, labels: RightAnswers) -> int:
        """Has the other workers judge labels of answers that were not given here."""
        number = self._asked = self._asked + 1
        verdict = self._verdicts[number] = self._loop.create_future()
        for message in control.labels_in_pieces(number, model, labels):
            self._control.send(message)
        judged = await verdict
        if judged.status:
            raise HTTPError(judged.status, judged.error, *(["Retry-After: 1"] if judged.status == 503 else []))
        return judged.rows

    def _judged(self, number: int, model: str, labels: RightAnswers, *, count: bool) -> control.Judged:
        """What this worker has to say to feedback that another one got."""
        parts, rest = divide(self._metrics.judges(model), labels)
        known = [index for index, request_id in enumerate(labels) if request_id not in rest]
        try:
            for judge, held in parts:
                judge.check(held)
        except HTTPError as error:
            return control.Judged(number, known, status=error.status, error=error.message)
        if not count:
            return control.Judged(number, known)
        if rest:  # dropped since this worker was asked whether it knows them
            error = unknown_answer()
            return control.Judged(number, known, status=error.status, error=error.message)
        for judge, held in parts:
            judge.settle(held)
        return control.Judged(number, known, rows_of(parts))

    # What is counted.

    def _send_counts(self, number: int = 0) -> None:
        for message in control.in_pieces(self._metrics.counts(), number):
            self._control.send(message)

    async def _report(self, frontend: HTTPFrontEnd) -> None:
        while True:
            if not self._metrics.live:
                self._stop.asked.set()
            self._control.send(control.Connections(frontend.state.open))
            self._send_counts()
            await asyncio.sleep(control.REPORT_S)

    def _gather(self, then: Callable[[ServerMetrics], object]) -> None:
        """Calls back with what the whole server has counted."""
        self._asked += 1
        self._askers[self._asked] = then
        self._send_counts()
        self._control.send(control.Total(self._asked))

    def _show(self, others: dict[str, Any], number: int) -> None:
        then = self._askers.pop(number)
        try:
            then(self._metrics.plus(others))
        except Exception:
            _log.exception("what is counted could not be shown")


def check_device() -> None:
    """Refuses to be one of several on a device that the others would want whole too.

    Raises:
        ServeError: where models do not run on the CPU.
    """
    from lepton_xla.compiler.devices import platform_here

    platform = platform_here()
    if platform != "cpu":
        raise ServeError(
            f"each of --workers holds the model, and here it would run on the {platform}: serve from one process, "
            "without --workers, or set JAX_PLATFORMS=cpu"
        )


async def _main(settings: control.Settings, end: socket.socket) -> bool:
    from lepton_xla.compiler import load

    cores = max(1, len(os.sched_getaffinity(0)) // settings.workers)
    if settings.options.memory is None:
        keep_memory()
    run_on_calling_thread()
    count_on_cores(cores)
    check_device()
    metrics, models, devices = ServerMetrics(), Registry(), devices_of_process()
    for device in devices:
        device.start(asyncio.get_running_loop())
    host: Host[Warm] | None = None
    samples = sample_writer(settings.options)
    name = digest = ""

    def make(warm: Warm) -> ModelHandle:
        return open_model(
            warm.engine, warm.measured, warm.signature, warm.options, metrics, warm.device or devices[0], cores,
            warm.model, warm.serving, samples,
        )  # fmt: skip

    if settings.artifact:
        options = settings.options
        servable = load(settings.artifact, trust=options.trust, decrypt_key=options.decrypt_key)
        signature = signature_of(servable, settings.options.name)
        engine: Engine[Call] = Engine(servable, signature)
        handle = make(Warm(servable, signature, engine, engine.warm_up(), settings.options))
        models.put(handle)
        name, digest = signature.name, servable.manifest.sha256
    else:
        loader = ArtifactLoader(settings.options, metrics, make, devices)
        host = Host(models, loader, metrics, trims=settings.options.memory is None)
    worker = Worker(settings, metrics, models, host, end, asyncio.get_running_loop())
    finished = False
    try:
        finished = await worker.serve(name, digest)
        return finished
    finally:
        if samples is not None:
            samples.close()
        if host is not None:
            host.close()
        for device in devices:
            device.stop(5.0 if finished else 0.0)
        if host is not None and host.loading:
            leave(0 if finished else 1)


if __name__ == "__main__":
    sys.exit(run_child(_main))
