"""`leptonx serve`: answer requests with an artifact."""

from __future__ import annotations

import dataclasses
import json as json_lines
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.errors import ServeError
from lepton_xla.serve.limits import Limits

if TYPE_CHECKING:
    from lepton_xla.serve.access.tls import TlsFiles
    from lepton_xla.serve.processes.supervisor import Supervisor


def _twin(flag: str) -> str:
    """The environment twin of a flag: `LEPTON_MAX_DELAY_US` of `--max-delay-us`."""
    return "LEPTON_" + flag.lstrip("-").replace("-", "_").upper()


def _option(flag: str, default: Any, text: str, **kwargs: Any) -> Callable[[Any], Any]:
    """An option that says its default and its environment twin in the help."""
    kwargs.setdefault("show_default", True)
    return click.option(flag, default=default, envvar=_twin(flag), show_envvar=True, help=text, **kwargs)


def _file_option(flag: str, text: str) -> Callable[[Any], Any]:
    """An option for a file that guards the server: an environment twin that is set but empty does not switch it off."""

    def check(context: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
        if value is None and _twin(flag) in os.environ:
            raise click.BadParameter(f"the environment variable {_twin(flag)} is empty", context, option)
        return value

    return _option(flag, None, text, type=click.Path(path_type=Path), show_default=False, callback=check)


def _limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """An option for each field of `Limits`, so that none can be forgotten."""
    for field in reversed(dataclasses.fields(Limits)):
        kind = click.IntRange(1) if isinstance(field.default, int) else click.FloatRange(0, min_open=True)
        flag = "--" + field.name.replace("_", "-")
        command = _option(flag, field.default, field.metadata["help"], type=kind)(command)
    return command


@click.command()
@click.argument("path", type=click.Path())
@_option(
    "--host",
    "127.0.0.1",
    "Address to listen on, or a name, such as localhost, all of whose addresses are. The default can be reached from "
    "this machine only.",
)
@_option("--port", 8000, "Port to listen on; 0 picks a free one.", type=click.IntRange(0, 65535))
@_option(
    "--unix-socket",
    None,
    "File of a Unix socket to listen on, instead of host and port, as for a proxy on this machine. The umask says who "
    "may connect. One that was left behind is replaced, and it is removed at the end.",
    type=click.Path(path_type=Path),
    show_default=False,
)
@_option(
    "--workers",
    1,
    "Processes that each do all of it, model included, with one more that watches over them: for models on the CPU so "
    "small that one core is busy with requests while others are idle. 1 is one process in all.",
    type=click.IntRange(1, 64),
)
@_option("--name", None, "Model name in the URL.", show_default="the artifact's own")
@_option("--server-name", "lepton_xla", 'What the server calls itself; some clients look for "triton".')
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
    "--max-queue-bytes",
    256 << 20,
    "Memory of the requests that may wait; beyond it requests get 503 with Retry-After.",
    type=click.IntRange(1),
)
@_option(
    "--default-timeout-s",
    None,
    "Seconds after which a request that gives no timeout is answered 504.",
    type=click.FloatRange(0, min_open=True),
    show_default="never",
)
@_option(
    "--max-timeout-s",
    None,
    "Longest timeout of any request; longer ones are cut to it.",
    type=click.FloatRange(0, min_open=True),
    show_default="no bound",
)
@_option(
    "--priority-levels",
    3,
    "Levels of the request parameter priority: 1 is the highest. Requests that do not say are on the middle one.",
    type=click.IntRange(1),
)
@_option("--compress-bytes", 4096, "Smallest answer compressed for a client that accepts it.", type=click.IntRange(0))
@_option(
    "--lame-duck-s",
    0.0,
    "Seconds to go on taking connections after SIGTERM, and keeping idle ones, while readiness already says no: the "
    "time a load balancer needs to notice.",
)
@_option("--stop-timeout-s", 30.0, "Seconds after that to wait for answers still owed; those left get 503.")
@_file_option(
    "--token-file",
    "Ask for a token of this file on every route but health; made by `leptonx token create`. Read again when it "
    "changes, and on SIGHUP.",
)
@_file_option("--tls-cert", "Speak TLS with this certificate chain (PEM). Read again when it changes, and on SIGHUP.")
@_file_option("--tls-key", "Private key of --tls-cert (PEM, not encrypted).")
@_file_option("--tls-client-ca", "Let in only clients with a certificate of these roots (PEM): mutual TLS.")
@_option(
    "--insecure-public",
    False,
    "Listen on an address that other machines can reach though there is neither a token file nor --tls-client-ca.",
    is_flag=True,
    show_default=False,
)
@_limit_options
@_option(
    "--access-log-sample",
    0.0,
    "Share of the requests that the log gets a line of, such as 0.01; 0 writes none and costs nothing.",
    type=click.FloatRange(0, 1),
)
@_option(
    "--otel-endpoint",
    None,
    "Trace requests with OpenTelemetry, and send spans to this collector with OTLP over HTTP. Samplers, headers and "
    "the like come from the standard OTEL_ variables. Needs lepton-xla[otel].",
    show_default="what OTEL_EXPORTER_OTLP_ENDPOINT says",
)
@_option(
    "--log-format",
    None,
    "How the log on stderr is written, a line an event.",
    type=click.Choice(["text", "json"]),
    show_default="text, or json with --json",
)
@click.option("--json", "as_json", is_flag=True, help="Print events and log lines as JSON, one object a line.")
def serve(
    path: str,
    *,
    host: str,
    port: int,
    unix_socket: Path | None,
    workers: int,
    name: str | None,
    server_name: str,
    max_delay_us: int,
    max_queue_rows: int,
    max_queue_bytes: int,
    default_timeout_s: float | None,
    max_timeout_s: float | None,
    priority_levels: int,
    compress_bytes: int,
    lame_duck_s: float,
    stop_timeout_s: float,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    insecure_public: bool,
    access_log_sample: float,
    otel_endpoint: str | None,
    log_format: str | None,
    as_json: bool,
    **limits: Any,
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
    with 1 if --stop-timeout-s passed first. A second one stops at once.
    """
    # Imported here so that `--help` waits for none of it.
    from lepton_xla.serve.app.options import Options
    from lepton_xla.serve.http.files import make_room
    from lepton_xla.serve.observe.logs import configure
    from lepton_xla.serve.server import Server

    # Until the server takes it, which reads files again: whoever sends it early must not end what is being loaded.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    options = Options(
        host=host,
        port=port,
        unix_socket=unix_socket,
        name=name,
        server_name=server_name,
        max_delay_us=max_delay_us,
        max_queue_rows=max_queue_rows,
        max_queue_bytes=max_queue_bytes,
        default_timeout_s=default_timeout_s,
        max_timeout_s=max_timeout_s,
        priority_levels=priority_levels,
        compress_bytes=compress_bytes,
        lame_duck_s=lame_duck_s,
        stop_timeout_s=stop_timeout_s,
        access_log_sample=access_log_sample,
        otel_endpoint=otel_endpoint,
        limits=Limits(**limits),
        token_file=token_file,
        tls=_tls_files(tls_cert, tls_key, tls_client_ca),
        insecure_public=insecure_public,
    )
    json_logs = as_json if log_format is None else log_format == "json"
    configure(json_logs)
    # Before the model is loaded, so that what is wrong here shows at once.
    options.access()
    options = dataclasses.replace(options, limits=make_room(options.limits))

    def announce(server: Server | Supervisor) -> None:
        if as_json:
            place = {"host": server.address[0], "port": server.address[1]}
            at = place if unix_socket is None else {"unix_socket": str(unix_socket)}
            line = json_lines.dumps({"event": "listening", "url": server.url, "model": server.name, **at})
        else:
            line = f"serving {server.name} on {server.url}"
        click.echo(line)
        sys.stdout.flush()

    if workers > 1:
        from lepton_xla.serve.processes.supervisor import Supervisor

        processes = Supervisor(path, options, workers, json_logs=json_logs)
        finished = processes.run(on_ready=announce)
    else:
        from lepton_xla.compiler import load
        from lepton_xla.serve.runtime import run_on_calling_thread

        run_on_calling_thread()
        finished = Server(load(path), options).run(on_ready=announce)
    if as_json:
        click.echo(json_lines.dumps({"event": "stopped", "all_answered": finished}))
    if not finished:
        sys.exit(1)


def _tls_files(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    from lepton_xla.serve.access.tls import TlsFiles

    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise ServeError("TLS needs both --tls-cert and --tls-key")
    return TlsFiles(cert, key, client_ca)
