"""Triton's names for what the server counts, so that dashboards and alerts made for Triton work unchanged.

Written out here because `prometheus_client` ends the names of counters in `_total`, which Triton's do not.

Source: Triton Inference Server, `docs/user_guide/metrics.md`.
"""

from __future__ import annotations

from lepton_xla.serve.observe.metrics import Metrics


def render(metrics: Metrics) -> bytes:
    """The metrics in Prometheus' text format."""
    labels = {"model": metrics.model, "version": metrics.version}
    failures = {
        "REJECTED": metrics.rejected,
        "CANCELED": metrics.cancelled,
        "BACKEND": metrics.failures,
        "OTHER": metrics.expired,
    }
    lines = [
        *_family("nv_inference_request_success", "counter", "Number of successful inference requests"),
        _sample("nv_inference_request_success", labels, metrics.requests),
        *_family("nv_inference_request_failure", "counter", "Number of failed inference requests"),
        *(
            _sample("nv_inference_request_failure", labels | {"reason": reason}, count)
            for reason, count in failures.items()
        ),
    ]
    for name, kind, text, value in (
        ("count", "counter", "Number of inferences performed, a row each", metrics.rows),
        ("exec_count", "counter", "Number of executions", metrics.batch_rows.count),
        ("request_duration_us", "counter", "Cumulative time of requests", _us(metrics.request_s.total)),
        ("queue_duration_us", "counter", "Cumulative time in the queue", _us(metrics.queue_s.total)),
        ("compute_input_duration_us", "counter", "Cumulative time of copying inputs", _us(metrics.input_s)),
        ("compute_infer_duration_us", "counter", "Cumulative time of execution", _us(metrics.infer_s)),
        ("compute_output_duration_us", "counter", "Cumulative time of writing outputs", _us(metrics.output_s)),
        ("pending_request_count", "gauge", "Requests in the queue", int(metrics.now["queue_requests"])),
    ):
        lines += [*_family(f"nv_inference_{name}", kind, text), _sample(f"nv_inference_{name}", labels, value)]
    return "".join(lines).encode()


def _us(seconds: float) -> int:
    return int(seconds * 1e6)


def _family(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}\n", f"# TYPE {name} {kind}\n"


def _sample(name: str, labels: dict[str, str], value: int) -> str:
    shown = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    return f"{name}{{{shown}}} {value}\n"


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
