"""Talk to the customer service in a browser: serves the compiled model, and a page on this machine that asks it.

    python examples/apps/service/page.py [--artifact build/apps/service/service.lepton] [--port 8080]

The page and the model's stream come from one address, so the model's server need not allow other pages to ask it. Only
this machine can connect, and only under its own name: a page of elsewhere whose name leads here is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import pathlib
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import lepton_xla as lx
from lepton_xla.serve import Options, Server

HERE = pathlib.Path(__file__).resolve().parent
ARTIFACT = HERE.parents[2] / "build" / "apps" / "service" / "service.lepton"
FILES = {"/": ("page.html", "text/html; charset=utf-8"), "/page.js": ("page.js", "text/javascript; charset=utf-8")}
STREAM = "/v2/models/service/generate_stream"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Page(ThreadingHTTPServer):
    """The page, and what it asks of the model's server at `upstream`, host and port."""

    daemon_threads = True

    def __init__(self, port: int, upstream: tuple[str, int]) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.upstream = upstream
        self.names = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """Answers with files, and passes streams on as they come."""

    @property
    def page(self) -> Page:
        """The server."""
        assert isinstance(self.server, Page)
        return self.server

    def do_GET(self) -> None:
        """Answer one request."""
        path, _, query = self.path.partition("?")
        if self.headers.get("Host") not in self.page.names:
            self.send_error(421)
        elif path in FILES:
            name, kind = FILES[path]
            body = (HERE / name).read_bytes()
            self._begin(200, {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS})
            self.wfile.write(body)
        elif path == STREAM:
            self._pass_on(f"{STREAM}?{query}")
        else:
            self.send_error(404)

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _pass_on(self, target: str) -> None:
        # `closing`: a browser that goes away frees the sequence's slot.
        with contextlib.closing(http.client.HTTPConnection(*self.page.upstream, timeout=60)) as asked:
            last = self.headers.get("Last-Event-ID")
            try:
                asked.request("GET", target, headers={"Last-Event-ID": last} if last else {})
                answer = asked.getresponse()
            except (ValueError, http.client.InvalidURL):  # bytes that have no place in a request
                self.send_error(400)
                return
            except (OSError, http.client.HTTPException):
                self.send_error(502, "The model's server does not answer")
                return
            with contextlib.suppress(OSError, http.client.HTTPException):  # either end goes away
                self._begin(answer.status, {"Content-Type": answer.getheader("Content-Type", "text/plain"), **HEADERS})
                while part := answer.read1(65536):
                    self.wfile.write(part)
                    self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


@contextlib.contextmanager
def running(artifact: pathlib.Path, port: int = 0) -> Generator[Page]:
    """Serve the model and the page."""
    server = Server(lx.load(artifact), Options(port=0)).start()
    try:
        with Page(port, server.address[:2]) as page:
            yield page
    finally:
        server.stop()


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--artifact", type=pathlib.Path, default=ARTIFACT)
    parser.add_argument("--port", type=int, default=8080)
    given = parser.parse_args()
    if not given.artifact.exists():
        raise SystemExit(f"{given.artifact} is not there: run examples/apps/service/run.py first")
    try:
        with running(given.artifact, given.port) as page, contextlib.suppress(KeyboardInterrupt):
            print(f"open {page.url}; Ctrl-C ends it", flush=True)
            page.serve_forever()
    except (lx.LeptonError, OSError, OverflowError) as error:  # no artifact, or no such port, or one that is in use
        raise SystemExit(f"page.py: {error}") from error


if __name__ == "__main__":
    main()
