"""Quantization-aware training: accuracy regained at W4A4 on LeNet-5, and cost of a training step.

    python benchmarks/qat.py [--peers] [--quick] [--json FILE]

LeNet-5 with 4-bit weights and activations: the float model, that model quantized without training, and fine-tuned with
`fake_quant`, over several seeds. The cost is that of one AdamW step of a scanned transformer, plain and with
`fake_quant`, taking turns. Rows are kept when they are measured, so an interrupted run can continue; `--fresh` measures
everything again. `--peers` adds qwix, if it is installed. Writes docs/benchmarks/qat.md.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import journal
import models
import numpy as np
import optax
from journal import Journal
from models import transformer
from models.base import mnist
from rich.console import Console

import lepton_xla as lx
from lepton_xla.passes.planning import resolve
from lepton_xla.passes.quantization.fake_quantization import initial_scales

TARGET_REGAINED, TARGET_STEP_RATIO = 0.9, 1.4
# Settings of fine-tuning LeNet-5, chosen on rows 6000-7999 of the training images with a float model of the other
# 6,000.
EPOCHS, SEEDS, BATCH, SHIFT = 6, 5, 64, 2
RATE, TEMPERATURE = 3e-3, 2.0
console = Console(width=120, highlight=False)


def recipe(weights: str, activations: str, more: str = "") -> lx.Recipe:
    """A recipe with these formats at every site: a scale per output channel, and per row of activations."""
    text = f'[[quantize]]\nsites = ".*"\nweights = "{weights}"\nactivations = "{activations}"\n{more}'
    return lx.Recipe.parse('on_unsupported = "keep"\nfold = false\n' + text, name=f"{weights} x {activations}")


def accuracy(quick: bool, with_qwix: bool, kept: Journal) -> dict[str, Any]:
    """Accuracy of LeNet-5 in float, in W4A4, and fine-tuned; `regained` is the share of the lost accuracy regained.

    Rows in the journal are not measured again.
    """
    model = models.load("lenet5", quick=quick)
    program = model.spec.program()
    train_x, train_y, _, _ = mnist()
    epochs, seeds = (EPOCHS, SEEDS) if not quick else (1, 1)
    train_x, train_y = (train_x, train_y) if not quick else (train_x[:512], train_y[:512])
    evaluate = model.spec.evaluate
    assert evaluate is not None
    console.print("  the float model's logits of every training image, moved every way ...")
    lessons = functools.cache(lambda: Lessons(program.fn, program.weights, train_x, train_y))

    def judged(apply: Callable[..., jax.Array], weights: Any) -> float:
        jitted = jax.jit(apply)
        return evaluate(lambda image: {"output": np.asarray(jitted(weights, image))})["accuracy"]

    def row(
        name: str, apply: Callable[..., jax.Array], weights: Any, as_is: Callable[[], float] | None = None
    ) -> dict[str, Any]:
        console.print(f"  {name} ...")
        started = time.perf_counter()
        found = {"name": name, "ptq": as_is() if as_is is not None else judged(apply, weights)}
        found["trained"] = [
            judged(apply, lessons().teach(apply, weights, epochs=epochs, seed=seed)) for seed in range(seeds)
        ]
        return found | {"seconds": time.perf_counter() - started}

    plan = resolve(recipe("int4", "int4"), program)
    rows = [
        kept.row("float", lambda: row("float", program.fn, program.weights)),
        kept.row(
            "lepton_xla int4 x int4",
            lambda: row("lepton_xla int4 x int4", lx.passes.fake_quant(program.fn, plan), program.weights),
        ),
    ]
    static = resolve(recipe("int4", "int4", 'dynamic = false\ncalibration = "mse"\n'), program)

    def with_learned_scales() -> dict[str, Any]:
        ranges = lx.passes.calibrate(program, static, model.spec.calibration_batches() or ())
        quantized = lx.passes.fake_quant(program.fn, static, ranges)
        return row(
            "lepton_xla int4 x int4, learned scales",
            lambda learned, image: quantized(learned["weights"], image, scales=learned["scales"]),
            {"weights": program.weights, "scales": initial_scales(program.weights, static, ranges)},
            lambda: judged(quantized, program.weights),
        )

    rows.append(kept.row("lepton_xla int4 x int4, learned scales", with_learned_scales))
    if with_qwix:
        assert model.linen is not None
        module, variables = model.linen
        try:
            apply = _qwix(module, "int4").apply
            rows.append(kept.row("qwix int4 x int4", lambda: row("qwix int4 x int4", apply, variables)))
        except Exception as error:  # a peer may fail in any way; the table shows its message
            rows.append({"name": "qwix int4 x int4", "failed": _reason(error)})
    baseline = rows[0]["ptq"]
    for found in rows:
        if "failed" in found:
            continue
        found["trained_median"] = statistics.median(found["trained"])
        found["trained_mean"] = statistics.fmean(found["trained"])
        lost = baseline - found["ptq"]
        if lost > 0:
            found["regained_seeds"] = [(after - found["ptq"]) / lost for after in found["trained"]]
            found["regained"] = statistics.median(found["regained_seeds"])
            found["regained_mean"] = statistics.fmean(found["regained_seeds"])
    return {"data": model.data, "epochs": epochs, "seeds": seeds, "rows": rows}


class Lessons:
    """Training images, shifted by up to `SHIFT` pixels in each direction, with the float model's logits for each.

    Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531): labels and the float model's answers have equal
    weight.
    """

    def __init__(self, teacher: Callable[..., jax.Array], weights: Any, images: np.ndarray, labels: np.ndarray) -> None:
        """Args: the float model; images [n, 28, 28, 1]; labels [n]."""
        self.images, self.labels = images, labels
        self.moves = list(itertools.product(range(-SHIFT, SHIFT + 1), repeat=2))
        jitted, cuts = jax.jit(teacher), range(0, len(images), 500)
        logits = [[jitted(weights, self.moved(move, slice(cut, cut + 500))) for cut in cuts] for move in self.moves]
        self.logits = np.stack([np.concatenate(parts) for parts in logits])

    def moved(self, move: tuple[int, int], rows: Any) -> np.ndarray:
        """Shifted images of these rows."""
        return np.roll(self.images[rows], move, axis=(1, 2))

    def teach(self, apply: Callable[..., jax.Array], weights: Any, *, epochs: int, seed: int) -> Any:
        """Train with Adam and a decaying rate; return the weights. The seed determines the order of the batches."""
        steps = epochs * (len(self.images) // BATCH)
        optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))

        @jax.jit
        def step(weights: Any, state: Any, images: jax.Array, labels: jax.Array, taught: jax.Array) -> tuple[Any, Any]:
            def loss(weights: Any) -> jax.Array:
                logits = apply(weights, images)
                hard = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
                soft = optax.losses.softmax_cross_entropy(logits / TEMPERATURE, jax.nn.softmax(taught / TEMPERATURE))
                return (0.5 * hard + 0.5 * TEMPERATURE**2 * soft).mean()

            updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
            return optax.apply_updates(weights, updates), state

        random = np.random.default_rng(100 + seed)
        weights = jax.tree.map(jnp.asarray, weights)
        state = optimizer.init(weights)
        for _ in range(epochs):
            order = random.permutation(len(self.images))
            for start in range(0, len(order) - BATCH + 1, BATCH):
                rows, move = order[start : start + BATCH], random.integers(len(self.moves))
                images = self.moved(self.moves[move], rows)
                weights, state = step(weights, state, images, self.labels[rows], self.logits[move, rows])
        return weights


def _qwix(module: Any, name: str) -> Any:
    import qwix
    from qwix import QtProvider, QtRule

    # `.+` matches named layers, so products with weights; products of two activations are at the top level.
    rule = QtRule(module_path=".+", weight_qtype=name, act_qtype=name)
    return qwix.quantize_model(module, QtProvider([rule]))


def step_cost(size: transformer.Size, batch: int, options: argparse.Namespace, with_qwix: bool) -> dict[str, Any]:
    """Milliseconds of one training step of the scanned transformer, and ratios to the plain one in the same rounds."""
    weights = transformer.init(size)
    random = np.random.default_rng(0)
    images = random.random((batch, size.seq, size.inputs)).astype(np.float32)
    labels = random.integers(0, 10, batch).astype(np.int32)
    plain = lambda weights, x: transformer.encode(weights, x, size.heads)  # noqa: E731
    program = lx.trace(plain, weights, {"x": lx.TensorSpec(("batch", size.seq, size.inputs), "float32")})
    applied: dict[str, tuple[Callable[..., jax.Array], Any]] = {"plain step": (plain, weights)}
    for name in ("int8", "int4"):
        plan = resolve(recipe(name, name), program)
        applied[f"fake_quant {name} x {name}"] = (lx.passes.fake_quant(plain, plan), weights)
    module = transformer.LinenTransformer(size)
    applied["plain step, Flax Linen"] = (module.apply, {"params": weights})
    if with_qwix:
        for name in ("int8", "int4"):
            applied[f"qwix {name} x {name}, Flax Linen"] = (_qwix(module, name).apply, {"params": weights})
    calls, failed = {}, []
    for name, (apply, start) in applied.items():
        console.print(f"  {name} ...")
        try:
            calls[name] = _step(apply, start, images, labels)
        except Exception as error:  # a peer may fail in any way; the table shows its message
            if "qwix" not in name:
                raise
            failed.append({"name": name, "failed": _reason(error)})
    times = harness.interleave(calls, rounds=options.rounds, seconds=options.seconds)
    rows = [
        {
            "name": name,
            "step_ms": statistics.median(found) * 1e3,
            "ratio": harness.ratio(times, name, "plain step"),
            "ratio_own": harness.ratio(times, name, "plain step, Flax Linen" if "Linen" in name else "plain step"),
        }
        for name, found in times.items()
    ]
    shape = f"{size.layers} layers, width {size.width}, {size.heads} heads, batch {batch} x {size.seq}"
    return {"shape": shape, "rows": [*rows, *failed]}


def _reason(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def _step(apply: Callable[..., jax.Array], weights: Any, images: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    optimizer = optax.adamw(1e-3)

    def step(weights: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        def loss(weights: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(apply(weights, images), labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    return harness.compiled(step, weights, optimizer.init(weights), images, labels)


def tables(result: dict[str, Any]) -> tuple[str, str]:
    """The two Markdown tables."""
    found = result["accuracy"]
    baseline = found["rows"][0]["ptq"]
    cells = []
    for row in found["rows"]:
        if "failed" in row:
            cells.append([row["name"], "", "", row["failed"], "", ""])
            continue
        cell = [row["name"], harness.percent(row["ptq"]), f"{100 * (baseline - row['ptq']):+.2f}"]
        cell.append(", ".join(harness.percent(value) for value in row["trained"]))
        cell.append(f"{harness.percent(row['trained_median'])}, {harness.percent(row['trained_mean'])}")
        shares = [f"{100 * row[share]:.0f} %" for share in ("regained", "regained_mean") if share in row]
        cells.append([*cell, ", ".join(shares)])
    trained = f"after {found['epochs']} more epochs, {found['seeds']} seeds"
    header = ["", "accuracy % as it is", "lost, points", trained, "median, mean", "regained: median, mean"]
    return harness.markdown(header, cells), step_tables(result["steps"])


def step_tables(found: Sequence[dict[str, Any]]) -> str:
    """Step times."""
    parts = []
    for cost in found:
        rows = [
            [row["name"], row["failed"], "", ""]
            if "failed" in row
            else [row["name"], f"{row['step_ms']:.1f}", f"{row['ratio']:.2f}", f"{row['ratio_own']:.2f}"]
            for row in cost["rows"]
        ]
        header = [cost["shape"], "ms a step", "ratio to the plain step", "to the plain step of its own library"]
        parts.append(harness.markdown(header, rows))
    return "\n\n".join(parts)


def page(result: dict[str, Any]) -> str:
    """docs/benchmarks/qat.md."""
    run, (first, second) = result["run"], tables(result)
    parts = [
        "# Training with quantization",
        "## W4A4 on LeNet-5",
        (
            "Weights and activations have 4 bits at every convolution and dense layer: weights with one scale per "
            'output channel, activations with one scale per row (per example for convolutions). "As it is" is the '
            "trained float model, rounded without any training. It is then fine-tuned with `lx.passes.fake_quant(fn, "
            "plan)`; half of the loss is from labels, half from the float model's logits (distillation). The first "
            "row is the float model, fine-tuned in the same way. Seeds are paired: every row sees the same images in "
            "the same order. Learned scales (LSQ, arXiv:1902.08153) start from `initial_scales` and are trained with "
            'the weights, with one scale per tensor for activations; their "as it is" uses calibrated activation '
            "scales."
        ),
        first,
        f"Data: {result['accuracy']['data']}. Target: at least {100 * TARGET_REGAINED:.0f} % of the loss regained.",
        "## Cost of a training step",
        (
            "One step of AdamW on a transformer whose layers are stacked under `lax.scan`, with random weights and "
            "data. Figures are medians over rounds in which all rows take turns. qwix accepts modules only, so its "
            f"rows use the same mathematics in Flax Linen. Target: at most {TARGET_STEP_RATIO} times the plain step, "
            "and no more than qwix's ratio."
        ),
        second,
        harness.provenance(run),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", action="store_true", help="also qwix, where it is installed")
    parser.add_argument("--quick", action="store_true", help="little training, a small model, no page: a smoke test")
    harness.add_pages(parser)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    journal.add_option(parser)
    parser.add_argument("--rounds", type=int, default=31, help="turns of each step")
    parser.add_argument("--seconds", type=float, default=40.0, help="of one transformer, at most")
    options = parser.parse_args()
    run = {"load": f"{os.getloadavg()[0]:.1f}", "command": harness.command()}
    with_qwix = options.peers and importlib.util.find_spec("qwix") is not None
    if options.peers and not with_qwix:
        console.print("not installed, so left out: qwix")
    sizes = [(transformer.Size(4, 128, 4, 64), 8), (transformer.Size(6, 256, 8, 64), 16)]
    if options.quick:
        options.rounds, options.seconds, sizes = 3, 1.0, [(transformer.Size(2, 32, 2, 8), 2)]
    kept = journal.opened("qat", options, "rounds", "seconds")
    result: dict[str, Any] = {"steps": []}
    for size, batch in sizes:
        console.print(f"a training step of {size.layers} layers of width {size.width} ...")
        name = f"step: {size}, batch {batch}{', qwix' if with_qwix else ''}"
        result["steps"].append(kept.row(name, functools.partial(step_cost, size, batch, options, with_qwix)))
    try:
        console.print("LeNet-5 at W4A4 ...")
        result["accuracy"] = accuracy(options.quick, with_qwix, kept)
    except models.MissingError as error:
        console.print(f"skipped: {error}")
        return 0
    result["run"] = harness.machine(("qwix",) if with_qwix else ()) | run
    console.print("\n\n".join(tables(result)), soft_wrap=True)
    if options.pages and not options.quick:
        harness.publish("qat", result, page)
    harness.write_json(options.json, result)
    console.print(f"repeat with: {harness.command()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
