"""The state of a run is cut like its weights, whatever the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_xla as lx
from lepton_xla.recipe import PruneRule
from lepton_xla.train import Compression, Stage, State, one_shot, sparsify
from lepton_xla.train.compression.cutting import cut_optimizer

WEIGHTS = {
    "up": jnp.asarray(np.random.default_rng(0).standard_normal((6, 8)), jnp.float32),
    "bias": jnp.asarray(np.random.default_rng(1).standard_normal(8), jnp.float32),
    "down": jnp.asarray(np.random.default_rng(2).standard_normal((8, 3)), jnp.float32),
}
STAYS = np.array([1, 0, 1, 1, 0, 0, 1, 0], bool)
CUTS = {"up": (None, STAYS), "bias": (STAYS,), "down": (STAYS, None)}
INDEX = {"up": np.s_[:, STAYS], "bias": np.s_[STAYS], "down": np.s_[STAYS]}
SMALL = {path: leaf[INDEX[path]] for path, leaf in WEIGHTS.items()}


@pytest.fixture(autouse=True)
def lenient():
    """Promotion as users have it, which optax needs."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def slopes(seed):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) for path, leaf in WEIGHTS.items()}


def cut(tree):
    return {path: leaf[INDEX[path]] for path, leaf in tree.items()}


def is_matrix(tree):
    return {path: leaf.ndim > 1 for path, leaf in tree.items()}


OPTIMIZERS = {
    "adamw": optax.adamw(0.1),
    "momentum": optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.1)),
    "every other step": optax.MultiSteps(optax.adam(0.1), 2),
    "masked": optax.chain(optax.masked(optax.scale_by_adam(), is_matrix), optax.scale(-0.1)),
    "partitioned": optax.partition(
        {True: optax.adam(0.1), False: optax.sgd(0.1, momentum=0.5)}, lambda tree: is_matrix(tree)
    ),
    "scheduled": optax.inject_hyperparams(optax.lion)(optax.cosine_decay_schedule(0.1, 10)),
    "ema": optax.chain(optax.rmsprop(0.1, centered=True), optax.ema(0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_go_on_as_if_the_removed_units_had_never_been_there(name):
    """These optimizers update each element by itself."""
    optimizer = OPTIMIZERS[name]
    state, weights = optimizer.init(WEIGHTS), WEIGHTS
    for seed in range(3):
        updates, state = optimizer.update(slopes(seed), state, weights)
        weights = optax.apply_updates(weights, updates)
    small, (after, anew) = cut(weights), cut_optimizer(state, optimizer, weights, cut(weights), CUTS)
    assert anew == []
    for seed in range(3, 6):
        updates, state = optimizer.update(slopes(seed), state, weights)
        weights = optax.apply_updates(weights, updates)
        updates, after = optimizer.update(cut(slopes(seed)), after, small)
        small = optax.apply_updates(small, updates)
    for path, leaf in small.items():
        np.testing.assert_allclose(leaf, weights[path][INDEX[path]], rtol=1e-5)


def test_adafactors_factors_are_cut_where_it_is_certain_what_they_are():
    optimizer = optax.adafactor(0.1, min_dim_size_to_factor=4, momentum=0.9)
    weights = {"wide": jnp.ones((6, 12)), "square": jnp.ones((8, 8))}
    kept = np.arange(12) % 2 == 0
    cuts = {"wide": (None, kept), "square": (None, STAYS)}
    small = {"wide": jnp.ones((6, 6)), "square": jnp.ones((8, 4))}
    grads = {path: jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape) for path, leaf in weights.items()}
    _, state = optimizer.update(grads, optimizer.init(weights), weights)
    after, anew = cut_optimizer(state, optimizer, weights, small, cuts)
    # `wide` becomes a square, whose rows and columns cannot be told apart; of `square` neither could be before.
    names = sorted(line.split(":")[0] for line in anew)
    assert [name.split("/")[-2:] for name in names] == [
        ["v_col", "square"], ["v_col", "wide"], ["v_row", "square"], ["v_row", "wide"],
    ]  # fmt: skip
    small["wide"] = jnp.ones((6, 8))
    cuts["wide"] = (None, np.arange(12) >= 4)
    after, anew = cut_optimizer(state, optimizer, weights, small, cuts)
    assert {line.split(":")[0].split("/")[-1] for line in anew} == {"square"}
    for name in ("v_row", "v_col", "v"):
        before, now = (
            next(leaf for path, leaf in leaves(tree) if f"{name}" in path and "'wide'" in path)
            for tree in (state, after)
        )
        np.testing.assert_array_equal(now, before[4:] if before.shape == (12,) else before)


def leaves(tree):
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def test_a_state_whose_leaves_depend_on_sizes_is_refused():
    """Weights of this optimizer change their partition when they get smaller."""
    by_size = lambda tree: {path: leaf.size > 20 for path, leaf in tree.items()}  # noqa: E731
    optimizer = optax.partition({True: optax.adam(0.1), False: optax.sgd(0.1)}, by_size)
    with pytest.raises(lx.TrainingError, match="another structure for the smaller weights"):
        cut_optimizer(optimizer.init(WEIGHTS), optimizer, WEIGHTS, {**SMALL, "down": jnp.ones((4, 3))}, CUTS)


def test_masks_that_a_user_gave_for_the_original_weights_are_refused():
    masks = {"up": jnp.ones((6, 8), bool)}
    optimizer = sparsify(optax.sgd(0.1), {"up": 0.5}, schedule=one_shot(5), masks=masks)
    with pytest.raises(lx.TrainingError, match="cannot go on with the smaller weights: the mask of weight 'up'"):
        cut_optimizer(optimizer.init(WEIGHTS), optimizer, WEIGHTS, SMALL, CUTS)


def program():
    weights = dict(WEIGHTS.items())
    fn = lambda w, x: jax.nn.relu(x @ w["up"] + w["bias"]) @ w["down"]  # noqa: E731
    return lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 6), "float32")})


def test_masks_averages_and_the_best_weights_are_cut_too():
    rule = PruneRule(sites=".*", sparsity=0.5)
    compression = Compression(lx.Recipe(prune=(rule,)), sparsify=one_shot(0), shrink_at=1, shrink={"sparsity": 0.5})
    stage = Stage.begin(compression, program(), lx.train.supervised(program()), optax.adam(0.1))
    state = State.first(stage.weights, {}, stage.optimizer.init(stage.weights), jax.random.key(0))
    updates, moments = stage.optimizer.update(slopes(0), state.optimizer, state.weights)
    weights = optax.apply_updates(state.weights, updates)
    average = {path: leaf + 1 for path, leaf in weights.items()}
    state = state.replace(
        step=jnp.int32(1), weights=weights, optimizer=moments, ema=average, best={"up": average["up"]}
    )
    batch = {"x": jnp.ones((4, 6)), "label": jnp.zeros(4, jnp.int32)}
    stage, small = stage.advance(state, batch)
    stays = stage.decided.cuts["bias"][0]
    for path in WEIGHTS:
        index = {"up": np.s_[:, stays], "bias": np.s_[stays], "down": np.s_[stays]}[path]
        np.testing.assert_array_equal(small.weights[path], weights[path][index])
        np.testing.assert_array_equal(small.ema[path], average[path][index])
        np.testing.assert_array_equal(small.optimizer.inner[0].mu[path], moments.inner[0].mu[path][index])
        if path != "bias":
            np.testing.assert_array_equal(small.optimizer.masks[path], moments.masks[path][index])
    np.testing.assert_array_equal(small.best["up"], average["up"][:, stays])
    assert small.optimizer.step == 1
    final = stage.finalize(small)
    assert final.masks.keys() == {"up", "down"}
    assert all(np.all(np.asarray(final.weights[path])[~np.asarray(mask)] == 0) for path, mask in final.masks.items())
    updates, _ = stage.optimizer.update(jax.tree.map(jnp.ones_like, small.weights), small.optimizer, small.weights)
    moved = optax.apply_updates(small.weights, updates)
    assert all(np.all(np.asarray(moved[path])[~np.asarray(mask)] == 0) for path, mask in final.masks.items())


def test_moments_stay_on_their_mesh():
    mesh = lx.sharding.mesh("model=2")
    column = jax.NamedSharding(mesh, jax.P(None, "model"))
    optimizer = optax.adam(0.1)
    placed = {**WEIGHTS, "up": jax.device_put(WEIGHTS["up"], column)}
    adam, scale = optimizer.init(placed)
    after, _ = cut_optimizer((adam._replace(mu=placed), scale), optimizer, placed, SMALL, CUTS)
    assert after[0].mu["up"].sharding == column
    np.testing.assert_array_equal(after[0].mu["up"], SMALL["up"])
