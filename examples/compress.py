"""Compress a model in steps with fine-tuning in between: shrink, prune, quantize to 4 bits, compile.

    python examples/compress.py [--epochs N]

Uses the CNN of `digits.py` on scikit-learn's handwritten digits. Prints a row after each step: accuracy on 450 held-out
images, operations, bytes of the weights in memory and in an artifact, and milliseconds per call. Writes
build/compress/digits.lepton.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import lepton_xla as lx
from lepton_xla import train
from lepton_xla.passes.planning import resolve

FOLDER = pathlib.Path(__file__).parent.parent / "build" / "compress"
BATCH = 64
TIMED_BATCH, ROUNDS = 32, 50
FOUR_BITS = lx.Recipe.parse('[[quantize]]\nsites = ".*"\nweights = "int4"\nactivations = "none"', name="4 bits")
COLUMNS = "{:<28}{:>11}{:>14}{:>16}{:>15}{:>9}{:>10}"
console = Console(width=120, highlight=False)


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=digits.EPOCHS, help="epochs of each training")
    epochs = parser.parse_args().epochs

    inputs = {"image": lx.TensorSpec(("batch", 8, 8, 1), "float32")}
    program = lx.from_linen(digits.DigitsNet(), digits.train(epochs), inputs)
    console.print(
        COLUMNS.format("", "accuracy", "operations", "weights, bytes", "on disk, bytes", "ms", "of float"),
        soft_wrap=True,
    )
    report("float", program, program)

    # Fold batch norms first, because their statistics belong to channels that shrinking removes.
    small = lx.passes.shrink(lx.passes.fold(program), flops=0.5, round_to=8)
    report("shrunk to half", small, program)
    small = small.replace(weights=learn(small.fn, small.weights, program, epochs)[0])
    report("  trained on", small, program)

    rules = [train.PruneRule(sites=".*kernel", sparsity=0.8, distribution="global")]
    steps = epochs * (len(digits.data()[0]) // BATCH)
    # Prune gradually during the first two thirds of the steps; the rest fine-tunes.
    schedule = train.polynomial(0, max(1, 2 * steps // 3), every=20)
    wrap = lambda optimizer: train.sparsify(optimizer, rules, schedule=schedule)  # noqa: E731
    weights, masks = train.finalize(*learn(small.fn, small.weights, program, epochs, wrap))
    small = small.replace(weights=weights, masks=masks)
    report("pruned while trained on", small, program)

    plan = resolve(FOUR_BITS, small)
    quantized = lx.passes.masked(lx.passes.fake_quant(small.fn, plan), small.masks)
    weights, _ = learn(quantized, small.weights, program, epochs, rate=3e-4)
    held = {path: jnp.where(small.masks[path], w, 0) if path in small.masks else w for path, w in weights.items()}
    small = lx.optimize(small.replace(weights=held), FOUR_BITS)
    report("in 4 bits, trained on", small, program)

    path = FOLDER / "digits.lepton"
    lx.compile(small, {"batch": (1, 8, 32)}, name="digits").save(path, overwrite=True)
    served = digits.evaluate(lx.load(path))["accuracy"]
    ratio = program.weights_bytes / stored_bytes(path)
    console.print(f"{path.relative_to(FOLDER.parent.parent)}: accuracy {served:.2%}, weights {ratio:.1f} times smaller")


def learn(
    fn: Callable[..., jax.Array],
    weights: Any,
    teacher: lx.Program,
    epochs: int,
    wrap: Callable[[Any], Any] = lambda optimizer: optimizer,
    *,
    rate: float = 2e-3,
) -> tuple[Any, Any]:
    """Fine-tune `fn(weights, images)`; half of the loss is the divergence from the float model's answers.

    Returns:
        The weights and the optimizer state.
    """
    images, labels, _, _ = digits.data()
    optimizer = wrap(optax.adam(optax.cosine_decay_schedule(rate, epochs * (len(images) // BATCH))))

    @jax.jit
    def step(weights: Any, state: Any, image: jax.Array, label: jax.Array) -> tuple[Any, Any]:
        def loss(weights: Any) -> jax.Array:
            logits = fn(weights, image)
            hard = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            answers = jax.nn.softmax(teacher.fn(teacher.weights, image))
            return (hard + optax.kl_divergence(jax.nn.log_softmax(logits), answers)).mean() / 2

        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    state, shuffle = optimizer.init(weights), np.random.default_rng(0)
    for _ in range(epochs):
        order = shuffle.permutation(len(images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            weights, state = step(weights, state, images[rows], labels[rows])
    return weights, state


def report(name: str, program: lx.Program, plain: lx.Program) -> None:
    """Print one row."""
    path = FOLDER / "step.lepton"
    lx.compile(program, {"batch": (TIMED_BATCH,)}, name="step").save(path, overwrite=True)
    latency, of_float = times(program, plain)
    predict = lambda image: {"output": np.asarray(jax.jit(program.fn)(program.weights, image))}  # noqa: E731
    row = COLUMNS.format(
        name,
        f"{digits.evaluate(predict)['accuracy']:.2%}",
        f"{lx.passes.cost(program, {'batch': 1}).flops:,}",
        f"{program.weights_bytes:,}",
        f"{stored_bytes(path):,}",
        f"{latency:.3f}",
        f"{of_float:.2f}",
    )
    console.print(row, soft_wrap=True)


def stored_bytes(path: pathlib.Path) -> int:
    """Bytes of an artifact's weights folder."""
    return sum(file.stat().st_size for file in (path / "weights").rglob("*") if file.is_file())


def times(program: lx.Program, plain: lx.Program) -> tuple[float, float]:
    """Median milliseconds per call, and the ratio to the float model; the two take turns."""
    images = jnp.asarray(digits.data()[2][:TIMED_BATCH])
    calls = [jax.jit(each.fn).lower(each.weights, images).compile() for each in (program, plain)]
    rounds: list[tuple[float, ...]] = []
    for _ in range(ROUNDS):
        row = []
        for call, each in zip(calls, (program, plain), strict=True):
            jax.block_until_ready(call(each.weights, images))
            start = time.perf_counter()
            jax.block_until_ready(call(each.weights, images))
            row.append((time.perf_counter() - start) * 1e3)
        rounds.append(tuple(row))
    return statistics.median(row[0] for row in rounds), statistics.median(row[0] / row[1] for row in rounds)


if __name__ == "__main__":
    main()
