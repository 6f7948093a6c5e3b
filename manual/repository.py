"""Files of the repository outside of `docs/` that pages link to: each gets a page in the site.

A link is written as GitHub reads it, relative to the file it is in.
"""

from __future__ import annotations

import json
import pathlib
import posixpath
import re

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"(^ *```.*?^ *```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".json": "json"}
NOTEBOOKS = "examples/notebooks"
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md")


def pages(root: pathlib.Path) -> dict[str, str]:
    """A page for each file outside of `docs/` that a page links to, directly or not: uri -> text."""
    found: dict[str, str] = {}
    waiting = [*ALWAYS, *(path.relative_to(root).as_posix() for path in (root / NOTEBOOKS).glob("*.ipynb"))]
    for page in sorted((root / "docs").rglob("*.md")):
        waiting += _outside(page.read_text(encoding="utf-8"), page.relative_to(root).as_posix(), root)
    while waiting:
        path = waiting.pop()
        if (uri := _uri(path, root)) in found:
            continue
        text = _text(root / path, path)
        found[uri] = text
        if path.endswith(".md"):
            waiting += _outside(text, path, root)
    return found


def linked(markdown: str, uri: str, root: pathlib.Path) -> str:
    """The text of a page with links that lead to pages of the site."""
    path = _path(uri, root)

    def replaced(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
        if not (root / target).exists():
            return link[0]  # MkDocs says so
        return posixpath.relpath(_uri(target, root), posixpath.dirname(uri) or ".") + (link[2] or "")

    parts = _FENCE.split(markdown)
    return "".join(part if number % 2 else _LINK.sub(replaced, part) for number, part in enumerate(parts))


def _outside(text: str, path: str, root: pathlib.Path) -> list[str]:
    """Files outside of `docs/` that a page links to."""
    shown = "".join(_FENCE.split(text)[::2])
    targets = [posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1])) for link in _LINK.finditer(shown)]
    return [
        target
        for target in targets
        if not target.startswith(("docs/", "..")) and target != "docs" and (root / target).exists()
    ]


def _uri(path: str, root: pathlib.Path) -> str:
    """Where the site has a file of the repository."""
    if path == "docs" or path.startswith("docs/"):
        inside = path.removeprefix("docs").removeprefix("/")
        if (root / path).is_dir():
            return posixpath.join(inside, "README.md" if (root / path / "README.md").is_file() else "index.md")
        return inside
    if (root / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def _path(uri: str, root: pathlib.Path) -> str:
    """The file of the repository that a page shows."""
    if not uri.startswith("source/"):
        return f"docs/{uri}"
    path = uri.removeprefix("source/")
    for one in (path, path.removesuffix(".md"), path.removesuffix("/index.md")):
        if (root / one).exists():
            return one
    raise ValueError(uri)


def _text(file: pathlib.Path, path: str) -> str:
    if file.is_dir():
        kept = [entry.name for entry in sorted(file.iterdir()) if entry.is_file() and not entry.name.startswith(".")]
        return f"# {path}/\n\n" + "".join(f"- `{name}`\n" for name in kept)
    text = file.read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        return _notebook(text, path)
    return f"# {path}\n\n````{_LANGUAGES.get(file.suffix, 'text')}\n{text}\n````\n"


def _notebook(text: str, path: str) -> str:
    """A notebook's cells, from top to bottom."""
    parts: list[str] = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    parts.insert(1, f"The notebook is `{path}`; a test runs it.")
    return "\n\n".join(parts) + "\n"
