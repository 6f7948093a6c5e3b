"""Pruning and shrinking: smallest models without loss, accuracy by sparsity, latency of shrunk models.

    python benchmarks/pruning.py [--sections NAMES] [--models NAMES] [--peers] [--quick] [--json FILE]

Sections: `compress`: the smallest LeNet-300-100 and LeNet-5 without loss; `curves`: methods of unstructured pruning;
`shrink`: a residual CNN and a transformer with channels, hidden units and heads removed, and in int8; `step`: cost of a
training step with masks. Rows are kept when they are measured, so an interrupted run can continue; `--fresh` measures
everything again. `--peers` adds Torch-Pruning, if it and PyTorch are installed. Writes docs/benchmarks/pruning.md and
its plots; a run of some sections replaces only these.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import journal
import models
import numpy as np
import optax
import sections
from models import residual, sparse, transformer
from models.base import mnist
from models.sparse import Task
from pruning_page import INTRODUCTIONS, ROUND_TO, compress_tables, curve_tables, plot, shrink_tables, step_tables
from rich.console import Console
from sections import Section

import lepton_xla as lx
from lepton_xla import train

# Model -> sparsity, epochs of pruning, epochs of training with shared values.
COMPRESS = {"lenet5": (0.95, 8, 3), "lenet300": (0.95, 20, 6)}
# Model -> epochs for each point, and the points; fewer if an epoch takes longer.
CURVES = {
    "residual": (1, (0.5, 0.8, 0.9)),
    "transformer": (2, (0.5, 0.8, 0.9)),
    "lenet5": (2, (0.8, 0.9, 0.95, 0.98)),
    "lenet300": (4, (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)),
}
# Model -> epochs of fine-tuning after shrinking, and whether half of the loss is from the float model's answers. The
# transformer loses more than the CNN and gets as many epochs as its first training.
SHRINK = {"residual": (3, False), "transformer": (6, True)}
# Shares of the operations to keep; the second is 2.1 times fewer.
LEFT = (0.7, 1 / 2.1, 0.3)
# Transformers and batches of the timed training steps.
STEP_SIZES = ((transformer.Size(4, 128, 4, 64), 8), (transformer.Size(6, 256, 8, 64), 16))
console = Console(width=120, highlight=False)


def stored_bytes(program: lx.Program) -> int:
    """Bytes of the weights folder of the program's artifact."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.lepton"
        lx.compile(program, dict.fromkeys(program.symbols, (1,)), name="model").save(path)
        return sum(file.stat().st_size for file in (path / "weights").rglob("*") if file.is_file())


def _some(settings: dict[str, Any], options: argparse.Namespace) -> list[tuple[str, Any]]:
    """The requested models of a section; only the last one in a smoke test."""
    wanted = [(name, setting) for name, setting in settings.items() if name in options.models]
    return wanted[-1 if options.quick else 0 :]


def compress(options: argparse.Namespace) -> dict[str, Any]:
    """Prune LeNets during training, then train 16 shared values per weight: accuracy and bytes of each step."""
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
        as_is = lx.passes.quantize(small, sparse.codebook_plan(small))
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
    """Accuracy of each method at each sparsity: one-shot without training, and during fine-tuning."""
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
    """Functions that make the program of each method at a sparsity."""
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
    """Models with fewer and fewer operations: accuracy before and after fine-tuning, bytes, latency."""
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
    """A model and its shrunk variants, each made on demand and timed in turns with the float model."""

    def __init__(
        self, model: models.BenchModel, epochs: int, distil: bool, buckets: Any, options: argparse.Namespace
    ) -> None:
        self.model, self.epochs, self.distil, self.buckets, self.options = model, epochs, distil, buckets, options
        # Models with batch norms are fine-tuned with them; they are folded afterwards.
        self.task = sparse.task(model, quick=options.quick, folded=model.name != "residual")
        self.made: dict[str, tuple[lx.Program, dict[str, Any]]] = {}

    def makers(self) -> dict[str, Callable[[], tuple[lx.Program, dict[str, Any]]]]:
        """Label -> function that makes a program, and further results."""
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
        """Torch-Pruning's rows, first its float model."""
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
        """Add milliseconds and speed-up over float, by batch."""
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
    """The shrunk program, and its difference from the original with the removed weights set to zero.

    The difference is the largest of the outputs over the largest output. Masks are sliced like weights, so a mask that
    holds indices tells which elements are left.
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
    """Milliseconds of a training step of the scanned transformer: plain, with fixed masks, and with updated masks."""
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
    """Make a training step, after `done` earlier ones."""

    def step(weights: Any, state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        def loss(weights: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(apply(weights, images), labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(weights), state, weights)
        return optax.apply_updates(weights, updates), state

    state = optimizer.init(weights)
    for _ in range(done):
        weights, state = jax.jit(step)(weights, state, images, labels)
    return harness.compiled(step, weights, state, images, labels)


SECTIONS = {
    name: Section(lambda options, measure=measure: iter([measure(options)]), tables, INTRODUCTIONS[name])
    for name, measure, tables in (
        ("compress", compress, compress_tables),
        ("curves", curves, curve_tables),
        ("shrink", shrunk, shrink_tables),
        ("step", step_cost, step_tables),
    )
}


def page(results: Mapping[str, Any]) -> str:
    """docs/benchmarks/pruning.md."""
    head = [
        "# Pruning and shrinking",
        (
            f"`benchmarks/pruning.py` writes this page from `pruning.json`. Data: {models.load('lenet300').data}. Rows "
            "that lose are kept."
        ),
    ]

    def plots(name: str, result: dict[str, Any]) -> list[str]:
        return (
            [f"![{model}]({plot(model, each)})" for model, each in result["found"].items()] if name == "curves" else []
        )

    return sections.page(head, SECTIONS, results, plots)


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections.add_options(parser, SECTIONS)
    harness.add_names(parser, "--models", COMPRESS | CURVES | SHRINK)
    parser.add_argument("--peers", action="store_true", help="also Torch-Pruning, where it is installed")
    parser.add_argument("--quick", action="store_true", help="little training, few rounds, no page: a smoke test")
    harness.add_pages(parser)
    journal.add_option(parser)
    parser.add_argument("--rounds", type=int, default=31, help="turns of each")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one batch size, at most")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 3, 1.0
    lacking = [name for name in ("torch", "torch_pruning") if importlib.util.find_spec(name) is None]
    if options.peers and lacking:
        console.print(f"not installed, so Torch-Pruning is left out: {', '.join(lacking)}")
        options.peers = False
    options.rows = journal.opened("pruning", options, "rounds", "seconds")

    def machine(name: str) -> dict[str, str]:
        return harness.machine(("torch", "torch-pruning") if options.peers and name == "shrink" else ())

    def write(results: sections.Results) -> None:
        if options.pages and not options.quick:
            harness.publish("pruning", results, page)

    sections.run(SECTIONS, options, machine, write, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
