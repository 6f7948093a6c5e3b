"""Estimates of what each choice does to the outputs and costs, within a share of the time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from lepton_xla.tuning.operations import Operations
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
        operations, rest = Operations.of(program, shop.smallest).of_choices(own, stored)
        counted = {"bytes": on_disk, "memory": in_memory, "operations": operations}
        if len(stored) == len(choices):
            check_reachable(counted, fixed(counted, rest), constraints)
        first()
        pace.check_left()
        errors = output_errors(program, own, plans, shop.batches, stored, seed=seed, progress=say, pace=pace)
        found = {"error": plain(errors), **{kind: plain(each) for kind, each in counted.items()}}
        return {"costs": found, "other operations": rest, "choices": list(stored)}

    def fixed(own: Mapping[str, PerGroup], operations: int) -> dict[str, float]:
        whole = {"bytes": float_bytes, "memory": tree_bytes(program.weights)}
        found = {kind: each - sum(float(costs[0]) for costs in own[kind]) for kind, each in whole.items()}
        return {**found, "operations": float(operations)}

    scores = kept.within("scores", pace, scored)
    groups = [group.only(scores["choices"]) for group in groups]
    arrays = {kind: [np.asarray(each, np.float64) for each in found] for kind, found in scores["costs"].items()}
    rest = fixed(arrays, scores["other operations"])
    if len(scores["choices"]) == len(choices):
        check_reachable(arrays, rest, constraints)
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


def check_reachable(counted: Mapping[str, PerGroup], fixed: Mapping[str, float], constraints: Constraints) -> None:
    """Refuse bytes and operations that no choice reaches: they are counted, so there is nothing to measure.

    Args:
        counted: `bytes`, `memory` and `operations` -> those of every choice, by group.
        fixed: those of what no choice changes.
        constraints: what is asked for.

    Raises:
        TuningError: if they cannot be kept to.

    >>> counted = {"bytes": [np.array([400.0, 100.0])]}
    >>> check_reachable(counted, {"bytes": 8}, Constraints(max_bytes=100))
    Traceback (most recent call last):
    lepton_xla.errors.TuningError: max_bytes = 100 cannot be kept to: with every weight in its smallest form the ...
    """
    for kind, limit, unit in (
        ("bytes", constraints.max_bytes, "bytes"),
        ("memory", constraints.max_memory, "bytes"),
        ("operations", constraints.max_operations, "multiply-adds"),
    ):
        if limit is None:
            continue
        least = fixed[kind] + sum(float(each.min()) for each in counted[kind])
        if limit < 0.98 * least:
            raise TuningError(
                f"max_{kind} = {limit:,} cannot be kept to: with every weight in its smallest form the model takes "
                f"{round(least):,} {unit}; allow that, or give more choices"
            )
