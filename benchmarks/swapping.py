"""Swaps of versions while requests come: what becomes of latency and of memory. A section of `operations.py`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
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

import harness
import jax
import journal
import numpy as np
from loops import load, on_cores, result_of
from payloads import Payload
from server_process import Server, free_port

import lepton_xla as lx
from lepton_xla.compiler import make_update
from lepton_xla.serve.load.result import Result

# Of the capacity.
SHARE = 0.6
CONNECTIONS = 64
PERIOD_S, WINDOW_S = 2.0, 1.0
WHOLE, WEIGHTS = 20, 50
RELOADS, EVERY = 1000, 50
DIFFERENT = 3
TARGET_WEIGHTS, TARGET_WHOLE, TARGET_COPY = 1.2, 2.0, 3.0
NAME, OTHER = "swapped", "beside"


INTRODUCTION = (
    "## Swaps\n\nAn MLP, 784-1024-1024-10 in float32, under requests of one row that become due at random moments, at "
    "60 % of the capacity that a closed loop found just before. Every two seconds a new version takes the "
    "old one's place. p99 is that of requests due in the second from when the swap began, and of those due in a second "
    "before it; both are medians over the swaps. Twenty requests a second are checked: the answer has to be that of "
    "the version that it names. The server has one core fewer than the machine, and loads and checks on that."
)


@dataclasses.dataclass(frozen=True)
class Made:
    """Artifacts that differ in their weights, the same as updates of the first, and the answer of each."""

    paths: list[pathlib.Path]
    updates: list[pathlib.Path]
    payload: Payload
    answers: list[np.ndarray]
    weights_bytes: int


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
            x = jax.nn.relu(x @ weights[key])
        return x @ weights[sorted(weights)[-1]]

    paths: list[pathlib.Path] = []
    updates: list[pathlib.Path] = []
    answers: list[np.ndarray] = []
    base: lx.Servable | None = None
    for number in range(1, DIFFERENT + 1):
        program = lx.trace(fn, weights | {"2": weights["2"] * number}, {"x": lx.TensorSpec(("batch", 784), "float32")})
        paths.append(folder / f"{name}{number}.lepton")
        lx.compile(program, {"batch": (1, 8, 32)}, name=name).save(paths[-1])
        model = lx.load(paths[-1])
        base = base or model
        updates.append(folder / f"{name}{number}-weights.lepton")
        make_update(base, program).save(updates[-1])
        answers.append(model(x=row)["output"])
    size = sum(weight.nbytes for weight in weights.values())
    return Made(paths, updates, Payload(name, {"x": row}, {"output": answers[0]}), answers, size)


class Shelf:
    """A repository whose next versions lie beside it, so that a version appears by a rename."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.root = folder / "MODELS"
        self._beside = folder / "beside"
        self._last: dict[str, int] = {}

    def lay(self, first: pathlib.Path, paths: Sequence[pathlib.Path], name: str, count: int) -> None:
        """Gets versions ready: the first, which is there at once, and so many of these artifacts in turn."""
        for number in range(1, count + 2):
            target = self._beside / name / f"{number}.lepton"
            source = first if number == 1 else paths[(number - 1) % len(paths)]
            shutil.copytree(source, target, copy_function=os.link)
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
    folder: pathlib.Path, made: Made, paths: Sequence[pathlib.Path], swaps: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Latency in the seconds of swaps and in those without."""
    shelf = Shelf(folder)
    shelf.lay(made.paths[0], paths, NAME, swaps)
    server = serve(shelf.root, made, "--load", NAME)
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
    shelf.lay(made.paths[0], made.paths, NAME, 0)
    shelf.lay(other.paths[0], other.paths, OTHER, 0)
    server = serve(shelf.root, other, "--load", NAME, "--load", OTHER)
    rows: list[dict[str, float]] = []
    try:
        server.wait()
        capacity = load(server, None, CONNECTIONS, options.seconds)["rate"]
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
                "memory_bytes": server.resident(),
                "p50_ms": 1e3 * found["p50"],
                "p99_ms": 1e3 * found["p99"],
                "lag_p99_ms": 1e3 * result.percentiles(result.lag_s)["p99"],
                "errors": float(result.errors),
            })  # fmt: skip
    finally:
        server.stop()
    return rows


def copied(folder: pathlib.Path, width: int, rounds: int) -> dict[str, Any]:
    """A swap of many bytes of weights, without other requests, beside reading as many bytes from the same file."""
    made = make(folder, width)
    shelf = Shelf(folder)
    shelf.lay(made.paths[0], made.updates, NAME, rounds)
    server = serve(shelf.root, made, "--load", NAME)
    swap_s: list[float] = []
    copy_s: list[float] = []
    digest_s: list[float] = []
    try:
        server.wait()
        for _ in range(rounds):
            version = shelf.next(NAME)
            files = [each for each in (shelf.root / NAME / f"{version}.lepton").rglob("*") if each.is_file()]
            began = time.perf_counter()
            held = [np.fromfile(each, np.uint8) for each in files]
            copy_s.append(time.perf_counter() - began)
            began = time.perf_counter()
            for each in held:
                hashlib.sha256(each).hexdigest()
            digest_s.append(time.perf_counter() - began)
            del held
            began = time.perf_counter()
            post(server, f"/v2/repository/models/{NAME}/load")
            swap_s.append(time.perf_counter() - began)
    finally:
        server.stop()
    return {
        "bytes": made.weights_bytes,
        "swap_ms": [1e3 * each for each in swap_s],
        "copy_ms": [1e3 * each for each in copy_s],
        "digest_ms": [1e3 * each for each in digest_s],
        "ratio": statistics.median(one / other for one, other in zip(swap_s, copy_s, strict=True)),
    }


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All figures so far, again and again."""
    kept = journal.opened("operations-swaps", options, "seconds")
    quick = options.quick
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        made = make(folder, 64 if quick else 1024)
        other = make(folder, 64, OTHER)
        kinds = {"weights": (made.updates, 2 if quick else WEIGHTS), "whole": (made.paths, 2 if quick else WHOLE)}
        for kind, (paths, count) in kinds.items():
            work = functools.partial(swapped, folder / kind, made, paths, count, options)
            found[kind] = kept.row(kind, work)
            yield found
        found["copy"] = kept.row("copy", lambda: copied(folder / "copy", 64 if quick else 4800, 3 if quick else 15))
        yield found
        found["reloads"] = kept.row(
            "reloads", lambda: reloaded(folder / "reloads", made, other, 8 if quick else RELOADS, options)
        )
        yield found


def tables(found: Any) -> list[str]:
    """Markdown of the figures."""
    made: list[str] = []
    header = (
        "swaps of", "swaps", "requests", "not answered with 200", "wrong", "p99 in the second of a swap, ms",
        "p99 in others, ms", "ratio", "a swap, ms",
    )  # fmt: skip
    for kind, title, target in (
        ("weights", "weights alone", TARGET_WEIGHTS), ("whole", "whole artifacts", TARGET_WHOLE),
    ):  # fmt: skip
        if kind in found:
            row = found[kind]
            line = (
                title, row["swaps"], f"{row['requests']:,} at {row['rate']:,.0f}/s",
                sum(row["not_200"].values()), f"{row['wrong']} of {row['checked']}",
                f"{statistics.median(row['busy_p99_ms']):.1f}", f"{statistics.median(row['calm_p99_ms']):.1f}",
                f"{row['ratio']:.2f} (at most {target:g})", f"{statistics.median(row['swap_ms']):.0f}",
            )  # fmt: skip
            made.append(harness.markdown(header, [line]))
    if "copy" in found:
        row = found["copy"]
        made.append(
            f"{row['bytes'] / 1e6:.0f} MB of weights are swapped in {statistics.median(row['swap_ms']):.0f} ms; "
            f"reading as many bytes from the file takes {statistics.median(row['copy_ms']):.0f} ms "
            f"(median of the ratios: {row['ratio']:.2f}, at most {TARGET_COPY:g})."
        )
        if "digest_ms" in row:
            made[-1] += (
                f" Their SHA-256, which a swap checks, takes a core {statistics.median(row['digest_ms']):.0f} ms, and "
                "the server has all cores but one."
            )
    if "reloads" in found:
        lines = [
            (
                f"{row['reloads']:,.0f}", f"{row['memory_bytes'] / 2**20:.0f}", f"{row['p50_ms']:.2f}",
                f"{row['p99_ms']:.2f}", f"{row['lag_p99_ms']:.2f}", f"{row['errors']:.0f}",
            )
            for row in found["reloads"]
        ]  # fmt: skip
        made.append("### Reloads of one model under traffic to another")
        made.append(
            "Of each p99 a part is the generator's, which was late with requests itself; and other processes that take "
            "the server's core show in it."
        )
        header = ("reloads", "resident, MiB", "p50, ms", "p99, ms", "generator late, p99, ms", "errors")
        made.append(harness.markdown(header, lines))
    return made
