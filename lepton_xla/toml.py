"""Reads TOML that people write."""

from __future__ import annotations

import tomllib
from typing import Any

import msgspec

from lepton_xla.errors import first_line


def parsed[T](data: str | bytes, kind: type[T] = dict[str, Any]) -> T:
    """Read TOML as a value of a type, a table by default; it may begin with a byte-order mark.

    Args:
        data: the text, or its bytes in UTF-8.
        kind: what it must hold, such as a `msgspec.Struct`.

    Raises:
        ValueError: in one line, if it is not UTF-8, not TOML, nested too deeply, or of another type.

    >>> parsed("a = 1"), parsed(b"a = 1", dict[str, int])
    ({'a': 1}, {'a': 1})
    >>> parsed("a = ")
    Traceback (most recent call last):
    ValueError: Invalid value (at end of document)
    """
    try:
        text = data.decode() if isinstance(data, bytes) else data
        return msgspec.convert(tomllib.loads(text.removeprefix("\ufeff")), kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # tomllib raises the last two
        raise ValueError(first_line(error)) from error
