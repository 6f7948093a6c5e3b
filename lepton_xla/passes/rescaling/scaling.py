"""Function-preserving factors on the input channels of products: `(x / s) @ (s * W) = x @ W`.

SmoothQuant, AWQ and cross-layer equalization share this module. The weight is multiplied by `s`. `1 / s` is folded into
preceding weights if `flow` finds a way, else the activation is multiplied at the product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lepton_xla import _compat
from lepton_xla.derivations import Step
from lepton_xla.passes.core import matrix, memory
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.flow import Flow, NotAbsorbedError, Place
from lepton_xla.passes.core.layouts import LayoutOp
from lepton_xla.passes.core.names import Key, fresh
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.sites import Site, find_sites, rewrite_sites
from lepton_xla.passes.core.walker import Context, Values, materialize
from lepton_xla.passes.rescaling.factors import FactorGroup, multiplied, row_absmax
from lepton_xla.program import Program
from lepton_xla.trees import abstract

# Name of the factor of an activation, among the weights and as a side input.
FACTOR = "input_factor"


def channels(site: Site) -> int:
    """Number of input channels of a product, over all batches; the positions of a window share a channel."""
    batch, depth, _ = matrix.matrix_shape(site)
    return batch * depth // matrix.window_size(site)


def channel_vector(site: Site, columns: jax.Array, reduce: Callable[..., jax.Array]) -> jax.Array:
    """Reduce `[*steps, B, K]` to input channels, `[*steps, channels]`."""
    reduced = matrix.input_channels(site, columns, reduce)
    return jnp.reshape(reduced, (*reduced.shape[:-2], -1))


def matrix_rows(site: Site, vector: jax.Array) -> jax.Array:
    """Expand channels `[*steps, channels]` to the rows of weight matrices, `[*steps, B, K, 1]`."""
    batch, depth, _ = matrix.matrix_shape(site)
    window, lead = matrix.window_size(site), vector.shape[:-1]
    parts = jnp.reshape(vector, (*lead, batch, 1, -1))
    spread = jnp.broadcast_to(parts, (*lead, batch, window, depth // window))
    return jnp.reshape(spread, (*lead, batch, depth, 1))


def scale_groups(program: Program, plan: Plan) -> tuple[list[FactorGroup], dict[str, str]]:
    """Group the planned products by the activation that they share, in the order of execution.

    A product that is not planned joins a group with which it shares the activation, if the preceding weights can absorb
    the factor only then.

    Returns:
        The groups; and the names of the planned products that cannot have a factor, with the reasons.
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
    """Group the products on one activation; preceding weights absorb the factor if possible."""
    var, axis = root
    places = [flow.places[site.name] for site in members]
    own = tuple(site for site in members if site.name in planned)
    if len({place.source.steps for place in places}) > 1:  # some need one factor per step, others one for all steps
        return [
            FactorGroup((site,), (), "its activation also meets a weight that is stacked otherwise") for site in own
        ]
    try:
        _only_read_by(flow, places, var)
        return [FactorGroup(tuple(members), tuple(flow.absorb(places[0], var, axis)))]
    except NotAbsorbedError as error:
        return [FactorGroup(own, (), str(error))]


def _only_read_by(flow: Flow, places: Sequence[Place], var: Any) -> None:
    """Raise `NotAbsorbedError` if anything but these products reads a variable."""
    mine = {id(place.eqn) for place in places}
    if any(eqn is None or id(eqn) not in mine for eqn in flow.readers(places[0].body, var)):
        raise NotAbsorbedError("its activation is also read elsewhere")


def _unscalable(flow: Flow, site: Site) -> str:
    """Why a product's inputs cannot have a factor; empty if they can."""
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
    """Largest magnitude of the weights for each input channel of a group: `[*steps, channels]`."""
    found = [np.asarray(row_absmax(site, weights[str(site.path)])) for site in group.sites]
    return jax.device_put(np.max(found, axis=0))


def scaled_weights(
    weights: Mapping[str, Any],
    sites: Mapping[str, Site],
    group: FactorGroup,
    factor: jax.Array,
    steps: list[Step],
) -> Any:
    """Multiply a group's weights by its factor, and divide its absorbers by it.

    Args:
        weights: all weights, by path.
        sites: all products, by name.
        group: the group.
        factor: `[*steps, channels]`, a result of `fitted`.
        steps: what was done is added to it.
    """
    changed = dict(weights)
    done: list[tuple[str, Callable[..., Any]]] = [
        (str(site.path), functools.partial(_multiplied, like=Alike(site))) for site in group.sites
    ]
    for absorber in group.absorbers:
        like = None if absorber.axis is None else Alike(sites[absorber.site])
        done.append((absorber.path, functools.partial(_divided, like=like, axis=absorber.axis)))
    for path, scale in done:
        changed[path] = memory.in_file(scale(changed[path], factor), weights)
        alone = lambda stored, by, scale=scale: (scale(stored, by),)  # noqa: E731
        steps.append(Step("rescale", (path,), (path,), alone, (jnp.asarray(factor),)))
    return changed


@functools.partial(jax.jit, static_argnames="like")
def _multiplied(stored: jax.Array, factor: jax.Array, like: Alike) -> jax.Array:
    """Multiply the input channels of a product's weight."""
    scaled = multiplied(matrix.stored_matrix(like.site, stored), matrix_rows(like.site, factor))
    return matrix.stored_weight(like.site, scaled, stored)


@functools.partial(jax.jit, static_argnames=("like", "axis"))
def _divided(stored: jax.Array, factor: jax.Array, like: Alike | None, axis: int | None) -> jax.Array:
    """Divide an absorber: a vector, or another product's weight along an axis of its operand."""
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
    """Multiply the activations of products by vectors, which become weights of the program.

    Products on one activation share one vector, so that the compiler can share the multiplication and the rounding.

    Args:
        program: the program.
        factors: groups and the factors of their input channels, `[*steps, channels]`.
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
        # Rounding reads the result twice; without the barrier, XLA:CPU would also compute everything before it twice.
        computed: dict[int, tuple[Any, jax.Array]] = context.walk.notes.setdefault("computed", {})
        if id(activation) not in computed:
            computed[id(activation)] = activation, lax.optimization_barrier(activation)
        factor = _along_channels(site, weight.side_inputs[site.name, FACTOR])
        activation = multiplied(computed[id(activation)][1], factor)
        operands = (activation, weight.value) if site.weight_operand == 1 else (weight.value, activation)
        return context.bind(eqn, operands)

    def run(weights: Mapping[str, Any], *inputs: Any) -> Any:
        side_inputs: dict[str, dict[Key, jax.Array]] = {}
        for name, site in stored.items():
            side_inputs.setdefault(str(site.path), {})[name, FACTOR] = weights[names[name]]
        own = {name: leaf for name, leaf in weights.items() if name in like}
        return rewrite_sites(inner, rule, inline=True, on_unknown="keep", side_inputs=side_inputs)(own, *inputs)

    steps = [Step("rescale", gives=(name,), data=(vector,)) for name, vector in added.items()]
    return program.replace(fn=run, weights={**program.weights, **added}, derivation=program.derived(*steps))


def _along_channels(site: Site, vector: jax.Array) -> jax.Array:
    """Reshape a vector of input channels for broadcasting to the activation operand."""
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
