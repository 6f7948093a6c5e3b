"""The small installation: its size, the time of its imports, and memory of a server of digits within a limit.

    python benchmarks/edge.py [--limit 250MB] [--cores 1,4] [--rounds 7] [--quick] [--json FILE]

Installs this folder into environments of their own, without extras and with `train`, by uv. Serves with the first, on
so many cores (as many as there are), in a memory cgroup with the limit where one can be made (cgroup v1, root): the
kernel ends a process that needs more. Without, memory is only measured. `here` loads compiled code; `elsewhere` is told
that its CPU has SSE 4.2 only, so it compiles the portable program first, as a device does the first time. Writes
docs/benchmarks/edge.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Mapping
from typing import Any

import harness
import models
from server_process import free_port

import lepton_xla as lx
from lepton_xla.cli._common import parse_bytes

CGROUPS = pathlib.Path("/sys/fs/cgroup/memory")
# Environments, and the extras that they have.
EXTRAS = {"runtime": "", "train": "[train]"}
IMPORTS = ("import lepton_xla as lx; lx.load", "import lepton_xla.serve.server", "import jax")
ELSEWHERE = "--xla_cpu_max_isa=SSE4_2"
REQUESTS = 500


def install(name: str, folder: pathlib.Path) -> pathlib.Path:
    """An environment with this package; returns its Python."""
    uv = shutil.which("uv") or str(harness.ROOT / "build" / "tools" / "bin" / "uv")
    environment = folder / name
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", python, f"{harness.ROOT}{EXTRAS[name]}"],
        check=True,
        env=os.environ | {"UV_LINK_MODE": "copy"},
    )
    return python


def size_bytes(python: pathlib.Path) -> int:
    """Bytes of the installed packages, without compiled Python."""
    files = (python.parents[1] / "lib").rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file() and file.suffix != ".pyc")


def import_s(python: pathlib.Path, code: str) -> float:
    """Seconds of a process that imports something."""
    started = time.perf_counter()
    subprocess.run([python, "-c", code], check=True, env=environ())
    return time.perf_counter() - started


def environ(flags: str = "") -> dict[str, str]:
    """The environment of a server: this folder's source is not found in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return kept | {"JAX_PLATFORMS": "cpu", "LEPTON_CACHE": "off", "XLA_FLAGS": flags}


@contextlib.contextmanager
def limited(limit: int) -> Generator[pathlib.Path | None, None, None]:
    """A memory cgroup with this limit; None where none can be made."""
    group = CGROUPS / f"lepton-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
        with contextlib.suppress(OSError):
            (group / "memory.memsw.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def serve(python: pathlib.Path, artifact: pathlib.Path, flags: str, cores: int, limit: int) -> dict[str, Any]:
    """A server's memory at its peak, the time until its first answer, and milliseconds of one request."""
    port = free_port()
    usable = sorted(os.sched_getaffinity(0))[:cores]
    with limited(limit) as group:
        # The shell enters the cgroup and keeps to the cores, then becomes the server.
        enter = f"echo $$ > {group / 'tasks'}; " if group is not None else ""
        cpus = ",".join(map(str, usable))
        command = f'{enter}exec taskset -c {cpus} "$0" serve "$1" --port {port}'
        started = time.perf_counter()
        with subprocess.Popen(
            ["/bin/sh", "-c", command, python.parent / "leptonx", artifact],
            env=environ(flags), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        ) as server:  # fmt: skip
            try:
                times: list[float] = []
                url, body = f"http://127.0.0.1:{port}/v2/models/digits/infer", request()
                while not times:
                    if server.poll() is not None:
                        why = "killed: it needs more" if server.returncode == -9 else server.stderr.read()[-200:]
                        return {"cores": len(usable), "limited": group is not None, "failed": why}
                    with contextlib.suppress(OSError):
                        times.append(asked_s(url, body))
                    time.sleep(0.002)
                ready_s = time.perf_counter() - started
                time.sleep(2.0)  # sizes that were not timed yet are timed
                times = [asked_s(url, body) for _ in range(REQUESTS)]
                status = pathlib.Path(f"/proc/{server.pid}/status").read_text()
            finally:
                server.kill()
    kib = {name: int(value) for name, value in re.findall(r"(VmHWM|RssAnon|RssFile):\s+(\d+) kB", status)}
    return {
        "cores": len(usable),
        "limited": group is not None,
        "failed": "",
        "ready_s": ready_s,
        "ms": 1e3 * statistics.median(times),
        "peak_bytes": 1024 * kib["VmHWM"],
        "anonymous_bytes": 1024 * kib["RssAnon"],
        "file_bytes": 1024 * kib["RssFile"],
    }


def request() -> bytes:
    """One row of digits."""
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 8, 8, 1], "data": [0.5] * 64}
    return json.dumps({"inputs": [tensor]}).encode()


def asked_s(url: str, body: bytes) -> float:
    """Seconds of one request over a connection of its own."""
    started = time.perf_counter()
    with urllib.request.urlopen(url, body, timeout=60) as answer:
        answer.read()
    return time.perf_counter() - started


def measure(options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """All figures."""
    pythons = {name: install(name, folder) for name in EXTRAS}
    sizes = {name: size_bytes(python) for name, python in pythons.items()}
    imports: dict[str, list[float]] = {code: [] for code in IMPORTS}
    for _ in range(options.rounds + 1):
        for code, times in imports.items():
            times.append(import_s(pythons["runtime"], code))
    spec = models.load("digits", quick=options.quick).spec
    small = lx.optimize(spec.program(), lx.Recipe.load("int8"), buckets=spec.buckets)
    artifact = folder / "digits.lepton"
    lx.compile(small, spec.buckets, name="digits").save(artifact)
    servers = [
        {"where": where} | serve(pythons["runtime"], artifact, flags, cores, options.limit)
        for where, flags in (("here", ""), ("elsewhere", ELSEWHERE))
        for cores in options.cores
    ]
    return {"sizes": sizes, "imports": {code: times[1:] for code, times in imports.items()}, "servers": servers}


def tables(result: Mapping[str, Any], limit: int) -> str:
    """All three tables."""
    sizes = [
        [f"`pip install 'lepton-xla{EXTRAS[name]}'`", f"{size / 1e6:.0f}"] for name, size in result["sizes"].items()
    ]
    imports = [[f"`{code}`", f"{1e3 * statistics.median(times):.0f}"] for code, times in result["imports"].items()]
    rows: list[list[str]] = []
    for server in result["servers"]:
        held = f"{limit / 1e6:.0f} MB" if server["limited"] else "none could be set"
        if server["failed"]:
            rows.append([server["where"], str(server["cores"]), held, server["failed"], "", "", "", ""])
            continue
        memory = [f"{server[name] / 1e6:.0f}" for name in ("peak_bytes", "anonymous_bytes", "file_bytes")]
        rows.append(
            [server["where"], str(server["cores"]), held, *memory, f"{server['ready_s']:.2f}", f"{server['ms']:.2f}"]
        )
    columns = [
        "server of digits",
        "cores",
        "limit",
        "peak MB",
        "own",
        "of files",
        "first answer (s)",
        "one request (ms)",
    ]
    return "\n\n".join(
        [
            harness.markdown(["installed", "MB"], sizes),
            harness.markdown(["process", "ms"], imports),
            harness.markdown(columns, rows),
        ]
    )


def page(result: Mapping[str, Any]) -> str:
    """docs/benchmarks/edge.md."""
    parts = [
        "# Small machines",
        (
            "What an installation takes on disk, what its imports take (a whole process each, medians), and the memory "
            "of `leptonx serve` of an int8 digits model: the peak of the process, and of what it holds at the end its "
            "own part and that of files, which the system can drop. `here` loads compiled code; `elsewhere` first "
            "compiles the portable program, as a device of another kind does the first time. All in an environment "
            "without extras, in a memory cgroup where the limit is named."
        ),
        tables(result, result["limit"]),
        harness.provenance(result["run"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", default="250MB", type=lambda text: parse_bytes(None, None, text))
    parser.add_argument("--cores", default="1,4", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round, no page: a smoke test")
    harness.add_pages(parser)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    os.environ["LEPTON_KERNELS"] = "off"  # the environments have none, and would compile code that calls them
    load = f"{os.getloadavg()[0]:.1f}"
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, pathlib.Path(folder))
    result |= {"limit": options.limit, "run": harness.machine() | {"command": harness.command(), "load": load}}
    print(tables(result, options.limit))
    harness.conclude("edge", options, result, page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
