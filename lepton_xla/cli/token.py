"""`leptonx token`: creates, lists and revokes access tokens."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lepton_xla.cli import _common

if TYPE_CHECKING:
    from lepton_xla.serve.access.tokens import Scope, Token

_SCOPES = ("infer", "read", "admin")
_file_argument = click.argument("file", type=click.Path(path_type=Path))


@click.group()
def token() -> None:
    """Create, list and revoke the access tokens in a token file.

    A server started with --token-file requires a token from that file for every request except health checks. It
    reloads the file within a second of a change. The file holds digests, never secrets.

    \b
      leptonx token create tokens.jsonl ci --scope infer --days 90      prints the secret, once
      leptonx token create tokens.jsonl grafana --scope read
      leptonx token list tokens.jsonl
      leptonx token revoke tokens.jsonl ci
      leptonx serve digits.lepton --host 0.0.0.0 --token-file tokens.jsonl --tls-cert ... --tls-key ...
      curl -H "Authorization: Bearer $TOKEN" https://.../v2/models/digits
    """


def _subcommand(name: str) -> Callable[[Callable[..., None]], click.Command]:
    return lambda function: token.command(name)(_common.json_option(function))


@_subcommand("create")
@_file_argument
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(_SCOPES),
    help="What the token allows: infer (run models), read (metadata, statistics, metrics), admin (load, unload, "
    "settings). No scope includes another. Repeatable. By default infer and read.",
)
@click.option("--days", type=click.IntRange(1, 36_500), help="Days until it expires; by default never.")
@click.option(
    "--requests-per-s", type=click.FloatRange(0, min_open=True), help="Maximum requests per second; more get 429."
)
@click.option(
    "--burst", type=click.IntRange(1), help="Maximum requests at once after a pause. By default those of one second."
)
def create(
    file: Path,
    name: str,
    *,
    scopes: tuple[Scope, ...],
    days: int | None,
    requests_per_s: float | None,
    burst: int | None,
    as_json: bool,
) -> None:
    """Add a token NAME to FILE (created if missing) and print its secret, which is not stored anywhere."""
    from lepton_xla.serve.access.tokens import create_token

    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    expires = None if days is None else now + datetime.timedelta(days=days)
    wanted = scopes or ("infer", "read")
    secret = create_token(file, name, wanted, expires=expires, requests_per_s=requests_per_s, burst=burst)
    if as_json:
        _common.print_json({"name": name, "token": secret})
        return
    click.echo(f"the secret of {name!r} is shown only now; {file} stores its digest", err=True)
    click.echo(secret)


@_subcommand("list")
@_file_argument
def list_tokens(file: Path, as_json: bool) -> None:
    """List the tokens of FILE."""
    from lepton_xla.serve.access.tokens import read_tokens

    tokens = read_tokens(file)
    if as_json:
        _common.print_json([_described(token) for token in tokens])
        return
    rows = [_row(**_described(token)) for token in tokens]
    _common.show(_common.table(str(file), ("name", "scopes", "expires", ">requests/s", ">burst"), rows))


@_subcommand("revoke")
@_file_argument
@click.argument("name")
def revoke(file: Path, name: str, as_json: bool) -> None:
    """Remove the token NAME from FILE; a running server rejects it within a second."""
    from lepton_xla.serve.access.tokens import revoke_token

    revoke_token(file, name)
    if as_json:
        _common.print_json({"name": name, "revoked": True})
    else:
        click.echo(f"revoked {name}", err=True)


def _described(token: Token) -> dict[str, Any]:
    expires = token.expires
    return {
        "name": token.name,
        "scopes": token.scopes,
        "expires": None if expires is None else expires.isoformat(),
        "expired": expires is not None and expires <= datetime.datetime.now(datetime.UTC),
        "requests_per_s": token.requests_per_s,
        "burst": token.burst,
    }


def _row(
    *,
    name: str,
    scopes: list[str],
    expires: str | None,
    expired: bool,
    requests_per_s: float | None,
    burst: int | None,
) -> tuple[Any, ...]:
    end = f"{expires} (expired)" if expired else expires
    return name, " ".join(scopes), end or "", requests_per_s or "", burst or ""
