"""One of two processes that shrink and freeze ranges while weights and moments are sharded over both.

    python two_processes.py PORT RANK FILE

Each process writes what was decided, and the sums of the state; `test_two_processes.py` compares.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_xla as lx
from lepton_xla.train import Compression, Stage, State

STEPS = 3


def run(mesh=None):
    """Train over both changes; return the last stage and state."""
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    weights = {"up": array(6, 16), "down": array(16, 4)}
    fn = lambda w, x: jax.nn.relu(x @ w["up"]) @ w["down"]  # noqa: E731
    program = lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 6), "float32")})
    recipe = lx.Recipe.load("int8").replace({"quantize.0.dynamic": False})
    compression = Compression(recipe, quantize_from=2, learn_scales=True, shrink_at=1, shrink={"sparsity": 0.5})
    stage = Stage.begin(compression, program, lx.train.supervised(program), optax.adam(0.1))
    state = State.first(weights, {}, stage.optimizer.init(weights), jax.random.key(0))
    batch = {"x": np.asarray(array(8, 6)), "label": np.arange(8, dtype=np.int32) % 4}

    def placed(state):
        if mesh is None:
            return state
        specs = {"up": jax.P(None, "model"), "down": jax.P("model", None)}

        def place(path, leaf):
            name = str(path[-1].key) if isinstance(path[-1], jax.tree_util.DictKey) else ""
            spec = specs.get(name, jax.P()) if leaf.ndim == 2 and leaf.shape[0] > 1 else jax.P()
            sharding = jax.NamedSharding(mesh, spec)
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                return jax.jit(jnp.copy, out_shardings=sharding)(leaf)
            whole = np.asarray(leaf)
            return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

        key = state.key
        return jax.tree_util.tree_map_with_path(place, state.replace(key=())).replace(key=key)

    def step(state, batch):
        values = state.scales.get("values", {})

        def value(trained):
            return stage.loss(trained[0], batch, None, {}, scales=trained[1])[0]

        slopes, of_scales = jax.grad(value)((state.weights, values))
        updates, moments = stage.optimizer.update(slopes, state.optimizer, state.weights)
        scales = state.scales
        if scales:
            moved, own = stage.scale_optimizer.update(of_scales, scales["optimizer"], values)
            scales = {"values": optax.apply_updates(values, moved), "optimizer": own}
        weights = optax.apply_updates(state.weights, updates)
        return state.replace(step=state.step + 1, weights=weights, optimizer=moments, scales=scales, key=())

    state = placed(state)
    for number in range(STEPS):
        if stage.due(number):
            stage, state = stage.advance(state, batch)
            state = placed(state)
        key = state.key
        state = jax.jit(step)(state.replace(key=()), batch).replace(key=key)
    return stage, state


def said(stage, state):
    """What is compared: the decisions, and every leaf's sum of absolute values."""
    sums = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.sum(jnp.abs(leaf)), tree))(state.replace(key=()))
    described = stage.describe()
    described.pop("report")
    return {"decided": described, "sums": [float(leaf) for leaf in jax.tree.leaves(sums)]}


if __name__ == "__main__":
    port, rank, file = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 1)
    jax.distributed.initialize(f"localhost:{port}", 2, int(rank), initialization_timeout=60)
    found = said(*run(jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))))
    pathlib.Path(file).write_text(json.dumps(found), encoding="utf-8")
    jax.distributed.shutdown()
