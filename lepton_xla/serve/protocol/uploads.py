"""The documents of the routes that change a repository of models: uploads, versions and labels."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import parse_qs

import msgspec

from lepton_xla.errors import first_line
from lepton_xla.serve.errors import HTTPError

# Digests asked for at once: more than an artifact has files, and no more than a second's work.
_MOST_DIGESTS = 10_000
_BODY_BYTES = 1 << 20

type Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", description="SHA-256 in hexadecimal digits.")]


class SizesRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which files a client is going to send."""

    sha256: Annotated[list[Digest], msgspec.Meta(max_length=_MOST_DIGESTS)]


class Sizes(msgspec.Struct, frozen=True):
    """How many bytes of each file have been sent."""

    sizes: dict[str, int]


class Piece(msgspec.Struct, frozen=True):
    """How many bytes of the file have been sent now."""

    size: int


class PublishRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The uploaded manifest to make a version of, and its signature; the files that it lists were uploaded too."""

    manifest: Digest
    signature: Digest | None = None


class Published(msgspec.Struct, frozen=True):
    """The version that was made."""

    name: str
    version: str
    size_bytes: int


class LabelRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a label is to stand: on a version, or on the one that it stood on before."""

    version: str | None = None
    rollback: bool = False


class Moved(msgspec.Struct, frozen=True):
    """Where a label stood and stands now."""

    name: str
    label: str
    stood_on: str | None
    stands_on: str


class Removed(msgspec.Struct, frozen=True):
    """The version that was removed."""

    name: str
    version: str


class VersionOnDisk(msgspec.Struct, frozen=True):
    """A version in the repository; the size is unknown where its manifest cannot be read."""

    version: str
    size_bytes: int | None
    created: str
    wanted: bool
    labels: list[str]


class ModelOnDisk(msgspec.Struct, frozen=True):
    """A model in the repository."""

    name: str
    problem: str | None
    ignored: list[str]
    versions: list[VersionOnDisk]


def parse_change[T](body: bytes | bytearray, kind: type[T], most: int = _BODY_BYTES) -> T:
    """Read the body of a request.

    Args:
        body: JSON.
        kind: what it is to be.
        most: bytes that it may have.

    Raises:
        HTTPError: 400 if it is something else, 413 if it is far too large.

    >>> parse_change(b'{"rollback": true}', LabelRequest)
    LabelRequest(version=None, rollback=True)
    """
    if len(body) > most:
        raise HTTPError(413, f"the body has more than {most} bytes")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise HTTPError(400, f"the body is not what this route takes: {first_line(error)}") from error


def offset_of(target: bytes) -> int:
    """The `offset` in the query of a request target.

    Raises:
        HTTPError: 400 if there is none, or it is no number of bytes.

    >>> offset_of(b"/v2/repository/blobs/0f?offset=4096")
    4096
    """
    query = target.partition(b"?")[2].decode("latin-1")
    try:
        given = parse_qs(query, max_num_fields=4, keep_blank_values=True).get("offset", [])
    except ValueError:
        given = []
    if len(given) != 1 or not (given[0].isascii() and given[0].isdigit() and len(given[0]) < 16):
        raise HTTPError(400, "the query must say where the piece starts: offset=BYTES")
    return int(given[0])
