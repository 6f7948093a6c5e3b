"""Stored answers of a teacher: as good as the teacher itself, whatever happened while they were written."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.errors import TrainingError
from lepton_xla.train import Answers, Labels, Logits, distill, teach

KEY = jax.random.key(0)
ROWS, WIDTH, CLASSES = 10, 5, 7


def array(*shape, seed=0, scale=1.0):
    return np.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, np.float32)


def linear(seed=0, classes=CLASSES, scale=1.0):
    inputs = {"x": lx.TensorSpec(("batch", WIDTH), "float32")}
    return lx.trace(lambda w, x: x @ w["w"], {"w": jnp.asarray(array(WIDTH, classes, seed=seed, scale=scale))}, inputs)


STUDENT, TEACHER = linear(1), linear(2, scale=2.0)
X = array(ROWS, WIDTH, seed=9)
IDS = np.random.default_rng(0).permutation(1000)[:ROWS]


def batches(size=4, rows=ROWS):
    return [
        {"id": IDS[start : min(start + size, rows)], "x": X[start : min(start + size, rows)]}
        for start in range(0, rows, size)
    ]


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def logits_of(program):
    return np.asarray(X, np.float64) @ np.asarray(program.weights["w"], np.float64)


def value_of(loss, order=slice(None)):
    batch = loss.prepare({"id": IDS[order], "x": X[order]})
    return loss(STUDENT.weights, {name: jnp.asarray(leaf) for name, leaf in batch.items()}, KEY, {})


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.5])
def test_all_logits_are_as_good_as_the_teacher(tmp_path, temperature):
    """With every class stored, any temperature is possible, also one that was not asked for."""
    answers = teach(TEACHER, batches(), tmp_path / "answers", top_k=CLASSES)
    stored, live = distill(STUDENT, answers, [Logits(temperature)]), distill(STUDENT, TEACHER, [Logits(temperature)])
    np.testing.assert_allclose(value_of(stored)[0], value_of(live)[0], rtol=1e-6)

    def gradient(loss):
        batch = {name: jnp.asarray(leaf) for name, leaf in loss.prepare({"id": IDS, "x": X}).items()}
        return jax.jit(jax.grad(lambda weights: loss(weights, batch, KEY, {})[0]))(STUDENT.weights)["w"]

    np.testing.assert_allclose(gradient(stored), gradient(live), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("top_k", [1, 3, CLASSES - 1])
def test_the_rest_is_one_class(tmp_path, temperature, top_k):
    answers = teach(TEACHER, batches(), tmp_path / "answers", top_k=top_k)
    theirs, own = (softmax(logits_of(program) / temperature) for program in (TEACHER, STUDENT))
    kept = np.argsort(-theirs, -1)[:, :top_k]
    p, q = (np.take_along_axis(found, kept, -1) for found in (theirs, own))
    p, q = (np.concatenate([found, 1 - found.sum(-1, keepdims=True)], -1) for found in (p, q))
    expected = temperature**2 * (p * np.log(p / q)).sum(-1).mean()
    loss = distill(STUDENT, answers, [Logits(temperature)])
    np.testing.assert_allclose(value_of(loss)[0], expected, rtol=1e-5)
    # Mass on the other classes is pushed down, so the student that has the teacher's weights is the best one.
    batch = {name: jnp.asarray(leaf) for name, leaf in loss.prepare({"id": IDS, "x": X}).items()}
    grads = jax.grad(lambda weights: loss(weights, batch, KEY, {})[0])(TEACHER.weights)
    np.testing.assert_allclose(grads["w"], 0, atol=1e-5)


def test_answers_are_found_by_id_in_any_order(tmp_path):
    answers = teach(TEACHER, batches(), tmp_path / "answers", top_k=3, shard_rows=4)
    assert answers.count == ROWS
    assert len([path for path in (tmp_path / "answers").iterdir() if path.is_dir()]) == 3
    order = np.random.default_rng(1).permutation(ROWS)
    found = Answers.load(tmp_path / "answers", teacher=TEACHER).lookup(IDS[order])
    best = np.argsort(-logits_of(TEACHER), -1)[order, :3]
    np.testing.assert_array_equal(found["teacher:indices"], best)
    logits = found["teacher:logits"].view(np.float32)
    np.testing.assert_allclose(logits, np.take_along_axis(logits_of(TEACHER)[order], best, -1), rtol=1e-5)
    with pytest.raises(TrainingError, match=r"has no answer to 1001, 1002; run `teach` on all samples"):
        answers.lookup([IDS[0], 1001, 1002])
    with pytest.raises(TrainingError, match="ids of samples are float64"):
        answers.lookup([1.0])


def test_labels_and_a_mask_go_with_stored_answers(tmp_path):
    answers = teach(TEACHER, batches(), tmp_path / "answers", top_k=3)
    loss = distill(STUDENT, answers, [Logits(2.0, mask="counts"), Labels(weight=0.5)])
    counts = np.arange(ROWS) % 2
    batch = loss.prepare({"id": IDS, "x": X, "label": np.arange(ROWS) % CLASSES, "counts": counts})
    _, metrics, _ = loss(STUDENT.weights, {name: jnp.asarray(leaf) for name, leaf in batch.items()}, KEY, {})
    half = distill(STUDENT, answers, [Logits(2.0)])
    np.testing.assert_allclose(metrics["logits"], value_of(half, np.flatnonzero(counts))[0], rtol=1e-6)
    assert float(metrics["labels"]) > 0


def test_a_loop_that_computes_in_16_bits_does_not_round_the_answers(tmp_path):
    answers = teach(TEACHER, batches(), tmp_path / "answers", top_k=3)
    loss = distill(STUDENT, answers)
    batch = loss.prepare({"id": IDS, "x": X})
    cast = {name: leaf.astype(jnp.bfloat16) if leaf.dtype == np.float32 else leaf for name, leaf in batch.items()}
    assert [name for name in batch if cast[name].dtype != batch[name].dtype] == ["x"]
    whole = {name: jnp.asarray(leaf) for name, leaf in {**cast, "x": X}.items()}
    np.testing.assert_array_equal(loss(STUDENT.weights, whole, KEY, {})[0], value_of(loss)[0])


def test_tokens_have_answers_at_each_position(tmp_path):
    inputs = {"x": lx.TensorSpec(("batch", 3, WIDTH), "float32")}
    student, teacher = (
        lx.trace(lambda w, x: x @ w["w"], {"w": jnp.asarray(array(WIDTH, CLASSES, seed=s))}, inputs) for s in (1, 2)
    )
    batch = {"id": np.arange(4), "x": array(4, 3, WIDTH)}
    answers = teach(teacher, [batch], tmp_path / "answers", top_k=CLASSES, dtype="float16")
    stored, live = (distill(student, one, [Logits(1.0)]) for one in (answers, teacher))
    values = [
        loss(student.weights, {name: jnp.asarray(leaf) for name, leaf in loss.prepare(batch).items()}, KEY, {})[0]
        for loss in (stored, live)
    ]
    assert values[0] != values[1]  # float16
    np.testing.assert_allclose(values[0], values[1], rtol=1e-2)


def test_an_artifact_teaches_too(tmp_path):
    servable = lx.compile(TEACHER, {"batch": (1, 4)}).servable()
    answers = teach(servable, batches(), tmp_path / "answers", top_k=CLASSES)
    live = distill(STUDENT, TEACHER)
    np.testing.assert_allclose(value_of(distill(STUDENT, answers))[0], value_of(live)[0], rtol=1e-5)
    Answers.load(tmp_path / "answers", teacher=servable)
    with pytest.raises(TrainingError, match="the answers are of another teacher, or of other weights of it"):
        Answers.load(tmp_path / "answers", teacher=TEACHER)


class EndedError(Exception):
    """What ends a run in the middle."""


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    folder = tmp_path / "answers"

    def broken():
        yield from batches()[:2]
        raise EndedError

    with pytest.raises(EndedError):
        teach(TEACHER, broken(), folder, top_k=3, shard_rows=4)
    with pytest.raises(TrainingError, match="the answers are not complete; run `teach` again, and it will go on"):
        Answers.load(folder)
    with pytest.raises(TrainingError, match="answers with another digest; give another folder"):
        teach(STUDENT, batches(), folder, top_k=3)
    with pytest.raises(TrainingError, match="answers with another top_k"):
        teach(TEACHER, batches(), folder, top_k=2)

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    assert len(before) == 8
    # What a killed process leaves half written is removed.
    (folder / "00002.tmp").mkdir()
    (folder / "00002.tmp" / "ids.npy").write_bytes(b"half")
    answers = teach(TEACHER, batches(), folder, top_k=3, shard_rows=4)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    whole = teach(TEACHER, batches(), tmp_path / "whole", top_k=3)
    for name, leaf in whole.lookup(IDS).items():
        np.testing.assert_array_equal(answers.lookup(IDS)[name], leaf)
    assert not list(folder.glob("*.tmp"))


SCRIPT = """
import os, signal, sys
import jax.numpy as jnp
import numpy as np
import lepton_xla as lx

folder, at = sys.argv[1], int(sys.argv[2])
weights = {"w": jnp.asarray(np.random.default_rng(2).standard_normal((5, 7)), jnp.float32)}
teacher = lx.trace(lambda w, x: x @ w["w"], weights, {"x": lx.TensorSpec(("batch", 5), "float32")})
x = np.random.default_rng(9).standard_normal((10, 5)).astype(np.float32)
synced = os.fsync
count = 0

def fsync(file):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
    synced(file)

os.fsync = fsync
data = [{"id": np.arange(k, k + 2), "x": x[k : k + 2]} for k in range(0, 10, 2)]
print(lx.train.teach(teacher, data, folder, top_k=3, shard_rows=2).count)
"""


@pytest.mark.parametrize("at", [8, pytest.param(1, marks=pytest.mark.slow), pytest.param(27, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_loses_one_shard_at_most(tmp_path, at):
    """Killed while it writes the header, the second shard, or the manifest; the run after it completes the answers."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    run = lambda place, at: subprocess.run(  # noqa: E731
        [sys.executable, script, place, str(at)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    killed = run(tmp_path / "answers", at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "answers" / "manifest.json").exists()
    done = run(tmp_path / "answers", 0)
    assert done.stdout.strip() == "10", done.stderr
    assert run(tmp_path / "whole", 0).returncode == 0
    found, whole = (Answers.load(tmp_path / name).lookup(np.arange(10)) for name in ("answers", "whole"))
    for name, leaf in whole.items():
        np.testing.assert_array_equal(found[name], leaf)


def test_samples_can_be_added(tmp_path):
    teach(TEACHER, batches(rows=6), tmp_path / "answers", top_k=3)
    answers = teach(TEACHER, batches(), tmp_path / "answers", top_k=3)
    assert answers.count == ROWS
    np.testing.assert_array_equal(answers.lookup(IDS)["teacher:indices"][:, 0], logits_of(TEACHER).argmax(-1))


def test_damage_is_found(tmp_path):
    folder = tmp_path / "answers"
    teach(TEACHER, batches(), folder, top_k=3)
    path = folder / "00000" / "logits.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(TrainingError, match=r"logits\.npy is damaged"):
        Answers.load(folder)
    teach(TEACHER, batches(), folder, top_k=3)  # writes the damaged shard anew
    Answers.load(folder)
    path.unlink()
    with pytest.raises(TrainingError, match=r"logits\.npy: No such file"):
        Answers.load(folder)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(TrainingError, match=r"manifest\.json is damaged, or of another version"):
        Answers.load(folder)
    manifest.write_text(json.dumps(json.loads(text) | {"header": json.loads(text)["header"] | {"format": 2}}))
    with pytest.raises(TrainingError, match="has format 2; this version reads 1"):
        Answers.load(folder)


def test_answers_that_do_not_fit_the_student_are_refused(tmp_path):
    answers = teach(TEACHER, batches(), tmp_path / "answers", top_k=3)
    with pytest.raises(
        TrainingError, match=r"the answers are float32\[rows, 7\], the student's 'output' is float32\[batch, 9\]"
    ):
        distill(linear(1, classes=9), answers)
    with pytest.raises(
        TrainingError, match=r"the answers are for the temperatures 1.0, 2.0, 4.0, not 3.0; run `teach`"
    ):
        distill(STUDENT, answers, [Logits(3.0)])
    with pytest.raises(TrainingError, match="the batch has no answers of the teacher: pass each batch through"):
        distill(STUDENT, answers)(STUDENT.weights, {"x": jnp.asarray(X)}, KEY, {})
    with pytest.raises(TrainingError, match="the batch has no entry 'id'"):
        distill(STUDENT, answers).prepare({"x": X})


@pytest.mark.parametrize(
    ("changes", "data", "message"),
    [
        ({"top_k": 0}, None, "top_k = 0; the teacher has 7 classes, so expected 1 to 7"),
        ({"top_k": 8}, None, "top_k = 8"),
        ({"temperatures": ()}, None, r"temperatures = \(\)"),
        ({"temperatures": (1.0, -1.0)}, None, r"temperatures = \(1.0, -1.0\); expected numbers above 0"),
        ({"dtype": "int8"}, None, "dtype = 'int8'; expected float32 or float16"),
        ({"output": "logits"}, None, "the teacher has no output 'logits'"),
        ({"shard_rows": 0}, None, "shard_rows = 0"),
        ({}, [], "the data is empty"),
        ({}, [{"x": X}], "the batch has no entry 'id'"),
        ({}, [{"id": IDS}], "the batch has no entry 'x'"),
        ({}, [X], "batch 0 is a ndarray; expected a mapping"),
        ({}, [{"id": IDS.astype(np.float32), "x": X}], "'id' is float32"),
        ({}, [{"id": IDS[:3], "x": X}], "batch 0 has 3 ids and 10 answers"),
        ({}, [*batches(), {"id": IDS[:1], "x": X[:1]}], f"the id {IDS[0]} occurs twice"),
        ({}, [{"id": IDS, "x": X * np.float32(np.nan)}], f"answer to sample {IDS[0]} is NaN or infinite as float32"),
        ({"dtype": "float16"}, [{"id": IDS, "x": X * np.float32(1e6)}], "is NaN or infinite as float16"),
    ],
)
def test_bad_arguments_and_data_are_named(tmp_path, changes, data, message):
    with pytest.raises(TrainingError, match=message):
        teach(TEACHER, batches() if data is None else data, tmp_path / "answers", **({"top_k": 3} | changes))


def test_folders_that_are_something_else_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(TrainingError, match=r"has other files, such as mine\.txt"):
        teach(TEACHER, batches(), tmp_path, top_k=3)
    with pytest.raises(TrainingError, match="there are no answers of a teacher"):
        Answers.load(tmp_path / "missing")
    with pytest.raises(TrainingError, match="what was stored stays"):
        teach(TEACHER, batches(), tmp_path / "mine.txt", top_k=3)


def test_two_runs_in_one_folder(tmp_path):
    def other():
        yield batches()[0]
        with pytest.raises(TrainingError, match="another process is writing answers there"):
            teach(TEACHER, batches(), tmp_path / "answers", top_k=3)
        yield from batches()[1:]

    assert teach(TEACHER, other(), tmp_path / "answers", top_k=3).count == ROWS
