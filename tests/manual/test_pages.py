"""The Python blocks of the README and of the manual run as written."""

import ast
import functools
import importlib.util
import sys

import jax
import pytest
from blocks import PAGES, ROOT, blocks, slow

from lepton_xla.passes.core import timing

NAMES = [
    pytest.param(
        page, id=str(page.relative_to(ROOT)), marks=[pytest.mark.slow] * slow(page.read_text(encoding="utf-8"))
    )
    for page in PAGES
    if any(block.language == "python" for block in blocks(page.read_text(encoding="utf-8")))
]


START = {
    block.title: block.code for block in blocks((ROOT / "docs" / "start.md").read_text(encoding="utf-8")) if block.title
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """`digits.py` of docs/start.md, on which most guides build: imported, and trained, once for all pages."""
    path = tmp_path_factory.mktemp("start") / "digits.py"
    path.write_text(START["digits.py"], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.trained = functools.cache(module.trained)
    return module


@pytest.fixture(autouse=True)
def as_users_run_it(digits, tmp_path, monkeypatch):
    """A folder of its own and JAX as it comes; but nothing is timed, and XLA does not optimize what it compiles."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "digits", digits)
    (tmp_path / "digits.py").write_text(START["digits.py"], encoding="utf-8")
    monkeypatch.setattr(timing, "_medians_us", lambda calls, *_, **__: [float(each + 1) for each in range(len(calls))])
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    for name in {path.stem for path in tmp_path.glob("*.py")} - {"digits"}:
        sys.modules.pop(name, None)


def run(text, page, folder):
    """Runs the blocks of a page from top to bottom; an error names the page and its line."""
    names = {"__name__": "__main__"}
    for block in blocks(text):
        if block.language != "python":
            continue
        code = "\n" * (block.line - 1) + block.code  # so that a traceback has the page's lines
        if block.not_run or block.title:
            ast.parse(code, str(page))
            if block.title and not block.not_run:
                (folder / block.title).write_text(block.code, encoding="utf-8")
            continue
        code = code.replace("http://127.0.0.1:8000", names.get("URL", "http://127.0.0.1:8000"))
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("page", NAMES)
def test_blocks_run(page, tmp_path):
    run(page.read_text(encoding="utf-8"), page, tmp_path)


def test_a_block_that_fails_is_seen_with_its_line(tmp_path):
    text = (
        "# P\n\n```python\nx = 1\n```\n\n<!-- setup\ny = 2\n-->\n\n- l\n\n    ```python\n    assert x == y\n    ```\n"
    )
    with pytest.raises(AssertionError) as caught:
        run(text, "page.md", tmp_path)
    assert caught.traceback[-1].lineno + 1 == 14


def test_marks(tmp_path):
    text = '<!-- not run: it needs a GPU -->\n```python\n1 / 0\n```\n\n```python title="a.py"\nx = 1\n```\n'
    run(text, "page.md", tmp_path)
    assert (tmp_path / "a.py").read_text() == "x = 1\n"
    with pytest.raises(SyntaxError):
        run(text.replace("1 / 0", "1 /"), "page.md", tmp_path)
    with pytest.raises(ZeroDivisionError):
        run(text.partition("-->\n")[2], "page.md", tmp_path)
    assert [block.not_run for block in blocks(text)] == ["it needs a GPU", ""]
    assert slow("a\n<!-- slow: it trains -->\n")
    assert not slow(text)
