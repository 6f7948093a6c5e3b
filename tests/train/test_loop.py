"""`fit` beside a loop by hand: same weights, whatever is interrupted, resumed or spread over devices."""

import dataclasses
import json
import os
import signal
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_xla as lx
from lepton_xla.sharding import Rules
from lepton_xla.train import Checkpoints, Compression, Evaluation, fit, loop, supervised

STEPS, ROWS = 12, 8
INPUTS = {"x": lx.TensorSpec(("batch", 6), "float32")}


class Net(nn.Module):
    """Batch norm and dropout, so that a step writes state and draws."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(8)(x)))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


@pytest.fixture(scope="module", autouse=True)
def _as_flax_promotes():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def model(_as_flax_promotes):
    variables = Net().init(jax.random.key(0), jnp.ones((1, 6)))
    return lx.train.from_linen(Net(), variables, INPUTS)


def data(step):
    draw = np.random.default_rng([7, step])
    x = draw.normal(size=(ROWS, 6)).astype(np.float32)
    return {"x": x, "label": x[:, :3].argmax(-1).astype(np.int32)}


def optimizer():
    return optax.adam(0.01)


def bits(state):
    return {name: np.asarray(leaf).tobytes() for name, leaf in {**state.weights, **state.model_state}.items()}


def accuracy(predict):
    batch = data(1000)
    return {"accuracy": float((predict(x=batch["x"])["output"].argmax(-1) == batch["label"]).mean())}


@pytest.fixture(scope="module")
def whole(model):
    return fit(model, supervised(model), optimizer(), data, steps=STEPS)


def test_is_a_loop_by_hand(model, whole):
    weights, state, moments = model.weights, model.state, optimizer().init(model.weights)
    loss, key = supervised(model), jax.random.key(0)

    @jax.jit
    def step(weights, state, moments, batch, index):
        def value(weights):
            out, _, after = loss(weights, batch, jax.random.fold_in(key, index), state)
            return out, after

        grads, state = jax.grad(value, has_aux=True)(weights)
        updates, moments = optimizer().update(grads, moments, weights)
        return optax.apply_updates(weights, updates), state, moments

    for index in range(STEPS):
        weights, state, moments = step(weights, state, moments, data(index), index)
    for name, leaf in {**weights, **state}.items():
        np.testing.assert_allclose(whole.program.weights[name], leaf, rtol=2e-4, atol=1e-6)
    assert int(whole.state.step) == STEPS
    assert sorted(whole.program.weights) == sorted(model.program.weights)


def test_the_model_is_not_changed(model, whole):
    fresh = Net().init(jax.random.key(0), jnp.ones((1, 6)))
    np.testing.assert_array_equal(model.weights["params/Dense_0/kernel"], fresh["params"]["Dense_0"]["kernel"])


def test_twice_is_the_same(model, whole):
    again = fit(model, supervised(model), optimizer(), data, steps=STEPS)
    assert bits(again.state) == bits(whole.state)


@pytest.mark.parametrize("at", [1, 5, STEPS])
def test_goes_on_from_a_checkpoint(tmp_path, model, whole, at):
    checkpoint = Checkpoints(tmp_path / "run", every=4)
    fit(model, supervised(model), optimizer(), data, steps=at, checkpoint=checkpoint)
    resumed = fit(model, supervised(model), optimizer(), data, steps=STEPS, checkpoint=checkpoint)
    assert bits(resumed.state) == bits(whole.state)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"accumulate": 2}], ids=str)
def test_devices_share_the_work(tmp_path, model, options):
    """Two devices compute what one does; a checkpoint of one goes on on two."""

    def run(steps, name, **more):
        checkpoint = Checkpoints(tmp_path / name, every=100)
        # Without dropout: microbatches of other rows draw other numbers.
        plain = lx.train.Model.of(model.program)
        return fit(plain, supervised(plain), optimizer(), data, steps=steps, checkpoint=checkpoint, **options, **more)

    rules = Rules([("params/Dense_0/kernel", (None, "data"))])
    one = run(STEPS, "one")
    two = run(STEPS, "two", mesh="data=2", rules=rules)
    run(5, "both")
    both = run(STEPS, "both", mesh="data=2", rules=rules)
    assert two.state.weights["params/Dense_0/kernel"].sharding.spec == jax.P(None, "data")
    assert two.state.optimizer[0].mu["params/Dense_0/kernel"].sharding.spec == jax.P(None, "data")
    for name, leaf in one.program.weights.items():
        np.testing.assert_allclose(two.program.weights[name], leaf, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(both.program.weights[name], leaf, rtol=1e-3, atol=1e-5)


def test_evaluates_keeps_the_best_and_stops(tmp_path, model):
    values = iter([0.5, 0.9, 0.8, 0.7, 0.95])
    seen = []

    def evaluate(predict):
        seen.append(predict(x=data(0)["x"])["output"])
        return {"accuracy": next(values)}

    log = tmp_path / "log.jsonl"
    evaluation = Evaluation(evaluate, every=2, metric="accuracy", patience=2)
    result = fit(
        model, supervised(model), optimizer(), data, steps=STEPS, evaluate=evaluation, log=log, log_every=2,
        checkpoint=Checkpoints(tmp_path / "run", every=100),
    )  # fmt: skip
    assert result.stopped == "patience"
    assert (result.best_step, int(result.state.step)) == (4, 8)
    assert [each["accuracy"] for each in result.history] == [0.5, 0.9, 0.8, 0.7]
    best = result.program.fn(result.program.weights, data(0)["x"])
    np.testing.assert_allclose(best, seen[1], rtol=1e-5, atol=1e-6)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [each["step"] for each in records if each["kind"] == "train"] == [2, 4, 6, 8]
    assert {"loss", "grad_norm", "steps_per_s", "accuracy"} <= records[0].keys()
    again = fit(
        model, supervised(model), optimizer(), data, steps=STEPS, evaluate=evaluation,
        checkpoint=Checkpoints(tmp_path / "run", every=100),
    )  # fmt: skip
    assert (again.stopped, again.best_step) == ("patience", 4)


@pytest.mark.parametrize("ends_after", [5, 7, 9])
def test_the_best_weights_survive_a_restart(tmp_path, model, ends_after):
    """Step 4 is the best; the run ends by a signal before, at once after, and long after that, or never."""
    values = {2: 0.5, 4: 0.9, 6: 0.9, 8: 0.7, 10: 0.8, 12: 0.95}

    def run(name, ends_after):
        steps = iter(())

        def read(step):
            if step == ends_after:
                os.kill(os.getpid(), signal.SIGTERM)
            nonlocal steps
            steps = iter([step])
            return data(step)

        def evaluate(predict):
            return {"accuracy": values[next(steps) + 1]}

        return fit(
            model, supervised(model), optimizer(), read, steps=STEPS,
            evaluate=Evaluation(evaluate, every=2, metric="accuracy", patience=3),
            checkpoint=Checkpoints(tmp_path / name, every=100),
        )  # fmt: skip

    undisturbed = run("undisturbed", None)
    assert (undisturbed.best_step, undisturbed.stopped, int(undisturbed.state.step)) == (4, "patience", 10)
    with pytest.raises(lx.train.Preempted):
        run("ended", ends_after - 2)
    result = run("ended", None)
    for name in ("best_step", "stopped", "history"):
        assert getattr(result, name) == getattr(undisturbed, name)
    assert bits(result.trained) == bits(undisturbed.trained)
    assert bits(result.state) == bits(undisturbed.state) != bits(result.trained)


def test_what_a_program_is_made_of_has_no_moments(model):
    """Of several processes each gets this part of the state whole, so it must be small."""

    def run(compression):
        return fit(model, supervised(model), optimizer(), data, steps=2, ema=0.9, compression=compression).trained

    trained = run(None)
    assert not jax.tree.leaves((trained.optimizer, trained.ema, trained.best))
    rule = lx.train.PruneRule(sites=".*kernel", sparsity=0.5)
    masks = run(Compression(lx.Recipe(prune=(rule,)), sparsify=lx.train.one_shot(at=0))).optimizer
    assert {leaf.dtype.name for leaf in jax.tree.leaves(masks.masks)} == {"bool"}
    assert not jax.tree.leaves(masks.inner)


def test_a_signal_saves_and_ends(tmp_path, model, whole):
    before = signal.getsignal(signal.SIGTERM)

    def interrupted(step):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return data(step)

    checkpoint = Checkpoints(tmp_path / "run", every=100)
    with pytest.raises(lx.train.Preempted) as caught:
        fit(model, supervised(model), optimizer(), interrupted, steps=STEPS, checkpoint=checkpoint)
    assert (caught.value.code, caught.value.step) == (75, 7)
    assert signal.getsignal(signal.SIGTERM) is before
    resumed = fit(model, supervised(model), optimizer(), data, steps=STEPS, checkpoint=checkpoint)
    assert bits(resumed.state) == bits(whole.state)


@pytest.fixture
def poisoned():
    def read(step):
        batch = data(step)
        if step == 5:
            batch["x"] = batch["x"] * np.float32("nan")
        return batch

    return read


def test_what_is_not_finite_stops(model, poisoned):
    with pytest.raises(lx.TrainingError, match="step 5: the loss is nan"):
        fit(model, supervised(model), optimizer(), poisoned, steps=STEPS)


def test_what_is_not_finite_is_passed_over(model, poisoned, whole):
    result = fit(model, supervised(model), optimizer(), poisoned, steps=STEPS, on_nan="skip")
    assert int(result.state.skipped) == 1
    assert np.isfinite(result.metrics["loss"])
    assert bits(result.state) != bits(whole.state)


def test_what_is_not_finite_goes_back(tmp_path, model):
    """Goes back to step 4 and on with the next data, which is read once."""
    read = []

    def poisoned(step):
        read.append(step)
        batch = data(step)
        return batch if step != 5 else {**batch, "x": batch["x"] * np.float32("nan")}

    result = fit(
        model, supervised(model), optimizer(), poisoned, steps=STEPS, on_nan="restore", log_every=2,
        checkpoint=Checkpoints(tmp_path / "run", every=2),
    )  # fmt: skip
    assert int(result.state.step) == STEPS
    assert read == list(range(STEPS + 2))
    assert all(np.isfinite(leaf).all() for leaf in result.state.weights.values())


def test_going_back_is_limited_only_without_getting_further(tmp_path, model):
    """More than three bad steps, each after a new checkpoint, do not end a run; the same step over and over does."""

    def run(name, is_bad):
        def poisoned(step):
            return {**data(step), "x": data(step)["x"] * np.float32("nan" if is_bad(step) else 1)}

        return fit(
            model, supervised(model), optimizer(), poisoned, steps=STEPS, on_nan="restore", log_every=1,
            checkpoint=Checkpoints(tmp_path / name, every=1),
        )  # fmt: skip

    assert int(run("further", lambda step: step % 3 == 2).state.step) == STEPS
    with pytest.raises(lx.TrainingError, match="after going back to step 4 3 times"):
        run("stuck", lambda step: step >= 4)


def test_writes_tensorboard(tmp_path, model):
    fit(model, supervised(model), optimizer(), data, steps=2, log_every=1, tensorboard=tmp_path / "events")
    (file,) = (tmp_path / "events").iterdir()
    assert b"train/loss" in file.read_bytes()


def test_compresses_on_the_way_and_goes_on(tmp_path, model):
    """Shrunk at step 3, rounded from step 6 on: interrupted in each stage, the result is the same."""
    compression = Compression(
        lx.Recipe.load("int8").replace({"fold": False}), quantize_from=6, shrink_at=3, shrink={"sparsity": 0.5}
    )

    def run(steps, name):
        return fit(
            model, supervised(model), optimizer(), data, steps=steps, compression=compression,
            checkpoint=Checkpoints(tmp_path / name, every=100),
        )  # fmt: skip

    result = run(STEPS, "whole")
    assert result.program.weights["params/Dense_0/kernel"].shape == (6, 4)
    assert result.state.optimizer[0].mu["params/Dense_0/kernel"].shape == (6, 4)
    run(8, "cut")
    assert bits(run(STEPS, "cut").state) == bits(result.state)
    x = data(3)["x"]
    small = result.quantized()
    rounded = lx.passes.fake_quant(result.program.fn, result.stage.plan)(result.program.weights, x)
    np.testing.assert_allclose(small.fn(small.weights, x), rounded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"steps": 0}, lx.TrainingError, "steps = 0"),
        ({"accumulate": 3}, lx.TrainingError, "accumulate = 3 does not divide the batch: 8 rows"),
        ({"compute_dtype": "int8"}, lx.TrainingError, "compute_dtype = 'int8'"),
        ({"clip_norm": 0}, lx.TrainingError, "clip_norm = 0"),
        ({"ema": 1.0}, lx.TrainingError, "ema = 1.0"),
        ({"on_nan": "pray"}, lx.TrainingError, "on_nan = 'pray'"),
        ({"on_nan": "restore"}, lx.TrainingError, "give checkpoint too"),
        ({"rules": Rules()}, lx.TrainingError, "give mesh too"),
        ({"mesh": "data=3"}, lx.ShardingError, "3"),
        ({"log": "/proc/no/such"}, lx.TrainingError, "cannot be written"),
    ],
    ids=str,
)
def test_refuses(model, options, error, said):
    with pytest.raises(error, match=said):
        fit(model, supervised(model), optimizer(), data, **{"steps": STEPS, **options})


def test_refuses_rows_that_the_mesh_cannot_split(model):
    with pytest.raises(lx.ShardingError, match="7 rows"):
        fit(model, supervised(model), optimizer(), [{n: v[:7] for n, v in data(0).items()}], steps=2, mesh="data=2")


def test_refuses_a_checkpoint_of_another_run(tmp_path, model):
    checkpoint = Checkpoints(tmp_path / "run", every=2)
    fit(model, supervised(model), optimizer(), data, steps=2, checkpoint=checkpoint)
    other = lx.train.Model.of(lx.trace(lambda w, x: x @ w["w"], {"w": jnp.ones((6, 3))}, INPUTS))
    with pytest.raises(lx.CheckpointError, match="of another run: the model and the optimizer differ"):
        fit(other, supervised(other), optimizer(), data, steps=4, checkpoint=checkpoint)
    with pytest.raises(lx.CheckpointError, match="the optimizer differs;"):
        fit(model, supervised(model), optax.sgd(0.1), data, steps=4, checkpoint=checkpoint)
    compression = Compression("int8", quantize_from=1)
    with pytest.raises(lx.CheckpointError, match="the compression differs;"):
        fit(model, supervised(model), optimizer(), data, steps=4, checkpoint=checkpoint, compression=compression)


def test_a_recipe_key_that_a_later_version_adds_makes_no_other_run():
    class Later(lx.Recipe, frozen=True, kw_only=True):
        more: str = "usual"

    def described(rules):
        return loop._described(types.SimpleNamespace(**{**dict.fromkeys(fields), "rules": rules}))

    fields = {field.name for field in dataclasses.fields(Compression)}
    now = lx.Recipe.load("int8")
    values = {name: getattr(now, name) for name in lx.Recipe.__struct_fields__}
    assert described(Later(**values)) == described(now)
    assert described(Later(**values, more="other")) != described(now)


@pytest.mark.parametrize("found", [{"loss": "much"}, [1.0], {"loss": 1.0}], ids=str)
def test_refuses_an_evaluation(model, found):
    evaluation = Evaluation(lambda predict: found, every=1, metric="accuracy")
    with pytest.raises(lx.TrainingError, match="evaluate returned"):
        fit(model, supervised(model), optimizer(), data, steps=2, evaluate=evaluation)
