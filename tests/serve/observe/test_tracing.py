"""Requests as OpenTelemetry sees them."""

import http.server
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serve_fakes import Affine, affine_binary, exchange, start_script

from lepton_xla.errors import ServeError
from lepton_xla.serve import Options, Server
from lepton_xla.serve.http.exchange import Exchange, Head
from lepton_xla.serve.observe import spans, tracing

INFER = "/v2/models/affine/infer"
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{SPAN_ID}-01", f"00-{TRACE_ID}-{SPAN_ID}-00"


@pytest.fixture
def memory(monkeypatch):
    """Where spans go instead of to a collector."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(spans, "exporting", lambda url: SimpleSpanProcessor(exporter))
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    return exporter


@pytest.fixture
def traced(make_server, memory):
    return make_server(Affine(), otel_endpoint="http://localhost:4318")


def infer(server, rows=1, n=1, trace=None, **extra):
    body, fields = affine_binary(np.ones((rows, 4)), [n] * rows, **extra)
    fields |= {} if trace is None else {"traceparent": trace}
    return exchange(server, "POST", INFER, body, fields)


def test_a_request_is_a_span_with_its_wait_and_execution_in_it(traced, memory):
    before = time.time_ns()
    assert infer(traced, rows=3, trace=SAMPLED, id="mine")[0] == 200
    queue, compute, whole = memory.get_finished_spans()
    after = time.time_ns()
    assert [span.name for span in (queue, compute, whole)] == ["queue", "compute", "POST /v2/models/{model}/infer"]
    assert whole.kind == trace.SpanKind.SERVER
    assert f"{whole.context.trace_id:032x}" == TRACE_ID
    assert f"{whole.parent.span_id:016x}" == SPAN_ID
    assert whole.parent.is_remote
    for part in (queue, compute):
        assert part.parent.span_id == whole.context.span_id
        assert part.context.trace_id == whole.context.trace_id
    edges = [before, whole.start_time, queue.end_time, compute.end_time, whole.end_time, after]
    assert edges == sorted(edges)
    assert (queue.start_time, compute.start_time) == (whole.start_time, queue.end_time)
    assert compute.end_time - compute.start_time >= 1e5  # the model sleeps so long
    assert whole.attributes.items() >= {
        "http.request.method": "POST", "http.route": "/v2/models/{model}/infer", "http.response.status_code": 200,
        "lepton.rows": 3, "lepton.request_id": "mine",
    }.items()  # fmt: skip
    assert compute.attributes["lepton.batch.rows"] == 3
    assert compute.attributes["lepton.batch.size"] in (4, 8)
    assert whole.status.is_unset
    assert whole.resource.attributes["service.name"] == "lepton_xla"


def test_errors_are_spans_too_and_say_no_more_than_the_status(traced, memory):
    assert infer(traced, n=-1, trace=SAMPLED)[0] == 500
    (failed,) = memory.get_finished_spans()
    assert failed.status.status_code == trace.StatusCode.ERROR
    assert failed.attributes["error.type"] == "500"
    assert not failed.events
    memory.clear()
    assert exchange(traced, "POST", INFER, b"{secret", {"traceparent": SAMPLED})[0] == 400
    assert exchange(traced, "GET", "/private?token=hunter2", headers={"traceparent": SAMPLED})[0] == 404
    malformed, unknown = memory.get_finished_spans()
    assert malformed.status.is_unset  # the client's error is none of the server's
    assert "http.route" not in unknown.attributes
    for span in (failed, malformed, unknown):
        assert not [word for word in ("secret", "private", "hunter2") if word in span.to_json()]


def test_the_caller_decides_and_its_context_is_none_of_ours_if_invalid(traced, memory):
    infer(traced, trace=UNSAMPLED)
    assert not memory.get_finished_spans()
    infer(traced, trace=SAMPLED.upper())  # no traceparent: the standard wants lower case
    (*_, whole) = memory.get_finished_spans()
    assert whole.parent is None
    assert f"{whole.context.trace_id:032x}" != TRACE_ID


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (1.0, True)),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, (1.0, False)),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, (0.0, False)),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, (0.0, True)),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}, (0.25, False)),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"}, (0.0, True)),
    ],
)
def test_samplers_are_the_standards(variables, expected):
    assert tracing.sampler(variables) == expected


@pytest.mark.parametrize("variables", [("xray", "1"), ("traceidratio", "much"), ("traceidratio", "2")])
def test_samplers_that_there_are_not(variables):
    with pytest.raises(ServeError, match="SAMPLER"):
        tracing.sampler({"OTEL_TRACES_SAMPLER": variables[0], "OTEL_TRACES_SAMPLER_ARG": variables[1]})


def exchanges(count, seconds, trace=None):
    for index in range(count):
        made = Exchange(None, Head(b"GET", b"/", {}, keep_alive=True, old=False), b"", 100.0 + index / count * seconds)
        made.trace = trace and trace.encode()
        yield made


def test_a_share_is_traced():
    watching = spans.Spans(SimpleSpanProcessor(InMemorySpanExporter()), 0.1, parent_based=True)
    traced = sum(watching.wants(each) for each in exchanges(10_000, 1000))
    assert abs(traced - 1000) < 5 * (10_000 * 0.1 * 0.9) ** 0.5
    assert all(watching.wants(each) for each in exchanges(100, 10, SAMPLED))
    assert not any(watching.wants(each) for each in exchanges(100, 10, UNSAMPLED))


def test_a_client_cannot_have_too_many_traced():
    watching = spans.Spans(SimpleSpanProcessor(InMemorySpanExporter()), 1.0, parent_based=True)
    traced = sum(watching.wants(each) for each in exchanges(100_000, 10, SAMPLED))
    assert traced == pytest.approx(10 * spans.MOST_PER_S, rel=0.11)


@pytest.mark.parametrize(
    ("variables", "configured"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_SERVICE_NAME": "me"}, False),
    ],
)
def test_the_standard_variables_switch_it_on(memory, variables, configured):
    assert (tracing.tracing(None, variables) is not None) == configured


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("https://c.example/", "https://c.example/v1/traces"),
        ("http://c:4318/v1/traces", "http://c:4318/v1/traces"),
        ("https://c/otlp/team", "https://c/otlp/team"),
    ],
)
def test_an_endpoint_without_a_path_gets_the_standards(endpoint, url):
    assert tracing.check_endpoint(endpoint) == url


@pytest.mark.parametrize("endpoint", ["localhost:4318", "grpc://c:4317", "http://", "http://[", "http://c:99999", ""])
def test_endpoints_that_are_none(endpoint):
    with pytest.raises(ServeError, match="http://localhost:4318"):
        Options(otel_endpoint=endpoint)


def test_without_the_extra_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServeError, match=r"lepton-xla\[otel\]"):
        Options(otel_endpoint="http://localhost:4318")


def test_variables_without_the_extra_warn_and_no_more(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "lepton_xla.serve.observe.spans", None)  # importing it fails
    assert tracing.tracing(None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}) is None
    assert "lepton-xla[otel]" in caplog.text


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes spans as a collector does."""

    received: list

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.path, self.headers, body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        """Silent."""


def test_a_collector_gets_them_over_http_when_the_server_stops(monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "digits")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=one")
    Collector.received = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        with Server(Affine(), Options(port=0, otel_endpoint=f"http://127.0.0.1:{collector.server_port}")) as server:
            infer(server, trace=SAMPLED)
        collector.shutdown()
    ((path, headers, body),) = Collector.received
    assert (path, headers["x-team"]) == ("/v1/traces", "one")
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    names = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert names["service.name"] == "digits"
    assert {span.name for span in resource.scope_spans[0].spans} == {
        "queue",
        "compute",
        "POST /v2/models/{model}/infer",
    }


def test_a_collector_that_is_not_there_holds_up_neither_answers_nor_the_stop(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    before = set(threading.enumerate())
    server = Server(Affine(), Options(port=0, otel_endpoint="http://127.0.0.1:1")).start()
    start = time.monotonic()
    for _ in range(20):
        assert infer(server, trace=SAMPLED)[0] == 200
    assert time.monotonic() - start < 2
    start = time.monotonic()
    server.stop()
    assert time.monotonic() - start < 4
    # What still tries to send draws random delays, which Hypothesis would take for a fault of the tests that follow.
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()


SCRIPT = """
    import sys
    from serve_fakes import Affine, affine_json, exchange
    from lepton_xla.serve import Options, Server

    with Server(Affine((1,)), Options(port=0)) as server:
        assert exchange(server, "POST", "/v2/models/affine/infer", affine_json([[1.0] * 4], [1]))[0] == 200
    print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""


def test_nothing_is_imported_where_nothing_is_traced():
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    with start_script(SCRIPT, environment=clean, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        told, errors = process.communicate(timeout=60)
    assert (process.returncode, told.strip()) == (0, "[]"), errors
