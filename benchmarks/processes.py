"""Compare one server process with `--workers`.

    python benchmarks/processes.py [--workers 2] [--rounds 3] [--seconds 3]

The model maps 784 numbers to 10. wrk on the same machine keeps 64 connections with one request in flight each: a row in
binary, the same over TLS, and one and eight rows in JSON. Servers take turns; the others are stopped meanwhile.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import signal
import ssl
import statistics
import sys
import tempfile
import urllib.request

import harness
import loops
import numpy as np
import payloads
import server_process
import trustme

from lepton_xla.cli.tables import Table, show

CONNECTIONS = 64


class Server(server_process.Server):
    """Our server, plain or with TLS."""

    def __init__(self, artifact: pathlib.Path, payload: payloads.Payload, flags: list[str]) -> None:
        self._scheme = "https" if "--tls-cert" in flags else "http"
        port = server_process.free_port()
        command = [sys.executable, "-m", "lepton_xla", "serve", str(artifact), "--port", str(port), *flags]
        super().__init__("", command, port, f"/v2/models/{payload.model}/infer", payload.oip(), idles=False)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}{self.path}"

    def ask(self) -> bytes:
        """The body of the answer to one request."""
        body, fields = self.request
        unchecked = ssl._create_unverified_context()
        request = urllib.request.Request(self.url, body, fields)
        with urllib.request.urlopen(request, timeout=10, context=unchecked) as answer:
            return answer.read()


def json_request(row: np.ndarray, rows: int) -> tuple[bytes, dict[str, str]]:
    """Body and header fields of a JSON request with a JSON answer."""
    given = {"name": "x", "shape": [rows, row.size], "datatype": "FP32", "data": row.ravel().tolist() * rows}
    return json.dumps({"inputs": [given]}).encode(), {"Content-Type": "application/json"}


def certificate(folder: pathlib.Path) -> list[str]:
    """Make a certificate; return the server's TLS flags."""
    made = trustme.CA().issue_cert("127.0.0.1")
    chain, key = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))
    key.touch(0o600)
    key.write_bytes(made.private_key_pem.bytes())
    return ["--tls-cert", str(chain), "--tls-key", str(key)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=harness.numbers(int), default="2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    modes = {"one process": []}
    modes |= {f"--workers {count}": ["--workers", str(count)] for count in options.workers}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        artifact, payload = payloads.first10(folder, quick=False)
        row = payload.rows["x"]
        kinds = {
            "a row in binary": ([], payload.oip()),
            "the same over TLS": (certificate(folder), payload.oip()),
            "a row in JSON": ([], json_request(row, 1)),
            "8 rows in JSON": ([], json_request(row, 8)),
        }
        rows: list[tuple[str, ...]] = []
        for kind, (flags, request) in kinds.items():
            servers = [Server(artifact, payload, [*more, *flags]) for more in modes.values()]
            found: list[list[dict[str, float]]] = [[] for _ in servers]
            try:
                for server in servers:
                    server.request = request
                    server.wait()
                    server.signal(signal.SIGSTOP)
                for _ in range(options.rounds):
                    for server, figures in zip(servers, found, strict=True):
                        figures.append(loops.closed(server, CONNECTIONS, options.seconds))
            finally:
                for server in servers:
                    server.stop()
            rows.append((kind, *map(_cell, found)))
        show(Table("requests/s, p99, processor time a request", ("", *(f">{mode}" for mode in modes)), rows))


def _cell(found: list[dict[str, float]]) -> str:
    middle = {key: statistics.median(each[key] for each in found) for key in found[0]}
    errors = sum(each["errors"] for each in found)
    text = f"{middle['rate']:,.0f}, {middle['p99']:.1f} ms, {1e3 * middle['cpu_s_per_1000']:.0f} us"
    return f"{text}, {errors:.0f} errors" if errors else text


if __name__ == "__main__":
    main()
