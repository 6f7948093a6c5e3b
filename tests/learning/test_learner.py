"""One round of learning on files: what is trained, judged, refused, and what a bad input says."""

import json
import math

import learning_model
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.learning import Learner, LearningPlan, judge
from lepton_xla.learning.masters import read_master, write_master
from lepton_xla.learning.mixing import OldData

PLAN = LearningPlan(steps=100, least_rows=100, least_held_out=20)


def accuracy(servable, sign):
    x, labels = learning_model.rows(600, 99, sign)
    return float((servable(x=x)["output"].argmax(-1) == labels).mean())


@pytest.mark.parametrize("kind", ["float", "int8", "master"])
def test_a_shift_is_learned_and_old_data_kept(bases, sampled, tmp_path, kind):
    sampled.add(*learning_model.rows(500, 1, sign=-1.0))
    # The artifact that keeps its float master needs no weights from elsewhere.
    spec = learning_model.spec(**({"model": learning_model.program} if kind == "master" else {}))
    learner = Learner(spec, bases[kind], sampled.folder, tmp_path / "learning", plan=PLAN)
    ended = learner.once()
    assert (ended.phase, ended.number) == ("kept", 1)
    base = lx.load(bases[kind])
    after = lx.load(tmp_path / "learning/blobs/round/update.lepton", base=base)
    assert after.manifest.is_update
    assert after.manifest.fit == base.manifest.fit
    before, now = accuracy(base, -1.0), accuracy(after, -1.0)
    assert before < 0.6
    assert now > before + 0.8 * (accuracy(base, 1.0) - before)
    assert accuracy(after, 1.0) > accuracy(base, 1.0) - 0.03
    # The figures of the verdict are those of rows that were not trained on.
    assert ended.verdict["rows"] == ended.held_out
    assert ended.rows + ended.held_out == 500
    assert abs(ended.verdict["accuracy"] - now) < 0.1


def test_without_old_data_in_the_batches_it_forgets_and_is_refused(bases, sampled, tmp_path):
    sampled.add(*learning_model.rows(500, 1, sign=-1.0))
    plan = LearningPlan(steps=150, least_rows=100, least_held_out=20, fresh=1.0)
    ended = Learner(learning_model.spec(), bases["float"], sampled.folder, tmp_path / "learning", plan=plan).once()
    assert ended.phase == "refused"
    assert ended.reason.startswith("on old data accuracy goes from")
    assert not (tmp_path / "learning/blobs/round").exists()


def test_what_is_not_better_is_refused(bases, sampled, tmp_path):
    sampled.add(*learning_model.rows(400, 1))  # nothing has shifted
    learner = Learner(learning_model.spec(), bases["float"], sampled.folder, tmp_path / "learning", plan=PLAN)
    ended = learner.once()
    assert (ended.phase, ended.reason[:21]) == ("refused", "not surely better on ")
    # Another round needs as many new rows; none are.
    with pytest.raises(lx.LearningError, match="0 labelled rows are new since round 1; expected 100"):
        learner.once()
    sampled.add(*learning_model.rows(50, 2))
    with pytest.raises(lx.LearningError, match="labelled rows are new since round 1"):
        learner.once()
    sampled.add(*learning_model.rows(200, 3, sign=-1.0))
    assert learner.once().number == 2
    assert [each.phase for each in learner.history()] == ["refused", "kept"]


def test_old_data_judges_where_there_is_no_evaluation(bases, sampled, tmp_path):
    sampled.add(*learning_model.rows(400, 1, sign=-1.0))
    spec = learning_model.spec(evaluate=None)
    ended = Learner(spec, bases["float"], sampled.folder, tmp_path / "learning", plan=PLAN).once()
    assert ended.phase == "kept"
    assert ended.verdict["old_before"]["accuracy"] > 0.95


def test_what_is_learned_is_signed(bases, sampled, tmp_path):
    sampled.add(*learning_model.rows(500, 1, sign=-1.0))
    key, public = lx.trust.create_keys(tmp_path / "release")
    given = (learning_model.spec(), bases["float"], sampled.folder, tmp_path / "learning")
    with pytest.raises(lx.TrustError):
        Learner(*given, plan=PLAN, key=public)
    better = tmp_path / "better.lepton"
    assert Learner(*given, plan=PLAN, key=key).once(better).phase == "kept"
    for update in (better, tmp_path / "learning/blobs/round/update.lepton"):
        assert lx.load(update, trust=public, base=lx.load(bases["float"])).manifest.is_update


@pytest.mark.parametrize(
    ("metric", "lower", "rise_is_better"),
    [("accuracy", (), True), ("val_Loss", (), False), ("perplexity", (), False), ("mae", (), True),
     ("mae", ("mae",), False), ("lossless", None, True)],
)  # fmt: skip
def test_which_way_a_metric_on_old_data_gets_worse(metric, lower, rise_is_better):
    x, labels = np.eye(4, dtype=np.float32)[[0, 1, 2, 3] * 5], np.array([0, 1, 2, 3] * 5)
    wrong, right = (lambda x: {"y": -x}), (lambda x: {"y": x})
    for after, is_better in ((3.0, rise_is_better), (1.0, not rise_is_better)):
        figures = iter([{metric: 2.0}, {metric: after}])
        said = {"higher_is_better": {metric}} if lower is None else {"lower_is_better": lower}
        verdict = judge(wrong, right, {"x": x}, labels, "y", lambda _, got=figures: next(got), **said)
        assert verdict.better == is_better, (metric, after)
    with pytest.raises(lx.LearningError, match="lower_is_better names 'none'; the metrics on old data are"):
        judge(wrong, right, {"x": x}, labels, "y", lambda _: {metric: 2.0}, lower_is_better=("none",))


@pytest.mark.parametrize("again", [3 * 7, 1])
def test_no_old_row_is_trained_on_and_judges(again):
    x, labels = learning_model.rows(7 * 16, 1)
    batches = [{"x": x[at : at + 16], "label": labels[at : at + 16]} for at in range(0, len(x), 16)]
    old = OldData(batches, ["x"], most_rows=16 * again)
    trained, judging = ({row.tobytes() for row in each["x"]} for each in (old.rows, old.judges))
    assert not trained & judging
    assert len(trained | judging) == min(16 * again, len(x))
    assert 0.1 < len(judging) / len(trained | judging) < 0.4
    few = OldData([{"x": x[:1], "label": labels[:1]}], ["x"], most_rows=5)
    assert len(few.rows["x"]) == 5
    with pytest.raises(lx.LearningError, match="the old data has too few rows to judge by"):
        few.accuracy(lambda x: {"output": x}, "output")


# Bad input.


def learn(bases, sampled, tmp_path, plan=PLAN, spec=None, base="float"):
    return Learner(spec or learning_model.spec(), bases[base], sampled.folder, tmp_path / "learning", plan=plan).once()


def test_no_samples_no_feedback_and_too_few(bases, sampled, tmp_path):
    with pytest.raises(lx.SampleError, match="no samples of this model: start the server with --samples"):
        learn(bases, sampled, tmp_path)
    sampled.add(*learning_model.rows(300, 1), labelled=False)
    with pytest.raises(lx.SampleError, match="300 samples of 'blobs', none with feedback"):
        learn(bases, sampled, tmp_path)
    sampled.add(*learning_model.rows(60, 2))
    with pytest.raises(lx.LearningError, match="too few; expected 100 and 20"):
        learn(bases, sampled, tmp_path)
    assert not list((tmp_path / "learning").rglob("round.json"))


def test_samples_of_another_signature_are_told(bases, sampled, tmp_path):
    x, labels = learning_model.rows(200, 1)
    sampled.add(x[:, :5], labels, version="7")
    with pytest.raises(
        lx.LearningError, match=r"left out: 200, such as request 'r0': the input 'x' is float32\[1, 5\]"
    ):
        learn(bases, sampled, tmp_path)
    sampled.add(*learning_model.rows(300, 2, sign=-1.0))
    ended = learn(bases, sampled, tmp_path)
    assert ended.rows + ended.held_out == 300
    assert ended.notes[0].startswith("200 samples do not fit")


def test_damaged_files_are_passed_over_and_told(bases, sampled, tmp_path):
    sampled.add(*learning_model.rows(300, 2, sign=-1.0))
    (sampled.folder / "blobs" / "0-1.samples").write_bytes(b"x" * 1000)
    ended = learn(bases, sampled, tmp_path)
    assert ended.phase == "kept"
    assert ended.notes == ("1000 bytes of damaged sample files were passed over",)


def test_rows_of_nan_that_anybody_can_send_are_left_out(bases, sampled, tmp_path):
    sampled.add(*learning_model.rows(300, 2, sign=-1.0))
    x, labels = learning_model.rows(40, 3)
    sampled.add(np.full_like(x, np.nan), labels)
    ended = learn(bases, sampled, tmp_path)
    assert (ended.phase, ended.rows + ended.held_out) == ("kept", 300)
    assert ended.notes == ("40 rows with NaN or infinity were left out: the old data has none",)


def test_labels_that_are_no_classes(bases, sampled, tmp_path):
    x, labels = learning_model.rows(200, 1)
    sampled.add(x, labels + 1)
    with pytest.raises(lx.LearningError, match="a label is 4, and the model has the classes 0 to 3"):
        learn(bases, sampled, tmp_path)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"x": np.zeros((4, 8), np.float32)}], "expected the inputs x and one more, the label"),
        ([{"x": np.zeros((4, 8), np.float32), "label": np.zeros((4, 2))}], "expected one integer for each row"),
    ],
)
def test_batches_without_one_label_a_row(bases, sampled, tmp_path, data, words):
    sampled.add(*learning_model.rows(300, 2))
    with pytest.raises(lx.LearningError, match=words):
        learn(bases, sampled, tmp_path, spec=learning_model.spec(data=data))


def test_an_evaluate_that_fails_is_one_line_and_loses_no_training(bases, sampled, tmp_path):
    sampled.add(*learning_model.rows(300, 2, sign=-1.0))
    with pytest.raises(lx.LearningError, match=r"^the TrainSpec's evaluate failed: ZeroDivisionError: "):
        learn(bases, sampled, tmp_path, spec=learning_model.spec(evaluate=lambda predict: {"accuracy": 1 / 0}))
    assert '"phase":"judge"' in (tmp_path / "learning/blobs/round.json").read_text()
    # Which way the metric of an Evaluation gets worse, its mode says, and not its name.
    figures = iter([{"mae": 1.0}, {"mae": 0.5}])
    evaluation = lx.train.Evaluation(lambda predict: next(figures), every=1, metric="mae", mode="min")
    assert learn(bases, sampled, tmp_path, spec=learning_model.spec(evaluate=evaluation)).phase == "kept"


def test_a_model_that_the_artifact_was_not_compiled_from(bases, sampled, tmp_path):
    sampled.add(*learning_model.rows(300, 2, sign=-1.0))
    weights = dict(learning_model.trained().weights)
    weights["hidden"], weights["bias"] = weights["hidden"][:, :16], weights["bias"][:16]
    weights["head"] = weights["head"][:16]
    spec = learning_model.spec(model=learning_model.program(weights))
    with pytest.raises(lx.LearningError, match="was compiled from another model than the TrainSpec's"):
        learn(bases, sampled, tmp_path, spec=spec, base="master")
    with pytest.raises(lx.LearningError, match="what was trained does not fit the artifact that serves"):
        learn(bases, sampled, tmp_path, spec=spec)


def test_a_model_without_classes(tmp_path, sampled):
    program = lx.trace(lambda w, x: (x @ w["w"]).sum(1), {"w": np.eye(4, dtype=np.float32)},
                       {"x": lx.TensorSpec(("batch", 4), "float32")})  # fmt: skip
    lx.compile(program, {"batch": (1,)}, name="sum").save(tmp_path / "sum.lepton")
    with pytest.raises(lx.LearningError, match="has no output with classes"):
        Learner(learning_model.spec(), tmp_path / "sum.lepton", sampled.folder, tmp_path / "learning")


def test_two_learners_of_one_folder(bases, sampled, tmp_path):
    learner = Learner(learning_model.spec(), bases["float"], sampled.folder, tmp_path / "learning", plan=PLAN)
    with learner._rounds.locked(), pytest.raises(lx.LearningError, match="another learner works there"):
        learner.once()


def test_a_folder_that_cannot_be_written(bases, sampled, tmp_path):
    (tmp_path / "learning").write_text("")
    with pytest.raises(lx.LearningError, match="cannot be written"):
        learn(bases, sampled, tmp_path)


@pytest.mark.parametrize(("at", "value"), [(8, 0x01), (10, 99), (6, 0xFF)])
def test_a_master_whose_archive_says_that_it_is_encrypted_or_packed_otherwise_is_damaged(tmp_path, at, value):
    path = tmp_path / "master.npz"
    write_master(path, {"w": np.zeros(2, np.float32)})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + at] = value
    path.write_bytes(data)
    with pytest.raises(lx.LearningError, match="is damaged"):
        read_master(path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"least_rows": math.nan}, {"steps": 2.5}, {"most_rows": True}, {"confidence": "0.9"}, {"max_drop": None},
        {"seed": -1}, {"fresh": math.nan}, {"old_rows": 0}, {"lower_is_better": "mae"}, {"lower_is_better": (1,)},
    ],
)  # fmt: skip
def test_a_plan_of_the_wrong_type_or_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(lx.LearningError, match=next(iter(wrong))):
        LearningPlan(**wrong)


def test_a_plan_takes_numpy_s_numbers_and_can_be_sent():
    plan = LearningPlan(steps=np.int64(3), fresh=np.float32(0.5), seed=np.uint8(1), rollout_s=np.float32(60))
    assert (plan.steps, plan.fresh, plan.seed) == (3, 0.5, 1)
    assert json.loads(json.dumps(plan.rollout("4"))) == {"version": "4", "most_s": 60.0}
    with pytest.raises(lx.LearningError, match="steps = "):
        LearningPlan(steps=np.bool_(True))


def test_a_damaged_master_is_named(tmp_path):
    (tmp_path / "master.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(lx.LearningError, match="is damaged"):
        read_master(tmp_path / "master.npz")
