"""A long request to generate: its array of prompts is read in pieces, and what is left is bounded before it is parsed.

A call into the JSON library keeps the interpreter to itself until all is read, on whatever thread it runs; see
`jsondata`. Prompts are token ids, texts, or lists of token ids, so their array needs no more than this.
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Any

import msgspec

from lepton_xla.serve.errors import HTTPError, shortened
from lepton_xla.serve.protocol.jsondata import PIECE_BYTES, REST_S, slices
from lepton_xla.serve.protocol.outline import end_of_string

# A text of so many bytes takes a few milliseconds to parse, if each of its characters is escaped.
_LONGEST_TEXT = 1 << 20
# Of what is left: all bytes, strings, and bytes between two strings, which may hold numbers only.
_MOST_LEFT = 2 << 20
_MOST_STRINGS = 1 << 14
_LONGEST_GAP = 1 << 12
# White space and commas of an array beside its elements, and between two token ids.
_MOST_BETWEEN = 1 << 16
# Of all prompts together.
_MOST_PROMPTS, _MOST_IDS = 1 << 14, 1 << 20

_MARKS = re.compile(rb'["\[\]{]')
_QUOTE, _OPEN, _CLOSE = b'"[]'
_SPACE = b" \t\r\n"
_IDS = msgspec.json.Decoder(list[int])
_TEXT = msgspec.json.Decoder(str)
# Stands for the array. No client knows it.
MARK = [secrets.randbits(53)]


def cut_prompts(body: bytes, name: str) -> tuple[bytes, list[Any] | None]:
    """Read the array that a JSON object has under a name, piece by piece; only the array itself is sure to be JSON.

    Returns:
        The body with `MARK` in the place of the array, and the elements of that; the body as it is, and None, where
        there is no such array.

    Raises:
        HTTPError: 400 for an array of anything else than token ids, texts or lists of token ids, and where too much is
            left; 413 for too many bytes or token ids.

    >>> rest, prompts = cut_prompts(b'{"prompt": [[1, 2], [3]], "n": 1}', "prompt")
    >>> prompts, msgspec.json.decode(rest)["n"]
    ([[1, 2], [3]], 1)
    """
    wanted, size = msgspec.json.encode(name), len(body)
    kept: list[bytes] = []
    prompts: list[Any] | None = None
    key = b""
    depth = strings = start = at = left = 0
    while True:
        quote = body.find(b'"', at)
        stop = size if quote < 0 else quote
        opening = body.find(b"[", at, min(stop, at + _LONGEST_GAP)) if key == wanted else -1
        if opening >= 0 and body[at:opening].strip(_SPACE) == b":":
            if prompts is not None:
                raise HTTPError(400, f"the request has {name} twice")
            parts, end = _parts_of(body, opening, name)
            prompts = _read(body, opening, end, parts, name)
            kept += (body[start:opening], msgspec.json.encode(MARK))
            left += opening - start
            start = at = end
            key = b""
            continue
        gap = body[at : min(stop, at + _LONGEST_GAP + 1)]
        if len(gap) > _LONGEST_GAP or strings > _MOST_STRINGS:
            raise HTTPError(400, f"the request has too much beside {name}")
        depth += gap.count(b"{") + gap.count(b"[") - gap.count(b"}") - gap.count(b"]")
        if left + stop - start > _MOST_LEFT:
            raise HTTPError(413, f"the request has more than {_MOST_LEFT} bytes beside {name}")
        if quote < 0:
            return b"".join((*kept, body[start:])), prompts
        end = end_of_string(body, quote, _LONGEST_TEXT)
        key = body[quote:end] if depth == 1 else b""
        strings += 1
        at = end


def _next_mark(body: bytes, at: int, name: str) -> int:
    for start, stop in slices(len(body) - at, PIECE_BYTES):
        found = _MARKS.search(body, at + start, at + stop)
        if found is not None:
            return found.start()
    raise HTTPError(400, f"the request is not as it should be: {name} has no end")


def _parts_of(body: bytes, opening: int, name: str) -> tuple[list[tuple[int, int]], int]:
    """Where the texts and lists of an array are, and its end."""
    parts: list[tuple[int, int]] = []
    at = opening + 1
    while True:
        place = _next_mark(body, at, name)
        mark = body[place]
        if mark == _CLOSE:
            return parts, place + 1
        if mark == _QUOTE:
            at = end_of_string(body, place, _LONGEST_TEXT)
        else:
            at = _next_mark(body, place + 1, name) + 1
            if mark != _OPEN or body[at - 1] != _CLOSE:
                raise HTTPError(400, f"{name} holds something else than texts, token ids and lists of token ids")
        parts.append((place, at))
        if len(parts) > _MOST_PROMPTS:
            raise HTTPError(413, f"{name} holds more than {_MOST_PROMPTS} prompts")


def _read(body: bytes, start: int, stop: int, parts: list[tuple[int, int]], name: str) -> list[Any]:
    """The elements of an array with these texts and lists."""
    try:
        if not parts:
            return _ids(body, start, stop, _MOST_IDS, name)
        edges = [start, *(edge for part in parts for edge in part), stop]
        between = [body[one:other] for one, other in zip(edges[::2], edges[1::2], strict=True)]
        skeleton = b"0".join(between)
        if len(skeleton) > _MOST_BETWEEN or _IDS.decode(skeleton) != [0] * len(parts):
            raise HTTPError(400, f"{name} holds texts or lists beside token ids, or too much between them")
        found: list[Any] = []
        left = _MOST_IDS
        for begin, end in parts:
            if body[begin] == _QUOTE:
                found.append(_TEXT.decode(body[begin:end]))
            else:
                found.append(_ids(body, begin, end, left, name))
                left -= len(found[-1])
        return found
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise HTTPError(400, f"the request is not as it should be: {name}: {shortened(str(error))}") from error


def _ids(body: bytes, start: int, stop: int, most: int, name: str) -> list[int]:
    """Token ids between two brackets without others in between."""
    found: list[int] = []
    begin, last = start + 1, stop - 1
    while True:
        comma = body.find(b",", begin + PIECE_BYTES, last)
        end = last if comma < 0 else comma
        if end - begin > PIECE_BYTES + _MOST_BETWEEN:
            raise HTTPError(400, f"{name}: what lies between two commas is too long")
        part = _IDS.decode(b"[" + body[begin:end] + b"]")
        if not part and (found or end < last):
            raise HTTPError(400, f"{name}: a token id is missing")
        found += part
        if len(found) > most:
            raise HTTPError(413, f"{name} holds more than {_MOST_IDS} token ids")
        if end == last:
            return found
        begin = end + 1
        time.sleep(REST_S)
