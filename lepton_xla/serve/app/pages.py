"""What a server tells about itself and its models: the answers of every route except infer."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from lepton_xla.serve.http.exchange import Exchange
from lepton_xla.serve.models.handle import ModelHandle
from lepton_xla.serve.models.registry import Registry
from lepton_xla.serve.observe import exposition
from lepton_xla.serve.observe.server_metrics import ServerMetrics
from lepton_xla.serve.observe.statistics import model_statistics
from lepton_xla.serve.protocol import metadata, monitoring, openapi
from lepton_xla.serve.protocol.routes import CONTROL
from lepton_xla.serve.ui.files import HEADERS, page_files

# Versions whose metrics are written on the event loop.
_FEW = 4

type Gather = Callable[[Callable[[ServerMetrics], object]], object]


class Pages:
    """Answers requests for information.

    Args:
        models: the models served.
        metrics: the server's counters.
        server_name: name in the server's metadata.
        gather: calls back with the counters of the whole server; None if `metrics` has them all.
        repository: whether the server has a repository of models.
        audit: whether it keeps an audit log.
        needs_models: whether the server is not ready while no model is loaded.

    Attributes:
        server: by name of a route, what answers it.
        model: the same for routes of one model.
    """

    def __init__(
        self,
        models: Registry,
        metrics: ServerMetrics,
        server_name: str,
        gather: Gather | None,
        *,
        repository: bool = False,
        audit: bool = False,
        needs_models: bool = False,
    ) -> None:
        self._needs_models = needs_models
        self._without = (frozenset[str]() if repository else CONTROL) | (set[str]() if audit else {"audit"})
        self._models = models
        self._metrics = metrics
        self._gather: Gather = gather or (lambda then: then(metrics))
        self.server: dict[str, Callable[[Exchange], None]] = {
            "server_live": self._live,
            "server_ready": self._ready,
            "server_metadata": lambda exchange: self._json(
                exchange, metadata.server_metadata(server_name, repository=repository)
            ),
            "openapi": self._openapi,
            "metrics": self._show_metrics,
            "statistics": lambda exchange: self._statistics(models, exchange),
            "alerts": self._alerts,
            **{name: functools.partial(self._file, *file) for name, file in page_files().items()},
            "repository_index": self._index,
            "log_settings": lambda exchange: self._json(exchange, metadata.log_settings()),
            "trace_settings": lambda exchange: self._json(exchange, metadata.trace_settings()),
        }
        self.model: dict[str, Callable[[ModelHandle, Exchange], None]] = {
            "model_metadata": self._model_metadata,
            "model_ready": self._model_ready,
            "model_config": lambda model, exchange: self._json(
                exchange, metadata.model_config(model.signature, model.scheduler.max_delay_s)
            ),
            "model_statistics": lambda model, exchange: self._statistics([model], exchange),
            "model_monitor": self._model_monitor,
            "model_trace_settings": lambda model, exchange: self._json(exchange, metadata.trace_settings()),
        }

    def _json(self, exchange: Exchange, value: Any, status: int = 200) -> None:
        self._metrics.codes[status] += 1
        exchange.answer(status, msgspec.json.encode(value))

    def _openapi(self, exchange: Exchange) -> None:
        signatures = [model.signature for model in self._models]
        self._json(exchange, openapi.document(signatures, self._models.labels(), self._without))

    def _live(self, exchange: Exchange) -> None:
        live = self._metrics.live
        self._json(exchange, metadata.ServerLive(live), 200 if live else 503)

    def _ready(self, exchange: Exchange) -> None:
        ready = self._metrics.ready and (not self._needs_models or bool(self._models.names()))
        self._json(exchange, metadata.ServerReady(ready=ready, live=self._metrics.live), 200 if ready else 503)

    def _model_metadata(self, model: ModelHandle, exchange: Exchange) -> None:
        signature = model.signature
        self._json(exchange, metadata.model_metadata(signature, self._models.versions(signature.name)))

    def _is_ready(self, model: ModelHandle) -> bool:
        return self._metrics.ready and model.health.ready

    def is_ready_now(self, name: str, version: str) -> bool:
        """Whether a version is loaded and takes requests."""
        model = self._models.get(name, version)
        return model is not None and self._is_ready(model)

    def _model_ready(self, model: ModelHandle, exchange: Exchange) -> None:
        ready = self._is_ready(model)
        self._json(exchange, metadata.ModelReady(model.signature.name, ready), 200 if ready else 503)

    def _index(self, exchange: Exchange) -> None:
        models = [(model.signature, self._is_ready(model)) for model in self._models]
        self._json(exchange, metadata.repository_index(models, exchange.body))

    def _statistics(self, models: Iterable[ModelHandle], exchange: Exchange) -> None:
        signatures = [model.signature for model in models]

        def show(metrics: ServerMetrics) -> None:
            told = [model_statistics(each, metrics.of(each.name, each.version)) for each in signatures]
            self._json(exchange, metadata.Statistics(told))

        self._gather(show)

    def _model_monitor(self, model: ModelHandle, exchange: Exchange) -> None:
        name, version = model.signature.name, model.signature.version

        def show(metrics: ServerMetrics) -> None:
            feedback: dict[str, Any] = {
                "right": 0,
                "wrong": 0,
                "labels": {},
                **metrics.of(name, version).feedback_counts(),
            }
            labels = sorted((int(label), counts) for label, counts in feedback["labels"].items())
            found = metrics.monitoring.drifts.get((name, version), {})
            self._json(
                exchange,
                monitoring.ModelMonitor(
                    name,
                    version,
                    drift=[monitoring.FeatureDrift(feature, *each) for feature, each in found.items()],
                    feedback_rows=feedback["right"] + feedback["wrong"],
                    accuracy=metrics.monitoring.accuracy(name, version),
                    labels=[
                        monitoring.LabelFigures(
                            label, rows, right / rows if rows else None, right / answered if answered else None
                        )
                        for label, (right, rows, answered) in labels
                    ],
                ),
            )

        self._gather(show)

    def _alerts(self, exchange: Exchange) -> None:
        alerts = [
            monitoring.AlertEntry(
                each.rule.name, each.model, each.version, each.rule.when, each.rule.severity, each.state,
                None if math.isnan(each.value) else each.value, each.since_s,
            )
            for each in self._metrics.monitoring.alerts
        ]  # fmt: skip
        self._json(exchange, monitoring.Alerts(alerts))

    def _file(self, content: bytes, content_type: str, exchange: Exchange) -> None:
        self._metrics.codes[200] += 1
        exchange.answer(200, content, content_type, *HEADERS)

    def _show_metrics(self, exchange: Exchange) -> None:
        self._metrics.codes[200] += 1

        def show(metrics: ServerMetrics) -> None:
            # A copy, since counting goes on meanwhile: the text of 200 models takes half a second.
            if sum(1 for _ in metrics) > _FEW:
                work = asyncio.get_running_loop().run_in_executor(None, exposition.render, metrics.plus({}))
                work.add_done_callback(lambda done: answer(done.result()))
            else:
                answer(exposition.render(metrics))

        def answer(text: bytes) -> None:
            exchange.answer(200, text, exposition.CONTENT_TYPE)

        self._gather(show)
