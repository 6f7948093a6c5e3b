"""Routes requests, and takes infer requests through decoding, scheduling and answering. Runs on the event loop.

An infer request is handled by plain callbacks, without a task or a future.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Protocol

from lepton_xla.serve.access.auth import Guard
from lepton_xla.serve.app.adjustment import AdjustmentPages
from lepton_xla.serve.app.audit import AuditPage
from lepton_xla.serve.app.feedback import FeedbackPage, Others
from lepton_xla.serve.app.generation import GenerationPages
from lepton_xla.serve.app.pages import Gather, Pages
from lepton_xla.serve.app.repository import Control, RepositoryPages
from lepton_xla.serve.app.traffic import TrafficPages
from lepton_xla.serve.batching.scheduler import Call
from lepton_xla.serve.errors import HTTPError
from lepton_xla.serve.http.exchange import Exchange, Head
from lepton_xla.serve.http.response import Response, respond
from lepton_xla.serve.http.workers import Workers
from lepton_xla.serve.limits import Limits
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.models.registry import Registry
from lepton_xla.serve.models.split import BY_ID, Split
from lepton_xla.serve.observe.refusals import Refusals
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.protocol import encoding, metadata, routes, wire
from lepton_xla.serve.protocol.jsondata import PIECE_BYTES
from lepton_xla.serve.protocol.response import write_response
from lepton_xla.serve.protocol.wire import InferRequest
from lepton_xla.serve.traffic.mirror import Mirror

_log = logging.getLogger("lepton_xla.serve")

# Smaller answers are not reserved: the objects of the request itself take as much, and are not counted either.
_SMALL_ANSWER_BYTES = 1024

# How the JSON part of an answer ends behind an id, and the ids by whose lengths header fields are kept: a client may
# send 512 different requests with ids of every length.
_AFTER_ID = b'"}'
_LONGEST_ID, _MOST_LENGTHS = 64, 8

# Content types of a body that is a value of a model's only input, not a JSON document.
_ONE_VALUE = (b"image/", b"text/plain")

# Routes whose requests the versions of a model may share.
_SHARED = ("infer", "explain", "generate", "generate_stream")

type Route = Callable[[Exchange], None]
type Chosen = tuple[float, str | None]
"""With which probability the version that answers was chosen, and the version that is asked too."""


class InferCall(Call, kw_only=True, eq=False):
    """An infer request that waits for its result.

    Attributes:
        app: writes the answer.
        model: runs the request.
        exchange: gets the answer.
        coding: compression of the answer, if it is large enough; None for none.
    """

    app: App
    model: ModelHandle
    exchange: Exchange
    coding: str | None

    def finish(self, outputs: Sequence[bytes | memoryview]) -> None:
        """Answers with the outputs."""
        spec, exchange = self.request.spec, self.exchange
        choice: Chosen | None = exchange.choice
        response, body = spec.response, outputs
        if spec.id is not None:
            model = self.model
            if (monitor := model.monitor) is not None:
                monitor.answered(spec.id, spec.outputs, outputs, 0.0 if choice is None else choice[0])
            if model.sampler is not None:
                model.sampler.answered(self.request, outputs)
            response = spec.responses.get(len(spec.id))
            if response is not None:
                body = (spec.id.encode() + _AFTER_ID, *outputs)
        if response is not None and self.coding is None:
            # As `send`, without a call.
            if not exchange.answered:
                now_s = monotonic()
                self.model.metrics.answered(now_s - exchange.started_s, len(exchange.body), response.nbytes)
                exchange.send(response, body, now_s)
        else:
            try:
                self.app.answer(self, outputs)
            except HTTPError as refusal:
                self.fail(refusal)
                return
        if choice is not None and choice[1] is not None:
            self.app.mirror(self, choice[1], outputs)

    def send(self, response: Response, body: Sequence[bytes | memoryview]) -> None:
        """Answers with the result, and counts that."""
        exchange = self.exchange
        if not exchange.answered:
            self.model.metrics.answered(monotonic() - exchange.started_s, len(exchange.body), response.nbytes)
            exchange.send(response, body)

    def fail(self, refusal: HTTPError) -> None:
        """Answers with an error."""
        self.app.refuse(self.exchange, refusal, self.request.spec.id)

    def cancel(self) -> None:
        """The client went away."""
        self.model.scheduler.cancel(self)


class OnDemand(Protocol):
    """Loads models that are asked for: the `Memory`."""

    def knows(self, name: str) -> bool:
        """Whether there is a model of that name which is not loaded."""
        ...

    async def bring(self, name: str, then: Callable[[], object]) -> None:
        """Has a model loaded, and then calls a function while it is sure to be there; raises `HTTPError`."""
        ...


class App:
    """Answers exchanges.

    Args:
        models: the models served.
        metrics: the server's counters.
        limits: the bounds on a request.
        guard: checks tokens; None admits everybody.
        server_name: see `Pages`.
        compress_bytes: size from which infer answers are compressed for clients that accept it.
        gather: see `Pages`.
        control: changes which models are loaded; None where they cannot be changed.
        repository: the folder that versions may be uploaded to, if there is one.
        record: told of every change of that, as `Audit.record` is.
        audit_log: who changed what; None if that is not kept.
        bring: loads models that are asked for; None where all that there are are loaded.
        others: the other processes of this server, which feedback may be for; None if there are none.
        trusts: whether only signed artifacts are loaded.
    """

    def __init__(
        self,
        models: Registry,
        metrics: ServerMetrics,
        limits: Limits,
        *,
        guard: Guard | None = None,
        server_name: str = metadata.SERVER_NAME,
        compress_bytes: int = 4096,
        gather: Gather | None = None,
        control: Control | None = None,
        repository: str = "",
        record: Callable[..., object] = lambda *_, **__: None,
        audit_log: Path | None = None,
        bring: OnDemand | None = None,
        others: Others | None = None,
        trusts: bool = False,
    ) -> None:
        self._bring = bring
        self._bringing: set[asyncio.Task[None]] = set()
        self._models = models
        self._metrics = metrics
        self._limits = limits
        self._guard = guard
        self._compress_bytes = compress_bytes
        self._workers = Workers(limits.max_buffered_bytes)
        self._refusals = Refusals()
        self._mirror = Mirror()
        needs_models = control is not None and not control.explicit
        self._pages = Pages(
            models, metrics, server_name, gather,
            repository=control is not None, audit=audit_log is not None, needs_models=needs_models,
        )  # fmt: skip
        self._pages.model["model_feedback"] = FeedbackPage(metrics, self.refuse, others).take
        self._pages.server["audit"] = AuditPage(audit_log, metrics, self.refuse).show
        generating = GenerationPages(models, metrics, limits, self.refuse, self._workers)
        self._pages.model |= {"generate": generating.generate, "generate_stream": generating.stream}
        self._pages.model["generate_events"] = generating.events
        self._pages.server |= {
            "completions": generating.complete,
            "chat_completions": generating.chat,
            "generators": generating.list_models,
        }
        self._repository: RepositoryPages | None = None
        if control is not None:
            self._repository = RepositoryPages(
                control, metrics, self.refuse, self._pages.is_ready_now, repository, record
            )
            self._pages.server["repository_index"] = self._repository.index
            self._adjustment = AdjustmentPages(repository, self._repository, record, trusts=trusts)
            self._traffic = TrafficPages(
                models, control, repository, self._repository, gather or (lambda then: then(metrics)), record
            )

    def __call__(self, exchange: Exchange) -> None:
        """Handles one request. It gets an answer whatever happens."""
        head = exchange.head
        try:
            if head.generation != self._models.generation:
                self.invite(head)
            head.route(exchange)
        except HTTPError as refusal:
            self.refuse(exchange, refusal)
        except Exception:
            _log.exception("a request could not be handled")
            self.refuse(exchange, HTTPError(500, "internal error"))

    def invite(self, head: Head) -> None:
        """Finds the route of a head. Also called while a client waits for 100 (Continue) before it sends the body.

        Raises:
            HTTPError: if there is no such route, or the client may not use it.
        """
        head.route, head.generation = self._enter(head), self._models.generation

    # Routing. The head caches the result, and with it a weak reference to the model: a head may outlive the model.

    def _enter(self, head: Head) -> Route:
        """The route of a head. The token is checked before the path is looked at."""
        guard = self._guard
        if guard is None:
            return self._route(head)[1]
        grant = guard.authenticate(head)
        scope, route = self._route(head, "anonymous" if grant is None else grant.name)
        return guard.protect(grant, scope, route, self)

    def _route(self, head: Head, who: str = "anonymous") -> tuple[str, Route]:
        """The scope that the route of a head requires, and what answers it. `who` is the name of the token."""
        route, parameters = routes.find(head.method, head.target)
        if route.refusal:
            return route.scope, functools.partial(self._decline, route)
        model = parameters.get("model")
        if route.name in routes.CONTROL:
            return route.scope, self._control_route(route.name, parameters, who)
        if model is None:
            return route.scope, self._pages.server[route.name]
        if route.name == "explain":  # a model beside it, which `compile --explain` writes
            model = f"{model}-explain"
        if self._bring is not None and route.name != "model_ready" and self._bring.knows(model):
            return route.scope, functools.partial(self._wait_for, self._bring, model, head, who)
        found = weakref.ref(self._models.find(model, parameters.get("version"), parameters.get("label")))
        one: Callable[[weakref.ref[ModelHandle]], Route] = functools.partial(self._infer_route, head)
        if route.name not in ("infer", "explain"):
            page = self._pages.model[route.name]
            one = functools.partial(_page_route, page)
        if route.name in _SHARED and len(parameters) == 1 and (split := self._models.split(model)) is not None:
            return route.scope, self._shared_route(head, model, split, one)
        return route.scope, one(found)

    def _wait_for(self, bring: OnDemand, model: str, head: Head, who: str, exchange: Exchange) -> None:
        """Handles a request when its model is loaded. The connection keeps the answers in order."""

        def handle() -> None:
            # An exchange whose client has gone counts as answered. The token was checked on arrival.
            if not exchange.answered:
                self._route(head, who)[1](exchange)

        async def wait() -> None:
            try:
                await bring.bring(model, handle)
            except HTTPError as refusal:
                self.refuse(exchange, refusal)
            except Exception:
                _log.exception("a request could not be handled")
                self.refuse(exchange, HTTPError(500, "internal error"))

        task = asyncio.get_running_loop().create_task(wait())
        self._bringing.add(task)
        task.add_done_callback(self._bringing.discard)

    def _control_route(self, name: str, parameters: dict[str, str], who: str) -> Route:
        if self._repository is None:
            raise HTTPError(
                501, "models cannot be loaded or unloaded, nor share requests: this server has no repository of models"
            )
        if name in routes.TRAFFIC:
            return functools.partial(self._traffic, name, parameters["model"], who)
        if name in routes.ADJUSTMENT:
            return functools.partial(self._adjustment, name, parameters["model"], who)
        if name in routes.CHANGES:
            return functools.partial(self._repository.change, name, parameters, who)
        answer = self._repository.load if name == "load" else self._repository.unload
        return functools.partial(answer, parameters["model"], who)

    def _shared_route(
        self, head: Head, model: str, split: Split, one: Callable[[weakref.ref[ModelHandle]], Route]
    ) -> Route:
        """Has one of several versions answer. What depends on the header fields only is decided here."""
        # Of a version: how it was chosen, the same where a shadow is asked too, and what answers.
        ways: dict[str, tuple[Chosen, Chosen | None, Route]] = {}
        for version, share in split.shares.items():
            found = weakref.ref(self._models.find(model, version))
            mirrored = (share, split.shadow) if split.has_shadow(version) else None
            ways[version] = (share, None), mirrored, one(found)
        mirror = self._mirror
        length = head.headers.get(b"inference-header-content-length", b"")
        json_bytes = int(length) if length.isdigit() and len(length) < 20 else None
        coding = head.headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        by_id = split.sticky == BY_ID
        key = head.headers.get(split.sticky.encode()) if split.sticky and not by_id else None
        fixed = ways[split.choose(key).version] if key is not None or len(ways) == 1 else None

        def route(exchange: Exchange) -> None:
            way = fixed
            if way is None:
                by = wire.id_of(encoding.start_of(exchange.body, coding), json_bytes) if by_id else None
                way = ways[split.choose(by).version]
            exchange.choice, mirrored, answer = way
            if mirrored is not None and split.mirrors():
                if exchange.started_s < mirror.rest_until_s:
                    mirror.left_out += 1
                else:
                    exchange.choice = mirrored
            answer(exchange)

        return route

    def _infer_route(self, head: Head, found: weakref.ref[ModelHandle]) -> Route:
        headers = head.headers
        length = headers.get(b"inference-header-content-length")
        if length is not None and not (length.isdigit() and len(length) < 20):
            raise HTTPError(400, "Inference-Header-Content-Length is not a number of bytes")
        coding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
        accept = headers.get(b"accept-encoding", b"").decode("latin-1")
        json_bytes = None if length is None else int(length)
        if length is None and headers.get(b"content-type", b"").lower().startswith(_ONE_VALUE):
            json_bytes = wire.ONE_VALUE
        accepted = encoding.choose(accept) if accept else None
        if coding in ("", "identity"):
            # Only a long JSON part takes long to decode; a short one needs no check of the body's length.
            converts = _held(found).decoder.converts
            short = json_bytes is not None and json_bytes <= PIECE_BYTES and not converts
            return functools.partial(self._infer if short else self._infer_any, found, json_bytes, accepted)
        return functools.partial(self._infer_coded, found, coding, json_bytes, accepted)

    # Errors.

    def refuse(self, exchange: Exchange, refusal: HTTPError, request_id: str | None = None) -> None:
        """Answers with an error, unless the exchange has its answer already."""
        if not exchange.answered:
            self._metrics.codes[refusal.status] += 1
            self._refusals.note(refusal, exchange, request_id)
            exchange.refuse(refusal)

    def refused(self, refusal: HTTPError) -> None:
        """Counts an error that the connection answered before there was a request to handle."""
        self._metrics.codes[refusal.status] += 1
        self._refusals.note(refusal)

    def _decline(self, route: routes.Route, exchange: Exchange) -> None:
        headers = ("Allow: GET, HEAD",) if route.status == 405 else ()
        raise HTTPError(route.status, route.refusal, *headers)

    # Infer.

    def _infer(
        self, found: weakref.ref[ModelHandle], json_bytes: int | None, accepted: str | None, exchange: Exchange
    ) -> None:
        model = found()
        assert model is not None  # as in `_held`, without a call
        shed = model.scheduler.shed
        if shed is not None:
            # An overloaded server refuses as often as it answers: a repeated request is refused undecoded.
            spec = model.decoder.repeated(exchange.body, json_bytes)
            if spec is not None and (refusal := shed(spec)) is not None:
                self.refuse(exchange, refusal, spec.id)
                return
        self._submit(model, exchange, accepted, model.decoder.decode(exchange.body, json_bytes))

    def _infer_any(
        self, found: weakref.ref[ModelHandle], json_bytes: int | None, accepted: str | None, exchange: Exchange
    ) -> None:
        body, model = exchange.body, _held(found)
        if len(body) <= PIECE_BYTES and not model.decoder.converts:
            self._infer(found, json_bytes, accepted, exchange)
        else:
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
        if plain is not None and not model.decoder.converts:
            self._submit(model, exchange, accepted, model.decoder.decode(plain, json_bytes))
            return

        def read() -> InferRequest:
            return model.decoder.decode(encoding.inflate(body, coding, most), json_bytes)

        self._submit_later(model, exchange, accepted, read)

    def _submit(self, model: ModelHandle, exchange: Exchange, accepted: str | None, request: InferRequest) -> None:
        spec = request.spec
        exchange.work = call = InferCall(
            spec.rows, spec.key, exchange.started_s, nbytes=request.nbytes,
            request=request, app=self, model=model, exchange=exchange, coding=accepted,
        )  # fmt: skip
        if spec.answer_bytes > _SMALL_ANSWER_BYTES:
            exchange.reserve(spec.answer_bytes)
        model.scheduler.submit(call)

    def _submit_later(
        self, model: ModelHandle, exchange: Exchange, accepted: str | None, read: Callable[[], InferRequest]
    ) -> None:
        """Decodes a long body on another thread."""
        self._workers.read(exchange, read, functools.partial(self._submit, model, exchange, accepted), self.refuse)

    def mirror(self, call: InferCall, version: str, outputs: Sequence[bytes | memoryview]) -> None:
        """Has another version asked what was answered just now."""
        shadow = self._models.get(call.model.signature.name, version)
        if shadow is not None:
            self._mirror.ask(shadow, call.model, call.request, outputs)

    def answer(self, call: InferCall, outputs: Sequence[bytes | memoryview]) -> None:
        """Answers an infer request with the bytes of its outputs."""
        spec = call.request.spec
        size = sum(map(len, outputs))
        compressed = call.coding is not None and size >= self._compress_bytes
        if spec.response is not None and not compressed:
            call.send(spec.response, outputs)
        elif size <= PIECE_BYTES or (spec.constant and not compressed):
            call.send(*self._write(call, outputs))
        else:
            # The outputs are only valid until this returns.
            kept = [bytes(output) for output in outputs]
            self._workers.run(
                size,
                lambda: self._write(call, kept),
                lambda written: call.send(*written),
                functools.partial(self.refuse, call.exchange),
            )

    def _write(
        self, call: InferCall, outputs: Sequence[memoryview | bytes]
    ) -> tuple[Response, Sequence[bytes | memoryview]]:
        """The response and its body. What does not depend on the result, the spec keeps for the next equal request."""
        spec = call.request.spec
        head, tail = write_response(call.model.signature, spec, outputs)
        content_type, extra = "application/json", ()
        if tail:
            content_type, extra = "application/octet-stream", (f"Inference-Header-Content-Length: {len(head)}",)
        body_bytes = len(head) + sum(map(len, tail))
        if call.coding is not None and body_bytes >= self._compress_bytes:
            body = encoding.deflate(b"".join((head, *tail)), call.coding)
            extra = (*extra, f"Content-Encoding: {call.coding}", "Vary: Accept-Encoding")
            return respond(200, len(body), content_type, *extra), (body,)
        response = respond(200, body_bytes, content_type, *extra)
        if spec.constant:
            shared = response.fields + head
            if spec.id is None:
                spec.response = Response(200, shared, response.nbytes)
            elif len(spec.id) <= _LONGEST_ID and head.endswith(end := spec.id.encode() + _AFTER_ID):
                # An id that JSON spells in another way ends otherwise.
                if len(spec.responses) >= _MOST_LENGTHS:
                    spec.responses.clear()
                spec.responses[len(spec.id)] = Response(200, shared.removesuffix(end), response.nbytes)
        return response, (head, *tail)

    def close(self) -> None:
        """Stops the threads that decode and encode long bodies, that change the repository, and that ask shadows."""
        self._workers.close()
        if self._repository is not None:
            self._repository.close()
        self._mirror.close()


def _page_route(page: Callable[[ModelHandle, Exchange], None], found: weakref.ref[ModelHandle]) -> Route:
    return lambda exchange: page(_held(found), exchange)


def _held(found: weakref.ref[ModelHandle]) -> ModelHandle:
    """The model of a cached route. It exists: a change of the registry makes the app find the route again."""
    model = found()
    assert model is not None
    return model
