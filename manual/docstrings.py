"""Examples in docstrings are shown as code, which Markdown would take for quotations."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^|\n)((?:>>> .*)(?:\n(?!\s*$).*)*)", re.MULTILINE)


class Examples(griffe.Extension):
    """Puts the examples of every docstring into fenced blocks."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """A docstring with each paragraph of examples as a block.

    >>> fenced("Add.\\n\\n>>> 1 + 1\\n2\\n")
    'Add.\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```\\n'
    """
    return _EXAMPLE.sub(lambda found: f"\n```pycon\n{found[1]}\n```", text)
