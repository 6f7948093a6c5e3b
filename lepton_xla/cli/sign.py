"""`leptonx sign`: signs an artifact."""

from __future__ import annotations

import click

from lepton_xla.cli import _common


@click.command()
@click.argument("path")
@click.option("--key", required=True, type=click.Path(), help="File of the private key, see `leptonx keys new`.")
@_common.json_option
def sign(path: str, *, key: str, as_json: bool) -> None:
    """Sign the artifact at PATH: check all its files and write PATH/model.sig. Replaces an earlier signature.

    The format is that of OpenSSF Model Signing, so `model_signing verify key` checks it too.

    \b
      leptonx keys new release
      leptonx sign digits.lepton --key release.key
      leptonx verify digits.lepton --key release.pub
    """
    with _common.progress() as step:
        step(f"sign {path}")
        from lepton_xla.compiler import sign as sign_files

        signer = sign_files(path, key=key)
    if as_json:
        _common.print_json({"path": path, "key": signer})
    else:
        _common.show(f"{path}: signed by the key {signer[:16]}")
