"""Weights that are sharded along the dimension that a pass goes through, and the other way to cut them."""

from __future__ import annotations

import math

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lepton_xla import _compat
from lepton_xla.passes.core.layouts import Step
from lepton_xla.passes.core.matrix import weight_order
from lepton_xla.passes.core.sites import Site

# Operations between a stored weight and its product that leave its axes as they are.
_IN_PLACE = ("convert_element_type", "pvary", "pcast")


def is_spread(weight: object) -> bool:
    """Whether a weight is on several devices."""
    return isinstance(weight, jax.Array) and not _compat.is_traced(weight) and len(weight.sharding.device_set) > 1


def over_columns(site: Site, weight: jax.Array, *, always: bool = True) -> jax.Array:
    """Cut a stored weight over its columns, if its rows (the contracted dimension) are cut over devices.

    What goes through rows in order would gather the weight otherwise: GPTQ, codes of which several share a byte, groups
    that are on two devices. Moving the cut is one all-to-all, after which each device has as much of the weight as
    before.

    Args:
        site: the site.
        weight: the stored weight; returned unchanged if it is not sharded so, or no column axis can take the cut.
        always: False moves the cut only if the `[K, N]` matrix cannot be cut where the weight is, as a convolution's
            kernel that is cut over input channels.
    """
    sharding = None if _compat.is_traced(weight) else weight.sharding
    plain = all(isinstance(op, Step) or op.eqn.primitive.name in _IN_PLACE for op in site.layout)
    if not isinstance(sharding, NamedSharding) or not plain:
        return weight
    _, contracted, free = ([site.stacked + axis for axis in axes] for axes in weight_order(site))
    cuts = [tuple([part] if isinstance(part, str) else part or ()) for part in sharding.spec]
    cuts += [()] * (weight.ndim - len(cuts))
    moved = tuple(name for axis in contracted for name in cuts[axis])
    rows = [axis for axis in contracted if weight.shape[axis] > 1]
    if not moved or not (always or any(cuts[axis] for axis in rows[1:])):
        return weight
    for axis in free:
        names = (*cuts[axis], *moved)
        if weight.shape[axis] % math.prod(sharding.mesh.shape[name] for name in names) == 0:
            spec = [names if place == axis else () if place in contracted else cut for place, cut in enumerate(cuts)]
            return jax.device_put(weight, NamedSharding(sharding.mesh, PartitionSpec(*(cut or None for cut in spec))))
    return weight
