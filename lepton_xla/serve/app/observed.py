"""An app some of whose requests are watched. One that watches none is `App` itself, which pays nothing for this."""

from __future__ import annotations

from collections.abc import Sequence

from lepton_xla.serve.app.app import App, InferCall
from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.observe.observer import Observer, Tap
from lepton_xla.serve.protocol.wire import InferRequest


class ObservedApp(App):
    """An app some of whose requests are watched."""

    observers: Sequence[Observer] = ()

    def __call__(self, exchange: Exchange) -> None:
        """Handles one request; whatever happens it is answered."""
        observers: list[Observer] | None = None
        for observer in self.observers:
            if observer.wants(exchange):
                observers = [*(observers or ()), observer]
        if observers:
            Tap(exchange, observers)
        super().__call__(exchange)

    def _submit(self, model: ModelHandle, exchange: Exchange, accepted: str | None, request: InferRequest) -> None:
        tap = exchange.connection
        if isinstance(tap, Tap):
            tap.request = request
        super()._submit(model, exchange, accepted, request)

    def send(self, call: InferCall, payload: bytes) -> None:
        """Answers an infer request with all that is to be sent."""
        tap = call.exchange.connection
        if isinstance(tap, Tap):
            tap.times = call.times
        super().send(call, payload)
