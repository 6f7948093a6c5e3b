"""Copies of an artifact's files, checked on the way, and small files that change whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pathlib
import secrets
import stat

from lepton_xla.errors import ArtifactError, RepositoryError
from lepton_xla.files.folders import flush
from lepton_xla.files.listing import MANIFEST, MAX_MANIFEST_BYTES, FileEntry, Listing, read_listing
from lepton_xla.trust.bundles import MAX_SIGNATURE_BYTES, SIGNATURE

_PIECE_BYTES = 1 << 20
_MAX_TEXT_BYTES = 1 << 20


def listing_of(source: pathlib.Path) -> tuple[Listing, bytes]:
    """Read the manifest of an artifact: what it lists, and its bytes.

    Raises:
        ArtifactError: if it is missing, too large or damaged.
    """
    data = _read(source, MANIFEST, MAX_MANIFEST_BYTES)
    try:
        return read_listing(data), data
    except ArtifactError as error:
        raise ArtifactError(f"{source}: {error}") from error


def signature_of(source: pathlib.Path) -> bytes | None:
    """Read the signature file of an artifact, which its manifest does not list; None if there is none.

    Raises:
        ArtifactError: if it cannot be read, or is too large.
    """
    if not os.path.lexists(source / SIGNATURE):
        return None
    return _read(source, SIGNATURE, MAX_SIGNATURE_BYTES)


def _read(source: pathlib.Path, file: str, limit: int) -> bytes:
    with open_file(source, file) as opened:
        data = opened.read(limit + 1)
    if len(data) > limit:
        raise ArtifactError(f"{source}: {file} has more than the limit of {limit} bytes")
    return data


def copy_artifact(source: pathlib.Path, target: pathlib.Path) -> Listing:
    """Copy the files that an artifact lists into an empty folder, each checked against its size and digest.

    Its signature, if there is one, goes with it; whoever loads the copy checks it.

    Raises:
        ArtifactError: if the artifact is missing or damaged; names the file.
        OSError: if the copy cannot be written.
    """
    listing, data = listing_of(source)
    for file, entry in listing.files.items():
        _copy(source, file, entry, target / file)
    signature = signature_of(source)
    if signature is not None:
        write_whole(target / SIGNATURE, signature)
    write_whole(target / MANIFEST, data)
    return listing


def _copy(source: pathlib.Path, file: str, entry: FileEntry, target: pathlib.Path) -> None:
    digest, left = hashlib.sha256(), entry.size
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_file(source, file) as opened, open(target, "xb") as written:
        while piece := opened.read(min(_PIECE_BYTES, left + 1)):
            left -= len(piece)
            if left < 0:
                break
            digest.update(piece)
            written.write(piece)
        written.flush()
        os.fsync(written.fileno())
    if left or digest.hexdigest() != entry.sha256:
        raise ArtifactError(f"{source}: {file} is damaged: its size or SHA-256 differs from the manifest's")


def open_file(source: pathlib.Path, file: str) -> io.BufferedReader:
    """Open a regular file of an artifact for reading."""
    try:
        opened = open(source / file, "rb")  # noqa: SIM115  # the caller closes it
    except OSError as error:
        raise ArtifactError(f"{source}: {file} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        opened.close()
        raise ArtifactError(f"{source}: {file} is not a regular file")
    return opened


def read_text(file: pathlib.Path) -> str | None:
    """The text of a small file; None if there is none."""
    try:
        with open(file, "rb") as opened:
            data = opened.read(_MAX_TEXT_BYTES + 1)
        if len(data) > _MAX_TEXT_BYTES:
            raise RepositoryError("invalid", f"{file}: more than the limit of {_MAX_TEXT_BYTES} bytes")
        return data.decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise RepositoryError("invalid", f"{file}: is not UTF-8 text: {error.reason}") from error


def write_whole(file: pathlib.Path, data: bytes) -> None:
    """Create or replace a file atomically, and flush it and its folder to the disk."""
    replace_file(file, data)
    flush(file.parent)


def replace_file(file: pathlib.Path, data: bytes) -> None:
    """Create or replace a file atomically, and flush it to the disk; after a crash its folder may know the old one."""
    temporary = file.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with open(temporary, "xb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
