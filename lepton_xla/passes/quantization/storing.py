"""Storing: a planned weight as codes, and what its channels and ranges must be."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.derivations import Step
from lepton_xla.errors import CalibrationError, ModelError
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.alike import Alike
from lepton_xla.passes.core.layouts import lay_out
from lepton_xla.passes.core.sites import Site
from lepton_xla.passes.core.spreading import over_columns
from lepton_xla.passes.quantization import products
from lepton_xla.passes.quantization.rounding import is_finite
from lepton_xla.quant import FORMATS, QTensor
from lepton_xla.recipe import QuantizeRule


@dataclasses.dataclass(frozen=True)
class PlannedSite:
    """A site to quantize, and its rule."""

    site: Site
    rule: QuantizeRule


def store_weight(planned: PlannedSite, weight: jax.Array, given: Mapping[str, jax.Array], multiplied: bool) -> QTensor:
    """Quantize a stored weight, including stacked axes, in the layout of its site; codes are laid out for the product.

    Raises:
        ModelError: if the weight, or a given scale, is not finite.
    """
    site = planned.site
    grid = {name: array for name, array in given.items() if name != "activation"}
    for what, array in (("it", weight), *((f"its {name}", array) for name, array in grid.items())):
        if not is_finite(array):
            raise ModelError(f"weight {site.path!r} cannot be quantized: {what} holds NaN or infinity")
    # Rows whose codes share a byte, a group or learned levels belong together; others keep their place if they can.
    target = FORMATS[planned.rule.weights]
    together = target.bits < 8 or target.learned or planned.rule.granularity.startswith("group")
    weight = over_columns(site, weight, always=together)
    return quantize_weight(weight, grid, Alike(site), planned.rule, multiplied)


def storing_step(planned: PlannedSite, given: Mapping[str, jax.Array], multiplied: bool) -> Step:
    """The step that `store_weight` is, on one device."""
    names = tuple(name for name in given if name != "activation")
    path, like, rule = str(planned.site.path), Alike(planned.site), planned.rule

    def stored(weight: jax.Array, *grid: jax.Array) -> tuple[QTensor]:
        return (quantize_weight(weight, dict(zip(names, grid, strict=True)), like, rule, multiplied),)

    return Step("quantize", (path,), (path,), stored, tuple(given[name] for name in names))


@functools.partial(jax.jit, static_argnames=("like", "rule", "multiplied"))
def quantize_weight(
    weight: jax.Array, grid: Mapping[str, jax.Array], like: Alike, rule: QuantizeRule, multiplied: bool
) -> QTensor:
    """Quantize a weight; compiled once for all weights of equal shape."""
    format_of = (rule.weights, rule.granularity)
    store = lambda step, grid: products.store(like.site, step, *format_of, grid, rule.weight_range)  # noqa: E731
    for _ in range(like.site.stacked):
        store = jax.vmap(store)
    stored = store(lay_out(weight, like.site.layout), grid)
    return products.for_product(stored) if multiplied else stored


def zero_channels(site: Site, weight: jax.Array) -> str:
    """A remark on how many output channels are all zero, which the user may not know; empty if there are none."""
    if site.kind == "gather":  # rows of a table are not channels
        return ""
    zero = np.asarray(_zeros(over_columns(site, weight, always=False), Alike(site)))
    return f"{zero.sum()} of its {zero.size} channels are all zero" if zero.any() else ""


@functools.partial(jax.jit, static_argnames="like")
def _zeros(weight: jax.Array, like: Alike) -> jax.Array:
    """Whether all of each output channel is zero: bool `[*steps, B, N]`."""
    return ~jnp.any(matrix.stored_matrix(like.site, weight) != 0, axis=-2)


def finite_range(site: Site, ranges: Mapping[str, jax.Array] | None) -> jax.Array:
    """Give the calibrated range of a site's activation.

    Raises:
        CalibrationError: if it is missing or not finite.
    """
    value = products.range_of(site, ranges)
    if not is_finite(value):
        raise CalibrationError(f"the activation range of site {site.name!r} is not finite")
    return value
