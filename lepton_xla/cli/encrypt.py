"""`leptonx encrypt`: writes an encrypted copy of an artifact."""

from __future__ import annotations

import click

from lepton_xla.cli import _common


@click.command()
@click.argument("path")
@click.argument("target")
@click.option(
    "--to",
    "recipients",
    required=True,
    multiple=True,
    type=click.Path(),
    help="File of the public key of somebody who may load it, see `leptonx keys new --for encryption`. Repeatable.",
)
@_common.overwrite_option
@_common.json_option
def encrypt(path: str, target: str, *, recipients: tuple[str, ...], overwrite: bool, as_json: bool) -> None:
    """Write an encrypted copy of the artifact at PATH to TARGET.

    Everything is encrypted but the programs, the executables and the manifest, with AES-256-GCM. The copy is not
    signed, even if PATH is; encryption does not say who made it, so sign it as well.

    \b
      leptonx keys new server --for encryption
      leptonx encrypt digits.lepton sealed.lepton --to server.pub
      leptonx sign sealed.lepton --key release.key
      leptonx serve sealed.lepton --trust release.pub --decrypt-key server.key
    """
    with _common.progress() as step:
        step(f"encrypt {path}")
        from lepton_xla.compiler import encrypt as encrypt_files

        manifest = encrypt_files(path, target, to=recipients, overwrite=overwrite)
    assert manifest.encryption is not None
    names = [each.key for each in manifest.encryption.recipients]
    if as_json:
        _common.print_json({"path": target, "recipients": names})
    else:
        _common.show(f"{target}: encrypted for {', '.join(name[:16] for name in names)}")
