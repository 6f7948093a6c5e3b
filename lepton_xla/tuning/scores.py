"""Scores: how much each choice for each group changes the outputs, all from one pass over the data.

At every site the program computes its product, and by how much each choice would change it. The changes enter the
program times a factor that is zero, so the gradient of the outputs with respect to the factors says how each change
alone would move them, to first order. Gradients of outputs times random signs give the squared norm of that movement
without bias (Hutchinson 1989): nothing is needed but inputs, no labels and no loss.
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
from lepton_xla.passes.core.names import Key
from lepton_xla.passes.core.plans import Plan
from lepton_xla.passes.core.sites import Site, operand_value, rewrite_sites, step_lengths, stored_like
from lepton_xla.passes.core.walker import Context, Values
from lepton_xla.program import Program
from lepton_xla.trees import name_leaves
from lepton_xla.tuning.choices import Choice, Group
from lepton_xla.tuning.sensitivities import rounded_alone

# Random signs that the outputs of each batch are multiplied by.
PROBES = 16
_FACTORS = "factors"


def output_errors(
    program: Program,
    groups: Sequence[Group],
    plans: Mapping[str, Plan],
    batches: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[np.ndarray]:
    """Estimate the squared relative error of the outputs that each choice for each group makes alone.

    Args:
        program: the program of the groups.
        groups: from `find_groups`.
        plans: from `find_groups`.
        batches: input dicts.
        seed: of the random signs.
        progress: called as each batch begins.

    Returns:
        For each group, float64 [choices]: `|changed outputs - outputs|^2 / |outputs|^2`; errors of several groups add
        up, to first order.

    Raises:
        TuningError: if the program cannot be differentiated.
        ModelError: if it has no float outputs, or they are not finite.
        CalibrationError: if a batch does not fit the program.

    >>> from lepton_xla.tuning.choices import CHOICES, find_groups
    >>> x = lx.TensorSpec(("batch", 4), "float32")
    >>> weight = jnp.arange(16.0).reshape(4, 4)
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": weight}, {"x": x})
    >>> groups, plans = find_groups(program, CHOICES[:3])
    >>> (errors,) = output_errors(program, groups, plans, [{"x": np.ones((8, 4), np.float32)}])
    >>> bool(errors[0] == 0), bool(0 < errors[1] < 1e-4)  # float, int8
    (True, True)
    """
    say = progress or (lambda _what, _done, _total: None)
    if not any(jnp.issubdtype(jnp.dtype(spec.dtype), jnp.floating) for spec in program.outputs.values()):
        raise ModelError(f"the model has no float output to measure an error of: {', '.join(program.outputs)}")
    own = [[(choice, plans[choice.name]) for choice in group.choices] for group in groups]
    run = jax.jit(functools.partial(_squares, program, groups, own))
    totals = [np.zeros(len(group.choices)) for group in groups]
    size = 0.0
    for number, batch in enumerate(batches):
        say("score every choice at every site", number, len(batches))
        inputs = check_batch(program, batch, f"calibration batch {number}")
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), PROBES)
        try:
            moved, norm = jax.device_get(run(program.weights, keys, *inputs))
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
    own: Sequence[Sequence[tuple[Choice, Plan]]],
    weights: Any,
    keys: jax.Array,
    *inputs: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
    """Squared norms of what each choice moves the outputs by, and of the outputs."""
    group_of = {name: index for index, group in enumerate(groups) for name in group.sites}

    def changed(factors: Sequence[jax.Array]) -> list[jax.Array]:
        side_inputs: dict[str, dict[Key, jax.Array]] = {}
        for site in next(iter(own[0]))[1].sites if own else ():
            name, path = site.site.name, site.site.path
            if path is None or name not in group_of:
                continue
            factor = factors[group_of[name]]
            steps = step_lengths(site.site, stored_like(site.site, program.weights).shape)
            side_inputs.setdefault(path, {})[name, _FACTORS] = jnp.broadcast_to(factor, (*steps, *factor.shape))

        def rule(site: Site, context: Context, eqn: Any, values: Values) -> Values | None:
            if site.name not in group_of or site.weight_operand is None:
                return None
            factor = values[site.weight_operand].side_inputs[site.name, _FACTORS]
            return [_with_changes(site, context, eqn, values, own[group_of[site.name]], factor)]

        run = rewrite_sites(program.fn, rule, inline=True, on_unknown="keep", side_inputs=side_inputs)
        outputs = name_leaves(run(weights, *inputs), single="output").values()
        return [each.astype(jnp.float32) for each in outputs if jnp.issubdtype(each.dtype, jnp.floating)]

    outputs, pull = jax.vjp(changed, [jnp.zeros(len(each), jnp.float32) for each in own])

    def moved(key: jax.Array) -> list[jax.Array]:
        signs = [
            jax.random.rademacher(jax.random.fold_in(key, index), each.shape, jnp.float32)
            for index, each in enumerate(outputs)
        ]
        (gradients,) = pull(signs)
        return [gradient**2 for gradient in gradients]

    squares = [each.mean(0) for each in jax.lax.map(moved, keys)]
    return squares, sum((jnp.sum(each**2) for each in outputs), jnp.float32(0))


def _with_changes(
    site: Site,
    context: Context,
    eqn: Any,
    values: Values,
    own: Sequence[tuple[Choice, Plan]],
    factors: jax.Array,
) -> jax.Array:
    """The product of a site, plus each choice's change of it times its factor."""
    side = site.weight_operand
    assert side is not None
    operands = [operand_value(value) for value in values]
    (exact,) = context.bind(eqn, operands)
    held = [jax.lax.stop_gradient(operand) for operand in operands]
    out = exact
    for index, (choice, plan) in enumerate(own):
        planned = plan[site.name]
        if planned is None or (planned.quantize is None and not choice.sparsity):
            continue
        weight = _pruned(held[side], choice.sparsity) if choice.sparsity else held[side]
        given = [*held[:side], weight, *held[side + 1 :]]
        (other,) = rounded_alone(planned, site, context, eqn)(*given) if planned.quantize else context.bind(eqn, given)
        change = jax.lax.stop_gradient(other.astype(exact.dtype) - exact)
        out = out + factors[index].astype(exact.dtype) * change
    return out


def _pruned(weight: jax.Array, sparsity: float) -> jax.Array:
    """A weight without its smallest elements."""
    sizes = jnp.abs(weight.astype(jnp.float32))
    count = int(sparsity * weight.size)
    smallest = jnp.sort(sizes.reshape(-1))[count]
    return jnp.where(sizes >= smallest, weight, jnp.zeros_like(weight))
