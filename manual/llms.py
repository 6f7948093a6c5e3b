"""`llms.txt`: the manual for language models, as pages of Markdown in the order of the navigation.

Source: llmstxt.org.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mkdocs.config.defaults import MkDocsConfig

from manual import exported, navigation

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Pages that repeat others or are for contributors.
_LEFT_OUT = ("source/C", "benchmarks/", "design.md")


def files(pages: Mapping[str, str], config: MkDocsConfig) -> dict[str, str]:
    """The two files, by name.

    Args:
        pages: uri -> Markdown.
        config: has the navigation.
    """
    head = f"# {config.site_name}\n\n> {config.site_description}\n"
    listed, whole = [head], [head]
    for section in config.nav or []:
        for title, entry in section.items():
            uris = [uri for uri in _uris(entry) if uri in pages and not uri.startswith(_LEFT_OUT)]
            if uris:
                listed.append(f"\n## {title}\n\n" + "".join(_line(uri, pages[uri]) for uri in uris))
            whole += [f"\n<!-- {uri} -->\n\n{_with_docstrings(pages[uri]).strip()}\n" for uri in uris]
    return {"llms.txt": "".join(listed), "llms-full.txt": "".join(whole)}


def _with_docstrings(text: str) -> str:
    """A page of the reference with docstrings where the site has them."""
    return re.sub(r"^::: (\S+)$", lambda name: _documented(name[1]), text, flags=re.MULTILINE)


def _documented(name: str) -> str:
    return f"## {name}\n\n{exported.docstring(ROOT, name)}"


def _uris(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
        return
    for each in entry.values() if isinstance(entry, dict) else entry:
        yield from _uris(each)


def _line(uri: str, text: str) -> str:
    """An entry of the list: the page's title and the first sentence of its text."""
    page = posixpath.splitext(uri)[0].replace("README", "index") + ".html"
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = (block for block in re.split(r"\n\s*\n", prose) if re.match(r"[^#>|\-<\s:]", block))
    # Links are those of the page, and would lead elsewhere from here.
    plain = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", " ".join(next(blocks, "").split()))
    sentence = plain.partition(". ")[0].rstrip(".:")
    return f"- [{navigation.title(text)}]({page}){f': {sentence}' if sentence else ''}\n"
