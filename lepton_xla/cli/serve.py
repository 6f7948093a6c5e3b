"""`leptonx serve`: answer requests with an artifact."""

from __future__ import annotations

import json as json_lines
import sys
from collections.abc import Callable
from typing import Any

import click

from lepton_xla.serve.limits import Limits

_DEFAULTS = Limits()


def _option(flag: str, default: Any, text: str, **kwargs: Any) -> Callable[[Any], Any]:
    """An option with its environment twin: `--max-delay-us` and `LEPTON_MAX_DELAY_US`."""
    twin = "LEPTON_" + flag.lstrip("-").replace("-", "_").upper()
    kwargs.setdefault("show_default", True)
    return click.option(flag, default=default, envvar=twin, show_envvar=True, help=text, **kwargs)


@click.command()
@click.argument("path", type=click.Path())
@_option("--host", "127.0.0.1", "Address to listen on. The default can be reached from this machine only.")
@_option("--port", 8000, "Port to listen on; 0 picks a free one.", type=click.IntRange(0, 65535))
@_option("--name", None, "Model name in the URL.", show_default="the artifact's own")
@_option(
    "--max-delay-us",
    0,
    "How long a request may wait, in microseconds, for others to share its batch while the model is idle. "
    "0 never waits: requests that arrive while a batch runs form the next one.",
    type=click.IntRange(0),
)
@_option(
    "--max-queue-rows",
    4096,
    "Rows that may wait; beyond them requests get 503 with Retry-After. Also the most rows of one request.",
    type=click.IntRange(1),
)
@_option(
    "--max-body-bytes",
    _DEFAULTS.max_body_bytes,
    "Largest request body, as sent and after decompression; larger ones get 413.",
    type=click.IntRange(1),
)
@_option(
    "--max-header-bytes",
    _DEFAULTS.max_header_bytes,
    "Largest request line and header fields together; larger ones get 431.",
    type=click.IntRange(1),
)
@_option(
    "--max-connections", _DEFAULTS.max_connections, "Connections open at once; more get 503.", type=click.IntRange(1)
)
@_option("--head-timeout-s", _DEFAULTS.head_timeout_s, "Seconds a client may take to send the header fields.")
@_option("--body-timeout-s", _DEFAULTS.body_timeout_s, "Seconds a client may take to send the body.")
@_option("--idle-timeout-s", _DEFAULTS.idle_timeout_s, "Seconds a kept connection may stay without a request.")
@_option("--write-timeout-s", _DEFAULTS.write_timeout_s, "Seconds a client may leave its answers unread.")
@_option("--compress-bytes", 4096, "Smallest answer compressed for a client that accepts it.", type=click.IntRange(0))
@_option(
    "--lame-duck-s",
    0.0,
    "Seconds to go on taking connections after SIGTERM, while readiness already says no: the time a load balancer "
    "needs to notice.",
)
@_option("--stop-timeout-s", 30.0, "Seconds after SIGTERM to wait for answers still owed.")
@click.option("--json", "as_json", is_flag=True, help="Print events and log lines as JSON, one object a line.")
def serve(
    path: str,
    *,
    host: str,
    port: int,
    name: str | None,
    max_delay_us: int,
    max_queue_rows: int,
    max_body_bytes: int,
    max_header_bytes: int,
    max_connections: int,
    head_timeout_s: float,
    body_timeout_s: float,
    idle_timeout_s: float,
    write_timeout_s: float,
    compress_bytes: int,
    lame_duck_s: float,
    stop_timeout_s: float,
    as_json: bool,
) -> None:
    """Answer HTTP requests with the artifact at PATH.

    Speaks the Open Inference Protocol v2, so tritonclient and KServe clients work. Requests of several clients are put
    together into the batch sizes the artifact was compiled for.

    \b
      leptonx serve digits.lepton --port 8000
      curl localhost:8000/v2/models/digits               what it takes and gives
      curl localhost:8000/v2/models/digits/infer -d '{"inputs": [{"name": "image", "datatype": "FP32",
           "shape": [1, 64], "data": [...]}]}'
      curl localhost:8000/metrics                        Prometheus

    The address is printed once requests are taken. SIGTERM and SIGINT answer what was accepted, then exit with 0;
    with 1 if --stop-timeout-s passed first.
    """
    # Imported here so that `--help` does not wait for JAX.
    from lepton_xla.compiler import load
    from lepton_xla.serve.logs import configure
    from lepton_xla.serve.server import Options, Server

    options = Options(
        host=host,
        port=port,
        name=name,
        max_delay_us=max_delay_us,
        max_queue_rows=max_queue_rows,
        compress_bytes=compress_bytes,
        lame_duck_s=lame_duck_s,
        stop_timeout_s=stop_timeout_s,
        limits=Limits(
            max_body_bytes=max_body_bytes,
            max_header_bytes=max_header_bytes,
            max_connections=max_connections,
            head_timeout_s=head_timeout_s,
            body_timeout_s=body_timeout_s,
            idle_timeout_s=idle_timeout_s,
            write_timeout_s=write_timeout_s,
        ),
    )
    configure(as_json)

    def announce(server: Server) -> None:
        if as_json:
            at = {"host": server.address[0], "port": server.address[1]}
            line = json_lines.dumps({"event": "listening", "url": server.url, "model": server.name, **at})
        else:
            line = f"serving {server.name} on {server.url}"
        click.echo(line)
        sys.stdout.flush()

    finished = Server(load(path), options).run(on_ready=announce)
    if as_json:
        click.echo(json_lines.dumps({"event": "stopped", "all_answered": finished}))
    if not finished:
        sys.exit(1)
