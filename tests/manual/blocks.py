"""Code blocks of the README and of the manual's pages, and what their marks say.

    <!-- not run: it needs a GPU -->     above a Python block: it is only parsed
    <!-- setup                           a comment of Python that runs before the blocks that follow, and is not shown
    <!-- slow: it trains a model -->     anywhere on a page: `make test-all` runs the page

In a block `http://127.0.0.1:8000` stands for `URL`, if a setup has started a server and set that.

A block with a title is a file, written into the page's folder. All others of a page run from top to bottom in one
namespace.
"""

import dataclasses
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *(
        page
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if page.name != "design.md" and page.parent.name != "benchmarks"
    ),
]
_PARTS = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|(?:^<!-- not run: (?P<why>[^\n]+) -->\n+)?"
    r"^(?P<indent> *)```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code of a page."""

    line: int  # of its first line of code
    language: str
    code: str
    title: str = ""
    not_run: str = ""  # why


def blocks(text: str) -> list[Block]:
    """The blocks of a page, from top to bottom."""
    found = []
    for part in _PARTS.finditer(text):
        if part["setup"] is not None:
            found.append(Block(_line(text, part.start("setup")), "python", part["setup"]))
            continue
        code = re.sub(rf"^{part['indent']}", "", part["code"], flags=re.MULTILINE)
        title = re.search(r'title="([^"]+)"', part["options"])
        line = _line(text, part.start("code"))
        found.append(Block(line, part["language"], code, title[1] if title else "", part["why"] or ""))
    return found


def slow(text: str) -> bool:
    """Whether only `make test-all` runs the page."""
    return bool(re.search(r"^<!-- slow: .+ -->$", text, re.MULTILINE))


def _line(text: str, offset: int) -> int:
    return text.count("\n", 0, offset) + 1
