"""Eligibility: which sites can be quantized, which can multiply codes, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from lepton_xla import _compat
from lepton_xla.kernels import weight_only
from lepton_xla.passes.alternatives import convolving
from lepton_xla.passes.core.layouts import LayoutOp, Step, layout_key
from lepton_xla.passes.core.matrix import contracted_size, weight_order
from lepton_xla.passes.core.sites import Site
from lepton_xla.passes.core.targets import Target
from lepton_xla.passes.quantization.products import as_weighted
from lepton_xla.quant import FORMATS
from lepton_xla.recipe import QuantizeRule

# Platforms where XLA has fp8 products; elsewhere it would convert the operands and multiply floats.
FP8_PLATFORMS = ("gpu",)
# Platforms where XLA has no integer convolution (on an H200, jaxlib 0.11.2, one raises UNIMPLEMENTED).
NO_INTEGER_CONVOLUTION = ("gpu",)


def not_float(dtype: Any) -> str:
    """Why a weight of a non-float dtype cannot be quantized."""
    return (
        f"its weight is {dtype} already" if jnp.issubdtype(dtype, jnp.integer) else f"its weight is {dtype}, no float"
    )


def unsupported(site: Site, rule: QuantizeRule | None = None) -> str | None:
    """Why the site cannot be quantized (by this rule), or None if it can."""
    if site.weight_operand is None:
        return _unpaired(site, rule)
    if site.kind == "conv_general_dilated":
        if site.weight_operand != 1:
            return "convolution whose weight is the left operand"
        if site.params["batch_group_count"] != 1:
            return "convolution with batch groups"
    elif site.kind not in ("dot_general", "gather"):
        return f"{site.kind} is not lowered"
    if site.not_float:  # rounding it again, or scaling it, would lose information
        return not_float(site.not_float)
    if 0 in site.weight.shape:
        return f"its weight, of shape {list(site.weight.shape)}, has no elements"
    if site.kind != "gather" and not jnp.issubdtype(site.activation.dtype, jnp.floating):
        return f"its activation is {site.activation.dtype}"
    if rule is not None and rule.group and contracted_size(site) % rule.group:
        return (
            f"granularity = 'group:{rule.group}' does not divide the {contracted_size(site)} rows that it sums over; "
            f"'group:~{rule.group}' takes the nearest size that does"
        )
    return None


def _unpaired(site: Site, rule: QuantizeRule | None) -> str | None:
    """Why a product of two activations cannot be quantized (by this rule), or None if it can."""
    what = f"{site.kind} of two activations"
    if site.made is not None:
        made = site.why_made or f"computed on each call from {', '.join(site.made.weights) or 'constants'}"
        what = f"{site.kind} of an activation and what is {made}"
    if site.kind != "dot_general" or rule is None:
        return what
    for operand in site.operands:
        if not jnp.issubdtype(operand.dtype, jnp.floating):
            return f"{what}, one of them {operand.dtype}"
    if rule.products != "all":
        return f"{what}, which products = {rule.products!r} leaves float"
    return f"{what}, which activations = 'none' leaves float" if rule.activations == "none" else None


def float_reason(site: Site, rule: QuantizeRule, target: Target) -> str:
    """Why a quantizable site must be multiplied in float; empty if it has a product of codes."""
    if rule.activations == "none":
        return ""
    small = "so it stays float" if site.weight_operand is None else "so only the weight is stored small"
    if rule.group:
        return f"groups have no product of codes, {small}"
    if FORMATS[rule.weights].kind == "int":
        if site.kind == "conv_general_dilated" and target.platform in NO_INTEGER_CONVOLUTION:
            return f"the platform {target.platform!r} has no convolution of integers, {small}"
        depth = contracted_size(as_weighted(site))
        largest = FORMATS[rule.weights].largest * FORMATS[rule.activations].largest
        if isinstance(depth, int) and depth * largest >= 2**31:  # unknown yet if it is symbolic
            return f"it sums over {depth} products, which int32 may not hold, {small}"
    if FORMATS[rule.weights].kind == "float":
        if site.kind != "dot_general":
            return f"a {site.kind} has no fp8 product, {small}"
        if target.platform not in FP8_PLATFORMS:
            return f"the platform {target.platform!r} has no fp8 product, {small}"
        if rule.weights == rule.activations == "fp8_e5m2":
            return f"no platform multiplies fp8_e5m2 by itself, {small}"
    return ""


def has_kernel(site: Site, rule: QuantizeRule, target: Target) -> bool:
    """Whether a kernel multiplies the activations of this site, as they are or in int8, by the codes of its weight."""
    if not target.has_kernels:
        return False
    if site.kind == "conv_general_dilated":
        codes = rule.weights == rule.activations == "int8" and not rule.group
        return codes and convolving.has_kernel(site.params, *site.operands)
    in_float = rule.activations == "none" and weight_only.fits(rule.weights)
    return (
        (in_float or rule.weights == rule.activations == "int8")
        and site.kind == "dot_general"
        and site.weight_operand is not None
        and not weight_order(site)[0]
        and site.params["out_sharding"] is None
    )


def unstorable(sites: Sequence[Site]) -> str | None:
    """Why the weight that these sites share cannot be stored as an integer, or None if it can."""
    first = sites[0]
    for site in sites:
        if not site.exclusive:
            return "its weight is also used where no product is"
        if _compat.is_manual(site.eqn):
            return "it is inside shard_map, where the weight is one shard"
        if any(op.resizes for op in site.layout if isinstance(op, LayoutOp)):
            return f"its weight is broadcast or cut before its use at {site.name!r}"
        if _matrix_key(site) != _matrix_key(first):
            return f"its weight is used in two layouts, at {first.name!r} and {site.name!r}"
    return None


def _matrix_key(site: Site) -> tuple[Any, ...]:
    """A key that is equal for sites of a weight with the same matrix."""
    order = weight_order(site)
    axes = list(range(len(site.weight.shape) + site.stacked))
    steps: list[int] = []
    converted: list[str] = []
    for op in site.layout:
        if isinstance(op, Step):
            steps.append(axes.pop(0))
        elif op.eqn.primitive.name == "transpose":
            axes = [axes[axis] for axis in op.eqn.params["permutation"]]
        elif op.eqn.primitive.name == "convert_element_type":
            converted.append(str(op.eqn.params["new_dtype"]))
        else:
            return (layout_key(site.layout), order)
    return (steps, converted, *([axes[axis] for axis in part] for part in order))
