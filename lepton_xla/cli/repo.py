"""`leptonx repo`: pushes artifacts into a repository of models, and moves labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lepton_xla.cli import _common, _repositories

if TYPE_CHECKING:
    from lepton_xla.serve.client.repository import RepositoryClient
    from lepton_xla.serve.models.repository import Repository

_label_option = click.option("--label", default="stable", show_default=True, help="The label to move.")


@click.group()
def repo() -> None:
    """Push artifacts into a repository of models, and say which version answers.

    A repository is a folder, MODELS/NAME/VERSION.lepton, which `leptonx serve MODELS` serves and watches; or the URL of
    a server that does, whose tokens must have the scope admin; or a prefix such as gs://bucket/models. A version
    appears whole or not at all, whatever happens to the process that pushes it. A request that names no version is
    answered by the one that the label `stable` stands on; without that label, by the greatest.

    \b
      leptonx repo push MODELS digits.lepton                     copies it, as the next version
      leptonx repo push MODELS digits.lepton --promote canary    and moves a label to it
      leptonx repo list MODELS
      leptonx repo promote MODELS digits 4                       `stable` now stands on version 4
      leptonx repo promote URL digits 4 --wait 1m                and the server answers by it, or exit code 2
      leptonx repo rollback MODELS digits                        and again on the one before
      leptonx repo remove MODELS digits 2
      leptonx repo push http://127.0.0.1:8000 digits.lepton      into the repository of a server; goes on where it ended

    MODELS/NAME/model.toml, which you may write, says what is loaded:

    \b
      versions = "latest:2"     the two greatest; or "all", or ["3", "4"]; always those with a label
      [labels]
      stable = "3"
      [serving]
      weight = 2.0              share of device time beside other models
    """


@_repositories.subcommand(repo, "push")
@click.argument("artifact")
@click.option("--name", help="Name in the repository; by default the artifact's own.")
@click.option("--version", help="A version that is not there yet; by default one more than the greatest.")
@click.option("--promote", "label", metavar="LABEL", help="Then move this label to it, such as stable or canary.")
@_repositories.wait_option
@_repositories.audited("push")
def push(
    repository: Repository | RepositoryClient,
    artifact: str,
    *,
    name: str | None,
    version: str | None,
    label: str | None,
    wait: str | None,
    as_json: bool,
) -> str:
    """Copy ARTIFACT into MODELS as a new version, checking every file against its digest."""
    return _repositories.push(repository, artifact, name=name, version=version, label=label, wait=wait, as_json=as_json)


@_repositories.subcommand(repo, "list")
def list_models(repository: Repository | RepositoryClient, *, as_json: bool) -> None:
    """List the models and versions in MODELS, which of them are to be loaded, and where labels stand."""
    documents = _repositories.listed(repository)
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
    _common.show(_common.table("", columns, rows), *problems, *ignored)


@_repositories.subcommand(repo, "promote")
@click.argument("name")
@click.argument("version")
@_label_option
@_repositories.wait_option
@_repositories.audited("promote")
def promote(
    repository: Repository | RepositoryClient, name: str, version: str, *, label: str, wait: str | None, as_json: bool
) -> str:
    """Move a label of the model NAME to VERSION.

    A server that cannot load VERSION goes on with what it has; --wait tells of it.
    """
    wait_for = _repositories.waiting(repository, wait)
    stood = repository.promote(name, version, label)
    wait_for(name, version, label)
    return _tell_moved(name, label, stood, version, as_json)


@_repositories.subcommand(repo, "rollback")
@click.argument("name")
@_label_option
@_repositories.wait_option
@_repositories.audited("rollback")
def rollback(
    repository: Repository | RepositoryClient, name: str, *, label: str, wait: str | None, as_json: bool
) -> str:
    """Move a label of the model NAME back to the version that it stood on before."""
    wait_for = _repositories.waiting(repository, wait)
    stood, stands = repository.rollback(name, label)
    wait_for(name, stands, label)
    return _tell_moved(name, label, stood, stands, as_json)


@_repositories.subcommand(repo, "remove")
@click.argument("name")
@click.argument("version")
@_repositories.audited("remove")
def remove(repository: Repository | RepositoryClient, name: str, version: str, *, as_json: bool) -> str:
    """Remove VERSION of the model NAME, on which no label may stand."""
    repository.remove(name, version)
    if as_json:
        _common.print_json({"name": name, "version": version, "removed": True})
    else:
        _common.show(f"{name}: removed version {version}")
    return f"{name}/{version}"


def _tell_moved(name: str, label: str, stood: str | None, stands: str, as_json: bool) -> str:
    if as_json:
        _common.print_json({"name": name, "label": label, "stood_on": stood, "stands_on": stands})
    else:
        _common.show(_repositories.moved(name, label, stood, stands))
    return f"{name}/{stands}"
