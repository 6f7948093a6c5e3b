"""The supervisor process: it owns the address, starts the workers, and restarts those that die.

It imports no JAX and handles no request. It must not crash: if it dies, the workers notice and stop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Iterable
from time import monotonic
from typing import Any

import msgspec

from lepton_xla.errors import RepositoryError, ServeError
from lepton_xla.serve.app.options import Options, url_of
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.arrivals import AT_ONCE, accept
from lepton_xla.serve.http.drain import Stop
from lepton_xla.serve.models.manager import Entry, Manager
from lepton_xla.serve.models.memory import Memory
from lepton_xla.serve.models.records import Records
from lepton_xla.serve.models.remote import open_repository
from lepton_xla.serve.processes import control
from lepton_xla.serve.processes.child import ENDING_S, Child, ended
from lepton_xla.serve.processes.control import Control
from lepton_xla.serve.processes.fleet import Fleet
from lepton_xla.serve.processes.packets import pair
from lepton_xla.serve.processes.tally import Tally
from lepton_xla.serve.processes.verdicts import Verdicts
from lepton_xla.serve.protocol.monitoring import RightAnswers

_log = logging.getLogger("lepton_xla.serve")

_BACKLOG = 1024
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 10.0
# A worker that ran for at least this long is restarted without a longer delay.
_STABLE_S = 30.0
# A ready worker that sends nothing for this long has a stuck event loop and is killed.
_SILENT_S = 60.0
# A worker that has sent nothing for this long gets no new connections. A healthy one reports twice as often.
_HEARD_S = 2 * control.REPORT_S


class Supervisor:
    """The workers of a server, and the address they serve.

    Args:
        artifact: path of the artifact to serve; empty for a repository.
        options: how to run; limits apply to each worker on its own.
        workers: number of worker processes.
        json_logs: whether log lines are JSON.
        repository: folder of the repository to serve.

    Attributes:
        address: host and port, once listening, of the first address; the path and 0 of a Unix socket.
        name: the model's name on the wire, once a worker has reported it; several are separated by commas.

    Raises:
        ServeError: if the server would be open to everyone, see `Access`.
    """

    def __init__(
        self,
        artifact: str,
        options: Options,
        workers: int,
        *,
        json_logs: bool = False,
        repository: str | None = None,
    ) -> None:
        folder = repository if repository is not None and "://" not in repository else ""
        self._settings = control.Settings(artifact, options, workers, json_logs, folder)
        self._options = options
        self._access = options.access()
        options.rules()  # what is wrong with them is said before workers are started
        self._workers = [Child(f"worker {number + 1}") for number in range(workers)]
        self._tally = Tally(self._workers)
        self._verdicts = Verdicts(self._workers)
        self._fleet = Fleet(self._workers, self._may_serve)
        self._manager: Manager | None = None
        self._memory: Memory | None = None
        self._known: list[str] = []
        if repository is not None:
            self._records = Records(options.audit_log)
            self._manager = Manager(
                open_repository(repository), self._fleet,
                explicit=options.explicit or options.memory is not None, watched=not options.explicit,
                poll_s=options.repository_poll_s, record=self._records,
            )  # fmt: skip
            if options.memory is not None:
                # All workers hold the same models, so each has its part of the memory.
                self._memory = Memory(
                    self._manager, self._fleet.roster, options.memory // workers, options.load_wait_s, each="worker"
                )
        self._asks: set[asyncio.Task[None]] = set()
        self._digest = ""
        self._open = False
        self._ending: set[Child] = set()
        self.address: tuple[str, int] = (options.host, options.port)
        self.name = ""

    @property
    def url(self) -> str:
        """The URL it listens on."""
        return url_of(self.address, self._options)

    def run(self, *, on_ready: Callable[[Supervisor], object]) -> bool:
        """Serves until SIGTERM or SIGINT; a second signal stops it at once.

        Args:
            on_ready: called once every worker is ready.

        Returns:
            Whether every accepted request was answered.

        Raises:
            ServeError: if the address is not available, or a worker fails to start the first time.
        """
        return asyncio.run(self._main(on_ready))

    async def _main(self, on_ready: Callable[[Supervisor], object]) -> bool:
        loop = self._loop = asyncio.get_running_loop()
        self._listening = self._access.listen()
        stop = Stop()
        stop.listen(loop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._begun: asyncio.Future[None] = loop.create_future()
        keepers = {child: loop.create_task(self._keep(child)) for child in self._workers}
        watching = loop.create_task(self._watch())
        try:
            asked = loop.create_task(stop.asked.wait())
            await asyncio.wait([self._begun, asked], return_when=asyncio.FIRST_COMPLETED)
            if not self._begun.done():
                return True
            self._begun.result()
            if self._manager is not None:
                starting = loop.create_task(self._manager.start(self._options.load))
                await asyncio.wait([starting, asked], return_when=asyncio.FIRST_COMPLETED)
                if not starting.done():
                    starting.cancel()
                    return True
                starting.result()
                self.name = ", ".join(self._manager.states)
                self._tell_known()
                self._managing = [loop.create_task(self._manager.watch())]
                if self._memory is not None:
                    self._managing += [loop.create_task(self._memory.watch()), loop.create_task(self._keep_known())]
            stop.warming = False
            self._listening.open(_BACKLOG)
            self._open = True
            addresses = self._listening.addresses
            self.address = addresses[0]
            self._accept_or_wait()
            urls = " and ".join(url_of(each, self._options) for each in addresses)
            _log.info("serving %s on %s with %d workers", self.name or "no model yet", urls, len(self._workers))
            on_ready(self)
            await asked
            return await self._drain(stop, keepers.values())
        finally:
            watching.cancel()
            if self._manager is not None:
                self._manager.close()
                self._records.close()
            self._listening.close()
            await self._end(keepers)

    # Processes.

    async def _keep(self, child: Child) -> int:
        """Runs a worker and restarts it until the server stops; returns its last exit code."""
        wait = _FIRST_WAIT_S
        while True:
            started = monotonic()
            try:
                code = await self._once(child)
            except OSError as error:
                # The machine is out of processes or descriptors, perhaps only for a while.
                child.reason, code = f"{child.name} could not be started: {error.strerror}", 1
            if child in self._ending:
                return code
            why = child.reason or (f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
            if not self._begun.done():
                self._begun.set_exception(ServeError(child.reason or f"{child.name} did not start: {why}"))
                return code
            if monotonic() - started > _STABLE_S:
                wait = _FIRST_WAIT_S
            _log.error("%s has ended: %s; it is started again in %g s", child.name, why, wait)
            await asyncio.sleep(wait)
            if child in self._ending:
                return 0
            wait = min(2 * wait, _LONGEST_WAIT_S)

    async def _once(self, child: Child) -> int:
        child.forget()
        ours, theirs = pair()
        try:
            with theirs:
                process = await child.start(theirs)
        except OSError:
            ours.close()
            raise
        gone = asyncio.Event()
        child.control = Control(
            ours, lambda message, _: self._told(child, message), gone.set, self._loop, with_fds=False
        )
        settings = msgspec.structs.replace(self._settings, sends_alerts=child is self._workers[0])
        child.control.hand(settings, [])
        try:
            await gone.wait()
        finally:
            child.control = None
            child.ready = False
            self._fleet.gone(child)
            self._verdicts.gone(child)
            self._tally.retire(child)
            self._accept_or_wait()
        return await ended(process)

    async def _watch(self) -> None:
        """Kills workers that have gone silent."""
        while True:
            before = monotonic()
            await asyncio.sleep(control.REPORT_S)
            now = monotonic()
            self._end_silent(now, now - before)

    def _end_silent(self, now: float, slept_s: float) -> None:
        for child in self._workers:
            if slept_s > 2 * control.REPORT_S:
                # This process was frozen too, say in a paused container, and may not have read their messages yet.
                child.heard_s = max(child.heard_s, now)
            if child.ready and child.process is not None and now - child.heard_s > _SILENT_S:
                child.ready = False
                child.reason = f"it has said nothing for {_SILENT_S:g} s"
                child.process.kill()

    def _reload(self) -> None:
        """Has the workers reload their files; without any, this process logs that there are none."""
        if self._access.reloads:
            self._tell_workers(control.Reload())
        else:
            self._access.reload()

    def _tell_workers(self, message: control.Message) -> None:
        for worker in self._workers:
            worker.send(message)

    # Messages from workers.

    def _told(self, child: Child, message: control.Message) -> None:
        waited, child.heard_s = monotonic() - child.heard_s, monotonic()
        if waited > _HEARD_S and child.ready:
            self._accept_or_wait()
        match message:
            case control.Ready(model, digest):
                self._is_ready(child, model, digest)
            case control.Failed(reason):
                child.reason = reason
            case control.Connections(count):
                child.open = count
            case control.Leaving():
                child.ready = False
                if child not in self._ending:
                    child.send(control.Closed())
            case control.Counts(_, number, last):
                child.count(message)
                if last:
                    self._tally.counted(child, number)
            case control.Total(number):
                self._tally.count(child, number)
            case control.Prepared(number, failed, sizes):
                self._fleet.prepared(child, number, failed, sizes)
            case control.Freed(number):
                self._fleet.freed(child, number)
            case control.Ask():
                self._begin(self._answer(child, message))
            case control.Judge(number, model):
                labels = child.labels.add(message)
                if labels is not None:
                    self._begin(self._judge(child, number, model, labels))
            case control.Judged():
                self._verdicts.judged(child, message)
            case _:
                raise ValueError("a message that is not for the supervisor")

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._asks.add(task)
        task.add_done_callback(self._asks.discard)

    async def _judge(self, child: Child, number: int, model: str, labels: RightAnswers) -> None:
        """Has the other workers judge feedback that a client has given to a worker."""
        try:
            judged = control.Judged(number, rows=await self._verdicts.judge(child, model, labels))
        except HTTPError as error:
            judged = control.Judged(number, status=error.status, error=error.message)
        child.send(judged)

    async def _answer(self, child: Child, ask: control.Ask) -> None:
        """Carries out what a client has asked a worker for."""
        repository = self._memory or self._manager
        assert repository is not None
        told, entries = control.Told(ask.number), list[Entry]()
        try:
            if ask.action == "index":
                entries = await repository.index()
            elif ask.action == "load":
                await repository.load(ask.name, ask.overrides, ask.who)
            elif ask.action == "reroute":
                await repository.reroute(ask.name, ask.who)
            elif ask.action == "bring":
                assert self._memory is not None
                await self._memory.ensure(ask.name)
            else:
                await repository.unload(ask.name, ask.who)
        except RepositoryError as error:
            told = control.Told(ask.number, error.kind, str(error))
        except Exception:
            _log.exception("a request of a client to the repository failed")
            told = control.Told(ask.number, "failed", "internal error")
        for some in itertools.batched(entries, 32):
            child.send(control.Told(ask.number, entries=list(some), last=False))
        child.send(told)

    def _tell_known(self) -> None:
        """Tells the workers which models can be loaded on demand, if that has changed."""
        if self._memory is not None and self._manager is not None and self._known != self._manager.loadable():
            self._known = self._manager.loadable()
            for message in control.names_in_pieces(self._known):
                self._tell_workers(message)

    async def _keep_known(self) -> None:
        while True:
            await asyncio.sleep(self._options.repository_poll_s)
            self._tell_known()

    def _is_ready(self, child: Child, model: str, digest: str) -> None:
        if self._manager is not None:
            for message in control.names_in_pieces(self._known):
                child.send(message)
            self._fleet.joined(child)
            return
        self.name = model
        if self._digest not in ("", digest):
            self._replace_others(child)
        self._digest = digest
        self._may_serve(child)

    def _may_serve(self, child: Child) -> None:
        """A worker can take connections."""
        child.ready = True
        if all(each.ready for each in self._workers) and not self._begun.done():
            self._begun.set_result(None)
        self._accept_or_wait()

    def _replace_others(self, worker: Child) -> None:
        """Restarts the workers that still serve the previous artifact."""
        _log.warning("%s has found another model in the artifact; the others are started again", worker.name)
        for other in self._workers:
            if other is not worker and other.ready:
                other.send(control.Stop())

    # Connections.

    def _open_workers(self) -> list[Child]:
        """The workers that may get connections (ready, and heard from lately), the one with the fewest first."""
        since = monotonic() - _HEARD_S
        found = (worker for worker in self._workers if worker.ready and worker.heard_s >= since)
        return sorted(found, key=lambda worker: worker.open)

    def _accept_or_wait(self) -> None:
        """Accepts connections while a worker can take them; otherwise they wait in the kernel."""
        if self._open:
            some = bool(self._open_workers())
            for listener in self._listening.sockets:
                if some:
                    self._loop.add_reader(listener, self._accept, listener)
                else:
                    self._loop.remove_reader(listener)

    def _accept(self, listener: socket.socket) -> bool:
        """Hands out waiting connections; returns whether there may be more."""
        for _ in range(AT_ONCE):
            workers = self._open_workers()
            if not workers:
                self._accept_or_wait()
                return False
            client = accept(listener, self._loop, self._accept_or_wait)
            if client is None:
                return False
            with client:
                _deal(client, workers)
        return True

    # The end.

    async def _drain(self, stop: Stop, keepers: Iterable[asyncio.Task[int]]) -> bool:
        """Lets workers answer what they accepted; returns whether they did."""
        if self._manager is not None:
            self._manager.close()  # workers that stop are no reason why a version could not be loaded
        self._ending.update(self._workers)
        self._tell_workers(control.Stop())
        hurry = self._loop.create_task(self._hurry(stop))
        await stop.hurried_in(self._options.lame_duck_s)
        # Closing the socket with connections waiting at it would reset them.
        for listener in self._listening.sockets:
            while self._accept(listener):
                pass
            self._loop.remove_reader(listener)
        self._open = False
        self._listening.close()
        self._tell_workers(control.Closed())
        done, late = await asyncio.wait(keepers, timeout=self._options.stop_timeout_s + ENDING_S)
        hurry.cancel()
        return not late and not any(task.result() for task in done)

    async def _hurry(self, stop: Stop) -> None:
        await stop.hurried.wait()
        self._tell_workers(control.Stop(hurried=True))

    async def _end(self, keepers: dict[Child, asyncio.Task[int]]) -> None:
        """Ends the workers that are left."""
        for child in self._workers:
            self._ending.add(child)
            if child.control is not None:
                child.control.close()
            keepers[child].cancel()
            await asyncio.wait([keepers[child]])
            if child.process is not None:
                await ended(child.process)


def _deal(client: socket.socket, workers: Iterable[Child]) -> None:
    """Hands a connection to the first worker with room in its socket; without one the connection is closed."""
    for worker in workers:
        if worker.control is not None and worker.control.hand(control.Connections(), [client.fileno()]):
            worker.open += 1
            return
