"""Distillation in `fit`: the same student on one device, on several, and in microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_xla as lx
from lepton_xla import train

ROWS, WIDTH, CLASSES = 8, 6, 5


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def network(hidden, seed):
    def fn(w, x):
        with jax.named_scope("hidden"):
            h = jax.nn.relu(x @ w["up"])
        return h @ w["down"]

    weights = {"up": array(WIDTH, hidden, seed=seed), "down": array(hidden, CLASSES, seed=seed + 1)}
    return lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", WIDTH), "float32")})


BATCH = {"id": np.arange(ROWS), "x": np.asarray(array(ROWS, WIDTH, seed=9)), "label": np.arange(ROWS) % CLASSES}
LAYOUTS = [
    {},
    {"accumulate": 2},
    {"mesh": "data=2"},
    {"mesh": "data=2", "accumulate": 2},
    {"mesh": "data=2", "rules": lx.sharding.Rules(fallback="data", fallback_bytes=1)},
]


@pytest.mark.parametrize("stored", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_layout_trains_the_same_student(stored, tmp_path):
    """`fit` prepares the batches, passes the step, binds the teacher, and trains and drops the projection."""
    teacher = network(12, 5)
    found = []
    for options in LAYOUTS:
        student = network(8, 1)
        if stored:
            answers = train.teach(teacher, [BATCH], tmp_path / "answers", top_k=3)
            loss = train.distill(student, answers, [train.Logits(2.0), train.Labels()])
        else:
            terms = [train.Logits(), train.Features({"hidden": "hidden"})]
            loss = train.distill(student, teacher, [*terms, train.Labels(weight=optax.linear_schedule(1.0, 0.0, 4))])
        result = train.fit(student, loss, optax.sgd(0.1), [BATCH], steps=4, **options)
        assert set(result.program.weights) == {"up", "down"}
        found.append(result)
        assert result.metrics["loss"] > 0
    for one in found[1:]:
        for path, leaf in found[0].program.weights.items():
            np.testing.assert_allclose(one.program.weights[path], leaf, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(one.metrics["loss"], found[0].metrics["loss"], rtol=1e-5)
    assert not np.allclose(found[0].program.weights["up"], network(8, 1).weights["up"])


@pytest.mark.parametrize("stored", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_student_is_shrunk_and_rounded_on_the_way(stored, tmp_path):
    student, teacher = network(8, 1), network(12, 5)
    source = train.teach(teacher, [BATCH], tmp_path / "answers", top_k=3) if stored else teacher
    terms = [train.Logits(2.0)] if stored else [train.Logits(2.0), train.Features({"hidden": "hidden"})]
    compression = train.Compression("int8", shrink_at=2, shrink={"sparsity": 0.5}, quantize_from=4)
    loss = train.distill(student, source, terms)
    result = train.fit(student, loss, optax.sgd(0.01), [BATCH], steps=6, compression=compression)
    assert result.program.weights["up"].shape == (WIDTH, 4)
    assert set(result.quantized().weights) == {"up", "down"}


def test_a_run_does_not_go_on_with_another_teacher(tmp_path):
    """Other weights, more teachers, stored answers in place of the teacher, none at all: refused by name."""
    student, teacher, other = network(8, 1), network(12, 5), network(12, 7)
    answers = train.teach(teacher, [BATCH], tmp_path / "answers", top_k=3)
    sharper = train.teach(teacher, [BATCH], tmp_path / "sharper", top_k=3, temperatures=(2.0,))
    where = train.Checkpoints(tmp_path / "run"), train.Checkpoints(tmp_path / "stored")

    def fit(loss, steps, checkpoint):
        return train.fit(student, loss, optax.sgd(0.1), [BATCH], steps=steps, checkpoint=checkpoint)

    fit(train.distill(student, teacher), 1, where[0])
    fit(train.distill(student, answers), 1, where[1])
    labels = train.supervised(student)
    for checkpoint, losses in (
        (where[0], [train.distill(student, each) for each in (other, [teacher, teacher], answers)] + [labels]),
        (where[1], [train.distill(student, sharper, [train.Logits(2.0)]), train.distill(student, teacher), labels]),
    ):
        for loss in losses:
            with pytest.raises(lx.CheckpointError, match="of another run: the teacher differ"):
                fit(loss, 2, checkpoint)
    assert int(fit(train.distill(student, network(12, 5)), 2, where[0]).state.step) == 2
    assert int(fit(train.distill(student, train.Answers.load(tmp_path / "answers")), 2, where[1]).state.step) == 2
