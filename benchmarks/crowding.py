"""Many models on one server: under a budget of memory, and sharing one device. A section of `operations.py`."""

from __future__ import annotations

import argparse
import asyncio
import bisect
import collections
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

import harness
import journal
import numpy as np
import payloads
import uvloop
from evictions import best_loads, known_loads, recent_loads
from loops import on_cores
from payloads import Payload
from server_process import Server, free_port

import lepton_xla as lx

# Artifacts that differ; the others are hard links to them.
DIFFERENT = 10
CLIENTS, HOT = 4, 5
ZIPF = 1.1
WIDTH = 1000
TARGET_MEMORY, TARGET_HOT, TARGET_THROUGHPUT = 0.1, 2.0, 0.9
TINY = "tiny"
# Of requests that are a batch each, which are larger.
WHOLE_CONNECTIONS = 16
# Requests of models drawn at random, of which each connection sends a part of its own.
DRAWN = 50_000
# Of executions without a server: as many as the batches of 50 models at 64 connections, and as a batch takes.
BARE_ROWS = (16, 64)

INTRODUCTION = (
    "## Many models\n\n"
    "Under a budget of memory: requests of one row, by four clients that each wait for the answer before the "
    "next, to models drawn by Zipf's law (exponent 1.1). All models are hard links to ten artifacts, so that the "
    "disk is not measured. Resident memory is what the process takes (RSS) beyond what it took with one tiny "
    "model, at its most. The server evicts the model that was asked for least of late. Beside it, on paper, a request "
    "at a time, with as many models as the budget has room for: the one used longest ago goes (LRU); the one that "
    "Zipf's law gives the smallest share goes, which no policy can beat that does not know the requests to come, as "
    "each is drawn independently (Aho, Denning and Ullman, 1971); the one that is needed latest goes (Belady's, which "
    "knows them). The hot models are the five that are asked most.\n\n"
    "Throughput: the same requests to one model and to several, each connection with one request at a time: to one "
    "model after the other, so that those which were answered together ask the same model next, or to models drawn at "
    "random, so that they do not. The server has one core fewer than the machine. Requests of several models make "
    "smaller batches, and each batch is an execution, which is what costs: below several models stands one whose "
    "batches may have no more rows than the compiled sizes around their average. What one model would reach in "
    "batches of just that average is between the two, as a request costs a constant and its part of a batch: the last "
    "column compares with that. What is left is the look-up of a head that is not the one before of its connection, "
    "and that each batch finds what its model has for itself (its queue, counters, arrays and weights) out of the "
    "nearest caches. "
    "Requests that have as many rows as a batch takes make the same batches whoever they are for, so there the price "
    "of several models is all that differs. Models of equal code share it. What it pays by itself for finding each "
    "model's weights out of the nearest caches shows where executions take turns without a server, each after a copy "
    "of its rows."
)


def serve(root: pathlib.Path, payload: Payload, *flags: str) -> Server:
    """A server of a repository or an artifact, on all cores but the last."""
    port = free_port()
    command = [sys.executable, "-m", "lepton_xla", "serve", str(root), "--port", str(port), *flags]
    with on_cores(slice(None, -1)):
        server = Server("leptonx serve", command, port, f"/v2/models/{payload.model}/infer", payload.oip())
    try:
        server.wait()
    except BaseException:
        server.stop()
        raise
    return server


def link(artifact: pathlib.Path, root: pathlib.Path, name: str) -> None:
    """Puts an artifact into a repository as version 1 of a model."""
    shutil.copytree(artifact, root / name / "1.lepton", copy_function=os.link)


def linear(folder: pathlib.Path, name: str, width: int, columns: int, seed: int) -> pathlib.Path:
    """A model of one product, width -> columns -> 10."""
    draw = np.random.default_rng(seed)
    weights = {"a": draw.normal(size=(width, columns)), "b": draw.normal(size=(columns, 10))}
    program = lx.trace(
        lambda w, x: (x @ w["a"]) @ w["b"],
        {key: each.astype(np.float32) for key, each in weights.items()},
        {"x": lx.TensorSpec(("batch", width), "float32")},
    )
    path = folder / f"{name}.lepton"
    lx.compile(program, {"batch": (1,)}, name=name).save(path)
    return path


def figure(server: Server, name: str, model: str | None = None) -> float:
    """The sum of a metric, over models or of one."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(rf'^{name}{{[^}}]*model="([^"]*)"[^}}]*}} (\S+)$', text, re.MULTILINE)
    return sum(float(value) for label, value in found if model is None or label == model)


def asked(server: Server, sequence: Sequence[str], x: np.ndarray) -> list[tuple[str, float]]:
    """Sends requests in order, by several clients; gives the model and the seconds of each."""
    from lepton_xla.serve import Client

    waiting, times, broken = collections.deque(sequence), list[tuple[str, float]](), list[BaseException]()

    def work() -> None:
        try:
            with Client(f"http://127.0.0.1:{server.port}", timeout_s=60) as client:
                while waiting:
                    try:
                        name = waiting.popleft()
                    except IndexError:
                        return
                    began = time.perf_counter()
                    client.infer(name, x=x)
                    times.append((name, time.perf_counter() - began))
        except BaseException as error:
            broken.append(error)

    threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if broken:
        raise broken[0]
    return times


def budgeted(folder: pathlib.Path, models: int, columns: int, budget: int, requests: int) -> dict[str, Any]:
    """Models that do not fit into a budget together."""
    root = folder / "MODELS"
    made = [linear(folder, f"a{index}", WIDTH, columns, index) for index in range(min(DIFFERENT, models))]
    names = [f"m{index:03}" for index in range(models)]
    for index, name in enumerate(names):
        link(made[index % len(made)], root, name)
    link(linear(folder, TINY, WIDTH, 1, 99), root, TINY)
    draw = np.random.default_rng(0)
    shares = 1.0 / np.arange(1, models + 1) ** ZIPF
    sequence = [names[index] for index in draw.choice(models, requests, p=shares / shares.sum())]
    x = draw.normal(size=(1, WIDTH)).astype(np.float32)
    payload = Payload(TINY, {"x": x}, {"output": np.zeros((1, 10), np.float32)})
    server = serve(root, payload, "--memory", str(budget), "--load-wait-s", "60")
    try:
        alone = [seconds for _, seconds in asked(server, [names[0]] * (requests // 10), x)]
        size = figure(server, "lepton_model_bytes", names[0])
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{server.port}/v2/repository/models/{names[0]}/unload", b""),
            timeout=10,
        ):
            time.sleep(1.0)
        # Not its share of shared pages (PSS): asking for that walks all pages, and mapping memory waits meanwhile.
        empty, most, done = server.resident(), 0, threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.wait(0.1):
                most = max(most, server.resident())

        watching = threading.Thread(target=watch)
        watching.start()
        before, began = figure(server, "lepton_model_loads_total"), time.perf_counter()
        times = asked(server, sequence, x)
        seconds = time.perf_counter() - began
        done.set()
        watching.join()
        loads = figure(server, "lepton_model_loads_total") - before
    finally:
        server.stop()
    hot = {name for name, _ in collections.Counter(sequence).most_common(HOT)}
    return {
        "models": models, "model_bytes": size, "budget": budget, "requests": len(times), "rate": len(times) / seconds,
        "empty_bytes": empty, "most_bytes": most - empty, "loads": loads,
        "best_loads": best_loads(sequence, int(budget // size)),
        "recent_loads": recent_loads(sequence, int(budget // size)),
        "known_loads": known_loads(sequence, int(budget // size), dict(zip(names, shares, strict=True))),
        "alone_p99_ms": 1e3 * float(np.percentile(alone, 99)),
        "hot_p99_ms": 1e3 * float(np.percentile([each for name, each in times if name in hot], 99)),
    }  # fmt: skip


type Request = Sequence[bytes]
"""Its bytes, in pieces. What many requests share is one piece, so that several models cost their client no more."""


class Asking(asyncio.Protocol):
    """A connection that sends the next request when it has the answer; all answers are of one length.

    Attributes:
        first: place of its first request among all.
        count: how many were answered.
    """

    def __init__(self, requests: Sequence[Request], at: int, ended: Callable[[str], object]) -> None:
        self._requests, self._at, self._ended = requests, at, ended
        self._length = self._had = 0
        self.first = at + 1
        self.count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The first request."""
        self._transport: Any = transport
        self._send()

    def close(self) -> None:
        """Ends the connection."""
        self._transport.abort()

    def _send(self) -> None:
        self._at = (self._at + 1) % len(self._requests)
        self._had = 0
        self._transport.writelines(self._requests[self._at])

    def data_received(self, data: bytes) -> None:
        """Part of an answer, or all of it."""
        if not self._had and not data.startswith(b"HTTP/1.1 200"):
            self._ended(data[:100].decode(errors="replace"))
            return
        self._had += len(data)
        if not self._length:
            head, _, _ = data.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: (\d+)", head)
            assert length is not None
            self._length = len(head) + 4 + int(length[1])
        if self._had >= self._length:
            self.count += 1
            self._send()


async def rate(
    port: int,
    requests: Sequence[Request],
    connections: int,
    seconds: float,
    beside: Callable[[Sequence[Asking]], Coroutine[Any, Any, None]] | None = None,
) -> float:
    """Requests per second of a closed loop, its first quarter left out; `beside` goes on beside it, and never ends."""
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[str] = loop.create_future()
    ended = functools.partial(_note, failed)
    asking: list[Asking] = []
    for index in range(connections):
        at = index * len(requests) // connections
        _, protocol = await loop.create_connection(
            lambda at=at: Asking(requests, at, ended), "127.0.0.1", port
        )  # fmt: skip
        asking.append(protocol)
    other = loop.create_task(beside(asking) if beside is not None else asyncio.sleep(2 * seconds))
    await asyncio.wait([failed, other], timeout=seconds / 4, return_when=asyncio.FIRST_COMPLETED)
    before, began = sum(each.count for each in asking), time.perf_counter()
    await asyncio.wait([failed, other], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    if failed.done():
        raise RuntimeError(failed.result())
    if not other.cancel():
        other.result()
    found = (sum(each.count for each in asking) - before) / (time.perf_counter() - began)
    for each in asking:
        each.close()
    return found


def _note(failed: asyncio.Future[str], said: str) -> None:
    if not failed.done():
        failed.set_result(said)


def requests_of(names: Sequence[str], payload: Payload) -> list[Request]:
    """A request to each model."""
    body, fields = payload.oip()
    json_bytes = int(fields["Inference-Header-Content-Length"])
    fields = {"Host": "127.0.0.1", "Content-Length": str(len(body)), **fields}
    lines = "".join(f"{key}: {value}\r\n" for key, value in fields.items())
    rows = body[json_bytes:]
    return [
        (f"POST /v2/models/{name}/infer HTTP/1.1\r\n{lines}\r\n".encode() + body[:json_bytes], rows) for name in names
    ]


def shared(folder: pathlib.Path, counts: Sequence[int], connections: Sequence[int], seconds: float) -> dict[str, Any]:
    """Requests per second of one model and of several, and rows of a batch, by connections: medians of three rounds."""
    path, payload = payloads.first10(folder, quick=False)
    names = [f"m{index:02}" for index in range(max(counts))]
    for name in names:
        link(path, folder / "MODELS", name)
    requests = requests_of(names, payload)
    sizes_compiled = lx.load(path).buckets["batch"]
    whole = requests_of(names, Payload(payload.model, _repeated(payload.rows, sizes_compiled[-1]), payload.outputs))
    server = serve(folder / "MODELS", Payload(names[0], payload.rows, payload.outputs))
    mixes = {str(count): requests[:count] for count in counts}
    drawn = np.random.default_rng(0).integers(max(counts), size=DRAWN)
    mixes[f"{max(counts)}, at random"] = [requests[index] for index in drawn]
    found: dict[str, dict[str, float]] = {}
    batches: dict[str, dict[str, float]] = {}
    alike: dict[str, dict[str, list[list[float]]]] = {}
    whole_rates: dict[int, list[float]] = {count: [] for count in counts}

    def measured(these: Sequence[Request], at_once: int) -> tuple[float, float]:
        before = _batches(server)
        per_s = uvloop.run(rate(server.port, these, at_once, seconds))
        rows, executions = (after - then for after, then in zip(_batches(server), before, strict=True))
        return per_s, rows / executions

    try:
        with on_cores(slice(-1, None)):
            for at_once in connections:
                rounds: dict[str, list[tuple[float, float]]] = {models: [] for models in mixes}
                for _ in range(3):
                    for models, these in mixes.items():
                        rounds[models].append(measured(these, at_once))
                medians = {models: np.median(each, axis=0).tolist() for models, each in rounds.items()}
                found[str(at_once)] = {models: per_s for models, (per_s, _) in medians.items()}
                batches[str(at_once)] = {models: rows for models, (_, rows) in medians.items()}
                alike[str(at_once)] = {}
                for models in [*mixes][1:]:
                    at = bisect.bisect_left(sizes_compiled, batches[str(at_once)][models])
                    around = sorted(
                        {sizes_compiled[min(max(each, 0), len(sizes_compiled) - 1)] for each in (at - 1, at)}
                    )
                    alike[str(at_once)][models] = []
                    for most in around:
                        limit(server, names[0], most)
                        of_three = [measured(requests[:1], at_once) for _ in range(3)]
                        alike[str(at_once)][models].append([most, *np.median(of_three, axis=0).tolist()])
                limit(server, names[0], sizes_compiled[-1])
            for _ in range(3):
                for count in counts:
                    whole_rates[count].append(measured(whole[:count], WHOLE_CONNECTIONS)[0])
    finally:
        server.stop()
    of_whole = {str(count): float(np.median(each)) for count, each in whole_rates.items()}
    return {
        "rates": found, "batches": batches, "alike": alike,
        "whole": {"rows": sizes_compiled[-1], "connections": WHOLE_CONNECTIONS, "rates": of_whole},
    }  # fmt: skip


def in_batches_of(rows: float, measured: Sequence[Sequence[float]]) -> float:
    """Requests per second in batches of so many rows: what a request costs is linear in batches per row.

    Beyond those that were measured nothing is guessed.

    Args:
        rows: of a batch.
        measured: the limit, requests per second and rows of a batch, of one or two.

    >>> round(in_batches_of(20, [(16, 10_000, 16), (32, 12_500, 32)]))
    10870
    """
    (_, rate, at), (_, other, beyond) = measured[0], measured[-1]
    if at == beyond:
        return rate
    part = min(max((1 / rows - 1 / at) / (1 / beyond - 1 / at), 0.0), 1.0)
    return 1 / (1 / rate + part * (1 / other - 1 / rate))


def bare(
    folder: pathlib.Path, sizes: Sequence[int], counts: Sequence[int], seconds: float
) -> dict[str, dict[str, float]]:
    """By rows, and by number of models: executions per second without a server, see `turns.py`."""
    path, payload = payloads.first10(folder, quick=False)
    found: dict[str, dict[str, float]] = {}
    for size in sizes:
        rows = folder / f"{size}.npy"
        np.save(rows, np.repeat(payload.rows["x"], size, axis=0))
        script = pathlib.Path(__file__).with_name("turns.py")
        command = [sys.executable, str(script), str(path), str(rows), ",".join(map(str, counts)), str(seconds)]
        with on_cores(slice(None, -1)):
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[str(size)] = json.loads(said.splitlines()[-1])
    return found


def _repeated(rows: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {name: np.repeat(each, count, axis=0) for name, each in rows.items()}


def limit(server: Server, name: str, rows: int) -> None:
    """Has a model take no more rows into a batch."""
    parameters = {"parameters": {"config": json.dumps({"max_batch_size": rows})}}
    url = f"http://127.0.0.1:{server.port}/v2/repository/models/{name}/load"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(parameters).encode()), timeout=60):
        pass


def _batches(server: Server) -> tuple[float, float]:
    """Rows so far, and executions."""
    return figure(server, "lepton_rows_total"), figure(server, "lepton_batch_rows_count")


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All figures so far, again and again."""
    kept = journal.opened("operations-many", options, "seconds")
    quick = options.quick
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for each in ("budget", "shared", "bare"):
            (folder / each).mkdir()
        sizes = (8, 500, 9 << 20, 200) if quick else (200, 5000, 1 << 30, 20_000)
        found["budget"] = kept.row("budget", lambda: budgeted(folder / "budget", *sizes))
        yield found
        counts, connections = ((1, 3), (8,)) if quick else ((1, 10, 50), (64, 512))
        found["shared"] = kept.row(
            "shared", lambda: shared(folder / "shared", counts, connections, options.seconds)
        )  # fmt: skip
        yield found
        found["bare"] = kept.row("bare", lambda: bare(folder / "bare", BARE_ROWS, counts, options.seconds / 4))
        yield found


def tables(found: Any) -> list[str]:
    """Markdown of the figures."""
    made: list[str] = []
    if "budget" in found:
        row = found["budget"]
        header = (
            "models", "of, MB", "budget, MiB", "requests", "resident, of the budget", "loads per request",
            "of plain LRU", "of the best without the future", "of the best offline policy", "p99 of the hot, ms",
            "of one model alone, ms",
        )  # fmt: skip
        line = (
            row["models"], f"{row['model_bytes'] / 1e6:.1f}", row["budget"] >> 20,
            f"{row['requests']:,} at {row['rate']:,.0f}/s",
            f"{row['most_bytes'] / row['budget']:.2f} (at most {1 + TARGET_MEMORY:g})",
            f"{row['loads'] / row['requests']:.3f}",
            f"{row['recent_loads'] / row['requests']:.3f}",
            f"{row['known_loads'] / row['requests']:.3f}" if "known_loads" in row else "",
            f"{row['best_loads'] / row['requests']:.3f}",
            f"{row['hot_p99_ms']:.2f} (at most {TARGET_HOT:g} times)",
            f"{row['alone_p99_ms']:.2f}",
        )  # fmt: skip
        made.append(harness.markdown(header, [line]))
    if "shared" in found:
        lines: list[tuple[object, ...]] = []
        for connections, rates in found["shared"]["rates"].items():
            for count, per_s in rates.items():
                rows = found["shared"]["batches"][connections][count]
                alike = found["shared"].get("alike", {}).get(connections, {}).get(count, [])
                equal = f"{per_s / in_batches_of(rows, alike):.2f}" if alike else ""
                lines.append((connections, count, f"{per_s:,.0f}", f"{per_s / rates['1']:.2f}", f"{rows:.1f}", equal))
                for most, limited, its_rows in alike:
                    said = f"1, at most {most} rows"
                    part = f"{limited / rates['1']:.2f}"
                    lines.append((connections, said, f"{limited:,.0f}", part, f"{its_rows:.1f}", ""))
        header = (
            "connections", "models", "requests/s", f"of one model's (at least {TARGET_THROUGHPUT:g})",
            "rows of a batch", "of one model's in such batches",
        )  # fmt: skip
        made.append(harness.markdown(header, lines))
        whole = found["shared"].get("whole")
        if whole is not None:
            header = ("connections", "models", "requests/s", f"of one model's (at least {TARGET_THROUGHPUT:g})")
            made.append(f"Requests of {whole['rows']} rows, as many as a batch takes:")
            made.append(harness.markdown(header, [
                (whole["connections"], count, f"{per_s:,.0f}", f"{per_s / whole['rates']['1']:.2f}")
                for count, per_s in whole["rates"].items()
            ]))  # fmt: skip
    if "bare" in found:
        header = ("rows", "models", "executions/s", "of one model's")
        made.append("Executions alone, in turn, without a server:")
        made.append(harness.markdown(header, [
            (rows, count, f"{per_s:,.0f}", f"{per_s / rates['1']:.2f}")
            for rows, rates in found["bare"].items() for count, per_s in rates.items()
        ]))  # fmt: skip
    return made
