"""The processes of a federation: Flower's SuperLink and run at the server, a SuperNode at each client."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from lepton_xla.errors import FederatedError
from lepton_xla.federated.flower import workers
from lepton_xla.federated.flower.messages import flower
from lepton_xla.launch import guard as guards

_START_S, _STOP_S, _POLL_S = 600.0, 10.0, 0.5
# Of a client, one after another; a server that turns all away must not be asked for ever.
_MOST_NODES = 20
_APP = "lepton_federation"
_PROJECT = """[project]
name = "lepton-federation"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "lepton"

[tool.flwr.app.components]
serverapp = "{app}.server:app"
clientapp = "{app}.client:app"

[tool.flwr.app.config]
{config}
"""


def write_app(folder: pathlib.Path, config: Mapping[str, str | int | float]) -> pathlib.Path:
    """Write the app that Flower sends to all ends: two lines that call what is installed there.

    Args:
        folder: where to.
        config: of the run.

    >>> sorted(path.name for path in write_app(pathlib.Path("app"), {"clients": 3}).rglob("*.*"))
    ['__init__.py', 'client.py', 'pyproject.toml', 'server.py']
    """
    package = folder / _APP
    package.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in config.items())
    (folder / "pyproject.toml").write_text(_PROJECT.format(app=_APP, config=lines), encoding="utf-8")
    (package / "__init__.py").write_text("", encoding="utf-8")
    for end in ("server", "client"):
        text = f"from lepton_xla.federated.flower.apps import make_{end}_app\n\napp = make_{end}_app()\n"
        (package / f"{end}.py").write_text(text, encoding="utf-8")
    return folder


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tls_of_server(host: str, cert: str | None, key: str | None, authorities: str | None) -> list[str]:
    """Flower's options for TLS at the server; without it only this machine may reach it.

    Raises:
        FederatedError: if one of the three files is missing, or none is given and others can reach the address.

    >>> tls_of_server("127.0.0.1", None, None, None)
    ['--insecure']
    """
    files = {"--tls-cert": cert, "--tls-key": key, "--tls-ca": authorities}
    missing = [name for name, path in files.items() if path is None]
    if len(missing) == len(files):
        if not is_loopback(host):
            raise FederatedError(
                f"others can reach {host}, so updates need TLS: give --tls-cert, --tls-key and --tls-ca"
            )
        return ["--insecure"]
    if missing:
        raise FederatedError(f"TLS takes a certificate, a key and the authorities: {', '.join(missing)} is missing")
    for name, path in files.items():
        if not pathlib.Path(str(path)).is_file():
            raise FederatedError(f"{name} {path}: there is no such file")
    return ["--ssl-certfile", str(cert), "--ssl-keyfile", str(key), "--ssl-ca-certfile", str(authorities)]


def run_server(
    folder: pathlib.Path,
    config: Mapping[str, str | int | float],
    *,
    host: str,
    port: int,
    tls: Sequence[str],
    authorities: str | None,
    watch: Callable[[], None],
) -> None:
    """Run a SuperLink and the training on it, until that ends.

    Args:
        folder: of the server: checkpoints, logs, Flower's own files.
        config: of the run.
        host: where clients connect.
        port: likewise.
        tls: of `tls_of_server`.
        authorities: the file of certificates that the run trusts, with TLS.
        watch: called every half second.

    Raises:
        FederatedError: if Flower is not installed, a process ends, or the training failed; says where its log is.
    """
    flower("serverapp")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcome.json").unlink(missing_ok=True)
    app = write_app(folder / "app", config)
    home = folder / "flower"
    home.mkdir(exist_ok=True)
    # The name in the server's certificate; what listens everywhere is reached over loopback.
    reached = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104
    trusts = f"root-certificates = {json.dumps(authorities)}" if authorities else "insecure = true"
    lines = [f'address = "{reached}:{port}"', trusts]
    connection = "\n".join(["[superlink]", 'default = "lepton"', "", "[superlink.lepton]", *lines, ""])
    (home / "config.toml").write_text(connection, encoding="utf-8")
    if _listens(reached, port):
        raise FederatedError(f"port {port} of {reached} is in use; give another --port")
    installs = "--disable-runtime-dependency-installation"
    command = ["flower-superlink", *tls, "--host", host, "--port", str(port), installs]
    log = folder / "superlink.log"
    environment = _environment(home, folder / "bin")
    with _workers(folder / "bin", "flwr-serverapp", log, environment), _process(command, log, environment) as superlink:
        _wait_for(lambda: _listens(reached, port), superlink, log, "Flower's SuperLink")
        with _process(["flwr", "run", str(app), "lepton", "--stream"], folder / "run.log", environment) as run:
            while not (folder / "outcome.json").exists():
                for process, name in ((superlink, log.name), (run, "run.log")):
                    if process.poll() is not None and not _appears(folder / "outcome.json"):
                        raise FederatedError(f"the training ended early; see {folder / name}")
                watch()
                time.sleep(_POLL_S)
    watch()
    error = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))["error"]
    if error is not None:
        raise FederatedError(error)


def run_client(
    folder: pathlib.Path, server: str, authorities: str | None, config: Mapping[str, str | float], own_port: int
) -> int:
    """Run a SuperNode until this process is ended, and another when it leaves a server that began anew.

    Gives the exit code of one that failed, or of the last one.

    Args:
        folder: of the client.
        server: `host:port`.
        authorities: the file of certificates to trust; None without TLS.
        config: of the node, see `make_client_app`.
        own_port: on loopback, where the SuperNode's own processes find it; 0 takes a free one.

    Raises:
        FederatedError: if Flower is not installed, the address has no port, it is not of this machine and there is no
            TLS, or the file of certificates is missing.
    """
    flower("clientapp")
    host, colon, port = server.rpartition(":")
    if not colon or not port.isdigit():
        raise FederatedError(f"--server {server!r}: expected HOST:PORT, such as 127.0.0.1:9092")
    if authorities is None and not is_loopback(host.strip("[]")):
        raise FederatedError(f"{host} is another machine, so updates need TLS: give --tls-ca")
    if authorities is not None and not pathlib.Path(authorities).is_file():
        raise FederatedError(f"--tls-ca {authorities}: there is no such file")
    folder.mkdir(parents=True, exist_ok=True)
    home = folder / "flower"
    home.mkdir(exist_ok=True)
    texts = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
    tls = ["--insecure"] if authorities is None else ["--root-certificates", authorities]
    own = str(own_port or _free_port())
    command = ["flower-supernode", *tls, "--superlink", server, "--port", own, "--node-config", texts]
    log = folder / "supernode.log"
    environment = _environment(home, folder / "bin")
    with _workers(folder / "bin", "flwr-clientapp", log, environment):
        code = 0
        # A node whose server began anew is not known there, and interrupts itself; another one joins.
        for _ in range(_MOST_NODES):
            with _process(command, log, environment) as node:
                code = node.wait()
            if code not in (0, -signal.SIGINT):
                break
        return code


@contextlib.contextmanager
def _workers(folder: pathlib.Path, name: str, log: pathlib.Path, environment: dict[str, str]) -> Generator[None]:
    """Processes that take calls of one of Flower's commands, before any is made."""
    workers.write_command(folder, name)
    with _process([sys.executable, "-m", workers.__name__, str(folder), name], log, environment) as process:
        _wait_for(lambda: workers.ready(folder), process, log, f"what runs {name}")
        yield


def _environment(home: pathlib.Path, first: pathlib.Path) -> dict[str, str]:
    """Of Flower's processes, which start others by name: those of `first`, then what is installed beside Python."""
    path = os.pathsep.join([str(first.resolve()), str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")])
    flowers = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"}
    return {**os.environ, **flowers, "PATH": path}


@contextlib.contextmanager
def _process(
    command: Sequence[str], log: pathlib.Path, environment: dict[str, str]
) -> Generator[subprocess.Popen[bytes]]:
    """A process of Flower with those that it starts, which end with it."""
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        raise FederatedError(f"{command[0]} is not installed: pip install 'lepton-xla[federated]'")
    with log.open("ab") as file:
        process = subprocess.Popen(  # noqa: S603
            [program, *command[1:]], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
            process_group=0,
        )  # fmt: skip
    # Holds the other end of a pipe of ours, and kills the group when we are gone, however that came.
    guard = subprocess.Popen(  # noqa: S603
        [sys.executable, guards.__file__, str(log.parent / "no-folder")], stdin=subprocess.PIPE,
        process_group=process.pid,
    )  # fmt: skip
    try:
        yield process
    finally:
        _stop(process)
        if guard.stdin is not None:
            guard.stdin.close()
        guard.wait()


def _stop(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started: they are a group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)


def _wait_for(ready: Callable[[], bool], process: subprocess.Popen[Any], log: pathlib.Path, what: str) -> None:
    end = time.monotonic() + _START_S
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            raise FederatedError(f"{what} did not start; see {log}")
        time.sleep(_POLL_S)


def _appears(path: pathlib.Path) -> bool:
    """Whether a file is there soon: a process may end before the next look at what it wrote."""
    time.sleep(2 * _POLL_S)
    return path.exists()


def _listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1.0):
        return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
