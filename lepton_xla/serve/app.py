"""The routes, and the way of an infer request: decode, hand to the scheduler, answer. Runs on the event loop.

The path of an infer request is plain callbacks: no task and no future is made for it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any
from urllib.parse import unquote

import msgspec

from lepton_xla.serve import encoding, routes
from lepton_xla.serve.auth import Guard
from lepton_xla.serve.errors import RefusedError
from lepton_xla.serve.exchange import Exchange, Head
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.metrics import CONTENT_TYPE, Metrics
from lepton_xla.serve.scheduler import Call, Scheduler
from lepton_xla.serve.signature import Signature, is_safe
from lepton_xla.serve.wire import Decoder, InferRequest, encode_head

_log = logging.getLogger("lepton_xla.serve")

type Route = Callable[[Exchange], None]


class InferCall(Call):
    """An infer request on its way: where the answer goes, and how it is compressed."""

    __slots__ = ("_app", "coding", "exchange")

    def __init__(self, app: App, request: InferRequest, exchange: Exchange, coding: str | None) -> None:
        super().__init__(request, exchange.started_s)
        self._app = app
        self.exchange = exchange
        self.coding = coding

    def finish(self, outputs: Sequence[memoryview]) -> None:
        """Answers."""
        self._app.answer(self, outputs)

    def fail(self, refusal: RefusedError) -> None:
        """Answers with an error."""
        self._app.refuse(self.exchange, refusal)

    def cancel(self) -> None:
        """The client went away."""
        self._app.scheduler.cancel(self)


class App:
    """Answers exchanges for one model.

    Args:
        signature: the model's.
        scheduler: runs calls, and tells them of their end on the event loop.
        metrics: what is counted.
        limits: the bounds on a request.
        guard: asks for tokens; None lets everybody ask everything.
        max_delay_s: what the model's configuration says of waiting for company.
        compress_bytes: the smallest infer answer worth compressing for a client that accepts it.
    """

    def __init__(
        self,
        signature: Signature,
        scheduler: Scheduler,
        metrics: Metrics,
        limits: Limits,
        *,
        guard: Guard | None = None,
        max_delay_s: float = 0.0,
        compress_bytes: int = 4096,
    ) -> None:
        self._signature = signature
        self.scheduler = scheduler
        self._metrics = metrics
        self._limits = limits
        self._guard = guard
        self._max_delay_s = max_delay_s
        self._compress_bytes = compress_bytes
        self._decoder = Decoder(signature, limits, scheduler.max_rows)

    def __call__(self, exchange: Exchange) -> None:
        """Handles one request; whatever happens it is answered."""
        head = exchange.head
        try:
            if head.route is None:
                head.route = self._enter(head)
            head.route(exchange)
        except RefusedError as refusal:
            self.refuse(exchange, refusal)
        except Exception:
            _log.exception("a request could not be handled")
            self.refuse(exchange, RefusedError(500, "internal error"))

    # Routing. What it finds is kept with the head, so that a client's next request skips it.

    def _enter(self, head: Head) -> Route:
        """The route of a head, for those who may use it; the path is not looked at before the token."""
        guard = self._guard
        if guard is None:
            return self._route(head)[1]
        grant = guard.authenticate(head)
        scope, route = self._route(head)
        return guard.protect(grant, scope, route, self)

    def _route(self, head: Head) -> tuple[str, Route]:
        path = head.target.partition(b"?")[0]
        if not path.startswith(b"/"):
            raise RefusedError(404, "no such route")
        # Decoded after splitting: an encoded slash is part of a name, not a separator.
        parts = [unquote(part.decode("latin-1"), errors="replace") for part in path[1:].split(b"/")]
        return routes.scope_of(parts), self._find(head, parts)

    def _find(self, head: Head, parts: list[str]) -> Route:
        if parts == ["metrics"]:
            return self._get(head, self._show_metrics)
        if parts[0] != "v2":
            raise RefusedError(404, "no such route")
        match parts[1:]:
            case [] | [""]:
                return self._get(head, lambda exchange: self._json(exchange, routes.server_metadata()))
            case ["health", "live"]:
                return self._get(head, lambda exchange: self._json(exchange, {"live": True}))
            case ["health", "ready"]:
                return self._get(head, self._show_ready)
            case ["models", "stats"]:
                return self._get(head, self._show_stats)
            case ["models", model, "versions", version, *action]:
                return self._model_route(head, model, version, action)
            case ["models", model, *action]:
                return self._model_route(head, model, None, action)
            case ["repository", "index"]:
                _allow(head, "POST")
                return self._show_index
            case _:
                raise RefusedError(404, "no such route")

    def _model_route(self, head: Head, model: str, version: str | None, action: list[str]) -> Route:
        signature = self._signature
        if model != signature.name:
            raise RefusedError(404, f"unknown model {model!r}" if is_safe(model) else "unknown model")
        if version is not None and version != signature.version:
            raise RefusedError(404, f"model {model!r} has no such version")
        match action:
            case []:
                return self._get(head, lambda exchange: self._json(exchange, routes.model_metadata(signature)))
            case ["ready"]:
                return self._get(head, self._show_model_ready)
            case ["config"]:
                delay_us = round(self._max_delay_s * 1e6)
                return self._get(head, lambda exchange: self._json(exchange, routes.model_config(signature, delay_us)))
            case ["stats"]:
                return self._get(head, self._show_stats)
            case ["infer"]:
                _allow(head, "POST")
                return self._infer_route(head)
            case _:
                raise RefusedError(404, "no such route")

    def _infer_route(self, head: Head) -> Route:
        headers = head.headers
        length = headers.get(b"inference-header-content-length")
        if length is not None and not (length.isdigit() and len(length) < 20):
            raise RefusedError(400, "Inference-Header-Content-Length is not a number of bytes")
        coding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        accept = headers.get(b"accept-encoding", b"").decode("latin-1")
        return functools.partial(
            self._infer,
            None if length is None else int(length),
            "" if coding == "identity" else coding,
            encoding.choose(accept) if accept else None,
        )

    def _get(self, head: Head, route: Route) -> Route:
        _allow(head, "GET", "HEAD")
        return route

    # Everything but infer.

    def _json(self, exchange: Exchange, value: Any, status: int = 200) -> None:
        self._metrics.codes[status] += 1
        exchange.answer(status, msgspec.json.encode(value))

    def refuse(self, exchange: Exchange, refusal: RefusedError) -> None:
        """Answers with an error, unless there was an answer."""
        if not exchange.answered:
            self._metrics.codes[refusal.status] += 1
            exchange.refuse(refusal)

    def _show_ready(self, exchange: Exchange) -> None:
        ready = self._metrics.ready
        self._json(exchange, {"ready": ready, "live": True}, 200 if ready else 503)

    def _show_model_ready(self, exchange: Exchange) -> None:
        ready = self._metrics.ready
        self._json(exchange, {"name": self._signature.name, "ready": ready}, 200 if ready else 503)

    def _show_stats(self, exchange: Exchange) -> None:
        self._json(exchange, routes.model_stats(self._signature, self._metrics))

    def _show_index(self, exchange: Exchange) -> None:
        state = "READY" if self._metrics.ready else "UNAVAILABLE"
        self._json(exchange, [{"name": self._signature.name, "version": self._signature.version, "state": state}])

    def _show_metrics(self, exchange: Exchange) -> None:
        self._metrics.codes[200] += 1
        self._metrics.waiting_rows = self.scheduler.waiting_rows
        exchange.answer(200, self._metrics.render(), CONTENT_TYPE)

    # Infer.

    def _infer(self, head_bytes: int | None, coding: str, accept: str | None, exchange: Exchange) -> None:
        body = exchange.body
        if coding:
            body = encoding.inflate(body, coding, self._limits.max_body_bytes)
        call = InferCall(self, self._decoder.decode(body, head_bytes), exchange, accept)
        self.scheduler.submit(call)
        exchange.on_cancel = call.cancel

    def answer(self, call: InferCall, outputs: Sequence[memoryview]) -> None:
        """Answers an infer request with the bytes of its outputs."""
        exchange = call.exchange
        plan = call.request.plan
        large = call.coding is not None and sum(map(len, outputs)) >= self._compress_bytes
        prefix = plan.prefix
        if prefix is not None and not large:
            payload = b"".join((prefix, *outputs))
        else:
            payload = self._first_answer(call, outputs)
        metrics = self._metrics
        metrics.codes[200] += 1
        metrics.request_s.observe(monotonic() - exchange.started_s)
        exchange.send(payload)

    def _first_answer(self, call: InferCall, outputs: Sequence[memoryview]) -> bytes:
        """Builds the answer, and leaves its constant part with the plan for the next equal request."""
        plan = call.request.plan
        head = encode_head(self._signature, plan, outputs)
        tail = [output for output, (_, binary) in zip(outputs, plan.outputs, strict=True) if binary]
        fields = "Content-Type: application/json\r\n"
        if tail:
            fields = f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {len(head)}\r\n"
        body = b"".join((head, *tail))
        if call.coding is not None and len(body) >= self._compress_bytes:
            body = encoding.deflate(body, call.coding)
            fields += f"Content-Encoding: {call.coding}\r\nVary: Accept-Encoding\r\n"
            return f"{fields}Content-Length: {len(body)}\r\n\r\n".encode() + body
        start = f"{fields}Content-Length: {len(body)}\r\n\r\n".encode()
        if plan.all_binary:
            plan.prefix = start + head
        return start + body


def _allow(head: Head, *methods: str) -> None:
    if head.method.decode("latin-1") not in methods:
        raise RefusedError(405, f"this route takes {' or '.join(methods)}", f"Allow: {', '.join(methods)}")
