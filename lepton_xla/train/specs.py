"""`TrainSpec`: a training run for the command line, and when a recipe's parts are applied if nobody says."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

from lepton_xla.arguments import takes
from lepton_xla.errors import TrainingError
from lepton_xla.program import Program
from lepton_xla.recipe import Recipe
from lepton_xla.train.compression import Compression
from lepton_xla.train.evaluations import Evaluation
from lepton_xla.train.feeding import Data
from lepton_xla.train.loop import fit
from lepton_xla.train.models import Loss, Model
from lepton_xla.train.schedules import polynomial


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """A training run for `leptonx train`.

    Attributes:
        model: what is trained, or a function that makes it.
        data: batches, as for `fit`.
        steps: number of steps; `--steps` overrides it.
        optimizer: an optax optimizer, or a function of the number of steps that makes one.
        loss: the loss; by default cross-entropy with the batch's entry `label`.
        evaluate: an `Evaluation`; or `evaluate(predict) -> {"accuracy": 0.98}`, which then runs ten times in the run.
        compression: what happens to the model meanwhile; `--recipe` replaces it.
        buckets: symbolic dimension -> sizes to compile the artifact for.
        examples: of a model that generates, for `leptonx learn`: `examples(prompts, replies)` gives the entries of a
            batch, as `data` has them, for the tokens of prompts and the texts of their right replies.
        options: further arguments of `fit`, such as `{"clip_norm": 1.0}`; the command line's replace them.

    Raises:
        TrainingError: if an option is not an argument of `fit`, or is a field of its own here.

    >>> import optax
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> batch = {"x": np.eye(2, dtype=np.float32), "label": np.array([1, 0])}
    >>> spec = lx.train.TrainSpec(program, [batch], steps=20, optimizer=lambda steps: optax.sgd(0.5))
    >>> int(lx.train.fit(program, lx.train.supervised(program), spec.updates(20), spec.data, steps=20).state.step)
    20
    """

    model: Model | Program | Callable[[], Model | Program]
    data: Data
    steps: int
    optimizer: optax.GradientTransformation | Callable[[int], optax.GradientTransformation]
    loss: Loss | None = None
    evaluate: Evaluation | Callable[..., Mapping[str, float]] | None = None
    compression: Compression | None = None
    buckets: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict[str, tuple[int, ...]])
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    examples: Callable[[list[list[int]], list[str]], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        own = {field.name for field in dataclasses.fields(self)}
        known = [name for name in inspect.signature(fit).parameters if name not in own]
        unknown = [name for name in self.options if name not in known]
        if unknown:
            raise TrainingError(f"TrainSpec: options has {unknown[0]!r}; fit takes {', '.join(known)}")

    def trained(self) -> Model:
        """The model.

        Raises:
            ModelError: if it is none.

        >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": lx.TensorSpec((2, 2), "float32")})
        >>> sorted(lx.train.TrainSpec(lambda: program, [], 1, None).trained().weights)
        ['w']
        """
        made = self.model() if callable(self.model) and not isinstance(self.model, Program) else self.model
        return Model.of(made)

    def updates(self, steps: int) -> optax.GradientTransformation:
        """The optimizer for so many steps; see the example of the class."""
        given: Any = self.optimizer
        return given if isinstance(given, optax.GradientTransformation) else given(steps)

    def evaluation(self, steps: int) -> Evaluation | None:
        """When to evaluate in so many steps. With a function, the run keeps its last weights.

        >>> spec = lx.train.TrainSpec(None, [], 100, None, evaluate=lambda predict: {"accuracy": 1.0})
        >>> spec.evaluation(100).every
        10
        """
        if self.evaluate is None or isinstance(self.evaluate, Evaluation):
            return self.evaluate
        return Evaluation(self.evaluate, every=max(1, steps // 10))


@takes(recipe=Recipe)
def schedule(recipe: Recipe, steps: int) -> Compression:
    """When a recipe's parts are applied in a run, if nobody says.

    Channels are removed after a fifth of the steps; elements are pruned gradually until half of them; weights and
    activations are rounded in the second half. What the recipe has no block for does not happen.

    Args:
        recipe: the recipe.
        steps: steps of the run.

    Raises:
        RecipeError: if the recipe does not fit the schedule.

    >>> [tuple(change) for change in lx.train.schedule(lx.Recipe.load("int8"), 100).changes]
    [(50, 'quantize')]
    """
    half = max(1, steps // 2)
    return Compression(
        recipe,
        quantize_from=half if recipe.quantize else None,
        sparsify=polynomial(0, half, every=max(1, steps // 50)) if recipe.prune else None,
        shrink_at=steps // 5 if recipe.shrink is not None else None,
    )
