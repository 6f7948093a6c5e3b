"""What MkDocs calls while it builds the manual."""

from __future__ import annotations

import hashlib
import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from manual import llms, navigation, reference, repository

ROOT = pathlib.Path(__file__).resolve().parents[1]
# npm's mermaid 11.16.0, byte for byte. The theme would load it from elsewhere if a page did not bring it.
MERMAID = ROOT / "build" / "mermaid" / "artoo_mermaid" / "assets" / "mermaid.min.js"
MERMAID_SHA256 = "74d7c46dabca328c2294733910a8aa1ed0c37451776e8d5295da38a2b758fb9b"

# Markdown of the pages as they were built, by uri.
_shown: dict[str, str] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in `docs/`."""
    for uri, text in {**repository.pages(ROOT), **reference.pages(ROOT)}.items():
        files.append(File.generated(config, uri, content=text))
    files.append(File.generated(config, "assets/mermaid.min.js", content=_mermaid()))
    config.nav = navigation.expanded(config.nav, files)
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links to files of the repository lead to their pages in the site."""
    text = repository.linked(markdown, page.file.src_uri, ROOT)
    _shown[page.file.src_uri] = text
    return text


def on_page_content(html: str, **_: object) -> str:
    """Make the corner of a table an empty cell, where Markdown makes a heading that says nothing."""
    return re.sub(r"<th\b([^>]*)></th>", r"<td\1></td>", html)


def on_post_build(config: MkDocsConfig) -> None:
    """Write `llms.txt`, the list of pages for language models, and `llms-full.txt`, all of their text."""
    site = pathlib.Path(config.site_dir)
    for name, text in llms.files(_shown, config).items():
        (site / name).write_text(text, encoding="utf-8")


def _mermaid() -> bytes:
    if not MERMAID.is_file():
        raise PluginError(f"{MERMAID.relative_to(ROOT)} is missing: build the manual with `make docs`")
    content = MERMAID.read_bytes()
    if hashlib.sha256(content).hexdigest() != MERMAID_SHA256:
        raise PluginError(f"{MERMAID.relative_to(ROOT)} is not npm's mermaid.min.js of that version")
    return content
