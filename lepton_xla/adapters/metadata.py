"""Logical names of the axes of weights, from the metadata of Flax variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from lepton_xla.environment.extras import Needs
from lepton_xla.trees import name_leaves

type Axes = dict[str, tuple[Any, ...]]
"""Path of a weight -> one entry for each of its axes: a name, several, or None."""


def linen_axes(variables: Mapping[str, Any]) -> tuple[Any, Axes]:
    """Remove the boxes of Linen variables (`nn.Partitioned`, `nn.LogicallyPartitioned`); return their names too.

    >>> import flax.linen as nn
    >>> linen_axes({"params": {"kernel": nn.Partitioned(np.ones((2, 3)), ("embed", "mlp"))}})[1]
    {'params/kernel': ('embed', 'mlp')}
    """
    with Needs("flax", "a Flax module"):
        from flax.core import meta

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, meta.AxisMetadata)

    boxes = jax.tree.map(lambda leaf: _Opaque(leaf) if is_box(leaf) else leaf, dict(variables), is_leaf=is_box)
    named = {
        path: tuple(getattr(leaf.value, "names", ()))
        for path, leaf in name_leaves(boxes).items()
        if isinstance(leaf, _Opaque)
    }
    plain = jax.tree.map(lambda leaf: leaf.value if isinstance(leaf, _Opaque) else leaf, boxes)
    return jax.tree.map(_value, plain, is_leaf=is_box), {path: names for path, names in named.items() if names}


def nnx_axes(state: Any) -> Axes:
    """The logical names that the variables of an NNX state carry as `out_sharding`.

    >>> from flax import nnx
    >>> with nnx.use_eager_sharding(False):
    ...     module = nnx.Linear(2, 3, kernel_metadata={"out_sharding": ("embed", "mlp")}, rngs=nnx.Rngs(0))
    >>> nnx_axes(nnx.state(module))
    {'kernel': ('embed', 'mlp')}
    """
    with Needs("flax", "a Flax module"):
        from flax import nnx

    found: Axes = {}
    for path, variable in nnx.to_flat_state(state):
        names = variable.get_metadata().get("out_sharding")
        if names is not None:
            found["/".join(map(str, path))] = tuple(names)
    return found


class _Opaque:
    """A box that JAX takes as a leaf."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _value(box: Any) -> Any:
    """The array in a box, without the sharding constraint that `unbox` may add."""
    while hasattr(box, "value"):
        box = box.value
    return box
