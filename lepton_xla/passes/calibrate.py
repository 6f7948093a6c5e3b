"""Ranges of the activations that meet planned sites, measured on data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.errors import CalibrationError
from lepton_xla.passes.rewrite import Context, Values, materialize
from lepton_xla.passes.sites import Site, lay_out, rewrite_sites
from lepton_xla.program import Program

if TYPE_CHECKING:
    from lepton_xla.recipe import Plan, QuantizeRule


def calibrate(program: Program, plan: Plan, batches: Iterable[Mapping[str, Any]]) -> dict[str, jax.Array]:
    """Measures the range of each statically quantized site's activation.

    Args:
        program: the float program that the plan was made for.
        plan: tells the sites and how each range is taken (`absmax`, `percentile:P` of the magnitudes).
        batches: input dicts, such as `{"image": array}`; at least one. The largest range over batches counts.

    Returns:
        Site name -> float32 range, more than 0; a scalar, or one a step where a scan steps over the site's weight.

    Raises:
        CalibrationError: if there are no batches, or one has a wrong name, dtype or shape, is empty or not finite; or
            if a site is not reached, or by zeros only, so that there is no range to take.
    """
    sites = {
        planned.site.name: (planned.site, planned.quantize)
        for planned in plan.sites
        if planned.quantize is not None and needs_range(planned.quantize)
    }

    def rule(site: Site, context: Context, eqn: Any, values: Values) -> None:
        del eqn
        if site.name in sites and site.weight_operand is not None:
            activation = jnp.abs(materialize(values[1 - site.weight_operand]).astype(jnp.float32))
            percentile = sites[site.name][1].percentile
            value = jnp.max(activation) if percentile == 100 else jnp.percentile(activation, percentile)
            context.tap(site.name, values[site.weight_operand].beside[site.name] * value)

    # Which of the scans around a site step over its weight is not in a tap's shape. So a mark of the step travels with
    # the weight: zeros of the shape of all steps, with a one at this step.
    beside: dict[str, dict[str, jax.Array]] = {}
    for name, (site, _) in sites.items():
        assert site.path is not None
        beside.setdefault(site.path, {})[name] = _step_marks(program.weights[site.path], site)

    observed = jax.jit(rewrite_sites(program.fn, rule, inline=True, beside=beside, with_taps=True))
    ranges: dict[str, jax.Array] = {}
    count = 0
    for count, batch in enumerate(batches, 1):
        inputs = check_batch(program, batch, f"calibration batch {count - 1}")
        _, taps = observed(program.weights, *inputs)
        for name, value in taps.items():
            value = jnp.max(value, axis=tuple(range(value.ndim - sites[name][0].stacked)))
            ranges[name] = jnp.maximum(ranges[name], value) if name in ranges else value
    if count == 0:
        raise CalibrationError("calibration data is empty: give at least one batch, such as [{'image': array}]")
    broken = [name for name, value in ranges.items() if not bool(jnp.all(jnp.isfinite(value)))]
    if broken:
        raise CalibrationError(f"the activation of site {broken[0]!r} is not finite on the calibration data")
    for name, value in ranges.items():
        if not bool(jnp.all(value > 0)):
            raise CalibrationError(
                f"site {name!r} has no range on the calibration data: it is not reached, or by zeros only"
                f"{_some_steps(value)}; give data that reaches it, or dynamic = true"
            )
    return ranges


def _step_marks(weight: jax.Array, site: Site) -> jax.Array:
    """For each step of a stacked weight, an array of the shape of all steps that is one there and zero elsewhere."""
    steps = jax.eval_shape(lambda stored: lay_out(stored, site.layout), weight).shape[: site.stacked]
    return jnp.eye(math.prod(steps), dtype=jnp.float32).reshape((*steps, *steps))


def _some_steps(value: jax.Array) -> str:
    if value.ndim == 0:
        return ""
    steps = np.argwhere(np.asarray(value) <= 0)
    return f", at step {', '.join('/'.join(map(str, step)) for step in steps[:4].tolist())} of its scan"


def needs_range(rule: QuantizeRule) -> bool:
    """Whether a rule asks for calibration data."""
    return rule.activations != "none" and not rule.dynamic


def check_batch(program: Program, batch: Mapping[str, Any], where: str) -> Sequence[jax.Array]:
    """A batch's arrays in call order, checked against the program's inputs.

    Raises:
        CalibrationError: for a wrong name, dtype, rank or size, an empty array, or NaN or infinity.
    """
    if not isinstance(batch, Mapping):
        raise CalibrationError(f"{where} is a {type(batch).__name__}, not a dict such as {{'image': array}}")
    if set(batch) != set(program.inputs):
        raise CalibrationError(
            f"{where} has inputs {sorted(map(str, batch))}; the program takes {sorted(program.inputs)}"
        )
    sizes: dict[str, int] = {}
    arrays = []
    for name, spec in program.inputs.items():
        try:
            array = np.asarray(batch[name])
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"{where}, input {name!r} is not an array: {error}") from error
        expected = f"{where}, input {name!r}: expected {spec}, got {array.dtype}[{', '.join(map(str, array.shape))}]"
        if array.dtype.name != spec.dtype or array.ndim != len(spec.shape):
            raise CalibrationError(expected)
        for dim, size in zip(spec.shape, array.shape, strict=True):
            if size != (sizes.setdefault(dim, size) if isinstance(dim, str) else dim):
                raise CalibrationError(expected)
        if array.size == 0:
            raise CalibrationError(f"{where}, input {name!r} is empty")
        if array.dtype.kind not in "biu" and not np.isfinite(array.astype(np.float32)).all():
            raise CalibrationError(f"{where}, input {name!r} holds NaN or infinity")
        arrays.append(jnp.asarray(array))
    return arrays
