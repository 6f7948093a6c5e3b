"""The HTTP side of a server: connections and app, from readiness to drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic

from lepton_xla.serve.access.access import Access
from lepton_xla.serve.app.app import App, OnDemand
from lepton_xla.serve.app.feedback import Others
from lepton_xla.serve.app.options import Options, url_of
from lepton_xla.serve.app.pages import Gather
from lepton_xla.serve.app.repository import Control
from lepton_xla.serve.http.drain import Closable, Stop, drain
from lepton_xla.serve.http.server_state import ServerState
from lepton_xla.serve.models.records import Records
from lepton_xla.serve.models.registry import Registry
from lepton_xla.serve.monitor.monitoring import WATCHED, Monitoring, Watched
from lepton_xla.serve.observe.access_log import AccessLog
from lepton_xla.serve.observe.metrics import DEVICES, added
from lepton_xla.serve.observe.observer import Observer, watching
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.observe.tracing import tracing
from lepton_xla.serve.protocol.routes import OPEN_PATHS
from lepton_xla.serve.traffic.adjuster import Adjuster
from lepton_xla.serve.traffic.director import Director, Known

_log = logging.getLogger("lepton_xla.serve")

_SWEEP_S = 0.5
_LOOK_S = 1.0


class HTTPFrontEnd:
    """Connections, and the app that answers them.

    Args:
        models: the models served.
        metrics: the server's counters.
        options: how the server runs.
        access: who can reach it.
        gather: see `Pages`.
        control: see `App`.
        repository: see `App`.
        bring, others: see `App`.
        sends: whether this process sends alerts; of several, one does.

    Attributes:
        state: what the connections share.
    """

    def __init__(
        self,
        models: Registry,
        metrics: ServerMetrics,
        options: Options,
        access: Access,
        gather: Gather | None = None,
        control: Control | None = None,
        repository: str = "",
        *,
        sends: bool = True,
        bring: OnDemand | None = None,
        others: Others | None = None,
    ) -> None:
        self._records = Records(options.audit_log if repository else None)
        self._metrics = metrics
        self._models = models
        self._options = options
        self._access = access
        observers: list[Observer] = []
        if options.access_log_sample:
            observers.append(AccessLog(options.access_log_sample))
        self._spans = tracing(options.otel_endpoint)
        if self._spans is not None:
            observers.append(self._spans)
        self._app = App(
            models, metrics, options.limits,
            guard=access.guard, server_name=options.server_name,
            compress_bytes=options.compress_bytes, gather=gather,
            control=control, repository=repository, record=self._records, audit_log=options.audit_log,
            bring=bring, others=others, trusts=options.trust is not None,
        )  # fmt: skip
        self.state = ServerState(
            watching(self._app, observers), options.limits,
            invite=self._app.invite, refused=self._app.refused, always=OPEN_PATHS,
        )  # fmt: skip
        metrics.watch(self._figures)
        metrics.monitoring = Monitoring(options.rules(), url_of((options.host, options.port), options), sends=sends)
        self._gather: Gather = gather or (lambda then: then(metrics))
        self._director: Director | None = None
        self._revoked: dict[tuple[str, str], asyncio.Task[bool]] = {}
        self._counted: ServerMetrics | None = None
        self._directing: asyncio.Task[None] | None = None
        if sends and control is not None and repository:
            self._director = Director(Path(repository), control.index, control.reroute, self._records)
        self._adjuster: Adjuster | None = None
        self._adjusting: asyncio.Task[None] | None = None
        if self._director is not None and control is not None:
            self._adjuster = Adjuster(
                Path(repository), control.index, control.reroute, self._models_of, self._judged, self._records
            )
        if access.guard is not None:
            self.state.admit = access.guard.authenticate

    def _figures(self) -> dict[str, float]:
        """The server's gauges; sets those of the models."""
        for each in self._metrics:
            each.now = {}
        for model in self._models:
            figures = model.scheduler.figures() | {
                "model_ready": float(model.health.ready), "model_bytes": float(model.nbytes),
                DEVICES: {str(number): 1.0 for number in model.devices},
            }  # fmt: skip
            if self._adjuster is not None:
                figures["adjustment_step"] = float(
                    self._adjuster.step_of(model.signature.name, model.signature.version)
                )
            model.metrics.now = added(model.metrics.now, figures)
        return self.state.figures()

    async def serve(self, listener: Closable, stop: Stop, on_ready: Callable[[], object]) -> bool:
        """Becomes ready, and serves until told to stop.

        Args:
            listener: accepts connections; open already.
            stop: tells when to stop.
            on_ready: called once ready.

        Returns:
            Whether everything accepted was answered.
        """
        self.state.sweep(monotonic())
        sweeper = asyncio.create_task(self._sweep(stop))
        looking = asyncio.create_task(self._look())
        options = self._options
        try:
            self._metrics.ready = True
            on_ready()
            await stop.asked.wait()
            self._metrics.ready = False
            return await drain(self.state, listener, stop, options.lame_duck_s, options.stop_timeout_s)
        finally:
            sweeper.cancel()
            looking.cancel()
            for task in (self._directing, self._adjusting, *self._revoked.values()):
                if task is not None:
                    task.cancel()
            self._metrics.monitoring.close()
            for connection in tuple(self.state.connections):
                connection.abort()
            self._app.close()
            self._records.close()
            if self._spans is not None:
                self._spans.close()

    async def _look(self) -> None:
        """Keeps drift and alerts up to date."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                self._gather(self._watch)
            except Exception:
                _log.exception("drift and alerts could not be looked at")

    def _watch(self, metrics: ServerMetrics) -> None:
        if metrics is self._metrics:  # what comes from other processes is up to date
            for each in self._models:
                each.metrics.now["queue_rows"] = each.scheduler.queue_rows
        metrics.monitoring.look(
            Watched(
                each.signature.name, each.signature.version,
                metrics.of(each.signature.name, each.signature.version).counts(WATCHED), each.metrics.request_s.bounds,
                None if each.metrics.monitor is None else each.metrics.monitor.profile,
                getattr(each.model, "certificate", None),
            )
            for each in self._models
        )  # fmt: skip
        if self._director is not None and self._options.certificate_rollback:
            self._revoke(self._director, metrics.monitoring.broken)
        if self._director is not None and (self._directing is None or self._directing.done()):
            self._directing = asyncio.get_running_loop().create_task(self._direct(self._director, metrics))
        if self._adjuster is not None and (self._adjusting is None or self._adjusting.done()):
            self._counted = metrics
            self._adjusting = asyncio.get_running_loop().create_task(self._adjust(self._adjuster))

    def _revoke(self, director: Director, broken: Sequence[tuple[str, str]]) -> None:
        """Has labels leave versions whose certificate does not hold: whenever they stand there, not once only."""
        for key in [key for key, task in self._revoked.items() if task.done() and key not in broken]:
            del self._revoked[key]
        for name, version in broken:
            before = self._revoked.get((name, version))
            again = before is None or (before.done() and before.result())
            if again and self._models.labels(name).get("stable") == version:
                self._revoked[name, version] = asyncio.get_running_loop().create_task(
                    self._leave(director, name, version)
                )

    async def _leave(self, director: Director, name: str, version: str) -> bool:
        try:
            return await director.revoke(name, version)
        except Exception:
            _log.exception("the label of model %s could not leave version %s", name, version)
            return False

    async def _adjust(self, adjuster: Adjuster) -> None:
        """Has weights that move in steps go on."""
        try:
            await adjuster.look(self._models.names())
        except Exception:
            _log.exception("adjustments could not be looked at")

    def _models_of(self, name: str) -> list[object]:
        return [each.model for each in self._models if each.signature.name == name]

    def _judged(self, name: str, version: str) -> tuple[int, int]:
        """Rows of a version that feedback calls right and wrong, in all processes."""
        if self._counted is None:
            return 0, 0
        counts = self._counted.of(name, version).feedback_counts()
        return counts.get("right", 0), counts.get("wrong", 0)

    async def _direct(self, director: Director, metrics: ServerMetrics) -> None:
        """Has rollouts go on or back, by what all processes have counted."""
        shared: dict[str, dict[str, Known]] = {}
        for each in self._models:
            name, version = each.signature.name, each.signature.version
            if self._models.split(name) is not None:
                counted = metrics.of(name, version).counts()
                profile = None if each.metrics.monitor is None else each.metrics.monitor.profile
                shared.setdefault(name, {})[version] = counted, each.metrics.request_s.bounds, profile
        try:
            await director.look(shared)
        except Exception:
            _log.exception("rollouts could not be looked at")

    async def _sweep(self, stop: Stop) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                self.state.sweep(monotonic())
                self._access.refresh()
                healths = [model.health for model in self._models]
                for health in healths:
                    health.check(monotonic())
                # One model that does not work is told of by its own route, and must not take the others with it.
                self._metrics.live = not healths or any(health.live for health in healths)
                well = not healths or any(health.ready for health in healths)
                self._metrics.ready = well and not stop.asked.is_set()
            except Exception:
                # The sweeper must go on: it enforces all time limits.
                _log.exception("the sweep of connections and files failed")
