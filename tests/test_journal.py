"""What benchmarks keep of a run that was stopped."""

import importlib
import pathlib
from typing import Any

import pytest


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
    journal: Any = importlib.import_module("journal")
    opened = journal.Journal

    measured: list[str] = []

    def row(name: str) -> dict[str, Any]:
        measured.append(name)
        return {"name": name, "ratio": {1: 0.5}}

    def stopped() -> None:
        raise KeyboardInterrupt

    first = opened("some", {"rounds": (3, 1)}, folder=tmp_path)
    kept = first.row("a", lambda: row("a"))
    with pytest.raises(KeyboardInterrupt):
        first.row("b", stopped)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text() + '{"key": {"half of a li')
    again = opened("some", {"rounds": (3, 1)}, folder=tmp_path)
    assert again.row("a", stopped) == kept == {"name": "a", "ratio": {"1": 0.5}}
    again.row("b", lambda: row("b"))
    assert measured == ["a", "b"]
    assert opened("some", {"rounds": (3, 1)}, folder=tmp_path).row("b", stopped)["name"] == "b"
    opened("some", {"rounds": (5, 1)}, folder=tmp_path).row("a", lambda: row("a, other settings"))
    anew = opened("some", {"rounds": (3, 1)}, fresh=True, folder=tmp_path)
    anew.row("a", lambda: row("a, anew"))
    assert measured == ["a", "b", "a, other settings", "a, anew"]
    assert opened("some", {"rounds": (5, 1)}, folder=tmp_path).row("a", stopped)["name"] == "a, other settings"
