"""The JSON part of a long request without the elements of its tensors, so that the JSON library sees little of it.

A call into that library keeps the interpreter to itself until all is read, whatever the client sent. So the arrays that
are called `data` are cut out here, to be read in pieces (`jsondata`), and what is left is bounded before it is parsed:
its bytes, its nesting, and its members, each of which becomes Python objects.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

from lepton_xla.serve.errors import HTTPError

# Of what is left, for each tensor that a request may name: a kilobyte, and its fields with a few parameters.
_BYTES_PER_TENSOR = 1 << 10
_MEMBERS_PER_TENSOR = 8
_LONGEST_STRING = 1 << 16

_KEY = b'"data"'
_SPACE = b" \t\r\n"
# Nearer than this to its key an array begins; nobody writes more white space.
_NEAR = 256
# Stands for an array. No client knows it, so none can have its request read in another place.
_MARK = secrets.token_hex(8)


class Outline(NamedTuple):
    """What is left.

    Attributes:
        text: JSON, if the request was, with a short array in the place of each one cut out.
        arrays: that short array -> where in the request the one lies that it stands for.
    """

    text: bytes
    arrays: dict[bytes, tuple[int, int]]


def outline_of(head: bytes, max_tensors: int) -> Outline:
    """Cuts out the arrays called `data` that hold neither strings nor objects; what is no JSON stays as it is.

    Args:
        head: the JSON part of a request.
        max_tensors: how many a request may name.

    Raises:
        HTTPError: 400 where too much is left, or a string is too long.
    """
    size = len(head)
    parts: list[bytes] = []
    arrays: dict[bytes, tuple[int, int]] = {}
    left = kept = at = 0
    named = False
    while True:
        quote = head.find(b'"', at)
        span = _array(head, at, size if quote < 0 else quote) if named else None
        if span is not None:
            mark = f'["{_MARK}",{len(arrays)}]'.encode()
            parts += (head[kept : span[0]], mark)
            left += span[0] - kept + len(mark)
            arrays[mark] = span
            at = kept = span[1]
        end = size if quote < 0 else end_of_string(head, quote)
        check_size(left + end - kept, max_tensors)
        if quote < 0:
            return Outline(b"".join((*parts, head[kept:])), arrays)
        named = head[quote:end] == _KEY
        at = end


def check_size(size_bytes: int, max_tensors: int) -> None:
    """Refuses a JSON part that has too many bytes beside the data of tensors.

    Raises:
        HTTPError: 400.
    """
    most = max_tensors * _BYTES_PER_TENSOR
    if size_bytes > most:
        raise HTTPError(400, f"the JSON part has more than {most} bytes beside the data of tensors")


def _array(head: bytes, start: int, stop: int) -> tuple[int, int] | None:
    """Where the array lies that follows a key; None if none does that is all numbers, as far as can be seen.

    Args:
        head: the JSON part.
        start: behind the key.
        stop: at the next string, or the end.
    """
    opening = head.find(b"[", start, min(stop, start + _NEAR))
    if opening < 0 or head[start:opening].strip(_SPACE) != b":":
        return None
    brace = head.find(b"}", opening, stop)
    end = stop if brace < 0 else brace
    if head.find(b"{", opening, end) >= 0 or head.find(b":", opening, end) >= 0:
        return None
    closing = head.rfind(b"]", opening, end)
    return None if closing < 0 else (opening, closing + 1)


def end_of_string(head: bytes, quote: int, longest: int = _LONGEST_STRING) -> int:
    """Find what lies behind the closing quote of a string in JSON.

    Args:
        head: holds the string.
        quote: where its opening quote is.
        longest: bytes that a string may take.

    Raises:
        HTTPError: 400 where it has no end within so many bytes.

    >>> end_of_string(rb'{"a\\"b": 1}', 1)
    7
    """
    at, stop = quote + 1, quote + longest
    while (close := head.find(b'"', at, stop)) >= 0:
        run = head[at:close]
        if not (len(run) - len(run.rstrip(b"\\"))) % 2:
            return close + 1
        at = close + 1
    raise HTTPError(400, f"a string in the JSON part has no end within {longest} bytes")


def check_members(text: bytes, max_tensors: int) -> None:
    """Refuses JSON whose objects have too many members together; each of them is a key and a colon.

    Raises:
        HTTPError: 400.
    """
    most = max_tensors * _MEMBERS_PER_TENSOR
    if text.count(b":") > most:
        bare = b"".join(text.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
        if bare.count(b":") > most:
            raise HTTPError(400, f"the objects of the JSON part have more than {most} members")
