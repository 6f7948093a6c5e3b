"""The token file: who may ask for what. One JSON object a line, and no secret in it.

A token is 256 random bits, so its plain SHA-256 is kept: what a salt and a slow hash protect is a secret that can be
guessed, and a guess at this one fails with probability 1 - 2^-256. JSON lines, because msgspec both reads and writes
them against one strict type, and because a token is then one line of a diff.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import math
import os
import secrets
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from lepton_xla.errors import ServeError
from lepton_xla.serve.access.watched import read_private

type Scope = Literal["infer", "read", "admin"]

# Tells scanners for leaked secrets, and people, what it is.
_PREFIX = "leptonx_"
_SECRET_BYTES = 32
_WHAT = "token file"


class Token(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line of the file.

    Attributes:
        name: what it is called when it is listed and revoked, and in logs.
        sha256: of the secret's ASCII characters, in hexadecimal.
        scopes: what it is good for. `infer` runs models, `read` sees metadata, statistics and metrics, `admin` loads,
            unloads and sets. None includes another.
        expires: when it stops to be valid; None is never.
        requests_per_s: how many requests a second it is good for in the long run; None is any number.
        burst: how many requests it is good for at once after a pause; None is one second's worth.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    scopes: Annotated[list[Scope], msgspec.Meta(min_length=1)]
    expires: Annotated[datetime.datetime, msgspec.Meta(tz=True)] | None = None
    requests_per_s: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    burst: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)] | None = None


_DECODER = msgspec.json.Decoder(Token)


def digest_of(secret: bytes) -> bytes:
    """The SHA-256 of a secret: what a file keeps and what is compared."""
    return hashlib.sha256(secret).digest()


def read_tokens(path: Path) -> list[Token]:
    """The tokens of a file.

    Raises:
        ServeError: if the file cannot be read, others may write to it, a line is no token, or a name or a digest
            comes twice.
    """
    tokens: list[Token] = []
    for number, line in enumerate(read_private(path, _WHAT).splitlines(), 1):
        if line.strip():
            try:
                tokens.append(_DECODER.decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise ServeError(f"line {number} of the {_WHAT} {path} is no token: {error}") from error
    for field in ("name", "sha256"):
        values = [getattr(token, field) for token in tokens]
        if len(set(values)) != len(values):
            twice = next(token.name for index, token in enumerate(tokens) if values.index(values[index]) != index)
            raise ServeError(f"the {_WHAT} {path} has the {field} of token {twice!r} twice")
    return tokens


def create_token(
    path: Path,
    name: str,
    scopes: Sequence[Scope],
    *,
    expires: datetime.datetime | None = None,
    requests_per_s: float | None = None,
    burst: int | None = None,
) -> str:
    """Adds a token to a file, which is made if it is missing.

    Returns:
        The secret. It is kept nowhere.

    Raises:
        ServeError: if the name is taken or malformed, a value is out of range, or the file cannot be read or written.
    """
    if requests_per_s is not None and not math.isfinite(requests_per_s):
        raise ServeError(
            f"requests a second must be a number, not {requests_per_s}"
        )  # JSON would make it null: no limit
    if burst is not None and requests_per_s is None:
        raise ServeError("a burst needs a number of requests a second")
    secret = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    token = Token(name, digest_of(secret.encode()).hex(), sorted(set(scopes)), expires, requests_per_s, burst)
    try:
        _DECODER.decode(msgspec.json.encode(token))
    except msgspec.ValidationError as error:
        raise ServeError(f"token {name!r} cannot be made: {error}") from error
    with _locked(path):
        tokens = read_tokens(path) if path.exists() else []
        if any(token.name == name for token in tokens):
            raise ServeError(f"the {_WHAT} {path} already has a token {name!r}; revoke it first or choose another name")
        _write(path, [*tokens, token])
    return secret


def revoke_token(path: Path, name: str) -> None:
    """Removes a token from a file.

    Raises:
        ServeError: if there is none of that name, or the file cannot be read or written.
    """
    with _locked(path):
        tokens = read_tokens(path)
        kept = [token for token in tokens if token.name != name]
        if len(kept) == len(tokens):
            raise ServeError(f"the {_WHAT} {path} has no token {name!r}")
        _write(path, kept)


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    """Keeps two writers apart; readers always see a whole file."""
    try:
        directory = os.open(path.resolve().parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ServeError(f"cannot write the {_WHAT} {path}: {error.strerror}") from error
    except ValueError as error:  # a path that no file can have
        raise ServeError(f"cannot write the {_WHAT} {str(path)!r}: {error}") from error
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def _write(path: Path, tokens: Sequence[Token]) -> None:
    """Replaces the file in one step; it is readable by its owner only from the first byte on."""
    target = path.resolve()
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(b"".join(msgspec.json.encode(token) + b"\n" for token in tokens))
            file.flush()
            os.fsync(file.fileno())
            if target.exists():
                # The server's user has to go on being able to read what root changes.
                owner = target.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise ServeError(f"cannot write the {_WHAT} {path}: {error.strerror}") from error
