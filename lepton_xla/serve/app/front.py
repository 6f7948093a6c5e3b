"""The side of a server that clients see: its connections and what they are answered, until it is drained."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from lepton_xla.serve.access.entrance import Access
from lepton_xla.serve.app.app import App, Gather
from lepton_xla.serve.app.observed import ObservedApp
from lepton_xla.serve.app.options import Options
from lepton_xla.serve.batching.scheduler import Scheduler
from lepton_xla.serve.http.drain import Closable, Stop, drain
from lepton_xla.serve.http.hub import Hub
from lepton_xla.serve.observe.access_log import AccessLog
from lepton_xla.serve.observe.health import Health
from lepton_xla.serve.observe.metrics import Metrics
from lepton_xla.serve.observe.observer import Observer
from lepton_xla.serve.observe.tracing import tracing
from lepton_xla.serve.protocol.routes import OPEN_PATHS
from lepton_xla.serve.protocol.signature import Signature

_log = logging.getLogger("lepton_xla.serve")

_SWEEP_S = 0.5


class Front:
    """Connections to one model.

    Args:
        signature: the model's.
        scheduler: runs its calls.
        metrics: what is counted.
        options: how the server runs.
        access: who can reach it.
        health: says whether the scheduler works.
        gather: see `App`.

    Attributes:
        hub: what the connections share.
    """

    def __init__(
        self,
        signature: Signature,
        scheduler: Scheduler,
        metrics: Metrics,
        options: Options,
        access: Access,
        health: Health,
        gather: Gather | None = None,
    ) -> None:
        self._metrics = metrics
        self._health = health
        self._options = options
        self._access = access
        observers: list[Observer] = []
        if options.access_log_sample:
            observers.append(AccessLog(options.access_log_sample))
        self._spans = tracing(options.otel_endpoint)
        if self._spans is not None:
            observers.append(self._spans)
        self._app = (ObservedApp if observers else App)(
            signature, scheduler, metrics, options.limits,
            guard=access.guard, server_name=options.server_name,
            max_delay_s=options.max_delay_us * 1e-6, compress_bytes=options.compress_bytes, gather=gather,
        )  # fmt: skip
        if isinstance(self._app, ObservedApp):
            self._app.observers = observers
        self.hub = Hub(
            self._app, options.limits, invite=self._app.invite, refused=self._app.refused, always=OPEN_PATHS
        )  # fmt: skip
        metrics.version = signature.version
        metrics.watch(lambda: scheduler.figures() | self.hub.figures())
        if access.guard is not None:
            self.hub.admit = access.guard.authenticate

    async def serve(self, entrance: Closable, stop: Stop, on_ready: Callable[[], object]) -> bool:
        """Says that it is ready, and serves until it is told to stop.

        Args:
            entrance: where connections come in, open already.
            stop: tells when.
            on_ready: called first.

        Returns:
            Whether everything accepted was answered.
        """
        self.hub.sweep(monotonic())
        sweeper = asyncio.create_task(self._sweep(stop))
        options = self._options
        try:
            self._metrics.ready = True
            on_ready()
            await stop.asked.wait()
            self._metrics.ready = False
            return await drain(self.hub, entrance, stop, options.lame_duck_s, options.stop_timeout_s)
        finally:
            sweeper.cancel()
            for connection in tuple(self.hub.connections):
                connection.abort()
            self._app.close()
            if self._spans is not None:
                self._spans.close()

    async def _sweep(self, stop: Stop) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                self.hub.sweep(monotonic())
                self._access.refresh()
                self._health.check(monotonic())
                self._metrics.live = self._health.live
                self._metrics.ready = self._health.ready and not stop.asked.is_set()
            except Exception:
                # Without the sweeper no time limit would hold any more.
                _log.exception("the sweep of connections and files failed")
