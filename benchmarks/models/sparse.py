"""Training on what was trained before: pruned, shrunk or quantized; kept as `base.cached` keeps the models."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_xla as lx
from lepton_xla import train
from lepton_xla.passes.planning import resolve
from models import residual
from models.base import BenchModel, cached, mnist

BATCH = 64
TEMPERATURE = 2.0
# Masks are found anew every so many steps, up to this share of them; the rest trains what is left.
EVERY, PRUNING_SHARE = 25, 0.6
FORMAT = "codebook16"


@dataclasses.dataclass(frozen=True)
class Task:
    """A trained model and what it is trained on further.

    Attributes:
        name: for files.
        program: the float model.
        images, labels: to train on.
        accuracy: `accuracy(program) -> share` of the images to judge on.
        training: `training(weights, images) -> (logits, statistics)`: what is trained; statistics are weights that it
            sets itself, of batch norms.
    """

    name: str
    program: lx.Program
    images: np.ndarray
    labels: np.ndarray
    accuracy: Callable[[lx.Program], float]
    training: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]

    def steps(self, epochs: int) -> int:
        """Steps of so many epochs."""
        return epochs * (len(self.images) // BATCH)

    def learned(
        self,
        what: str,
        weights: Any,
        *,
        epochs: int,
        fn: Callable[..., jax.Array] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Any:
        """Weights trained on by `teach`, kept under the name `what`.

        Args:
            what: everything that tells this training from others of the model.
            weights: pytree to start from.
            fn: `fn(weights, images) -> logits`, in the place of the model's own training.
            options: as `teach` takes them.
        """
        training = self.training if fn is None else _without_statistics(fn)
        make = lambda: teach(self, training, weights, epochs=epochs, seed=seed, **options)[0]  # noqa: E731
        return cached(self._file(what, weights, epochs, seed), make, weights)

    def _file(self, what: str, weights: Any, epochs: int, seed: int) -> str:
        start = hashlib.sha256()
        for leaf in jax.tree.leaves(weights):
            start.update(np.asarray(leaf).tobytes())
        return f"{self.name}-{len(self.images)}-{what}-{epochs}-{seed}-{start.hexdigest()[:8]}"

    def pruned(
        self, what: str, plan: lx.Plan, *, epochs: int, seed: int = 0, straight_through: bool = False, **options: Any
    ) -> lx.Program:
        """The float model pruned while it trains on.

        Args:
            what: everything that tells this training from others of the model.
            plan: what is pruned.
            options: of `lx.train.sparsify`, but for `schedule(steps)`, and of `teach`.
        """
        schedule, regrow = options.pop("schedule"), options.pop("regrow", lambda _steps: None)

        def wrap(optimizer: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
            found = {"schedule": schedule(steps), "regrow": regrow(steps), "straight_through": straight_through}
            return train.sparsify(optimizer, plan, **found, seed=seed)

        def held(fn: Callable[..., jax.Array], state: Any) -> Callable[..., jax.Array]:
            return lx.passes.masked(fn, train.masks_of(state), straight_through=True) if straight_through else fn

        program = self.program
        # Names of its masks are those of its weights.
        masks = {entry.site.path: np.ones(program.weights[entry.site.path].shape, bool) for entry in _pruned(plan)}
        weights, masks = cached(
            self._file(what, program.weights, epochs, seed),
            lambda: train.finalize(
                *teach(self, self.training, program.weights, epochs=epochs, seed=seed, wrap=wrap, held=held, **options)
            ),
            (program.weights, masks),
        )
        return program.replace(weights=weights, masks=masks)


def _pruned(plan: lx.Plan) -> list[Any]:
    return [entry for entry in plan.sites if entry.prune is not None and entry.site.path is not None]


def task(model: BenchModel, *, quick: bool, folded: bool = False) -> Task:
    """A benchmark model as a task, its batch norms folded where asked."""
    images, labels, _, _ = mnist()
    images, labels = (images[:512], labels[:512]) if quick else (images, labels)
    program = model.spec.program()
    program = lx.passes.fold(program) if folded else program
    evaluate = model.spec.evaluate
    assert evaluate is not None

    def accuracy(given: lx.Program) -> float:
        jitted = jax.jit(given.fn)
        return evaluate(lambda image: {"output": np.asarray(jitted(given.weights, image))})["accuracy"]

    normed = model.name == "residual" and not folded
    training = residual.training if normed else _without_statistics(program.fn)
    return Task(model.name, program, images, labels, accuracy, training)


def _without_statistics(fn: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    return lambda weights, image: (fn(weights, image), {})


def teach(
    task: Task,
    training: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    weights: Any,
    *,
    epochs: int,
    rate: float = 1e-3,
    distil: bool = True,
    wrap: Callable[[optax.GradientTransformation, int], optax.GradientTransformation] | None = None,
    held: Callable[[Callable[..., jax.Array], Any], Callable[..., jax.Array]] = lambda fn, _state: fn,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Trains with Adam and a cosine schedule, images moved by up to two pixels; deterministic.

    Args:
        training: as that of a task.
        weights: a dict of pytrees to start from.
        distil: half of the loss is the divergence from the float model's answers (Hinton et al. 2015,
            arXiv:1503.02531), at temperature 2.
        wrap: `wrap(optimizer, steps)`, such as `lx.train.sparsify`.
        held: `held(training, state) -> training`: what the loss uses.

    Returns:
        The weights and the optimizer's state.
    """
    steps, teacher = task.steps(epochs), task.program
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    optimizer = wrap(optimizer, steps) if wrap is not None else optimizer

    @jax.jit
    def step(weights: Any, state: Any, known: Any, image: jax.Array, label: jax.Array) -> tuple[Any, Any]:
        def loss(weights: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            logits, statistics = held(training, state)(weights, image)
            hard = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
            if not distil:
                return hard, statistics
            answers = jax.nn.softmax(teacher.fn(known, image) / TEMPERATURE)
            soft = optax.kl_divergence(jax.nn.log_softmax(logits / TEMPERATURE), answers).mean() * TEMPERATURE**2
            return (hard + soft) / 2, statistics

        gradients, statistics = jax.grad(loss, has_aux=True)(weights)
        updates, state = optimizer.update(gradients, state, weights)
        return {**optax.apply_updates(weights, updates), **statistics}, state

    random = np.random.default_rng(seed)
    weights = jax.tree.map(jnp.asarray, weights)
    state = optimizer.init(weights)
    for _ in range(epochs):
        order = random.permutation(len(task.images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            moved = np.roll(task.images[rows], tuple(random.integers(-2, 3, 2)), axis=(1, 2))
            weights, state = step(weights, state, teacher.weights, moved, task.labels[rows])
    return weights, state


def gradual(steps: int) -> train.Schedule:
    """From nothing to the final sparsity."""
    return train.polynomial(0, max(2, int(PRUNING_SHARE * steps)), every=EVERY)


def prune_plan(program: lx.Program, sparsity: float, distribution: str, method: str = "magnitude") -> lx.Plan:
    """All sites at one sparsity."""
    return resolve(prune_recipe(sparsity, distribution, method), program)


def prune_recipe(sparsity: float, distribution: str, method: str = "magnitude") -> lx.Recipe:
    """The recipe of `prune_plan`."""
    text = f'[[prune]]\nsites = ".*"\nsparsity = {sparsity}\ndistribution = "{distribution}"\nmethod = "{method}"'
    return lx.Recipe.parse(f'on_unsupported = "keep"\nfold = false\n{text}', name=f"{method} {sparsity}")


def codebook_plan(program: lx.Program) -> lx.Plan:
    """All sites with 16 shared values a weight, float arithmetic."""
    text = f'[[quantize]]\nsites = ".*"\nweights = "{FORMAT}"\nactivations = "none"\ngranularity = "tensor"'
    return resolve(lx.Recipe.parse(f'on_unsupported = "keep"\nfold = false\n{text}', name=FORMAT), program)


def share_values(task: Task, program: lx.Program, *, epochs: int, what: str, seed: int) -> lx.Program:
    """A pruned program with its weights' values shared and trained on, values and weights (arXiv:1510.00149, 3.3).

    Zero stays one of the values, and masks hold what was pruned at it.
    """
    plan = codebook_plan(program)
    plain = lx.passes.quantize(program, plan)
    first = {path: plain.weights[path].codebook for path in program.masks}
    quantized = lx.passes.fake_quant(program.fn, plan)

    def levels(trained: Mapping[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
        fixed = {path: jnp.where(first[path] == 0, 0.0, level) for path, level in trained.items()}
        return {path: {"codebook": jnp.sort(level)} for path, level in fixed.items()}

    def fn(trained: Any, image: jax.Array) -> jax.Array:
        held = lx.passes.masked(lambda weights, image: quantized(weights, image, scales=levels(trained["l"])), masks)
        return held(trained["w"], image)

    masks = program.masks
    start = {"w": program.weights, "l": first}
    found = task.learned(f"{what}-{FORMAT}", start, fn=fn, epochs=epochs, rate=3e-4, seed=seed)
    zeroed = {path: jnp.where(masks[path], w, 0.0) if path in masks else w for path, w in found["w"].items()}
    return lx.passes.quantize(program.replace(weights=zeroed), plan, scales=levels(found["l"]))
