"""`leptonx repo`: pushes artifacts into a repository of models, and moves labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import LeptonError

if TYPE_CHECKING:
    from lepton_xla.serve.models.repository import Found

_label_option = click.option("--label", default="stable", show_default=True, help="The label to move.")


@click.group()
def repo() -> None:
    """Push artifacts into a repository of models, and say which version answers.

    A repository is a folder, MODELS/NAME/VERSION.lepton, which `leptonx serve MODELS` serves and watches. A version
    appears whole or not at all, whatever happens to the process that pushes it. A request that names no version is
    answered by the one that the label `stable` stands on; without that label, by the greatest.

    \b
      leptonx repo push MODELS digits.lepton                     copies it, as the next version
      leptonx repo push MODELS digits.lepton --promote canary    and moves a label to it
      leptonx repo list MODELS
      leptonx repo promote MODELS digits 4                       `stable` now stands on version 4
      leptonx repo rollback MODELS digits                        and again on the one before
      leptonx repo remove MODELS digits 2

    MODELS/NAME/model.toml, which you may write, says what is loaded:

    \b
      versions = "latest:2"     the two greatest; or "all", or ["3", "4"]; always those with a label
      [labels]
      stable = "3"
      [serving]
      weight = 2.0              share of device time beside other models
    """


def _subcommand(name: str) -> Callable[[Callable[..., None]], click.Command]:
    return lambda function: repo.command(name)(_common.json_option(function))


@_subcommand("push")
@click.argument("models")
@click.argument("artifact")
@click.option("--name", help="Name in the repository; by default the artifact's own.")
@click.option("--version", help="A version that is not there yet; by default one more than the greatest.")
@click.option("--promote", "label", metavar="LABEL", help="Then move this label to it, such as stable or canary.")
def push(models: str, artifact: str, *, name: str | None, version: str | None, label: str | None, as_json: bool):
    """Copy ARTIFACT into MODELS as a new version, checking every file against its digest."""
    import pathlib

    from lepton_xla.serve.models.copies import listing_of
    from lepton_xla.serve.models.repository import Repository
    from lepton_xla.serve.models.settings import check_label

    if label is not None:
        check_label(label)
    with _common.progress() as step:
        step(f"push {artifact}")
        listing, _ = listing_of(pathlib.Path(artifact))
        name = listing.name if name is None else name
        repository = Repository(models)
        pushed = repository.push(artifact, name, version)
    stood = None if label is None else repository.promote(name, pushed, label)
    if as_json:
        promoted = {} if label is None else {"label": label, "stood_on": stood}
        _common.print_json({"name": name, "version": pushed, "size_bytes": listing.size_bytes, **promoted})
        return
    _common.show(f"{name}: version {pushed}, {_common.size(listing.size_bytes)}")
    if label is not None:
        _common.show(_moved(name, label, stood, pushed))


@_subcommand("list")
@click.argument("models")
def list_models(models: str, as_json: bool) -> None:
    """List the models and versions in MODELS, which of them are to be loaded, and where labels stand."""
    from lepton_xla.serve.models.repository import Repository

    documents = [_described(found) for found in Repository(models).scan().values()]
    if as_json:
        _common.print_json(documents)
        return
    rows = [
        (
            document["name"],
            version["version"],
            _common.size(version["size_bytes"]) if version["size_bytes"] is not None else "",
            version["created"],
            "yes" if version["wanted"] else "",
            " ".join(version["labels"]),
        )
        for document in documents
        for version in document["versions"]
    ]
    columns = ("model", ">version", ">size", "made", "to load", "labels")
    problems = [f"{document['name']}: {document['problem']}" for document in documents if document["problem"]]
    ignored = [
        f"{document['name']}: not versions, so ignored: {', '.join(document['ignored'])}"
        for document in documents
        if document["ignored"]
    ]
    _common.show(_common.table(models, columns, rows), *problems, *ignored)


@_subcommand("promote")
@click.argument("models")
@click.argument("name")
@click.argument("version")
@_label_option
def promote(models: str, name: str, version: str, *, label: str, as_json: bool) -> None:
    """Move a label of the model NAME to VERSION."""
    from lepton_xla.serve.models.repository import Repository

    stood = Repository(models).promote(name, version, label)
    _tell_moved(name, label, stood, version, as_json)


@_subcommand("rollback")
@click.argument("models")
@click.argument("name")
@_label_option
def rollback(models: str, name: str, *, label: str, as_json: bool) -> None:
    """Move a label of the model NAME back to the version that it stood on before."""
    from lepton_xla.serve.models.repository import Repository

    _tell_moved(name, label, *Repository(models).rollback(name, label), as_json)


@_subcommand("remove")
@click.argument("models")
@click.argument("name")
@click.argument("version")
def remove(models: str, name: str, version: str, *, as_json: bool) -> None:
    """Remove VERSION of the model NAME, on which no label may stand."""
    from lepton_xla.serve.models.repository import Repository

    Repository(models).remove(name, version)
    if as_json:
        _common.print_json({"name": name, "version": version, "removed": True})
    else:
        _common.show(f"{name}: removed version {version}")


def _tell_moved(name: str, label: str, stood: str | None, stands: str, as_json: bool) -> None:
    if as_json:
        _common.print_json({"name": name, "label": label, "stood_on": stood, "stands_on": stands})
    else:
        _common.show(_moved(name, label, stood, stands))


def _moved(name: str, label: str, stood: str | None, stands: str) -> str:
    before = "" if stood in (None, stands) else f", before {stood}"
    return f"{name}: {label} stands on version {stands}{before}"


def _described(found: Found) -> dict[str, Any]:
    from lepton_xla.serve.models.copies import listing_of

    versions: list[dict[str, Any]] = []
    problem = found.problem
    for version, path in found.versions.items():
        size_bytes, created = None, ""
        try:
            listing, _ = listing_of(path)
            size_bytes, created = listing.size_bytes, listing.created
        except LeptonError as error:
            problem = problem or f"version {version}: {error}"
        labels = [label for label, stands in found.settings.labels.items() if stands == version]
        versions.append(
            {
                "version": version,
                "size_bytes": size_bytes,
                "created": created,
                "wanted": version in found.wanted,
                "labels": labels,
            }
        )
    return {"name": found.name, "problem": problem, "ignored": found.ignored, "versions": versions}
