"""Stages: when they change, what they compute, how they end, and that a few lines of JSON make them again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_xla as lx
from lepton_xla.errors import CheckpointError, RecipeError, TrainingError, UnsupportedError
from lepton_xla.passes import fake_quant
from lepton_xla.recipe import PruneRule
from lepton_xla.train import Compression, Stage, State, one_shot, polynomial

INT8 = lx.Recipe.load("int8")
STATIC = INT8.replace({"quantize.0.dynamic": False})
SHRINK = {"sparsity": 0.5}


@pytest.fixture(autouse=True)
def lenient():
    """Promotion as users have it, which optax needs."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def program(width=8):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 2, jnp.float32)  # noqa: E731
    weights = {"up": array(6, width), "bias": array(width), "mid": array(width, width), "down": array(width, 3)}
    fn = lambda w, x: jax.nn.relu(jax.nn.relu(x @ w["up"] + w["bias"]) @ w["mid"]) @ w["down"]  # noqa: E731
    return lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 6), "float32")})


def batch(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((16, 6)).astype(np.float32)
    return {"x": x, "label": rng.integers(0, 3, 16).astype(np.int32)}


def begun(compression, model=None):
    model = model or program()
    return compression, model, lx.train.supervised(model), optax.adam(1e-2)


def step_of(stage):
    """A training step, as any loop would write it."""

    @jax.jit
    def step(state, batch):
        def value(trained):
            return stage.loss(*trained[:1], batch, state.key, state.model_state, scales=trained[1])[0]

        loss, (slopes, of_scales) = jax.value_and_grad(value)((state.weights, state.scales.get("values", {})))
        updates, moments = stage.optimizer.update(slopes, state.optimizer, state.weights)
        scales = state.scales
        if scales:
            moved, own = stage.scale_optimizer.update(of_scales, scales["optimizer"], scales["values"])
            scales = {"values": optax.apply_updates(scales["values"], moved), "optimizer": own}
        weights = optax.apply_updates(state.weights, updates)
        return state.replace(step=state.step + 1, weights=weights, optimizer=moments, scales=scales), loss

    return step


def train(stage, state, steps, stop=None):
    """Train; every stage is made again from its JSON."""
    seen = []
    step = step_of(stage)
    for number in range(int(state.step), steps):
        if stage.due(number):
            stage, state = stage.advance(state, batch(99))
            described = json_of(stage)
            stage = Stage.resume(stage.compression, stage.whole, stage.criterion, stage.updates, described)
            seen.append((number, stage.decided.passed))
            step = step_of(stage)
        if number == stop:
            break
        state, _ = step(state, batch(number))
    return stage, state, seen


def run(compression, steps=8):
    stage = Stage.begin(*begun(compression))
    state = State.first(stage.weights, {}, stage.optimizer.init(stage.weights), jax.random.key(0))
    return train(stage, state, steps)


CASES = {
    "dynamic": {"recipe": INT8, "quantize_from": 2},
    "static": {"recipe": STATIC, "quantize_from": 2, "freeze_ranges_at": 4},
    "trained scales": {"recipe": STATIC, "quantize_from": 2, "freeze_ranges_at": 4, "learn_scales": True},
    "shrunk while scales are trained": {
        "recipe": STATIC,
        "quantize_from": 1,
        "learn_scales": True,
        "shrink_at": 4,
        "shrink": SHRINK,
    },
    "all": {
        "recipe": STATIC.replace(prune=[{"sites": ".*", "sparsity": 0.5}]),
        "quantize_from": 4,
        "freeze_ranges_at": 6,
        "learn_scales": True,
        "shrink_at": 2,
        "shrink": SHRINK,
        "sparsify": polynomial(0, 5, every=1),
    },
}


@pytest.mark.parametrize(
    "case", [case if case == "all" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_what_was_trained_is_stored_bit_for_bit(case):
    compression = Compression(**CASES[case])
    stage, state, seen = run(compression)
    assert [number for number, _ in seen] == sorted({change.step for change in compression.changes})
    assert set(seen[-1][1]) == {change.name for change in compression.changes}
    final, stored = stage.finalize(state), stage.quantized(state)
    scales, x = state.scales.get("values"), batch(7)["x"]
    ranges = {name: jnp.asarray(value) for name, value in stage.decided.ranges.items()}
    trained = fake_quant(final.fn, stage.plan, ranges)
    expected = jax.jit(lambda weights, x: trained(weights, x, scales=scales))(final.weights, x)
    np.testing.assert_array_equal(jax.jit(stored.fn)(stored.weights, x), expected)
    assert stored.weights["mid"].format == "int8"
    loss = stage.loss(state.weights, batch(7), state.key, {}, scales=scales)[0]
    labels = batch(7)["label"]
    np.testing.assert_allclose(
        loss, optax.softmax_cross_entropy_with_integer_labels(expected, labels).mean(), rtol=1e-6
    )
    assert bool(state.scales) == compression.learn_scales
    assert final.weights["mid"].shape == ((4, 4) if compression.shrink_at is not None else (8, 8))
    if compression.sparsify is not None:
        assert all(0.4 < 1 - float(jnp.mean(mask)) < 0.6 for mask in final.masks.values())
        assert all(
            np.all(np.asarray(leaf)[~np.asarray(final.masks[p])] == 0)
            for p, leaf in final.weights.items()
            if p in final.masks
        )


def test_before_its_step_nothing_is_rounded_or_removed():
    compression = Compression(INT8, quantize_from=5, shrink_at=5, shrink=SHRINK)
    stage = Stage.begin(*begun(compression))
    weights = stage.weights
    assert not any(stage.due(step) for step in range(5))
    assert stage.due(5)
    got = stage.loss(weights, batch(), jax.random.key(0), {})[0]
    np.testing.assert_allclose(got, stage.criterion(weights, batch(), None, {})[0], rtol=1e-6)
    assert stage.plan is None
    assert stage.scales == {}
    with pytest.raises(TrainingError, match="nothing was trained with rounding"):
        stage.quantized(State.first(weights, {}, (), jax.random.key(0)))


def test_ranges_are_those_of_the_batches_and_stay():
    compression = Compression(STATIC, quantize_from=0, freeze_ranges_at=2)
    stage = Stage.begin(*begun(compression))
    state = State.first(stage.weights, {}, stage.optimizer.init(stage.weights), jax.random.key(0))
    stage, state = stage.advance(state, batch())
    assert stage.plan["up"].quantize.dynamic
    data = [batch(3), batch(4)]
    stage, state = stage.advance(state.replace(step=jnp.int32(2)), data)
    assert not stage.plan["up"].quantize.dynamic
    largest = np.max(np.abs(np.concatenate([each["x"] for each in data])))
    np.testing.assert_array_equal(stage.decided.ranges["up"], largest)


def test_scales_are_cut_with_their_columns_and_those_of_groups_of_rows_start_anew():
    text = '[[quantize]]\nsites = "mid"\nweights = "int4"\nactivations = "none"\ngranularity = "group:2"\n'
    recipe = lx.Recipe.parse(text + '[[quantize]]\nsites = ".*"', name="mixed")
    compression = Compression(recipe, quantize_from=0, learn_scales=True, shrink_at=3, shrink=SHRINK)
    stage = Stage.begin(*begun(compression))
    state = State.first(stage.weights, {}, stage.optimizer.init(stage.weights), jax.random.key(0))
    stage, before, _ = train(stage, state, 4, stop=2)
    values = before.scales["values"]
    assert values["up"]["log2_scale"].shape == (1, 8)
    assert values["mid"]["log2_scale"].shape == (4, 8)
    stage, after = stage.advance(before.replace(step=jnp.int32(3)), batch())
    stays = stage.decided.cuts["bias"][0]
    np.testing.assert_array_equal(after.scales["values"]["up"]["log2_scale"], values["up"]["log2_scale"][:, stays])
    np.testing.assert_array_equal(after.scales["values"]["down"]["log2_scale"], values["down"]["log2_scale"])
    assert stage.decided.report.metrics["state_anew"] == [
        "scales of mid: float32[4, 8] start anew as float32[2, 4]",
        "the optimizer of the scales starts anew",
    ]


def test_a_run_that_is_resumed_computes_the_same():
    compression = Compression(**CASES["all"])
    _, whole, _ = run(compression)
    stage = Stage.begin(*begun(compression))
    state = State.first(stage.weights, {}, stage.optimizer.init(stage.weights), jax.random.key(0))
    stage, state, _ = train(stage, state, 8, stop=5)
    stage = Stage.resume(*begun(compression), json_of(stage))
    like = State.first(stage.weights, {}, stage.optimizer.init(stage.weights), jax.random.key(0))
    like = like.replace(scales=stage.scales)
    assert jax.tree.map(jnp.shape, like) == jax.tree.map(jnp.shape, state)
    _, resumed, _ = train(stage, state, 8)
    jax.tree.map(np.testing.assert_array_equal, resumed.replace(key=()), whole.replace(key=()))


def test_what_was_decided_is_the_same_after_json():
    stage = Stage.begin(
        *begun(Compression(STATIC, quantize_from=1, shrink_at=1, shrink={"sparsity": 0.4}), program(11))
    )
    state = State.first(stage.weights, {}, stage.optimizer.init(stage.weights), jax.random.key(0))
    stage, _ = stage.advance(state.replace(step=jnp.int32(1)), batch())
    again = Stage.resume(stage.compression, stage.whole, stage.criterion, stage.updates, json_of(stage))
    assert again.decided.passed == stage.decided.passed
    assert again.decided.report == stage.decided.report
    jax.tree.map(np.testing.assert_array_equal, again.decided.cuts, dict(stage.decided.cuts))
    jax.tree.map(np.testing.assert_array_equal, again.decided.ranges, dict(stage.decided.ranges))
    assert not stage.decided.cuts["bias"][0].all()


def json_of(stage):
    return json.loads(json.dumps(stage.describe()))


def test_the_report_goes_with_the_program():
    stage, state, _ = run(Compression(shrink_at=1, shrink=SHRINK), steps=2)
    report = stage.finalize(state).history[-1]
    assert report.name == "shrink"
    assert report.metrics["weights_bytes_after"] == stage.finalize(state).weights_bytes
    assert [site.action for site in report.sites if site.outcome == "changed"] == ["8 -> 4 units"] * 2


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"passed": [], "cuts": {"up": [None]}, "ranges": {}, "report": None},
        {"passed": [], "cuts": {"none": []}, "ranges": {}, "report": None},
        {"passed": [], "cuts": {"up": [None, {"shape": [8], "bits": "zz"}]}, "ranges": {}, "report": None},
        {"passed": [], "cuts": {"up": [None, {"shape": [9], "bits": "ffff"}]}, "ranges": {}, "report": None},
        {"passed": 3, "cuts": [], "ranges": {}, "report": None},
    ],
)
def test_a_description_of_something_else_is_refused(damage):
    with pytest.raises(CheckpointError):
        Stage.resume(*begun(Compression(shrink_at=1, shrink=SHRINK)), damage)


PRUNES = lx.Recipe(prune=(PruneRule(sites=".*", sparsity=0.5),))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize_from": -1, "recipe": INT8}, "quantize_from = -1"),
        ({"quantize_from": 1.5, "recipe": INT8}, "quantize_from = 1.5"),
        ({"quantize_from": 1}, r"no \[\[quantize\]\] block"),
        ({"recipe": STATIC, "freeze_ranges_at": 3}, "freeze_ranges_at needs quantize_from"),
        ({"recipe": INT8, "learn_scales": True}, "learn_scales needs quantize_from"),
        ({"recipe": INT8, "quantize_from": 1, "freeze_ranges_at": 3}, "scales are dynamic"),
        (
            {"recipe": STATIC, "quantize_from": 4, "freeze_ranges_at": 3},
            "freeze_ranges_at = 3 is before",
        ),
        ({"recipe": INT8, "quantize_from": 1, "scale_optimizer": optax.sgd(1.0)}, "learn_scales is False"),
        ({"sparsify": one_shot(3)}, r"no \[\[prune\]\] block"),
        ({"recipe": PRUNES, "regrow": lx.train.Regrow()}, "regrow needs a schedule"),
        ({"shrink": SHRINK}, "say when with shrink_at"),
        ({"shrink_at": 3}, "neither shrink nor"),
        ({"shrink_at": 3, "shrink": {"sparsity": 1.5}}, "sparsity = 1.5"),
        ({"shrink_at": 3, "shrink": {"sparsity": 0.5, "flops": 0.5}}, "exactly one"),
        ({"shrink_at": 3, "shrink": {"sparsity": 0.5, "speed": 2}}, "shrink has no 'speed'"),
        ({"shrink_at": 3, "shrink": {"sparsity": 0.5, "scope": "wide"}}, "scope = 'wide'"),
        ({"recipe": "no such recipe", "shrink_at": 3}, "neither a preset"),
    ],
)
def test_a_schedule_that_does_not_fit_itself_is_refused_at_once(options, message):
    with pytest.raises(RecipeError, match=message):
        Compression(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": INT8.replace({"quantize.0.sites": "nothing"}), "quantize_from": 9}, RecipeError, "matches none"),
        (
            {"recipe": lx.Recipe.load("fp8"), "quantize_from": 9, "learn_scales": True},
            UnsupportedError,
            "scales are trained",
        ),
        (
            {"recipe": PRUNES.replace({"prune.0.sites": "nothing"}), "sparsify": one_shot(9)},
            RecipeError,
            "matches none",
        ),
        ({"shrink_at": 9, "shrink": {"sparsity": 0.5, "protect": ["nothing"]}}, RecipeError, "protect = 'nothing'"),
    ],
)
def test_a_schedule_that_does_not_fit_the_model_is_refused_before_the_first_step(options, error, message):
    with pytest.raises(error, match=message):
        Stage.begin(*begun(Compression(**options)))


def test_the_recipes_own_shrink_table_is_used():
    recipe = lx.Recipe.parse('[shrink]\nsparsity = 0.5\nround_to = [2, 4]\nprotect = "up"', name="mine")
    stage, state, _ = run(Compression(recipe, shrink_at=1), steps=2)
    assert state.weights["mid"].shape == (8, 4)
    assert stage.compression.shrink_options["round_to"] == 2
