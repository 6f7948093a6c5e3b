"""A small residual network, its smaller student, and what it takes to learn other digits from a few examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import digits_data
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import reports
import runs

import lepton_xla as lx
from lepton_xla import train

STEPS, BATCH, RATE, DECAY, AVERAGE = 2000, 64, 5e-3, 1e-3, 0.99
LARGE, SMALL = (16, 32, 64), (12, 24, 48)
FIRST_NEW, EXAMPLES = 5, 20  # of the transfer

type Batches = Callable[[int], dict[str, np.ndarray]]


class Net(nn.Module):
    """Float32 [batch, 28, 28, 1] in [0, 1] to 10 logits."""

    widths: Sequence[int] = LARGE

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        def normed(x: jax.Array, features: int, window: int, stride: int) -> jax.Array:
            x = nn.Conv(features, (window, window), strides=stride, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = nn.relu(normed(image, self.widths[0], 3, 1))
        for features in self.widths[1:]:
            y = nn.relu(normed(x, features, 3, 2))
            x = nn.relu(normed(y, features, 3, 1) + normed(x, features, 1, 2))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def model(seed: int, widths: Sequence[int] = LARGE) -> train.Model:
    """An untrained network."""
    net = Net(widths)
    variables = net.init(jax.random.key(seed), digits_data.data().images[:1])
    return train.from_linen(net, variables, {"image": lx.TensorSpec(("batch", 28, 28, 1), "float32")})


def batches_of(images: np.ndarray, labels: np.ndarray, seed: int) -> Batches:
    """The batch of a step, changed a little: every row once before any comes again."""

    def batch(step: int) -> dict[str, np.ndarray]:
        each = max(1, len(images) // BATCH)
        order = np.random.default_rng([seed, 0, step // each]).permutation(len(images))
        rows = order[np.arange(step % each * BATCH, (step % each + 1) * BATCH) % len(order)]
        return {"image": digits_data.augmented(images[rows], np.random.default_rng([seed, 1, step])),
                "label": labels[rows]}  # fmt: skip

    return batch


def updates(steps: int, rate: float = RATE) -> optax.GradientTransformation:
    """AdamW with a rate that rises, then falls to zero."""
    rates = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 25), steps)
    return optax.adamw(rates, weight_decay=DECAY)


def fitted(start: train.Model, loss: train.Loss, batch: Batches, steps: int, name: str) -> lx.Program:
    """Train once, then read what was trained; a run that was broken off goes on."""
    # What is trained on depends on what judges, so it is part of the name.
    kept_as = reports.folder() / "images" / "runs" / f"{name}-{steps}-of-{len(digits_data.data().images)}"

    def trained() -> Mapping[str, jax.Array]:
        kept = train.Checkpoints(kept_as, every=200, keep=1)
        return train.fit(
            start, loss, updates(steps), batch, steps=steps, ema=AVERAGE, checkpoint=kept, progress=False
        ).program.weights  # fmt: skip

    weights = runs.once(kept_as.with_name(f"{kept_as.name}.npz"), trained)
    return start.program.replace(weights={path: jnp.asarray(weights[path]) for path in start.program.weights})


def goes_on(untrained: train.Model, program: lx.Program) -> train.Model:
    """The model with the weights of a program that it became."""
    weights, state = ({path: program.weights[path] for path in part} for part in (untrained.weights, untrained.state))
    return train.Model(untrained.apply, weights, state, program)


@functools.cache
def teacher(seed: int, steps: int = STEPS) -> lx.Program:
    """The large network, in float."""
    known, untrained = digits_data.data(), model(seed)
    batch = batches_of(known.images, known.labels, seed)
    return fitted(untrained, train.supervised(untrained), batch, steps, f"teacher-{seed}")


@functools.cache
def student(seed: int, steps: int = STEPS) -> lx.Program:
    """The small network, taught by the large one and by labels."""
    known, untrained = digits_data.data(), model(seed, SMALL)
    batch = batches_of(known.images, known.labels, seed + 100)
    loss = train.distill(untrained, teacher(seed, steps), [train.Logits(weight=0.7), train.Labels(weight=0.3)])
    return fitted(untrained, loss, batch, steps, f"student-{seed}")


def accuracy(program: lx.Program, images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Share of right answers, and the lowest recall of a class."""
    run = jax.jit(program.fn)
    found = [np.asarray(run(program.weights, images[k : k + 500])).argmax(-1) for k in range(0, len(images), 500)]
    right = np.concatenate(found) == labels
    return float(right.mean()), min(float(right[labels == each].mean()) for each in np.unique(labels))


def transferred(seed: int, steps: int) -> dict[str, float]:
    """From the digits 0 to 4 to 5 to 9 with 20 examples of each: accuracy on the latter, by what is trained."""
    known, untrained = digits_data.data(), model(seed)
    old = known.labels < FIRST_NEW
    batch = batches_of(known.images[old], known.labels[old], seed)
    base = fitted(untrained, train.supervised(untrained), batch, steps, f"zero-to-four-{seed}")
    start = goes_on(untrained, base)
    few = np.concatenate([np.flatnonzero(known.labels == each)[:EXAMPLES] for each in range(FIRST_NEW, 10)])
    batch = batches_of(known.images[few], known.labels[few], seed)
    ways = {
        "last_layer": train.freeze(start, ["(?!params/Dense_0/).*"]),
        "low_rank": train.low_rank(start, 4, include=[".*/kernel"], also_train=["params/Dense_0/.*"]),
    }
    new = known.judged_labels >= FIRST_NEW
    found: dict[str, float] = {}
    for name, way in ways.items():
        program = fitted(way, train.supervised(way), batch, steps, f"{name}-{seed}")
        program = program if name == "last_layer" else train.merge(program, start)
        found[f"transfer_{name}"] = accuracy(program, known.judged[new], known.judged_labels[new])[0]
        found[f"transfer_{name}_weights"] = sum(weight.size for weight in way.weights.values())
    return found
