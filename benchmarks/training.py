"""What `lx.train.fit` costs beside the bare step: one MLP in a loop by hand, in other loops, and in `fit`.

    python benchmarks/training.py [--peers] [--quick] [--json FILE]

A step takes about 5 ms on two cores. The loops take turns; each turn's first steps, which compile, are not counted. The
loop by hand only calls the compiled step; `fit` also reads data, checks that loss and gradients are finite, and logs.
`--peers` adds Tunix's trainer, if the package google-tunix is installed. Writes docs/benchmarks/training.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

import lepton_xla as lx
from lepton_xla.train.state import State
from lepton_xla.train.steps import make_step

TARGET_RATIO = 1.03
WIDTH, ROWS, WARM = 512, 512, 10
BARE, CHECKED = "by hand", "the step of `fit` by hand"
console = Console(width=120, highlight=False)


class Net(nnx.Module):
    """784 -> 512 -> 512 -> 10."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(784, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.second(nnx.relu(self.first(x)))))


def batch() -> dict[str, np.ndarray]:
    """Random rows; what they are does not change the time."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(ROWS, 784)).astype(np.float32)
    return {"x": x, "label": draw.integers(0, 10, ROWS).astype(np.int32)}


def network() -> lx.train.Model:
    """The MLP as `fit` takes it."""
    return lx.train.from_nnx(Net(nnx.Rngs(0)), {"x": lx.TensorSpec(("batch", 784), "float32")})


def by_hand(steps: int) -> float:
    """Seconds a step of a loop that calls the compiled step and nothing else."""
    model, optimizer, key = network(), optax.adam(1e-3), jax.random.key(0)
    loss = lx.train.supervised(model)

    def step(state: Any, given: Any, index: Any) -> Any:
        weights, moments = state
        value = lambda weights: loss(weights, given, jax.random.fold_in(key, index), {})[0]  # noqa: E731
        found, grads = jax.value_and_grad(value)(weights)
        updates, moments = optimizer.update(grads, moments, weights)
        return (optax.apply_updates(weights, updates), moments), found

    weights = jax.tree.map(jnp.copy, model.weights)
    return bare(jax.jit(step, donate_argnums=0), (weights, optimizer.init(weights)), steps)


def with_check(steps: int) -> float:
    """The same with the step of `fit`, which changes nothing if loss or gradients are not finite."""
    model, optimizer = network(), optax.adam(1e-3)
    step = make_step(lx.train.supervised(model), optimizer)
    weights = jax.tree.map(jnp.copy, model.weights)
    state = State.first(weights, {}, optimizer.init(weights), jax.random.key(0))
    checked = jax.jit(lambda state, given, index: step(state, given, None), donate_argnums=0)
    return bare(checked, state, steps)


def bare(step: Callable[[Any, Any, int], tuple[Any, Any]], state: Any, steps: int) -> float:
    """Seconds a step of a loop that calls `step(state, batch, index)` and waits for every second one."""
    given, start = batch(), 0.0
    for index in range(steps):
        if index == WARM:
            jax.block_until_ready(state)
            start = time.perf_counter()
        state, found = step(state, jax.device_put(given), index)
        if index % 2 == 0:
            jax.block_until_ready(found)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / (steps - WARM)


def in_nnx(steps: int) -> float:
    """Seconds a step of the loop of Flax's own guide."""
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(model: Net, optimizer: Any, given: Any) -> jax.Array:
        def value(model: Net) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(given["x"]), given["label"]).mean()

        found, grads = nnx.value_and_grad(value)(model)
        optimizer.update(model, grads)
        return found

    given, start = batch(), 0.0
    for index in range(steps):
        if index == WARM:
            start = time.perf_counter()
        found = step(model, optimizer, jax.device_put(given))
        if index % 2 == 0 or index == WARM - 1:
            jax.block_until_ready(found)
    jax.block_until_ready(nnx.state(model))
    return (time.perf_counter() - start) / (steps - WARM)


def in_tunix(steps: int) -> float:
    """Seconds a step of Tunix's trainer, without its progress bar."""
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

    def value(model: Net, x: jax.Array, label: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), label).mean()

    given, began = batch(), [0.0]

    def data() -> Iterator[Any]:
        for step in range(steps):
            if step == WARM:
                began[0] = time.perf_counter()
            yield given

    model = Net(nnx.Rngs(0))
    trainer = PeftTrainer(model, optax.adam(1e-3), TrainingConfig(eval_every_n_steps=10 * steps))
    trainer = trainer.with_loss_fn(value).with_gen_model_input_fn(lambda given: given)
    trainer.train(data())
    jax.block_until_ready(nnx.state(model))
    return (time.perf_counter() - began[0]) / (steps - WARM)


def in_fit(steps: int) -> float:
    """Seconds a step of `fit`, from the data of one step to that of a later one: without how it begins and ends."""
    model = network()
    given, began = batch(), {}

    def data(step: int) -> Any:
        began[step] = time.perf_counter()
        return given

    lx.train.fit(model, lx.train.supervised(model), optax.adam(1e-3), data, steps=steps + 1, progress=False)
    return (began[steps] - began[WARM]) / (steps - WARM)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The loops' times in Markdown."""
    ratio = "{1:.3f} ({0:.3f} to {2:.3f})".format
    cells = [[row["name"], f"{row['ms']:.2f}", ratio(*row["plain"]), ratio(*row["checked"])] for row in rows]
    return harness.markdown(["", "ms a step", f"of {BARE}", f"of {CHECKED}"], cells)


def page(found: Mapping[str, Any]) -> str:
    """docs/benchmarks/training.md."""
    rounds, steps = found["turns"]
    own = next(row for row in found["rows"] if row["name"] == "lx.train.fit")
    whole, loop = own["plain"][1], own["checked"][1]
    met = "met" if loop <= TARGET_RATIO else "missed"
    parts = [
        "# What the training loop costs",
        (
            f"One step of Adam on an MLP, 784-{WIDTH}-{WIDTH}-10 in Flax NNX, {ROWS} rows of random data. The loop by "
            "hand calls a compiled step and waits for every second one: a step that only updates the weights, and that "
            "of `fit`, which changes nothing if loss or gradients are not finite, and so reads all gradients once "
            "more. The others are `nnx.jit` with `nnx.Optimizer` as in Flax's guide, Tunix's `PeftTrainer` where it is "
            "installed, and `lx.train.fit`, which reads and examines data, averages its metrics over ten steps, and "
            f"looks for SIGTERM. The loops take turns, {rounds} of {steps} steps each, since the machine's speed "
            f"drifts; the first {WARM} steps of a turn are not counted, nor the few milliseconds in which `fit` makes "
            "its program at the end. Ratios are medians over the turns, with their quartiles."
        ),
        table(found["rows"]),
        (
            f"Target: the loop of `lx.train.fit` takes at most {TARGET_RATIO} of its step by hand: {loop:.3f}, {met}. "
            f"With its check it takes {whole:.3f} of a step that has none."
        ),
        harness.provenance(found["run"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run all loops in turn, print and write their times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="also Tunix, where it is installed")
    parser.add_argument("--quick", action="store_true", help="little of everything, no page: a smoke test")
    harness.add_pages(parser)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    given = parser.parse_args()
    load = f"{os.getloadavg()[0]:.1f}"
    rounds, steps = (2, 30) if given.quick else (25, 110)
    loops = {BARE: by_hand, CHECKED: with_check, "Flax NNX": in_nnx}
    if given.peers and importlib.util.find_spec("tunix") is not None:
        loops["Tunix"] = in_tunix
    elif given.peers:
        console.print("not installed, so Tunix is left out: google-tunix")
    loops["lx.train.fit"] = in_fit
    cache = tempfile.TemporaryDirectory()  # so that a turn has little else than steps
    jax.config.update("jax_compilation_cache_dir", cache.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(rounds):
        order = list(loops)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            times[name].append(loops[name](steps))
    rows = []
    for name, found in times.items():
        row: dict[str, Any] = {"name": name, "ms": statistics.median(found) * 1e3}
        for key, other in (("plain", BARE), ("checked", CHECKED)):
            ratios = [own / theirs for own, theirs in zip(found, times[other], strict=True)]
            row[key] = statistics.quantiles(ratios, n=4)
        rows.append(row)
    console.print(table(rows), soft_wrap=True)
    run = harness.machine(("google-tunix",) if "Tunix" in loops else ())
    result = {"rows": rows, "turns": [rounds, steps], "run": run | {"load": load, "command": harness.command()}}
    harness.write_json(given.json, result)
    if given.pages and not given.quick:
        harness.publish("training", result, page)
    console.print(f"repeat with: {harness.command()}")


if __name__ == "__main__":
    main()
