"""What watching a model costs, and what it finds. A section of `operations.py`."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

import harness
import jax
import journal
import models
import numpy as np
import uvloop
from crowding import Asking, Request, figure, rate, serve
from loops import on_cores
from payloads import Payload
from server_process import Server

import lepton_xla as lx
from lepton_xla.profiles import profile_of
from lepton_xla.serve.monitor.monitor import SHARE, Monitor
from lepton_xla.serve.monitor.monitoring import Monitoring, Watched
from lepton_xla.serve.monitor.rules import Rules
from lepton_xla.serve.protocol.signature import signature_of

CONNECTIONS = 64
PER_BODY = 1000
TARGET_DRIFT, TARGET_FEEDBACK = 0.03, 0.05
RULE = "drift > 0.2"
SHOWN = {"bodies": "nothing, bodies of feedback refused"}
WITHIN, CLEAN = 500, 100_000
KINDS = ("nothing", "sketches", "nothing, ids", "bodies", "feedback")
COUNTED = (784, 3 * 32 * 32, 3 * 224 * 224)
WIDTHS: Mapping[str, Sequence[int]] = {"MLP": (784, 1024, 1024, 10), "product": (784, 10)}
ANSWERED = "lepton_inference_requests_total"
# Requests between two looks at the counters: of a server that gets a hundred a second.
LOOK = 100

INTRODUCTION = (
    "## Monitoring\n\n"
    "Detection: the digits CNN with the profile of its training images. Test images are drawn at random, one a "
    f"request, and the counters are looked at every {LOOK} requests, with the server's own code and without HTTP. The "
    f"rule is `{RULE}`, over the last 500 rows. After 1,000 clean requests the data change: inverted, turned by 90 "
    "degrees, darker by one thousandth each request. Accuracy is that of the 500 rows after the change, beside that "
    "of the clean ones before."
)
_COSTS = (
    "Cost: the MLP of the swaps above, and a product of 784 numbers and a matrix with 10 columns, the least that a "
    "model can be; requests of one row, 64 connections with a request each at a time. Servers of the same artifact "
    "take turns: one does not monitor, one counts the rows into the sketches of a profile, one keeps the answers of "
    "requests that have ids and gets the right answer of every one, in bodies of 1,000 on a connection more. The floor "
    "of that: the server that does not monitor gets the same bodies, reads them, and says that it keeps no answers. "
    "Rates, and the server's processor time of a request, are compared within each round; the table has the medians of "
    "the ratios. The server has one core fewer than the machine."
)
_ROWS = (
    f"Counting has {SHARE:.0%} of the time, and rows beyond are left out. An alert about the last 500 rows comes with "
    "the first look, once a second, after so many were counted: on a server that gets more rows than it can count, "
    "after the last column."
)


type Beside = Callable[[Sequence[Asking]], Coroutine[Any, Any, None]]
"""What goes on beside a closed loop."""


def requests_of(payload: Payload, ids: Sequence[str | None]) -> list[Request]:
    """A whole HTTP request for each id."""
    body, fields = payload.oip()
    length = int(fields["Inference-Header-Content-Length"])
    head, rest = json.loads(body[:length]), body[length:]
    made: list[Request] = []
    for each in ids:
        text = json.dumps(head if each is None else {"id": each, **head}).encode()
        lines = fields | {"Inference-Header-Content-Length": str(len(text)), "Content-Length": str(len(text + rest))}
        first = f"POST /v2/models/{payload.model}/infer HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        first += "".join(f"{key}: {value}\r\n" for key, value in lines.items()) + "\r\n"
        made.append((first.encode() + text, rest))
    return made


def giver(server: Server, payload: Payload, ids: Sequence[str], label: int, status: int) -> Beside:
    """Gives the right answer of each request that was answered, in bodies of so many, and expects a status."""
    entries = [f'{{"id": "{each}", "label": {label}}}' for each in ids]

    async def give(asking: Sequence[Asking]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        given, new = [0] * len(asking), list[str]()
        while True:
            await asyncio.sleep(0.005)
            for index, each in enumerate(asking):
                new += [entries[(each.first + at) % len(entries)] for at in range(given[index], each.count)]
                given[index] = each.count
            while len(new) >= PER_BODY:
                body = '{"feedback": [' + ", ".join(new[:PER_BODY]) + "]}"
                first = f"POST /v2/models/{payload.model}/feedback HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                writer.write(f"{first}Content-Length: {len(body)}\r\n\r\n{body}".encode())
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                said = await reader.readexactly(int(head.partition("content-length: ")[2].partition("\r")[0]))
                if head.split()[1] != str(status):
                    raise RuntimeError(said.decode())
                del new[:PER_BODY]

    return give


def program_of(widths: Sequence[int]) -> lx.Program:
    """Products of these widths, with ReLU between them."""
    draw = np.random.default_rng(0)
    weights = [
        draw.normal(size=shape, scale=shape[0] ** -0.5).astype(np.float32) for shape in itertools.pairwise(widths)
    ]

    def fn(weights: Sequence[Any], x: Any) -> dict[str, Any]:
        for each in weights[:-1]:
            x = jax.nn.relu(x @ each)
        return {"y": x @ weights[-1]}

    return lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", widths[0]), "float32")})


def costs(folder: pathlib.Path, widths: Sequence[int], rounds: int, seconds: float, ids_each: int) -> dict[str, Any]:
    """Requests per second with and without monitoring, in turn."""
    draw = np.random.default_rng(0)
    artifact = lx.compile(program_of(widths), {"batch": (1, 2, 4, 8, 16, 32, 64)}, name="product")
    path, profiled = folder / "plain.lepton", folder / "profiled.lepton"
    artifact.save(path)
    artifact.with_profile([{"x": draw.random((2000, widths[0]), np.float32)}]).save(profiled)
    row = draw.random((1, widths[0]), np.float32)
    payload = Payload("product", {"x": row}, lx.load(path)(x=row))
    label = int(np.argmax(payload.outputs["y"]))
    ids = [f"{number:08}" for number in range(CONNECTIONS * ids_each)]
    plain, named = requests_of(payload, [None]), requests_of(payload, ids)
    servers: dict[str, Server] = {}
    found: dict[str, Any] = {name: {"rate": [], "cpu_us": []} for name in KINDS}
    try:
        for name in ("nothing", "nothing, ids", "bodies"):
            servers[name] = servers.get("nothing") or serve(path, payload, "--no-monitor")
        servers["sketches"], servers["feedback"] = serve(profiled, payload), serve(path, payload)
        with on_cores(slice(-1, None)):
            for number in range(rounds):
                for name in KINDS[:: 1 if number % 2 else -1]:
                    server, ask = servers[name], plain if name in ("nothing", "sketches") else named
                    beside = None
                    if name in ("bodies", "feedback"):
                        beside = giver(server, payload, ids, label, 200 if name == "feedback" else 501)
                    answered, used = figure(server, ANSWERED), server.cpu_s()
                    found[name]["rate"].append(uvloop.run(rate(server.port, ask, CONNECTIONS, seconds, beside)))
                    used = server.cpu_s() - used
                    found[name]["cpu_us"].append(1e6 * used / (figure(server, ANSWERED) - answered))
    finally:
        for server in set(servers.values()):
            server.stop()
    return found


def countings(rows: int) -> list[dict[str, float]]:
    """What it takes to count a row of so many numbers, in batches of 64."""
    draw, found = np.random.default_rng(0), list[dict[str, float]]()
    for width in COUNTED:
        x, y = draw.random((64, width), np.float32), draw.random((64, 10), np.float32)
        signature = signature_of(lx.compile(program_of((width, 10)), {"batch": (64,)}, name="rows").servable())
        monitor = Monitor(signature, profile_of({"x": x}, {"y": y}), clock=lambda: 0.0)
        monitor.saw([x], [y], 64)
        began = time.perf_counter()
        for _ in range(rows // 64):
            monitor.saw([x], [y], 64)
        found.append({"width": width, "row_s": (time.perf_counter() - began) / (rows // 64 * 64)})
    return found


def detections(quick: bool) -> dict[str, Any]:
    """Requests until the alert, by what happens to the data."""
    digits = models.load("digits", quick=quick)
    import digits as example

    known, _, images, labels = example.data()
    servable = lx.compile(digits.spec.program(), {"batch": (32,)}, name="digits").with_profile([{"image": known}])
    profile, signature = servable.manifest.profile, signature_of(servable.servable())
    predict = servable.servable()
    outputs = signature.outputs[0].name

    def answers(rows: np.ndarray) -> np.ndarray:
        return np.concatenate([predict(image=rows[at : at + 32])[outputs] for at in range(0, len(rows), 32)])

    shifts: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "clean": lambda rows, at: rows,
        "inverted": lambda rows, at: rows.max() - rows,
        "turned by 90 degrees": lambda rows, at: np.rot90(rows, axes=(1, 2)).copy(),
        "slowly darker": lambda rows, at: (rows * np.maximum(0, 1 - at / 1000)[:, None, None, None]).astype(rows.dtype),
    }
    found: dict[str, Any] = {}
    for name, shift in shifts.items():
        draw, now, fired = np.random.default_rng(5), [0.0], None
        monitor = Monitor(signature, profile, clock=lambda now=now: now[0])
        rules = Rules.parse(f'[[rule]]\nname = "drift"\nwhen = "{RULE}"')
        monitoring = Monitoring(rules, sends=False, clock=lambda now=now: now[0])
        before = 0 if name == "clean" else 1000
        total = (10_000 if quick else CLEAN) if name == "clean" else before + 2 * WITHIN
        right: list[bool] = []
        largest = 0.0
        for start in range(0, total, LOOK):
            picked = draw.integers(0, len(images), LOOK)
            rows = images[picked]
            if start >= before:
                rows = shift(rows, np.arange(start - before, start - before + LOOK))
            made = answers(rows)
            right += (made.argmax(1) == labels[picked]).tolist()
            monitor.saw([rows], [made], LOOK)
            now[0] += 1.0
            monitoring.look([Watched("digits", "1", monitor.counts(), (), profile)])
            drifts = monitoring.drifts.get(("digits", "1"), {})
            largest = max(largest, max((each.psi for each in drifts.values()), default=0.0))
            if fired is None and any(alert.state == "firing" for alert in monitoring.alerts):
                fired = start + LOOK - before
        monitoring.close()
        found[name] = {
            "requests": total - before, "alert_after": fired, "largest_psi": largest,
            "accuracy": float(np.mean(right[before : before + WITHIN])),
            "clean_accuracy": float(np.mean(right[: before or None])),
        }  # fmt: skip
    return found


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All figures so far, again and again."""
    kept = journal.opened("operations-monitor", options, "seconds")
    found: dict[str, Any] = {"detections": kept.row("detections", lambda: detections(options.quick))}
    yield found
    found["countings"] = kept.row("countings", lambda: countings(512 if options.quick else 4096))
    yield found
    sizes = (2, 0.4, 4) if options.quick else (15, options.seconds / 4, 400)
    found["costs"] = {}
    for name, widths in (WIDTHS if not options.quick else {"product": (784, 10)}).items():
        with tempfile.TemporaryDirectory() as folder:
            found["costs"][name] = kept.row(
                f"costs of {name}",
                lambda widths=widths, folder=folder: costs(pathlib.Path(folder), widths, *sizes),
            )  # fmt: skip
        yield found


def ratios(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile of the rounds' ratios."""
    low, middle, high = statistics.quantiles((a / b for a, b in zip(one, other, strict=True)), n=4)
    return low, middle, high


def tables(found: Any) -> list[str]:
    """Markdown of the figures."""
    made: list[str] = []
    lines = [
        (name, f"{row['requests']:,}", "none" if row["alert_after"] is None else f"{row['alert_after']:,}",
         f"{row['largest_psi']:.2f}", harness.percent(row["accuracy"]), harness.percent(row["clean_accuracy"]))
        for name, row in found["detections"].items()
    ]  # fmt: skip
    header = (
        "data", "requests", f"alert after (at most {WITHIN}; clean: none)", "largest index", "accuracy, %",
        "of clean ones, %",
    )  # fmt: skip
    made.append(harness.markdown(header, lines))
    if "countings" in found:
        lines = [
            (f"{row['width']:,}", f"{1e6 * row['row_s']:.1f}", f"{SHARE / row['row_s']:,.0f}",
             f"{500 * row['row_s'] / SHARE:.1f}")
            for row in found["countings"]
        ]  # fmt: skip
        header = ("numbers of a row", "us to count one", "counted a second at most", "500 of them after, s")
        made += [_ROWS, harness.markdown(header, lines)]
    if "costs" in found:
        pairs = (
            ("sketches", "nothing", f" (at least {1 - TARGET_DRIFT:g})"),
            ("feedback", "nothing, ids", f" (at least {1 - TARGET_FEEDBACK:g})"),
            ("bodies", "nothing, ids", ""),
        )
        lines = []
        for model, each in found["costs"].items():
            for name, base, target in pairs:
                watched, other = each[name], each[base]
                low, middle, high = ratios(watched["rate"], other["rate"])
                lines.append((
                    model, SHOWN.get(name, name), f"{statistics.median(watched['rate']):,.0f}",
                    f"{statistics.median(other['rate']):,.0f}", f"{middle:.3f}{target}",
                    f"{low:.3f} to {high:.3f}", f"{ratios(watched['cpu_us'], other['cpu_us'])[1]:.3f}",
                ))  # fmt: skip
        header = ("model", "watched", "requests/s", "requests/s, not watched", "ratio", "quartiles",
                  "processor time, ratio")  # fmt: skip
        made += [_COSTS, harness.markdown(header, lines)]
    return made
