"""Where the state of a run is: the weights by the partition rules, what belongs to a weight beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lepton_xla.sharding import Placement
from lepton_xla.sharding.placement import put_array
from lepton_xla.train.state import State
from lepton_xla.trees import key_name


def state_shardings(state: State, placement: Placement) -> State:
    """Give the sharding of each leaf of a state.

    A leaf of the optimizer, of the averages or of the best weights whose path ends with that of a weight, and that has
    its shape, is cut like it. All else is whole on every device.

    Args:
        state: the state, or its shapes.
        placement: where the weights are.

    >>> import optax
    >>> from lepton_xla.sharding import Rules, mesh
    >>> weights = {"w": jnp.ones((4, 2))}
    >>> state = State.first(weights, {}, optax.adam(0.1).init(weights), jax.random.key(0))
    >>> placement = Rules([("w", ("data",))]).resolve(weights, mesh("data=1", jax.devices()[:1]))
    >>> shardings = state_shardings(state, placement)
    >>> shardings.optimizer[0].mu["w"].spec, shardings.step.spec
    (P('data',), P())
    """
    whole = NamedSharding(placement.mesh, PartitionSpec())  # pyright: ignore[reportArgumentType]
    shapes = {entry.path: entry.shape for entry in placement.entries}

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        name = "/".join(map(key_name, path))
        for weight, shape in shapes.items():
            if (name == weight or name.endswith(f"/{weight}")) and tuple(leaf.shape) == shape:
                return placement.shardings[weight]
        return whole

    return jax.tree_util.tree_map_with_path(sharding, state)


def put(tree: Any, shardings: Any) -> Any:
    """Copy a tree to where its shardings say. Every process gives the same whole arrays.

    Arrays are copied even if they are there already: training donates its state, and the caller keeps the model.
    """
    return jax.tree.map(_put, tree, shardings)


def gathered(state: State) -> State:
    """The whole state on this process's first device, if several processes share it; every process must call this."""
    if jax.process_count() == 1:
        return state
    from jax.experimental import multihost_utils

    whole = multihost_utils.process_allgather(state.replace(key=()), tiled=True)
    return jax.tree.map(jnp.asarray, whole).replace(key=state.key)


def put_batch(batch: Mapping[str, np.ndarray], placement: Placement | None, *, local: bool) -> dict[str, Any]:
    """Copy a batch to the devices.

    Args:
        batch: name -> array; the whole batch, or with `local` the rows of this process.
        placement: where rows go; None for the default device.
        local: whether each process gives its own rows.

    Raises:
        ShardingError: if the mesh cannot split the rows evenly.
    """
    if placement is None:
        return jax.device_put(dict(batch))
    sharding = placement.batch
    if local:
        return {name: jax.make_array_from_process_local_data(sharding, leaf) for name, leaf in batch.items()}
    return {name: put_array(leaf, sharding) for name, leaf in batch.items()}


def _put(leaf: Any, sharding: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # already shared by the processes
        return jax.jit(jnp.copy, out_shardings=sharding)(leaf)
    return put_array(jnp.copy(leaf), sharding)  # `may_alias=False` still shares the part that stays
