"""Triton and MLServer where ours was measured: several models that share one device, and in Triton one that is loaded
anew under load.

A section of `operations.py`. The models copy ten numbers, in NumPy, in Triton's Python backend: the only one that the
wheel brings.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import harness
import journal
import numpy as np
import payloads
import uvloop
from contenders import SERVERS, triton_installed
from crowding import Request, rate, requests_of
from loops import load, on_cores
from payloads import Payload
from server_process import Server, free_port
from swapping import CONNECTIONS, SHARE, WINDOW_S, post, under_load

RELOADS, APART_S = 20, 5.0

INTRODUCTION = (
    "## Triton and MLServer\n\n"
    "Triton 2.51.0 of the wheel nvidia-pytriton 0.7.0, on the cores that ours has in the tables above, with models of "
    "its Python backend that copy ten of 784 numbers, each a process of its own. MLServer 1.7.1 with such models in a "
    "process, asked in JSON: it takes no binary tensors over HTTP. Several models: as above. Reloads, in Triton: the "
    "model is unloaded and loaded by the repository's API every five seconds under an open loop at 60 % of its "
    "capacity; p99 is of what was answered with 200 in the second from when that began. Neither has a budget of memory "
    "by which models go and come, so 200 models under one GiB are not asked of them."
)


def start(folder: pathlib.Path, python: str, names: Sequence[str], payload: Payload) -> Server:
    """Triton with copies of one model, on all cores but the last."""
    binary, env = triton_installed(python)
    for name in names:
        shutil.copytree(SERVERS / "triton" / "first10", folder / name)
        config = folder / name / "config.pbtxt"
        config.write_text(
            config.read_text().replace("first10", name).replace("max_batch_size: 32", "max_batch_size: 64")
        )
    port = free_port()
    command = [
        str(binary), f"--model-repository={folder}", f"--backend-directory={binary.parents[1] / 'backends'}",
        "--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false",
        "--model-control-mode=explicit", *(f"--load-model={name}" for name in names),
    ]  # fmt: skip
    with on_cores(slice(None, -1)):
        server = Server("Triton", command, port, f"/v2/models/{names[0]}/infer", payload.oip(), env)
    server.wait()
    return server


def start_mlserver(folder: pathlib.Path, python: str, names: Sequence[str], body: bytes) -> Server:
    """MLServer with copies of one model, in one process, on all cores but the last."""
    for name in names:
        settings = {"name": name, "implementation": "first10.First10", "max_batch_size": 64, "max_batch_time": 0.002}
        (folder / name).mkdir(parents=True)
        (folder / name / "model-settings.json").write_text(json.dumps(settings))
    ports = {f"{kind}_port": free_port() for kind in ("http", "grpc", "metrics")}
    (folder / "settings.json").write_text(json.dumps({**ports, "host": "127.0.0.1", "parallel_workers": 0}))
    with on_cores(slice(None, -1)):
        server = Server(
            "MLServer", [str(pathlib.Path(python).with_name("mlserver")), "start", str(folder)], ports["http_port"],
            f"/v2/models/{names[-1]}/infer", (body, {"Content-Type": "application/json"}),
            {"PYTHONPATH": str(SERVERS / "mlserver")},
        )  # fmt: skip
    server.wait()
    return server


def in_json(names: Sequence[str], payload: Payload) -> tuple[bytes, list[Request]]:
    """A body in JSON, which is all that MLServer takes over HTTP, and a request to each model."""
    inputs = [
        {"name": name, "shape": list(row.shape), "datatype": "FP32", "data": row.ravel().tolist()}
        for name, row in payload.rows.items()
    ]
    body = json.dumps({"inputs": inputs}).encode()
    lines = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return body, [(f"POST /v2/models/{name}/infer HTTP/1.1\r\n{lines}".encode(), body) for name in names]


def several(
    folder: pathlib.Path, kind: str, python: str, counts: Sequence[int], connections: Sequence[int], seconds: float
) -> dict[str, dict[str, float]]:
    """Requests per second by connections and models: medians of three rounds."""
    _, payload = payloads.first10(folder, quick=False)
    names = [f"m{index:02}" for index in range(max(counts))]
    if kind == "triton":
        server, requests = start(folder / "MODELS", python, names, payload), requests_of(names, payload)
    else:
        body, requests = in_json(names, payload)
        server = start_mlserver(folder / "MODELS", python, names, body)
    found: dict[str, dict[str, float]] = {}
    try:
        with on_cores(slice(-1, None)):
            for at_once in connections:
                rounds = [
                    [uvloop.run(rate(server.port, requests[:count], at_once, seconds)) for count in counts]
                    for _ in range(3)
                ]
                medians = np.median(rounds, axis=0).tolist()
                found[str(at_once)] = {str(count): each for count, each in zip(counts, medians, strict=True)}
    finally:
        server.stop()
    return found


def reloaded(folder: pathlib.Path, python: str, reloads: int, seconds: float) -> dict[str, Any]:
    """What becomes of requests to a model that is unloaded and loaded."""
    _, payload = payloads.first10(folder, quick=False)
    server = start(folder / "MODELS", python, ["m00"], payload)
    try:
        capacity = load(server, None, CONNECTIONS, seconds)["rate"]

        def reload(index: int) -> None:
            del index
            for what in ("unload", "load"):
                post(server, f"/v2/repository/models/m00/{what}")

        result, turns, began_s = under_load(server, SHARE * capacity, reloads, reload, APART_S)
    finally:
        server.stop()
    lost = int((result.status != 200).sum())

    def p99_ms(start_s: float) -> float:
        due = result.due_s + began_s
        chosen = (due >= start_s) & (due < start_s + WINDOW_S) & (result.status == 200)
        return 1e3 * float(np.percentile(result.latency_s[chosen], 99)) if chosen.any() else np.nan

    busy = [p99_ms(turn.began_s) for turn in turns]
    calm = [p99_ms(turn.began_s - WINDOW_S - 0.2) for turn in turns]
    return {
        "reloads": len(turns), "requests": len(result.status), "rate": SHARE * capacity, "lost": lost,
        "busy_p99_ms": float(np.nanmedian(busy)), "calm_p99_ms": float(np.nanmedian(calm)),
        "reload_ms": statistics.median(1e3 * (turn.ended_s - turn.began_s) for turn in turns),
    }  # fmt: skip


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All figures so far, again and again; none without a Python that has one of them."""
    pythons = {"triton": options.triton, "mlserver": options.mlserver}
    kept = journal.opened("operations-triton", options, "seconds")
    found: dict[str, Any] = {}
    counts, connections = ((1, 3), (8,)) if options.quick else ((1, 10, 50), (64, 512))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for kind, python in pythons.items():
            if python is None:
                continue
            (folder / kind).mkdir()
            of = {"triton": "several"}.get(kind, kind)
            found[of] = kept.row(
                of,
                lambda kind=kind, python=python: several(
                    folder / kind, kind, python, counts, connections, options.seconds
                ),
            )
            yield found
        if options.triton is not None:
            (folder / "reloaded").mkdir()
            reloads = 2 if options.quick else RELOADS
            found["reloaded"] = kept.row(
                "reloaded", lambda: reloaded(folder / "reloaded", options.triton, reloads, options.seconds)
            )
            yield found


def tables(found: Any) -> list[str]:
    """Markdown of the figures."""
    made: list[str] = []
    shown = {"Triton": found.get("several", {}), "MLServer": found.get("mlserver", {})}
    if any(shown.values()):
        made.append(harness.markdown(("server", "connections", "models", "requests/s", "of one model's"), [
            (name, connections, count, f"{per_s:,.0f}", f"{per_s / rates['1']:.2f}")
            for name, of in shown.items() for connections, rates in of.items() for count, per_s in rates.items()
        ]))  # fmt: skip
    if "reloaded" in found:
        row = found["reloaded"]
        header = (
            "reloads", "requests", "not answered with 200", "p99 in the second of a reload, ms", "p99 in others, ms",
            "ratio", "a reload, ms",
        )  # fmt: skip
        made.append(harness.markdown(header, [(
            row["reloads"], f"{row['requests']:,} at {row['rate']:,.0f}/s", f"{row['lost']:,}",
            f"{row['busy_p99_ms']:.1f}", f"{row['calm_p99_ms']:.1f}",
            f"{row['busy_p99_ms'] / row['calm_p99_ms']:.2f}", f"{row['reload_ms']:.0f}",
        )]))  # fmt: skip
    return made
