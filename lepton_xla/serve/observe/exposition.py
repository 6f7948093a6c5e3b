"""What is counted, in Prometheus' text format, made when it is asked for.

Labels are the model's name and version and HTTP status codes, so their number is bounded whatever clients send.
Triton's names for the same figures follow after ours, so that dashboards made for it work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lepton_xla.serve.monitor.monitoring import Monitoring
from lepton_xla.serve.observe import triton_metrics
from lepton_xla.serve.observe.metrics import COSTS, DEVICES, Histogram, Metrics
from lepton_xla.serve.observe.server_metrics import PROCESS, ServerMetrics

CONTENT_TYPE = exposition.CONTENT_TYPE_LATEST

_LABELS = ("model", "version")
_SERVER_GAUGES = {
    "in_flight": "HTTP requests that have no answer yet.",
    "connections": "Connections open now.",
    "buffered_bytes": "Bodies of requests that arrive or have no answer yet, and answers to come or not sent yet.",
}
_GAUGES = {
    "queue_rows": "Rows waiting now.",
    "queue_requests": "Inferences waiting now.",
    "model_bytes": "Memory that the version takes in all processes: weights, code, and arrays of batches.",
    "adjustment_step": "Steps by which the weights have moved, of the version that an adjustment has put.",
    "model_ready": "Processes in which the version is loaded and takes requests.",
}
_COUNTERS: dict[str, tuple[str, Callable[[Metrics], float]]] = {
    "inference_requests": ("Inferences answered with a result.", lambda counted: counted.requests),
    "inference_failures": ("Inferences that failed in execution.", lambda counted: counted.failures),
    "inference_rejected": ("Inferences refused for load.", lambda counted: counted.rejected),
    "inference_expired": ("Inferences whose deadline could not be met.", lambda counted: counted.expired),
    "inference_cancelled": ("Inferences whose client went away first.", lambda counted: counted.cancelled),
    "rows": ("Rows executed, padding not counted.", lambda counted: counted.rows),
    "padding_rows": ("Padding rows executed.", lambda counted: counted.padding),
    "batches": ("Executions.", lambda counted: counted.batch_rows.count),
    "model_loads": ("Times that a version was loaded.", lambda counted: counted.loads),
    "model_load_failures": ("Times that a version could not be loaded.", lambda counted: counted.load_failures),
    "failed_batches": ("Executions that failed.", lambda counted: counted.failed_batches),
}
# Of models that generate tokens; others have none of these.
_GENERATION_COUNTERS: dict[str, tuple[str, Callable[[Metrics], float]]] = {
    "generations": ("Sequences of tokens that ended by themselves.", lambda counted: counted.generations),
    "generations_cancelled": (
        "Sequences of tokens whose client went away first.", lambda counted: counted.generations_cancelled
    ),
    "prompt_tokens": ("Tokens of prompts.", lambda counted: counted.prompt_tokens),
    "generated_tokens": ("Tokens generated.", lambda counted: counted.generated_tokens),
}  # fmt: skip
_GENERATION_HISTOGRAMS: dict[str, tuple[str, Callable[[Metrics], Histogram]]] = {
    "first_token_seconds": ("From a whole request to its first token.", lambda counted: counted.first_token_s),
    "next_token_seconds": ("From a token to the next one.", lambda counted: counted.next_token_s),
}
_HISTOGRAMS: dict[str, tuple[str, Callable[[Metrics], Histogram]]] = {
    "request_seconds": ("From a whole request to its answer.", lambda counted: counted.request_s),
    "queue_seconds": ("From a whole request to the start of its batch.", lambda counted: counted.queue_s),
    "compute_seconds": ("One execution.", lambda counted: counted.compute_s),
    "batch_rows": ("Real rows of one execution.", lambda counted: counted.batch_rows),
    "padding_share": (
        "Padding rows of one execution as a share of its rows.", lambda counted: counted.padding_share
    ),
    "request_bytes": ("Body of an infer request.", lambda counted: counted.request_bytes),
    # Without status line, `Date` and `Connection`, which the connection writes.
    "response_bytes": ("Infer answer: body, and header fields except Date.", lambda counted: counted.response_bytes),
}  # fmt: skip


def render(metrics: ServerMetrics) -> bytes:
    """All figures as of now."""
    metrics.bring_up_to_date()
    return exposition.generate_latest(_Families(metrics)) + triton_metrics.render(list(metrics))


class _Families(Collector):
    """Metric families of what is counted."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """The metric families."""
        server, models = self._metrics, list(self._metrics)
        codes = CounterMetricFamily("lepton_http_responses", "HTTP answers by status code.", labels=["code"])
        for code, count in sorted(server.all_codes().items()):
            codes.add_metric([str(code)], count)
        yield codes
        for name, text in _SERVER_GAUGES.items():
            yield GaugeMetricFamily(f"lepton_{name}", text, server.now[name])
        yield GaugeMetricFamily("lepton_ready", "1 while the server takes requests.", float(server.ready))
        yield GaugeMetricFamily("lepton_live", "0 if only a new process would help.", float(server.live))
        if models:
            yield from _of_models(models)
        yield from _of_monitoring(server.monitoring)
        for family in PROCESS.collect():
            family.samples = [each._replace(value=server.now.get(each.name, each.value)) for each in family.samples]
            yield family


def _of_models(models: Sequence[Metrics]) -> Iterable[Metric]:
    generators = [each for each in models if each.prompt_tokens or each.first_token_s.count]
    for name, (text, count) in _GENERATION_COUNTERS.items():
        counter = CounterMetricFamily(f"lepton_{name}", text, labels=_LABELS)
        for each in generators:
            counter.add_metric([each.model, each.version], count(each))
        if generators:
            yield counter
    for name, (text, count) in _COUNTERS.items():
        counter = CounterMetricFamily(f"lepton_{name}", text, labels=_LABELS)
        for each in models:
            counter.add_metric([each.model, each.version], count(each))
        yield counter
    for name, text in _GAUGES.items():
        gauge = GaugeMetricFamily(f"lepton_{name}", text, labels=_LABELS)
        for each in models:
            gauge.add_metric([each.model, each.version], float(each.now.get(name, 0)))
        yield gauge
    results = [*_LABELS, "result"]
    yield from _by_label(
        CounterMetricFamily(
            "lepton_feedback_rows", "Rows with feedback, by whether they were answered right.", labels=results
        ),
        models,
        lambda each: {name: count for name, count in each.feedback_counts().items() if name in ("right", "wrong")},
    )
    yield from _by_label(
        CounterMetricFamily(
            "lepton_shadow_rows",
            "Rows that a version was asked as a shadow, by whether it answered as the other did, or not at all.",
            labels=results,
        ),
        models,
        lambda each: each.shadow if any(each.shadow.values()) else {},
    )
    yield from _by_label(
        CounterMetricFamily(
            "lepton_samples",
            "Records of requests and of feedback for them: kept in files; left out, since the disk was too slow; or "
            "lost.",
            labels=results,
        ),
        models,
        lambda each: each.samples if any(each.samples.values()) else {},
    )
    yield from _by_label(
        GaugeMetricFamily(
            "lepton_model_devices", "Processes in which the version runs on the device.", labels=[*_LABELS, "device"]
        ),
        models,
        lambda each: each.now.get(DEVICES, {}),
    )
    costs = GaugeMetricFamily(
        "lepton_cost_seconds", "What one execution is predicted to take.", labels=[*_LABELS, "shape", "batch"]
    )
    for each in models:
        for shape, sizes in each.now.get(COSTS, {}).items():
            for size, value in sizes.items():
                costs.add_metric([each.model, each.version, shape, size], value)
    if costs.samples:
        yield costs
    yield from _of_histograms(models, _HISTOGRAMS)
    if generators:
        yield from _of_histograms(generators, _GENERATION_HISTOGRAMS)


def _by_label(
    family: CounterMetricFamily | GaugeMetricFamily,
    models: Sequence[Metrics],
    counted: Callable[[Metrics], Mapping[str, float]],
) -> Iterable[Metric]:
    """A family with a label beside the version's, if any version has counted something."""
    for each in models:
        for label, count in counted(each).items():
            family.add_metric([each.model, each.version, label], count)
    if family.samples:
        yield family


def _of_histograms(
    models: Sequence[Metrics], families: Mapping[str, tuple[str, Callable[[Metrics], Histogram]]]
) -> Iterable[Metric]:
    for name, (text, read) in families.items():
        family = HistogramMetricFamily(f"lepton_{name}", text, labels=_LABELS)
        for each in models:
            histogram = read(each)
            family.add_metric([each.model, each.version], histogram.cumulative(), histogram.total)
        yield family


def _of_monitoring(monitoring: Monitoring) -> Iterable[Metric]:
    psi = GaugeMetricFamily(
        "lepton_drift_psi", "Population stability index over the last 500 rows.", labels=[*_LABELS, "feature"]
    )
    ks = GaugeMetricFamily(
        "lepton_drift_ks", "Kolmogorov-Smirnov distance over the last 500 rows.", labels=[*_LABELS, "feature"]
    )
    for (model, version), found in monitoring.drifts.items():
        for feature, drift in found.items():
            psi.add_metric([model, version, feature], drift.psi)
            ks.add_metric([model, version, feature], drift.ks)
    value = GaugeMetricFamily("lepton_rule_value", "What an alert rule measures.", labels=["rule", *_LABELS])
    firing = GaugeMetricFamily(
        "lepton_alert_firing", "1 while an alert fires.", labels=["rule", *_LABELS, "severity"]
    )  # fmt: skip
    for alert in monitoring.alerts:
        name = (alert.rule.name, alert.model, alert.version)
        if alert.state != "unknown":
            value.add_metric(name, alert.value)
        firing.add_metric([*name, alert.rule.severity], float(alert.state == "firing"))
    yield from (family for family in (psi, ks, value, firing) if family.samples)
