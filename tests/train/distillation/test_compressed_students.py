"""Distillation of a student that is shrunk and rounded while it learns."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lepton_xla as lx
from lepton_xla.train import Compression, Features, Labels, Logits, Stage, State, distill, teach

KEY = jax.random.key(0)
ROWS, WIDTH, CLASSES = 8, 6, 5
INPUTS = {"x": lx.TensorSpec(("batch", WIDTH), "float32")}


def array(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def network(hidden, seed):
    def fn(w, x):
        with jax.named_scope("hidden"):
            h = jax.nn.relu(x @ w["up"])
        return h @ w["down"]

    return lx.trace(fn, {"up": array(WIDTH, hidden, seed=seed), "down": array(hidden, CLASSES, seed=seed + 1)}, INPUTS)


STUDENT, TEACHER = network(8, 1), network(12, 5)
BATCH = {"id": np.arange(ROWS), "x": array(ROWS, WIDTH, seed=9), "label": jnp.arange(ROWS) % CLASSES}


@pytest.mark.parametrize("stored", [False, True])
def test_the_projection_shrinks_with_the_student_and_rounding_keeps_the_loss(stored, tmp_path):
    optimizer = optax.adam(1e-2)
    terms = [Logits(2.0), Labels(weight=0.5)]
    if stored:
        teacher = teach(TEACHER, [{"id": BATCH["id"], "x": np.asarray(BATCH["x"])}], tmp_path / "answers", top_k=3)
    else:
        teacher = TEACHER
        terms.append(Features({"hidden": "hidden"}))
    loss = distill(STUDENT, teacher, terms)
    compression = Compression("int8", shrink_at=1, shrink={"sparsity": 0.5}, quantize_from=2)
    stage = Stage.begin(compression, STUDENT, loss, optimizer)
    batch = {name: jnp.asarray(leaf) for name, leaf in stage.loss.prepare(BATCH).items()}
    state = State.first(stage.weights, {}, stage.optimizer.init(stage.weights), KEY)
    # A loop gives the batch as it is on the host, its ids and labels in 64 bits.
    host = {name: np.asarray(leaf, np.int64 if name in ("id", "label") else None) for name, leaf in batch.items()}
    stage, state = stage.advance(state.replace(step=jnp.int32(1)), host)
    kernel = "distill/hidden->hidden/kernel"
    assert state.weights["up"].shape == (WIDTH, 4)
    assert (kernel in state.weights) == (not stored)
    if not stored:
        assert state.weights[kernel].shape == (4, 12)
    # The loss is that of the whole student whose removed units are zero.
    kept = [
        index
        for index in range(8)
        if np.any(np.all(np.asarray(STUDENT.weights["up"])[:, [index]] == state.weights["up"], 0))
    ]
    assert len(kept) == 4
    lost = np.setdiff1d(np.arange(8), kept)
    zeroed = {"up": STUDENT.weights["up"].at[:, lost].set(0), "down": STUDENT.weights["down"].at[lost].set(0)}
    whole = loss({**zeroed, **loss.extra_weights}, batch, KEY, {})
    small = stage.loss(state.weights, batch, KEY, {})
    np.testing.assert_allclose(small[0], whole[0], rtol=1e-5)
    stage, state = stage.advance(state.replace(step=jnp.int32(2)), batch)
    rounded, metrics, _ = stage.loss.bind(stage.loss.arrays)(state.weights, batch, KEY, {})
    assert rounded != small[0]
    np.testing.assert_allclose(rounded, small[0], rtol=0.1)
    assert set(metrics) == {"logits", "labels", "accuracy"} | (set() if stored else {"features"})
    grads = jax.grad(lambda weights: stage.loss(weights, batch, KEY, {})[0])(state.weights)
    assert all(np.any(leaf) for leaf in grads.values())
    assert set(stage.finalize(state).weights) == {"up", "down"}


def test_a_teacher_may_be_spread_over_devices():
    """Its weights keep their sharding in the step, and the loss is the same."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = {
        "up": jax.device_put(TEACHER.weights["up"], NamedSharding(mesh, P(None, "model"))),
        "down": jax.device_put(TEACHER.weights["down"], NamedSharding(mesh, P("model"))),
    }
    terms = [Logits(), Features({"hidden": "hidden"}, "distance")]
    batch = {"x": BATCH["x"]}
    loss, one = (distill(STUDENT, TEACHER.replace(weights=w), terms) for w in (spread, TEACHER.weights))
    step = lambda loss: jax.jit(lambda arrays: loss.bind(arrays)(STUDENT.weights, batch, KEY, {})[0])  # noqa: E731
    compiled = step(loss).lower(loss.arrays).compile()
    np.testing.assert_allclose(compiled(loss.arrays), step(one)(one.arrays), rtol=1e-5)
    assert compiled.input_shardings[0][0][0]["up"].spec == P(None, "model")
    assert "all-gather" not in compiled.as_text()


@pytest.mark.parametrize("stored", [False, True])
def test_devices_that_share_the_rows_gather_nothing(stored, tmp_path):
    """One all-reduce of the gradients, for stored answers as for a teacher that runs."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = {name: np.asarray(leaf) for name, leaf in BATCH.items()}
    teacher = teach(TEACHER, [data], tmp_path / "answers", top_k=3) if stored else TEACHER
    loss = distill(STUDENT, teacher, [Logits(2.0), Labels()])
    batch = jax.device_put(dict(loss.prepare(data)), NamedSharding(mesh, P("data")))
    gradient = jax.jit(jax.grad(lambda weights, arrays, batch: loss.bind(arrays)(weights, batch, KEY, {})[0]))
    weights = jax.device_put(STUDENT.weights, NamedSharding(mesh, P()))
    text = gradient.lower(weights, loss.arrays, batch).compile().as_text()
    kinds = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
    found = {kind: len(re.findall(rf"= \S+ {kind}", text)) for kind in kinds}
    found["all-reduce"] += len(re.findall(r"= \(.*\) all-reduce\(", text))  # of several arrays at once
    assert found == {**dict.fromkeys(kinds, 0), "all-reduce": 1}
