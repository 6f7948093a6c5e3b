"""Decides which units a loss and its program lose."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.errors import UnsupportedError
from lepton_xla.passes.shrinking.dependencies import Study
from lepton_xla.passes.shrinking.dimensions import leaves
from lepton_xla.passes.shrinking.groups import Groups, Masks, find_groups, masks_of, transferred
from lepton_xla.passes.shrinking.removal import shrink_groups
from lepton_xla.program import Program
from lepton_xla.report import PassReport
from lepton_xla.train.compression.losses import Changes, joined, split
from lepton_xla.trees import abstract


def decide_cuts(
    program: Program,
    loss: Callable[..., Any],
    changes: Changes,
    options: Mapping[str, Any],
    batches: Sequence[Mapping[str, Any]],
    key: Any,
) -> tuple[Masks, PassReport]:
    """Decide which slices of the weights stay.

    Args:
        program: the inference program, with the weights of now.
        loss: the user's loss.
        changes: shapes of all weights of the loss, and which of them are model state.
        options: arguments of `passes.shrink`.
        batches: batches of the loss, for importances that need data; the first gives the shapes.
        key: a key of the loss.

    Returns:
        Masks of the weights of the program and of the loss, and the report of `shrink`.

    Raises:
        RecipeError, CalibrationError: as `passes.shrink`.
        UnsupportedError: if groups that may lose units in the loss one by one may not do so together.
    """
    study = study_loss(loss, changes, batches[0], key)
    given = dict(options)
    patterns = given.pop("protect", ())
    groups = find_groups(program, sizes=given.get("sizes"))
    read = _weights_read(groups.study)
    groups = protect_by_loss(groups.protecting([patterns] if isinstance(patterns, str) else patterns), study)
    if given.get("importance") == "taylor":
        # Weights of the loss alone are as at the beginning, which is enough to rank by.
        own = {path: leaf for path, leaf in getattr(loss, "extra_weights", {}).items() if path in changes.like}
        given |= {"loss": _ranking(loss, changes.state, own, key), "calibration": batches}
    elif given.get("importance") == "activation":
        given["calibration"] = [{name: batch[name] for name in program.inputs if name in batch} for batch in batches]
    small, kept = shrink_groups(program, groups, **given)
    in_loss, refusal = transferred(study, masks_of(groups.study, kept), read)
    if refusal:
        raise UnsupportedError(f"the loss cannot lose what its program may: {refusal}. Name it under protect")
    return masks_of(study, in_loss), small.history[-1]


def study_loss(loss: Callable[..., Any], changes: Changes, batch: Any, key: Any) -> Study:
    """Find which axes of weights and state depend on each other in a loss."""
    like = dict(changes.like)
    steps = (jax.ShapeDtypeStruct((), jnp.int32),) if takes_step(loss) else ()

    def run(every: Any, arrays: Any, batch: Any, key: Any, *step: Any) -> Any:
        bound: Any = loss if arrays is None else getattr(loss, "bind")(arrays)  # noqa: B009
        return joined(bound, changes.state)(every, batch, key, *step)

    # A teacher's weights are arguments here too: as constants they would be read and compared.
    arrays = abstract(getattr(loss, "arrays", None))
    closed = jax.make_jaxpr(run)(like, arrays, _shapes(batch), key, *steps)
    return Study(closed, like, ("batch",), returned=sorted(changes.state), redrawn=True)


def protect_by_loss(groups: Groups, study: Study) -> Groups:
    """Protect the groups of a program that may not lose units in a loss.

    Args:
        groups: the program's groups.
        study: of the loss, whose weights include the program's.
    """
    reasons: dict[str, str] = {}
    read = _weights_read(groups.study)
    for group in groups.removable:
        first = np.arange(group.units) == 0
        for stays in (first, ~first):  # every unit is removed in one of the two, and never all of them
            if not stays.any() or group.name in reasons:
                continue
            masks = masks_of(groups.study, {group.leaf: np.broadcast_to(stays, (*group.steps, group.units))})
            refusal = transferred(study, masks, read)[1]
            if refusal:
                reasons[group.name] = f"in the loss, {refusal}"
    return groups.without(reasons)


def _weights_read(study: Study) -> set[str]:
    """Weights that a program reads. Others, such as a state that only training uses, lose what the loss takes away."""
    return {
        path
        for path, axes in study.weights.items()
        if any(leaf.scans is not None or leaf.reason for axis in axes for leaf in leaves(axis))
    }


def takes_step(loss: Callable[..., Any]) -> bool:
    """Whether a loss has a parameter `step`."""
    return "step" in inspect.signature(loss).parameters


def _ranking(
    loss: Callable[..., Any], state: frozenset[str], own: Mapping[str, Any], key: Any
) -> Callable[[Any, Mapping[str, Any]], jax.Array]:
    def ranking(every: Mapping[str, Any], batch: Mapping[str, Any]) -> jax.Array:
        weights, before = split(every, state)
        steps = {"step": jnp.zeros((), jnp.int32)} if takes_step(loss) else {}
        return loss({**weights, **own}, batch, key, before, **steps)[0]

    return ranking


def _shapes(batch: Any) -> Any:
    """Shapes of a batch as JAX sees it: NumPy's 64-bit ids and labels are 32-bit."""

    def shape(leaf: Any) -> Any:
        array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))

    return jax.tree.map(shape, batch)
