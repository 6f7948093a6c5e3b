"""`leptonx federate`: trains on rows that stay with their owners, simulated here or with a server and its clients."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import LeptonError

if TYPE_CHECKING:
    from lepton_xla.federated import FederatedSpec, Federation, Result, RoundReport


@click.group()
def federate() -> None:
    """Train a model on rows that stay with their owners.

    A server sends the weights to its clients; each trains on its own rows and sends back by how much its weights
    changed; the server averages. Try the settings in a simulation first, then start a server and its clients.

    \b
      leptonx federate simulate digits.py:federated --clients 10 --by-label 0.3
      leptonx federate server digits.py:federated --clients 3 -o digits.lepton
      leptonx federate client digits.py:federated --server 127.0.0.1:9092

    TARGET names a lepton_xla.federated.FederatedSpec: the model, the rows, the clients' optimizer, the settings.
    """


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that change the settings of a FederatedSpec."""
    for option in reversed(
        (
            click.option("--rounds", type=click.IntRange(1), help="Number of rounds."),
            click.option(
                "--epochs", type=click.IntRange(1), help="How often a client goes through its rows in a round."
            ),
            click.option("--batch-rows", type=click.IntRange(1), help="Rows of a client's batch."),
            click.option("--participation", type=float, help="Share of the clients that take part in a round."),
            click.option(
                "--rule",
                type=click.Choice(("average", "momentum", "adam")),
                help="How the server uses the mean of the changes: FedAvg, FedAvgM or FedAdam.",
            ),
            click.option(
                "--alpha", type=float, help="How far the weights go towards the rule's, above 0 and at most 1."
            ),
            click.option("--proximal", type=float, help="FedProx: weight of the distance to the server's weights."),
            click.option(
                "--updates",
                type=click.Choice(("float32", "int8", "int4", "int3", "top-k")),
                help="What clients send. What rounding leaves out is sent later.",
            ),
            click.option("--kept", type=float, help="With top-k: share of the changes that is sent."),
            click.option(
                "--personal",
                multiple=True,
                metavar="PATTERN",
                help="Weights whose path matches this regular expression stay with their client. Repeatable.",
            ),
            click.option(
                "--epsilon",
                type=float,
                help="Differential privacy of each row with this budget; clipping, delta and the share of rows of a "
                "step are the FederatedSpec's, or 1, 1e-5 and 0.1.",
            ),
            click.option("--seed", type=int, help="Seed of participation, orders and simulated noise."),
        )
    ):
        command = option(command)
    return command


@federate.command("simulate")
@click.argument("target")
@click.option("--clients", type=click.IntRange(1), default=10, show_default=True, help="Number of clients.")
@click.option(
    "--by-label",
    "concentration",
    type=click.FloatRange(0, min_open=True),
    metavar="ALPHA",
    help="Give clients other classes: shares are drawn from a Dirichlet distribution; 100 is nearly even, 0.1 gives "
    "most clients one or two classes. By default rows are dealt out evenly.",
)
@settings_options
@click.option("--secure", is_flag=True, help="Refuse what secure aggregation would; the sum itself is the same.")
@click.option("--checkpoint", metavar="FOLDER", help="Save the run here after each round, and go on with what is here.")
@_common.artifact_options
@_common.json_option
def simulate(
    target: str,
    *,
    clients: int,
    concentration: float | None,
    secure: bool,
    checkpoint: str | None,
    buckets: tuple[str, ...],
    output: str | None,
    overwrite: bool,
    as_json: bool,
    **changes: Any,
) -> None:
    """Train with many clients in this process, on the rows of TARGET split among them.

    Each round prints the clients whose updates were taken, the means of their training metrics, what `evaluate` of the
    FederatedSpec finds, and the bytes of all updates. A run with --checkpoint that was interrupted goes on with the
    same command, and gives the same weights.

    \b
      leptonx federate simulate digits.py:federated --clients 10
      leptonx federate simulate digits.py:federated --clients 50 --by-label 0.3 --participation 0.2
      leptonx federate simulate digits.py:federated --updates int4 -o digits.lepton
      leptonx federate simulate digits.py:federated --epsilon 8 --json
    """
    given = _common.parse_buckets(buckets)
    if output is not None:
        _common.check_free(output, overwrite=overwrite)

    from lepton_xla import federated
    from lepton_xla.cli import _models
    from lepton_xla.train import Checkpoints

    spec = _models.load_target(target, federated.FederatedSpec)
    settings = changed_settings(spec, {**changes, "secure": secure or None})
    kept = None if checkpoint is None else Checkpoints(checkpoint, every=1)
    label = None if concentration is None else spec.label
    parts = federated.partition(
        spec.table(), clients, label=label, concentration=concentration or 1.0, seed=settings.seed
    )
    with _common.progress() as step:
        step("first round")

        def report(done: RoundReport) -> None:
            step("round", done.round, settings.rounds)
            if not as_json:
                click.echo(round_line(done))

        result = federated.simulate(spec, parts, settings, checkpoint=kept, report=report)
    finish(spec, settings, result, given, output, overwrite=overwrite, as_json=as_json)


@federate.command("server")
@click.argument("target")
@click.option("--clients", type=click.IntRange(1), default=2, show_default=True, help="Clients that a round waits for.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=9092, show_default=True, help="Port to listen on.")
@click.option(
    "--folder",
    default="federation",
    show_default=True,
    metavar="FOLDER",
    help="Checkpoints and logs; the same command goes on with what is here.",
)
@click.option("--wait-s", type=float, default=600, show_default=True, help="How long to wait for the clients.")
@click.option("--round-s", type=float, default=600, show_default=True, help="How long a client may take for a round.")
@click.option(
    "--tls-cert", metavar="FILE", help="The server's certificate (PEM); without TLS only this machine connects."
)
@click.option("--tls-key", metavar="FILE", help="Its key (PEM).")
@click.option("--tls-ca", metavar="FILE", help="Certificates of the authorities that signed it (PEM).")
@settings_options
@click.option(
    "--secure", is_flag=True, help="The server learns only the sum of the updates (SecAgg+); with float32 updates."
)
@_common.artifact_options
@_common.json_option
def server(
    target: str,
    *,
    clients: int,
    host: str,
    port: int,
    folder: str,
    wait_s: float,
    round_s: float,
    tls_cert: str | None,
    tls_key: str | None,
    tls_ca: str | None,
    secure: bool,
    buckets: tuple[str, ...],
    output: str | None,
    overwrite: bool,
    as_json: bool,
    **changes: Any,
) -> None:
    """Train the model of TARGET with clients over the network, by Flower (extra `federated`).

    The settings of this FederatedSpec, and the options here, hold for all clients; its rows are not used. A client that
    vanishes, sends what does not fit or is not finite, is left out of its round, and the line of the round says so. A
    server that was killed goes on at its last round with the same command, and clients find it again.

    Each message begins with a fresh process at the client, which takes seconds: let rounds be long (--epochs).

    \b
      leptonx federate server digits.py:federated --clients 3 --rounds 3 -o digits.lepton
      leptonx federate server digits.py:federated --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem --tls-ca ca.pem
    """
    given = _common.parse_buckets(buckets)
    if output is not None:
        _common.check_free(output, overwrite=overwrite)

    from lepton_xla import federated
    from lepton_xla.cli import _models
    from lepton_xla.federated.coordination import Coordinator
    from lepton_xla.federated.flower import processes
    from lepton_xla.federated.flower.apps import checkpoints
    from lepton_xla.train.checkpoints import CheckpointFolder

    spec = _models.load_target(target, federated.FederatedSpec)
    settings = changed_settings(spec, {**changes, "secure": secure or None})
    coordinator = Coordinator(spec, settings)  # what does not fit fails before any process is started
    tls = processes.tls_of_server(host, tls_cert, tls_key, tls_ca)
    place = pathlib.Path(folder).absolute()
    reports = place / "rounds.jsonl"
    seen = len(_lines(reports))
    with _common.progress() as step:
        step(f"wait for {clients} clients")

        def watch() -> None:
            nonlocal seen
            for line in _lines(reports)[seen:]:
                done = federated.RoundReport.of(json.loads(line))
                step("round", done.round, settings.rounds)
                seen += 1
                if not as_json:
                    click.echo(round_line(done))

        config = {
            "target": _absolute(target), "settings": settings.to_json(), "folder": str(place), "clients": clients,
            "wait_s": float(wait_s), "round_s": float(round_s),
        }  # fmt: skip
        authorities = None if tls_ca is None else str(pathlib.Path(tls_ca).absolute())
        processes.run_server(place, config, host=host, port=port, tls=tls, authorities=authorities, watch=watch)
    with CheckpointFolder(checkpoints(place), coordinator.identity()) as saved:
        result = coordinator.run(lambda round_, vector: (), saved)  # all rounds are done: reads the last
    finish(spec, settings, result, given, output, overwrite=overwrite, as_json=as_json)


@federate.command("client")
@click.argument("target")
@click.option("--server", required=True, metavar="HOST:PORT", help="Where `leptonx federate server` listens.")
@click.option(
    "--folder",
    default="federation-client",
    show_default=True,
    metavar="FOLDER",
    help="What this client keeps: its own weights, what its updates left out, the privacy that it spent. One a client.",
)
@click.option("--tls-ca", metavar="FILE", help="Certificates of the authorities to trust (PEM); turns TLS on.")
@click.option("--part", metavar="K/N", help="Only the K-th of N parts of the rows, to try a federation with one file.")
@click.option("--by-label", "concentration", type=click.FloatRange(0, min_open=True), help="Parts of other classes.")
@click.option(
    "--most-epsilon",
    type=click.FloatRange(0, min_open=True),
    help="Take part only with differential privacy of at most this budget.",
)
@click.option("--own-port", type=click.IntRange(0, 65535), default=0, help="Port of Flower's node, on this machine.")
def client(
    target: str,
    *,
    server: str,
    folder: str,
    tls_ca: str | None,
    part: str | None,
    concentration: float | None,
    most_epsilon: float | None,
    own_port: int,
) -> None:
    """Take part in a federation with the rows of TARGET, until this process is ended.

    Only updates leave this machine, and with differential privacy they say no more of a row than the budget allows;
    this client keeps count of it, whatever the server says. The app that Flower runs here is the one that the server
    sends: two lines that call the installed lepton_xla. Connect only to servers that you trust to send no other.

    \b
      leptonx federate client digits.py:federated --server 127.0.0.1:9092 --folder one --part 1/3
      leptonx federate client mine.py:federated --server fed.example:9092 --tls-ca ca.pem
    """
    from lepton_xla import federated
    from lepton_xla.cli import _models
    from lepton_xla.federated.flower import processes
    from lepton_xla.federated.members import Member
    from lepton_xla.federated.partitions import part_of

    spec = _models.load_target(target, federated.FederatedSpec)
    Member(spec, folder)  # what does not fit fails here
    if part is not None:
        part_of(spec.table(), part, spec.label, concentration or 0.0)
    place = pathlib.Path(folder).absolute()
    config: dict[str, str | float] = {"target": _absolute(target), "folder": str(place)}
    config |= {} if part is None else {"part": part}
    config |= {} if concentration is None else {"concentration": float(concentration)}
    config |= {} if most_epsilon is None else {"most_epsilon": float(most_epsilon)}
    authorities = None if tls_ca is None else str(pathlib.Path(tls_ca).absolute())
    with _common.progress() as step:
        step(f"take part at {server} until this is ended; log: {place / 'supernode.log'}")
        code = processes.run_client(place, server, authorities, config, own_port)
    if code:
        raise LeptonError(f"Flower's node ended with code {code}; see {place / 'supernode.log'}")


def _absolute(target: str) -> str:
    """A target that other processes find from anywhere."""
    path, colon, name = target.rpartition(":")
    return f"{pathlib.Path(path).absolute()}{colon}{name}" if path.endswith(".py") else target


def _lines(path: pathlib.Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def changed_settings(spec: FederatedSpec, changes: dict[str, Any]) -> Federation:
    """The settings of a FederatedSpec with what the command line says."""
    from lepton_xla.federated import Privacy

    found = {name: value for name, value in changes.items() if value not in (None, ())}
    epsilon = found.pop("epsilon", None)
    if epsilon is not None:
        own = spec.federation.privacy or Privacy()
        found["privacy"] = Privacy(epsilon, own.delta, own.clip_norm, own.share, own.noise)
    return spec.federation.replace(**found)


def finish(
    spec: FederatedSpec,
    settings: Federation,
    result: Result,
    buckets: dict[str, tuple[int, ...]],
    output: str | None,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write the artifact, and say what came out."""
    document: dict[str, Any] = {
        "rounds": [each.to_dict() for each in result.rounds],
        "epsilon": result.epsilon,
        "noise": result.noise,
        "weights_bytes": result.program.weights_bytes,
    }
    if output is not None:
        from lepton_xla import compiler
        from lepton_xla.compiler.names import check_name

        name = check_name(pathlib.PurePath(output).name.removesuffix(".lepton"))
        sizes = dict.fromkeys(result.program.symbols, (1, 8, 32)) | {**spec.buckets, **buckets}
        compiler.compile(result.program, sizes, name=name).save(output, overwrite=overwrite)
        document["path"] = output
    if as_json:
        _common.print_json(document)
        return
    if result.epsilon is not None:
        click.echo(
            f"privacy of each row: epsilon {result.epsilon:.3g}, noise {result.noise:.3g} times the clipping norm"
        )
    if output is not None:
        click.echo(f"wrote {output}")
        if settings.personal:
            click.echo("  the weights that stay with the clients have their first values in it", err=True)


def round_line(done: RoundReport) -> str:
    """A round for people."""
    figures = [f"{name} {value:.4g}" for name, value in done.metrics.items()]
    figures += [f"evaluation {name} {value:.4g}" for name, value in done.evaluation.items()]
    spent = [] if done.epsilon is None else [f"epsilon {done.epsilon:.3g}"]
    refused = [f"{len(done.refused)} refused ({next(iter(done.refused.values()))})"] if done.refused else []
    parts = [f"{done.clients} clients", *refused, *figures, f"{_common.size(done.bytes_up)} sent", *spent]
    return f"round {done.round}: {', '.join(parts)}"
