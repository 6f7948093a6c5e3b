"""Which element of a JSON array is not of its type, counted as the request does and not from where a piece begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

_ELEMENTS = msgspec.json.Decoder(list[msgspec.Raw])


def describe(piece: bytes, kind: Any, first: int, shape: Sequence[int] | None) -> str:
    """What is wrong with a piece, such as ``": Expected `float`, got `str` - at `$[70000]`"``.

    Args:
        piece: elements of the array with commas between them, brackets of nested ones included.
        kind: the type.
        first: how many elements are before them.
        shape: of the array where it is nested; None where it is flat.

    >>> describe(b'1.0, "x"', float, 0, None)
    ': Expected `float`, got `str` - at `$[1]`'
    """
    try:
        elements = _ELEMENTS.decode(b"[" + piece.replace(b"[", b" ").replace(b"]", b" ") + b"]")
    except msgspec.DecodeError:
        return ""  # no JSON, or cut within a string
    decoder = msgspec.json.Decoder(kind)
    for index, element in enumerate(elements, first):
        try:
            decoder.decode(element)
        except msgspec.DecodeError as error:
            place = (index,) if shape is None or index >= math.prod(shape) else np.unravel_index(index, shape)
            return f": {error} - at `${''.join(f'[{each}]' for each in place)}`"
    return ""
