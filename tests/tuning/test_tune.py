"""The search on a small classifier, with times that are made up: what it finds, keeps, refuses, and goes on from."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lepton_xla as lx
from lepton_xla.compiler.weights import stored_bytes
from lepton_xla.errors import CalibrationError, TuningError
from lepton_xla.passes.core.timing import Timer
from lepton_xla.passes.core.timing_cache import TimingCache
from lepton_xla.passes.quantization.measurement import Timing
from lepton_xla.trees import name_leaves
from lepton_xla.tuning import CHOICES, Budget, Constraints, Drop, costs, estimating, searching, tune
from lepton_xla.tuning.choices import find_groups
from lepton_xla.tuning.costs import stored_weights
from lepton_xla.tuning.pages import page
from lepton_xla.tuning.scores import output_errors
from lepton_xla.tuning.summaries import summary
from lepton_xla.tuning.trials import digest

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((600, 8)).astype(np.float32)
WEIGHTS = {
    "q": jnp.asarray(RANDOM.standard_normal((8, 16)), jnp.float32),
    "k": jnp.asarray(RANDOM.standard_normal((8, 16)), jnp.float32),
    "out": jnp.asarray(RANDOM.standard_normal((16, 4)), jnp.float32),
}
FEW = (CHOICES[0], CHOICES[2], CHOICES[4], CHOICES[6])  # float, int8, 16 levels, 4 levels


def model(w, x):
    return jnp.tanh(x @ w["q"] + x @ w["k"]) @ w["out"]


PROGRAM = lx.trace(model, WEIGHTS, {"x": lx.TensorSpec(("batch", 8), "float32")})
LABELS = np.asarray(model(WEIGHTS, X)).argmax(-1)


def evaluate(predict):
    return {"accuracy": float((predict(x=X)["output"].argmax(-1) == LABELS).mean())}


class Watch(Timer):
    """A timer of which every call takes the time that it is told."""

    def __init__(self, *us):
        super().__init__(cache=TimingCache(None))
        self._us = us

    def medians_us(self, calls, budget_s=0.0):
        return [self._us[min(index, len(self._us) - 1)] for index in range(len(calls))]


def found(**changes):
    given = {
        "constraints": Constraints(max_drop=5.0),
        "objective": "bytes",
        "budget": Budget(minutes=10, trials=3),
        "buckets": {"batch": (1,)},
        "choices": FEW,
        "presets": (),
        "timer": Watch(100.0, 80.0),
        "data": [{"x": X[:64]}],
        "evaluate": evaluate,
    } | changes
    data, judged = given.pop("data"), given.pop("evaluate")
    return tune(PROGRAM, judged, data, **given)


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """A search for the fewest bytes, and its journal."""
    path = tmp_path_factory.mktemp("tuning") / "journal.jsonl"
    return found(journal=path), path


def test_sites_that_share_an_input_are_one_group():
    groups, _ = find_groups(PROGRAM, FEW)
    assert [group.sites for group in groups] == [("q", "k"), ("out",)]
    assert [choice.name for choice in groups[0].choices] == ["float", "int8", "16 levels", "4 levels"]


def test_scores_are_the_change_of_the_outputs_to_first_order():
    # Of a linear program the first order is all there is.
    program = lx.trace(lambda w, x: x @ w["q"] + x @ w["k"], WEIGHTS, {"x": lx.TensorSpec(("batch", 8), "float32")})
    groups, plans = find_groups(program, (CHOICES[0], CHOICES[2], CHOICES[1], CHOICES[10]))
    stored = stored_weights(program, groups, plans)
    (errors,) = output_errors(program, groups, plans, [{"x": X[i : i + 50]} for i in range(0, 600, 50)], stored)

    def rounded(w, axis=0):
        scale = np.abs(w).max(axis, keepdims=True) / 127
        return np.rint(w / scale) * scale

    def pruned(w):
        return np.where(np.abs(w) > np.median(np.abs(w)), w, 0)

    x = X.astype(np.float64)
    weights = [np.asarray(WEIGHTS[name], np.float64) for name in ("q", "k")]
    exact = x @ sum(weights)
    int8 = x @ sum(map(rounded, weights))
    both = rounded(x, 1) @ sum(map(rounded, weights))
    half = rounded(x, 1) @ sum(rounded(pruned(each)) for each in weights)
    true = [np.sum((out - exact) ** 2) / np.sum(exact**2) for out in (int8, both, half)]
    assert errors[0] == 0
    assert errors[1:] == pytest.approx(true, rel=0.5)  # what random signs leave


def test_bytes_of_groups_add_up_to_those_of_the_model():
    # As float it is a large model, whose weights are packed for speed; in int8 it is a small one.
    weights = {name: jnp.asarray(RANDOM.standard_normal((768, 768)) / 32, jnp.float32) for name in "abc"}
    program = lx.trace(
        lambda w, x: jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) @ w["c"],
        weights,
        {"x": lx.TensorSpec(("batch", 768), "float32")},
    )
    groups, plans = find_groups(program, (CHOICES[0], CHOICES[2]))
    stored = stored_weights(program, groups, plans)
    on_disk, _ = costs.bytes_of_choices(groups, stored)
    whole = [stored_bytes(name_leaves(each)) for each in stored.values()]
    assert np.sum(on_disk, 0) == pytest.approx(whole, rel=0.01)


def test_a_weight_on_two_devices_is_not_expected_to_have_a_kernel(monkeypatch):
    timing = Timing({}, 10.0, 8.0, None, kernel_us=2.0)
    monkeypatch.setattr(costs, "compare", lambda wanted, timer: [timing] * len(wanted))
    mesh = lx.sharding.mesh("data=2")

    def added(weight):
        program = lx.trace(lambda w, x: x @ w["w"], {"w": weight}, {"x": lx.TensorSpec(("batch", 8), "float32")})
        groups, plans = find_groups(program, CHOICES[:2])
        how = {"unpacks": True, "progress": lambda *_: None}
        return costs.times_of_choices(program, groups, plans, [{"batch": 2}], Watch(1.0), **how)[0][0].tolist()

    cut = jax.device_put(WEIGHTS["q"], NamedSharding(mesh, PartitionSpec(None, "data")))
    assert added(WEIGHTS["q"]) == [0, -8]
    assert added(cut) == [0, -2]


def test_what_is_found_is_built_again_from_its_recipe(smallest):
    tuned, _ = smallest
    best = tuned.best
    assert best is not None
    assert best.judged <= 5
    assert best.bytes < 0.6 * tuned.float_bytes
    assert set(best.choices) == {"q", "k", "out"}
    assert best.choices["q"] == best.choices["k"]
    assert best.bytes == min(trial.bytes for trial in tuned.trials if trial.judged <= 5)
    recipe = lx.Recipe.parse(best.recipe, name="found")
    small = lx.optimize(PROGRAM, recipe, calibration=[{"x": X[:64]}], buckets={"batch": (1,)}, timer=Watch(100.0, 80.0))
    answers = np.asarray(small.fn(small.weights, X))
    assert (answers.argmax(-1) == LABELS).mean() == pytest.approx(best.metrics["accuracy"], abs=0.005)
    assert (best.us, best.float_us, best.latency) == ((80.0,), (100.0,), pytest.approx(0.8))
    for trial in tuned.trials:
        assert trial.estimates["bytes"] == pytest.approx(trial.bytes, rel=0.1)
        assert trial.estimates["operations"] == pytest.approx(trial.operations, rel=0.1)
    assert tuned.float_operations == 2 * 8 * 16 + 16 * 4


def test_the_same_seed_gives_the_same_trials(smallest):
    again = found()
    assert [trial.name for trial in again.trials] == [trial.name for trial in smallest[0].trials]
    assert [trial.judged for trial in again.trials] == [trial.judged for trial in smallest[0].trials]


def test_a_killed_run_goes_on_where_it_was(smallest, tmp_path, monkeypatch):
    tuned, path = smallest
    lines = path.read_text().splitlines(keepends=True)
    torn = tmp_path / "torn.jsonl"
    torn.write_text("".join(lines[:-2]) + lines[-2][:40])  # killed while it wrote the last but one trial
    built = []
    measure = searching.Workshop.measure
    monkeypatch.setattr(
        searching.Workshop,
        "measure",
        lambda self, recipe, *a, **k: built.append(recipe.name) or measure(self, recipe, *a, **k),
    )
    monkeypatch.setattr(estimating, "output_errors", None)  # nothing is scored again
    again = found(journal=torn)
    assert [trial.name for trial in again.trials] == [trial.name for trial in tuned.trials]
    assert built == [trial.name for trial in tuned.trials[-2:]]
    # What was changed on the disk is not taken for what was measured.
    built.clear()
    damaged = torn.read_text().splitlines(keepends=True)
    assert '"bytes": ' in damaged[-1]
    torn.write_text("".join(damaged[:-1]) + damaged[-1].replace('"bytes": ', '"bytes": 9'))
    assert [trial.bytes for trial in found(journal=torn).trials] == [trial.bytes for trial in again.trials]
    assert built == [tuned.trials[-1].name]
    # Another budget starts from what is there.
    other = found(
        journal=torn,
        constraints=Constraints(max_bytes=int(0.45 * tuned.float_bytes)),
        objective="metric",
        budget=Budget(trials=1),
    )
    assert other.best is not None
    assert other.best.bytes <= 0.45 * tuned.float_bytes


def test_a_journal_of_another_model_is_refused(smallest, tmp_path):
    _, path = smallest
    text = path.read_text()
    line = r"journal.jsonl: is the journal of another run, which differs in "
    with pytest.raises(TuningError, match=line + "seed"):
        found(journal=path, seed=1)
    with pytest.raises(TuningError, match=line + "data"):
        found(journal=path, data=[{"x": X[:32]}])
    with pytest.raises(TuningError, match=line + "choices"):
        # Of the same name, another thing.
        found(journal=path, choices=(*FEW[:3], dataclasses.replace(FEW[3], sparsity=0.25)))
    with pytest.raises(TuningError, match=line + "rows"):
        found(journal=path, evaluate=lambda predict: (predict(x=-X), evaluate(predict))[1])
    other = PROGRAM.replace(weights={**WEIGHTS, "out": 2 * WEIGHTS["out"]})
    with pytest.raises(TuningError, match=line + "model"):
        tune(
            other,
            evaluate,
            [{"x": X[:64]}],
            constraints=Constraints(5.0),
            choices=FEW,
            buckets={"batch": (1,)},
            journal=path,
            timer=Watch(1.0),
        )
    assert not (again := searching.Journal(path, {"model": "b"}, begin_anew=True)).get("scores")
    assert (
        again.once("scores", lambda: 1) == searching.Journal(path, {"model": "b"}, begin_anew=True).get("scores") == 1
    )
    assert path.with_name("journal.jsonl.old").read_text() == text
    searching.Journal(path, {"model": "c"}, begin_anew=True)
    searching.Journal(path, {"model": "d"}, begin_anew=True)
    assert path.with_name("journal.jsonl.old").read_text() == text  # what was put aside stays
    assert '"model": "c"' in path.with_name("journal.jsonl.old3").read_text()
    path.write_text(text)
    with pytest.raises(TuningError, match=r"differs in version of lepton_xla; give another journal, or --new-journal"):
        searching.Journal(path, json.loads(text.partition("\n")[0])["identity"] | {"format": 0})
    computed = PROGRAM.replace(fn=lambda w, x: jnp.sin(x @ w["q"] + x @ w["k"]) @ w["out"])
    assert digest(computed, [])["model"] != digest(PROGRAM, [])["model"]  # of the same weights
    (tmp_path / "no.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(TuningError, match=r"no.jsonl: is no journal"):
        found(journal=tmp_path / "no.jsonl")
    with pytest.raises(TuningError, match="cannot be read"):
        found(journal=tmp_path)


def test_a_run_that_was_killed_as_it_began_its_journal_begins_again(smallest, tmp_path):
    _, path = smallest
    torn = tmp_path / "torn.jsonl"
    head = path.read_text().splitlines()[0]
    for end in (1, 10, len(head) - 1):
        torn.write_text(head[:end])
        searching.Journal(torn, {"model": "a"}).once("x", lambda: 1)
        assert searching.Journal(torn, {"model": "a"}).get("x") == 1
    torn.write_text("no newline, and none of ours")
    with pytest.raises(TuningError, match=r"is no journal"):
        searching.Journal(torn, {"model": "a"})


def test_ctrl_c_gives_the_best_so_far(monkeypatch):
    measure, count = searching.Workshop.measure, iter(range(10))

    def interrupted(self, *args, **kwargs):
        if next(count) == 1:
            raise KeyboardInterrupt
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(searching.Workshop, "measure", interrupted)
    tuned = found()
    assert (tuned.stopped, len(tuned.trials)) == ("interrupted", 1)


def test_what_xla_cannot_do_is_told(monkeypatch, tmp_path):
    def fails(*_args, **_kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")

    with monkeypatch.context() as patch:  # of a candidate: the search goes on
        patch.setattr(searching.Workshop, "_times", fails)
        (failed,) = found(budget=Budget(trials=1), journal=tmp_path / "j.jsonl").trials
        assert failed.failure == "RESOURCE_EXHAUSTED: out of memory"
    assert found(budget=Budget(trials=1), journal=tmp_path / "j.jsonl").best is not None  # it is tried again
    monkeypatch.setattr(estimating, "output_errors", fails)
    with pytest.raises(lx.ExecutionError, match=r"RESOURCE_EXHAUSTED: out of memory$"):
        found()


def test_constraints_that_no_measurement_keeps_to_give_the_nearest(smallest):
    tuned = found(constraints=Constraints(max_drop=5.0, max_latency_ms=0.01), budget=Budget(trials=1))
    assert tuned.best is None
    assert tuned.nearest is not None
    assert tuned.nearest.excess(tuned.constraints) == pytest.approx(tuned.nearest.us[0] / 10 - 1)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"constraints": Constraints(5.0, max_bytes=10)}, TuningError, "max_bytes = 10 cannot be kept to"),
        (
            {"constraints": Constraints(5.0, max_operations=9)},
            TuningError,
            "max_operations = 9 cannot .* multiply-adds",
        ),
        ({"constraints": Constraints(5.0, max_latency_ms=(1, 2))}, TuningError, "has 2 limits, but .* at 1 sizes"),
        ({"constraints": Constraints(max_drop=0.1)}, TuningError, "600 rows, of which 300 .* 2000 rows would do"),
        ({"constraints": Constraints(max_bytes=100)}, TuningError, "objective 'bytes' needs max_drop"),
        ({"objective": "metric"}, TuningError, "needs max_bytes"),
        ({"seed": -1}, TuningError, "seed = -1: expected"),
        ({"objective": "fast"}, TuningError, "objective 'fast': expected one of latency"),
        ({"data": []}, CalibrationError, "calibration data is empty"),
        ({"choices": CHOICES[1:]}, TuningError, "the first of the choices"),
        ({"presets": ("nothing",)}, lx.RecipeError, "nothing"),
        ({"evaluate": lambda _: 1 / 0}, TuningError, "evaluate fails: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_looked_for_is_refused_before_anything_is_measured(changes, error, said, monkeypatch):
    monkeypatch.setattr(searching.Workshop, "measure", None)
    with pytest.raises(error, match=said):
        found(**changes)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Budget(minutes=0), "a budget of 0 minutes"),
        (lambda: Budget(minutes=float("nan")), "a budget of nan minutes"),
        (lambda: Budget(trials=0), "a budget of 0 trials"),
        (lambda: Constraints(max_bytes=0), "max_bytes = 0: expected a number above 0"),
        (lambda: Constraints(max_drop=float("nan")), "max_drop = nan"),
        (lambda: Constraints(max_latency_ms=-1.0), "max_latency_ms = -1.0"),
    ],
)
def test_budgets_and_constraints_that_are_none(make, said):
    with pytest.raises(TuningError, match=re.escape(said)):
        make()


def test_the_page_is_one_file_without_addresses(smallest):
    tuned, _ = smallest
    text = page("a<b>.py:model", tuned)
    assert "a&lt;b&gt;.py:model" in text
    assert not re.search(r"https?:|//|<script|<link|src=|url\(", text)
    assert text.count("<circle") == 2 * len(tuned.trials)  # by bytes and by time
    # The best is drawn over what lies below it.
    last = [plot.rpartition("<circle")[2] for plot in text.split("</svg>")[:2]]
    assert all(f"<title>{tuned.best.name}:" in each and "#2a7d2e" in each for each in last)
    assert "Green, larger: the best, with the least bytes on disk" in text
    assert 'name="viewport"' in text
    assert all(trial.name in text for trial in tuned.trials)
    document = json.loads(json.dumps(tuned.to_json()))
    assert document["best"]["choices"] == tuned.best.choices
    nothing = dataclasses.replace(tuned, trials=(), best=None, nearest=None)
    assert "Nothing was measured." in page("m", nothing)


def test_the_best_is_on_the_frontier_though_another_is_better_at_what_was_not_asked_for(smallest):
    tuned, _ = smallest
    faster = dataclasses.replace(tuned.best, name="faster", us=(70.0,), output_error=1.0)
    two = dataclasses.replace(tuned, trials=(faster, *tuned.trials))
    assert {"faster", tuned.best.name} <= {trial.name for trial in two.frontier}
    same = dataclasses.replace(tuned.best, name="same", output_error=1.0)
    two = dataclasses.replace(tuned, trials=(same, *tuned.trials))
    assert [trial.name for trial in two.frontier] == [trial.name for trial in tuned.frontier]


def test_what_a_reader_must_know_of_the_best_is_said(smallest):
    tuned, _ = smallest

    def said(**changes):
        best = dataclasses.replace(tuned.best, **changes)
        return " ".join(summary(dataclasses.replace(tuned, best=best, nearest=best)))

    assert "rows held back it lost" not in said(reported=Drop(5.0, 4.0, 6.0, 300))
    assert "it lost +6.00 points, more than was asked for, which may be chance" in said(reported=Drop(6.0, 4, 8, 300))
    assert "which is more than chance" in said(reported=Drop(8.0, 6, 10, 300))
    assert "about 1,234 would do" in said(reported=Drop(0.0, -9, 9, 300, 1234))
    assert "its recipe alone does not make it" in said(training={"rate": 0.1})
    none = " ".join(summary(dataclasses.replace(tuned, best=None)))
    assert f"No recipe keeps to all of it. The nearest is {tuned.nearest.name}" in none


def test_what_was_built_is_certified(smallest):
    tuned, _ = smallest
    program = tuned.build()

    def predict(**inputs):
        return {"output": np.asarray(program.fn(program.weights, inputs["x"]))}

    certificate = tuned.certify(predict, tuned.best.bytes)
    reported = tuned.best.reported
    assert (certificate.drop, certificate.low, certificate.high, certificate.rows) == pytest.approx(
        (reported.points, reported.low, reported.high, 300)
    )
    assert (certificate.value, certificate.float_value) == pytest.approx((tuned.best.metrics["accuracy"], 1.0))
    # 600 of 600 right: at least 0.025 ** (1 / 600) of all rows, less the drop's upper end.
    assert certificate.promised == pytest.approx(0.025 ** (1 / 600) - max(reported.high, 0) / 100)
    assert (certificate.weights_bytes, certificate.float_bytes) == (tuned.best.bytes, tuned.float_bytes)
    by_loss = found(
        evaluate=lambda predict: {"loss": 1 - evaluate(predict)["accuracy"]},
        lower_is_better=True,
        budget=Budget(trials=1),
    )
    assert by_loss.certify(predict, 1).promised is None
