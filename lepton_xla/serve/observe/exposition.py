"""What is counted, in Prometheus' text format, made when it is asked for.

Labels are the model's name and version and HTTP status codes, so their number is bounded whatever clients send.
Triton's names for the same figures follow after ours, so that dashboards made for it work.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lepton_xla.serve.observe import triton_metrics
from lepton_xla.serve.observe.metrics import COSTS, PROCESS, Metrics

CONTENT_TYPE = exposition.CONTENT_TYPE_LATEST

_GAUGES = {
    "queue_rows": "Rows waiting now.",
    "queue_requests": "Inferences waiting now.",
    "in_flight": "HTTP requests that have no answer yet.",
    "connections": "Connections open now.",
    "buffered_bytes": "Bodies of requests that arrive or have no answer yet, and answers to come or not sent yet.",
}


def render(metrics: Metrics) -> bytes:
    """All figures as of now."""
    metrics.bring_up_to_date()
    return exposition.generate_latest(_Families(metrics)) + triton_metrics.render(metrics)


class _Families(Collector):
    """Metric families of what is counted."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """The metric families."""
        counted = self._metrics
        codes = CounterMetricFamily("lepton_http_responses", "HTTP answers by status code.", labels=["code"])
        for code, count in sorted(counted.codes.items()):
            codes.add_metric([str(code)], count)
        yield codes
        for name, text, value in (
            ("lepton_inference_requests", "Inferences answered with a result.", counted.requests),
            ("lepton_inference_failures", "Inferences that failed in execution.", counted.failures),
            ("lepton_inference_rejected", "Inferences refused for load.", counted.rejected),
            ("lepton_inference_expired", "Inferences whose deadline could not be met.", counted.expired),
            ("lepton_inference_cancelled", "Inferences whose client went away first.", counted.cancelled),
            ("lepton_rows", "Rows executed, padding not counted.", counted.rows),
            ("lepton_padding_rows", "Padding rows executed.", counted.padding),
            ("lepton_batches", "Executions.", counted.batch_rows.count),
            ("lepton_failed_batches", "Executions that failed.", counted.failed_batches),
        ):
            counter = CounterMetricFamily(name, text, labels=["model"])
            counter.add_metric([counted.model], value)
            yield counter
        gauges = [(f"lepton_{name}", text, counted.now[name]) for name, text in _GAUGES.items()]
        for name, text, value in (
            *gauges,
            ("lepton_ready", "1 while the server takes requests.", counted.ready),
            ("lepton_live", "0 if only a new process would help.", counted.live),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            gauge.add_metric([counted.model], float(value))
            yield gauge
        costs = GaugeMetricFamily(
            "lepton_cost_seconds", "What one execution is predicted to take.", labels=["model", "shape", "batch"]
        )
        for shape, sizes in counted.now.get(COSTS, {}).items():
            for size, value in sizes.items():
                costs.add_metric([counted.model, shape, size], value)
        if costs.samples:
            yield costs
        for name, text, histogram in (
            ("lepton_request_seconds", "From a whole request to its answer.", counted.request_s),
            ("lepton_queue_seconds", "From a whole request to the start of its batch.", counted.queue_s),
            ("lepton_compute_seconds", "One execution.", counted.compute_s),
            ("lepton_batch_rows", "Real rows of one execution.", counted.batch_rows),
            ("lepton_padding_share", "Padding rows of one execution as a share of its rows.", counted.padding_share),
            ("lepton_request_bytes", "Body of an infer request.", counted.request_bytes),
            # Without status line, `Date` and `Connection`, which the connection writes.
            ("lepton_response_bytes", "Infer answer: body, and header fields except Date.", counted.response_bytes),
        ):
            family = HistogramMetricFamily(name, text, labels=["model"])
            family.add_metric([counted.model], histogram.cumulative(), histogram.total)
            yield family
        for family in PROCESS.collect():
            family.samples = [each._replace(value=counted.now.get(each.name, each.value)) for each in family.samples]
            yield family
