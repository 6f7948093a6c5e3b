"""Measures recipes within a budget: presets, what estimates choose, and candidates that are trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from lepton_xla.program import Program
from lepton_xla.recipe import Recipe, to_toml
from lepton_xla.tuning.candidates import FIRST_ERROR, Candidates
from lepton_xla.tuning.choices import Choice, Group, Methods, recipe_of
from lepton_xla.tuning.constraints import Budget, Constraints, Objective
from lepton_xla.tuning.journals import Journal
from lepton_xla.tuning.pacing import Pace, TimeUpError
from lepton_xla.tuning.results import Stop
from lepton_xla.tuning.studies import Settings, Study, objectives_of, training_key
from lepton_xla.tuning.trainings import Trainer, first_of, ranges_of
from lepton_xla.tuning.trials import Trial, Workshop

# A training that takes the time that is left may have this many times the steps that were given, and must have this
# many times those that it had; time is planned as if everything took this much longer than before.
LONGEST, ENOUGH_MORE, CAREFUL = 8.0, 1.5, 1.15
type Progress = Callable[[str, int, int], None]


class Longer(NamedTuple):
    """A trained trial that is trained again for more steps: a multiple of those of the training."""

    trial: Trial
    settings: Settings
    steps: float


class Search:
    """Measures recipes until there is nothing left to try, or no time."""

    def __init__(
        self,
        shop: Workshop,
        constraints: Constraints,
        objective: Objective,
        budget: Budget,
        kept: Journal,
        unpack: str,
        say: Progress,
        pace: Pace,
    ) -> None:
        self._shop, self._constraints = shop, constraints
        self._objective: Objective = objective
        self._budget, self._kept, self._unpack, self._say = budget, kept, unpack, say
        self._pace = pace
        # Seconds that the steps of a training took for each length of the training's own, and all else of the trial.
        self._took: dict[str, tuple[float, float]] = {}
        self.trials: dict[str, Trial] = {}
        # How many times the expected bytes are left where channels go: the first and last weight lose one side only;
        # and how many times as long calls took.
        self._more_bytes = 1.01
        self._more_latency: list[float] = []
        # The trained program of the best, by name.
        self.made: dict[str, Program] = {}
        self.stopped: Stop = "done"

    @property
    def best(self) -> Trial | None:
        """The best trial that keeps to all constraints."""
        holding = [trial for trial in self.trials.values() if trial.excess(self._constraints) == 0]
        return min(holding, key=lambda t: (t.value(self._objective), t.judged, t.output_error), default=None)

    @property
    def nearest(self) -> Trial | None:
        """The best, or the trial that breaks the constraints least."""
        return self.best or self._breaking_least(self.trials.values())

    def _breaking_least(self, trials: Iterable[Trial]) -> Trial | None:
        measured = [trial for trial in trials if not trial.failure]
        return min(measured, key=lambda t: (t.excess(self._constraints), t.value(self._objective)), default=None)

    def begin(self, presets: Sequence[Recipe]) -> None:
        """Measure the first preset, however long that takes, so that something is measured before time is short."""
        for recipe in presets[:1]:
            self._measured(recipe.replace(unpack=self._unpack), "preset", {}, {}, 1.0)

    def end(self, waiting: Sequence[Recipe]) -> None:
        """Note that there was no time for more candidates, nor for these presets."""
        self.stopped = "time"
        chosen = any(trial.estimates for trial in self.trials.values())
        self._pace.skip("further candidates" if chosen else "all candidates but presets")
        if waiting:
            self._pace.skip(f"presets: {', '.join(recipe.name for recipe in waiting)}")

    def run(self, candidates: Candidates, presets: Sequence[Recipe], share: float) -> None:
        """Measure the presets, then what is chosen, in a share of the time."""
        # A preset may unpack; what is limited is memory, so it may not here.
        waiting = [recipe.replace(unpack=self._unpack) for recipe in presets]
        half = self._pace.share_of_rest(0.5, share)
        while waiting and self._measured(waiting[0], "preset", {}, {}, half) is not None:
            waiting.pop(0)
        self.stopped = "done"
        for proposal in candidates.proposals():
            recipe, described = self._recipe(candidates.named(proposal.picked), proposal.methods)
            expected = candidates.expected(proposal.picked)
            trial = self._measured(recipe, proposal.origin, described, expected, share)
            if trial is None:
                break
            candidates.learn(proposal, trial)
        while self.stopped == "done" and waiting:
            if self._measured(waiting[0], "preset", {}, {}, share) is None:
                break
            waiting.pop(0)
        if self.stopped == "time":
            self.end(waiting)

    def train(self, candidates: Candidates, trainer: Trainer, kept: Journal, storage: str | None) -> None:
        """Measure candidates that are trained."""
        smallest, largest = candidates.error_range
        first = min(max(4 * smallest, FIRST_ERROR), largest)
        limits = (self._constraints.max_latency_ms, self._constraints.min_speedup)
        by_times = self._objective == "latency" or limits != (None, None)
        asked_for = [
            dataclasses.asdict(self._constraints), self._objective, trainer.digest, trainer.seed,
            {name: value for name, value in kept.identity.items() if name != "machine" or by_times},
        ]  # fmt: skip
        study = Study(
            hashlib.sha256(json.dumps(asked_for).encode()).hexdigest()[:16],
            ranges_of(trainer),
            first_of(trainer, math.log(first / smallest) / math.log(largest / smallest)),
            storage=storage if storage is not None or kept.path is None else f"{kept.path}.optuna",
            seed=trainer.seed,
        )
        self.trials |= study.done
        self.stopped = "trials"
        half = self._pace.share_of_rest(0.5)
        while study.count < self._budget.trainings:
            holds = any(each.training and each.excess(self._constraints) == 0 for each in self.trials.values())
            # Where the drop itself is to be least, what holds may still be better after more steps.
            enough = holds and self._objective != "metric"
            longer = None if enough or self._fits("training", half) else self._longer(study)
            ended = (longer is not None or self._fits("training")) and self._trained(study, candidates, trainer, longer)
            if not ended:
                self.stopped = "time"
                self._pace.skip(f"{self._budget.trainings - study.count} of {self._budget.trainings} trainings")
                return
            self.trials |= study.done  # those of other processes too
        self.trials |= study.done  # what another process ended since

    def _longer(self, study: Study) -> Longer | None:
        """The nearest of what was trained, with its steps if it takes all the time that is left.

        None if they are too few more than it had. What looked best after few steps gets the most, as in successive
        halving (Jamieson and Talwalkar 2016).
        """
        nearest = self._breaking_least(each for each in self.trials.values() if each.training)
        if nearest is None:
            return None
        had = nearest.training["steps"]
        each_s, other_s = self._took.get(nearest.name, (nearest.seconds / had, 0.0))
        left = self._pace.left_s(self._reserve_s) - CAREFUL * other_s
        steps = min(LONGEST, math.floor(10 * left / each_s / CAREFUL) / 10)
        settings = study.settings_of(nearest)
        if steps < ENOUGH_MORE * had or settings is None:
            return None
        return Longer(nearest, settings, steps)

    def _trained(self, study: Study, candidates: Candidates, trainer: Trainer, longer: Longer | None) -> bool:
        """Train a candidate and measure it: settings that were tried, for more steps, or what the study asks for.

        False if there was no time to end it.
        """
        number = f"training {study.count + 1}"
        asked = study.ask() if longer is None else None
        asked_for = asked.settings if asked is not None else longer.settings if longer is not None else {}
        smallest, largest = candidates.error_range
        removed = asked_for.get("channels", 0.0)
        picked = candidates.within(
            smallest * (largest / smallest) ** asked_for["error"],
            removed=removed,
            more=self._more if removed else None,
        )
        recipe, described = self._recipe(candidates.named(picked), Methods())
        if longer is not None and longer.trial.excess(dataclasses.replace(self._constraints, max_drop=None)) == 0:
            recipe, described = Recipe.parse(longer.trial.recipe, name=recipe.name), longer.trial.choices
        settings = {name: asked_for[name] for name in trainer.names(recipe)}
        settings |= {"steps": longer.steps} if longer is not None else {}
        key = training_key(to_toml(recipe), settings, trainer.digest)
        recipe = recipe.replace(name=f"trained-{key[-8:]}")
        expected = candidates.expected(picked, removed=removed)
        allowed = self._constraints.max_drop or 0.0

        def say(line: str) -> None:
            self._pace.check(reserve_s=self._reserve_s)
            self._say(f"{self._so_far()}; {number}, {recipe.name}: {line}", study.count, self._budget.trainings)

        def check(drop: float) -> None:
            if asked is not None:  # of others that had as many steps
                kind = self._objective if self._objective in ("latency", "operations") else "bytes"
                study.check(asked, expected[kind], drop, allowed)

        each_s = 0.0

        def train() -> Program:
            nonlocal each_s
            say("train")
            first: list[float] = []

            def at(share: float) -> None:
                first.extend([] if first else [share, self._pace.seconds])
                # What came before the first look has compiling in it, so it says nothing of the rest.
                done, began = first
                rest = (self._pace.seconds - began) / (share - done) * (1 - share) if share > done else 0.0
                self._pace.check(reserve_s=self._reserve_s, rest_s=rest)
                say(f"train, {share:.0%} done")

            program = trainer.train(recipe, settings, check, at)
            share, began = first or (0.0, self._pace.seconds)
            each_s = (self._pace.seconds - began) / (1 - share) if share < 1 else 0.0
            self.made[recipe.name] = program
            return program

        try:
            found = self._kept.once(
                key,
                lambda: self._shop.measure(
                    recipe,
                    self._constraints.max_drop,
                    say,
                    train=train,
                    origin="trained",
                    choices=described,
                    training=settings,
                ).to_json(),
            )
        except TimeUpError:
            if asked is not None:
                study.give_up(asked)
            return False
        trial = self.trials[key] = Trial.of_json(found)
        if each_s:
            self._took[trial.name] = (each_s / settings["steps"], max(trial.seconds - each_s, 0.0))
        self.made = {name: each for name, each in self.made.items() if self.best and name == self.best.name}
        if asked is not None:
            study.tell(asked, key, trial, *objectives_of(trial, self._objective, self._constraints))
        elif key not in study.done:
            study.tell_longer(asked_for, key, trial)
        if removed and not trial.failure:
            self._more_bytes = max(self._more_bytes, 1.001 * trial.bytes / expected["bytes"])
            self._more_latency.append(trial.latency / expected["latency"])
        if trial.origin != "stopped":
            self._pace.took("training", trial.seconds)
        return True

    @property
    def _more(self) -> dict[str, float]:
        return {"bytes": self._more_bytes, "latency": statistics.median(self._more_latency or [1.0])}

    @property
    def _reserve_s(self) -> float:
        """Seconds that are needed to build the best again."""
        best = self.best
        if not self._budget.rebuild or best is None:
            return 0.0
        # What was trained need not be trained again.
        return self._took.get(best.name, (0.0, best.seconds))[1] if best.name in self.made else best.seconds

    def _fits(self, kind: str, until: float = 1.0) -> bool:
        return self._pace.fits(kind, until, reserve_s=self._reserve_s)

    def _recipe(self, picked: Sequence[tuple[Group, Choice]], methods: Methods) -> tuple[Recipe, dict[str, str]]:
        """The recipe of a candidate, named by its contents, and what each site becomes."""
        recipe = recipe_of("", picked, methods, unpack=self._unpack)
        name = f"tuned-{hashlib.sha256(to_toml(recipe).encode()).hexdigest()[:8]}"
        return recipe.replace(name=name), {site: choice.name for group, choice in picked for site in group.sites}

    def _measured(
        self, recipe: Recipe, origin: str, described: dict[str, str], expected: dict[str, float], until: float
    ) -> Trial | None:
        """A trial, measured or from the journal; None if the budget is spent, or if it is past this time."""
        key = hashlib.sha256(to_toml(recipe).encode()).hexdigest()[:16]
        known = self._kept.get(key)
        # What failed in another run may not fail now: an evaluate that was mended, memory that is there.
        again = known is not None and bool(known["failure"])
        if key not in self.trials:
            if self._budget.trials is not None and len(self.trials) >= self._budget.trials:
                self.stopped = "trials"
                return None
            # Something is measured, however long scoring took.
            if (known is None or again) and self.trials and not self._fits("trial", until):
                self.stopped = "time"
                return None
            done, total = len(self.trials), self._budget.trials or 0

            def say(line: str) -> None:
                if self.trials:
                    self._pace.check(reserve_s=self._reserve_s)
                self._say(f"{self._so_far()}; trial {done + 1}, {recipe.name}: {line}", done, total)

            try:
                say("build")
                found = self._kept.once(
                    key,
                    lambda: self._shop.measure(
                        recipe, self._constraints.max_drop, say, origin=origin, choices=described, estimates=expected
                    ).to_json(),
                    again=again,
                )
            except TimeUpError:
                self.stopped = "time"
                return None
            # Estimates, and what is allowed, may be others than in the run that measured.
            self.trials[key] = dataclasses.replace(Trial.of_json(found), origin=origin, estimates=expected)
            self._pace.took("trial", self.trials[key].seconds)
        return self.trials[key]

    def _so_far(self) -> str:
        best = self.best
        if best is None:
            return "nothing holds yet"
        figures = {
            "latency": f"{best.latency:.2f} of float's time",
            "bytes": f"{best.bytes:,} bytes",
            "memory": f"{best.memory:,} bytes in memory",
            "operations": f"{best.operations:,} multiply-adds",
            "metric": f"{best.judged:+.2f} points lost",
        }
        return f"best {figures[self._objective]}"
