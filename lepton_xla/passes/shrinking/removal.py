"""Physical removal of channels, hidden units and heads from any jaxpr.

`groups` finds slices that belong together, `importance` ranks them, and `resizing` makes the function of the smaller
weights. It equals the original model with all weights of the removed units set to zero. After DepGraph (Fang et al.
2023, arXiv:2301.12900).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from lepton_xla.arguments import takes
from lepton_xla.derivations import Step
from lepton_xla.errors import RecipeError
from lepton_xla.passes.core.costs import cost
from lepton_xla.passes.core.timing import Timer, time_programs
from lepton_xla.passes.shrinking.dimensions import Dimension, Kept
from lepton_xla.passes.shrinking.groups import Group, Groups, find_groups
from lepton_xla.passes.shrinking.importance import Batches, Importance, Loss, importance_scores, unranked
from lepton_xla.passes.shrinking.resizing import remove
from lepton_xla.program import Program, probe_sizes
from lepton_xla.recipe.rules import check_target
from lepton_xla.report import PassReport, SiteReport, unchanged
from lepton_xla.trees import some_names

# Bisection steps of a search for a target.
SEARCH_STEPS = 12
# Fewer for a latency, because each step compiles and times the model.
LATENCY_SEARCH_STEPS = 7


class _UnreachableError(RecipeError):
    """A target that cannot be reached.

    Attributes:
        what: the target and the reason.
        level: how far to go instead, for `RemovalOrder.at_level`.
    """

    def __init__(self, what: str, level: float = 1.0) -> None:
        super().__init__(f"shrink: {what}")
        self.what = what
        self.level = level


@takes(program=Program, sizes=Mapping)
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
    timer: Timer | None = None,
    on_unsupported: Literal["error", "keep"] = "error",
) -> Program:
    """Remove the least important channels, hidden units and heads.

    Give exactly one of `sparsity`, `flops`, `bytes` and `latency_ms`. Every group keeps at least one unit.

    Args:
        program: a program with float weights, not yet quantized.
        sparsity: share of units to remove, in [0, 1): of each group (`scope = "local"`), or of all units together.
        flops: share of floating-point operations to keep, in (0, 1], as counted by `cost`.
        bytes: share of the weights' bytes to keep, in (0, 1].
        latency_ms: target for the measured median time of one call, in milliseconds.
        importance: how units are ranked; see `importance_scores`.
        scope: `local`: every group loses the same share; `global`: the normalized scores of all groups are ranked
            together.
        round_to: the number of units that a group keeps is a multiple of this, if the group has that many.
        protect: regular expressions for groups to keep: one must match the whole name of the group, or the path or
            `path[axis]` of a member.
        calibration: batches for `importance = "activation"` or `"taylor"`.
        loss: for `"taylor"`: `loss(weights, batch) -> scalar`.
        sizes: sizes of the symbolic dimensions at which operations are counted and calls are timed.
        timer: times calls; by default a new one for this process's device.
        on_unsupported: what to do if the target cannot be reached, or a group cannot be ranked: `error`, or `keep`:
            remove what can be removed. The report then says how far that is and what prevents more (`not_reached`, and
            the group's reason).

    Returns:
        A program with the same inputs and outputs and smaller weights, equal to the program with all weights of the
        removed units set to zero. Masks are sliced in the same way.

    Raises:
        RecipeError: if an argument is out of range or a pattern matches nothing; unless `on_unsupported` is `keep`, if
            a group cannot be ranked, or the target cannot be reached; the message says what can be, and which groups
            stand in the way.
        CalibrationError: if data or the loss are missing.
        UnsupportedError: if a weight is quantized.

    >>> weights = {"up": jnp.array([[3.0, 1.0]]), "down": jnp.ones((2, 1))}
    >>> fn = lambda w, x: jax.nn.relu(x @ w["up"]) @ w["down"]
    >>> program = lx.trace(fn, weights, {"x": lx.TensorSpec(("batch", 1), "float32")})
    >>> lx.passes.shrink(program, sparsity=0.5).weights["up"].tolist()
    [[3.0]]
    """
    check_target(sparsity, flops, bytes, latency_ms, round_to)
    if scope not in ("local", "global"):
        raise RecipeError(f"shrink: scope = {scope!r}: expected 'local' or 'global'")
    groups = find_groups(program, sizes=sizes).protecting([protect] if isinstance(protect, str) else protect)
    return shrink_groups(
        program,
        groups,
        sparsity=sparsity,
        flops=flops,
        bytes=bytes,
        latency_ms=latency_ms,
        importance=importance,
        scope=scope,
        round_to=round_to,
        calibration=calibration,
        loss=loss,
        sizes=sizes,
        timer=timer,
        on_unsupported=on_unsupported,
    )[0]


def shrink_groups(
    program: Program,
    groups: Groups,
    *,
    sparsity: float | None = None,
    flops: float | None = None,
    bytes: float | None = None,
    latency_ms: float | None = None,
    importance: Importance = "l2",
    scope: Literal["local", "global"] = "local",
    round_to: int = 1,
    calibration: Batches | None = None,
    loss: Loss | None = None,
    sizes: Mapping[str, int] | None = None,
    timer: Timer | None = None,
    on_unsupported: Literal["error", "keep"] = "error",
) -> tuple[Program, Kept]:
    """Shrink a program whose groups are known; the other arguments are those of `shrink`, which checks them.

    Returns:
        The smaller program, and which units of the groups stay.

    Raises:
        RecipeError, CalibrationError: as `shrink`.
    """
    start = time.perf_counter()
    chosen = dict(sizes) if sizes is not None else probe_sizes(program.fn, program.weights, program.inputs)[0]
    scores = importance_scores(program, groups, importance, calibration=calibration, loss=loss)
    reasons = {
        group.name: unranked(program, group, importance) for group in groups.removable if group.name not in scores
    }
    for name, why in reasons.items() if on_unsupported == "error" else ():
        raise RecipeError(
            f"shrink: group {name!r} cannot be ranked, as {why}; name it under protect, choose another importance, or "
            f"leave it with on_unsupported = 'keep'"
        )
    groups = groups.without(reasons)
    ranking = RemovalOrder(groups, scores, scope, round_to)
    before = cost(program, chosen)
    not_reached = ""
    try:
        if sparsity is not None:
            counts = ranking.at_sparsity(sparsity)
        else:
            counts = _search(program, ranking, chosen, flops=flops, size=bytes, latency_ms=latency_ms, timer=timer)
    except _UnreachableError as error:
        if on_unsupported == "error":
            raise
        counts, not_reached = ranking.at_level(error.level), error.what
    kept = ranking.keep(counts)
    small = remove(program, groups, kept)
    after = cost(small, chosen)
    reports = tuple(_report(group, counts.get(group.name, group.units), round_to) for group in groups)
    metrics = {
        "importance": importance,
        "scope": scope,
        "round_to": round_to,
        "flops_before": before.flops,
        "flops_after": after.flops,
        "weights_bytes_before": program.weights_bytes,
        "weights_bytes_after": small.weights_bytes,
    }
    metrics |= {"not_reached": not_reached} if not_reached else {}
    report = PassReport("shrink", time.perf_counter() - start, reports, metrics)
    why = "which channels are removed depends on the weights"
    derivation = program.derived(Step("shrink", gives=tuple(small.weights), reason=why))
    return small.replace(history=(*program.history, report), derivation=derivation), kept


def _report(group: Group, kept: int, round_to: int) -> SiteReport:
    if group.protected:
        return unchanged(group.name, group.protected, f"kept {group.units} {group.kind}")
    metrics = {"units": group.units, "kept": kept, "members": list(group.members)}
    reason = "its last one: something of every group stays" if kept == 1 < group.units else ""
    if kept == group.units <= rounded_to(group, round_to) > 1:
        reason = f"round_to = {round_to} leaves no fewer"
    return SiteReport(group.name, f"{group.units} -> {kept} {group.kind}", reason, metrics=metrics)


def rounded_to(group: Group, round_to: int) -> int:
    """The multiple of units to keep, so that the number of positions is a multiple of `round_to`."""
    return round_to // math.gcd(round_to, group.inner)


class RemovalOrder:
    """The order in which units are removed.

    Attributes:
        every: all groups.
        groups: the groups that may lose units.
        scores: group name -> `[*steps, units]`.
    """

    def __init__(self, groups: Groups, scores: Mapping[str, np.ndarray], scope: str, round_to: int) -> None:
        self.every = groups
        self.groups = groups.removable
        self.scores = scores
        self._round_to = round_to
        # All steps of a scan lose the same number of units, so the k-th units of all steps share their mean score.
        ordered = {g.name: np.sort(scores[g.name], -1).reshape(-1, g.units).mean(0) for g in self.groups}
        weight = {g.name: math.prod(g.steps) for g in self.groups}
        # The best unit of each group always stays.
        pool = sorted((score, g.name) for g in self.groups for score in ordered[g.name][:-1])
        self._order = [name for _, name in pool] if scope == "global" else None
        self._weight = weight
        self._total = sum(g.units * weight[g.name] for g in self.groups)

    def at_sparsity(self, sparsity: float) -> dict[str, int]:
        """Group name -> number of units to keep when this share is removed.

        Raises:
            RecipeError: if that leaves less than one unit per group.
        """
        if self._order is None:
            return self._local(sparsity)
        remove = math.floor(sparsity * self._total + 1e-9)
        most = sum(self._weight[name] for name in self._order)
        if remove > most:
            raise _UnreachableError(
                f"sparsity = {sparsity} takes {remove} of {self._total} units, but only {most} can go: one "
                f"unit of each group stays, of {some_names(f'{g.name!r} ({g.units})' for g in self.groups)}"
            )
        lost = 0
        for end, name in enumerate(self._order):
            if lost + self._weight[name] > remove:
                return self._after(self._order[:end])
            lost += self._weight[name]
        return self._after(self._order)

    def at_level(self, level: float) -> dict[str, int]:
        """The same for a level between 0 (keep all) and 1 (remove as many as possible)."""
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
        multiple = rounded_to(group, self._round_to)
        return min(group.units, max(1, math.ceil(kept / multiple)) * multiple)

    def keep(self, counts: Mapping[str, int]) -> Kept:
        """Which units stay: those with the largest scores, the first in a tie."""
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
    ranking: RemovalOrder,
    sizes: Mapping[str, int],
    *,
    flops: float | None,
    size: float | None,
    latency_ms: float | None,
    timer: Timer | None,
) -> dict[str, int]:
    """Find by bisection the fewest units to remove that reach a target."""
    before = cost(program, sizes)
    if (flops is not None and not before.flops) or (size is not None and not before.weights_bytes):
        what = "operations" if flops is not None else "bytes of weights"
        raise _UnreachableError(f"the program has no {what} to take a share of at sizes {dict(sizes)}", 0.0)

    def value(counts: Mapping[str, int]) -> float:
        kept = ranking.keep(counts)
        if latency_ms is not None:
            small = remove(program, ranking.every, kept)
            return time_programs([(small.fn, small.weights)], small.abstract_inputs(sizes), timer)[0] / 1000
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
        raise _UnreachableError(_unreachable(name, target, least, ranking.every))
    for _ in range(LATENCY_SEARCH_STEPS if latency_ms is not None else SEARCH_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if value(ranking.at_level(middle)) <= target else (middle, high)
    return ranking.at_level(high)


def _unreachable(name: str, target: float, least: float, groups: Groups) -> str:
    standing = sorted((group for group in groups if group.protected), key=lambda group: -group.unit_bytes * group.units)
    names = "; ".join(f"{group.name!r}: {group.protected}" for group in standing[:6])
    more = f"; and {len(standing) - 6} more" if len(standing) > 6 else ""
    return (
        f"{name} = {target:g} cannot be reached; the least is {least:.3g}, one unit (or round_to) of each "
        f"group left. Protected groups: {names or 'none'}{more}"
    )
