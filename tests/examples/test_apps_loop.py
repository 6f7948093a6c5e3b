"""The steps that all applications share, on a model of 24 weights: tune, serve, load, shift, alert, learn, promote."""

import argparse
import importlib
import pathlib
import sys
import threading

import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.serve.load.result import Load, Result

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples" / "apps"
TARGET = """
import jax.numpy as jnp
import numpy as np
import optax
import lepton_xla as lx
from lepton_xla import train

random = np.random.default_rng(0)
rows = random.standard_normal((640, 8)).astype(np.float32)
w = random.standard_normal((8, 3)).astype(np.float32)
labels = (rows @ w).argmax(-1).astype(np.int32)


def evaluate(predict):
    return {"accuracy": float((predict(x=rows)["output"].argmax(-1) == labels).mean())}


def fn(weights, x):
    return x @ weights["w"] + weights["b"]


model = lx.ModelSpec(
    {"x": lx.TensorSpec(("batch", 8), "float32")}, fn=fn, weights={"w": w, "b": jnp.zeros(3)}, evaluate=evaluate,
    buckets={"batch": (8,)}, calibration=[{"x": rows}],
)
old = [{"x": rows[k : k + 64], "label": labels[k : k + 64]} for k in range(0, 640, 64)]
learning = train.TrainSpec(model.program, old, 200, optax.adam(0.05), evaluate=lambda predict: {"same": 1.0})
"""


@pytest.fixture
def modules(monkeypatch, tmp_path):
    """`loop` and `reports`, which write into a folder of the test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("LEPTON_APPS", str(tmp_path))
    yield importlib.import_module("loop"), importlib.import_module("reports")
    for name in ("loop", "reports", "runs"):
        sys.modules.pop(name, None)


def test_what_was_measured_is_not_measured_again(modules, monkeypatch, tmp_path):
    runs, calls, made = importlib.import_module("runs"), [], tmp_path / "made"

    def measure(name="right"):
        calls.append(name)
        made.touch()
        return {"curve": [(1, 0.5)], "name": name}

    file = tmp_path / "figures" / "one.json"
    for known, count in (([1, "a"], 1), ([1, "a"], 1), ([2, "a"], 2)):
        assert runs.measured(file, known, measure, [made]) == {"curve": [[1, 0.5]], "name": "right"}
        assert len(calls) == count
    made.unlink()  # what the figures are of is gone
    runs.measured(file, [2, "a"], measure, [made])
    monkeypatch.setattr(runs, "code", lambda: "of another version")
    runs.measured(file, [2, "a"], measure, [made])
    assert len(calls) == 4

    def broken():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        runs.measured(file, [3], broken)
    assert runs.measured(file, [2, "a"], measure, [made])["name"] == "right"
    assert len(calls) == 5  # what is measured may overwrite what earlier figures were of


def test_latency_and_failures_of_a_load_are_read(modules, monkeypatch):
    status, took = np.array([200, 200, 503]), np.array([0.002, 0.004, 9.0])
    run = Result(Load(100.0, 8, 1.0, 0.0, 9.0), 1.0, np.zeros(3), took, status, np.zeros(3), 3, 2, 1, 0.1)
    monkeypatch.setattr(modules[0], "leptonx", lambda *_, fine: {"runs": [run.to_json()]})
    assert modules[0].loaded("URL", "tiny", "one.npz", 1.0) == {"p50_ms": 2.0, "p99_ms": 4.0, "failed": 1}


def test_a_request_that_fails_ends_no_others_and_is_raised_at_the_end(modules, monkeypatch):
    users = modules[0]._Users("URL", None, "tiny", None)
    sent, enough = [], threading.Event()

    def send(shifted):
        sent.append(users.sent)
        if len(sent) < 3:
            raise ConnectionError(f"number {len(sent)}")
        users.sent += 1
        enough.set()

    monkeypatch.setattr(users, "send", send)
    monkeypatch.setattr(modules[0], "PACE_S", 0.0)
    with pytest.raises(ConnectionError, match="number 1"), users.sending():
        assert enough.wait(20)
    assert sent[:3] == [0, 1, 2]
    users.close()


@pytest.mark.parametrize(("kind", "text"), [("at_least_one", "0"), ("at_least_one", "-3"), ("above_zero", "nan")])
def test_options_that_ask_for_nothing_are_refused(modules, kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not"):
        getattr(modules[0], kind)(text)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_shift_is_told_and_learned(modules, tmp_path):
    loop, reports = modules
    file = tmp_path / "target.py"
    file.write_text(TARGET)
    random = np.random.default_rng(0)
    random.standard_normal((640, 8))
    w = random.standard_normal((8, 3)).astype(np.float32)

    def ask(number, shifted):
        rows = np.random.default_rng([1, number]).standard_normal((loop.ROWS, 8)).astype(np.float32)
        return {"x": (rows + 3) if shifted else rows}, (rows @ w).argmax(-1).tolist()

    def score(answer, known):
        return float((answer["output"].argmax(-1) == np.array(known)).mean())

    plan = loop.Plan(ask, score, "three is added", range(1 << 20, (1 << 20) + 20), calm=70, learned=120)
    found = loop.tuned(f"{file}:model", tmp_path, "tiny", "--max-drop", 3, "--trials", 1)
    assert lx.load(tmp_path / "tiny.lepton").manifest.recipe["name"] == found["best"]["name"] == "int8"
    np.savez(tmp_path / "one.npz", x=np.zeros((1, 8), np.float32))
    lived = loop.lived(
        tmp_path / "tiny.lepton", f"{file}:learning", tmp_path, plan, 200, str(tmp_path / "one.npz"), 1.0,
        "--fresh", "1.0",
    )  # fmt: skip
    assert (lived["watched"], lived["false_alarm"]) == (True, False)
    assert lived["alert"]
    assert lived["alert_rows"] > 0
    assert lived["clean_before"] > 0.9
    assert lived["shifted_before"] < 0.7
    assert lived["round"] == "promoted"
    assert lived["regained"] > 0.7
    assert lived["forgotten"] == lived["clean_before"] - lived["clean_after"]
    assert 0 < lived["p50_ms"] <= lived["p99_ms"]
    page = "".join(loop.parts(lived, plan, tmp_path, ["tune.html", "absent.html"]))
    assert "<h2>Served</h2>" in page
    assert page.count("<svg") == 3  # of the drift, and the two of `leptonx tune`
    assert reports.folder() == tmp_path
