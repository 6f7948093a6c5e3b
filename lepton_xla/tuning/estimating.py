"""Estimates of what each choice does to the outputs and costs, within a share of the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lepton_xla.errors import TuningError
from lepton_xla.optimization.pipeline import plan_for
from lepton_xla.passes.core.timing import time_programs
from lepton_xla.recipe import Recipe
from lepton_xla.trees import tree_bytes
from lepton_xla.tuning.candidates import Estimates
from lepton_xla.tuning.choices import Choice, find_groups
from lepton_xla.tuning.constraints import Constraints
from lepton_xla.tuning.costs import PerGroup, bytes_of_choices, stored_weights, times_of_choices
from lepton_xla.tuning.journals import Journal
from lepton_xla.tuning.pacing import Pace
from lepton_xla.tuning.scores import output_errors
from lepton_xla.tuning.trials import Workshop


def estimated(
    shop: Workshop,
    choices: Sequence[Choice],
    constraints: Constraints,
    kept: Journal,
    *,
    seed: int,
    unpack: str,
    float_bytes: int,
    say: Callable[[str, int, int], None],
    pace: Pace,
    first: Callable[[], None],
) -> Estimates:
    """Estimate what each choice for each group does and costs; from the journal if it is there.

    Args:
        shop: builds and measures.
        choices: what each weight may become; those that there is no time to store are left out.
        constraints: bytes that no choice reaches are refused.
        kept: the journal.
        seed: of the random signs.
        unpack: as of a recipe.
        float_bytes: bytes of the float weights on disk.
        say: called with what begins.
        pace: of the search.
        first: called when bytes are counted, before anything that takes long.

    Raises:
        TuningError: if the model has no weight that could be stored otherwise, or bytes cannot be kept to.
        TimeUpError: if there is no time to estimate anything after `first`.
    """
    say("find sites", 0, 0)
    program, _ = plan_for(shop.program, Recipe(), buckets=shop.buckets)
    groups, plans = find_groups(program, choices)
    if not groups:
        raise TuningError("the model has no weight that could be stored otherwise")

    def plain(found: Sequence[np.ndarray]) -> list[list[float]]:
        return [each.tolist() for each in found]

    def scored() -> dict[str, Any]:
        stored = stored_weights(program, groups, plans, say, pace)
        own = [group.only(stored) for group in groups]
        on_disk, in_memory = bytes_of_choices(own, stored)
        if len(stored) == len(choices):
            check_reachable(on_disk, in_memory, fixed(on_disk, in_memory), constraints)
        first()
        pace.check_left()
        errors = output_errors(program, own, plans, shop.batches, stored, seed=seed, progress=say, pace=pace)
        found = {"error": plain(errors), "bytes": plain(on_disk), "memory": plain(in_memory)}
        return {"costs": found, "choices": list(stored)}

    def fixed(on_disk: PerGroup, in_memory: PerGroup) -> dict[str, float]:
        whole = {"bytes": float_bytes, "memory": tree_bytes(program.weights)}
        own = {"bytes": on_disk, "memory": in_memory}
        return {kind: each - sum(float(costs[0]) for costs in own[kind]) for kind, each in whole.items()}

    scores = kept.within("scores", pace, scored)
    groups = [group.only(scores["choices"]) for group in groups]
    arrays = {kind: [np.asarray(each, np.float64) for each in found] for kind, found in scores["costs"].items()}
    rest = fixed(arrays["bytes"], arrays["memory"])
    if len(scores["choices"]) == len(choices):
        check_reachable(arrays["bytes"], arrays["memory"], rest, constraints)
    unpacks = unpack == "measured"
    times = kept.within(
        f"times, unpack {unpack}, {len(scores['choices'])} choices",
        pace,
        lambda: [
            plain(each)
            for each in times_of_choices(
                program, groups, plans, shop.sizes, shop.timer, unpacks=unpacks, progress=say, pace=pace
            )
        ],
    )
    whole = kept.once(
        "whole program",
        lambda: [
            time_programs([(shop.program.fn, shop.program.weights)], shop.program.abstract_inputs(at), shop.timer)[0]
            for at in shop.sizes
        ],
    )
    for index, each in enumerate(times):
        arrays[f"us@{index}"] = [np.asarray(own, np.float64) for own in each]
        rest[f"us@{index}"] = whole[index]
    return Estimates(groups, arrays, {"error": 0.0, **rest})


def check_reachable(on_disk: PerGroup, in_memory: PerGroup, fixed: dict[str, float], constraints: Constraints) -> None:
    """Refuse bytes that no choice reaches: they are counted, so there is nothing to measure.

    Args:
        on_disk, in_memory: bytes of every choice, by group.
        fixed: bytes of what no choice changes, by `bytes` and `memory`.
        constraints: what is asked for.

    Raises:
        TuningError: if they cannot be kept to.

    >>> check_reachable([np.array([400.0, 100.0])], [np.array([0.0])], {"bytes": 8, "memory": 0}, Constraints(1, 100))
    Traceback (most recent call last):
    lepton_xla.errors.TuningError: max_bytes = 100 cannot be kept to: with every weight in its smallest form the ...
    """
    for kind, costs, limit, name in (
        ("bytes", on_disk, constraints.max_bytes, "max_bytes"),
        ("memory", in_memory, constraints.max_memory, "max_memory"),
    ):
        least = fixed[kind] + sum(float(each.min()) for each in costs)
        if limit is not None and limit < 0.98 * least:
            raise TuningError(
                f"{name} = {limit:,} cannot be kept to: with every weight in its smallest form the model takes "
                f"{round(least):,} bytes; allow that, or give more choices"
            )
