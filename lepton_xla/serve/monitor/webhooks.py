"""Sends alerts to webhooks, in the form that Alertmanager sends: whatever receives its alerts receives ours."""

from __future__ import annotations

import datetime
import hashlib
import logging
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from lepton_xla.serve.monitor.alerts import Alert
from lepton_xla.serve.monitor.rules import Webhook

_log = logging.getLogger("lepton_xla.serve")

_MOST_WAITING = 1000
_TIMEOUT_S = 10.0
# Seconds before each further try.
_RETRIES = (1.0, 5.0, 30.0)


class Sender:
    """Sends alerts from a thread of its own, each to every webhook, with retries.

    Args:
        webhooks: where to.
        server_url: where the server is, for whoever gets the alert.
        wait: sleeps; returns whether to stop.
    """

    def __init__(
        self,
        webhooks: Sequence[Webhook],
        server_url: str = "",
        wait: Callable[[float], bool] | None = None,
    ) -> None:
        self._webhooks = tuple(webhooks)
        self._server_url = server_url
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._alerts: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        if webhooks:
            self._thread = threading.Thread(target=self._run, name="lepton-webhooks", daemon=True)
            self._thread.start()

    def send(self, alert: Alert) -> None:
        """Queues an alert that begins or ends; never waits."""
        if self._thread is None:
            return
        try:
            self._alerts.put_nowait(msgspec.json.encode(payload(alert, self._server_url)))
        except queue.Full:
            _log.error("alert %s is not sent: %d wait for their webhooks", alert.rule.name, _MOST_WAITING)

    def close(self, timeout_s: float = 2.0) -> None:
        """Stops; what is queued is sent if that takes no longer than the timeout."""
        if self._thread is not None:
            try:
                self._alerts.put_nowait(None)
            except queue.Full:
                self._stopped.set()
            self._thread.join(timeout_s)
            self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set() and (body := self._alerts.get()) is not None:
            for number, webhook in enumerate(self._webhooks):
                self._deliver(number, webhook, body)

    def _deliver(self, number: int, webhook: Webhook, body: bytes) -> None:
        # The URL is not logged: many have a secret in them.
        for pause in (*_RETRIES, None):
            try:
                _post(webhook, body)
                return
            except (OSError, ValueError) as error:
                reason = f"status {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
            if pause is None:
                _log.error("webhook %d did not take an alert: %s; given up", number + 1, reason)
            else:
                _log.warning("webhook %d did not take an alert: %s; tried again in %g s", number + 1, reason, pause)
                if self._wait(pause):
                    return


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A webhook is where it was said to be; its token goes nowhere else."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)


def _post(webhook: Webhook, body: bytes) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": "lepton_xla"}
    if webhook.token_file is not None:
        headers["Authorization"] = f"Bearer {webhook.token_file.read_text().strip()}"
    # The rules take HTTP and HTTPS only.
    request = urllib.request.Request(webhook.url, body, headers, method="POST")  # noqa: S310
    with _opener.open(request, timeout=_TIMEOUT_S) as answer:
        answer.read(1 << 16)


def payload(alert: Alert, server_url: str = "") -> dict[str, Any]:
    """An alert as Alertmanager's webhooks have it.

    Source:
        Prometheus Alertmanager, `<webhook_config>`, version 4.
    """
    status = "firing" if alert.state == "firing" else "resolved"
    labels = {
        "alertname": alert.rule.name, "severity": alert.rule.severity, "model": alert.model, "version": alert.version,
    }  # fmt: skip
    since = _time(alert.since_s)
    annotations = {"summary": summary_of(alert), "value": f"{alert.value:.6g}", "condition": alert.rule.when}
    fingerprint = hashlib.sha256("\0".join((alert.rule.name, alert.model, alert.version)).encode()).hexdigest()[:16]
    return {
        "version": "4",
        "groupKey": f"{{}}:{{alertname={alert.rule.name!r}}}",
        "truncatedAlerts": 0,
        "status": status,
        "receiver": "lepton_xla",
        "groupLabels": {"alertname": alert.rule.name},
        "commonLabels": labels,
        "commonAnnotations": annotations,
        "externalURL": server_url,
        "alerts": [
            {
                "status": status,
                "labels": labels,
                "annotations": annotations,
                "startsAt": since,
                "endsAt": since if status == "resolved" else "0001-01-01T00:00:00Z",
                "generatorURL": server_url,
                "fingerprint": fingerprint,
            }
        ],
    }


def summary_of(alert: Alert) -> str:
    """One line on what an alert says."""
    return alert.rule.summary or f"{alert.model} version {alert.version}: {alert.rule.when} ({alert.value:.4g} now)"


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
