"""`leptonx rollout`: has a new version take the place of the stable one, in stages and as long as it does well."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import click

from lepton_xla import toml
from lepton_xla.cli import _common, _repositories, _traffic
from lepton_xla.errors import RepositoryError

if TYPE_CHECKING:
    from lepton_xla.serve.client.repository import RepositoryClient
    from lepton_xla.serve.models.repository import Repository


@click.group()
def rollout() -> None:
    """Have a new version take the place of the one that `stable` stands on: in stages, as long as it does well.

    MODELS is the folder of a repository, which a server watches, or the URL of that server, whose tokens must have the
    scope admin. The server decides; each decision is in its audit log.

    \b
      leptonx rollout start MODELS digits 4
      leptonx rollout start MODELS digits 4 --stage shadow=0.2:200 --stage 0.05:500 --stage 0.5:2000
      leptonx rollout start MODELS digits 4 --rollback "p99 > stable * 2" --promote "accuracy > stable - 1% surely"
      leptonx rollout show MODELS digits
      leptonx rollout stop MODELS digits                   the stable version answers all again

    A stage is SHARE:ANSWERS, or shadow=FRACTION:ANSWERS. A rule is a condition of `leptonx alerts` about the new
    version, in which `stable` stands for the other's value, and `surely` asks for evidence instead of a window.
    """


@_repositories.subcommand(rollout, "start")
@click.argument("name")
@click.argument("version")
@click.option("--file", "path", metavar="FILE", help="TOML with stages and rules, as the server takes them in JSON.")
@click.option("--stage", "stages", multiple=True, metavar="SHARE:ANSWERS", help="A stage; several in their order.")
@click.option("--rollback", multiple=True, metavar="RULE", help="Goes back as soon as it holds.")
@click.option("--promote", multiple=True, metavar="RULE", help="Must hold after the last stage.")
@click.option("--sticky", help="Header by which clients stay at one version, or `id`.")
def start(
    repository: Repository | RepositoryClient,
    name: str,
    version: str,
    *,
    path: str | None,
    stages: tuple[str, ...],
    rollback: tuple[str, ...],
    promote: tuple[str, ...],
    sticky: str | None,
    as_json: bool,
) -> None:
    """Begin to send requests for the model NAME to VERSION."""
    asked: dict[str, Any] = {} if path is None else _read(path)
    asked["version"] = version
    if stages:
        asked["stages"] = [_stage(text) for text in stages]
    for key, given in (("rollback", rollback), ("promote", promote)):
        if given:
            asked[key] = list(given)
    if sticky is not None:
        asked["sticky"] = sticky
    _show(name, _traffic.started(repository, name, asked), as_json)


@_repositories.subcommand(rollout, "show")
@click.argument("name")
def show(repository: Repository | RepositoryClient, name: str, *, as_json: bool) -> None:
    """Show how far the last rollout of the model NAME is, and what was decided."""
    _show(name, _traffic.rollout_of(repository, name), as_json)


@_repositories.subcommand(rollout, "stop")
@click.argument("name")
def stop(repository: Repository | RepositoryClient, name: str, *, as_json: bool) -> None:
    """Stop the rollout of the model NAME: the stable version answers all requests again."""
    _show(name, _traffic.stopped(repository, name), as_json)


def _read(path: str) -> dict[str, Any]:
    try:
        return toml.parsed(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise RepositoryError("invalid", f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise RepositoryError("invalid", f"{path}: {error}") from error


def _stage(text: str) -> dict[str, Any]:
    """Read a stage: `0.05:500`, or `shadow=0.2:200`.

    >>> _stage("shadow=0.2:200"), _stage("0.05:500")
    ({'shadow': 0.2, 'answers': 200}, {'share': 0.05, 'answers': 500})
    """
    amount, _, answers = text.partition(":")
    key = "shadow" if amount.startswith("shadow=") else "share"
    try:
        return {key: float(amount.removeprefix("shadow=")), "answers": int(answers)}
    except ValueError:
        raise click.UsageError(f"stage {text!r}: expected SHARE:ANSWERS, such as 0.05:500 or shadow=0.2:200") from None


def _show(name: str, document: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _common.print_json(document)
        return
    stages = document["plan"]["stages"]
    at = f", stage {document['stage'] + 1} of {len(stages)}" if document["state"] in ("shadow", "canary") else ""
    line = (
        f"{name}: version {document['version']} for {document['stable']}: {document['state']}{at}, "
        f"{document['share']:.4g} of the requests"
    )
    rows = [
        (
            each["time"],
            each["who"],
            each["state"],
            each["stage"] + 1,
            each["reason"],
            " ".join(f"{key}={value:.4g}" for key, value in each["figures"].items() if value is not None),
        )
        for each in document["decisions"]
    ]
    columns = ("time", "who", "state", ">stage", "reason", "figures")
    _common.show(line, document["reason"], _common.table("", columns, rows))
