"""Factors on the input channels of products that leave what a program computes as it is: `(x / s) @ (s * W) = x @ W`.

What SmoothQuant, AWQ and cross-layer equalization share. The weight takes `s` up; `1 / s` goes into the weights before
it where `flow` finds a way, and else into one multiplication of the activation at the product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla import _compat
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.flow import Flow, NotAbsorbedError, Place
from lepton_xla.passes.core.names import Key, fresh
from lepton_xla.passes.core.sites import LayoutOp, Site, find_sites, rewrite_sites
from lepton_xla.passes.core.walker import Context, Values, materialize
from lepton_xla.passes.rescaling.factors import FactorGroup, multiplied, row_absmax
from lepton_xla.program import Program
from lepton_xla.trees import abstract

if TYPE_CHECKING:
    from lepton_xla.passes.core.plans import Plan

# What an activation is multiplied by is called this, among the weights and beside them.
FACTOR = "input_factor"


def channels(site: Site) -> int:
    """How many input channels a product has: what is summed over, of all batches; a window's positions share one."""
    batch, depth, _ = matrix.matrix_shape(site)
    return batch * depth // matrix.window_size(site)


def channel_vector(site: Site, columns: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """What `[*steps, B, K]` says of each input channel, `[*steps, channels]`."""
    reduced = matrix.input_channels(site, columns, reduce)
    return jnp.reshape(reduced, (*reduced.shape[:-2], -1))


def matrix_rows(site: Site, vector: jax.Array) -> jax.Array:
    """A vector of channels `[*steps, channels]` for the rows of weight matrices: `[*steps, B, K, 1]`."""
    batch, depth, _ = matrix.matrix_shape(site)
    window, lead = matrix.window_size(site), vector.shape[:-1]
    parts = jnp.reshape(vector, (*lead, batch, 1, -1))
    spread = jnp.broadcast_to(parts, (*lead, batch, window, depth // window))
    return jnp.reshape(spread, (*lead, batch, depth, 1))


def scale_groups(program: Program, plan: Plan) -> tuple[list[FactorGroup], dict[str, str]]:
    """The planned products in groups that share an activation, in the order of execution.

    A product that the plan leaves alone is in a group with planned ones whose activation it shares, if that is what it
    takes for the weights before them to take the factor up.

    Returns:
        The groups, and the name of each planned product that can have no factor, and why.
    """
    flow = Flow(program)
    planned = {entry.site.name for entry in plan.sites if entry.quantize is not None and entry.site.path is not None}
    sites = {site.name: site for site in find_sites(program) if site.path is not None}
    kept: dict[str, str] = {}
    shared: dict[tuple[Any, int], list[Site]] = {}
    alone: list[FactorGroup] = []
    order: dict[str, int] = {name: index for index, name in enumerate(sites)}
    for name, site in sites.items():
        reason = _unscalable(flow, site)
        if reason:
            kept |= {name: reason} if name in planned else {}
            continue
        try:
            root = flow.activation(flow.places[name])
        except NotAbsorbedError as error:
            alone += [FactorGroup((site,), (), str(error))] if name in planned else []
            continue
        shared.setdefault(root, []).append(site)
    groups = list(alone)
    for root, members in shared.items():
        if any(site.name in planned for site in members):
            groups += _grouped(flow, root, members, planned)
    return sorted(groups, key=lambda group: order[group.sites[0].name]), kept


def _grouped(flow: Flow, root: tuple[Any, int], members: Sequence[Site], planned: set[str]) -> list[FactorGroup]:
    """The products on one activation: one group, whose factor goes before them if it can."""
    var, axis = root
    places = [flow.places[site.name] for site in members]
    own = tuple(site for site in members if site.name in planned)
    if len({place.source.steps for place in places}) > 1:  # a factor a step for some, one for all for others
        return [
            FactorGroup((site,), (), "its activation also meets a weight that is stacked otherwise") for site in own
        ]
    try:
        _only_read_by(flow, places, var)
        return [FactorGroup(tuple(members), tuple(flow.absorb(places[0], var, axis)))]
    except NotAbsorbedError as error:
        return [FactorGroup(own, (), str(error))]


def _only_read_by(flow: Flow, places: Sequence[Place], var: Any) -> None:
    """Raises `NotAbsorbedError` where something but these products reads a variable."""
    mine = {id(place.eqn) for place in places}
    if any(eqn is None or id(eqn) not in mine for eqn in flow.readers(places[0].body, var)):
        raise NotAbsorbedError("its activation is also read elsewhere")


def _unscalable(flow: Flow, site: Site) -> str:
    """Why no factor can be put on a product's inputs; empty if one can."""
    if site.kind not in ("dot_general", "conv_general_dilated"):
        return f"a {site.kind} sums over no inputs"
    if site.kind == "conv_general_dilated" and (site.weight_operand != 1 or site.params["batch_group_count"] != 1):
        return "a convolution of another kind"
    if _compat.is_manual(site.eqn) or site.name not in flow.places:
        return "it is inside a container that is not looked into"
    if not site.exclusive or flow.uses.get(site.path or "", 0) != 1:
        return "its weight is also used elsewhere"
    if any(op.resizes for op in site.layout if isinstance(op, LayoutOp)):
        return "its weight is broadcast or cut before use"
    if site.not_float:
        return f"its weight is {site.not_float}, which holds no factor"
    if not all(jnp.issubdtype(operand.dtype, jnp.floating) for operand in site.operands):
        return "it is no product of floats"
    return ""


def weight_absmax(weights: Mapping[str, Any], group: FactorGroup) -> jax.Array:
    """The largest magnitude that each input channel of a group meets in its weights: `[*steps, channels]`."""
    found = [np.asarray(row_absmax(site, weights[str(site.path)])) for site in group.sites]
    return jnp.asarray(np.max(found, axis=0))


def scaled_weights(weights: Mapping[str, Any], sites: Mapping[str, Site], group: FactorGroup, factor: jax.Array) -> Any:
    """The weights with a group's factor in its products and, where it can, the inverse before them.

    Args:
        weights: all weights, by path.
        sites: all products, by name.
        group: the group.
        factor: `[*steps, channels]`, as `fitted` gives it.
    """
    changed = dict(weights)
    for site in group.sites:
        changed[str(site.path)] = _multiplied(changed[str(site.path)], factor, Alike(site))
    for absorber in group.absorbers:
        like = None if absorber.axis is None else Alike(sites[absorber.site])
        changed[absorber.path] = _divided(changed[absorber.path], factor, like, absorber.axis)
    return changed


@functools.partial(jax.jit, static_argnames="like")
def _multiplied(stored: jax.Array, factor: jax.Array, like: Alike) -> jax.Array:
    """A product's weight, its input channels multiplied."""
    scaled = multiplied(matrix.stored_matrix(like.site, stored), matrix_rows(like.site, factor))
    return matrix.stored_weight(like.site, scaled, stored)


@functools.partial(jax.jit, static_argnames=("like", "axis"))
def _divided(stored: jax.Array, factor: jax.Array, like: Alike | None, axis: int | None) -> jax.Array:
    """A weight before the product, divided: a vector, or along an axis of another product's weight operand."""
    if like is None or axis is None:
        return multiplied(stored, 1 / jnp.reshape(factor, stored.shape))
    site = like.site
    shape = [1] * len(site.weight.shape)
    shape[axis] = -1
    operand = jnp.broadcast_to(
        jnp.reshape(factor, (*factor.shape[:-1], *shape)), (*factor.shape[:-1], *site.weight.shape)
    )
    by = matrix.each_step(site, lambda part: matrix.weight_matrix(site, part))(operand)
    return matrix.stored_weight(site, multiplied(matrix.stored_matrix(site, stored), 1 / by), stored)


def multiply_inputs(program: Program, factors: Sequence[tuple[FactorGroup, jax.Array]]) -> Program:
    """Multiplies the activations of some products, each by a vector that becomes a weight of the program.

    Products on one activation share one vector, so that a compiler sees that they multiply, and round, the same thing.

    Args:
        program: the program.
        factors: groups, and what their input channels are multiplied by, `[*steps, channels]`.
    """
    if not factors:
        return program
    added: dict[str, jax.Array] = {}
    names: dict[str, str] = {}
    for group, vector in factors:
        name = fresh(group.sites[0].name, FACTOR, {*program.weights, *added})
        added[name] = vector
        names |= {site.name: name for site in group.sites}
    like, inner = abstract(program.weights), program.fn
    stored = {site.name: site for group, _ in factors for site in group.sites}

    def rule(site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
        if site.name not in stored or site.weight_operand is None:
            return None
        weight, activation = values[site.weight_operand], materialize(values[1 - site.weight_operand])
        # Rounding reads the product twice; without the barrier, XLA:CPU computes all that is before it twice as well.
        computed: dict[int, tuple[Any, jax.Array]] = context.walk.notes.setdefault("computed", {})
        if id(activation) not in computed:
            computed[id(activation)] = activation, lax.optimization_barrier(activation)
        factor = _along_channels(site, weight.beside[site.name, FACTOR])
        activation = multiplied(computed[id(activation)][1], factor)
        operands = (activation, weight.value) if site.weight_operand == 1 else (weight.value, activation)
        return context.bind(eqn, operands)

    def run(weights: Mapping[str, Any], *inputs: Any) -> Any:
        beside: dict[str, dict[Key, jax.Array]] = {}
        for name, site in stored.items():
            beside.setdefault(str(site.path), {})[name, FACTOR] = weights[names[name]]
        own = {name: leaf for name, leaf in weights.items() if name in like}
        return rewrite_sites(inner, rule, inline=True, on_unknown="keep", beside=beside)(own, *inputs)

    return program.replace(fn=run, weights={**program.weights, **added})


def _along_channels(site: Site, vector: jax.Array) -> jax.Array:
    """A vector of input channels, as it is broadcast to the activation operand."""
    assert site.weight_operand is not None
    side = 1 - site.weight_operand
    shape = site.operands[side].shape
    if site.kind == "conv_general_dilated":
        axes: tuple[int, ...] = (site.params["dimension_numbers"].lhs_spec[1],)
    else:
        contract, batch = site.params["dimension_numbers"]
        axes = (*batch[side], *contract[side])
    ordered = sorted(axes)
    parts = jnp.reshape(vector, [shape[axis] for axis in axes])
    parts = jnp.transpose(parts, [axes.index(axis) for axis in ordered])
    return jnp.reshape(parts, [size if axis in axes else 1 for axis, size in enumerate(shape)])
