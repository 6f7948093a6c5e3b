"""Which candidates to measure next, by estimates that each measurement corrects."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lepton_xla.tuning.choices import METHODS, Choice, Group, Methods
from lepton_xla.tuning.constraints import Constraints, Objective
from lepton_xla.tuning.costs import refit
from lepton_xla.tuning.programming import choose_within, total
from lepton_xla.tuning.trials import Trial

# The squared relative error of the outputs that is tried first, the step to the next, and where halving ends.
FIRST_ERROR, ERROR_STEP, CLOSE_ENOUGH = 1e-2, 6.0, 1.25
# Weight of the estimated error among choices that are equally good at the objective.
_TIE = 1e-6
# How often an objective's limits are corrected by what was measured, and a failed candidate goes back a step.
CORRECTIONS, STEPS_BACK = 5, 6


@dataclasses.dataclass(frozen=True)
class Estimates:
    """What each choice for each group is estimated to do and to cost.

    Attributes:
        groups: the groups.
        costs: `error`, `bytes`, `memory`, `operations`, and `us@0`, `us@1`, ... by size -> for each group float64
            [choices].
        fixed: kind of cost -> what does not depend on the choices.
    """

    groups: Sequence[Group]
    costs: Mapping[str, Sequence[np.ndarray]]
    fixed: Mapping[str, float]

    @property
    def sizes(self) -> list[str]:
        """The kinds that are times."""
        return [kind for kind in self.costs if kind.startswith("us@")]

    def shares(self, costs: Mapping[str, Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Times of each choice, corrected, as a share of the float program's: the mean over the sizes."""
        found = [np.zeros(len(each)) for each in costs["error"]]
        for kind in self.sizes:
            unit = len(self.sizes) * max(self.fixed[kind], 1e-9)
            found = [own + each / unit for own, each in zip(found, costs[kind], strict=True)]
        return found

    @property
    def float_operations(self) -> int:
        """Multiply-adds of the float program."""
        return round(self.fixed["operations"] + sum(float(each[0]) for each in self.costs["operations"]))

    def named(self, picked: Sequence[int]) -> list[tuple[Group, Choice]]:
        """What each group gets."""
        return [(group, group.choices[index]) for group, index in zip(self.groups, picked, strict=True)]

    def described(self) -> list[dict[str, Any]]:
        """Groups and choices as plain dicts."""
        return [
            {
                "sites": list(group.sites),
                "choices": [
                    {
                        "name": choice.name,
                        "error": math.sqrt(self.costs["error"][at][index]),
                        "bytes": int(self.costs["bytes"][at][index]),
                        "operations": int(self.costs["operations"][at][index]),
                        "us": [float(self.costs[kind][at][index]) for kind in self.sizes],
                    }
                    for index, choice in enumerate(group.choices)
                ],
            }
            for at, group in enumerate(self.groups)
        ]


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A candidate to measure.

    Attributes:
        picked: for each group the index of its choice.
        methods: how weights are rounded and pruned.
        origin: as in `Trial`.
    """

    picked: tuple[int, ...]
    methods: Methods
    origin: str


class Candidates:
    """Proposes candidates; `learn` must be called with the trial of each before the next is taken."""

    def __init__(self, estimates: Estimates, constraints: Constraints, objective: Objective) -> None:
        self._estimates, self._constraints = estimates, constraints
        self._objective: Objective = objective
        self._costs: dict[str, Sequence[np.ndarray]] = {**estimates.costs, "share": estimates.shares(estimates.costs)}
        self._seen: dict[Proposal, Trial] = {}
        self._last: Trial | None = None
        self._methods = METHODS[0]

    def learn(self, proposal: Proposal, trial: Trial) -> None:
        """Correct the estimates by what was measured."""
        self._seen[dataclasses.replace(proposal, origin="")] = trial
        self._last = trial
        known = [(each.picked, found) for each, found in self._seen.items() if not found.failure]
        kinds: dict[str, Callable[[Trial], float]] = {"bytes": lambda trial: trial.bytes}
        kinds |= {"memory": lambda trial: trial.memory, "operations": lambda trial: trial.operations}
        for index, kind in enumerate(self._estimates.sizes):
            kinds[kind] = _time_of(index, self._estimates.fixed[kind])
        for kind, value in kinds.items():
            measured = [value(found) - self._estimates.fixed[kind] for _, found in known]
            self._costs[kind] = refit(self._estimates.costs[kind], [picked for picked, _ in known], measured)
        self._costs["share"] = self._estimates.shares(self._costs)

    def named(self, picked: Sequence[int]) -> list[tuple[Group, Choice]]:
        """What each group gets."""
        return self._estimates.named(picked)

    @property
    def error_range(self) -> tuple[float, float]:
        """The smallest estimated error of the outputs that any change makes, and the largest."""
        errors = self._costs["error"]
        largest = sum(float(each.max()) for each in errors)
        smallest = min((float(each[each > 0].min()) for each in errors if (each > 0).any()), default=1e-6)
        return min(smallest, largest / 2), largest

    def within(self, error: float, *, removed: float = 0.0, more: Mapping[str, float] | None = None) -> tuple[int, ...]:
        """The best at the objective within an error of the outputs, or the closest to that.

        Args:
            error: that the outputs may have.
            removed: share of the channels that goes besides.
            more: how many times as many `bytes` as are expected there are then, and as much `latency`.
        """
        by_error = {"error": 1.0}
        picked = self._choose(by_error, math.inf, removed, more) if self._objective == "metric" else None
        picked = picked or self._choose(self._objective_weights(), error, removed, more)
        picked = picked or self._choose(by_error, math.inf, removed, more)
        return picked or tuple(int(np.argmin(each)) for each in self._costs["bytes"])

    def expected(self, picked: Sequence[int], *, removed: float = 0.0) -> dict[str, float]:
        """What a candidate is expected to measure, less a share of the channels."""
        found = self._expected(picked)
        return {
            kind: value * (1.0 if kind == "output_error" else _left(kind, removed)) for kind, value in found.items()
        }

    def _expected(self, picked: Sequence[int]) -> dict[str, float]:
        shares = [self._sum(kind, picked) / max(self._estimates.fixed[kind], 1e-9) for kind in self._estimates.sizes]
        return {
            "output_error": math.sqrt(max(self._sum("error", picked), 0.0)),
            "bytes": self._sum("bytes", picked),
            "operations": self._sum("operations", picked),
            "latency": math.prod(max(share, 1e-3) for share in shares) ** (1 / len(shares)) if shares else 1.0,
        }

    def proposals(self) -> Iterator[Proposal]:
        """Candidates, the most promising first; ends if there is nothing left to try."""
        if self._objective == "metric":
            yield from self._within_limits()
        else:
            yield from self._within_drop()
        if not self._seen:
            yield from self._closest()
        yield from self._steps_back()
        yield from self._other_methods()
        yield from self._steps_on()

    def _within_limits(self) -> Generator[Proposal]:
        """The least error within the limits; limits that estimates missed are corrected."""
        for _ in range(CORRECTIONS):
            picked = self._choose({"error": 1.0}, math.inf)
            if picked is None:
                return
            yield from self._try(picked, "chosen")
            if self._last is not None and self._last.excess(dataclasses.replace(self._constraints, max_drop=None)) == 0:
                return

    def _within_drop(self) -> Generator[Proposal]:
        """The best at the objective within an error of the outputs; the largest that holds is found by halving."""
        weights = self._objective_weights()
        largest = sum(float(each.max()) for each in self._costs["error"])
        error, low, high = min(FIRST_ERROR, largest), 0.0, math.inf
        while True:
            picked = self._choose(weights, error)
            if picked is None:  # the limits take more error than this
                holds = True
            else:
                yield from self._try(picked, "chosen")
                assert self._last is not None
                holds = self._last.excess(Constraints(max_drop=self._constraints.max_drop)) == 0
            low, high = (error, high) if holds else (low, error)
            if low >= largest or (low and high / low < CLOSE_ENOUGH) or high < 1e-9:
                return
            error = (
                min(low * ERROR_STEP, largest)
                if high == math.inf
                else (math.sqrt(low * high) if low else high / ERROR_STEP)
            )

    def _closest(self) -> Generator[Proposal]:
        """Propose what comes closest to limits that by the estimates nothing keeps to: estimates may be wrong."""
        limits = self._limits()
        weights = {kind: 1 / max(limit + self._fixed(kind), 1e-9) for kind, limit in limits.items()}
        picked = choose_within(self._costs, {**weights, "error": _TIE}, {})
        if picked is not None:
            yield from self._try(picked, "chosen")

    def _steps_back(self) -> Generator[Proposal]:
        """From the best that fails: the groups with the largest error go back a step, until it holds (as NNCF does)."""
        for _ in range(STEPS_BACK):
            best = self._best_value()
            failed = [
                (proposal, trial)
                for proposal, trial in self._seen.items()
                if trial.excess(self._constraints) > 0 and trial.value(self._objective) < best
            ]
            if not failed:
                return
            proposal, _ = min(failed, key=lambda each: each[1].excess(self._constraints))
            back = self._one_back(proposal.picked)
            if back is None:
                return
            before = len(self._seen)
            yield from self._try(back, "step back", proposal.methods)
            if len(self._seen) == before:
                return

    def _other_methods(self) -> Generator[Proposal]:
        """The best so far by other ways to round and prune; the one with the least error is used from here on."""
        found = self._best()
        if found is None:
            return
        for methods in METHODS[1:]:
            yield from self._try(found[0].picked, "methods", methods)
        same = {each.methods: trial for each, trial in self._seen.items() if each.picked == found[0].picked}
        self._methods = min(same, key=lambda each: same[each].output_error)

    def _steps_on(self) -> Generator[Proposal]:
        """From the best so far: one group at a time takes what is better at the objective for the least error."""
        while True:
            found = self._best()
            if found is None:
                return
            moves = self._moves(found[0].picked)
            moved = False
            for picked in moves:
                before = self._best_value()
                count = len(self._seen)
                yield from self._try(picked, "step on")
                if len(self._seen) > count and self._best_value() < before:
                    moved = True
                    break
            if not moved:
                return

    def _moves(self, picked: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Candidates that differ in one group and are expected to be better, the best bargain first."""
        weights = {"error": 1.0} if self._objective == "metric" else self._objective_weights(tie=0.0)
        found: list[tuple[float, tuple[int, ...]]] = []
        for at, group in enumerate(self._estimates.groups):
            for index in range(len(group.choices)):
                other = (*picked[:at], index, *picked[at + 1 :])
                gain = sum(w * (self._sum(k, picked) - self._sum(k, other)) for k, w in weights.items())
                if index == picked[at] or gain <= 0 or not self._fits(other):
                    continue
                price = self._sum("error", other) - self._sum("error", picked)
                found.append((max(price, 0.0) / gain if self._objective != "metric" else -gain, other))
        return [other for _, other in sorted(found)]

    def _one_back(self, picked: tuple[int, ...]) -> tuple[int, ...] | None:
        """The group with the largest error takes the next choice with less; None if all are in float."""
        errors = [float(each[index]) for each, index in zip(self._costs["error"], picked, strict=True)]
        for at in sorted(range(len(picked)), key=lambda at: -errors[at]):
            own = self._costs["error"][at]
            better = [index for index in range(len(own)) if own[index] < errors[at]]
            for index in sorted(better, key=lambda index: -own[index]):
                other = (*picked[:at], index, *picked[at + 1 :])
                if self._fits(other) and Proposal(other, self._methods, "") not in self._seen:
                    return other
        return None

    def _fits(self, picked: Sequence[int]) -> bool:
        return all(total(self._costs, kind, picked) <= limit for kind, limit in self._limits().items())

    def _try(self, picked: tuple[int, ...], origin: str, methods: Methods | None = None) -> Generator[Proposal]:
        """Propose a candidate, unless it was measured already."""
        proposal = Proposal(picked, methods or self._methods, "")
        if proposal in self._seen:
            self._last = self._seen[proposal]
        else:
            yield dataclasses.replace(proposal, origin=origin)

    def _choose(
        self, weights: Mapping[str, float], error: float, removed: float = 0.0, more: Mapping[str, float] | None = None
    ) -> tuple[int, ...] | None:
        limits = self._limits(removed, more)
        return choose_within(self._costs, weights, limits if error == math.inf else {**limits, "error": error})

    def _limits(self, removed: float = 0.0, more: Mapping[str, float] | None = None) -> dict[str, float]:
        """What the choices may cost in all, besides what is fixed, if a share of the channels goes and leaves so many
        times more than is expected."""
        asked = self._constraints
        sizes = self._estimates.sizes
        counted = {"bytes": asked.max_bytes, "memory": asked.max_memory, "operations": asked.max_operations}
        limits = {kind: float(each) for kind, each in counted.items() if each is not None}
        limits |= {
            kind: each for kind, each in zip(sizes, asked.latencies_us(len(sizes)), strict=True) if each < math.inf
        }
        limits |= {"share": 1 / asked.min_speedup} if asked.min_speedup is not None else {}
        left = {kind: _left(kind, removed) * (more or {}).get(_like(kind), 1.0) for kind in limits}
        return {kind: each / left[kind] - self._fixed(kind) for kind, each in limits.items()}

    def _objective_weights(self, tie: float = _TIE) -> dict[str, float]:
        fixed, largest = self._estimates.fixed, sum(float(each.max()) for each in self._costs["error"])
        if self._objective == "latency":
            weights = {"share": 1.0}
        else:
            whole = fixed[self._objective] + sum(float(each[0]) for each in self._estimates.costs[self._objective])
            weights = {self._objective: 1 / whole}
        return {**weights, "error": tie / max(largest, 1e-30)} if tie else weights

    def _fixed(self, kind: str) -> float:
        return 1.0 if kind == "share" else self._estimates.fixed[kind]

    def _sum(self, kind: str, picked: Sequence[int]) -> float:
        return self._fixed(kind) + total(self._costs, kind, picked)

    def _best(self) -> tuple[Proposal, Trial] | None:
        holding = [each for each in self._seen.items() if each[1].excess(self._constraints) == 0]
        return min(holding, key=lambda each: each[1].value(self._objective), default=None)

    def _best_value(self) -> float:
        found = self._best()
        return found[1].value(self._objective) if found is not None else math.inf


def _like(kind: str) -> str:
    """The kind of which what is left of a kind is known: bytes, or times."""
    return "bytes" if kind in ("bytes", "memory") else "latency" if kind == "share" or kind.startswith("us@") else kind


def _left(kind: str, removed: float) -> float:
    """What a share of the channels leaves: most weights lose rows and columns, but a call has more than products."""
    return (1 - removed) ** 2 if kind in ("bytes", "memory", "operations") else 1 - removed


def _time_of(index: int, float_us: float) -> Callable[[Trial], float]:
    """The time at a size, of a machine that is as busy as when the float program's was taken."""
    return lambda trial: trial.us[index] / trial.float_us[index] * float_us
