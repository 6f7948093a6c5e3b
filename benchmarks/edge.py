"""The small installation: its size, the time of its imports, and memory of a server of digits within a limit.

    python benchmarks/edge.py [--limit 250MB] [--cores 1,4] [--rounds 7] [--quick] [--json FILE]

Installs this folder into environments of their own, without extras and with `train`, by uv. Serves with the first, on
so many cores (as many as there are), in a memory cgroup with the limit where one can be made (cgroup v1, root): the
kernel ends a process that needs more. Without, memory is only measured. `here` loads compiled code; `elsewhere` is told
that its CPU has SSE 4.2 only, so it compiles the portable program first, as a device does the first time. Before each
start the kernel drops what it holds of the environment's files, so that all that are read count for the cgroup, as in a
container that was just started. Then it looks for the least limit with which a server still answers. Writes
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
# XLA's flags where code fits, and where it has to be compiled.
WHERE = {"here": "", "elsewhere": "--xla_cpu_max_isa=SSE4_2"}
REQUESTS = 500
# Limits to try one after another, in MB, until one is too small; and how long a server may take to answer there.
LIMITS = (200, 175, 150, 125, 100, 75, 50)
PATIENCE_S = 60.0


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


def forget(python: pathlib.Path) -> None:
    """Have the kernel drop the files of an environment from its memory."""
    os.sync()
    for path in python.parents[1].rglob("*"):
        if path.is_file() and not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


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
    forget(python)
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
                    ended = server.poll() is not None
                    if ended or time.perf_counter() - started > PATIENCE_S:
                        why = f"none in {PATIENCE_S:.0f} s"
                        if ended:
                            killed = server.returncode == -9
                            why = "killed: it needs more" if killed else server.stderr.read()[-200:]
                        return {"cores": len(usable), "limited": group is not None, "failed": why}
                    with contextlib.suppress(OSError):
                        times.append(asked_s(url, body))
                    time.sleep(0.002)
                ready_s = time.perf_counter() - started
                time.sleep(2.0)  # sizes that were not timed yet are timed
                times = [asked_s(url, body) for _ in range(REQUESTS)]
                status = pathlib.Path(f"/proc/{server.pid}/status").read_text()
                charged = int((group / "memory.max_usage_in_bytes").read_text()) if group is not None else None
            finally:
                server.kill()
    kib = {name: int(value) for name, value in re.findall(r"(VmHWM|RssAnon|RssFile):\s+(\d+) kB", status)}
    return {
        "cores": len(usable),
        "limited": group is not None,
        "failed": "",
        "ready_s": ready_s,
        "ms": 1e3 * statistics.median(times),
        "charged_bytes": charged,
        "peak_bytes": 1024 * kib["VmHWM"],
        "anonymous_bytes": 1024 * kib["RssAnon"],
        "file_bytes": 1024 * kib["RssFile"],
    }


def least_limits(python: pathlib.Path, artifact: pathlib.Path, cores: int) -> dict[str, list[dict[str, Any]]]:
    """Servers with ever smaller limits, until one does not answer; none where no limit can be set."""
    found: dict[str, list[dict[str, Any]]] = {where: [] for where in WHERE}
    for where, flags in WHERE.items():
        for limit in LIMITS:
            found[where].append({"limit": limit} | serve(python, artifact, flags, cores, limit * 1_000_000))
            if found[where][-1]["failed"] or not found[where][-1]["limited"]:
                break
    return found


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
        for where, flags in WHERE.items()
        for cores in options.cores
    ]
    least = {} if options.quick else least_limits(pythons["runtime"], artifact, max(options.cores))
    return {
        "sizes": sizes,
        "imports": {code: times[1:] for code, times in imports.items()},
        "servers": servers,
        "least": least,
    }


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
            rows.append([server["where"], str(server["cores"]), held, server["failed"], "", "", "", "", ""])
            continue
        memory = [
            f"{server[name] / 1e6:.0f}" if server[name] is not None else ""
            for name in ("charged_bytes", "peak_bytes", "anonymous_bytes", "file_bytes")
        ]
        rows.append(
            [server["where"], str(server["cores"]), held, *memory, f"{server['ready_s']:.2f}", f"{server['ms']:.2f}"]
        )
    columns = [
        "server of digits",
        "cores",
        "limit",
        "container's peak MB",
        "process's peak MB",
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
            *smaller(result["least"]),
        ]
    )


def smaller(least: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """What smaller limits do."""
    rows: list[list[str]] = []
    for where, servers in least.items():
        for server in servers:
            if not server["limited"]:
                continue
            told = [server["failed"], ""] if server["failed"] else [f"{server['ready_s']:.2f}", f"{server['ms']:.2f}"]
            rows.append([where, f"{server['limit']} MB", *told])
    return [harness.markdown(["server of digits", "limit", "first answer (s)", "one request (ms)"], rows)] * bool(rows)


def page(result: Mapping[str, Any]) -> str:
    """docs/benchmarks/edge.md."""
    parts = [
        "# Small machines",
        (
            "What an installation takes on disk, what its imports take (a whole process each, medians), and the memory "
            "of `leptonx serve` of an int8 digits model. All in an environment without extras, in a memory cgroup, as "
            "a container has one, where the limit is named. What the container takes includes the files that it reads; "
            "the kernel drops those, and reads them again, when the limit is reached, so only the process's own part "
            "has to fit. The process's peak counts all that it has mapped. `here` loads compiled code; `elsewhere` "
            "first compiles the portable program, as a device of another kind does the first time. None of the "
            "environment's files is in memory before. A server that has not answered after a minute is too slow."
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
