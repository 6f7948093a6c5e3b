"""OpenTelemetry spans of requests: one a request, with its wait and its execution in it, from times that are known.

They are made once a request is over, so that one that is not traced costs a comparison. Names and attributes are those
of the semantic conventions for HTTP servers. A client may ask for its requests to be traced, which takes as long again
as answering one; so no more are traced than `MOST_PER_S`.
"""

from __future__ import annotations

import importlib.metadata
import os
import random
import threading
import time
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.observe.observer import GONE, Seen
from lepton_xla.serve.observe.refusals import ids

MOST_PER_S = 200
"""Requests traced in a second."""

_CLOSE_S = 2.0


def exporting(url: str | None) -> SpanProcessor:
    """Sends spans with OTLP over HTTP, from a thread of its own.

    Args:
        url: where to; None has the standard variables say.
    """
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=url))


class Spans:
    """Traces requests.

    Args:
        processor: gets the spans.
        share: of the requests, 0 to 1, to be traced.
        parent_based: whether those that come with a trace are traced as their caller decided, instead.
    """

    def __init__(self, processor: SpanProcessor, share: float = 1.0, parent_based: bool = True) -> None:
        version = importlib.metadata.version("lepton-xla")
        named = os.environ.get("OTEL_SERVICE_NAME") or SERVICE_NAME in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        attributes = {SERVICE_VERSION: version} | ({} if named else {SERVICE_NAME: "lepton_xla"})
        # What is to be sampled is decided here, once, before there is a span.
        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=Resource.create(attributes), shutdown_on_exit=False
        )  # fmt: skip
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("lepton_xla.serve", version)
        self._share = share
        self._parent_based = parent_based
        self._random = random.Random().random  # noqa: S311 (it chooses requests to trace)
        self._second = 0.0
        self._traced = 0

    def wants(self, exchange: Exchange) -> bool:
        """Whether a request is traced."""
        parent = exchange.trace
        if parent is not None and self._parent_based:
            if not int(parent[53:55], 16) & trace.TraceFlags.SAMPLED:
                return False
        elif self._random() >= self._share:
            return False
        if exchange.started_s - self._second >= 1.0:
            self._second = exchange.started_s
            self._traced = 0
        self._traced += 1
        return self._traced <= MOST_PER_S

    def saw(self, seen: Seen) -> None:
        """Makes the spans."""
        exchange, times = seen.exchange, seen.times
        # Spans have times of day, and what is known are times since some start.
        offset_ns = time.time_ns() - time.monotonic_ns()
        began, ended = _ns(exchange.started_s, offset_ns), _ns(seen.ended_s, offset_ns)
        method = exchange.head.method.decode("latin-1")
        span = self._tracer.start_span(
            f"{method} {seen.route}", _context(exchange.trace), trace.SpanKind.SERVER, _attributes(seen, method),
            start_time=began,
        )  # fmt: skip
        if seen.status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        if times is not None:
            inside = trace.set_span_in_context(span)
            started, finished = _ns(times.started_s, offset_ns), _ns(times.finished_s, offset_ns)
            self._tracer.start_span("queue", inside, start_time=began).end(started)
            batch = {"lepton.batch.rows": times.rows, "lepton.batch.size": times.size}
            self._tracer.start_span("compute", inside, attributes=batch, start_time=started).end(finished)
        span.end(ended)

    def close(self) -> None:
        """Sends what is left, if that takes no longer than two seconds."""
        thread = threading.Thread(target=self._provider.shutdown, name="lepton-spans", daemon=True)
        thread.start()
        thread.join(_CLOSE_S)


def _attributes(seen: Seen, method: str) -> dict[str, Any]:
    exchange = seen.exchange
    attributes: dict[str, Any] = {
        "http.request.method": method,
        "http.response.status_code": seen.status,
        "http.request.body.size": len(exchange.body),
        "http.response.size": seen.answer_bytes,
    }
    if seen.route != "none":
        attributes["http.route"] = seen.route
    if seen.status >= GONE:
        attributes["error.type"] = str(seen.status)
    request_id = None
    if seen.request is not None:
        request_id = seen.request.spec.id
        attributes["lepton.rows"] = seen.request.spec.rows
    if (given := ids(exchange, request_id).get("request_id")) is not None:
        attributes["lepton.request_id"] = given
    return attributes


def _context(parent: bytes | None) -> Context:
    """What a `traceparent` says, which is known to be valid."""
    if parent is None:
        return Context()
    context = trace.SpanContext(
        int(parent[3:35], 16), int(parent[36:52], 16), is_remote=True,
        trace_flags=trace.TraceFlags(int(parent[53:55], 16)),
    )  # fmt: skip
    return trace.set_span_in_context(trace.NonRecordingSpan(context), Context())


def _ns(seconds: float, offset_ns: int) -> int:
    return int(seconds * 1e9) + offset_ns
