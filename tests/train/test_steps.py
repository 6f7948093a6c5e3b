"""The training step beside optax by hand, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lepton_xla as lx
from lepton_xla.sharding import Rules, mesh
from lepton_xla.train.placing import put, state_shardings
from lepton_xla.train.state import State
from lepton_xla.train.steps import make_step

ROWS, IN, OUT = 8, 5, 3


def problem(dtype=np.float32):
    """A small net in NumPy arrays, and a batch."""
    draw = np.random.default_rng(0)
    weights = {"up": draw.normal(size=(IN, 4)), "down": draw.normal(size=(4, OUT)), "bias": np.zeros(OUT)}
    batch = {"x": draw.normal(size=(ROWS, IN)), "y": draw.normal(size=(ROWS, OUT))}
    return tuple({name: jnp.asarray(leaf, dtype) for name, leaf in tree.items()} for tree in (weights, batch))


def loss(weights, batch, key, state):
    out = jnp.tanh(batch["x"] @ weights["up"]) @ weights["down"] + weights["bias"][None]
    mean = batch["x"].mean(0).astype(jnp.float32)
    return jnp.mean((out - batch["y"]) ** 2), {"largest": jnp.abs(out).max()}, {"seen": state["seen"] + 1, "mean": mean}


def first(weights, optimizer):
    state = {"seen": jnp.zeros((), jnp.int32), "mean": jnp.zeros(IN)}
    return State.first(weights, state, optimizer.init(weights), jax.random.key(0))


def gradients_64(weights, batch):
    """Loss and gradients in float64 by NumPy."""
    w, b = ({name: np.asarray(leaf, np.float64) for name, leaf in tree.items()} for tree in (weights, batch))
    hidden = np.tanh(b["x"] @ w["up"])
    error = hidden @ w["down"] + w["bias"] - b["y"]
    out = 2 * error / error.size
    inner = (out @ w["down"].T) * (1 - hidden**2)
    return np.mean(error**2), {"up": b["x"].T @ inner, "down": hidden.T @ out, "bias": out.sum(0)}


def run(state, batch, **options):
    step = make_step(loss, options.pop("optimizer"), **options)
    return jax.jit(step)(state, batch, None)


def test_memory_of_a_step():
    """Microbatches share memory though they are unrolled on a CPU, and an update needs none for what it replaces."""
    size, rows, layers = 128, 1024, 4
    weights = {f"w{index}": jnp.ones((size, size)) for index in range(layers)}
    optimizer = optax.adam(0.1)

    def deep(weights, batch, key, state):
        out = batch["x"]
        for index in range(layers):
            out = jnp.tanh(out @ weights[f"w{index}"])
        return jnp.mean(out**2), {}, state

    def temporary(**options):
        state = State.first(weights, {}, optimizer.init(weights), jax.random.key(0))
        step = jax.jit(make_step(deep, optimizer, **options), donate_argnums=0)
        with jax.numpy_dtype_promotion("standard"):  # optax' Adam
            compiled = step.trace(state, {"x": jnp.ones((rows, size))}, None).lower().compile()
        return compiled.memory_analysis().temp_size_in_bytes

    activations, gradients = 4 * rows * size * layers, 4 * size * size * layers
    assert temporary() < 1.3 * (activations + gradients)
    assert temporary(accumulate=8) < 1.5 * (activations / 8 + 2 * gradients)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_is_that_of_numpy(accumulate, devices):
    weights, batch = problem()
    optimizer = optax.sgd(0.5)
    state, options = first(weights, optimizer), {}
    if devices > 1:
        placement = Rules([("up", (None, "data"))]).resolve(weights, mesh("data=2", jax.devices()[:2]))
        state = put(state, state_shardings(state, placement))
        batch = {name: jax.device_put(leaf, placement.batch) for name, leaf in batch.items()}
        options = {"mesh": placement.mesh, "batch_axes": ("data",)}
    new, metrics = run(state, batch, optimizer=optimizer, accumulate=accumulate, **options)
    value, grads = gradients_64(weights, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in grads.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    for name, leaf in grads.items():
        np.testing.assert_allclose(new.weights[name], np.asarray(weights[name]) - 0.5 * leaf, rtol=1e-5, atol=1e-6)
    assert int(new.model_state["seen"]) == accumulate
    assert int(new.step) == 1
    assert bool(metrics["finite"])
    assert int(new.skipped) == 0


def test_accumulation_reduces_gradients_once():
    """The all-reduces of weights' gradients are after the loop over microbatches, not inside it."""
    weights, batch = problem()
    optimizer = optax.sgd(0.5)
    placement = Rules().resolve(weights, mesh("data=2", jax.devices()[:2]))
    state = put(first(weights, optimizer), state_shardings(first(weights, optimizer), placement))
    batch = {name: jax.device_put(leaf, placement.batch) for name, leaf in batch.items()}
    step = make_step(loss, optimizer, accumulate=4, mesh=placement.mesh, batch_axes=("data",))
    text = jax.jit(step).lower(state, batch, None).compile().as_text()
    reduced = [line for line in text.splitlines() if " all-reduce(" in line or " all-reduce-start(" in line]
    assert reduced
    inside = [line for line in reduced if "while/body" in line and f"f32[{IN},4]" in line]
    assert not inside, inside
    assert "all-gather" not in text


def test_rows_stay_on_their_devices():
    weights, batch = problem()
    shared = mesh("data=2", jax.devices()[:2])
    sharding = NamedSharding(shared, PartitionSpec("data"))
    batch = {name: jax.device_put(leaf, sharding) for name, leaf in batch.items()}
    step = make_step(loss, optax.sgd(0.5), accumulate=2, mesh=shared, batch_axes=("data",))
    state = first(weights, optax.sgd(0.5))
    state = put(state, jax.tree.map(lambda _: NamedSharding(shared, PartitionSpec()), state))
    text = jax.jit(step).lower(state, batch, None).compile().as_text()
    for moved in ("all-to-all", "collective-permute", "all-gather"):
        assert moved not in text


def test_clips_to_the_norm():
    weights, batch = problem()
    optimizer = optax.sgd(1.0)
    new, metrics = run(first(weights, optimizer), batch, optimizer=optimizer, clip_norm=0.01)
    moved = np.sqrt(sum(((np.asarray(new.weights[n]) - np.asarray(weights[n])) ** 2).sum() for n in weights))
    assert float(metrics["grad_norm"]) > 0.1
    np.testing.assert_allclose(moved, 0.01, rtol=1e-3)


@pytest.mark.parametrize("bad", ["x", "weights"])
def test_what_is_not_finite_changes_nothing(bad):
    weights, batch = problem()
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = first(weights, optimizer).replace(ema=dict(weights))
    state, _ = run(state, batch, optimizer=optimizer, ema=0.9)
    if bad == "x":
        batch["x"] = batch["x"].at[0, 0].set(jnp.nan)
    else:
        state = state.replace(weights={**state.weights, "bias": state.weights["bias"].at[0].set(jnp.inf)})
    new, metrics = run(state, batch, optimizer=optimizer, ema=0.9)
    assert not bool(metrics["finite"])
    assert int(new.skipped) == 1
    assert int(new.step) == 2
    for name in ("weights", "model_state", "optimizer", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(new, name), getattr(state, name))


def test_computes_in_bfloat16_and_keeps_float32():
    weights, batch = problem()
    seen = {}

    def watched(weights, batch, key, state):
        seen.update({name: leaf.dtype for name, leaf in (weights | batch).items()})
        return loss(weights, batch, key, state)

    step = make_step(watched, optax.sgd(0.1, momentum=0.9), compute_dtype="bfloat16")
    new, metrics = jax.jit(step)(first(weights, optax.sgd(0.1, momentum=0.9)), batch, None)
    assert set(seen.values()) == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves((new.weights, new.optimizer[0].trace))} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32
    value, _ = gradients_64(weights, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=0.05)


def test_average_of_weights():
    weights, batch = problem()
    optimizer = optax.sgd(0.5)
    state, want = first(weights, optimizer).replace(ema=dict(weights)), np.asarray(weights["up"], np.float64)
    for index in range(4):
        state, _ = run(state, batch, optimizer=optimizer, ema=0.2)
        decay = min(0.2, (1 + index) / (10 + index))
        want = decay * want + (1 - decay) * np.asarray(state.weights["up"], np.float64)
    np.testing.assert_allclose(state.ema["up"], want, rtol=1e-5)


def test_a_step_draws_its_own_numbers():
    """Each step, each microbatch and each shard draws other numbers; the same step draws the same."""
    drawn = []

    def random(weights, batch, key, state):
        noise = jax.random.normal(key, ())
        return (weights["w"] * noise).sum(), {"noise": noise}, state

    step = jax.jit(make_step(random, optax.sgd(0.0)))
    state = State.first({"w": jnp.ones(2)}, {}, optax.sgd(0.0).init({}), jax.random.key(0))
    for _ in range(3):
        again, _ = step(state, {"x": jnp.ones((4, 1))}, None)
        state, metrics = step(state, {"x": jnp.ones((4, 1))}, None)
        drawn.append(float(metrics["noise"]))
        jax.tree.map(np.testing.assert_array_equal, again.weights, state.weights)
    assert len(set(drawn)) == 3


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda: (jnp.ones(3), {}), "the loss has shape"),
        (lambda: (jnp.ones((), jnp.int32), {}), "the loss is int32"),
        (lambda: (jnp.ones(()), {"loss": jnp.ones(())}), "reports a metric 'loss'"),
        (lambda: (jnp.ones(()), {"each": jnp.ones(3)}), "metric 'each' has shape"),
    ],
)
def test_refuses_a_loss(returned, said):
    step = make_step(lambda weights, batch, key, state: (*returned(), state), optax.sgd(0.1))
    state = State.first({"w": jnp.ones(2)}, {}, optax.sgd(0.1).init({"w": jnp.ones(2)}), jax.random.key(0))
    with pytest.raises(lx.TrainingError, match=said):
        step(state, {"x": jnp.ones((4, 1))}, None)
