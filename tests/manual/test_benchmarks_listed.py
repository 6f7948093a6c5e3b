"""The page of benchmarks lists every page of figures, and every script that prints some."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LISTED = (ROOT / "docs" / "benchmarks" / "README.md").read_text()
PAGES = sorted(page.name for page in (ROOT / "docs" / "benchmarks").glob("*.md") if page.name != "README.md")
SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("page", PAGES)
def test_every_page_is_listed_and_says_how_it_was_made(page):
    assert f"[{page}]({page})" in LISTED
    text = (ROOT / "docs" / "benchmarks" / page).read_text()
    assert re.search(r"^    \S*python\S* benchmarks/\w+\.py", text, re.MULTILINE), "no command"
    assert re.search(r"^20\d\d-\d\d-\d\d \d\d:\d\d UTC, commit [0-9a-f]{7}", text, re.MULTILINE), "no provenance"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_listed(script):
    assert f"python benchmarks/{script}" in LISTED
