"""Scores: how much each choice for each group changes the outputs, all from one pass over the data.

Gradients of the outputs times random signs say, to first order, what any small change of a weight does to them; their
products with the changes, squared, are the squared norm of the outputs' movement without bias (Hutchinson 1989). The
changes are those of the weights as they are stored. A choice that rounds activations too changes a product instead: it
enters the program times a factor that is zero, and the gradient with respect to the factor says the same. Nothing is
needed but inputs, no labels and no loss.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.errors import ModelError, TuningError, first_line
from lepton_xla.passes.core.calibration import check_batch
from lepton_xla.passes.core.layouts import lay_out
from lepton_xla.passes.core.names import Key
from lepton_xla.passes.core.plans import Plan, SitePlan
from lepton_xla.passes.core.sites import Site, operand_value, rewrite_sites, step_lengths, stored_like
from lepton_xla.passes.core.walker import Context, Values
from lepton_xla.passes.quantization import products
from lepton_xla.program import Program
from lepton_xla.quant import QTensor
from lepton_xla.trees import name_leaves
from lepton_xla.tuning.choices import Choice, Group
from lepton_xla.tuning.pacing import SCORES, Pace
from lepton_xla.tuning.sensitivities import rounded_alone

# Random signs that the outputs of each batch are multiplied by.
PROBES = 16
_FACTORS, _CHANGE, _KEPT = "factors", "change", "kept"


def output_errors(
    program: Program,
    groups: Sequence[Group],
    plans: Mapping[str, Plan],
    batches: Sequence[Mapping[str, Any]],
    stored: Mapping[str, Mapping[str, Any]],
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    pace: Pace | None = None,
) -> list[np.ndarray]:
    """Estimate the squared relative error of the outputs that each choice for each group makes alone.

    Args:
        program: the program of the groups.
        groups: from `find_groups`.
        plans: from `find_groups`.
        batches: input dicts.
        stored: from `stored_weights`.
        seed: of the random signs.
        progress: called as each batch begins.
        pace: stops after some of the batches, or of the signs of the first, where there is no time for more.

    Returns:
        For each group, float64 [choices]: `|changed outputs - outputs|^2 / |outputs|^2`; errors of several groups add
        up, to first order.

    Raises:
        TuningError: if the program cannot be differentiated.
        ModelError: if it has no float outputs, or they are not finite.
        CalibrationError: if a batch does not fit the program.

    >>> from lepton_xla.tuning.choices import CHOICES, find_groups
    >>> from lepton_xla.tuning.costs import stored_weights
    >>> x = lx.TensorSpec(("batch", 4), "float32")
    >>> weight = jnp.arange(16.0).reshape(4, 4)
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": weight}, {"x": x})
    >>> groups, plans = find_groups(program, CHOICES[:3])
    >>> stored = stored_weights(program, groups, plans)
    >>> (errors,) = output_errors(program, groups, plans, [{"x": np.ones((8, 4), np.float32)}], stored)
    >>> bool(errors[0] == 0), bool(0 < errors[1] < 1e-4)  # float, int8
    (True, True)
    """
    say = progress or (lambda _what, _done, _total: None)
    if not any(jnp.issubdtype(jnp.dtype(spec.dtype), jnp.floating) for spec in program.outputs.values()):
        raise ModelError(f"the model has no float output to measure an error of: {', '.join(program.outputs)}")
    run = jax.jit(functools.partial(_squares, program, groups, plans))
    totals = [np.zeros(len(group.choices)) for group in groups]
    size = 0.0
    pace = pace or Pace.endless()
    until = pace.share_of_rest(SCORES)
    for number, batch in enumerate(batches):
        if number and not pace.fits("batch", until):
            pace.skip(f"scores by {len(batches) - number} of {len(batches)} batches of calibration data")
            break
        say("score every choice at every site", number, len(batches))
        inputs = check_batch(program, batch, f"calibration batch {number}")
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), PROBES)
        try:
            # One probe a call: inside a loop XLA computes convolutions on a CPU many times slower.
            probes: list[Any] = []
            with pace.step("batch"):
                for key in keys:
                    if probes and not number and not pace.fits("probe", until):
                        break
                    with pace.step("probe"):
                        probes.append(jax.device_get(run(program.weights, stored, key, *inputs)))
            moved, norm = [np.mean(each, 0) for each in zip(*(each for each, _ in probes), strict=True)], probes[0][1]
        except (ValueError, NotImplementedError, TypeError) as error:
            raise TuningError(
                f"the model cannot be scored, because JAX cannot differentiate it: {first_line(error)}"
            ) from error
        if not np.isfinite(norm):
            raise ModelError(f"the model's outputs on calibration batch {number} are not finite")
        totals = [total + np.asarray(each, np.float64) for total, each in zip(totals, moved, strict=True)]
        size += float(norm)
    # What is not finite is worse than anything that is.
    return [np.nan_to_num(total / max(size, 1e-30), nan=1e9, posinf=1e9) for total in totals]


def _squares(
    program: Program,
    groups: Sequence[Group],
    plans: Mapping[str, Plan],
    weights: Any,
    stored: Mapping[str, Mapping[str, Any]],
    key: jax.Array,
    *inputs: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
    """Squared norms of what each choice moves the outputs by, and of the outputs."""
    group_of = {name: index for index, group in enumerate(groups) for name in group.sites}
    sites = {entry.site.name: entry.site for entry in next(iter(plans.values())).sites if entry.site.name in group_of}
    exact = {name: lay_out(stored_like(site, weights), site.layout) for name, site in sites.items()}

    def planned(name: str, choice: Choice) -> SitePlan | None:
        entry = plans[choice.name][name]
        return entry if entry is not None and (entry.quantize is not None or choice.sparsity) else None

    def by_product(name: str, choice: Choice) -> bool:
        """Whether a choice changes more of a product than its weight."""
        entry = planned(name, choice)
        return entry is not None and entry.quantize is not None and entry.quantize.activations != "none"

    # What each choice changes each operand by, in half the bits: its sign and size matter, not its last digits.
    changes = {
        name: {
            index: (_operand(site, stored[choice.name][str(site.path)]) - exact[name]).astype(jnp.bfloat16)
            for index, choice in enumerate(groups[group_of[name]].choices)
            if planned(name, choice) is not None and not by_product(name, choice)
        }
        for name, site in sites.items()
    }

    # Which elements of a weight remain where a choice rounds activations and sets others to zero.
    kept = {
        name: {
            (name, f"{_KEPT} {index}"): _operand(site, stored[choice.name][str(site.path)]) != 0
            for index, choice in enumerate(groups[group_of[name]].choices)
            if choice.sparsity and by_product(name, choice)
        }
        for name, site in sites.items()
    }

    def changed(factors: Sequence[jax.Array], moves: Mapping[str, jax.Array]) -> list[jax.Array]:
        side_inputs: dict[str, dict[Key, jax.Array]] = {}
        for name, site in sites.items():
            factor = factors[group_of[name]]
            own = side_inputs.setdefault(str(site.path), {})
            own[name, _FACTORS] = jnp.broadcast_to(
                factor, (*step_lengths(site, stored_like(site, weights).shape), *factor.shape)
            )
            own[name, _CHANGE] = moves[name]
            own.update(kept[name])

        def rule(site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
            if site.name not in sites or site.weight_operand is None:
                return None
            side, given = site.weight_operand, values[site.weight_operand].side_inputs
            operands = [operand_value(value) for value in values]
            held = [jax.lax.stop_gradient(operand) for operand in operands]
            operands[side] = operands[side] + given[site.name, _CHANGE]
            (out,) = context.bind(eqn, operands)
            for index, choice in enumerate(groups[group_of[site.name]].choices):
                entry = planned(site.name, choice)
                if entry is None or not by_product(site.name, choice):
                    continue
                (plain,) = context.bind(eqn, held)
                chosen, mask = list(held), given.get((site.name, f"{_KEPT} {index}"))
                if mask is not None:
                    chosen[side] = jnp.where(mask, held[side], 0)
                (other,) = rounded_alone(entry, site, context, eqn)(*chosen)
                change = jax.lax.stop_gradient(other.astype(plain.dtype) - plain)
                out = out + given[site.name, _FACTORS][index].astype(out.dtype) * change
            return [out]

        run = rewrite_sites(program.fn, rule, inline=True, on_unknown="keep", side_inputs=side_inputs)
        outputs = name_leaves(run(weights, *inputs), single="output").values()
        return [each.astype(jnp.float32) for each in outputs if jnp.issubdtype(each.dtype, jnp.floating)]

    still = {name: jnp.zeros_like(operand) for name, operand in exact.items()}
    outputs, pull = jax.vjp(changed, [jnp.zeros(len(group.choices), jnp.float32) for group in groups], still)

    signs = [
        jax.random.rademacher(jax.random.fold_in(key, index), each.shape, jnp.float32)
        for index, each in enumerate(outputs)
    ]
    by_factor, by_operand = pull(signs)
    found = list(by_factor)
    for name, own in changes.items():
        for index, change in own.items():
            along = jnp.sum(by_operand[name].astype(jnp.float32) * change.astype(jnp.float32))
            found[group_of[name]] = found[group_of[name]].at[index].add(along)
    return [each**2 for each in found], sum((jnp.sum(each**2) for each in outputs), jnp.float32(0))


def _operand(site: Site, stored: Any) -> jax.Array:
    """The float operand that a stored weight is, stacked axes leading."""
    if not isinstance(stored, QTensor):
        return lay_out(stored, site.layout)
    restore = functools.partial(products.restore, site)
    for _ in range(site.stacked):
        restore = jax.vmap(restore)
    return restore(stored)
