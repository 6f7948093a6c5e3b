"""The routes, and the way of an infer request: decode, hand to the scheduler, answer. Runs on the event loop.

The path of an infer request is plain callbacks: no task and no future is made for it.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any

import msgspec

from lepton_xla.serve.access.auth import Guard
from lepton_xla.serve.batching.scheduler import Call
from lepton_xla.serve.errors import RefusedError
from lepton_xla.serve.http.date import DATE
from lepton_xla.serve.http.exchange import Exchange, Head
from lepton_xla.serve.http.workers import Workers
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.models.registry import Registry
from lepton_xla.serve.observe import exposition
from lepton_xla.serve.observe.metrics import Metrics
from lepton_xla.serve.observe.refusals import Refusals
from lepton_xla.serve.observe.statistics import model_statistics
from lepton_xla.serve.protocol import encoding, metadata, openapi, routes
from lepton_xla.serve.protocol.jsondata import PIECE_BYTES
from lepton_xla.serve.protocol.response import encode_response
from lepton_xla.serve.protocol.wire import InferRequest

_log = logging.getLogger("lepton_xla.serve")

# An answer that takes no more than what holds the request does is not counted, nor is that.
_SMALL_ANSWER_BYTES = 1024

type Route = Callable[[Exchange], None]
type Page = Callable[[ModelHandle, Exchange], None]
type Gather = Callable[[Callable[[Metrics], object]], object]


class InferCall(Call, kw_only=True, eq=False):
    """An infer request on its way.

    Attributes:
        app: answers it.
        model: runs it.
        exchange: where the answer goes.
        coding: how it is compressed, where that is worth it; None never compresses.
    """

    app: App
    model: ModelHandle
    exchange: Exchange
    coding: str | None

    def finish(self, outputs: Sequence[bytes | memoryview]) -> None:
        """Answers."""
        app, plan = self.app, self.request.plan
        try:
            if plan.prefix is not None and self.coding is None:
                app.send(self, b"".join((DATE.ok, plan.prefix, *outputs)))
            else:
                app.answer(self, outputs)
        except RefusedError as refusal:
            self.fail(refusal)

    def fail(self, refusal: RefusedError) -> None:
        """Answers with an error."""
        self.app.refuse(self.exchange, refusal, self.request.plan.id)

    def cancel(self) -> None:
        """The client went away."""
        self.model.scheduler.cancel(self)


class App:
    """Answers exchanges.

    Args:
        models: those there are.
        metrics: what is counted of the server.
        limits: the bounds on a request.
        guard: asks for tokens; None lets everybody ask everything.
        server_name: what the server's metadata calls it.
        max_delay_s: what the model's configuration says of waiting for company.
        compress_bytes: the smallest infer answer worth compressing for a client that accepts it.
        gather: calls back with what the whole server has counted; None if `metrics` is all of it.
    """

    def __init__(
        self,
        models: Registry,
        metrics: Metrics,
        limits: Limits,
        *,
        guard: Guard | None = None,
        server_name: str = metadata.SERVER_NAME,
        max_delay_s: float = 0.0,
        compress_bytes: int = 4096,
        gather: Gather | None = None,
    ) -> None:
        self._models = models
        self._metrics = metrics
        self._limits = limits
        self._guard = guard
        self._compress_bytes = compress_bytes
        self._workers = Workers(limits.max_buffered_bytes)
        self._refusals = Refusals()
        self._gather: Gather = gather or (lambda then: then(metrics))
        self._handlers: dict[str, Route] = {
            "server_live": self._show_live,
            "server_ready": self._show_ready,
            "server_metadata": self._page(lambda: metadata.server_metadata(server_name)),
            "openapi": self._page(lambda: openapi.document([model.signature for model in models])),
            "metrics": self._show_metrics,
            "statistics": lambda exchange: self._show_statistics(models, exchange),
            "repository_index": self._show_index,
            "log_settings": self._page(metadata.log_settings),
            "trace_settings": self._page(metadata.trace_settings),
        }
        self._model_pages: dict[str, Page] = {
            "model_metadata": self._show_model,
            "model_ready": self._show_model_ready,
            "model_config": lambda model, exchange: self._json(
                exchange, metadata.model_config(model.signature, max_delay_s)
            ),
            "model_statistics": lambda model, exchange: self._show_statistics([model], exchange),
            "model_trace_settings": lambda model, exchange: self._json(exchange, metadata.trace_settings()),
        }

    def __call__(self, exchange: Exchange) -> None:
        """Handles one request; whatever happens it is answered."""
        head = exchange.head
        try:
            if head.generation != self._models.generation:
                self.invite(head)
            head.route(exchange)
        except RefusedError as refusal:
            self.refuse(exchange, refusal)
        except Exception:
            _log.exception("a request could not be handled")
            self.refuse(exchange, RefusedError(500, "internal error"))

    def invite(self, head: Head) -> None:
        """Finds the route of a head, also where its client waits to be told that its body is welcome.

        Raises:
            RefusedError: where there is nothing that would read it, or the client may not ask.
        """
        head.route, head.generation = self._enter(head), self._models.generation

    # Routing. What it finds is kept with the head, so that a client's next request skips it. A model is kept by a weak
    # reference, as a head may be kept for long after the model's place was taken.

    def _enter(self, head: Head) -> Route:
        """The route of a head, for those who may use it; the path is not looked at before the token."""
        guard = self._guard
        if guard is None:
            return self._route(head)[1]
        grant = guard.authenticate(head)
        scope, route = self._route(head)
        return guard.protect(grant, scope, route, self)

    def _route(self, head: Head) -> tuple[str, Route]:
        """What a token has to be good for on the route of a head, and what answers it."""
        route, parameters = routes.find(head.method, head.target)
        if route.refusal:
            return route.scope, functools.partial(self._decline, route)
        model = parameters.get("model")
        if model is None:
            return route.scope, self._handlers[route.name]
        found = weakref.ref(self._models.find(model, parameters.get("version")))
        if route.name == "infer":
            return route.scope, self._infer_route(head, found)
        return route.scope, functools.partial(self._show_page, self._model_pages[route.name], found)

    def _infer_route(self, head: Head, found: weakref.ref[ModelHandle]) -> Route:
        headers = head.headers
        length = headers.get(b"inference-header-content-length")
        if length is not None and not (length.isdigit() and len(length) < 20):
            raise RefusedError(400, "Inference-Header-Content-Length is not a number of bytes")
        coding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        accept = headers.get(b"accept-encoding", b"").decode("latin-1")
        json_bytes = None if length is None else int(length)
        accepted = encoding.choose(accept) if accept else None
        if coding in ("", "identity"):
            # Only the JSON part takes long to read: where that is known to be small, nothing has to be looked at later.
            short = json_bytes is not None and json_bytes <= PIECE_BYTES
            return functools.partial(self._infer if short else self._infer_any, found, json_bytes, accepted)
        return functools.partial(self._infer_coded, found, coding, json_bytes, accepted)

    # Everything but infer.

    def _json(self, exchange: Exchange, value: Any, status: int = 200) -> None:
        self._metrics.codes[status] += 1
        exchange.answer(status, msgspec.json.encode(value))

    def refuse(self, exchange: Exchange, refusal: RefusedError, request_id: str | None = None) -> None:
        """Answers with an error, unless there was an answer."""
        if not exchange.answered:
            self._metrics.codes[refusal.status] += 1
            self._refusals.note(refusal, exchange, request_id)
            exchange.refuse(refusal)

    def refused(self, refusal: RefusedError) -> None:
        """Told of an error that was answered before there was a request to be handled."""
        self._metrics.codes[refusal.status] += 1
        self._refusals.note(refusal)

    def _page(self, make: Callable[[], Any]) -> Route:
        return lambda exchange: self._json(exchange, make())

    def _decline(self, route: routes.Route, exchange: Exchange) -> None:
        headers = ("Allow: GET, HEAD",) if route.status == 405 else ()
        raise RefusedError(route.status, route.refusal, *headers)

    def _show_live(self, exchange: Exchange) -> None:
        live = self._metrics.live
        self._json(exchange, metadata.ServerLive(live), 200 if live else 503)

    def _show_ready(self, exchange: Exchange) -> None:
        ready = self._metrics.ready
        self._json(exchange, metadata.ServerReady(ready=ready, live=self._metrics.live), 200 if ready else 503)

    def _show_page(self, page: Page, found: weakref.ref[ModelHandle], exchange: Exchange) -> None:
        page(_held(found), exchange)

    def _show_model(self, model: ModelHandle, exchange: Exchange) -> None:
        signature = model.signature
        self._json(exchange, metadata.model_metadata(signature, self._models.versions(signature.name)))

    def _ready(self, model: ModelHandle) -> bool:
        return self._metrics.ready and model.health.ready

    def _show_model_ready(self, model: ModelHandle, exchange: Exchange) -> None:
        ready = self._ready(model)
        self._json(exchange, metadata.ModelReady(model.signature.name, ready), 200 if ready else 503)

    def _show_index(self, exchange: Exchange) -> None:
        models = [(model.signature, self._ready(model)) for model in self._models]
        self._json(exchange, metadata.repository_index(models, exchange.body))

    def _show_statistics(self, models: Iterable[ModelHandle], exchange: Exchange) -> None:
        self._gather(
            lambda metrics: self._json(
                exchange, metadata.Statistics([model_statistics(model.signature, metrics) for model in models])
            )
        )

    def _show_metrics(self, exchange: Exchange) -> None:
        self._metrics.codes[200] += 1
        self._gather(lambda metrics: exchange.answer(200, exposition.render(metrics), exposition.CONTENT_TYPE))

    # Infer.

    def _infer(
        self, found: weakref.ref[ModelHandle], json_bytes: int | None, accepted: str | None, exchange: Exchange
    ) -> None:
        model = found()
        assert model is not None  # as in `_held`, without a call
        shed = model.scheduler.shed
        if shed is not None:
            # An overloaded server refuses as often as it answers, and what it would say does not depend on the tensors.
            plan = model.decoder.repeated(exchange.body, json_bytes)
            if plan is not None and (refusal := shed(plan)) is not None:
                self.refuse(exchange, refusal, plan.id)
                return
        self._submit(model, exchange, accepted, model.decoder.decode(exchange.body, json_bytes))

    def _infer_any(
        self, found: weakref.ref[ModelHandle], json_bytes: int | None, accepted: str | None, exchange: Exchange
    ) -> None:
        body = exchange.body
        if len(body) <= PIECE_BYTES:
            self._infer(found, json_bytes, accepted, exchange)
        else:
            model = _held(found)
            self._submit_later(model, exchange, accepted, lambda: model.decoder.decode(body, json_bytes))

    def _infer_coded(
        self,
        found: weakref.ref[ModelHandle],
        coding: str,
        json_bytes: int | None,
        accepted: str | None,
        exchange: Exchange,
    ) -> None:
        body, most, model = exchange.body, self._limits.max_body_bytes, _held(found)
        plain = encoding.inflate_short(body, coding, min(PIECE_BYTES, most))
        if plain is not None:
            self._submit(model, exchange, accepted, model.decoder.decode(plain, json_bytes))
            return

        def read() -> InferRequest:
            return model.decoder.decode(encoding.inflate(body, coding, most), json_bytes)

        self._submit_later(model, exchange, accepted, read)

    def _submit(self, model: ModelHandle, exchange: Exchange, accepted: str | None, request: InferRequest) -> None:
        plan = request.plan
        if plan.answer_bytes > _SMALL_ANSWER_BYTES:
            exchange.reserve(plan.answer_bytes)
        call = InferCall(
            plan.rows, plan.key, exchange.started_s, nbytes=request.nbytes,
            request=request, app=self, model=model, exchange=exchange, coding=accepted,
        )  # fmt: skip
        exchange.work = call
        model.scheduler.submit(call)

    def _submit_later(
        self, model: ModelHandle, exchange: Exchange, accepted: str | None, read: Callable[[], InferRequest]
    ) -> None:
        """Reads a long body on another thread. Answers keep their order: that is the connection's business."""

        def submit(request: InferRequest) -> None:
            # Set too where the client has gone.
            if not exchange.answered:
                self._submit(model, exchange, accepted, request)
            exchange.connection.hold(False)

        def refuse(refusal: RefusedError) -> None:
            self.refuse(exchange, refusal)
            exchange.connection.hold(False)

        exchange.connection.hold(True)
        try:
            self._workers.run(len(exchange.body), read, submit, refuse)
        except RefusedError as refusal:
            refuse(refusal)

    def answer(self, call: InferCall, outputs: Sequence[bytes | memoryview]) -> None:
        """Answers an infer request with the bytes of its outputs."""
        plan = call.request.plan
        size = sum(map(len, outputs))
        compressed = call.coding is not None and size >= self._compress_bytes
        if plan.prefix is not None and not compressed:
            self.send(call, b"".join((DATE.ok, plan.prefix, *outputs)))
        elif size <= PIECE_BYTES or (plan.constant and not compressed):
            self.send(call, self._write(call, outputs))
        else:
            # They are only good until this returns.
            kept = [bytes(output) for output in outputs]
            self._workers.run(
                size,
                lambda: self._write(call, kept),
                functools.partial(self.send, call),
                functools.partial(self.refuse, call.exchange),
            )

    def send(self, call: InferCall, payload: bytes) -> None:
        """Answers an infer request with all that is to be sent."""
        exchange = call.exchange
        if not exchange.answered:
            call.model.metrics.answered(monotonic() - exchange.started_s, len(exchange.body), len(payload))
            exchange.send(payload)

    def _write(self, call: InferCall, outputs: Sequence[memoryview | bytes]) -> bytes:
        """The answer, whose constant part, if it has one, stays with the plan for the next equal request."""
        plan = call.request.plan
        head, tail = encode_response(call.model.signature, plan, outputs)
        fields = "Content-Type: application/json\r\n"
        if tail:
            fields = f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {len(head)}\r\n"
        body = b"".join((head, *tail))
        if call.coding is not None and len(body) >= self._compress_bytes:
            body = encoding.deflate(body, call.coding)
            fields += f"Content-Encoding: {call.coding}\r\nVary: Accept-Encoding\r\n"
            return b"".join((DATE.ok, f"{fields}Content-Length: {len(body)}\r\n\r\n".encode(), body))
        start = f"{fields}Content-Length: {len(body)}\r\n\r\n".encode()
        if plan.constant:
            plan.prefix = start + head
        return b"".join((DATE.ok, start, body))

    def close(self) -> None:
        """Lets go of the threads that read and write long bodies."""
        self._workers.close()


def _held(found: weakref.ref[ModelHandle]) -> ModelHandle:
    """The model that a route leads to; it is there, because the route is looked up anew once the registry changes."""
    model = found()
    assert model is not None
    return model
