"""Our server beside mosec, Triton, LitServe and the bare executable: throughput, latency, processor time, memory.

    python benchmarks/serving.py [--models first10,digits,minilm] [--mosec PYTHON] [--litserve PYTHON] [--triton PYTHON]

Every server gets the same rows, one a request. Closed loop: so many connections, each with one unanswered request (wrk
where it is installed, else our generator), on all cores, which the load generator shares; the servers take turns.
Open loop: requests due at random moments (Poisson) at a share of what the server answers, latency counted from when a
request was due; here the generator has one core and the server the others, so that asking for more takes nothing from
the server. A model's figures are kept when it is measured, so that a run that was stopped goes on with the next one;
`--fresh` starts anew. Writes docs/benchmarks/serving.md. Each other server in an environment of its own, such as

    python3.12 -m venv build/peers/triton && build/peers/triton/bin/pip install nvidia-pytriton==0.7.0
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import harness
import journal
import models
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

import lepton_xla as lx
from lepton_xla.serve.batching.costs import Costs
from lepton_xla.serve.client.endpoint import endpoint
from lepton_xla.serve.load.generator import generate
from lepton_xla.serve.load.result import Load, Result
from lepton_xla.serve.runtime import run_on_calling_thread

RESULTS = harness.PAGES / "serving.json"
SERVERS = pathlib.Path(__file__).parent / "servers"
CONNECTIONS = (1, 8, 64, 256)
SHARES = (0.5, 0.8, 0.95)
CAPACITY_AT = 64
OPEN_CONNECTIONS = 512
OPEN_ROUNDS, OVER_ROUNDS = 3, 9
# Of a core, beyond which the generator's own lateness is most of the latency.
GENERATOR_CORE = 0.9
# Share of the capacity that good answers should keep, whatever is asked.
GOODPUT = 0.9
START_S = 180.0
OURS = "lepton_xla"
MOSEC = "mosec"
FLOOR = "HTTP alone"
_LUA = """
wrk.method = "POST"
local file = io.open("{body}", "rb"); wrk.body = file:read("*all"); file:close()
{fields}
done = function(summary, latency, requests)
  local e = summary.errors
  local failed = e.connect + e.read + e.write + e.timeout + e.status
  io.write(string.format("FIGURES %d %d %d %f %f %f\\n", summary.requests, summary.duration, failed,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
end
"""
console = Console(width=150, highlight=False)


@dataclasses.dataclass(frozen=True)
class Payload:
    """One request's row, as each kind of server takes it.

    Attributes:
        model: its name with us.
        rows: input name -> array of one row, or several.
        outputs: name and expected value of their output.
    """

    model: str
    rows: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]

    @property
    def count(self) -> int:
        """Rows a request."""
        return len(next(iter(self.rows.values())))

    def oip(self) -> tuple[bytes, dict[str, str]]:
        """Body and header fields by the Open Inference Protocol, binary both ways."""
        types = {"float32": "FP32", "int32": "INT32"}
        inputs = [
            {
                "name": name,
                "shape": list(row.shape),
                "datatype": types[row.dtype.name],
                "parameters": {"binary_data_size": row.nbytes},
            }
            for name, row in self.rows.items()
        ]
        outputs = [{"name": name, "parameters": {"binary_data": True}} for name in self.outputs]
        head = json.dumps({"inputs": inputs, "outputs": outputs}).encode()
        fields = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
        return head + self.raw()[0], fields

    def raw(self) -> tuple[bytes, dict[str, str]]:
        """The rows' bytes."""
        return b"".join(row.tobytes() for row in self.rows.values()), {"Content-Type": "application/octet-stream"}

    def json(self) -> tuple[bytes, dict[str, str]]:
        """The rows' numbers."""
        return json.dumps({k: v[0].tolist() for k, v in self.rows.items()}).encode(), {
            "Content-Type": "application/json"
        }


class Server:
    """A server in a process group of its own.

    Args:
        name: in the table.
        command: what starts it.
        port: where it listens.
        path: of the route.
        request: body and header fields of one request.
        env: further environment.
        idles: whether it takes no processor time while nothing is asked; else it is stopped (SIGSTOP) meanwhile.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        path: str,
        request: tuple[bytes, dict[str, str]],
        env: Mapping[str, str] | None = None,
        *,
        idles: bool = True,
    ) -> None:
        self.name, self.port, self.path, self.request, self.idles = name, port, path, request, idles
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by stop)
        self._process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def ask(self) -> bytes:
        """The body of the answer to one request.

        Raises:
            OSError: if there is none.
        """
        body, fields = self.request
        with urllib.request.urlopen(urllib.request.Request(self.url, body, fields), timeout=10) as answer:
            return answer.read()

    def wait(self) -> bytes:
        """The first answer.

        Raises:
            RuntimeError: if the server ends or does not answer in time.
        """
        deadline = time.monotonic() + START_S
        while True:
            try:
                return self.ask()
            except (OSError, urllib.error.URLError) as error:
                ended = self._process.poll() is not None
                if ended or time.monotonic() > deadline:
                    self._log.seek(0)
                    said = [line for line in self._log.read().decode(errors="replace").splitlines() if "Error" in line][
                        -1:
                    ]
                    raise RuntimeError(f"{'ended' if ended else error}: {' '.join(said)[:300]}") from error
            time.sleep(0.3)

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def signal(self, number: int) -> None:
        """Sends a signal to all its processes."""
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                process.send_signal(number)

    def cpu_s(self) -> float:
        """Processor seconds of all its processes so far."""
        used = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                used += times.user + times.system
        return used

    def memory(self) -> int:
        """Bytes in memory of all its processes, shared pages shared out among them."""
        total = 0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def stop(self) -> None:
        """Ends it and all it started."""
        self.signal(signal.SIGCONT)
        family = self._family()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
        self._log.close()


@contextlib.contextmanager
def turn(server: Server) -> Iterator[None]:
    """Lets a server that was stopped run for a while."""
    if server.idles:
        yield
        return
    server.signal(signal.SIGCONT)
    try:
        server.wait()  # some take it for the end of their connections, or of their other processes
        yield
    finally:
        server.signal(signal.SIGSTOP)


@contextlib.contextmanager
def on_cores(wanted: slice) -> Iterator[None]:
    """Keeps this thread, and what it starts, on some of the cores; on a machine of one core does nothing."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[wanted] or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def closed(server: Server, connections: int, seconds: float) -> dict[str, float]:
    """Figures of a closed loop: requests/s, percentiles in milliseconds, errors, processor time."""
    with turn(server):
        if shutil.which("wrk"):
            _wrk(server, connections, 0.5)
        used = server.cpu_s()
        figures = (
            _wrk(server, connections, seconds) if shutil.which("wrk") else _load(server, None, connections, seconds)
        )
        used = server.cpu_s() - used
    if not figures["requests"]:
        raise RuntimeError(f"{server.name or server.url} answered nothing")
    return figures | {"cpu_s_per_1000": 1000 * used / max(figures["requests"], 1)}


def alone(
    make: Callable[[], Server], bounded: Callable[[int], Server] | None, rows: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Figures of the open loops of one server that has all cores but the last, which is the generator's.

    Args:
        make: starts it.
        bounded: starts it with a queue of so many requests, if it is ours.
        rows: of a request.
        options: of the command line.

    Returns:
        `capacity`, requests/s of a closed loop; `unloaded_p50`, milliseconds of one connection; the open loops by
        share of the capacity, each right after a closed one; of ours also `minute`, a long one between two closed ones,
        `batch_ms`, an execution of the largest size, `queue_p99`, see `queue_p99_s`, and `core_p99`, see `core_p99_s`;
        `over`, what becomes of twice the capacity, or None where the generator cannot ask for so much.
    """
    with on_cores(slice(None, -1)):
        server = make()
    try:
        server.wait()
        open_rounds, over_rounds = (1, 1) if options.quick else (OPEN_ROUNDS, OVER_ROUNDS)
        open_s = options.open_seconds / open_rounds
        found: dict[str, Any] = {"unloaded_p50": _load(server, None, 1, options.seconds)["p50"]}
        full: list[dict[str, float]] = []
        for share in SHARES:
            rounds = []
            for _ in range(open_rounds):
                full.append(_load(server, None, CAPACITY_AT, open_s / 2))
                rounds.append(_load(server, share * full[-1]["rate"], OPEN_CONNECTIONS, open_s))
            found[f"{share:g}"] = _medians(rounds)
        usual = _medians(full)
        capacity = found["capacity"] = usual["rate"]
        found["generator"] = usual["cores"]
        most = capacity * GENERATOR_CORE / usual["cores"]
        found["over"] = None
        if bounded is not None:
            before = _load(server, None, CAPACITY_AT, open_s)["rate"]
            minute = _result(server, 0.8 * before, OPEN_CONNECTIONS, options.minute_seconds, warmup_s=1.0)
            second = minute.due_s.astype(int)
            by_second = [minute.percentiles(minute.latency_s[second == each])["p99"] for each in np.unique(second)]
            found["minute"] = _figures(minute) | {
                "second_p99": 1e3 * statistics.median(by_second),
                "capacity_before": before,
                "capacity_after": _load(server, None, CAPACITY_AT, open_s)["rate"],
            }
            costs = _costs(server)
            found["batch_ms"] = 1e3 * max(costs.values())
            found["queue_p99"] = 1e3 * queue_p99_s(costs, 0.8 * capacity * rows, rows)
            found["core_p99"] = 1e3 * core_p99_s(options.minute_seconds / 3)
            server.stop()
            # A queue of a quarter of a second, which the generator's connections can fill and a closed loop does not.
            queue = max(CAPACITY_AT, min(round(capacity / 4), OPEN_CONNECTIONS * 3 // 4))
            with on_cores(slice(None, -1)):
                server = bounded(queue)
            server.wait()
        if 2 * capacity <= most:
            found["over"] = overloaded(server, over_rounds, 3 * options.open_seconds / over_rounds)
    finally:
        server.stop()
    return found


def _costs(server: Server) -> dict[int, float]:
    """What our server says that an execution takes, by batch size."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    (found,) = (family for family in families if family.name == "lepton_cost_seconds")
    return {int(sample.labels["batch"]): sample.value for sample in found.samples}


def queue_p99_s(costs: Mapping[int, float], rate: float, rows: int, count: int = 100_000) -> float:
    """The 99th percentile of what requests of so many rows take that wait for nothing but executions.

    A simulation: Poisson arrivals of `rate` rows/s, executions that take what the table says, one after the other, each
    of the size with the least cost per waiting row. It is what a server gives whose HTTP costs nothing.
    """
    table = Costs(sorted(costs), {(): costs})
    due = np.cumsum(np.random.default_rng(0).exponential(rows / rate, count))
    taken = np.empty(count)
    now, at = 0.0, 0
    while at < count:
        now = max(now, due[at])
        waiting = int(np.searchsorted(due, now, side="right")) - at
        size = table.size((), waiting * rows)
        now += table.of((), size)
        done = min(waiting, max(size // rows, 1))
        taken[at : at + done] = now - due[at : at + done]
        at += done
    return float(np.percentile(taken, 99))


def core_p99_s(seconds: float, load: float = 0.8) -> float:
    """The 99th percentile of what work waits for on a core that is slower in some moments than in others.

    The core is the first of the server's. It runs pieces of a loop of Python, half a millisecond each, one after the
    other, while the generator's core does so too. Work that comes evenly, at `load` times what the core does in its
    median piece, then has to wait whenever pieces take longer than that: no server on this core waits less.
    """
    piece = (
        "import sys, time\n"
        "end, times = time.perf_counter() + float(sys.argv[1]), [time.perf_counter()]\n"
        "while times[-1] < end:\n"
        "    seen = {}\n"
        "    for number in range(3000):\n"
        "        seen[number & 255] = str(number)\n"
        "    times.append(time.perf_counter())\n"
        "print(*times)\n"
    )
    command = [sys.executable, "-c", piece, str(seconds)]
    with on_cores(slice(-1, None)):
        other = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with on_cores(slice(None, 1)):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    other.wait()
    taken = np.diff(np.array(done.stdout.split(), float))
    usual, waiting, waits = float(np.median(taken)), 0.0, []
    for each in taken:
        waiting = max(0.0, waiting + load * float(each) - usual)
        waits.append(waiting)
    return float(np.percentile(waits, 99))


def overloaded(server: Server, count: int, seconds: float) -> dict[str, float]:
    """What becomes of twice the capacity, and of half of it right after.

    So many rounds of `seconds`, each between two closed loops whose mean rate is the capacity of that round: a
    shared machine is not as fast in one second as in the next.

    Returns:
        Medians of the rounds, or sums where they count: `goodput`, good answers/s over the capacity; `asked`,
        requests/s over the capacity as the generator managed them; `p99` of good answers; `refused`; `refused_p99`,
        milliseconds until a request was told no; `refusal_us`, what goodput lacks to the capacity by refusal;
        `after_p99`, of those that were due in the first second after, and `later_p99`, of those due in the two seconds
        after that, of which `later_refused` were; `wrong`, answers but 200, 503, 429.
    """

    def refusals(result: Result) -> np.ndarray:
        return np.isin(result.status, (503, 429))

    def wrong(result: Result) -> float:
        return float((~refusals(result) & (result.status != 200)).sum())

    def p99(latencies: np.ndarray) -> float:
        return 1e3 * float(np.percentile(latencies, 99)) if len(latencies) else float("nan")

    def closed_loop() -> float:
        return _load(server, None, CAPACITY_AT, seconds / 2)["rate"]

    rounds: list[dict[str, float]] = []
    capacity = closed_loop()
    for _ in range(count):
        before = capacity
        hard = _result(server, 2 * before, OPEN_CONNECTIONS, seconds, warmup_s=1.0)
        after = closed_loop()
        capacity = (before + after) / 2
        refused = refusals(hard)
        goodput, asked = (count / hard.seconds / capacity for count in (hard.good, len(hard.status)))
        no_rate = refused.sum() / hard.seconds
        rounds.append({
            "goodput": goodput,
            "asked": asked,
            "p99": p99(hard.latency_s[hard.status == 200]),
            "refused": float(refused.sum()),
            "refused_p99": p99(hard.latency_s[refused]),
            "refusal_us": 1e6 * max(1 - goodput, 0.0) / no_rate if no_rate else float("nan"),
            "wrong": wrong(hard),
        })  # fmt: skip
        capacity = after
    soft = _result(server, capacity / 2, OPEN_CONNECTIONS, 3.0, warmup_s=0.0)
    first, good = soft.due_s < 1, soft.status == 200
    found = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
    return found | {
        "refused": sum(each["refused"] for each in rounds),
        "wrong": sum(each["wrong"] for each in rounds) + wrong(soft),
        "after_p99": p99(soft.latency_s[first & good]),
        "later_p99": p99(soft.latency_s[~first & good]),
        "later_refused": float((~first & refusals(soft)).sum()),
    }


def _wrk(server: Server, connections: int, seconds: float) -> dict[str, float]:
    body, fields = server.request
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "body").write_bytes(body)
        lines = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in fields.items())
        script = pathlib.Path(folder) / "post.lua"
        script.write_text(_LUA.format(body=f"{folder}/body", fields=lines))
        done = subprocess.run(
            ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s", "-s", script,
             server.url],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("FIGURES"))
    requests, micros, errors, *percentiles = map(float, line.split()[1:])
    p50, p99, p999 = (value / 1e3 for value in percentiles)
    return {
        "rate": requests / micros * 1e6, "requests": requests, "errors": errors, "p50": p50, "p99": p99, "p999": p999
    }  # fmt: skip


def _result(server: Server, rate: float | None, connections: int, seconds: float, *, warmup_s: float) -> Result:
    body, fields = server.request
    lines = [f"POST {server.path} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    load = Load(rate=rate, connections=connections, seconds=seconds, warmup_s=warmup_s, timeout_s=10.0)
    with on_cores(slice(-1, None)):
        return generate(endpoint(f"http://127.0.0.1:{server.port}"), request, load)


def _load(server: Server, rate: float | None, connections: int, seconds: float) -> dict[str, float]:
    return _figures(_result(server, rate, connections, seconds, warmup_s=1.0))


def _figures(result: Result) -> dict[str, float]:
    found = result.percentiles()
    return {
        "rate": result.good / result.seconds,
        "seconds": result.seconds,
        "requests": float(len(result.status)),
        "errors": float(result.errors),
        "p50": 1e3 * found["p50"],
        "p99": 1e3 * found["p99"],
        "p999": 1e3 * found["p99.9"],
        "cores": result.cores,
        "lag_p99": 1e3 * result.percentiles(result.lag_s)["p99"],
    }


class Bare:
    """The executables without a server: NumPy in, NumPy out, one call after the other.

    Args:
        artifact: whose executables.
        payload: the row that they get, as often as they take rows.
    """

    def __init__(self, artifact: pathlib.Path, payload: Payload) -> None:
        model = lx.load(artifact)
        sizes = {name: payload.rows[key].shape[axis] for key, spec in model.inputs.items()
                 for axis, name in enumerate(spec.shape) if isinstance(name, str)}  # fmt: skip
        self._calls: dict[int, Callable[[], object]] = {}
        for size in model.buckets["batch"]:
            arrays = [np.repeat(payload.rows[name][:1], size, axis=0) for name in model.inputs]
            self._calls[size] = functools.partial(model.runner({**sizes, "batch": size}), arrays)

    def by_size(self, seconds: float) -> dict[int, float]:
        """Rows/s by batch size."""
        return {size: self.rate(size, seconds) for size in self._calls}

    def rate(self, size: int, seconds: float) -> float:
        """Rows/s of one batch size."""
        call = self._calls[size]
        call()
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            call()
            count += 1
        return count * size / (time.perf_counter() - began)


# What is served.


def first10(folder: pathlib.Path, quick: bool) -> tuple[pathlib.Path, Payload]:
    """784 numbers to 10: a product with the first columns of the unit matrix, which is what the others copy."""
    del quick
    weights = {"kernel": np.eye(784, 10, dtype=np.float32)}
    inputs = {"x": lx.TensorSpec(("batch", 784), "float32")}
    program = lx.trace(lambda weights, x: {"y": x @ weights["kernel"]}, weights, inputs)
    path = folder / "first10.lepton"
    lx.compile(program, {"batch": (1, 2, 4, 8, 16, 32, 64)}, name="first10").save(path)
    row = np.random.default_rng(0).random((1, 784), np.float32)
    return path, Payload("first10", {"x": row}, {"y": row[:, :10]})


def benchmark_model(name: str, buckets: Mapping[str, tuple[int, ...]], rows: int = 1) -> Any:
    """A model of the other benchmarks with recipe `int8`, and so many rows a request."""

    def make(folder: pathlib.Path, quick: bool) -> tuple[pathlib.Path, Payload]:
        spec = models.load(name, quick=quick).spec
        small = lx.optimize(
            spec.program(), lx.Recipe.load("int8"), calibration=spec.calibration_batches(), buckets=buckets
        )
        path = folder / f"{name}.lepton"
        lx.compile(small, buckets, name=name).save(path)
        sizes = {"batch": rows} | {symbol: ladder[-1] for symbol, ladder in buckets.items() if symbol != "batch"}
        arrays = harness.example_inputs(spec.inputs, sizes)
        return path, Payload(name, arrays, lx.load(path)(**arrays))

    return make


MODELS = {
    "first10": first10,
    "digits": benchmark_model("digits", {"batch": (1, 8, 32, 128)}),
    "digits8": benchmark_model("digits", {"batch": (1, 8, 32, 128)}, rows=8),
    "minilm": benchmark_model("minilm", {"batch": (1, 4, 8), "seq": (128,)}),
}


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ours(label: str, path: pathlib.Path, payload: Payload, *flags: str) -> Server:
    """Our server."""
    port = _port()
    command = [sys.executable, "-m", "lepton_xla", "serve", str(path), "--port", str(port), *flags]
    return Server(label, command, port, f"/v2/models/{payload.model}/infer", payload.oip())


def mosec(label: str, python: str, payload: Payload, env: dict[str, str]) -> Server:
    """mosec, which as ours has as many processes that run the model as it is told."""
    port = _port()
    command = [python, str(SERVERS / "mosec_server.py"), "--port", str(port)]
    return Server(label, command, port, "/inference", payload.raw(), env)


def candidates(
    name: str, path: pathlib.Path, payload: Payload, options: argparse.Namespace
) -> dict[str, Callable[[], Server]]:
    """What starts each server that was asked for."""
    infer = f"/v2/models/{payload.model}/infer"
    made: dict[str, Callable[[], Server]] = {OURS: lambda: ours(OURS, path, payload)}
    for count in options.workers:
        label = f"{OURS} --workers {count}"
        made[label] = functools.partial(ours, label, path, payload, "--workers", str(count))
    if name != "minilm":  # beside which it is nothing
        floor_at = _port()
        floor = [sys.executable, str(SERVERS / "http_server.py"), "--port", str(floor_at)]
        made[FLOOR] = lambda: Server(FLOOR, floor, floor_at, infer, payload.oip())
    if options.mosec and payload.count == 1:
        env = {} if name == "first10" else {"LEPTON_ARTIFACT": str(path)}
        for count in (1, *options.workers):
            label = MOSEC if count == 1 else f"{MOSEC}, {count} workers"
            made[label] = functools.partial(mosec, label, options.mosec, payload, env | {"LEPTON_WORKERS": str(count)})
    if options.litserve and name == "first10":
        lit_at = _port()
        lit = [options.litserve, str(SERVERS / "litserve_server.py"), "--port", str(lit_at)]
        made["LitServe"] = lambda: Server("LitServe", lit, lit_at, "/predict", payload.json(), idles=False)
    if options.triton and name == "first10":
        binary, env_triton = triton_installed(options.triton)
        for count in (1, *options.workers):
            label = "Triton" if count == 1 else f"Triton, {count} instances"
            made[label] = functools.partial(triton, label, binary, env_triton, path.parent, payload, count)
    return made


def start(makers: Mapping[str, Callable[[], Server]], payload: Payload) -> tuple[list[Server], list[str]]:
    """Every server that can be had, each having given the right answer, and why others are missing."""
    running: list[Server] = []
    notes: list[str] = []
    for label, make in makers.items():
        console.print(f"  starting {label} ...")
        server = make()
        try:
            _check(server.wait(), payload, label)
        except (RuntimeError, ValueError) as error:
            server.stop()
            notes.append(f"{label} is missing: {error}")
            console.print(f"  {notes[-1]}")
            continue
        if not server.idles:
            server.signal(signal.SIGSTOP)
        running.append(server)
    return running, notes


def _check(body: bytes, payload: Payload, label: str) -> None:
    if label == FLOOR:
        return
    expected = next(iter(payload.outputs.values()))
    if label == "LitServe":
        got = np.asarray(json.loads(body)["y"], np.float32)
    else:
        got = np.frombuffer(body[-expected.nbytes :], expected.dtype)
    if not np.allclose(got.ravel(), expected.ravel(), rtol=1e-2, atol=1e-2):
        raise ValueError("the answer is wrong")


def triton(
    label: str, binary: pathlib.Path, env: dict[str, str], folder: pathlib.Path, payload: Payload, count: int
) -> Server:
    """The Triton Inference Server with so many processes that run the model."""
    repository = folder / f"triton-{count}"
    shutil.copytree(SERVERS / "triton", repository, dirs_exist_ok=True)
    config = repository / payload.model / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", f"count: {count}"))
    port = _port()
    command = [
        str(binary), f"--model-repository={repository}", f"--backend-directory={binary.parents[1] / 'backends'}",
        "--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false",
    ]  # fmt: skip
    return Server(label, command, port, f"/v2/models/{payload.model}/infer", payload.oip(), env)


def triton_installed(python: str) -> tuple[pathlib.Path, dict[str, str]]:
    """The program of the nvidia-pytriton wheel of that Python, and its environment."""
    ask = "import sysconfig, sys; print(sysconfig.get_path('purelib'), sysconfig.get_config_var('LIBDIR'), '%d.%d' % sys.version_info[:2])"  # noqa: E501
    site, libraries, version = subprocess.run(
        [python, "-c", ask], capture_output=True, text=True, check=True
    ).stdout.split()
    server = pathlib.Path(site) / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, server / "backends" / "python")
    return server / "bin" / "tritonserver", {"LD_LIBRARY_PATH": libraries, "PEER_SITE": site}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    with tempfile.TemporaryDirectory() as folder:
        path, payload = MODELS[name](pathlib.Path(folder), options.quick)
        bare = Bare(path, payload)
        bare_rows = bare.by_size(0.2 if options.quick else 2.0)
        best = max(bare_rows, key=lambda size: bare_rows[size])
        makers = candidates(name, path, payload, options)
        servers, notes = start(makers, payload)
        try:
            rows: dict[str, dict[str, Any]] = {server.name: {"closed": {}} for server in servers}
            for connections in options.connections:
                turns: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
                bare_rates = []
                for index in range(options.rounds):
                    bare_rates.append(bare.rate(best, options.seconds) / payload.count)
                    for server in servers[index % len(servers) :] + servers[: index % len(servers)]:
                        turns[server.name].append(closed(server, connections, options.seconds))
                for label, found in turns.items():
                    ratios = {"of_bare": _ratio(found, bare_rates)}
                    if mosec := [[each["rate"] for each in turns[name]] for name in turns if name.startswith(MOSEC)]:
                        ratios["x"] = _ratio(found, max(mosec, key=statistics.median))
                    rows[label]["closed"][str(connections)] = _medians(found) | ratios
                console.print(f"  {connections} connections: " + _line(rows, str(connections)))
            for server in servers:
                rows[server.name]["memory"] = server.memory()
        finally:
            for server in servers:
                server.stop()
        # Not of those in several processes, which would have but one core.
        for label in (label for label in rows if label in (OURS, MOSEC, "LitServe", "Triton")):
            console.print(f"  {label}: open loops ...")
            again = None
            if label == OURS:
                again = lambda bound: ours(OURS, path, payload, "--max-queue-rows", str(bound * payload.count))  # noqa: E731
            rows[label]["open"] = alone(makers[label], again, payload.count, options)
        steps = hot_path(pathlib.Path(folder), options.quick) if name == "first10" else {}
    return {"bare": bare_rows, "rows": payload.count, "servers": rows, "notes": notes, "steps": steps}


def hot_path(folder: pathlib.Path, quick: bool) -> dict[str, float]:
    """Microseconds of a request by what our server does with it; see `hot_path.py`."""
    script, file = pathlib.Path(__file__).parent / "hot_path.py", folder / "steps.json"
    rounds = "20" if quick else "1000"
    subprocess.run([sys.executable, str(script), "--rounds", rounds, "--json", str(file)], check=True)
    return json.loads(file.read_text())


def _medians(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
    return medians | {"errors": sum(each["errors"] for each in found)}


def _ratio(found: Sequence[Mapping[str, float]], others: Sequence[float]) -> float:
    """The median of rates over others of the same rounds."""
    return statistics.median(each["rate"] / other for each, other in zip(found, others, strict=True))


def _line(rows: Mapping[str, Any], key: str) -> str:
    return ", ".join(
        f"{label} {row['closed'][key]['rate']:,.0f}/s p99 {row['closed'][key]['p99']:.2f} ms"
        for label, row in rows.items()
    )


# The page.


TITLES = {
    "first10": "784 numbers in, 10 out",
    "digits": "The digits CNN, recipe int8: 64 numbers in, 10 out",
    "digits8": "The digits CNN, recipe int8, 8 rows a request",
    "minilm": "MiniLM, recipe int8: 128 tokens in, 384 numbers out",
}


def write_page(results: Mapping[str, Any]) -> None:
    """Writes docs/benchmarks/serving.md from all results so far."""
    parts = [
        "# Serving",
        (
            "Each request has one row unless stated otherwise. Times are in milliseconds; the load generator runs on "
            "the same machine.\n\n**Closed loop**: every connection always has one request in flight. All cores are "
            "used. Figures are medians over rounds in which the servers take turns. `x` is the request rate with "
            f"{CAPACITY_AT} connections, relative to the better of mosec's two rows in the same round. `CPU` is "
            "processor seconds per 1000 requests of the server at that number of connections, `memory` what its "
            "processes hold after the closed loops. `of bare` is the highest rows/s at any number of connections, "
            "relative to the executable called in a loop at its best batch size in the same rounds. Servers that can "
            "run the model in several processes have a row with one process and a row with one per core.\n\nIn the "
            "first table mosec, LitServe and Triton run the model in NumPy. In the others mosec runs our artifact "
            "from Python, as its users would, one row a request. `HTTP alone` parses requests with httptools on "
            "uvloop, as our server does, and always answers the same bytes: the upper limit for a server in Python."
        ),
        (
            "**Open loop**: requests are due at random moments (a Poisson process) at a share of the capacity, and "
            "latency counts from when a request was due; medians over rounds. The generator has the last core and the "
            "server all others, so that a higher rate takes nothing from the server. The capacity is what a closed "
            f"loop of {CAPACITY_AT} connections reached immediately before, because a shared machine is not always "
            "equally fast. If the generator uses more than 90 % of its core, its own delay dominates the latencies, "
            "and the capacity may be the generator's. A row is missing if the generator cannot reach twice the "
            f"capacity.\n\n**Twice the capacity**: medians of {OVER_ROUNDS} rounds, each between two closed loops "
            "whose mean rate is the capacity. Our server runs with its default queue, except here, where the queue "
            "holds a quarter of a second of requests, or as many as the closed loop has. The server reads and answers "
            "rejected requests too; goodput loses that time."
        ),
    ]
    for name, result in results.items():
        parts += [f"## {TITLES[name]}", *_tables(result), *result["notes"], harness.provenance(result["run"])]
    harness.PAGES.mkdir(parents=True, exist_ok=True)
    (harness.PAGES / "serving.md").write_text("\n\n".join(parts) + "\n")


def _tables(result: Mapping[str, Any]) -> list[str]:
    servers = result["servers"]
    keys = list(next(iter(servers.values()))["closed"]) if servers else []
    header = ["closed loop", *(f"{key} connections: req/s (p50, p99, p99.9)" for key in keys)]
    header += ["x", "of bare", "CPU", "memory MB", "errors"]
    at = str(CAPACITY_AT) if str(CAPACITY_AT) in keys else keys[-1]
    cells = []
    for label, row in servers.items():
        found = row["closed"]
        cells.append([
            label,
            *(_cell(found[k]) for k in keys),
            f"{found[at]['x']:.2f}" if "x" in found[at] else "",
            f"{100 * max(found[k]['of_bare'] for k in keys):.0f} %",
            f"{found[at]['cpu_s_per_1000']:.3f}",
            f"{row['memory'] / 1e6:,.0f}",
            f"{sum(found[k]['errors'] for k in keys):.0f}",
        ])  # fmt: skip
    bare_line = ", ".join(f"{rows:,.0f} at {size}" for size, rows in result["bare"].items())
    open_header = ["open loop", "capacity: req/s (generator's core)"]
    open_header += [f"{100 * share:g} %: req/s (p50, p99, p99.9; core)" for share in SHARES] + ["errors"]
    opened = {label: row for label, row in servers.items() if "open" in row}
    open_cells = [
        [
            label,
            f"{row['open']['capacity']:,.0f} ({100 * row['open']['generator']:.0f} %)",
            *(_open_cell(row["open"][f"{share:g}"]) for share in SHARES),
            f"{sum(row['open'][f'{share:g}']['errors'] for share in SHARES):.0f}",
        ]
        for label, row in opened.items()
    ]
    over_header = ["twice the capacity", "asked", "good answers", "p99 of them", "refused", "told so within (p99)"]
    over_header += ["goodput lost by refusal, µs"]
    over_header += ["p99 in the second after, at half the capacity", "in the two after that", "refused then"]
    over_header += ["wrong answers"]
    over_cells = [
        [
            label,
            f"{found['asked']:.2f}",
            f"{found['goodput']:.2f}",
            f"{found['p99']:.1f}",
            f"{found['refused']:,.0f}",
            f"{found['refused_p99']:.1f}",
            f"{found['refusal_us']:.0f}",
            f"{found['after_p99']:.1f}",
            f"{found['later_p99']:.1f}",
            f"{found['later_refused']:,.0f}",
            f"{found['wrong']:,.0f}",
        ]
        for label, row in opened.items()
        if (found := row["open"]["over"]) is not None
    ]
    parts = [
        harness.markdown(header, cells),
        f"Bare executable, rows/s by batch size: {bare_line}.",
        harness.markdown(open_header, open_cells),
    ]
    if over_cells:
        parts.append(harness.markdown(over_header, over_cells))
    else:
        parts.append("The generator could not reach twice the capacity.")
    if steps := result.get("steps"):
        taken = f"{1e3 * servers[OURS]['closed'][at]['cpu_s_per_1000']:.1f}"
        floor = f"{1e3 * servers[FLOOR]['closed'][at]['cpu_s_per_1000']:.1f}" if FLOOR in servers else "?"
        text = (
            f"Our server takes {taken} µs of processor time per request with {at} connections, {FLOOR} {floor} µs. The "
            "table lists its own steps, each measured alone without sockets (`python benchmarks/hot_path.py`). The "
            "rest is spent in the operating system, in uvloop, and waiting for memory."
        )
        lines = [[step, f"{micros:.1f}"] for step, micros in steps.items()]
        parts += [text, harness.markdown(["step, 64 requests at once", "µs a request"], lines)]
    if OURS in servers:
        own = servers[OURS]["open"]
        minute, unloaded, batch = own["minute"], own["unloaded_p50"], own["batch_ms"]
        parts.append(
            f"Our server for {minute['seconds']:.0f} s at 80 % of its capacity: {minute['requests']:,.0f} requests, "
            f"{minute['errors']:.0f} errors, p50 {minute['p50']:.2f} ms, p99 {minute['p99']:.2f} ms; the median over "
            f"the seconds of each second's p99 is {minute['second_p99']:.2f} ms. The capacity was "
            f"{minute['capacity_before']:,.0f}/s before and {minute['capacity_after']:,.0f}/s after the run. The "
            f"generator used {100 * minute['cores']:.0f} % of its core and sent 99 % of the requests at most "
            f"{minute['lag_p99']:.2f} ms late. Two references for the p99: three times the unloaded latency of "
            f"{unloaded:.2f} ms plus one execution of the largest size, {batch:.2f} ms, is {3 * unloaded + batch:.2f} "
            "ms; a simulated queue at that rate, with these executions and no other work, has a p99 of "
            f"{own['queue_p99']:.2f} ms. The machine adds its own delays: equal pieces of a Python loop, timed one "
            "after the other on the server's core, do not all take the same time, and work that needs 80 % of that "
            f"core would wait up to {own['core_p99']:.1f} ms (p99)."
        )
        if FLOOR in servers and own["over"] is not None:
            answer_us = 1e6 / own["capacity"]
            floor_us = 1e3 * servers[FLOOR]["closed"][at]["cpu_s_per_1000"]
            parts.append(
                f"To keep goodput at {GOODPUT:g} of the capacity at twice the requests, the server may spend "
                f"{answer_us * (1 - GOODPUT) / (2 - GOODPUT):.1f} µs on reading and rejecting a request. An answer "
                f"takes {answer_us:.1f} µs on one core; {FLOOR} takes {floor_us:.1f} µs."
            )
    return parts


def _cell(found: Mapping[str, float]) -> str:
    return f"{found['rate']:,.0f} ({found['p50']:.2f}, {found['p99']:.2f}, {found['p999']:.2f})"


def _open_cell(found: Mapping[str, float]) -> str:
    return f"{_cell(found)[:-1]}; {100 * found['cores']:.0f} %)"


def _numbers(kind: type) -> Any:
    return lambda text: tuple(kind(part) for part in text.split(",") if part)


def main() -> int:
    """Measures, prints, writes; exit code 1 where nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated; default: all")
    parser.add_argument("--mosec", help="a Python that has mosec (and lepton_xla, for other models than first10)")
    parser.add_argument("--litserve", help="a Python that has litserve")
    parser.add_argument("--triton", help="a Python 3.12 that has nvidia-pytriton 0.7.0")
    several = (len(os.sched_getaffinity(0)),) if len(os.sched_getaffinity(0)) > 1 else ()
    parser.add_argument(
        "--workers", type=_numbers(int), default=several,
        help="also ours and mosec with so many processes; default: as many as there are cores",
    )  # fmt: skip
    parser.add_argument(
        "--connections", type=_numbers(int), default=CONNECTIONS, help="closed loops; default 1,8,64,256"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of one closed loop")
    parser.add_argument("--open-seconds", type=float, default=10.0, help="of one open loop")
    parser.add_argument("--minute-seconds", type=float, default=60.0, help="of ours at 80 %% of its capacity")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server at each number of connections")
    parser.add_argument("--quick", action="store_true", help="little of everything, no page: a smoke test")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    journal.add_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.open_seconds, options.minute_seconds = 1.0, 0.5, 0.5
        options.rounds, options.connections = 1, (1, 8)
    wanted = options.models.split(",")
    if unknown := set(wanted) - set(MODELS):
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    figures = ("mosec", "litserve", "triton", "workers", "connections", "rounds")
    figures += ("seconds", "open_seconds", "minute_seconds")
    rows = journal.opened("serving", options, *figures)
    run_on_calling_thread()  # as our server does: the bare executable is to be at its best
    measured: dict[str, Any] = {}
    for name in wanted:
        load = f"{os.getloadavg()[0]:.1f}"
        console.print(f"{name}: making the artifact ...")
        try:
            measured[name] = rows.row(name, functools.partial(measure, name, options))
        except models.MissingError as error:
            console.print(f"{name}: skipped: {error}")
            continue
        measured[name]["run"] = harness.machine() | {"command": harness.command(), "load": load}
        for part in _tables(measured[name]):
            console.print(part, markup=False, soft_wrap=True)
        if not options.quick:
            known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
            known |= {name: measured[name]}
            known = {name: known[name] for name in MODELS if name in known}
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
            write_page(known)
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
    console.print(f"repeat with: {harness.command()}")
    return 0 if measured else 1


if __name__ == "__main__":
    sys.exit(main())
