"""The servers that `serving.py` compares: starts each, and checks its answer."""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping

import numpy as np
from payloads import Payload
from rich.console import Console
from server_process import Server, free_port

SERVERS = pathlib.Path(__file__).parent / "servers"
OURS = "lepton_xla"
MOSEC = "mosec"
FLOOR = "HTTP alone"
console = Console(width=150, highlight=False)


def ours(label: str, path: pathlib.Path, payload: Payload, *flags: str) -> Server:
    """Our server."""
    port = free_port()
    command = [sys.executable, "-m", "lepton_xla", "serve", str(path), "--port", str(port), *flags]
    return Server(label, command, port, f"/v2/models/{payload.model}/infer", payload.oip())


def mosec(label: str, python: str, payload: Payload, env: dict[str, str]) -> Server:
    """mosec, with as many processes that run the model as `LEPTON_WORKERS` says."""
    port = free_port()
    command = [python, str(SERVERS / "mosec_server.py"), "--port", str(port)]
    return Server(label, command, port, "/inference", payload.raw(), env)


def candidates(
    name: str, path: pathlib.Path, payload: Payload, options: argparse.Namespace
) -> dict[str, Callable[[], Server]]:
    """A function that starts each requested server, by name."""
    infer = f"/v2/models/{payload.model}/infer"
    made: dict[str, Callable[[], Server]] = {OURS: lambda: ours(OURS, path, payload)}
    for count in options.workers:
        label = f"{OURS} --workers {count}"
        made[label] = functools.partial(ours, label, path, payload, "--workers", str(count))
    if name != "minilm":  # beside which it is nothing
        floor_at = free_port()
        floor = [sys.executable, str(SERVERS / "http_server.py"), "--port", str(floor_at)]
        made[FLOOR] = lambda: Server(FLOOR, floor, floor_at, infer, payload.oip())
    if options.mosec and payload.count == 1:
        env = {} if name == "first10" else {"LEPTON_ARTIFACT": str(path)}
        for count in (1, *options.workers):
            label = MOSEC if count == 1 else f"{MOSEC}, {count} workers"
            made[label] = functools.partial(mosec, label, options.mosec, payload, env | {"LEPTON_WORKERS": str(count)})
    if options.litserve and name == "first10":
        lit_at = free_port()
        lit = [options.litserve, str(SERVERS / "litserve_server.py"), "--port", str(lit_at)]
        made["LitServe"] = lambda: Server("LitServe", lit, lit_at, "/predict", payload.json(), idles=False)
    if options.triton and name == "first10":
        binary, env_triton = triton_installed(options.triton)
        for count in (1, *options.workers):
            label = "Triton" if count == 1 else f"Triton, {count} instances"
            made[label] = functools.partial(triton, label, binary, env_triton, path.parent, payload, count)
    return made


def start(makers: Mapping[str, Callable[[], Server]], payload: Payload) -> tuple[list[Server], list[str]]:
    """Starts every server; returns those that gave the right answer, and why the others are missing."""
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
    """The Triton Inference Server with `count` instances of the model."""
    repository = folder / f"triton-{count}"
    shutil.copytree(SERVERS / "triton", repository, dirs_exist_ok=True)
    config = repository / payload.model / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", f"count: {count}"))
    port = free_port()
    command = [
        str(binary), f"--model-repository={repository}", f"--backend-directory={binary.parents[1] / 'backends'}",
        "--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false",
    ]  # fmt: skip
    return Server(label, command, port, f"/v2/models/{payload.model}/infer", payload.oip(), env)


def triton_installed(python: str) -> tuple[pathlib.Path, dict[str, str]]:
    """The Triton executable of the nvidia-pytriton wheel of a Python, and its environment."""
    ask = "import sysconfig, sys; print(sysconfig.get_path('purelib'), sysconfig.get_config_var('LIBDIR'), '%d.%d' % sys.version_info[:2])"  # noqa: E501
    site, libraries, version = subprocess.run(
        [python, "-c", ask], capture_output=True, text=True, check=True
    ).stdout.split()
    server = pathlib.Path(site) / "pytriton" / "tritonserver"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, server / "backends" / "python")
    return server / "bin" / "tritonserver", {"LD_LIBRARY_PATH": libraries, "PEER_SITE": site}
