"""The site's navigation: `folder/*` stands for the pages of a folder that are not named."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.structure.files import Files


def expanded(nav: Any, files: Files) -> Any:
    """Replace each `folder/*` by the folder's other pages, by title."""
    named = set(_names(nav))
    return _expanded(nav, files, named)


def _names(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [name for entry in (nav.values() if isinstance(nav, dict) else nav) for name in _names(entry)]


def _expanded(nav: Any, files: Files, named: set[str]) -> Any:
    if isinstance(nav, dict):
        return {title: _expanded(entry, files, named) for title, entry in nav.items()}
    if isinstance(nav, str):
        return nav
    found: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and (entry == "*" or entry.endswith("/*")):
            found += _pages(entry.removesuffix("*"), files, named)
        else:
            found.append(_expanded(entry, files, named))
    return found


def _pages(folder: str, files: Files, named: set[str]) -> list[str]:
    pages = [
        file
        for file in files.documentation_pages()
        if file.src_uri.removesuffix(file.src_uri.rpartition("/")[2]) == folder and file.src_uri not in named
    ]
    return [file.src_uri for file in sorted(pages, key=lambda file: title(file.content_string).casefold())]


def title(markdown: str) -> str:
    """The first heading of a page."""
    found = re.search(r"^# (.+)$", markdown, re.MULTILINE)
    return found[1] if found else ""
