"""The files that a manifest lists, with size and digest. Read without JAX by those who copy artifacts."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import msgspec

from lepton_xla.errors import ArtifactError

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
_FILE_PART = re.compile(r"[A-Za-z0-9_=,+@-][A-Za-z0-9._=,+@-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """What a manifest says of the files beside it.

    Attributes:
        name: the model's name.
        created: when it was made, as it says.
        fit: digest of the program that its weights are for; see `make_update` of the compiler.
        programs: its programs; an update, which has weights only, has none.
        files: every other file of the artifact.
        sha256: digest of the manifest itself.
    """

    name: str
    created: str = ""
    fit: str = ""
    programs: list[Any] = []
    files: dict[str, FileEntry]
    sha256: str = ""

    @property
    def is_update(self) -> bool:
        """Whether it has weights only, for the compiled code of another artifact of the same `fit`."""
        return bool(self.fit) and not self.programs

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(entry.size for entry in self.files.values())


def read_listing(data: bytes) -> Listing:
    """Read the list of files from the bytes of a manifest.

    Raises:
        ArtifactError: if it is no manifest, was edited or damaged, or lists a file by a name that is not allowed.

    >>> read_listing(b"{}")
    Traceback (most recent call last):
    lepton_xla.errors.ArtifactError: manifest.json: Object missing required field `name`
    """
    try:
        listing = msgspec.json.decode(data, type=Listing)
        if listing.sha256 != sealing_digest(data):
            raise ArtifactError(f"{MANIFEST}: its SHA-256 does not match: it was edited or damaged")
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{MANIFEST}: {error}") from error
    check_files(listing.files)
    return listing


def check_files(files: dict[str, FileEntry]) -> None:
    """Check the names, sizes and digests of listed files.

    Only plain relative names are accepted: no `..`, absolute path, backslash or hidden file.

    Raises:
        ArtifactError: naming the first that is wrong.
    """
    for file, entry in files.items():
        if file == MANIFEST or len(file) > 1024 or not all(_FILE_PART.fullmatch(part) for part in file.split("/")):
            raise ArtifactError(f"{MANIFEST}: {file!r} is not a valid name for a file inside an artifact")
        if entry.size < 0 or not is_sha256(entry.sha256):
            raise ArtifactError(f"{MANIFEST}: files[{file!r}] has no valid size and SHA-256")


def is_sha256(text: str) -> bool:
    """Whether a text is a SHA-256 in lower hexadecimal digits.

    >>> is_sha256("00" * 32), is_sha256("../secret")
    (True, False)
    """
    return _SHA256.fullmatch(text) is not None


def sealing_digest(data: bytes) -> str:
    """Digest of a manifest's JSON with the field `sha256` empty.

    It covers whatever keys there are, so that a later version with more keys computes the same digest.
    """
    plain = msgspec.json.decode(data, type=dict[str, Any]) | {"sha256": ""}
    return hashlib.sha256(msgspec.json.encode(plain)).hexdigest()
