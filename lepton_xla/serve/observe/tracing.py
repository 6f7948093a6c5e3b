"""Whether and where requests are traced with OpenTelemetry. Nothing of it is imported unless they are."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lepton_xla.errors import ServeError

if TYPE_CHECKING:
    from lepton_xla.serve.observe.spans import Spans

_log = logging.getLogger("lepton_xla.serve")

_PATH = "/v1/traces"
_PROTOCOL = "http/protobuf"
_MISSING = "tracing needs OpenTelemetry: pip install 'lepton-xla[otel]'"


def check_endpoint(endpoint: str) -> str:
    """The URL that traces go to: as given, or `/v1/traces` under it where it has no path.

    Raises:
        ServeError: if it is no HTTP URL, or there is nothing to send traces with.
    """
    if importlib.util.find_spec("opentelemetry") is None:
        raise ServeError(_MISSING)
    try:
        url = urlsplit(endpoint)
        fine = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        fine = False
    if not fine:
        raise ServeError("the OpenTelemetry endpoint must be an http:// or https:// URL, such as http://localhost:4318")
    return endpoint.rstrip("/") + _PATH if urlsplit(endpoint).path in ("", "/") else endpoint


def tracing(endpoint: str | None, environment: Mapping[str, str] = os.environ) -> Spans | None:
    """What watches requests to trace them; None if they are not traced.

    Args:
        endpoint: a collector that takes OTLP over HTTP; None takes it from the standard variables, if they name one.
        environment: where those are.

    Raises:
        ServeError: for an endpoint that is none, or one that is given where OpenTelemetry is not installed.
    """
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if endpoint is None and not _configured(environment):
        return None
    url = None if endpoint is None else check_endpoint(endpoint)
    try:
        from lepton_xla.serve.observe.spans import Spans, exporting
    except ImportError as error:
        if endpoint is not None:
            raise ServeError(_MISSING) from error
        _log.warning("%s; requests are not traced", _MISSING)
        return None
    _log.info("requests are traced with OpenTelemetry")
    return Spans(exporting(url), *sampler(environment))


def _configured(environment: Mapping[str, str]) -> bool:
    """Whether the standard variables name a collector that is spoken to as we can."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if not any(environment.get(name) for name in names) or environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((environment[name] for name in protocols if environment.get(name)), _PROTOCOL)
    if protocol != _PROTOCOL:
        _log.warning("requests are not traced: the protocol has to be %s, not %s", _PROTOCOL, protocol)
        return False
    return True


def sampler(environment: Mapping[str, str]) -> tuple[float, bool]:
    """Share of the requests to trace, and whether one that comes with a trace is traced as its caller decided.

    Raises:
        ServeError: for a sampler that there is not.
    """
    name = environment.get("OTEL_TRACES_SAMPLER") or "parentbased_always_on"
    kind = name.removeprefix("parentbased_")
    given = environment.get("OTEL_TRACES_SAMPLER_ARG") or "1"
    try:
        share = {"always_on": 1.0, "always_off": 0.0, "traceidratio": float(given)}[kind]
    except (KeyError, ValueError) as error:
        raise ServeError(f"no such sampler: OTEL_TRACES_SAMPLER={name!r}, OTEL_TRACES_SAMPLER_ARG={given!r}") from error
    if not 0 <= share <= 1:
        raise ServeError(f"OTEL_TRACES_SAMPLER_ARG must be 0 to 1, not {given!r}")
    return share, name != kind
