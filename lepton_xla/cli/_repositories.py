"""Repositories of models for the commands: in a folder, or of a running server."""

from __future__ import annotations

import functools
import getpass
import os
import pathlib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common
from lepton_xla.errors import ArtifactError, LeptonError, ServeError
from lepton_xla.files.copies import listing_of

if TYPE_CHECKING:
    from lepton_xla.serve.client.repository import RepositoryClient
    from lepton_xla.serve.models.repository import Repository

_URL = re.compile(r"https?(\+unix)?://", re.IGNORECASE)


def subcommand(group: click.Group, name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command of a group whose first argument MODELS is a repository, which its function gets opened."""

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(models: str, token_file: str | None, tls_ca: str | None, **rest: Any) -> None:
            function(opened(models, token_file, tls_ca), **rest)

        return group.command(name)(click.argument("models")(_common.json_option(server_options(run))))

    return decorate


def audited(action: str) -> Callable[[Callable[..., str]], Callable[..., None]]:
    """Adds `--audit-log` to a command that changes a repository; its function gives what it has changed.

    Args:
        action: as the audit log calls it.
    """

    def decorate(function: Callable[..., str]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(repository: Repository | RepositoryClient, *, audit_log: str | None, **rest: Any) -> None:
            if audit_log is None:
                function(repository, **rest)
                return
            from lepton_xla.serve.models.repository import Repository
            from lepton_xla.serve.observe.audit import Audit

            if not isinstance(repository, Repository):
                raise ServeError("--audit-log is for a folder: a server keeps its own, see `leptonx serve --audit-log`")
            audit, who = Audit(audit_log), _user()
            details = {"label": rest["label"]} if rest.get("label") else {}
            try:
                target = function(repository, **rest)
            except LeptonError as error:
                named = rest.get("name") or rest.get("artifact", "")
                audit.record(who, action, named, "refused", reason=str(error), **details)
                raise
            audit.record(who, action, target, "done", **details)

        return click.option(
            "--audit-log", metavar="FILE", help="Append who changed what to this file, as `leptonx serve` does."
        )(run)

    return decorate


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())


def server_options(function: Callable[..., None]) -> Callable[..., None]:
    """Options of a command that may ask a server."""
    function = click.option("--tls-ca", metavar="FILE", help="Certificates (PEM) to trust, for a server.")(function)
    return click.option(
        "--token-file", metavar="FILE", help="File with the token for a server. By default $LEPTON_TOKEN."
    )(function)


def opened(models: str, token_file: str | None, tls_ca: str | None) -> Repository | RepositoryClient:
    """The repository in a folder, or of the server at a URL."""
    if _URL.match(models):
        from lepton_xla.serve.client.repository import RepositoryClient

        return RepositoryClient(models, token_file=token_file, tls_ca=tls_ca, timeout_s=120.0)
    from lepton_xla.serve.models.remote import open_repository

    return open_repository(models)


wait_option = click.option(
    "--wait",
    metavar="DURATION",
    help="Until a server answers by it, at most this long, such as 30s; or exit with 2. Not for a server that loads "
    "models when they are asked for.",
)


def waiting(repository: Repository | RepositoryClient, wait: str | None) -> Callable[[str, str, str | None], None]:
    """What waits until a version of a model answers, and for a label if one is given; nothing is waited for without it.

    Raises:
        ServeError: if the repository is a folder.
    """
    from lepton_xla.serve.models.repository import Repository

    if wait is None:
        return lambda name, version, label: None
    if isinstance(repository, Repository):
        raise ServeError("--wait is for a server, which loads what is pushed: give its URL")
    seconds = _common.duration(wait, "--wait")
    repository.index()  # refused before anything is changed, for a token that may not read
    return functools.partial(repository.wait, seconds=seconds)


def listed(repository: Repository | RepositoryClient) -> list[dict[str, Any]]:
    """The models of a repository as plain JSON."""
    from lepton_xla.serve.models.repository import Repository

    return repository.describe() if isinstance(repository, Repository) else repository.models()


def push(
    repository: Repository | RepositoryClient,
    artifact: str,
    *,
    name: str | None,
    version: str | None,
    label: str | None,
    wait: str | None,
    as_json: bool,
    only_weights: bool = False,
) -> str:
    """Push an artifact, promote it if a label is given, and tell what was done.

    Returns:
        The model and the version.

    Raises:
        ArtifactError: if it is damaged, or not of weights alone if that is asked for.
    """
    from lepton_xla.serve.models.repository import Repository
    from lepton_xla.serve.models.settings import check_label

    if label is not None:
        check_label(label)
    wait_for = waiting(repository, wait)
    with _common.progress() as step:
        step(f"push {artifact}")
        listing, _ = listing_of(pathlib.Path(artifact))
        if only_weights and not listing.is_update:
            raise ArtifactError(
                f"{artifact} is a whole artifact: push it with leptonx repo push, or make one of its weights with "
                "leptonx weights make"
            )
        name = listing.name if name is None else name
        if isinstance(repository, Repository):
            pushed = repository.push(artifact, name, version)
        else:
            tell = lambda sent, total: step(f"push {artifact}: {100 * sent // max(total, 1)} %")  # noqa: E731
            pushed = repository.push(artifact, name, version, tell)
    try:
        stood = None if label is None else repository.promote(name, pushed, label)
    except LeptonError as error:  # or it is pushed again
        raise LeptonError(f"{name}: version {pushed} is pushed, and {label!r} was not moved to it: {error}") from error
    wait_for(name, pushed, label)
    if as_json:
        promoted = {} if label is None else {"label": label, "stood_on": stood}
        _common.print_json({"name": name, "version": pushed, "size_bytes": listing.size_bytes, **promoted})
        return f"{name}/{pushed}"
    _common.show(f"{name}: version {pushed}, {_common.size(listing.size_bytes)}")
    if label is not None:
        _common.show(moved(name, label, stood, pushed))
    return f"{name}/{pushed}"


def moved(name: str, label: str, stood: str | None, stands: str) -> str:
    """Where a label stands, as text."""
    before = "" if stood in (None, stands) else f", before {stood}"
    return f"{name}: {label} stands on version {stands}{before}"
