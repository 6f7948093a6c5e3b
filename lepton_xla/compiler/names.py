"""Names of models."""

from __future__ import annotations

import re

from lepton_xla.errors import ArtifactError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: str) -> str:
    """Return the name if it is valid for a model.

    Raises:
        ArtifactError: if it is not.

    >>> check_name("a/b")
    Traceback (most recent call last):
    lepton_xla.errors.ArtifactError: model name 'a/b': use letters, digits, '.', '_' and '-', at most 128, not '.' first
    """
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"model name {name!r}: use letters, digits, '.', '_' and '-', at most 128, not '.' first")
    return name
