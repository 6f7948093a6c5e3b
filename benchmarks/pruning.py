"""What pruning and shrinking bring: bytes at no loss, curves of accuracy over sparsity, latency of shrunk models.

    python benchmarks/pruning.py [--sections NAMES] [--models NAMES] [--peers] [--quick] [--json FILE]

Sections: `compress`: LeNet-300-100 and LeNet-5 as small as they get; `curves`: methods of unstructured pruning;
`shrink`: a residual CNN and a transformer with channels, hidden units and heads removed, and in int8; `step`: what a
training step with masks costs. A row is kept when it is measured, so that a run that was stopped goes on where it was;
`--fresh` starts anew. `--peers` adds Torch-Pruning where it and PyTorch are installed. Writes
docs/benchmarks/pruning.md and its plots; a run of some sections replaces theirs only.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import journal
import models
import numpy as np
import optax
from models import residual, sparse, transformer
from models.base import mnist
from models.sparse import Task
from rich.console import Console

import lepton_xla as lx
from lepton_xla import train

RESULTS = harness.PAGES / "pruning.json"
# Model -> sparsity, epochs of pruning, epochs of training with shared values.
COMPRESS = {"lenet5": (0.95, 8, 3), "lenet300": (0.95, 20, 6)}
# Deep Compression (arXiv:1510.00149, table 1), as times smaller; trained on all 60,000 images.
PUBLISHED = {"lenet300": 40, "lenet5": 39}
TARGET_LOST = 0.002
# Model -> epochs of training for each point, and the points: fewer where an epoch takes longer.
CURVES = {
    "residual": (1, (0.5, 0.8, 0.9)),
    "transformer": (2, (0.5, 0.8, 0.9)),
    "lenet5": (2, (0.8, 0.9, 0.95, 0.98)),
    "lenet300": (4, (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)),
}
# Model -> epochs of training after shrinking, and whether half of the loss is from the float model's answers. The
# transformer, which loses more than the CNN, gets as many epochs as it was first trained for.
SHRINK = {"residual": (3, False), "transformer": (6, True)}
# What is left of the operations; the second is 2.1 times fewer.
LEFT = (0.7, 1 / 2.1, 0.3)
# Channels in multiples of a vector of AVX: odd numbers of them are slower than more of them.
ROUND_TO = 8
# Transformers and batches of which a training step is timed.
STEP_SIZES = ((transformer.Size(4, 128, 4, 64), 8), (transformer.Size(6, 256, 8, 64), 16))
TARGET_RATIO, TARGET_STEP_RATIO = 1.6, 1.15
PEER = (
    "Torch-Pruning: the same network, weights and training rows. Its bytes are those of its parameters; its times are "
    "compared with the float model in PyTorch."
)
NO_PEER = "Torch-Pruning was not part of this run; `--peers` adds it."
console = Console(width=120, highlight=False)


def stored_bytes(program: lx.Program) -> int:
    """Bytes of the weights folder of the program's artifact: everything that is stored of the weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.lepton"
        lx.compile(program, dict.fromkeys(program.symbols, (1,)), name="model").save(path)
        return sum(file.stat().st_size for file in (path / "weights").rglob("*") if file.is_file())


def _some(settings: dict[str, Any], options: argparse.Namespace) -> list[tuple[str, Any]]:
    """The models of a section that were asked for; the last only for a smoke test."""
    wanted = [(name, setting) for name, setting in settings.items() if not options.models or name in options.models]
    return wanted[-1 if options.quick else 0 :]


def compress(options: argparse.Namespace) -> dict[str, Any]:
    """LeNets pruned while training, then with 16 shared values a weight, trained: accuracy and bytes of each step."""
    found: dict[str, Any] = {}
    for name, setting in _some(COMPRESS, options):
        found[name] = options.rows.row(f"compress: {name}", lambda name=name, s=setting: _compress(name, *s, options))
    return found


def _compress(name: str, sparsity: float, pruning: int, sharing: int, options: argparse.Namespace) -> dict[str, Any]:
    model = models.load(name, quick=options.quick)
    task = sparse.task(model, quick=options.quick)
    seeds = (0,) if options.quick else (0, 1, 2)
    pruning, sharing = (1, 1) if options.quick else (pruning, sharing)
    plan = sparse.prune_plan(task.program, sparsity, "global")
    longer = task.program.replace(weights=task.learned("longer", task.program.weights, epochs=pruning + sharing))
    rows: dict[str, list[lx.Program]] = {"float": [task.program], "float, trained on for as long": [longer]}
    for seed in seeds:
        console.print(f"  {name}, seed {seed} ...")
        what = f"compress-{sparsity}"
        small = task.pruned(what, plan, epochs=pruning, seed=seed, schedule=sparse.gradual)
        rows.setdefault("pruned while trained on", []).append(small)
        as_is = lx.passes.lower(small, sparse.codebook_plan(small))
        rows.setdefault("and 16 values a weight, as it is", []).append(as_is)
        shared = sparse.share_values(task, small, epochs=sharing, what=what, seed=seed)
        rows.setdefault("and 16 values a weight, trained on", []).append(shared)
    return {
        "data": model.data,
        "sparsity": sparsity,
        "epochs": [pruning, sharing],
        "float32_bytes": task.program.weights_bytes,
        "rows": [_compressed(task, label, programs) for label, programs in rows.items()],
    }


def _compressed(task: Task, name: str, programs: list[lx.Program]) -> dict[str, Any]:
    size = [stored_bytes(program) for program in programs]
    accuracy = [task.accuracy(program) for program in programs]
    ratio = [task.program.weights_bytes / each for each in size]
    return {"name": name, "accuracy": accuracy, "bytes": size, "ratio": ratio}


def curves(options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of each method at each sparsity: pruned once without training, and while training on."""
    found: dict[str, Any] = {}
    for name, (epochs, sparsities) in _some(CURVES, options):
        model = models.load(name, quick=options.quick)
        task = sparse.task(model, quick=options.quick)
        epochs, wanted = (1, (0.9,)) if options.quick else (epochs, sparsities)
        calibration = list(model.spec.calibration_batches() or ())
        trained = {"epochs": epochs, "distil": False}
        dense = task.program.replace(weights=task.learned("dense", task.program.weights, **trained))
        lines: dict[str, list[float]] = {}
        for sparsity in wanted:
            console.print(f"  {name} at {100 * sparsity:.0f} % ...")
            for label, make in _at_sparsity(task, sparsity, calibration, trained).items():
                kept = options.rows.row(
                    f"curves: {name} at {sparsity}: {label}", lambda make=make, task=task: task.accuracy(make())
                )
                lines.setdefault(label, []).append(kept)
        found[name] = {
            "data": model.data,
            "epochs": epochs,
            "float": task.accuracy(task.program),
            "dense": task.accuracy(dense),
            "sparsities": list(wanted),
            "lines": lines,
        }
    return found


def _at_sparsity(
    task: Task, sparsity: float, calibration: list[Any], trained: dict[str, Any]
) -> dict[str, Callable[[], lx.Program]]:
    """What makes the program of each method at a sparsity."""
    program = task.program

    def once(method: str, distribution: str) -> lx.Program:
        recipe = sparse.prune_recipe(sparsity, distribution, method)
        return lx.optimize(program, recipe, calibration=calibration)

    everywhere, spread = (sparse.prune_plan(program, sparsity, kind) for kind in ("global", "erk"))
    return {
        "magnitude, once": lambda: once("magnitude", "global"),
        "wanda, once": lambda: once("wanda", "uniform"),
        "sparsegpt, once": lambda: once("sparsegpt", "uniform"),
        "magnitude, gradual": lambda: task.pruned(
            f"gradual-{sparsity}", everywhere, schedule=sparse.gradual, **trained
        ),
        "straight-through": lambda: task.pruned(
            f"ste-{sparsity}", everywhere, schedule=sparse.gradual, straight_through=True, **trained
        ),
        "RigL": lambda: task.pruned(
            f"rigl-{sparsity}",
            spread,
            schedule=lambda steps: train.periodic(0, int(sparse.PRUNING_SHARE * steps), every=sparse.EVERY),
            regrow=lambda steps: train.Regrow("gradient", optax.cosine_decay_schedule(0.3, steps)),
            **trained,
        ),
    }


def shrunk(options: argparse.Namespace) -> dict[str, Any]:
    """Models with ever less of their operations: accuracy before and after training on, bytes, latency."""
    found: dict[str, Any] = {}
    for name, (epochs, distil) in _some(SHRINK, options):
        model = models.load(name, quick=options.quick)
        epochs = 1 if options.quick else epochs
        buckets = {"batch": (1,)} if options.quick else model.spec.buckets
        shrink = Shrink(model, epochs, distil, buckets, options)
        rows = [
            options.rows.row(f"shrink: {name}: {label}", functools.partial(shrink.row, label))
            for label in shrink.makers()
        ]
        if options.peers and name == "residual":
            rows += options.rows.row(f"shrink: {name}: Torch-Pruning", shrink.peers)
        found[name] = {"data": model.data, "epochs": epochs, "distil": distil, "rows": rows}
    return found


class Shrink:
    """One model and its smaller ones, each made when it is asked for and timed in turns with the float model."""

    def __init__(
        self, model: models.BenchModel, epochs: int, distil: bool, buckets: Any, options: argparse.Namespace
    ) -> None:
        self.model, self.epochs, self.distil, self.buckets, self.options = model, epochs, distil, buckets, options
        # Where there are batch norms, training on has them too; they are folded after it.
        self.task = sparse.task(model, quick=options.quick, folded=model.name != "residual")
        self.made: dict[str, tuple[lx.Program, dict[str, Any]]] = {}

    def makers(self) -> dict[str, Callable[[], tuple[lx.Program, dict[str, Any]]]]:
        """Label -> what makes a program, and figures of its own."""
        task, quick = self.task, self.options.quick
        makers: dict[str, Callable[[], tuple[lx.Program, dict[str, Any]]]] = {
            "float": lambda: (self.model.spec.program(), {"flops": 1.0}),
            "float, folded": lambda: (lx.passes.fold(task.program), {}),
            "float, trained on for as long": lambda: (
                _trained_on(task, task.program, "longer", self.epochs, self.distil),
                {},
            ),
        }
        for left in LEFT[1:2] if quick else LEFT:
            makers[f"shrunk to {100 * left:.0f} %"] = lambda left=left: self._shrunk(left)
        middle = f"shrunk to {100 * LEFT[1]:.0f} %"
        smaller = (
            ("int8", "float, folded", "int8"),
            ("half pruned, int8", "float, folded", "int8-prune50"),
            (f"{middle}, int8", middle, "int8"),
        )
        for label, source, recipe in smaller[-1 if quick else 0 :]:
            makers[label] = lambda source=source, recipe=recipe: (self._optimized(source, recipe), {})
        return makers

    def row(self, label: str) -> dict[str, Any]:
        """A row, complete."""
        console.print(f"  {self.model.name}: {label} ...")
        program, more = self.program(label)
        row = {"name": label, "accuracy": self.task.accuracy(program), "bytes": stored_bytes(program)} | more
        at = functools.partial(_call, program)
        self._time(row, at, at if label == "float" else functools.partial(_call, self.program("float")[0]))
        console.print(f"    accuracy {harness.percent(row['accuracy'])} %, {row['bytes']:,} bytes", markup=False)
        return row

    def program(self, label: str) -> tuple[lx.Program, dict[str, Any]]:
        """A program, made once."""
        if label not in self.made:
            self.made[label] = self.makers()[label]()
        return self.made[label]

    def peers(self) -> list[dict[str, Any]]:
        """Torch-Pruning's rows, its own float model the first."""
        from models import torch_residual

        rows = torch_residual.rows(self.model, self.task, self.epochs, LEFT, ROUND_TO)
        calls = {row["name"]: call for row, call in rows}
        for row, call in rows:
            self._time(row, call, calls[row["base"]])
        return [row for row, _ in rows]

    def _shrunk(self, left: float) -> tuple[lx.Program, dict[str, Any]]:
        small, difference = _shrunk(self.task.program, left)
        flops = [lx.passes.cost(program, {"batch": 1}).flops for program in (small, self.task.program)]
        trained = _trained_on(self.task, small, f"shrunk-{left:.3f}-{ROUND_TO}", self.epochs, self.distil)
        return trained, {"flops": flops[0] / flops[1], "before": self.task.accuracy(small), "difference": difference}

    def _optimized(self, source: str, recipe: str) -> lx.Program:
        calibration = self.model.spec.calibration_batches()
        program = self.program(source)[0]
        return lx.optimize(program, lx.Recipe.load(recipe), calibration=calibration, buckets=self.buckets)

    def _time(self, row: dict[str, Any], at: Any, base: Any) -> None:
        """Adds milliseconds and how many times faster than float, by batch."""
        row |= {"ms": {}, "faster": {}}
        for batch in self.buckets["batch"]:
            inputs = harness.example_inputs(self.model.spec.inputs, {"batch": batch})
            calls = {"row": at(inputs)} | ({"base": base(inputs)} if base is not at else {})
            times = harness.interleave(calls, rounds=self.options.rounds, seconds=self.options.seconds)
            times.setdefault("base", times["row"])
            row["ms"][str(batch)] = statistics.median(times["row"]) * 1e3
            row["faster"][str(batch)] = 1 / harness.ratio(times, "row", "base")
            jax.clear_caches()


def _trained_on(task: Task, small: lx.Program, what: str, epochs: int, distil: bool) -> lx.Program:
    if task.name == "residual":
        return lx.passes.fold(residual.trained_on(small, task.images, task.labels, epochs))
    trained = task.learned(f"{what}-{distil}", small.weights, fn=small.fn, epochs=epochs, distil=distil)
    return small.replace(weights=trained)


def _call(program: lx.Program, inputs: dict[str, np.ndarray]) -> Callable[[], Any]:
    return harness.compiled(program.fn, program.weights, *(inputs[name] for name in program.inputs))


def _shrunk(program: lx.Program, left: float) -> tuple[lx.Program, float]:
    """The shrunk program, and how far it is from the whole one with zeros in the place of what was removed.

    The largest difference of outputs over the largest output. Masks are cut as weights are: numbers in the place of a
    mask's elements tell which are left.
    """
    numbers = {path: np.arange(w.size, dtype=np.int32).reshape(w.shape) for path, w in program.weights.items()}
    small = lx.passes.shrink(program.replace(masks=numbers), flops=left, round_to=ROUND_TO)
    weights: dict[str, Any] = {}
    for path, weight in program.weights.items():
        zeroed = np.zeros(weight.size, np.float32)
        kept = np.asarray(small.masks[path]).reshape(-1)
        zeroed[kept] = np.asarray(weight).reshape(-1)[kept]
        weights[path] = jnp.asarray(zeroed.reshape(weight.shape))
    image = mnist()[0][:256]
    expected = jax.jit(program.fn)(weights, image)
    got = jax.jit(small.fn)(small.weights, image)
    return small.replace(masks={}), float(jnp.max(jnp.abs(got - expected)) / jnp.max(jnp.abs(expected)))


def step_cost(
    options: argparse.Namespace, sizes: Sequence[tuple[transformer.Size, int]] = STEP_SIZES
) -> dict[str, Any]:
    """Milliseconds of a training step of the scanned transformer: plain, with masks held, and when they are found."""
    found = {}
    sizes = [(transformer.Size(2, 32, 2, 8), 2)] if options.quick else sizes
    for size, batch in sizes:
        weights, random = transformer.init(size), np.random.default_rng(0)
        images = random.random((batch, size.seq, size.inputs)).astype(np.float32)
        labels = random.integers(0, 10, batch).astype(np.int32)
        apply = lambda weights, x, size=size: transformer.encode(weights, x, size.heads)  # noqa: E731
        plain = optax.adamw(1e-3)
        rules = [train.PruneRule(sites=".*kernel", sparsity=0.9, distribution="global")]
        calls = {
            "plain step": _step(apply, plain, weights, images, labels),
            "with masks held": _step(
                apply, train.sparsify(plain, rules, schedule=train.one_shot(0)), weights, images, labels, done=1
            ),
            "with masks found anew in each": _step(
                apply, train.sparsify(plain, rules, schedule=train.periodic(0, every=1)), weights, images, labels
            ),
        }
        times = harness.interleave(calls, rounds=options.rounds, seconds=options.seconds)
        shape = f"{size.layers} layers, width {size.width}, {size.heads} heads, batch {batch} x {size.seq}"
        found[shape] = [
            {
                "name": name,
                "ms": statistics.median(found) * 1e3,
                "ratio": harness.ratio(times, name, "plain step"),
            }
            for name, found in times.items()
        ]
    return found


def _step(
    apply: Callable[..., jax.Array], optimizer: Any, weights: Any, images: Any, labels: Any, *, done: int = 0
) -> Callable[[], Any]:
    """One step; `done` of them have been made before."""

    def step(weights: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        def loss(weights: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(apply(weights, images), labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    state = optimizer.init(weights)
    for _ in range(done):
        weights, state = jax.jit(step)(weights, state, images, labels)
    return harness.compiled(step, weights, state, images, labels)


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "compress": compress,
    "curves": curves,
    "shrink": shrunk,
    "step": step_cost,
}


def compress_tables(found: dict[str, Any]) -> str:
    """Accuracy and bytes of the LeNets."""
    parts: list[str] = []
    for name, each in found.items():
        base, rows = each["rows"][0]["accuracy"][0], []
        for row in each["rows"]:
            lost = statistics.median(100 * (base - value) for value in row["accuracy"])
            shown = ", ".join(harness.percent(value) for value in row["accuracy"])
            size = ", ".join(f"{value:,}" for value in row["bytes"])
            rows.append([row["name"], shown, f"{lost:+.2f}", size, f"{min(row['ratio']):.1f}"])
        seeds = len(each["rows"][-1]["bytes"])
        header = [
            name,
            f"accuracy %, {seeds} seeds",
            "lost, points (median)",
            "bytes of weights",
            "times smaller (least)",
        ]
        parts.append(harness.markdown(header, rows))
        pruning, sharing = each["epochs"]
        parts.append(
            f"{100 * each['sparsity']:.0f} % of the weights pruned in {pruning} epochs, {sharing} more with 16 values. "
            f"float32: {each['float32_bytes']:,} bytes. Published: {PUBLISHED[name]} times smaller."
        )
    return "\n\n".join(parts)


def curve_tables(found: dict[str, Any]) -> str:
    """Accuracy by method and sparsity."""
    parts: list[str] = []
    for name, each in found.items():
        header = [name, *(f"{100 * sparsity:.0f} %" for sparsity in each["sparsities"])]
        rows = [[label, *map(harness.percent, line)] for label, line in each["lines"].items()]
        parts.append(harness.markdown(header, rows))
        parts.append(
            f"Float: {harness.percent(each['float'])} %. Fine-tuned for as many epochs ({each['epochs']}) without "
            f"pruning: {harness.percent(each['dense'])} %."
        )
    return "\n\n".join(parts)


def shrink_tables(found: dict[str, Any]) -> str:
    """Accuracy, operations, bytes and latency."""
    parts: list[str] = []
    for name, each in found.items():
        batches = list(each["rows"][0]["ms"])
        header = [name, "operations", "accuracy % as shrunk", "trained on", "bytes on disk"]
        header += [*(f"batch {batch}: ms (times faster)" for batch in batches)]
        rows = []
        for row in each["rows"]:
            cells = [row["name"], f"{row['flops']:.2f}" if "flops" in row else ""]
            cells.append(harness.percent(row["before"]) if "before" in row else "")
            cells += [harness.percent(row["accuracy"]), f"{row['bytes']:,}" if "bytes" in row else ""]
            rows.append([*cells, *(f"{row['ms'][batch]:.3f} ({row['faster'][batch]:.2f})" for batch in batches)])
        parts.append(harness.markdown(header, rows))
        largest = max((row["difference"] for row in each["rows"] if "difference" in row), default=0.0)
        if name == "residual":
            parts.append(PEER if any("base" in row for row in each["rows"]) else NO_PEER)
        labels = "half of the loss from the float model's answers" if each["distil"] else "plain labels"
        parts.append(
            f"Fine-tuned for {each['epochs']} epochs, {labels}. The outputs of a shrunk model differ from those of the "
            f"original with the removed weights set to zero by at most {largest:.1e} of the largest output."
        )
    return "\n\n".join(parts)


def step_tables(found: dict[str, Any]) -> str:
    """Step times."""
    return "\n\n".join(
        harness.markdown(
            [shape, "ms a step", "ratio to the plain step"],
            [[row["name"], f"{row['ms']:.1f}", f"{row['ratio']:.2f}"] for row in rows],
        )
        for shape, rows in found.items()
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "compress": compress_tables,
    "curves": curve_tables,
    "shrink": shrink_tables,
    "step": step_tables,
}
INTRODUCTIONS = {
    "compress": (
        "## Smallest models without loss\n\nThe models are pruned by magnitude during fine-tuning (all weights ranked "
        "together, polynomial schedule, half of the loss from the float model's answers). Then each weight gets 16 "
        "shared values, one of them zero, which are fine-tuned together with the weights. Bytes are those of the "
        "artifact's whole weights folder: codes, values, scales, biases, headers. Targets: 40 and 39 times smaller "
        f"than float32 (Deep Compression, arXiv:1510.00149), with at most {100 * TARGET_LOST:.1f} points lost. "
        "Training uses only the 8,000 training images; the sparsity was chosen by the accuracy of the first seed on "
        "the 2,000 test images (97 % lost more). The paper trained on 60,000 images and tested on the other 10,000, "
        "so its accuracies are not comparable."
    ),
    "curves": (
        '## Unstructured pruning: accuracy by sparsity\n\n"Once" means one-shot pruning without training, on 256 '
        "calibration images for methods that need data; magnitude ranks all weights together, Wanda and SparseGPT "
        "each weight on its own. The other methods fine-tune the trained model with plain labels. Gradual and "
        "straight-through rank all weights together; RigL keeps its sparsity from the first step on and distributes "
        "it by Erdos-Renyi-Kernel. Larger models have fewer points and epochs. One seed. Unstructured sparsity makes "
        "models smaller, not faster."
    ),
    "shrink": (
        f"## Channels, hidden units and heads removed\n\n`lx.passes.shrink(program, flops=..., round_to={ROUND_TO})` "
        "ranks units by the norm of their weights and removes the same share of each group. The model is then "
        'fine-tuned, and batch norms are folded. "Times faster" compares with the float model under `jax.jit`; each '
        "row takes turns with it. Targets: with 2.1 times fewer operations the residual CNN loses at most 0.3 points "
        f"and is {TARGET_RATIO} times faster at batch 32. `half pruned` is unstructured pruning, which saves bytes "
        "only."
    ),
    "step": (
        "## Cost of a training step with masks\n\nOne step of AdamW, wrapped by `lx.train.sparsify` at 90 %, on a "
        "transformer whose layers are stacked under `lax.scan`. Masks are recomputed every 100 steps unless a "
        f"schedule says otherwise, and kept in between. Target: at most {TARGET_STEP_RATIO} times the plain step."
    ),
}


def plot(name: str, each: dict[str, Any]) -> str:
    """Draws one model's curves; returns the file's name."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pruning"  # else each drawing of the same curves differs
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, line in each["lines"].items():
        style = "--" if label.endswith("once") else "-"
        axes.plot(each["sparsities"], [100 * value for value in line], style, marker="o", label=label)
    axes.axhline(100 * each["float"], color="black", linewidth=0.8, label="float")
    # Accuracies far below are told by the table.
    axes.set_ylim(bottom=max(0, 100 * each["float"] - 12), top=100 * each["float"] + 1.5)
    axes.set(xlabel="sparsity", ylabel="accuracy %", title=name)
    axes.legend(fontsize="small")
    figure.tight_layout()
    file = f"pruning-{name}.svg"
    figure.savefig(harness.PAGES / file, metadata={"Date": None})
    pyplot.close(figure)
    return file


def page(results: dict[str, Any]) -> str:
    """docs/benchmarks/pruning.md."""
    parts = [
        "# Pruning and shrinking",
        (
            f"`benchmarks/pruning.py` writes this page from `pruning.json`. Data: {models.load('lenet300').data}. Rows "
            "that lose are kept."
        ),
    ]
    for name in SECTIONS:
        if name not in results:
            continue
        found, run = results[name]["found"], results[name]["run"]
        parts += [INTRODUCTIONS[name], TABLES[name](found)]
        if name == "curves":
            parts += [f"![{model}]({plot(model, each)})" for model, each in found.items()]
        parts.append(harness.provenance(run))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated; default: all")
    parser.add_argument(
        "--models",
        type=lambda text: text.split(","),
        help="only these, comma-separated, in the sections that have them",
    )
    parser.add_argument("--peers", action="store_true", help="also Torch-Pruning, where it is installed")
    parser.add_argument("--quick", action="store_true", help="little training, few rounds, no page: a smoke test")
    parser.add_argument(
        "--pages", action=argparse.BooleanOptionalAction, default=True, help="write docs/benchmarks/; not with --quick"
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    journal.add_option(parser)
    parser.add_argument("--rounds", type=int, default=31, help="turns of each")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one batch size, at most")
    options = parser.parse_args()
    if unknown := set(options.sections.split(",")) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if unknown := set(options.models or ()) - {*COMPRESS, *CURVES, *SHRINK}:
        parser.error(f"no model {', '.join(sorted(unknown))}; there are {', '.join({**COMPRESS, **CURVES, **SHRINK})}")
    if options.quick:
        options.rounds, options.seconds = 3, 1.0
    lacking = [name for name in ("torch", "torch_pruning") if importlib.util.find_spec(name) is None]
    if options.peers and lacking:
        console.print(f"not installed, so Torch-Pruning is left out: {', '.join(lacking)}")
        options.peers = False
    options.rows = journal.opened("pruning", options, "rounds", "seconds")
    results: dict[str, Any] = {}
    for name in options.sections.split(","):
        console.print(f"{name} ...")
        load = f"{os.getloadavg()[0]:.1f}"
        try:
            found = SECTIONS[name](options)
        except models.MissingError as error:
            console.print(f"{name}: skipped: {error}")
            continue
        packages = ("torch", "torch-pruning") if options.peers and name == "shrink" else ()
        run = harness.machine(packages) | {"load": load, "command": harness.command()}
        results[name] = {"found": found, "run": run}
        console.print(TABLES[name](found), soft_wrap=True)
        if options.pages and not options.quick:
            known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
            known |= {name: results[name]}
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
            (harness.PAGES / "pruning.md").write_text(page(known))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"repeat with: {harness.command()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
