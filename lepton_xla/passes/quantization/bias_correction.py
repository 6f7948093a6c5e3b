"""Bias correction: compensates the mean shift that rounding a weight causes in the outputs of its product.

Nagel et al. 2019, arXiv:1906.04721, section 4.2. With rounded weights `Q`, outputs shift by `E[x] (Q - W)` on average
over the data. This is subtracted from the bias of the product; if it has none, one is added.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.derivations import Step
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.flow import Flow, Place, is_vector, not_float_name, output_axis
from lepton_xla.passes.core.names import fresh_names
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.precomputation import for_plan
from lepton_xla.passes.core.sites import Site, rewrite_sites
from lepton_xla.passes.core.statistics import collect_statistics
from lepton_xla.passes.core.walker import Context, Values, materialize
from lepton_xla.passes.quantization.products import arrange_side_inputs
from lepton_xla.passes.quantization.rounding import exact_matrices, planned_weights, weight_report
from lepton_xla.program import Program
from lepton_xla.report import PassReport, unchanged
from lepton_xla.trees import abstract

# Name of an added bias, among the weights and as a side input.
CORRECTION = "correction"


@dataclasses.dataclass(frozen=True)
class _Added:
    """A bias to add after a product: the site, and the vector `[*steps, *batch, *free]` of its weight's axes."""

    site: Site
    vector: jax.Array


@takes(program=Program, rounded=Program, plan=Plan)
def correct_bias(program: Program, rounded: Program, plan: Plan, batches: Iterable[Mapping[str, Any]]) -> Program:
    """Correct the biases of a program for the rounding of its weights.

    Args:
        program: the float program that the plan was made for.
        rounded: the same program with its planned weights rounded, by `round_to_nearest` or `gptq`.
        plan: the products to correct are those that it quantizes.
        batches: input dicts, such as `{"image": array}`; at least one. Means are taken on the float program.

    Returns:
        `rounded` with its biases corrected.

    Raises:
        CalibrationError: as `collect_statistics`.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> plan = lx.passes.resolve(lx.Recipe.load("int4-weight-only"), program)
    >>> rounded, grids = lx.passes.round_to_nearest(program, plan)
    >>> corrected = lx.passes.correct_bias(program, rounded, plan, [{"x": np.ones((2, 4), np.float32)}])
    >>> sorted(corrected.weights)
    ['w', 'w:correction']
    """
    program = for_plan(program, plan)
    start = time.perf_counter()
    flow = Flow(program)
    all_planned, reports = planned_weights(program, plan)
    found = collect_statistics(program, [site for each in all_planned for site in each.products], batches)
    weights: dict[str, Any] = dict(rounded.weights)
    added: dict[str, _Added] = {}
    for planned in all_planned:
        after = rounded.weights[planned.path]
        for site in planned.products:
            seen = found[site.name]
            if not np.all(seen.rows > 0):
                reports.append(unchanged(site.name, "the calibration data does not reach it"))
                continue
            shift = _shift(planned.stored, after, seen.mean, Alike(planned.site))
            bias = _bias_after(flow, flow.places.get(site.name))
            if bias is None:
                added[site.name] = _Added(site, -shift)
                action = "a bias added"
            else:
                weights[bias] = _corrected(weights[bias], _channels(site, shift))
                action = f"{bias} corrected"
            metrics = {"largest_shift": float(np.max(np.abs(np.asarray(shift))))}
            reports.append(weight_report(site, action, weights[planned.path], metrics=metrics))
    changed = _add_biases(rounded.replace(weights=weights), added)
    why = "biases are corrected for the calibration data"
    derivation = rounded.derived(Step("bias_correction", gives=tuple(changed.weights), reason=why))
    report = PassReport("bias_correction", time.perf_counter() - start, tuple(reports))
    return changed.replace(history=(*rounded.history, report), derivation=derivation)


@functools.partial(jax.jit, static_argnames="like")
def _shift(before: jax.Array, after: jax.Array, mean: jax.Array, like: Alike) -> jax.Array:
    """The mean shift of the outputs by rounding a weight: `[*steps, B, N]`."""
    error = exact_matrices(after, like) - exact_matrices(before, like)
    return jnp.einsum("...k,...kn->...n", mean, error, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _corrected(bias: jax.Array, shift: jax.Array) -> jax.Array:
    return (bias.astype(jnp.float32) - jnp.reshape(shift, bias.shape)).astype(bias.dtype)


def _bias_after(flow: Flow, place: Place | None) -> str | None:
    """The path of a bias vector that is added to this product only; None if there is none."""
    if place is None:
        return None
    body, eqn, axis = place.body, place.eqn, _channel_axis(place)
    while True:
        var = eqn.outvars[0]
        readers = body.readers.get(var, [])
        if len(readers) != 1 or readers[0] is None or axis is None:
            return None
        after = readers[0]
        if after.primitive.name == "transpose":  # from `vmap`, if the weight is the left operand
            axis = list(after.params["permutation"]).index(axis)
        elif after.primitive.name != "convert_element_type" or not_float_name(after.outvars[0].aval.dtype):
            break
        eqn = after
    if after.primitive.name != "add":
        return None
    side = 1 - next(index for index, atom in enumerate(after.invars) if atom is var)
    operand = after.invars[side]
    source = body.source(operand)
    if source is None or source.not_float or after.outvars[0].aval.shape != var.aval.shape:
        return None
    if operand.aval.ndim != var.aval.ndim or flow.uses.get(source.path, 0) != 1 or source.steps != place.source.steps:
        return None
    return source.path if is_vector(flow.weights[source.path], body, operand, axis) else None


def _channel_axis(place: Place) -> int | None:
    """The axis of the output channels in a product's result; None if they are not on a single axis."""
    ndim = place.eqn.outvars[0].aval.ndim
    if place.eqn.primitive.name == "conv_general_dilated":
        return place.eqn.params["dimension_numbers"].out_spec[1]
    if place.eqn.params["dimension_numbers"][1][0]:
        return None
    axes = [axis for axis in range(ndim) if output_axis(place.eqn, place.weight_operand, axis) is not None]
    return axes[0] if len(axes) == 1 else None


def _channels(site: Site, columns: jax.Array) -> jax.Array:
    """Reshape `[*steps, B, N]` to one axis of channels: `[*steps, channels]`."""
    return jnp.reshape(columns, (*columns.shape[: site.stacked], -1))


def _add_biases(program: Program, added: Mapping[str, _Added]) -> Program:
    """Add a vector of the output channels to the results of some products."""
    if not added:
        return program
    names = fresh_names([(name, CORRECTION) for name in added], program.weights)
    like, inner = abstract(program.weights), program.fn
    sites = {name: entry.site for name, entry in added.items()}

    def rule(site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
        if site.name not in sites or site.weight_operand is None:
            return None
        weight, activation = values[site.weight_operand], materialize(values[1 - site.weight_operand])
        operands = (activation, weight.value) if site.weight_operand == 1 else (weight.value, activation)
        (out,) = context.bind(eqn, operands)
        bias = _along_outputs(site, weight.side_inputs[site.name, CORRECTION], out.ndim)
        return [(out.astype(jnp.float32) + bias).astype(out.dtype)]

    def run(weights: Mapping[str, Any], *inputs: Any) -> Any:
        side_inputs = arrange_side_inputs(sites.values(), {key: weights[name] for key, name in names.items()})
        own = {name: leaf for name, leaf in weights.items() if name in like}
        return rewrite_sites(inner, rule, inline=True, on_unknown="keep", side_inputs=side_inputs)(own, *inputs)

    vectors = {names[name, CORRECTION]: entry.vector for name, entry in added.items()}
    return program.replace(fn=run, weights={**program.weights, **vectors})


def _along_outputs(site: Site, columns: jax.Array, ndim: int) -> jax.Array:
    """Reshape `[B, N]` of a product for broadcasting to its result."""
    assert site.weight_operand is not None
    if site.kind == "conv_general_dilated":
        axis = site.params["dimension_numbers"].out_spec[1]
        return jnp.reshape(columns, [-1 if k == axis else 1 for k in range(ndim)])
    batch, _, free = matrix.weight_order(site)
    lead = tuple(site.weight.shape[axis] for axis in batch)
    sizes = tuple(site.weight.shape[axis] for axis in free)
    others = (1,) * (ndim - len(lead) - len(sizes))
    middle = (*sizes, *others) if site.weight_operand == 0 else (*others, *sizes)
    return jnp.reshape(columns, (*lead, *middle))
