"""What it costs to share requests among versions, and to ask a shadow too. A section of `operations.py`."""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import crowding
import harness
import journal
import numpy as np
import payloads
import uvloop
from loops import on_cores
from payloads import Payload

from lepton_xla.serve.client.repository import RepositoryClient
from lepton_xla.serve.models.repository import Repository

ROUNDS, CONNECTIONS, TARGET = 5, 64, 0.95
SMALLER = "one version, in batches of half as many rows"
HALVES = {"1": 0.5, "2": 0.5}
CASES: Mapping[str, Mapping[str, Any] | None] = {
    "one version": None,
    "one version, by shares": {"shares": {"1": 1.0}},
    "shares": {"shares": HALVES},
    "shares, sticky by a header": {"shares": HALVES, "sticky": "x-user"},
    SMALLER: None,
    "one version, all asked of a shadow too": {"shares": {"1": 1.0}, "shadow": {"to": "2", "fraction": 1.0}},
}

INTRODUCTION = (
    "## Traffic\n\n"
    "Requests of one row to a model with two equal versions, a closed loop of 64 connections; rounds take turns, and "
    "each is compared with the round of one version beside it. Shares make two batches of what would be one, which is "
    "most of what they cost: beside them is one version whose batches may have half as many rows as there are "
    "connections. On a server as busy as this one a shadow has a hundredth of the time: what is more is left out."
)


def measured(folder: pathlib.Path, seconds: float, rounds: int, *, quick: bool) -> list[dict[str, Any]]:
    """Requests per second by case."""
    path, payload = payloads.first10(folder, quick=quick)
    root = folder / "MODELS"
    repository = Repository(root)
    for _ in range(2):
        repository.push(path, payload.model)
    (root / payload.model / "model.toml").write_text('versions = "all"\n[labels]\nstable = "1"\n', encoding="utf-8")
    server = crowding.serve(root, Payload(payload.model, payload.rows, payload.outputs))
    found: dict[str, list[float]] = {name: [] for name in CASES}
    used: dict[str, list[float]] = {name: [] for name in CASES}
    shadow: dict[str, float] = {}
    try:
        with on_cores(slice(-1, None)), RepositoryClient(f"http://127.0.0.1:{server.port}") as client:
            for _ in range(rounds):
                for name, traffic in CASES.items():
                    client.clear_traffic(payload.model)
                    if traffic is not None:
                        client.set_traffic(payload.model, traffic)
                    if name == SMALLER:
                        crowding.limit(server, payload.model, CONNECTIONS // 2)
                    requests = [request(payload, user) for user in range(CONNECTIONS)]
                    before = counted(client)
                    found[name].append(uvloop.run(crowding.rate(server.port, requests, CONNECTIONS, seconds)))
                    busy_s, answered = (now - then for now, then in zip(counted(client), before, strict=True))
                    used[name].append(busy_s / answered)
                    if name == SMALLER:
                        crowding.limit(server, payload.model, CONNECTIONS)
            text = client.metrics()
        for line in text.splitlines():
            if line.startswith("lepton_shadow_rows_total{"):
                shadow[line.partition('result="')[2].partition('"')[0]] = float(line.rpartition(" ")[2])
    finally:
        server.stop()
    plain, plain_used = np.array(found["one version"]), np.array(used["one version"])
    return [
        {
            "case": name, "rate": float(np.median(each)), "ratio": float(np.median(np.array(each) / plain)),
            "processor_us": 1e6 * float(np.median(used[name])),
            "processor_ratio": float(np.median(np.array(used[name]) / plain_used)),
            "ratios": sorted((np.array(each) / plain).tolist()), "shadow": shadow if "shadow" in name else {},
        }
        for name, each in found.items()
    ]  # fmt: skip


def counted(client: RepositoryClient) -> tuple[float, float]:
    """Processor seconds of the server, and answers that it has given."""
    busy_s = answered = 0.0
    for line in client.metrics().splitlines():
        if line.startswith("process_cpu_seconds_total"):
            busy_s = float(line.rpartition(" ")[2])
        elif line.startswith("lepton_inference_requests_total{"):
            answered += float(line.rpartition(" ")[2])
    return busy_s, answered


def request(payload: Payload, user: int) -> crowding.Request:
    """A request of one user."""
    body, fields = payload.oip()
    lines = "".join(f"{key}: {value}\r\n" for key, value in {**fields, "X-User": str(user)}.items())
    start = f"POST /v2/models/{payload.model}/infer HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    return f"{start}{lines}\r\n".encode(), body


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All figures so far."""
    kept = journal.opened("operations-traffic", options, "seconds")
    rounds = 2 if options.quick else ROUNDS
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        yield kept.row("traffic", lambda: measured(folder, options.seconds, rounds, quick=options.quick))


def tables(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown of the figures."""
    lines = [
        (
            row["case"], f"{row['rate']:,.0f}", f"{row['ratio']:.3f}",
            f"{row['ratios'][0]:.3f} to {row['ratios'][-1]:.3f}",
            f"{row['processor_us']:.1f}", f"{row['processor_ratio']:.3f}",
            ", ".join(f"{result} {count:,.0f}" for result, count in row["shadow"].items()),
        )
        for row in found
    ]  # fmt: skip
    header = (
        "traffic", "requests/s", f"of one version's (at least {TARGET:g})", "of rounds", "processor us a request",
        "of one version's", "rows of the shadow",
    )  # fmt: skip
    return [harness.markdown(header, lines)]
