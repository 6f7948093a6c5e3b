"""`leptonx keys`: makes key pairs that sign artifacts, or that artifacts are encrypted for."""

from __future__ import annotations

from typing import Literal

import click

from lepton_xla.cli import _common


@click.group()
def keys() -> None:
    """Make key pairs that sign artifacts, or that artifacts are encrypted for.

    Keep NAME.key secret. Give NAME.pub to whoever verifies signatures, or encrypts for you.

    \b
      leptonx keys new release                          release.key signs, release.pub verifies
      leptonx sign digits.lepton --key release.key
      leptonx serve digits.lepton --trust release.pub
      leptonx keys new server --for encryption
      leptonx encrypt digits.lepton sealed.lepton --to server.pub
      leptonx serve sealed.lepton --decrypt-key server.key
    """


@keys.command("new")
@click.argument("name", type=click.Path())
@click.option(
    "--for",
    "purpose",
    type=click.Choice(["signing", "encryption"]),
    default="signing",
    show_default=True,
    help="signing: an ECDSA key on the curve P-256. encryption: an X25519 key.",
)
@_common.json_option
def new(name: str, *, purpose: Literal["signing", "encryption"], as_json: bool) -> None:
    """Write NAME.key, the private key, and NAME.pub, the public one. Existing files are never replaced."""
    from lepton_xla.trust import create_keys

    private, public = create_keys(name, purpose)
    if as_json:
        _common.print_json({"private": str(private), "public": str(public), "purpose": purpose})
    else:
        _common.show(f"{private} is the private key, keep it secret; {public} is the public one")
