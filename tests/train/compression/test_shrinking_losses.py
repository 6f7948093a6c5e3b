"""A shrunk loss equals the original one whose removed weights are zero: value, metrics, new state and gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_xla as lx
from lepton_xla.passes import fake_quant, resolve
from lepton_xla.train import Compression, Model, Stage, State

ROWS = {"x": lx.TensorSpec(("batch", 6), "float32")}
IMAGES = {"x": lx.TensorSpec(("batch", 6, 6, 3), "float32")}
TOKENS = {"x": lx.TensorSpec(("batch", 5), "int32")}
CLASSES = 4


def untrivial(tree, seed=1):
    """The tree's arrays replaced by random ones, all elements different, variances positive."""
    rng = np.random.default_rng(seed)

    def random(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        values = rng.uniform(0.5, 2, leaf.shape) if "var" in path else rng.standard_normal(leaf.shape) / 2
        return jnp.asarray(values, leaf.dtype)

    return {path: random(path, leaf) for path, leaf in tree.items()}


def randomized(model):
    weights = untrivial(model.program.weights)
    parts = ({path: weights[path] for path in part} for part in (model.weights, model.state))
    return Model(model.apply, *parts, model.program.replace(weights=weights))


def linen(module, inputs, *example):
    variables = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, *example)
    return randomized(lx.train.from_linen(module, variables, inputs))


def batch_of(model, seed=0, rows=8):
    rng = np.random.default_rng(seed)
    spec = model.program.inputs["x"]
    shape = spec.at({"batch": rows}).shape
    x = rng.integers(0, 7, shape).astype(np.int32) if spec.dtype == "int32" else rng.standard_normal(shape)
    return {"x": jnp.asarray(x, spec.dtype), "label": jnp.asarray(rng.integers(0, CLASSES, rows), jnp.int32)}


def first_state(stage):
    weights = {path: jnp.copy(leaf) for path, leaf in stage.weights.items()}
    return State.first(weights, stage.model.state, stage.optimizer.init(weights), jax.random.key(5))


def shrunk(model, loss, batch, optimizer=None, compression=None, **options):
    compression = compression or Compression(shrink_at=0, shrink=options or {"sparsity": 0.5})
    stage = Stage.begin(compression, model, loss, optimizer or optax.sgd(0.1))
    state = first_state(stage)
    return state, *stage.advance(state, batch)


def stays(weight, small):
    """Which elements of a weight are in the smaller one, told by their values."""
    kept = np.isin(weight, small)
    assert kept.sum() == small.size
    return kept


def zeroed(weights, small):
    return {path: jnp.where(stays(leaf, small[path]), leaf, jnp.zeros_like(leaf)) for path, leaf in weights.items()}


def measured(loss, weights, batch, state):
    def run(weights):
        value, metrics, after = loss(weights, batch, jax.random.key(9), state)
        return value, (metrics, after)

    (value, (metrics, after)), slopes = jax.jit(jax.value_and_grad(run, has_aux=True))(weights)
    return value, metrics, after, slopes


def assert_equals_zeroed(loss, batch, before, stage, state, tolerance=5e-5):
    """Compare the loss of a stage with the original loss, whose removed weights are zero."""
    weights = zeroed(before.weights, state.weights)
    value, metrics, after, slopes = measured(stage.loss, state.weights, batch, state.model_state)
    expected, *others, expected_slopes = measured(loss, weights, batch, before.model_state)
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    assert metrics.keys() == others[0].keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], others[0][name], rtol=tolerance)
    for path, leaf in after.items():
        kept = stays(before.model_state[path], state.model_state[path])
        whole = np.asarray(others[1][path])[kept]
        np.testing.assert_allclose(np.ravel(leaf), whole, rtol=tolerance, atol=tolerance)
    steepest = max(float(jnp.max(jnp.abs(slope))) for slope in expected_slopes.values())
    for path, slope in slopes.items():
        kept = stays(before.weights[path], state.weights[path])
        whole = np.asarray(expected_slopes[path])[kept]
        np.testing.assert_allclose(np.ravel(slope), whole, rtol=0, atol=tolerance * steepest)


class Residual(nn.Module):
    """Batch norms, a projected branch, a concatenation, a mean over positions."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        norm = lambda: nn.BatchNorm(use_running_average=not train)  # noqa: E731
        drop = nn.Dropout(self.rate, deterministic=not train)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        y = norm()(nn.Conv(8, (3, 3))(nn.relu(norm()(nn.Conv(10, (3, 3))(x)))))
        x = drop(nn.relu(x + y))
        x = jnp.concatenate([nn.Conv(4, (1, 1))(x), nn.silu(nn.Conv(6, (3, 3))(x))], -1).mean((1, 2))
        return nn.Dense(CLASSES)(drop(nn.tanh(nn.Dense(12)(x))))


class Block(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, train):
        drop = nn.Dropout(self.rate, deterministic=not train)
        h = nn.LayerNorm()(x)
        x = x + drop(nn.MultiHeadDotProductAttention(4, qkv_features=16, deterministic=not train)(h, h))
        return x + nn.Dense(8)(drop(nn.gelu(nn.Dense(20)(nn.LayerNorm()(x))))), None


class Stacked(nn.Module):
    """Transformer blocks in a scan; each loses heads and hidden units of its own."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Embed(7, 8)(x)
        scan = nn.scan(
            nn.remat(Block, static_argnums=(2,)),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=2,
        )
        x, _ = scan(self.rate)(x, train)
        return nn.Dense(CLASSES)(x.mean(1))


class Nnx(nnx.Module):
    def __init__(self, rate, rngs):
        self.up, self.norm = nnx.Linear(6, 10, rngs=rngs), nnx.BatchNorm(10, rngs=rngs)
        self.drop, self.down = nnx.Dropout(rate, rngs=rngs), nnx.Linear(10, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.down(self.drop(nnx.relu(self.norm(self.up(x)))))


MODELS = {
    "residual": lambda rate: linen(Residual(rate), IMAGES, jnp.ones((1, 6, 6, 3))),
    "stacked": lambda rate: linen(Stacked(rate), TOKENS, jnp.ones((1, 5), jnp.int32)),
    "nnx": lambda rate: randomized(lx.train.from_nnx(Nnx(rate, nnx.Rngs(0)), ROWS)),
}


@pytest.fixture(autouse=True)
def lenient():
    """Promotion as users have it: optax and frameworks' own layers need it."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", ["residual", pytest.param("stacked", marks=pytest.mark.slow), "nnx"])
def test_without_dropout_nothing_but_the_removed_units_is_missing(name):
    model = MODELS[name](0.0)
    loss, batch = lx.train.supervised(model), batch_of(model)
    before, stage, state = shrunk(model, loss, batch)
    removed = {path for path in before.weights if state.weights[path].shape != before.weights[path].shape}
    assert len(removed) > len(before.weights) / 3
    assert_equals_zeroed(loss, batch, before, stage, state)
    inputs = [batch["x"]]
    got = stage.program.fn({**state.weights, **state.model_state}, *inputs)
    whole = zeroed({**before.weights, **before.model_state}, {**state.weights, **state.model_state})
    np.testing.assert_allclose(got, model.program.fn(whole, *inputs), rtol=1e-4, atol=1e-4)
    outputs, after = stage.model.apply(state.weights, state.model_state, jax.random.key(9), *inputs)
    assert outputs.shape == got.shape
    assert {path: leaf.shape for path, leaf in after.items()} == {
        path: leaf.shape for path, leaf in state.model_state.items()
    }


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("residual", "stacked")), "nnx"]
)
def test_dropout_draws_for_the_units_that_are_left(name):
    model = MODELS[name](0.5)
    loss, batch = lx.train.supervised(model), batch_of(model)
    before, stage, state = shrunk(model, loss, batch)
    values = [measured(stage.loss, state.weights, batch, state.model_state)[0] for _ in range(2)]
    assert values[0] == values[1]  # a function of its key
    other = stage.loss(state.weights, batch, jax.random.key(10), state.model_state)[0]
    whole = loss(before.weights, batch, jax.random.key(9), before.model_state)[0]
    assert len({float(values[0]), float(other), float(whole)}) == 3
    assert all(
        np.any(slope != 0) for slope in measured(stage.loss, state.weights, batch, state.model_state)[3].values()
    )


def mlp(width=8):
    rng = np.random.default_rng(3)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    weights = {"up": array(6, width), "mid": array(width, 10), "down": array(10, CLASSES)}

    def fn(w, x):
        return jax.nn.softplus(jax.nn.relu(x @ w["up"]) @ w["mid"]) @ w["down"]

    return lx.trace(fn, weights, ROWS)


def with_penalty(program, penalty):
    plain = lx.train.supervised(program)

    def loss(weights, batch, key, state):
        value, metrics, state = plain(weights, batch, key, state)
        return value + penalty(weights, batch), metrics, state

    return loss


def test_a_sum_over_removed_units_may_stay_in_a_loss():
    program = mlp()
    loss = with_penalty(program, lambda w, _: sum(jnp.sum(leaf**2) for leaf in w.values()))
    batch = batch_of(Model.of(program))
    before, stage, state = shrunk(program, loss, batch)
    assert state.weights["mid"].shape == (4, 5)
    assert_equals_zeroed(loss, batch, before, stage, state)


def test_what_the_loss_needs_is_kept_and_told():
    program = mlp()
    loss = with_penalty(program, lambda w, batch: jnp.mean(jnp.exp(batch["x"] @ w["up"])))
    batch = batch_of(Model.of(program))
    before, stage, state = shrunk(program, loss, batch)
    assert {path: leaf.shape for path, leaf in state.weights.items()} == {"up": (6, 8), "mid": (8, 5), "down": (5, 4)}
    assert_equals_zeroed(loss, batch, before, stage, state)
    told = {site.site: site for site in stage.decided.report.sites}
    assert told["up[1]"].outcome == "kept"
    assert "in the loss" in told["up[1]"].reason
    assert told["mid[1]"].outcome == "changed"


def test_weights_of_the_loss_lose_what_goes_with_the_models():
    """As the projections of distillation do, whose loss is bound to arrays that are arguments of the step."""
    program = mlp()

    class Loss:
        """Compares hidden units, through a projection of its own, with arrays that it is bound to."""

        def __init__(self, arrays):
            self.arrays = arrays
            self.extra_weights = {"own/projection": jnp.asarray(np.random.default_rng(8).standard_normal((8, 3)))}

        def bind(self, arrays):
            return Loss(arrays)

        def __call__(self, weights, batch, key, state, step=None):
            hidden = jax.nn.relu(batch["x"] @ weights["up"]) * jnp.ones((1, 8))  # a constant that is cut
            hidden = hidden @ weights["own/projection"]
            value = jnp.mean((hidden - self.arrays["target"]) ** 2)
            scores = jax.nn.log_softmax(program.fn(weights, batch["x"]))
            picked = jnp.take_along_axis(scores, batch["label"][:, None], 1).mean()
            return value * (1.0 + step) - picked, {"hidden": value}, state

    loss, batch = Loss({"target": jnp.ones((8, 3))}), batch_of(Model.of(program))
    before, stage, state = shrunk(program, loss, batch)
    assert state.weights["own/projection"].shape == (4, 3)
    assert stage.loss.extra_weights["own/projection"].shape == (4, 3)
    assert stage.program.weights.keys() == program.weights.keys()
    weights = zeroed(before.weights, state.weights)

    @jax.jit
    def value(arrays, step):
        return stage.loss.bind(arrays)(state.weights, batch, None, {}, step=step)[0]

    for target in (1.0, 2.0):
        arrays = {"target": jnp.full((8, 3), target)}
        expected = loss.bind(arrays)(weights, batch, None, {}, step=2)[0]
        np.testing.assert_allclose(value(arrays, jnp.int32(2)), expected, rtol=1e-5)


def test_a_student_is_shrunk_and_rounded_and_its_teacher_is_not():
    """The teacher has the student's architecture, so that all its names are the same."""
    program = mlp()
    teacher = program.replace(weights={path: leaf + 0.1 for path, leaf in program.weights.items()})
    loss, batch = lx.train.distill(program, teacher), batch_of(Model.of(program))
    compression = Compression("int8", quantize_from=0, shrink_at=0, shrink={"sparsity": 0.5})
    before, stage, state = shrunk(program, loss, batch, compression=compression)
    rounded = program.replace(fn=fake_quant(program.fn, resolve(lx.Recipe.load("int8"), program)))
    weights = zeroed(before.weights, state.weights)
    expected = jax.jit(lambda weights: lx.train.distill(rounded, teacher)(weights, batch, None, {})[0])(weights)
    got = jax.jit(lambda arrays: stage.loss.bind(arrays)(state.weights, batch, None, {})[0])(stage.loss.arrays)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    other = jax.jit(lambda arrays: stage.loss.bind(arrays)(state.weights, batch, None, {})[0])((program.weights,))
    assert abs(other - got) > 1e-3


def test_a_step_that_computes_in_bfloat16():
    program = mlp()
    loss, batch = lx.train.supervised(program), batch_of(Model.of(program))
    before, stage, state = shrunk(program, loss, batch)
    narrow = lambda tree: jax.tree.map(lambda x: x.astype("bfloat16") if x.dtype == jnp.float32 else x, tree)  # noqa: E731
    with jax.numpy_dtype_promotion("strict"):
        got = stage.loss(narrow(state.weights), narrow(batch), jax.random.key(0), {})[0]
    whole = zeroed(before.weights, state.weights)
    np.testing.assert_allclose(got, loss(narrow(whole), narrow(batch), jax.random.key(0), {})[0], rtol=2e-2)


def test_a_state_that_only_training_uses_is_cut_like_what_it_becomes():
    """Last means of hidden units, which the program never reads and the loss does not mix with the old ones."""
    program = mlp()
    weights = dict(program.weights.items())
    whole = lx.trace(program.fn, {**weights, "seen": jnp.arange(8.0)}, ROWS)

    def apply(weights, state, key, x):
        return program.fn(weights, x), {"seen": jax.nn.relu(x @ weights["up"]).mean(0)}

    model = Model(apply, weights, {"seen": whole.weights["seen"]}, whole)
    loss, batch = lx.train.supervised(model), batch_of(model)
    before, stage, state = shrunk(model, loss, batch)
    assert state.model_state["seen"].shape == (4,)
    assert_equals_zeroed(loss, batch, before, stage, state)
    assert stage.program.fn({**state.weights, **state.model_state}, batch["x"]).shape == (8, CLASSES)


def test_a_stage_runs_on_the_pieces_of_a_batch_on_a_mesh():
    """As accumulation on several devices does: gradients of each piece, under `vmap` over the mesh's axis."""
    model = MODELS["nnx"](0.3)
    loss, batch = lx.train.supervised(model), batch_of(model)
    compression = Compression("int8", quantize_from=0, shrink_at=0, shrink={"sparsity": 0.5})
    _, stage, state = shrunk(model, loss, batch, compression=compression)

    def slopes(batch, key):
        return jax.grad(lambda weights: stage.loss(weights, batch, key, state.model_state)[0])(state.weights)

    pieces = jax.tree.map(lambda leaf: leaf.reshape(2, 4, *leaf.shape[1:]), batch)
    placed = jax.device_put(pieces, jax.NamedSharding(lx.sharding.mesh("data=2"), jax.P("data")))
    keys = jax.random.split(jax.random.key(3), 2)
    got = jax.jit(jax.vmap(slopes, spmd_axis_name="data"))(placed, keys)
    for piece in range(2):
        one = jax.jit(slopes)(jax.tree.map(lambda leaf, k=piece: leaf[k], pieces), keys[piece])
        jax.tree.map(lambda a, b, k=piece: np.testing.assert_allclose(a[k], b, rtol=1e-4, atol=1e-5), got, one)


@pytest.mark.parametrize("importance", ["taylor", "activation"])
def test_units_are_ranked_by_the_training_loss_or_by_activations(importance):
    program = mlp()
    dead = program.weights["up"].at[:, ::2].set(-1.0).at[:, 1::2].set(1.0)
    program = program.replace(weights={**program.weights, "up": dead})
    loss, batch = lx.train.supervised(program), batch_of(Model.of(program))
    batch["x"] = jnp.abs(batch["x"])
    _, _, state = shrunk(program, loss, batch, sparsity=0.5, importance=importance)
    assert state.weights["up"].tolist() == dead[:, 1::2].tolist()  # the others are never active


def test_a_state_of_other_paths_is_refused():
    model = MODELS["nnx"](0.0)
    plain, batch = lx.train.supervised(model), batch_of(model)

    def loss(*args):
        value, metrics, _ = plain(*args)
        return value, metrics, {"other": jnp.ones(3)}

    with pytest.raises(lx.TrainingError, match="returned other; return the same"):
        shrunk(model, loss, batch)
