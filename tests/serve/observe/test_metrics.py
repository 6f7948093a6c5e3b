"""What is counted, and how it is shown to Prometheus."""

import json
import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from serve_fakes import Affine, affine_binary, connect, counted, exchange, raw_request, read_response

from lepton_xla.serve.observe.exposition import render
from lepton_xla.serve.observe.metrics import Histogram, added
from lepton_xla.serve.observe.server_metrics import MOST_KEPT, ServerMetrics

INFER = "/v2/models/affine/infer"

# Name and type as Triton shows them.
TRITON = {
    "nv_inference_request_success": "counter",
    "nv_inference_request_failure": "counter",
    "nv_inference_count": "counter",
    "nv_inference_exec_count": "counter",
    "nv_inference_request_duration_us": "counter",
    "nv_inference_queue_duration_us": "counter",
    "nv_inference_compute_input_duration_us": "counter",
    "nv_inference_compute_infer_duration_us": "counter",
    "nv_inference_compute_output_duration_us": "counter",
    "nv_inference_pending_request_count": "gauge",
}


def parsed(text):
    """The families by name, checked as a scraper would: none twice, histograms that only rise."""
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    for family in families:
        assert family.type in ("counter", "gauge", "histogram"), family.name
        assert family.documentation
        assert family.samples or family.name == "lepton_http_responses"
        if family.type == "histogram":
            counts = [each for each in family.samples if each.name.endswith("_count")]
            for count in counts:
                mine = [each for each in family.samples if each.labels.items() >= count.labels.items()]
                buckets = [each.value for each in mine if each.name.endswith("_bucket")]
                assert buckets == sorted(buckets)
                assert buckets[-1] == count.value
    return {family.name: family for family in families}


def value(families, name, sample=None, **labels):
    """The one sample with these labels."""
    found = [
        each.value
        for each in families[name].samples
        if each.name == (sample or each.name) and labels.items() <= each.labels.items()
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def scrape(server):
    status, headers, body = exchange(server, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    return parsed(body.decode()), body.decode()


def infer(server, rows, n=1):
    body, fields = affine_binary(np.ones((rows, 4)), [n] * rows)
    status, _, answer = exchange(server, "POST", INFER, body, fields)
    return status, len(body), len(answer)


def test_metrics_are_what_happened(server):
    sent = [infer(server, rows) for rows in (1, 3, 8, 20)]
    assert infer(server, 2, n=-1)[0] == 500
    exchange(server, "POST", INFER, b"{")
    exchange(server, "GET", "/v2/models/" + "x" * 50)
    families, text = scrape(server)
    one = {"model": "affine"}
    assert value(families, "lepton_http_responses", code="200") == 5  # this scrape is one
    assert value(families, "lepton_http_responses", code="400") == 1
    assert value(families, "lepton_http_responses", code="404") == 1
    assert value(families, "lepton_http_responses", code="500") == 1
    rows, padding = value(families, "lepton_rows", **one), value(families, "lepton_padding_rows", **one)
    batches = value(families, "lepton_batches", **one)
    assert rows == 1 + 3 + 8 + 20
    assert value(families, "lepton_batch_rows", "lepton_batch_rows_sum") == rows
    assert value(families, "lepton_padding_share", "lepton_padding_share_count") == batches
    assert padding >= 1  # three rows run in four
    assert value(families, "lepton_failed_batches", **one) >= 1
    assert value(families, "lepton_inference_failures", **one) == 1
    assert value(families, "lepton_request_seconds", "lepton_request_seconds_count") == 4
    assert value(families, "lepton_request_seconds", "lepton_request_seconds_bucket", le="+Inf") == 4
    assert value(families, "lepton_request_bytes", "lepton_request_bytes_sum") == sum(size for _, size, _ in sent)
    answers = value(families, "lepton_response_bytes", "lepton_response_bytes_sum")
    assert sum(size for _, _, size in sent) < answers < sum(size + 300 for _, _, size in sent)
    assert value(families, "lepton_connections") == 1
    assert value(families, "lepton_in_flight") == 1
    assert value(families, "lepton_ready") == value(families, "lepton_live") == 1
    assert "xxxx" not in text
    assert len(text.splitlines()) < 300


def test_tritons_names_and_types_are_there(server):
    for rows in (1, 3, 8):
        infer(server, rows)
    infer(server, 1, n=-1)
    families, text = scrape(server)
    labels = {"model": "affine", "version": "3"}
    for name, kind in TRITON.items():
        assert f"# TYPE {name} {kind}\n" in text
        assert families[name].type == kind
        for sample in families[name].samples:
            assert sample.labels.items() >= labels.items()
        assert f"\n{name}{{" in text
    assert value(families, "nv_inference_request_success", **labels) == 3
    reasons = {each.labels["reason"]: each.value for each in families["nv_inference_request_failure"].samples}
    assert reasons == {"REJECTED": 0, "CANCELED": 0, "BACKEND": 1, "OTHER": 0}
    assert value(families, "nv_inference_count", **labels) == 12
    assert value(families, "nv_inference_exec_count", **labels) == value(families, "lepton_batches", model="affine")
    assert value(families, "nv_inference_pending_request_count", **labels) == 0
    times = {name: value(families, f"nv_inference_{name}_duration_us", **labels) for name in ("request", "queue")}
    computing = [
        value(families, f"nv_inference_compute_{part}_duration_us", **labels) for part in ("input", "infer", "output")
    ]
    assert all(each > 0 for each in (*times.values(), *computing))
    # Each request ran alone, so that its parts are within it (whole microseconds are shown).
    assert times["queue"] + computing[0] + computing[1] <= times["request"] + 5


def test_time_is_counted_for_each_request_of_a_batch(make_server, affine):
    """As Triton counts, and as its statistics are read: a batch of four requests spends its time four times."""
    server = make_server(affine, max_delay_us=300_000)
    threads = [threading.Thread(target=infer, args=(server, 1)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    metrics = counted(server)
    assert metrics.batch_rows.count == 1
    assert metrics.input_s + metrics.infer_s == pytest.approx(4 * metrics.compute_s.total)
    (stats,) = json.loads(exchange(server, "GET", "/v2/models/affine/stats")[2])["model_stats"]
    times = stats["inference_stats"]
    assert [times[name]["count"] for name in ("success", "queue", "compute_input", "compute_infer")] == [4] * 4
    assert times["compute_infer"]["ns"] == pytest.approx(metrics.infer_s * 1e9, abs=1)
    (batch,) = stats["batch_stats"]
    assert batch["compute_infer"]["count"] == 1
    assert 4 * batch["compute_infer"]["ns"] == pytest.approx(times["compute_infer"]["ns"], abs=8)


@pytest.mark.parametrize("answers", [3, 100])
def test_some_counts_are_those_of_all(answers):
    some, whole = (ServerMetrics().of("m", "1") for _ in range(2))
    for metrics in (some, whole):
        for number in range(answers):
            metrics.answered(number * 1e-4, 10, 20)
    names = {"request_s", "failures", "shadow"}
    assert some.counts(names) == {name: value for name, value in whole.counts().items() if name in names}
    assert some.counts() == whole.counts()


def test_what_waits_is_shown(server, affine):
    affine.gate.clear()
    affine.running.clear()
    body, fields = affine_binary(np.ones((3, 4)), [1] * 3)
    with connect(server) as running, connect(server) as waiting:
        running.sendall(raw_request("POST", INFER, body, fields))
        assert affine.running.wait(5)
        waiting.sendall(raw_request("POST", INFER, body, fields))
        while not server.metrics.counts()["affine/3"]["now"]["queue_rows"]:
            pass
        families, _ = scrape(server)
        shown = {name: value(families, f"lepton_{name}") for name in ("queue_rows", "queue_requests", "in_flight")}
        assert shown == {"queue_rows": 3, "queue_requests": 1, "in_flight": 3}
        assert value(families, "nv_inference_pending_request_count") == 1
        assert value(families, "lepton_connections") == 3
        assert value(families, "lepton_buffered_bytes") == 2 * len(body)
        affine.gate.set()
        assert read_response(running)[0] == read_response(waiting)[0] == 200


def test_the_process_is_shown(server):
    families, _ = scrape(server)
    assert value(families, "process_cpu_seconds") > 0
    assert value(families, "process_resident_memory_bytes") > 1e6
    assert value(families, "process_open_fds") > 3


def test_a_name_with_odd_characters_does_not_break_the_text():
    name = 'a"b\\c'
    server = ServerMetrics()
    server.of(name, "1")
    families = parsed(render(server).decode())
    for family in ("lepton_rows", "nv_inference_count"):
        assert families[family].samples[0].labels["model"] == name


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 20)))
def test_histograms_count_as_numpy_does(values):
    bounds = (0.0, 0.25, 1.0, 10.0)
    histogram = Histogram(bounds)
    for each in values[:1]:
        histogram.observe(each)
    histogram.observe_all(values[1:])
    # Prometheus' buckets hold what is at or under their bound.
    reference = np.searchsorted(bounds, values, side="left")
    assert histogram.counts == np.bincount(reference, minlength=5).tolist()
    assert histogram.cumulative()[-1] == ("+Inf", len(values))
    assert histogram.total == pytest.approx(math.fsum(values))


def of_m():
    """The counters of a server, and those of its only model."""
    server = ServerMetrics()
    return server, server.opened("m", "1")


def test_several_processes_add_up():
    (first, one), (second, other), (idle, _) = of_m(), of_m(), of_m()
    one.answered(0.5, 100, 200)
    other.answered(0.25, 100, 300)
    other.answered(5.0, 100, 300)
    one.batch(3, 4, 0.001, 0.003, requests=2)
    other.batch(2, 2, 0.002, 0.003)
    other.batch(3, 4, 0.002, 0.003)
    one.now = {"queue_rows": 5, "cost_s": {"": {"4": 0.002}}}
    other.now = {"queue_rows": 7, "cost_s": {"": {"4": 0.003}}}
    first.watch(lambda: {"connections": 1})
    second.watch(lambda: {"connections": 2})
    second.of("only there", "7").rows = 9
    total = first.plus(added(second.counts(), idle.counts()))
    families = parsed(render(total).decode())
    expected = {
        "lepton_inference_requests": 3, "lepton_rows": 8, "lepton_padding_rows": 2, "lepton_batches": 3,
        "lepton_queue_rows": 12, "lepton_connections": 3, "lepton_cost_seconds": 0.003, "nv_inference_count": 8,
        "nv_inference_request_duration_us": 5_750_000, "nv_inference_compute_input_duration_us": 6000,
    }  # fmt: skip
    server_wide = {"lepton_connections": 3}
    labels = {"model": "m", "version": "1"}
    found = {name: value(families, name, **({} if name in server_wide else labels)) for name in expected}
    assert found == expected
    assert value(families, "lepton_rows", model="only there", version="7") == 9
    assert value(families, "lepton_http_responses", code="200") == 3
    assert value(families, "lepton_request_bytes", "lepton_request_bytes_count", **labels) == 3
    assert total.of("m", "1").by_size == {
        4: (2, 0.003, pytest.approx(0.003)),
        2: (1, 0.002, pytest.approx(0.001)),
    }
    alone = value(parsed(render(first).decode()), "process_resident_memory_bytes")
    assert value(families, "process_resident_memory_bytes") == pytest.approx(3 * alone, rel=0.2)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 28), st.integers(0, 1 << 28)), max_size=700))
def test_sizes_are_counted_whenever_one_looks(sizes):
    server, metrics = of_m()
    for request_bytes, response_bytes in sizes * 3:  # more than are noted before they are counted
        metrics.answered(0.001, request_bytes, response_bytes)
    families = parsed(render(server).decode())
    for name, given_sizes in (("request", [one for one, _ in sizes]), ("response", [one for _, one in sizes])):
        family = f"lepton_{name}_bytes"
        assert value(families, family, f"{family}_sum") == 3 * sum(given_sizes)
        at_most_4096 = 3 * sum(each <= 4096 for each in given_sizes)
        assert value(families, family, f"{family}_bucket", le="4096.0") == at_most_4096


def test_counters_outlive_versions_and_are_bounded():
    server = ServerMetrics()
    for number in range(1, 101):
        one = server.opened("m", str(number))
        one.last_s = float(number)
        one.answered(0.001, 1, 1)
        assert server.all_codes()[200] == number
        server.closed("m", str(number))
    kept = {each.version for each in server}
    assert kept == {str(number) for number in range(101 - MOST_KEPT, 101)}
    assert server.opened("m", "100").requests == 1
    assert server.opened("other", "1").requests == 0
    assert server.all_codes() == {200: 100}


def test_a_version_that_comes_again_counts_on_while_the_first_still_answers():
    server = ServerMetrics()
    first = server.opened("m", "1")
    assert server.opened("m", "1") is first
    server.closed("m", "1")
    for number in range(2, 40):
        server.opened("m", str(number))
        server.closed("m", str(number))
    assert server.of("m", "1") is first


@pytest.mark.parametrize("others", [0, 9])
def test_each_version_has_its_own_figures(make_server, others):
    """Whether they are written on the event loop, or beside it."""
    one, two, *more = [Affine() for _ in range(2 + others)]
    two.version = "4"
    for number, other in enumerate(more):
        other.name = f"other{number}"
    server = make_server([one, two, *more])
    body, fields = affine_binary(np.ones((3, 4)), [1] * 3)
    for version, times in (("3", 1), ("4", 2)):
        for _ in range(times):
            assert exchange(server, "POST", f"/v2/models/affine/versions/{version}/infer", body, fields)[0] == 200
    families, _ = scrape(server)
    for version, times in (("3", 1), ("4", 2)):
        for name in ("lepton_rows", "nv_inference_count"):
            assert value(families, name, model="affine", version=version) == 3 * times
        (stats,) = json.loads(exchange(server, "GET", f"/v2/models/affine/versions/{version}/stats")[2])["model_stats"]
        assert (stats["version"], stats["inference_count"]) == (version, 3 * times)
    assert value(families, "lepton_http_responses", code="200") == 4  # this scrape is one
