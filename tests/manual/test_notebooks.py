"""The notebooks of examples/notebooks run from top to bottom, and are committed without outputs."""

import json

import pytest
from blocks import ROOT
from test_pages import as_users_run_it, digits  # noqa: F401 (fixtures)

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def cells(path, kind="code"):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["generate", "prune_and_shrink", "quantize", "serve_and_operate"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(path, capsys):
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path)):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number + 1}", "exec"), names)
    assert capsys.readouterr().out  # each shows something


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_kept(path):
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells(path))
    assert cells(path, "markdown")[0]["source"][0].startswith("# ")
