"""Physical removal of channels, hidden units and heads: the same model with smaller weights, from any jaxpr.

What belongs together is found by `groups`, what matters least by `importance`. The new function traces the old one at
the old shapes and evaluates its jaxpr on the smaller weights, with every shape in its equations' parameters adapted; it
equals the old model with all weights of the removed units set to zero. After DepGraph (Fang et al. 2023,
arXiv:2301.12900).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lepton_xla import _compat
from lepton_xla.errors import RecipeError, UnsupportedError
from lepton_xla.passes.cost import cost
from lepton_xla.passes.dependencies import Study, inside
from lepton_xla.passes.dimensions import Dimension, Kept, leaves, mask_of, units_of
from lepton_xla.passes.groups import Group, Groups, find_groups
from lepton_xla.passes.importance import Batches, Importance, Loss, importance_scores
from lepton_xla.passes.measure import time_programs
from lepton_xla.passes.rewrite import Context, Rule, Values, materialize, rewrite
from lepton_xla.program import Program, abstract, probe_sizes
from lepton_xla.report import PassReport, SiteReport

type Masks = dict[str, tuple[np.ndarray | None, ...]]
"""Weight path -> for each axis, which positions stay, bool `[*steps, size]`; None where all do."""

# A search for a target halves the range of possible sparsities this often.
SEARCH_STEPS = 12
# Each step of a search for a latency compiles and times the model.
LATENCY_SEARCH_STEPS = 7


def shrink(
    program: Program,
    *,
    sparsity: float | None = None,
    flops: float | None = None,
    bytes: float | None = None,
    latency_ms: float | None = None,
    importance: Importance = "l2",
    scope: Literal["local", "global"] = "local",
    round_to: int = 1,
    protect: Sequence[str] = (),
    calibration: Batches | None = None,
    loss: Loss | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Program:
    """Removes the channels, hidden units and heads that matter least.

    Give one of `sparsity`, `flops`, `bytes` and `latency_ms`. At least one unit of each group stays.

    Args:
        program: a program with float weights, before pruning masks or quantization are of use.
        sparsity: share of units to remove, in [0, 1): of each group (`scope = "local"`), or of all units together.
        flops: the share of floating-point operations to reach, in (0, 1], as `cost` counts them.
        bytes: the share of the weights' bytes to reach, in (0, 1].
        latency_ms: the measured median time of one call to reach, in milliseconds.
        importance: how units are ranked; see `importance_scores`.
        scope: `local`: every group loses the same share; `global`: all groups' normalized scores are ranked together.
        round_to: what stays of each group is a multiple of this where the group has as many.
        protect: regular expressions: groups whose name, or the path or `path[axis]` of a member, one matches as a
            whole lose nothing.
        calibration: batches for `importance = "activation"` or `"taylor"`.
        loss: for `"taylor"`: `loss(weights, batch) -> scalar`.
        sizes: sizes of the symbolic dimensions at which operations are counted and calls are timed.

    Returns:
        A program of the same inputs and outputs with smaller weights, equal to the program with all weights of the
        removed units set to zero. Masks are cut likewise.

    Raises:
        RecipeError: if an argument is out of range, a pattern matches nothing, or the target cannot be reached; the
            message says what can be, and which groups stand in the way.
        CalibrationError: if data or the loss are missing.
        UnsupportedError: if a weight is quantized.
    """
    start = time.perf_counter()
    check_target(sparsity, flops, bytes, latency_ms, round_to)
    chosen = dict(sizes) if sizes is not None else probe_sizes(program.fn, program.weights, program.inputs)[0]
    groups = find_groups(program, sizes=chosen).protecting([protect] if isinstance(protect, str) else protect)
    scores = importance_scores(program, groups, importance, calibration=calibration, loss=loss)
    ranking = Ranking(groups, scores, scope, round_to)
    before = cost(program, chosen)
    if sparsity is not None:
        counts = ranking.at_sparsity(sparsity)
    else:
        counts = _search(program, ranking, chosen, flops=flops, size=bytes, latency_ms=latency_ms)
    small = remove(program, groups, ranking.keep(counts))
    after = cost(small, chosen)
    reports = tuple(_report(group, counts.get(group.name, group.units)) for group in groups)
    metrics = {
        "importance": importance,
        "scope": scope,
        "flops_before": before.flops,
        "flops_after": after.flops,
        "weights_bytes_before": program.weights_bytes,
        "weights_bytes_after": small.weights_bytes,
    }
    report = PassReport("shrink", time.perf_counter() - start, reports, metrics)
    return small.replace(history=(*program.history, report))


def check_target(
    sparsity: float | None, flops: float | None, size: float | None, latency_ms: float | None, round_to: int
) -> None:
    """Refuses what `shrink` cannot aim at.

    Raises:
        RecipeError: unless exactly one target is given, and it and `round_to` are in range.
    """
    targets = {"sparsity": sparsity, "flops": flops, "bytes": size, "latency_ms": latency_ms}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise RecipeError(f"shrink takes one of {', '.join(targets)}; {' and '.join(given) or 'none'} given")
    ((name, value),) = given.items()
    allowed = {"sparsity": 0 <= value < 1, "latency_ms": value > 0}.get(name, 0 < value <= 1)
    if not allowed:
        ranges = {"sparsity": "[0, 1): at least one unit of each group stays", "latency_ms": "(0, inf)"}
        raise RecipeError(f"shrink: {name} = {value} is not in {ranges.get(name, '(0, 1]')}")
    if round_to < 1:
        raise RecipeError(f"shrink: round_to = {round_to} is not at least 1")


def _report(group: Group, kept: int) -> SiteReport:
    if group.protected:
        return SiteReport(group.name, f"kept {group.units} {group.kind}", group.protected)
    metrics = {"units": group.units, "kept": kept, "members": list(group.members)}
    return SiteReport(group.name, f"{group.units} -> {kept} {group.kind}", metrics=metrics)


class Ranking:
    """Units in the order in which they go.

    Attributes:
        every: all groups.
        groups: those that may lose units.
        scores: group name -> `[*steps, units]`.
    """

    def __init__(self, groups: Groups, scores: Mapping[str, np.ndarray], scope: str, round_to: int) -> None:
        self.every = groups
        self.groups = groups.removable
        self.scores = scores
        self._round_to = round_to
        # Each step of a scan loses as many units: what counts is the mean score of those that go at the same time.
        ordered = {g.name: np.sort(scores[g.name], -1).reshape(-1, g.units).mean(0) for g in self.groups}
        weight = {g.name: math.prod(g.steps) for g in self.groups}
        # The last unit of each group is no candidate.
        pool = sorted((score, g.name) for g in self.groups for score in ordered[g.name][:-1])
        self._order = [name for _, name in pool] if scope == "global" else None
        self._weight = weight
        self._total = sum(g.units * weight[g.name] for g in self.groups)

    def at_sparsity(self, sparsity: float) -> dict[str, int]:
        """Group name -> how many units stay where this share is removed.

        Raises:
            RecipeError: if it takes more units than there are, one of each group left.
        """
        if self._order is None:
            return self._local(sparsity)
        remove = math.floor(sparsity * self._total + 1e-9)
        most = sum(self._weight[name] for name in self._order)
        if remove > most:
            raise RecipeError(
                f"shrink: sparsity = {sparsity} takes {remove} of {self._total} units, but only {most} can go: one "
                f"unit of each group stays"
            )
        lost = 0
        for end, name in enumerate(self._order):
            if lost + self._weight[name] > remove:
                return self._after(self._order[:end])
            lost += self._weight[name]
        return self._after(self._order)

    def at_level(self, level: float) -> dict[str, int]:
        """The same, for a level between 0, where all stay, and 1, where as many go as can."""
        if self._order is None:
            return self._local(level)
        return self._after(self._order[: math.floor(level * len(self._order) + 1e-9)])

    def _local(self, share: float) -> dict[str, int]:
        return {g.name: self._rounded(g, g.units - math.floor(share * g.units + 1e-9)) for g in self.groups}

    def _after(self, gone: Sequence[str]) -> dict[str, int]:
        lost = {group.name: 0 for group in self.groups}
        for name in gone:
            lost[name] += 1
        return {group.name: self._rounded(group, group.units - lost[group.name]) for group in self.groups}

    def _rounded(self, group: Group, kept: int) -> int:
        multiple = self._round_to // math.gcd(self._round_to, group.inner)
        return min(group.units, max(1, math.ceil(kept / multiple)) * multiple)

    def keep(self, counts: Mapping[str, int]) -> Kept:
        """Which units stay: those with the largest scores; of equal ones, the first."""
        kept: dict[Dimension, np.ndarray] = {}
        for group in self.groups:
            if counts[group.name] < group.units:
                order = np.argsort(-self.scores[group.name], axis=-1, kind="stable")
                mask = np.zeros(order.shape, bool)
                np.put_along_axis(mask, order[..., : counts[group.name]], True, -1)
                kept[group.leaf] = mask
        return kept


def _search(
    program: Program,
    ranking: Ranking,
    sizes: Mapping[str, int],
    *,
    flops: float | None,
    size: float | None,
    latency_ms: float | None,
) -> dict[str, int]:
    """The fewest units removed with which a target is reached, as far as bisection finds them."""
    before = cost(program, sizes)

    def value(counts: Mapping[str, int]) -> float:
        kept = ranking.keep(counts)
        if latency_ms is not None:
            small = remove(program, ranking.every, kept)
            return time_programs([(small.fn, small.weights)], small.abstract_inputs(sizes))[0] / 1000
        after = cost(remove(program, ranking.every, kept, shapes_only=True), sizes)
        return after.flops / before.flops if flops is not None else after.weights_bytes / before.weights_bytes

    name, target = next(
        (name, given)
        for name, given in (("flops", flops), ("bytes", size), ("latency_ms", latency_ms))
        if given is not None
    )
    low, high = 0.0, 1.0
    if value(ranking.at_level(0.0)) <= target:
        return ranking.at_level(0.0)
    least = value(ranking.at_level(1.0))
    if least > target:
        raise RecipeError(_unreachable(name, target, least, ranking.every))
    for _ in range(LATENCY_SEARCH_STEPS if latency_ms is not None else SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if value(ranking.at_level(middle)) <= target else (middle, high)
    return ranking.at_level(high)


def _unreachable(name: str, target: float, least: float, groups: Groups) -> str:
    standing = sorted((group for group in groups if group.protected), key=lambda group: -group.unit_bytes * group.units)
    names = "; ".join(f"{group.name!r}: {group.protected}" for group in standing[:6])
    more = f"; and {len(standing) - 6} more" if len(standing) > 6 else ""
    return (
        f"shrink: {name} = {target:g} cannot be reached; the least is {least:.3g}, one unit (or round_to) of each "
        f"group left. Protected groups: {names or 'none'}{more}"
    )


# Application: the program on smaller weights.


def remove(program: Program, groups: Groups, kept: Kept, *, shapes_only: bool = False) -> Program:
    """The program without the units that a mask leaves out.

    Args:
        program: the program.
        groups: its groups.
        kept: leaf of a group -> which of its units stay, bool `[*steps, units]`.
        shapes_only: gives shapes and dtypes in the place of the weights.
    """
    masks: Masks = {}
    for path, axes in groups.study.weights.items():
        cut = tuple(
            mask_of(dimension, kept) if any(leaf in kept for leaf in leaves(dimension)) else None for dimension in axes
        )
        if any(mask is not None for mask in cut):
            masks[path] = cut
    cut = _cut_shape if shapes_only else _cut
    weights = {path: cut(w, masks[path]) if path in masks else w for path, w in program.weights.items()}
    cut_masks = {path: _cut(mask, masks[path]) if path in masks else mask for path, mask in program.masks.items()}
    fn = on_smaller_weights(program.fn, abstract(program.weights), masks, list(program.inputs))
    return program.replace(fn=fn, weights=weights, masks=cut_masks)


def _cut(weight: Any, masks: Sequence[np.ndarray | None]) -> jax.Array:
    """The slices of an array that stay; taken on the host, since each new shape would be compiled on a device."""
    library: Any = jnp if isinstance(weight, Tracer) else np
    cut = weight if library is jnp else np.asarray(weight)
    for axis, mask in enumerate(masks):
        if mask is None:
            continue
        flat = mask.reshape(-1, mask.shape[mask.ndim - 1])
        indices = np.stack([np.flatnonzero(row) for row in flat])
        if mask.ndim == 1:
            cut = library.take(cut, indices[0], axis=axis)
        else:
            shape = [*mask.shape[:-1], *([1] * (cut.ndim - mask.ndim + 1))]
            shape[axis] = indices.shape[1]
            cut = library.take_along_axis(cut, indices.reshape(shape), axis=axis)
    return jnp.asarray(cut)


def _cut_shape(weight: Any, masks: Sequence[np.ndarray | None]) -> jax.ShapeDtypeStruct:
    shape = [
        size if mask is None else int(np.count_nonzero(mask)) // math.prod(mask.shape[:-1])
        for size, mask in zip(weight.shape, masks, strict=True)
    ]
    return jax.ShapeDtypeStruct(tuple(shape), weight.dtype)


def on_smaller_weights(
    fn: Callable[..., Any], like: Mapping[str, Any], masks: Masks, inputs: Sequence[str]
) -> Callable[..., Any]:
    """`fn(weights, *inputs)` for weights without the slices that the masks leave out.

    Args:
        fn: the function.
        like: shapes and dtypes of the weights it was written for.
        masks: what stays of them.
        inputs: names of the inputs.

    Returns:
        A function that traces `fn` at the old shapes whenever it is traced itself: pure, of any sizes of the inputs,
        and as differentiable as `fn`.
    """

    def rules(closed: Any) -> dict[str, Rule]:
        study = Study(closed, like, inputs)
        kept = _transferred(study, masks)

        def adapt(context: Context, eqn: Any, values: Values) -> Values | None:
            change = study.changes.get(context.key)
            constants = [index for index in range(len(values)) if (context.key, index) in study.constants]
            if change is None and not constants:
                return None
            operands = [materialize(value) for value in values]
            for index in constants:
                cut = [mask_of(d, kept) if _loses(d, kept) else None for d in study.constants[context.key, index]]
                operands[index] = _cut_constant(operands[index], cut)
            return _compat.bind(eqn, operands, **(change(kept) if change is not None else {}))

        def in_place(context: Context, eqn: Any, values: Values) -> Values:
            jaxpr = eqn.params.get("call_jaxpr") or eqn.params.get("jaxpr")
            return context.walk.call(jaxpr, values, inside(context, eqn))[0]

        return {"*": adapt, "custom_jvp_call": in_place, "custom_vjp_call": in_place}

    return rewrite(fn, rules, on_unknown="keep", example=lambda _weights, *args: (like, *args))


def _loses(dimension: Dimension, kept: Kept) -> bool:
    return any(leaf in kept for leaf in leaves(dimension))


def _cut_constant(constant: Any, masks: Sequence[np.ndarray | None]) -> jax.Array:
    """A constant without the slices of removed units; where these differ by step, it is the same along that axis."""
    return _cut(
        constant, [mask.reshape(-1, mask.shape[mask.ndim - 1])[0] if mask is not None else None for mask in masks]
    )


def _transferred(study: Study, masks: Masks) -> Kept:
    """What masks of weights say of the leaves of another study of the same function, at other sizes of its inputs.

    Raises:
        UnsupportedError: if the function depends on what was removed at these sizes.
    """
    kept: dict[Dimension, np.ndarray] = {}
    for path, cut in masks.items():
        for dimension, mask in zip(study.weights[path], cut, strict=True):
            for leaf in leaves(dimension) if mask is not None else ():
                assert mask is not None
                positions = units_of(dimension, leaf)[:, None] == np.arange(leaf.size)[None, :]
                stays = mask.astype(np.int64) @ positions.astype(np.int64) > 0
                if not stays.all():
                    kept[leaf] = stays if len(leaf.scans or ()) else stays.reshape(-1, leaf.size)[0]
    for path, axes in study.weights.items():
        cut = masks.get(path, (None,) * len(axes))
        for axis, (dimension, mask) in enumerate(zip(axes, cut, strict=True)):
            whole = np.ones(dimension.size, bool) if mask is None else mask
            blocked = next((leaf.reason for leaf in leaves(dimension) if leaf in kept and leaf.reason), "")
            if blocked or np.any(mask_of(dimension, kept) != whole):
                raise UnsupportedError(
                    f"the program was shrunk at other sizes of its inputs; at these, {path}[{axis}] cannot lose what "
                    f"was removed: {blocked or 'it is tied to other units'}. Protect it when shrinking"
                )
    return kept
