"""`leptonx verify`: checks every file of an artifact against its digest, and the signature against a key."""

from __future__ import annotations

import click

from lepton_xla.cli import _common


@click.command()
@click.argument("path")
@click.option(
    "--key",
    type=click.Path(),
    help="Also check that this public key, or one of this folder of public keys, signed the artifact with all its "
    "files.",
)
@_common.json_option
def verify(path: str, *, key: str | None, as_json: bool) -> None:
    """Check the size and SHA-256 of every file of the artifact at PATH. Executes nothing.

    Exit code 0 if all files are intact; else 2, with the name of the first bad file.

    \b
      leptonx verify digits.lepton
      leptonx verify digits.lepton --key release.pub
      leptonx verify gs://models/digits.lepton --json
    """
    with _common.progress() as step:
        step(f"verify {path}")
        import msgspec

        from lepton_xla.compiler import verify as verify_files

        found = verify_files(path, trust=key)
    if as_json:
        facts = {"files": found.files, "size_bytes": found.size_bytes, "extra": found.extra, "signer": found.signer}
        facts["signed_at"] = found.signed_at
        facts["certificate"] = msgspec.to_builtins(found.manifest.certificate)
        _common.print_json({"path": path, "ok": True, "name": found.manifest.name, **facts})
        return
    when = f" at {found.signed_at}" if found.signed_at else ""
    signed = f", signed by {found.signer}{when}" if found.signer else ""
    _common.show(f"{path}: {found.files} files, {found.size_bytes:,} bytes, all intact{signed}")
    certificate = found.manifest.certificate
    if certificate is not None:
        by = f"signed by {found.signer}" if found.signer else "not checked against a key"
        _common.show(f"certificate, {by}: {certificate}")
    if found.extra:
        _common.show(f"not in the manifest, so never read: {', '.join(found.extra)}")
