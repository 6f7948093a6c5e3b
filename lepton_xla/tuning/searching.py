"""Finds the best recipe within constraints: estimates of every choice, an exact choice among them, measurements."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lepton_xla.arguments import takes
from lepton_xla.compiler.weights import stored_bytes
from lepton_xla.errors import CalibrationError, TuningError
from lepton_xla.modelspec import Predict
from lepton_xla.optimization.pipeline import grid, plan_for, told_by_xla
from lepton_xla.passes.core.calibration import as_batches
from lepton_xla.passes.core.timing import Timer
from lepton_xla.program import Program
from lepton_xla.recipe import Recipe, to_toml
from lepton_xla.train import TrainSpec
from lepton_xla.trees import name_leaves
from lepton_xla.tuning.candidates import FIRST_ERROR, Candidates
from lepton_xla.tuning.choices import CHOICES, Choice, Group, Methods, recipe_of
from lepton_xla.tuning.constraints import Budget, Constraints, Objective, check_objective
from lepton_xla.tuning.estimating import estimated
from lepton_xla.tuning.journals import Journal
from lepton_xla.tuning.judging import Judge
from lepton_xla.tuning.pacing import Pace, TimeUpError
from lepton_xla.tuning.results import Stop, Tuning
from lepton_xla.tuning.studies import Settings, Study, imported_optuna, objectives_of, training_key
from lepton_xla.tuning.trainings import Trainer, first_of, ranges_of
from lepton_xla.tuning.trials import Trial, Workshop, digest, predictor

# Presets that are measured first, so that what is found is never worse than they are.
PRESETS = ("int8", "int8-weight-only", "int4-weight-only", "codebook16")
ANY_TIME = Budget()
# Of what a journal keeps; changes with the fields of a trial.
FORMAT = 6
# A training that takes the time that is left may have this many times the steps that were given, and must have this
# many times those that it had; time is planned as if everything took this much longer than before.
LONGEST, ENOUGH_MORE, CAREFUL = 8.0, 1.5, 1.15
type Progress = Callable[[str, int, int], None]


@takes(program=Program, constraints=Constraints, budget=Budget, training=TrainSpec)
@told_by_xla
def tune(
    program: Program,
    evaluate: Callable[[Predict], Mapping[str, float]],
    data: Iterable[Mapping[str, Any]],
    *,
    constraints: Constraints,
    objective: Objective = "latency",
    budget: Budget = ANY_TIME,
    metric: str | None = None,
    lower_is_better: bool = False,
    buckets: Mapping[str, Iterable[int]] | None = None,
    choices: Sequence[Choice] = CHOICES,
    presets: Sequence[str] = PRESETS,
    seed: int = 0,
    journal: str | None = None,
    timer: Timer | None = None,
    progress: Progress | None = None,
    training: TrainSpec | None = None,
    storage: str | None = None,
    new_journal: bool = False,
) -> Tuning:
    """Find the recipe that is best at an objective and keeps to constraints, both by measurement.

    One pass over the data estimates what each choice does to the outputs; bytes are counted, products timed. An integer
    program chooses, and what it chose is built and measured whole. Limits and costs are corrected by what was measured
    until the best that holds is found. Candidates are judged on one half of the rows that `evaluate` asks for;
    `Trial.reported` is of the other half.

    Args:
        program: a trained model.
        evaluate: `evaluate(predict) -> {"accuracy": 0.98, ...}`; must ask for the same rows each time.
        data: calibration data: input dicts, all held in memory.
        constraints: what to keep to.
        objective: what is to be least.
        budget: how long to look; one candidate is measured however long that takes, nothing else is begun that would
            not end in time.
        metric: the metric of drops; by default `accuracy` if there is one, else the first.
        lower_is_better: whether it is a loss.
        buckets: symbolic dimension -> sizes the program will be compiled for; calls are timed at all of them.
        choices: what each weight may become; the first must leave it in float.
        presets: presets that are measured first, in half of the time.
        seed: of the split of the rows and of the estimates; the same seed, with the same times, gives the same trials.
        journal: a file that keeps what was measured: a killed run goes on, and another budget scores nothing again.
        timer: times calls; by default a new one, which keeps its measurements on disk.
        progress: called with what begins, and how many trials of how many are done.
        training: data, optimizer, steps and loss by which candidates may be trained from the float model's weights,
            folded; its own model and compression are not used, nor its checkpoints and logs. Half of the minutes are
            then for trained candidates. Their settings are chosen by Optuna (the extra `tune`). If none of them keeps
            to the constraints after half of that, the nearest is trained again for as many steps as there is time
            for, up to 8 times those of the training. Without a loss of its own they learn from the float model's
            logits and from labels.
        storage: where Optuna keeps what was trained: a file, or the URL of a database such as `sqlite:///study.db`. By
            default `JOURNAL.optuna`, beside the journal. Processes that share it, on several machines too, share the
            trials; each has its own journal, or none.
        new_journal: whether a journal of another model, other data or another version is put aside as `JOURNAL.old`,
            and a new one begun, instead of being refused.

    Returns:
        The best trial and all others. Ctrl-C ends the search, not the program: the best so far is returned.

    Raises:
        TuningError: if constraints contradict each other, `evaluate` fails, gives NaN or is random, there are too few
            rows to judge the drop, or the journal is of another model.
        MissingPackageError: if Optuna is missing, with `train`.
        CalibrationError: if there is no data, or it cannot be used.
        RecipeError: if a preset does not exist.
        ExecutionError: if XLA cannot compile or run what is estimated; a candidate that it cannot is a failed trial.

    >>> random = np.random.default_rng(0)
    >>> x, w = random.normal(size=(400, 8)).astype(np.float32), jnp.asarray(random.normal(size=(8, 3)), jnp.float32)
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": w}, {"x": lx.TensorSpec(("batch", 8), "float32")})
    >>> right = np.argmax(x @ np.asarray(w), -1)
    >>> evaluate = lambda predict: {"accuracy": np.mean(predict(x=x)["output"].argmax(-1) == right)}
    >>> found = lx.tuning.tune(
    ...     program, evaluate, [{"x": x[:64]}], constraints=lx.tuning.Constraints(max_drop=3.0), objective="bytes",
    ...     budget=lx.tuning.Budget(trials=2), presets=(), choices=lx.tuning.CHOICES[:3], buckets={"batch": (1,)},
    ... )
    >>> found.best.choices, found.best.judged <= 3.0
    ({'w': 'int8'}, True)
    """
    pace = Pace(budget.minutes)
    say = progress or (lambda _what, _done, _total: None)
    check_objective(objective, constraints)
    if not choices or choices[0].quantize is not None or choices[0].sparsity:
        raise TuningError("the first of the choices must leave a weight in float")
    if seed < 0:
        raise TuningError(f"seed = {seed}: expected a number above or equal to 0")
    if training is not None:
        imported_optuna()  # one that is missing shows before anything is measured
    recipes = [Recipe.load(name) for name in presets]
    batches = list(as_batches(data))
    if not batches:
        raise CalibrationError("calibration data is empty: give at least one batch")
    timer = timer or Timer()
    say("evaluate the float model", 0, 0)
    judge = Judge(program, evaluate, predictor(program), metric=metric, lower_is_better=lower_is_better, seed=seed)
    if constraints.max_drop is not None:
        judge.check_resolution(constraints.max_drop)
    asked = None if buckets is None else {name: tuple(each) for name, each in buckets.items()}
    sizes = grid(program, asked)
    unpack = "measured" if constraints.max_memory is None and objective != "memory" else "never"
    identity = {
        "format": FORMAT,
        **digest(program, batches),
        "metrics": {name: round(value, 9) for name, value in judge.metrics.items()},
        "metric": judge.metric,
        "rows": judge.rows_digest,
        "choices": [dataclasses.asdict(each) for each in choices],
        "sizes": [dict(at) for at in sizes],
        "machine": timer.target.digest,
        "seed": seed,
    }
    kept = Journal(journal, identity, begin_anew=new_journal)
    shop = Workshop(program, batches, asked, sizes, judge, timer)
    search = _Search(shop, constraints, objective, budget, kept, unpack, say, pace)
    trainer = None
    if training is not None:
        folded, _ = plan_for(program, Recipe(), buckets=asked)
        trainer = Trainer(folded, training, judge, seed)
        _ = trainer.digest  # data or a loss that cannot be used shows before anything is measured
    float_bytes = stored_bytes(name_leaves(program.weights))
    estimates = None
    try:
        # Bytes that no format reaches, removing channels may.
        counted = Constraints() if trainer is not None and trainer.shrinks else constraints
        estimates = estimated(
            shop, choices, counted, kept, seed=seed, unpack=unpack, float_bytes=float_bytes, say=say, pace=pace,
            first=lambda: search.begin(recipes),
        )  # fmt: skip
        candidates = Candidates(estimates, constraints, objective)
        search.run(candidates, recipes, 0.5 if trainer is not None else 1.0)
        if trainer is not None:
            search.train(candidates, trainer, kept, storage)
    except TimeUpError:
        search.end(recipes[1:])
    except KeyboardInterrupt:
        search.stopped = "interrupted"
    return Tuning(
        constraints=constraints,
        objective=objective,
        metric=judge.metric,
        float_metrics=judge.metrics,
        float_bytes=float_bytes,
        best=search.best,
        nearest=search.nearest,
        trials=tuple(search.trials.values()),
        sites=tuple(estimates.described()) if estimates is not None else (),
        sizes=tuple(sizes),
        stopped=search.stopped,
        seconds=pace.seconds,
        skipped=tuple(dict.fromkeys(pace.skipped)),
        judge=judge,
        maker=functools.partial(_built, shop, trainer, search.made),
    )


def _built(shop: Workshop, trainer: Trainer | None, made: Mapping[str, Program], trial: Trial) -> Program:
    if not trial.training:
        return shop.build(trial)
    if trial.name in made:
        return shop.build(trial, lambda _recipe: made[trial.name])
    assert trainer is not None
    return shop.build(trial, lambda recipe: trainer.train(recipe, trial.training, lambda _drop: None))


class _Longer(NamedTuple):
    """A trained trial that is trained again for more steps: a multiple of those of the training."""

    trial: Trial
    settings: Settings
    steps: float


class _Search:
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
        # How many times the expected bytes are left where channels go: the first and last weight lose one side only.
        self._more = 1.01
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
        by_times = self._objective == "latency" or self._constraints.max_latency_ms is not None
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
            longer = None if holds or self._fits("training", half) else self._longer(study)
            ended = (longer is not None or self._fits("training")) and self._trained(study, candidates, trainer, longer)
            if not ended:
                self.stopped = "time"
                self._pace.skip(f"{self._budget.trainings - study.count} of {self._budget.trainings} trainings")
                return
            self.trials |= study.done  # those of other processes too
        self.trials |= study.done  # what another process ended since

    def _longer(self, study: Study) -> _Longer | None:
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
        return _Longer(nearest, settings, steps)

    def _trained(self, study: Study, candidates: Candidates, trainer: Trainer, longer: _Longer | None) -> bool:
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
            more=self._more if removed else 1.0,
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
                study.check(asked, expected["latency" if self._objective == "latency" else "bytes"], drop, allowed)

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
            self._more = max(self._more, 1.001 * trial.bytes / expected["bytes"])
        if trial.origin != "stopped":
            self._pace.took("training", trial.seconds)
        return True

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
        if key not in self.trials:
            if self._budget.trials is not None and len(self.trials) >= self._budget.trials:
                self.stopped = "trials"
                return None
            # Something is measured, however long scoring took.
            if known is None and self.trials and not self._fits("trial", until):
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
            "metric": f"{best.judged:+.2f} points lost",
        }
        return f"best {figures[self._objective]}"
