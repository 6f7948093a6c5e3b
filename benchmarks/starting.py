"""From the start of a process to the first answer, beside `import jax`, in pairs; and where the time goes.

    python benchmarks/starting.py [--models digits,minilm] [--rounds 11] [--quick] [--json FILE]

`serve` is `leptonx serve ARTIFACT`, asked for one row as soon as it listens; `load` is a script that loads the same
artifact by `lx.load` and calls it. Both are measured from the start of the process, in turns with `python -c 'import
jax'`. The steps of `serve` are timed in a process that does the same one by one. Every process finds files, and
compiled Python, in the page cache. Writes docs/benchmarks/starting.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import harness
import journal
import loading
import models
from server_process import free_port

import lepton_xla as lx

MODELS = ("digits", "minilm")
STEPS = (
    "Python, click",
    "the command",
    "the server's modules",
    "the loader's modules",
    "load",
    "start, warm up",
    "answer",
)
_LOAD = """
import sys
import numpy as np
import lepton_xla as lx
servable = lx.load(sys.argv[1])
sizes = {name: compiled[0] for name, compiled in servable.buckets.items()}
servable(**{name: np.zeros(spec.shape_at(sizes), spec.dtype) for name, spec in servable.inputs.items()})
"""
_STEPS = """
import json, os, sys, time
def since():
    ticks = int(open("/proc/self/stat").read().rsplit(") ", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
times = []
import lepton_xla.cli
times.append(since())
import lepton_xla.cli.serve
times.append(since())
import lepton_xla.serve.server, lepton_xla.serve.runtime, lepton_xla.serve.observe.logs
from lepton_xla.serve.app.options import Options
lepton_xla.serve.runtime.run_on_calling_thread()
times.append(since())
from lepton_xla.compiler import load
times.append(since())
servable = load(sys.argv[1])
times.append(since())
def ready(server):
    times.append(since())
    import http.client
    connection = http.client.HTTPConnection(*server.address)
    def ask():
        connection.request("POST", f"/v2/models/{server.name}/infer", sys.argv[2])
        assert connection.getresponse().read()
        times.append(since())
        server.stop()
    import threading
    threading.Thread(target=ask).start()
lepton_xla.serve.server.Server(servable, Options(port=0)).run(on_ready=ready)
steps = [after - before for before, after in zip([0.0, *times], times)]
print(json.dumps({"steps": steps, "jax": "jax" in sys.modules}))
"""


def artifact(name: str, folder: pathlib.Path, quick: bool) -> pathlib.Path:
    """A compiled model."""
    path = folder / f"{name}.lepton"
    if name == "minilm":
        program = loading.minilm()
        if isinstance(program, str):
            raise models.MissingError(program)
        lx.compile(program, {"batch": (1, 8, 32)}, name=name).save(path)
        return path
    spec = models.load(name, quick=quick).spec
    lx.compile(spec.program(), spec.buckets, name=name).save(path)
    return path


def body(path: pathlib.Path) -> str:
    """A request for one row."""
    servable = lx.load(path)
    kinds = {"float32": "FP32", "int32": "INT32"}
    sizes = {name: compiled[0] for name, compiled in servable.buckets.items()}
    inputs: list[dict[str, Any]] = []
    for name, spec in servable.inputs.items():
        shape = spec.shape_at(sizes)
        ones = [1] * math.prod(shape)
        inputs.append({"name": name, "shape": shape, "datatype": kinds[spec.dtype], "data": ones})
    return json.dumps({"inputs": inputs})


def serve_s(path: pathlib.Path, request: str) -> float:
    """Seconds until `leptonx serve` has answered."""
    port = free_port()
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "lepton_xla", "serve", str(path), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while True:
            try:
                connection.connect()
                break
            except ConnectionRefusedError:
                if process.poll() is not None:
                    raise RuntimeError(f"the server of {path} ended with code {process.returncode}") from None
                time.sleep(0.001)
        connection.request("POST", f"/v2/models/{path.stem}/infer", request)
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(answer.decode())
        return time.perf_counter() - started
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


def script_s(code: str, *arguments: str) -> float:
    """Seconds of a process."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model's figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = artifact(name, pathlib.Path(folder), options.quick)
        request = body(path)
        calls: dict[str, Callable[[], float]] = {
            "import": lambda: script_s("import jax"),
            "load": lambda: script_s(_LOAD, str(path)),
            "serve": lambda: serve_s(path, request),
        }
        times: dict[str, list[float]] = {each: [] for each in calls}
        steps: list[list[float]] = []
        imported = False
        for number in range(-1, options.rounds):
            for each in list(calls)[:: 1 if number % 2 else -1]:
                seconds = calls[each]()
                if number >= 0:  # the first round compiles Python
                    times[each].append(seconds)
            done = subprocess.run(
                [sys.executable, "-c", _STEPS, str(path), request], check=True, capture_output=True, text=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            steps.append(found["steps"])
            imported = found["jax"]
    return {
        "name": name,
        "times": times,
        "steps": [statistics.median(each) for each in zip(*steps[1:], strict=True)],
        "jax": imported,
    }


def tables(rows: list[dict[str, Any]]) -> str:
    """Both tables."""
    cells: list[list[str]] = []
    for row in rows:
        median = {each: f"{statistics.median(times):.2f}" for each, times in row["times"].items()}
        ratios = [f"{harness.ratio(row['times'], each, 'import'):.2f}" for each in ("load", "serve")]
        cells.append([row["name"], median["import"], median["load"], ratios[0], median["serve"], ratios[1],
                      "yes" if row["jax"] else "no"])  # fmt: skip
    header = [
        "seconds",
        "import jax",
        "lx.load and call",
        "of it",
        "leptonx serve, first answer",
        "of it",
        "imports jax",
    ]
    steps = [[step, *(f"{1e3 * row['steps'][index]:.0f}" for row in rows)] for index, step in enumerate(STEPS)]
    return harness.markdown(header, cells) + "\n\n" + harness.markdown(["ms", *(row["name"] for row in rows)], steps)


def page(result: Mapping[str, Any]) -> str:
    """docs/benchmarks/starting.md."""
    parts = [
        "# Start of a process",
        (
            "From the start of a process to its first answer, in turns with `python -c 'import jax'`: medians, and "
            "medians of the rounds' ratios. `digits` is a small network, `minilm` has 90 MB of weights in batches of "
            "1, 8 and 32 rows of 128 tokens. The second table has the steps of a server that does the same one by one."
        ),
        tables(result["rows"]),
        harness.provenance(result["run"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measures, prints, writes; exit code 1 where nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_names(parser, "--models", MODELS)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="one round, no page: a smoke test")
    harness.add_pages(parser)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    journal.add_option(parser)
    options = parser.parse_args()
    # Processes keep compiled Python, as an installed package does.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if options.quick:
        options.rounds = 1
    load = f"{os.getloadavg()[0]:.1f}"
    kept = journal.opened("starting", options, "rounds")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("PYTHONPYCACHEPREFIX", cache)
        for name in options.models:
            try:
                rows.append(kept.row(name, functools.partial(measure, name, options)))
            except models.MissingError as error:
                print(f"{name}: skipped: {error}", flush=True)
    if not rows:
        return 1
    result = {"rows": rows, "run": harness.machine() | {"command": harness.command(), "load": load}}
    print(tables(rows))
    harness.conclude("starting", options, result, page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
