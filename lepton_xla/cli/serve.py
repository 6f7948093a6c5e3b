"""`leptonx serve`: serves an artifact, or a repository of models, over HTTP."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json as json_lines
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import ServeError
from lepton_xla.serve.limits import Limits

if TYPE_CHECKING:
    from lepton_xla.serve.access.tls import TlsFiles
    from lepton_xla.serve.processes.supervisor import Supervisor
    from lepton_xla.serve.server import Server


def _twin(flag: str) -> str:
    """Environment variable of a flag: `LEPTON_MAX_DELAY_US` for `--max-delay-us`."""
    return "LEPTON_" + flag.partition("/")[0].lstrip("-").replace("-", "_").upper()


def _option(flag: str, default: Any, text: str, **kwargs: Any) -> Callable[[Any], Any]:
    """An option that shows its default and its environment variable in the help."""
    kwargs.setdefault("show_default", True)
    return click.option(flag, default=default, envvar=_twin(flag), show_envvar=True, help=text, **kwargs)


def _file_option(flag: str, text: str) -> Callable[[Any], Any]:
    """An option for a file that protects the server; its environment variable may not be set to an empty text."""

    def check(context: click.Context, option: click.Parameter, value: Path | None) -> Path | None:
        if value is None and _twin(flag) in os.environ:
            raise click.BadParameter(f"the environment variable {_twin(flag)} is empty", context, option)
        return value

    return _option(flag, None, text, type=click.Path(path_type=Path), show_default=False, callback=check)


def _limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each field of `Limits`."""
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
    "Address to listen on, or a host name, such as localhost, to listen on all its addresses. The default is "
    "reachable from this machine only.",
)
@_option("--port", 8000, "Port to listen on; 0 picks a free one.", type=click.IntRange(0, 65535))
@_option(
    "--unix-socket",
    None,
    "Listen on this Unix socket instead of host and port, for a proxy on the same machine. The umask decides who may "
    "connect. A stale socket file is replaced; the file is removed at exit.",
    type=click.Path(path_type=Path),
    show_default=False,
)
@_option(
    "--workers",
    1,
    "Server processes, each with its own copy of the model, plus one that supervises them. Use it on the CPU for "
    "small models, if one core is busy with requests while others are idle. 1 runs everything in one process.",
    type=click.IntRange(1, 64),
)
@_option("--name", None, "Model name in the URL.", show_default="the artifact's own")
@_option(
    "--explicit",
    False,
    "Load models of a repository only when a client asks for them. Without it all are loaded, and the repository is "
    "watched: what is pushed to it is loaded beside what serves, takes its place, and the old is freed.",
    is_flag=True,
    show_default=False,
)
@click.option(
    "--load",
    multiple=True,
    metavar="NAME",
    envvar=_twin("--load"),
    show_envvar=True,
    help="With --explicit or --memory: a model to load at the start. May be repeated.",
)
@_option(
    "--memory",
    None,
    "Bytes that the models of a repository may take together of each device, such as 4GiB. Each is then loaded when it "
    "is first asked for, and the one that was asked for least of late goes for it. Pinned models stay (model.toml). "
    "Each of --workers has its part.",
    metavar="BYTES",
    callback=_common.parse_bytes,
    show_default="all models are loaded",
)
@_option(
    "--load-wait-s",
    10.0,
    "With --memory: seconds that a request waits for its model; after it 503.",
    type=click.FloatRange(0, min_open=True),
)
@_file_option(
    "--audit-log",
    "Append who loaded and unloaded which version of a repository to this file, one JSON object per line.",
)
@_option(
    "--repository-poll-s",
    1.0,
    "Seconds between two looks at a repository.",
    type=click.FloatRange(0, min_open=True),
)
@_option("--server-name", "lepton_xla", 'Name that the server reports; some clients expect "triton".')
@_option(
    "--max-delay-us",
    0,
    "Microseconds that a request may wait for others to share its batch while the model is idle. With 0 it never "
    "waits: requests that arrive while a batch runs form the next one.",
    type=click.IntRange(0),
)
@_option(
    "--max-queue-rows",
    4096,
    "Maximum number of queued rows; further requests get 503 with Retry-After. Also the maximum rows of one request.",
    type=click.IntRange(1),
)
@_option(
    "--max-queue-bytes",
    256 << 20,
    "Maximum bytes of queued requests; further requests get 503 with Retry-After.",
    type=click.IntRange(1),
)
@_option(
    "--default-timeout-s",
    None,
    "Timeout in seconds for requests that give none; after it they get 504.",
    type=click.FloatRange(0, min_open=True),
    show_default="never",
)
@_option(
    "--max-timeout-s",
    None,
    "Maximum timeout of a request, in seconds; longer ones are reduced to it.",
    type=click.FloatRange(0, min_open=True),
    show_default="no bound",
)
@_option(
    "--priority-levels",
    3,
    "Number of priority levels. Requests choose one by the parameter priority, 1 is the highest; the default is the "
    "middle one.",
    type=click.IntRange(1),
)
@_option(
    "--compress-bytes",
    4096,
    "Compress answers of at least this size for clients that accept it.",
    type=click.IntRange(0),
)
@_option(
    "--lame-duck-s",
    0.0,
    "Seconds after SIGTERM during which the server reports not ready but still accepts connections: the time a load "
    "balancer needs to notice.",
)
@_option("--stop-timeout-s", 30.0, "Seconds after that to finish accepted requests; the rest get 503.")
@_file_option(
    "--token-file",
    "Require a token of this file on every route except health checks; see `leptonx token create`. Reloaded when it "
    "changes, and on SIGHUP.",
)
@_file_option("--tls-cert", "Serve TLS with this certificate chain (PEM). Reloaded when it changes, and on SIGHUP.")
@_file_option("--tls-key", "Private key of --tls-cert (PEM, not encrypted).")
@_file_option("--tls-client-ca", "Mutual TLS: accept only clients with a certificate from these CAs (PEM).")
@_file_option(
    "--trust",
    "Refuse artifacts that no key of this file or folder of public keys signed; see `leptonx sign`; and, in a "
    "repository, what was signed before a lower version. Read again with each artifact.",
)
@click.option(
    "--decrypt-key",
    type=click.Path(path_type=Path),
    help="Private key that decrypts the artifact; see `leptonx encrypt`. By default what the environment variable "
    "LEPTON_DECRYPT_KEY holds: the key itself, or the path of its file.",
)
@_option(
    "--insecure-public",
    False,
    "Allow listening on an address that other machines can reach without --token-file or --tls-client-ca.",
    is_flag=True,
    show_default=False,
)
@_limit_options
@_option(
    "--access-log-sample",
    0.0,
    "Fraction of requests to log, such as 0.01; 0 logs none.",
    type=click.FloatRange(0, 1),
)
@_option(
    "--alerts",
    None,
    "Alert rules (TOML), such as 'p99 > 50ms for 2m' or 'accuracy < 0.95 over 1000'; see `leptonx alerts --help`. "
    "Alerts are logged, sent to the webhooks of the file, and shown at /v2/alerts.",
    type=click.Path(path_type=Path),
    show_default=False,
)
@_option(
    "--certificate-rollback",
    False,
    "Of a repository: when feedback speaks against what a version's certificate promises, move the label 'stable' back "
    "to the version before. Without it, an alert says so.",
    is_flag=True,
)
@_option(
    "--monitor/--no-monitor",
    True,
    "Compare what is asked and answered with the profile in the artifact (drift), and keep answers for feedback.",
)
@_option(
    "--samples",
    None,
    "Keep requests that have an id in this folder, with their answers and the feedback that comes for them, for "
    "`leptonx learn`. At most 1 GiB and a week of each model; which fields, and how long, is in model.toml.",
    type=click.Path(path_type=Path),
    metavar="DIR",
    show_default=False,
)
@_option(
    "--samples-rate",
    1.0,
    "With --samples: share of the requests with an id to keep.",
    type=click.FloatRange(0, 1),
)
@_option(
    "--otel-endpoint",
    None,
    "Trace requests with OpenTelemetry and send spans to this collector by OTLP over HTTP. Samplers, headers and so "
    "on come from the standard OTEL_ variables. Needs lepton-xla[otel].",
    show_default="the value of OTEL_EXPORTER_OTLP_ENDPOINT",
)
@_option(
    "--log-format",
    None,
    "Format of the log on stderr, one line per event.",
    type=click.Choice(["text", "json"]),
    show_default="text, or json with --json",
)
@click.option("--json", "as_json", is_flag=True, help="Print events and log lines as JSON, one object per line.")
def serve(
    path: str,
    *,
    workers: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    log_format: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Serve the artifact at PATH, or all models of a repository at PATH, over HTTP.

    The protocol is the Open Inference Protocol v2, so the clients of Triton and KServe work. The server batches
    requests of several clients into the sizes that the artifact was compiled for.

    \b
      leptonx serve digits.lepton --port 8000
      curl localhost:8000/v2/models/digits               describes inputs and outputs
      curl localhost:8000/v2/models/digits/infer -d '{"inputs": [{"name": "image", "datatype": "FP32",
           "shape": [1, 64], "data": [...]}]}'
      curl localhost:8000/metrics                        Prometheus

    A repository is a folder MODELS/NAME/VERSION.lepton, as `leptonx repo push` makes it. MODELS/NAME/model.toml says
    which versions are loaded and what the labels stand on. A request names a version, a label, or neither:

    \b
      leptonx serve MODELS/
      curl localhost:8000/v2/models/digits/versions/4
      curl localhost:8000/v2/models/digits/labels/canary
      curl -X POST localhost:8000/v2/repository/index    says what is loaded, and why something is not

    Prints the address when it accepts requests. On SIGTERM or SIGINT it answers accepted requests and exits with 0, or
    with 1 if --stop-timeout-s passes first. A second signal stops it at once.
    """
    # Imported here so that `--help` stays fast.
    from lepton_xla.serve.app.options import Options
    from lepton_xla.serve.http.files import make_room
    from lepton_xla.serve.observe.logs import configure
    from lepton_xla.serve.runtime import keep_memory, leave, run_on_calling_thread

    # Ignored until the server's own handler (reload files) is installed: an early SIGHUP must not end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    limits = Limits(**{field.name: settings.pop(field.name) for field in dataclasses.fields(Limits)})
    # All other flags have the names of fields of `Options`.
    options = Options(limits=limits, tls=_tls_files(tls_cert, tls_key, tls_client_ca), **settings)
    json_logs = as_json if log_format is None else log_format == "json"
    configure(json_logs)
    # Before the model is loaded, so that errors show at once.
    options.access()
    options = dataclasses.replace(options, limits=make_room(options.limits))

    def announce(server: Server | Supervisor) -> None:
        if as_json:
            place = {"host": server.address[0], "port": server.address[1]}
            at = place if options.unix_socket is None else {"unix_socket": str(options.unix_socket)}
            line = json_lines.dumps({"event": "listening", "url": server.url, "model": server.name, **at})
        else:
            line = f"serving {server.name or 'no model yet'} on {server.url}"
        click.echo(line)
        sys.stdout.flush()

    repository = is_repository(path)
    if repository and options.name is not None:
        raise ServeError("--name is for one artifact; the models of a repository are called as their folders are")
    if options.memory is not None and not repository:
        raise ServeError(f"--memory is for a repository of models, and {path} is none")
    if options.explicit and not repository:
        raise ServeError(f"--explicit is for a repository of models, and {path} is none")
    server: Server | None = None
    if workers > 1:
        from lepton_xla.serve.processes.supervisor import Supervisor

        processes = Supervisor(
            "" if repository else path, options, workers,
            json_logs=json_logs, repository=path if repository else None,
        )  # fmt: skip
        finished = processes.run(on_ready=announce)
    else:
        if options.memory is None:
            keep_memory()
        run_on_calling_thread()
        if repository:
            from lepton_xla.serve.server import Server

            server = Server(options=options, repository=path)
        else:
            from lepton_xla.compiler import load

            # Beside the import of what serves: most of loading waits for no Python.
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                loading = pool.submit(load, path, trust=options.trust, decrypt_key=options.decrypt_key)
                from lepton_xla.serve.server import Server

                servable = loading.result()
            server = Server(servable, options)
        finished = server.run(on_ready=announce)
    if as_json:
        click.echo(json_lines.dumps({"event": "stopped", "all_answered": finished}))
    if server is not None and server.loading:
        leave(0 if finished else 1)
    if not finished:
        sys.exit(1)


def is_repository(path: str) -> bool:
    """Whether a path is a folder of models: neither an artifact, nor one that is damaged or missing."""
    if "://" in path:
        return not path.rstrip("/").endswith(".lepton")
    folder = Path(path)
    return folder.is_dir() and folder.suffix != ".lepton" and not (folder / "manifest.json").exists()


def _tls_files(cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    from lepton_xla.serve.access.tls import TlsFiles

    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        raise ServeError("TLS needs both --tls-cert and --tls-key")
    return TlsFiles(cert, key, client_ca)
