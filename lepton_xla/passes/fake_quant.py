"""Rounds weights and activations to what a plan's formats hold, in float: for training, and as lower's reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from lepton_xla.passes import products
from lepton_xla.passes.rewrite import Context, Values
from lepton_xla.passes.sites import Site, operand_value, rewrite_sites
from lepton_xla.quant import FORMATS, absmax_scale, fake_quantize, magnitude

if TYPE_CHECKING:
    from lepton_xla.recipe import Plan


def fake_quant(fn: Callable[..., Any], plan: Plan, ranges: Mapping[str, jax.Array] | None = None) -> Callable[..., Any]:
    """Makes a function compute with quantized values, differentiable by the straight-through estimator.

    Args:
        fn: `fn(weights, *inputs)`, weights any pytree whose paths are those of the plan's program.
        plan: which sites get what.
        ranges: site name -> calibrated absmax of its activation, as `calibrate` returns, for static scales.

    Returns:
        A function like `fn`, for use inside `jit`, `grad`, `vmap` and sharding.

    Raises:
        CalibrationError: when called, if a static site has no range.
    """

    def rule(site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
        planned = plan[site.name]
        if planned is None or planned.quantize is None or site.weight_operand is None:
            return None
        decision = planned.quantize
        operands = [operand_value(value) for value in values]
        weight, act = site.weight_operand, 1 - site.weight_operand
        target = FORMATS[decision.weights]
        scale = absmax_scale(magnitude(operands[weight], products.weight_axes(site, decision.granularity)), target)
        operands[weight] = fake_quantize(operands[weight], scale, decision.weights)
        if decision.activations != "none":
            absmax = products.static_range(site, decision, values[weight])
            act_scale = products.activation_scale(site, operands[act], decision.activations, absmax)
            operands[act] = fake_quantize(operands[act], act_scale, decision.activations)
        return context.bind(eqn, operands)

    beside = products.ranges_beside((planned.site for planned in plan.sites), ranges or {})
    return rewrite_sites(fn, rule, beside=beside)
