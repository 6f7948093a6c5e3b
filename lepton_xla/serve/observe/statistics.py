"""Triton's statistics of a model, made of what the server counts."""

from __future__ import annotations

from lepton_xla.serve.observe.metrics import Histogram, Metrics
from lepton_xla.serve.protocol.metadata import BatchStatistics, Duration, InferStatistics, ModelStatistics
from lepton_xla.serve.protocol.signature import Signature


def model_statistics(signature: Signature, metrics: Metrics) -> ModelStatistics:
    """What `GET /v2/models/{model}/stats` says of a model."""
    none = _duration(0, 0.0)
    metrics.count_noted()
    batches, requests = metrics.batch_rows.count, metrics.requests
    inference = InferStatistics(
        success=_total(metrics.request_s),
        fail=_duration(metrics.failures, 0.0),
        queue=_total(metrics.queue_s),
        compute_input=_duration(requests, metrics.input_s),
        compute_infer=_duration(requests, metrics.infer_s),
        compute_output=_duration(requests, metrics.output_s),
        cache_hit=none,
        cache_miss=none,
    )
    sizes = [
        BatchStatistics(size, _duration(count, copying), _duration(count, computing), compute_output=none)
        for size, (count, copying, computing) in sorted(metrics.by_size.items())
    ]
    return ModelStatistics(
        name=signature.name,
        version=signature.version,
        last_inference=int(metrics.last_s * 1e3),
        inference_count=metrics.rows,
        execution_count=batches,
        inference_stats=inference,
        batch_stats=sizes,
        memory_usage=[],
        response_stats={},
    )


def _duration(count: int, seconds: float) -> Duration:
    return Duration(count, round(seconds * 1e9))


def _total(histogram: Histogram) -> Duration:
    return _duration(histogram.count, histogram.total)
