"""Swaps of versions while requests come: what becomes of latency and of memory. A section of `operations.py`."""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import itertools
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import journal
import numpy as np
import psutil
from loops import load, on_cores, result_of
from payloads import Payload
from server_process import Server, free_port

import lepton_xla as lx
from lepton_xla.serve.load.result import Result

# Of the capacity.
SHARE = 0.6
CONNECTIONS = 64
PERIOD_S, WINDOW_S = 3.0, 1.0
WHOLE, WEIGHTS = 20, 50
RELOADS, EVERY = 1000, 50
DIFFERENT = 3
TARGET_WEIGHTS, TARGET_WHOLE = 1.2, 2.0
NAME, OTHER = "swapped", "beside"


@dataclasses.dataclass(frozen=True)
class Made:
    """Artifacts that differ in their weights, and the answer of each to the payload."""

    paths: list[pathlib.Path]
    payload: Payload
    answers: list[np.ndarray]


def make(folder: pathlib.Path, width: int, name: str = NAME) -> Made:
    """784 -> width -> width -> 10; version n answers n times what version 1 answers."""
    draw = np.random.default_rng(0)
    sizes = (784, width, width, 10)
    weights = {
        f"{index}": draw.normal(size=shape, scale=shape[0] ** -0.5).astype(np.float32)
        for index, shape in enumerate(itertools.pairwise(sizes))
    }
    row = draw.normal(size=(1, 784)).astype(np.float32)

    def fn(weights: dict[str, Any], x: Any) -> Any:
        for key in sorted(weights)[:-1]:
            x = lx_relu(x @ weights[key])
        return x @ weights[sorted(weights)[-1]]

    paths, answers = [], []
    for number in range(1, DIFFERENT + 1):
        program = lx.trace(fn, weights | {"2": weights["2"] * number}, {"x": lx.TensorSpec(("batch", 784), "float32")})
        paths.append(folder / f"{name}{number}.lepton")
        lx.compile(program, {"batch": (1, 8, 32)}, name=name).save(paths[-1])
        answers.append(lx.load(paths[-1])(x=row)["output"])
    return Made(paths, Payload(name, {"x": row}, {"output": answers[0]}), answers)


def lx_relu(x: Any) -> Any:
    """Its positive part."""
    import jax.numpy as jnp

    return jnp.maximum(x, 0)


class Shelf:
    """A repository whose next versions lie beside it, so that a version appears by a rename."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.root = folder / "MODELS"
        self._beside = folder / "beside"
        self._last: dict[str, int] = {}

    def lay(self, paths: Sequence[pathlib.Path], name: str, count: int) -> None:
        """Gets versions ready, of these artifacts in turn; the first is there at once."""
        for number in range(1, count + 1):
            target = self._beside / name / f"{number}.lepton"
            shutil.copytree(paths[(number - 1) % len(paths)], target, copy_function=os.link)
        self._last[name] = 0
        (self.root / name).mkdir(parents=True)
        self.next(name)

    def next(self, name: str) -> int:
        """Has the next version appear; returns its number."""
        number = self._last[name] = self._last[name] + 1
        (self._beside / name / f"{number}.lepton").rename(self.root / name / f"{number}.lepton")
        return number


def serve(root: pathlib.Path, made: Made, *flags: str) -> Server:
    """A server of a repository, on all cores but the last, which is the load generator's."""
    port = free_port()
    command = [sys.executable, "-m", "lepton_xla", "serve", str(root), "--port", str(port), "--explicit", *flags]
    with on_cores(slice(None, -1)):
        return Server("leptonx serve", command, port, f"/v2/models/{made.payload.model}/infer", made.payload.oip())


def post(server: Server, path: str, body: object = None) -> bytes:
    """The answer to a request, which has to be 200."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("POST", path, b"" if body is None else json.dumps(body).encode())
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {text.decode()}")
        return text
    finally:
        connection.close()


class Checker:
    """Asks twenty times a second and compares each answer with that of the version that it names."""

    def __init__(self, server: Server, made: Made) -> None:
        self.wrong = self.asked = 0
        self._server, self._made = server, made
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._check)

    def __enter__(self) -> Checker:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _check(self) -> None:
        inputs = [
            {"name": name, "shape": list(row.shape), "datatype": "FP32", "data": row.ravel().tolist()}
            for name, row in self._made.payload.rows.items()
        ]
        while not self._done.wait(0.05):
            answer = json.loads(post(self._server, self._server.path, {"inputs": inputs}))
            wanted = self._made.answers[(int(answer["model_version"]) - 1) % DIFFERENT]
            self.asked += 1
            self.wrong += not np.allclose(answer["outputs"][0]["data"], wanted.ravel(), rtol=1e-4, atol=1e-5)


@dataclasses.dataclass
class Turn:
    """A swap: when it was asked for and when it was done, on the monotonic clock."""

    began_s: float
    ended_s: float


def under_load(
    server: Server, rate: float, swaps: int, swap: Callable[[int], object], period_s: float
) -> tuple[Result, list[Turn], float]:
    """Swaps every so many seconds under an open loop; returns its figures, the swaps, and when measuring began."""
    turns: list[Turn] = []
    warmup_s = 1.0
    starts = time.monotonic()

    def all_of_them() -> None:
        for index in range(swaps):
            time.sleep(max(0.0, starts + warmup_s + (index + 0.5) * period_s - time.monotonic()))
            began = time.monotonic()
            swap(index)
            turns.append(Turn(began, time.monotonic()))

    thread = threading.Thread(target=all_of_them)
    thread.start()
    result = result_of(server, rate, CONNECTIONS, (swaps + 0.5) * period_s, warmup_s=warmup_s)
    thread.join()
    return result, turns, starts + warmup_s


def p99_ms(result: Result, began_s: float, start_s: float, seconds: float) -> float:
    """The 99th percentile in milliseconds of what was due in a window."""
    due = result.due_s + began_s
    chosen = result.latency_s[(due >= start_s) & (due < start_s + seconds)]
    return 1e3 * float(np.percentile(chosen, 99)) if len(chosen) else float("nan")


def swapped(
    folder: pathlib.Path, made: Made, swaps: int, options: argparse.Namespace, flags: Sequence[str] = ()
) -> dict[str, Any]:
    """Latency in the seconds of swaps and in those without."""
    shelf = Shelf(folder)
    shelf.lay(made.paths, NAME, swaps + 2)
    server = serve(shelf.root, made, "--load", NAME, *flags)
    try:
        server.wait()
        capacity = load(server, None, CONNECTIONS, options.seconds)["rate"]
        period_s = 1.5 if options.quick else PERIOD_S

        def swap(index: int) -> None:
            del index
            shelf.next(NAME)
            post(server, f"/v2/repository/models/{NAME}/load")

        with Checker(server, made) as checker:
            result, turns, began_s = under_load(server, SHARE * capacity, swaps, swap, period_s)
        busy = [p99_ms(result, began_s, turn.began_s, WINDOW_S) for turn in turns]
        calm = [p99_ms(result, began_s, turn.began_s - WINDOW_S - 0.2, WINDOW_S) for turn in turns]
    finally:
        server.stop()
    statuses, counts = np.unique(result.status, return_counts=True)
    return {
        "swaps": len(turns),
        "rate": SHARE * capacity,
        "requests": len(result.status),
        "not_200": {str(status): int(count) for status, count in zip(statuses, counts, strict=True) if status != 200},
        "checked": checker.asked,
        "wrong": checker.wrong,
        "busy_p99_ms": busy,
        "calm_p99_ms": calm,
        "ratio": statistics.median(busy) / statistics.median(calm),
        "swap_ms": [1e3 * (turn.ended_s - turn.began_s) for turn in turns],
        "lag_p99_ms": 1e3 * float(np.percentile(result.lag_s, 99)),
    }


def reloaded(
    folder: pathlib.Path, made: Made, other: Made, reloads: int, options: argparse.Namespace
) -> list[dict[str, float]]:
    """Reloads of one model under traffic to another: memory, and the other's latency, by so many reloads."""
    shelf = Shelf(folder)
    shelf.lay(made.paths, NAME, 1)
    shelf.lay(other.paths, OTHER, 1)
    server = serve(shelf.root, other, "--load", NAME, "--load", OTHER)
    rows: list[dict[str, float]] = []
    try:
        server.wait()
        capacity = load(server, None, CONNECTIONS, options.seconds)["rate"]
        process = psutil.Process(server._process.pid)
        every = min(EVERY, max(2, reloads // 4))
        for start in range(0, reloads, every):
            done = threading.Event()

            def reload_all(first: int = start, done: threading.Event = done) -> None:
                for index in range(first, first + every):
                    delay = {"dynamic_batching": {"max_queue_delay_microseconds": index % 2}}
                    parameters = {"config": json.dumps(delay)}
                    post(server, f"/v2/repository/models/{NAME}/load", {"parameters": parameters})
                done.set()

            thread = threading.Thread(target=reload_all)
            began = time.monotonic()
            thread.start()
            result = result_of(server, SHARE * capacity, CONNECTIONS, 2.0 if options.quick else 8.0, warmup_s=0.2)
            thread.join()
            found = result.percentiles()
            rows.append({
                "reloads": start + every,
                "seconds": time.monotonic() - began,
                "rss_bytes": process.memory_info().rss,
                "p50_ms": 1e3 * found["p50"],
                "p99_ms": 1e3 * found["p99"],
                "errors": float(result.errors),
            })  # fmt: skip
    finally:
        server.stop()
    return rows


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All figures so far, again and again."""
    kept = journal.opened("operations-swaps", options, "seconds")
    width = 64 if options.quick else 1024
    swaps = {"whole": 3 if options.quick else WHOLE}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        made = make(folder, width)
        other = make(folder, 64, OTHER)
        for kind, count in swaps.items():
            found[kind] = kept.row(kind, lambda kind=kind, count=count: swapped(folder / kind, made, count, options))
            yield found
        reloads = 12 if options.quick else RELOADS
        found["reloads"] = kept.row("reloads", lambda: reloaded(folder / "reloads", made, other, reloads, options))
        yield found


def tables(found: Any) -> list[str]:
    """Markdown of the figures."""
    return [json.dumps(found)]
