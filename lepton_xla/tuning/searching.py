"""Finds the best recipe within constraints: estimates of every choice, an exact choice among them, measurements."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lepton_xla.arguments import takes
from lepton_xla.compiler.weights import stored_bytes
from lepton_xla.errors import CalibrationError, TuningError
from lepton_xla.modelspec import Predict
from lepton_xla.optimization.pipeline import grid, plan_for, told_by_xla
from lepton_xla.passes.core.calibration import as_batches
from lepton_xla.passes.core.timing import Timer
from lepton_xla.program import Program
from lepton_xla.recipe import Recipe
from lepton_xla.train import TrainSpec
from lepton_xla.trees import name_leaves
from lepton_xla.tuning.candidates import Candidates
from lepton_xla.tuning.choices import CHOICES, Choice
from lepton_xla.tuning.constraints import Budget, Constraints, Objective, check_objective
from lepton_xla.tuning.estimating import estimated
from lepton_xla.tuning.journals import Journal
from lepton_xla.tuning.judging import Judge
from lepton_xla.tuning.measuring import Progress, Search
from lepton_xla.tuning.pacing import Pace, TimeUpError
from lepton_xla.tuning.results import Tuning
from lepton_xla.tuning.studies import imported_optuna
from lepton_xla.tuning.trainings import Trainer
from lepton_xla.tuning.trials import Trial, Workshop, digest, predictor

# Presets that are measured first, so that what is found is never worse than they are.
PRESETS = ("int8", "int8-weight-only", "int4-weight-only", "codebook16")
ANY_TIME = Budget()
# Of what a journal keeps; changes with the fields of a trial.
FORMAT = 8


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
    constraints.latencies_us(len(sizes))  # several limits that are not one for each size
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
    search = Search(shop, constraints, objective, budget, kept, unpack, say, pace)
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
        float_operations=estimates.float_operations if estimates is not None else 0,
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
