"""Importance scores of the units of a group, from weights, gradients or activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.errors import CalibrationError, RecipeError
from lepton_xla.passes.core import matrix
from lepton_xla.passes.core.sites import find_sites, step_lengths
from lepton_xla.passes.core.statistics import collect_statistics
from lepton_xla.passes.pruning.magnitude import check_finite
from lepton_xla.passes.shrinking.dimensions import Dimension, leaves, unit_sums, units_of
from lepton_xla.passes.shrinking.groups import Group, Groups
from lepton_xla.passes.shrinking.labels import Axes
from lepton_xla.program import Program
from lepton_xla.trees import some_names

if TYPE_CHECKING:
    from jaxtyping import Float64

type Importance = Literal["l1", "l2", "scale", "taylor", "activation"]
type Loss = Callable[[Any, Mapping[str, Any]], jax.Array]
"""`loss(weights, batch) -> scalar`; `weights` are the program's weights by path."""
type Batches = Iterable[Mapping[str, Any]]


@takes(program=Program, groups=Groups)
def importance_scores(
    program: Program,
    groups: Groups,
    method: Importance = "l2",
    *,
    calibration: Batches | None = None,
    loss: Loss | None = None,
) -> dict[str, Float64[np.ndarray, "*steps units"]]:
    """Score the units of every group that is not protected.

    A group's score is the mean over its weights of each weight's score, divided by its mean over the units, as in
    Torch-Pruning (Fang et al. 2023, arXiv:2301.12900); so a score of 1 is average, and groups can be ranked together.

    Args:
        program: the program.
        groups: its groups.
        method: how a weight scores a unit: `l1`, `l2`: the norm of the unit's slice, for weights with at least two axes
            (Li et al. 2017, arXiv:1608.08710); `scale`: the magnitude of the norm layer's scale (Liu et al. 2017,
            arXiv:1708.06519); `taylor`: the magnitude of the sum of weight times gradient, averaged over batches
            (Molchanov et al. 2019, arXiv:1906.10771); `activation`: the mean magnitude of the unit's activation at the
            weights that read it.
        calibration: batches: inputs by name for `activation`, whatever `loss` takes for `taylor`.
        loss: `loss(weights, batch) -> scalar`, for `taylor`.

    Returns:
        Group name -> float64 `[*steps, units]`. Groups without anything that the method can score are missing.

    Raises:
        CalibrationError: if batches, or the loss, are needed and missing.
        RecipeError: if there is no such method.
        ModelError: if a weight of a group that may lose units is not finite.

    >>> weights = {"up": jnp.array([[3.0, 1.0]]), "down": jnp.ones((2, 1))}
    >>> fn = lambda w, x: jax.nn.relu(x @ w["up"]) @ w["down"]
    >>> program = lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 1), "float32")})
    >>> lx.passes.importance_scores(program, lx.passes.find_groups(program), "l1")
    {'up[1]': array([1.25, 0.75])}
    """
    if method not in get_args(Importance.__value__):
        raise RecipeError(f"importance = {method!r}; there are {', '.join(get_args(Importance.__value__))}")
    for path in dict.fromkeys(path for group in groups.removable for path in group.paths):
        check_finite(path, program.weights[path])
    needs_data = method in ("taylor", "activation")
    batches = list(calibration) if calibration is not None and needs_data else []
    if method == "taylor" and loss is None:
        raise CalibrationError(
            "importance = 'taylor' needs a loss, loss(weights, batch) -> scalar, which no recipe holds: call "
            "lx.passes.shrink(program, importance='taylor', loss=..., calibration=...)"
        )
    if needs_data and not batches:
        raise CalibrationError(f"importance = {method!r} needs calibration data")
    if method == "activation":
        found = _activation_scores(program, groups, batches)
    elif method == "taylor":
        assert loss is not None
        found = _taylor_scores(program, groups, batches, loss)
    else:
        found = {group.name: _weight_scores(program, groups, group, method) for group in groups.removable}
    return {
        group.name: np.mean([_normalized(score) for score in found[group.name]], axis=0)
        for group in groups.removable
        if found[group.name]
    }


def unranked(program: Program, group: Group, method: str) -> str:
    """Why a group has no score."""
    dtypes = {path: program.weights[path].dtype for path in group.paths}
    if not any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes.values()):
        return f"none of its weights is of floats: {some_names(f'{path} ({dtype})' for path, dtype in dtypes.items())}"
    if method == "scale":
        return "it has no scale of a norm (fold = true takes them away)"
    return f"importance = {method!r} looks at none of its weights"


def _normalized(score: np.ndarray) -> np.ndarray:
    mean = score.mean()
    return score / mean if mean > 0 and np.isfinite(mean) else np.where(np.isfinite(score), score, np.inf)


def _weight_scores(program: Program, groups: Groups, group: Group, method: str) -> list[np.ndarray]:
    power = 2 if method == "l2" else 1
    scales = {path for dimension, path in groups.study.scales if group.leaf in leaves(dimension)}
    scores: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    for path in group.paths:
        weight = program.weights[path]
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            continue
        flat = weight.ndim - len(group.steps) == 1
        if method == "scale" and not (flat and path in scales):
            continue
        magnitudes = np.abs(np.asarray(weight, np.float64)) ** power
        found = [score ** (1 / power) for score in _per_unit(magnitudes, groups.study.weights[path], group)]
        (vectors if flat else scores).extend(found)
    return scores or vectors


def _taylor_scores(program: Program, groups: Groups, batches: Sequence[Any], loss: Loss) -> dict[str, list[np.ndarray]]:
    floats = {path: w for path, w in program.weights.items() if jnp.issubdtype(w.dtype, jnp.floating)}
    rest = {path: w for path, w in program.weights.items() if path not in floats}

    @jax.jit
    def products(weights: dict[str, Any], batch: Any) -> dict[str, jax.Array]:
        gradients = jax.grad(lambda given: _scalar(loss({**given, **rest}, batch)))(weights)
        return {path: weights[path] * gradients[path] for path in weights}

    total: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        found = {path: np.asarray(value, np.float64) for path, value in products(floats, dict(batch)).items()}
        for group in groups.removable:
            sums = [
                np.abs(score)
                for path in group.paths
                if path in found
                for score in _per_unit(found[path], groups.study.weights[path], group)
            ]
            before = total.get(group.name, [np.zeros_like(score) for score in sums])
            total[group.name] = [a + b / len(batches) for a, b in zip(before, sums, strict=True)]
    return total


def _scalar(value: Any) -> Any:
    if jnp.shape(value) != ():
        raise CalibrationError(f"importance = 'taylor': the loss is of shape {jnp.shape(value)}; it has to be a scalar")
    return value


def _activation_scores(program: Program, groups: Groups, batches: Sequence[Any]) -> dict[str, list[np.ndarray]]:
    kinds = ("dot_general", "conv_general_dilated")
    sites = [
        site
        for site in find_sites(program)
        if site.path is not None and site.kind in kinds and jnp.issubdtype(site.weight.dtype, jnp.floating)
    ]
    measured = collect_statistics(program, sites, batches)
    scores: dict[str, list[np.ndarray]] = {group.name: [] for group in groups.removable}
    for site in sites:
        path = str(site.path)
        lead = len(step_lengths(site, program.weights[path].shape))
        magnitudes = np.asarray(measured[site.name].mean_abs, np.float64)  # [*steps, B, K]
        for group in groups.removable:
            if path not in group.paths:
                continue
            for units in _unit_maps(program.weights[path].shape, groups.study.weights[path], group.leaf):
                rows = np.asarray(matrix.stored_matrix(site, jnp.asarray(units, jnp.float32)))
                rows = rows.reshape(-1, *rows.shape[lead:])[0]  # [B, K, N], the same in every step
                if np.any(rows != rows[..., :1]):
                    continue  # the weight produces these units, it does not read them
                flat = magnitudes.reshape(*magnitudes.shape[:lead], -1)
                found = unit_sums(flat, rows[..., 0].reshape(-1).astype(int), group.units)
                extra = tuple(range(len(group.steps), lead))
                scores[group.name].append(found.sum(extra) if extra else found)
    return scores


def _unit_maps(shape: Sequence[int], axes: Axes, leaf: Dimension) -> list[np.ndarray]:
    """For each axis of a weight with units of a leaf, the unit of every element."""
    maps: list[np.ndarray] = []
    for axis, dimension in enumerate(axes):
        if leaf in leaves(dimension):
            along = units_of(dimension, leaf).reshape([-1 if k == axis else 1 for k in range(len(shape))])
            maps.append(np.broadcast_to(along, shape))
    return maps


def _per_unit(values: np.ndarray, axes: Axes, group: Group) -> list[np.ndarray]:
    """Sum a weight-like array over the slices of each unit, `[*steps, units]`, for each axis with such slices."""
    steps = len(group.steps)
    sums: list[np.ndarray] = []
    for axis, dimension in enumerate(axes):
        if group.leaf in leaves(dimension):
            others = tuple(k for k in range(steps, values.ndim) if k != axis)
            sums.append(unit_sums(values.sum(others), units_of(dimension, group.leaf), group.units))
    return sums
