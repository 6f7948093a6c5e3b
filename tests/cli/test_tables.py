"""Tables at every width: no figure is cut, no name folds to letters, and a pipe gets the whole."""

import io
import re

import numpy as np
import pytest
import rich.console

from lepton_xla.cli import _common, _load_views, _reports, bench, compile, inspect, plan, sensitivity, tables
from lepton_xla.cli.tables import Table, fold
from lepton_xla.serve.access.tokens import create_token
from lepton_xla.tuning import Sensitivity

WIDE = Table(
    "two symbolic dimensions",
    [
        "bucket",
        ">float\nmedian",
        ">float\np99",
        ">artifact\nmedian",
        ">artifact\np99",
        ">rows/s",
        ">artifact is\nfaster",
    ],
    [["batch=128,seq=512", "1234.5 ms", "2345.6 ms", "123.4 ms", "234.5 ms", "89,349,123", "10.00x"]] * 2,
)


def squeezed(text):
    return re.sub(r"[\s─]", "", text)


def shown(monkeypatch, width, *parts):
    """What `show` prints on a terminal of this width; None is a pipe."""
    out, terminal = io.StringIO(), width is not None
    real = rich.console.Console.__init__

    def console(self, **more):
        real(self, file=out, force_terminal=terminal, color_system=None, width=width or 80, **more)

    with monkeypatch.context() as patched:
        patched.setattr(rich.console.Console, "__init__", console)
        tables.show(*parts)
    return out.getvalue()


def whole(text, part, width):
    """Every figure of a table stands whole on a line of its text, and every other cell is there, folded or not."""
    lines = text.splitlines()
    for row in (*part.rows, part.total):
        for cell, column in zip(row, part.columns, strict=False):
            if column.startswith(">"):
                assert any(str(cell) in line for line in lines), (width, cell)
            else:
                assert squeezed(str(cell))[:5] in squeezed(text)


REPORTS = [
    {"name": "quantize", "seconds": 12.3, "sites": [
        {"site": "encoder/layers/3/attention/query/kernel", "action": "int8 x int8", "reason": "", "bytes_before": 9e6,
         "bytes_after": 2.25e6},
        {"site": "head", "action": "kept", "reason": "its weight is shared with an embedding that is looked up"},
    ], "metrics": {"seconds": {"time products": 2.5}, "times": {"measured": 1234, "from the cache": 4321}}},
]  # fmt: skip
SIDE = {"median_s": 0.0123, "p99_s": 0.0456, "rows_per_s": 12345.0}
BENCH = {
    "path": "model.lepton", "target": "digits.py:model", "route": "executables", "inputs": "random", "load_s": 0.1,
    "compile_s": 3.0, "compile_over_load": 30.0, "weights_bytes": 10**6, "weights_bytes_float": 4 * 10**6,
    "weights_bytes_on_disk": 9 * 10**5, "artifact_bytes": 2 * 10**6,
    "buckets": [{"bucket": f"batch={n},seq=512", "rounds": 9, "float": SIDE, "artifact": SIDE, "speedup": 2.5}
                for n in (1, 128)],
}  # fmt: skip
FATES = {
    "name": "weights", "sites": [{"site": "head", "action": "int8", "reason": "", "bytes_before": 89_349_120,
                                  "bytes_after": 22_337_280}],
}  # fmt: skip
COMPILED = {
    "weights": FATES,
    "passes": REPORTS, "weights_bytes_float": 89_349_120, "weights_bytes_optimized": 22_000_000, "name": "a-model",
    "weights_bytes_on_disk": 21_000_000, "recipe": "int8", "path": "a.lepton", "artifact_bytes": 10**7,
    "explanation": "a-explain.lepton",
    "metrics": {"float": {"accuracy": 0.9712345}, "optimized": {"accuracy": 0.9701234}}, "optimize_s": 1.0,
    "compile_s": 2.0, "compile_s_by_bucket": {"batch=1,seq=128": 1.0},
    "targets": [{"name": "cpu-avx2", "reason": ""},
                {"name": "aarch64", "reason": "the compiler in this package makes code for x86-64 alone"}],
}  # fmt: skip
SITE = {"site": "encoder/layers/3/query", "weight": "encoder/layers/3/query",
        "sites": ["encoder/layers/3/query", "decoder/layers/3/query"], "kind": "dot",
        "shape": [768, 3072], "weight_bytes": 9_437_184, "repeats": 12, "kept": "", "flops": 1.2e12, "decision": "int8",
        "metrics": {"accuracy": 0.97123}, "drop": 0.0123, "output_error": 0.00123, "cosine": 0.999912,
        "bytes_saved": 7_000_000, "latency_ratio": 0.55}  # fmt: skip
PLANNED = {
    "weights": FATES,
    "target": "digits.py:model", "recipe": "int8", "cast": "none", "sizes": {"batch": 1, "seq": 128},
    "sites": [SITE, {**SITE, "kept": "not quantized: it is inside shard_map", "decision": "float"}],
    "totals": {"sites": 2, "changed": 1, "kept": 1, "weight_bytes": 10**7, "site_weight_bytes": 9_437_184,
               "flops": 1e12, "other_flops": 1e9},
}  # fmt: skip
RANKED = {"target": "digits.py:model", "recipe": "int8", "metric": "accuracy", "sites": [SITE], "together": SITE,
          "float": {"accuracy": 0.98}}  # fmt: skip
RUN = {
    "rate": 12345.0,
    "connections": 64,
    "answered_per_s": 12000.0,
    "goodput_per_s": 11900.0,
    "errors": 3,
    "latency_s": dict.fromkeys(_load_views._FIGURES, 0.123),
    "counts": {"200": 9},
    "generator_cores": 0.5,
    "send_lag": 0,
    "send_lag_s": {"p50": 1e-5, "p99": 1e-4, "max": 1e-3},
    "most_connections": 9,
    "seconds": 5.0,
}
LOADED = {"runs": [RUN, RUN], "model": "m", "url": "http://127.0.0.1:8000", "warmup_s": 1.0, "request_bytes": 3000,
          "inputs": {"x": {"dtype": "float32", "shape": [1, 784]}}}  # fmt: skip

COMMANDS = {
    "bench": lambda: bench._print(BENCH),
    "compile": lambda: compile._print(COMPILED),
    "plan": lambda: plan._print(PLANNED),
    "sensitivity": lambda: sensitivity._print(RANKED, None, Sensitivity),
    "load": lambda: _load_views.show(LOADED),
    "passes": lambda: _common.show(_reports.passes_table(REPORTS), _reports.sites_table(REPORTS)),
    "weights": lambda: _common.show(_reports.weights_table([FATES]), _reports.fates_table([FATES])),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_tables(name, monkeypatch):
    found = []
    monkeypatch.setattr(_common, "show", lambda *parts: found.extend(parts))
    monkeypatch.setattr(Sensitivity, "kept", {}, raising=False)
    COMMANDS[name]()
    drawn = [part for part in found if isinstance(part, Table)]
    assert drawn
    for width in (40, 80, None):
        for part in drawn:
            text = shown(monkeypatch, width, part)
            whole(text, part, width)
            lines = text.splitlines()[1:]
            if width == 80:
                assert all(len(line) <= 80 for line in lines), text


def words(document):
    """Every key, text and number of a JSON document."""
    if isinstance(document, dict):
        return {*document, *words(list(document.values()))}
    return {word for each in document for word in words(each)} if isinstance(document, list) else {document}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["eval", "PLAIN", "ARTIFACT"], ["mean", "largest"]),
        (["predict", "ARTIFACT", "--input", "x=X", "-o", "OUT"], ["output", "float32", "3, 4"]),
        (["token", "list", "TOKENS"], ["scraper", "read", "12.5", "100"]),
        (["recipes"], ["int8", "codebook16-prune90"]),
    ],
    ids=lambda value: value[0],
)
def test_commands_that_are_cheap_to_run(cli, plain, artifact, tmp_path, monkeypatch, command, says):
    """What they show: on 80 columns, in a pipe, and as JSON."""
    np.save(tmp_path / "x.npy", np.ones((3, 16), np.float32))
    create_token(tmp_path / "tokens", "scraper", ["read"], requests_per_s=12.5, burst=100)
    places = {"PLAIN": plain, "ARTIFACT": artifact, "x=X": f"x={tmp_path / 'x.npy'}", "OUT": tmp_path / "out.npz",
              "TOKENS": tmp_path / "tokens"}  # fmt: skip
    command = [str(places.get(word, word)) for word in command]
    found = []
    with monkeypatch.context() as patched:
        patched.setattr(_common, "show", lambda *parts: found.extend(parts))
        assert cli.ok(*command) == ""
    (part,) = found
    text = shown(monkeypatch, 80, part)
    whole(text, part, 80)
    assert all(len(line) <= 80 for line in text.splitlines()[1:]), text
    piped = cli.ok(*command)
    rows = [line.split("  ") for line in piped.splitlines()]
    for row in part.rows:
        cells = [str(cell) for cell in row if str(cell)]
        assert any([cell.strip() for cell in line if cell.strip()] == cells for line in rows), (row, piped)
    for word in says:
        assert word in piped
    told = words(cli.json(*command))
    assert all(row[0] in told for row in part.rows)


def test_of_an_artifact(monkeypatch):
    rows = [
        ("encoder/layers/3/attention/query/kernel", "768x3072", "float32", "plain", "9,437,184", "8,000,000", "1.18x")
    ]
    columns = ("name", "shape", "dtype", "encoding", ">bytes", ">on disk", ">smaller")
    part = Table("weights", columns, rows, total=("total", "", "", "", "89,349,120", "8,000,000", "1.18x"))
    for width in (40, 80, None):
        whole(shown(monkeypatch, width, part), part, width)
    assert inspect._times(None) == ""


def test_narrow_names_fold_and_figures_stay(monkeypatch):
    text = shown(monkeypatch, 80, WIDE)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "batch=128,\n" in re.sub(r",\s.*\n", ",\n", text)  # not a letter a line
    whole(text, WIDE, 80)
    piped = shown(monkeypatch, None, WIDE)
    row = "batch=128,seq=512  1234.5 ms  2345.6 ms  123.4 ms  234.5 ms  89,349,123       10.00x"
    assert piped.splitlines()[-2] == row


def test_narrower_still_each_row_is_a_paragraph():
    assert WIDE.lines(40)[:7] == [
        "bucket batch=128,seq=512",
        "  float median        1234.5 ms",
        "  float p99           2345.6 ms",
        "  artifact median     123.4 ms",
        "  artifact p99        234.5 ms",
        "  rows/s              89,349,123",
        "  artifact is faster  10.00x",
    ]


def test_words_fold_at_blanks_and_behind_punctuation():
    assert fold("its weight is shared", 10) == ["its weight", "is shared"]
    assert fold("encoder/layers/3/kernel", 16) == ["encoder/layers/", "3/kernel"]
    assert fold("a" * 25, 10) == ["a" * 10, "a" * 10, "a" * 5]
    assert fold("", 10) == [""]


def test_a_row_of_another_length_is_a_mistake():
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        Table("", ("a", "b"), [("x",)]).lines()


def test_a_pass_says_how_many_times_it_measured_and_how_many_it_knew(capsys):
    _common.show(_reports.passes_table(REPORTS))
    assert "1234 measured, 4321 from the cache" in capsys.readouterr().out
