"""Accuracy, bytes and latency of every preset on every benchmark model, compared with float and other libraries.

    python benchmarks/quantization.py [--models digits,lenet5] [--presets int8] [--peers] [--quick] [--json FILE]

Latency is that of the whole compiled program at each bucket. Each row takes turns with the float model under `jax.jit`,
and ratios compare the two in the same rounds. Rows are printed and kept when they are measured, so an interrupted run
can continue; `--fresh` measures everything again. `--peers` adds qwix, ONNX Runtime and OpenVINO, if they are
installed. Writes docs/benchmarks/quantization.md and minilm.md; a run of some models replaces only their sections.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import harness
import jax
import journal
import models
import numpy as np
import peers
from journal import Journal
from rich.console import Console

import lepton_xla as lx
from lepton_xla.cli import tables
from lepton_xla.optimization.pipeline import grid
from lepton_xla.recipe import presets
from lepton_xla.serve.runtime import keep_memory, run_on_calling_thread
from lepton_xla.trees import tree_bytes
from lepton_xla.tuning.trials import as_loaded

RESULTS = harness.PAGES / "quantization.json"
# A row is slower if its ratio exceeds this, and that of the float model timed against itself.
NOISE_RATIO = 1.03
AGAIN = "float, once more"
# Labels of presets that would be confused with the float model.
ROWS = {"float": "float, optimized"}
console = Console(width=150, highlight=False)


@dataclasses.dataclass
class Row:
    """One model under one preset or peer.

    Attributes:
        name: the preset, or the peer and its setting.
        metrics: accuracy, cosine, error.
        covered_before: float bytes of the weights that were stored otherwise.
        covered_after: what they take now, scales included.
        weights_bytes: bytes of all weights; 0 where that cannot be told.
        latency_ms: bucket -> median milliseconds.
        ratio: bucket -> time over float's in the same rounds.
        prepare_s: seconds that optimizing took.
        same: whether what runs is operation for operation the float program, folded: no other times than noise.
        note: what is different, or why there are no figures.
    """

    name: str
    metrics: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    covered_before: int = 0
    covered_after: int = 0
    weights_bytes: int = 0
    latency_ms: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    ratio: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    prepare_s: float = 0.0
    same: bool = False
    note: str = ""


type At = Callable[[Mapping[str, np.ndarray]], Callable[[], Any]]


def measure(model: models.BenchModel, wanted: list[str], options: argparse.Namespace, rows: Journal) -> dict[str, Any]:
    """Every row of one model, each complete, printed and kept before the next is begun."""
    bench = Bench(model, options)
    found: list[dict[str, Any]] = []

    def add(name: str, make: Callable[[], list[Row]]) -> None:
        made = rows.row(f"{model.name}: {name}", lambda: [dataclasses.asdict(row) for row in make()])
        for row in made:
            console.print(f"    {_line(row)}", markup=False)
        found.extend(made)
        jax.clear_caches()

    add("float", bench.float)
    for preset in wanted:
        add(ROWS.get(preset, preset), lambda preset=preset: [bench.preset(preset)])
    for name, make in _peer_makers(model, wanted).items() if options.peers else ():
        add(name, lambda name=name, make=make: bench.peers(name, make))
    return {"data": model.data, "rows": found}


class Bench:
    """One model, its rows measured one at a time, each in turns with the float model."""

    def __init__(self, model: models.BenchModel, options: argparse.Namespace) -> None:
        self.model = model
        self.options = options
        self.program = model.spec.program()

    @functools.cached_property
    def judge(self) -> Judge:
        """What judged the float model first."""
        judge = Judge(self.model)
        self.float_metrics = judge(_predictor(self.program))
        return judge

    @functools.cached_property
    def folded(self) -> str:
        """What XLA is given of the folded float model."""
        return operations(lx.passes.fold(self.program), self.sizes[0])

    @property
    def sizes(self) -> list[dict[str, int]]:
        """What is timed."""
        return grid(self.program, self.model.spec.buckets)

    def float(self) -> list[Row]:
        """The float model, and once more."""
        assert self.judge
        both = [Row(name, self.float_metrics, weights_bytes=self.program.weights_bytes) for name in ("float", AGAIN)]
        self._time(both[1], functools.partial(_at, self.program), both[0])
        return both

    def preset(self, preset: str) -> Row:
        """One preset's row."""
        row = Row(ROWS.get(preset, preset))
        spec = self.model.spec
        console.print(f"  {self.model.name}: {preset} ...")
        try:
            started = time.perf_counter()
            small = lx.optimize(
                self.program, lx.Recipe.load(preset), calibration=spec.calibration_batches(), buckets=spec.buckets
            )
            row.prepare_s = time.perf_counter() - started
            row.metrics = self.judge(_predictor(small))
        except lx.LeptonError as error:
            row.note = f"{type(error).__name__}: {error}"
            return row
        row.covered_before, row.covered_after = _covered(self.program, small)
        row.weights_bytes = small.weights_bytes
        row.note = _arithmetic(small)
        small = as_loaded(small)
        row.same = operations(small, self.sizes[0]) == self.folded
        self._time(row, functools.partial(_at, small))
        return row

    def peers(self, name: str, make: Callable[[], list[peers.Peer]]) -> list[Row]:
        """The rows of one peer."""
        console.print(f"  {self.model.name}: {name} ...")
        found: list[Row] = []
        try:
            for peer in make():
                row = Row(peer.name, covered_before=peer.bytes_before, covered_after=peer.bytes_after, note=peer.note)
                row.metrics = self.judge(peer.predict)
                self._time(row, peer.at)
                found.append(row)
        except Exception as error:  # a peer may fail in any way; what it says goes into the table
            reason = (str(error).strip().splitlines() or [""])[0]
            found.append(Row(name, note=f"failed: {type(error).__name__}: {reason[:160]}"))
        return found

    def _time(self, row: Row, at: At, base: Row | None = None) -> None:
        """Times a row in turns with the float model, whose own row is `base` where that is wanted too."""
        for sizes in self.sizes:
            bucket = "x".join(str(size) for size in sizes.values())
            inputs = harness.example_inputs(self.model.spec.inputs, sizes)
            calls = {"float": _at(self.program, inputs), row.name: at(inputs)}
            times = harness.interleave(calls, rounds=self.options.rounds, seconds=self.options.seconds)
            for each, name in ((row, row.name), (base, "float")):
                if each is not None:
                    each.latency_ms[bucket] = statistics.median(times[name]) * 1e3
                    each.ratio[bucket] = harness.ratio(times, name, "float")


def _line(row: Mapping[str, Any]) -> str:
    """A row as it is printed when it is measured: the whole table comes at the end."""
    if not row["metrics"]:
        return f"{row['name']}: {row['note']}"
    times = ", ".join(f"{bucket} {ratio:.2f}" for bucket, ratio in row["ratio"].items())
    prepared = f"; optimized in {row['prepare_s']:.0f} s" if row["prepare_s"] else ""
    return (
        f"{row['name']}: accuracy {harness.percent(row['metrics']['accuracy'])} %; of float's time: {times}{prepared}"
    )


def operations(program: lx.Program, sizes: Mapping[str, int]) -> str:
    """What XLA is given to compile: StableHLO, but for the name of the function."""
    text = jax.jit(program.fn).lower(program.weights, *program.abstract_inputs(sizes)).as_text()
    return re.sub(r"^module @\S+", "module", text)


def _at(program: lx.Program, inputs: Mapping[str, np.ndarray]) -> Callable[[], Any]:
    return harness.compiled(program.fn, program.weights, *(inputs[name] for name in program.inputs))


class Judge:
    """A model's own metrics, and how far outputs are from those of the first that was judged, the float model.

    Accuracy on some hundred examples moves by chance; the error of outputs says how true a method is.
    """

    def __init__(self, model: models.BenchModel) -> None:
        assert model.spec.evaluate is not None
        self._evaluate = model.spec.evaluate
        self._exact: list[np.ndarray] = []

    def __call__(self, predict: Callable[..., dict[str, np.ndarray]]) -> dict[str, float]:
        """Metrics by name, `error` among them: the norm of the difference of all outputs over the norm of float's."""
        outputs: list[np.ndarray] = []

        def recorded(**inputs: Any) -> dict[str, np.ndarray]:
            found = predict(**inputs)
            outputs.extend(np.asarray(output, np.float32) for output in found.values())
            return found

        metrics = dict(self._evaluate(recorded))
        self._exact = self._exact or outputs
        wrong = sum(float(np.sum((a - b) ** 2)) for a, b in zip(outputs, self._exact, strict=True))
        whole = sum(float(np.sum(exact**2)) for exact in self._exact)
        return metrics | {"error": (wrong / whole) ** 0.5}


def _predictor(program: lx.Program) -> Callable[..., dict[str, np.ndarray]]:
    jitted = jax.jit(program.named_outputs)
    return lambda **inputs: jax.device_get(jitted(program.weights, *inputs.values()))


def _covered(program: lx.Program, small: lx.Program) -> tuple[int, int]:
    """Bytes, before and after, of the weights that are stored otherwise than in the float program."""
    before = after = 0
    for name, leaf in small.weights.items():
        old = program.weights.get(name)
        if old is not None and getattr(leaf, "dtype", None) != old.dtype:
            before += tree_bytes(old)
            after += tree_bytes(leaf)
    return before, after


def _arithmetic(small: lx.Program) -> str:
    """How many sites the last passes left with what."""
    counts: dict[str, int] = {}
    last = small.history[-2:] if small.history and small.history[-1].name == "autotune" else small.history[-1:]
    for site in (site for report in last for site in report.sites):
        counts[site.action] = counts.get(site.action, 0) + 1
    return ", ".join(f"{count} {action}" for action, count in counts.items())


def _peer_makers(model: models.BenchModel, wanted: list[str]) -> dict[str, Callable[[], list[peers.Peer]]]:
    """What makes the peers' models, by the name of their rows."""
    makers: dict[str, Callable[[], list[peers.Peer]]] = {}
    if peers.available()["qwix"] and model.linen is not None:
        for preset in wanted:
            try:
                recipe = lx.Recipe.load(preset)
            except lx.LeptonError:  # its own row says so
                continue
            setting = peers.qwix_setting(recipe.quantize[0]) if recipe.quantize and not recipe.prune else None
            if setting is not None:
                name, arguments = setting
                makers[name] = lambda name=name, arguments=arguments: [peers.qwix_ptq(model, name, arguments)]
    if model.name in peers.IN_ONNX:
        makers["ONNX Runtime, OpenVINO"] = lambda: peers.onnx_peers(model)
    return makers


def show(name: str, result: Mapping[str, Any]) -> None:
    """Prints one model's table."""
    header, cells = table(result)
    columns = [title if index in (0, len(header) - 1) else f">{title}" for index, title in enumerate(header)]
    tables.show(tables.Table(f"{name}: {result['data']}", columns, cells))


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one model's table."""
    rows = result["rows"]
    metrics, buckets = list(rows[0]["metrics"]), list(rows[0]["ratio"])
    baseline = rows[0]["metrics"]["accuracy"]
    header = ["", "accuracy %", "lost, points"]
    header += ["cosine"] if "cosine" in metrics else []
    header += ["error of outputs"] if "error" in metrics else []
    header += ["bytes of covered weights", "of float's"]
    header += [*(f"{bucket}: ms (ratio)" for bucket in buckets), "note"]
    twice = next((row["ratio"] for row in rows if row["name"] == AGAIN), {})
    cells = []
    for row in rows:
        cell = [row["name"]]
        if not row["metrics"]:
            cells.append([*cell, *[""] * (len(header) - 2), row["note"]])
            continue
        accuracy = row["metrics"]["accuracy"]
        cell += [harness.percent(accuracy), f"{100 * (baseline - accuracy):+.2f}"]
        cell += [f"{row['metrics']['cosine']:.5f}"] if "cosine" in metrics else []
        cell += [f"{row['metrics']['error']:.4f}"] if "error" in metrics else []
        before, after = row["covered_before"], row["covered_after"]
        cell += [f"{before:,} → {after:,}", f"{after / before:.3f}"] if before else ["", ""]
        for bucket in buckets:
            latency, ratio = row["latency_ms"].get(bucket), row["ratio"].get(bucket)
            slow = " slower" if ratio is not None and ratio > max(NOISE_RATIO, twice.get(bucket, 0.0)) else ""
            slow = " the same" if row.get("same") else slow
            cell.append(f"{latency:.3f} ({ratio:.2f}{slow})" if latency is not None else "")
        cells.append([*cell, row["note"]])
    return header, cells


def write_pages(results: Mapping[str, Any]) -> None:
    """Writes the pages from the results of all models measured so far."""
    parts = [
        "# Quantization: every preset on every benchmark model",
        (
            "`benchmarks/quantization.py` writes this page from `quantization.json`. The section of each model says "
            "when, at which commit and by which command it was measured. How to read the columns:\n\n- Accuracy is on "
            "held-out data. The error of outputs is `|outputs - float outputs| / |float outputs|`; with some hundred "
            "or thousand test examples it says more than accuracy, which varies by chance.\n- The ratio after a time "
            "is relative to the float model under `jax.jit`: the median over rounds in which the row and the float "
            f'model take turns. "Slower" means a ratio above {NOISE_RATIO} and above that of the float model timed '
            'against itself. "The same" means that XLA compiles exactly the operations of the folded float model, '
            "because all weights are unpacked on loading; any difference in time is noise.\n- Integer products depend "
            "on the processor's instructions, so some models were measured on several processors.\n- Sections of "
            "2026-11-26 are from before the CPU kernels, and so without them.\n- Covered weights "
            "are those that a preset does not store in float, scales included.\n- Other libraries get the same "
            "weights and the same calibration data. Rows that lose are kept."
        ),
    ]
    for name, result in results.items():
        header, cells = table(result)
        parts += [
            f"## {name}",
            f"Data: {result['data']}.",
            harness.markdown(header, cells),
            harness.provenance(result["run"]),
        ]
    harness.PAGES.mkdir(parents=True, exist_ok=True)
    (harness.PAGES / "quantization.md").write_text("\n\n".join(parts) + "\n")
    if minilm := {name: result for name, result in results.items() if name.startswith("minilm ")}:
        (harness.PAGES / "minilm.md").write_text(minilm_page(minilm))


def minilm_page(results: Mapping[str, Any]) -> str:
    """MiniLM in short: what a reader of the README wants to see."""
    parts = [
        "# MiniLM (all-MiniLM-L6-v2, 22.7 M parameters) in int8 on a CPU",
        (
            "Latency of the whole model at batch x sequence length, with one thread per core. Each row takes turns "
            "with the float model under `jax.jit`, and the ratio compares the two in the same rounds; below 1 is "
            "faster. On a shared machine trust the ratios, not the times. Sections of 2026-11-26 are from before the "
            "CPU kernels; [kernels.md](kernels.md#minilm-in-int8) has times with them."
        ),
    ]
    for name, result in results.items():
        processor = name.partition(" ")[2].strip("()")
        parts += [f"## On a processor with {processor}", *_minilm_tables(result), harness.provenance(result["run"])]
    parts.append("All other presets for this model are in [quantization.md](quantization.md).")
    return "\n\n".join(parts) + "\n"


def _minilm_tables(result: Mapping[str, Any]) -> list[str]:
    rows = {row["name"]: row for row in result["rows"]}
    wanted = ["float", "int8", *(name for name in rows if name.startswith(("ONNX", "OpenVINO", "qwix int8 x")))]
    labels = {"float": "float32, `jax.jit`", "int8": "**lepton_xla, recipe `int8`**"}
    buckets = [bucket for bucket in ("1x16", "1x128", "8x128") if bucket in rows["float"]["ratio"]]
    header = ["", *(f"{bucket}: ms (ratio to jit)" for bucket in buckets), "cosine to float", "accuracy %"]
    cells = [
        [
            labels.get(name, name),
            *(f"{rows[name]['latency_ms'][bucket]:.2f} ({rows[name]['ratio'][bucket]:.2f})" for bucket in buckets),
            f"{rows[name]['metrics']['cosine']:.5f}",
            harness.percent(rows[name]["metrics"]["accuracy"]),
        ]
        for name in wanted
        if name in rows and rows[name]["ratio"]
    ]
    notes = [f"- {name}: {rows[name]['note']}" for name in wanted if name in rows and rows[name]["note"]]
    return [
        harness.markdown(header, cells),
        f"Cosine and accuracy: {result['data']}.",
        "\n".join(notes),
    ]


def main() -> int:
    """Measures, prints, writes; exit code 1 where nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_names(parser, "--models", models.MODELS)
    parser.add_argument("--presets", default=",".join(presets()), help="comma-separated; default: all")
    parser.add_argument("--peers", action="store_true", help="also qwix, ONNX Runtime and OpenVINO where installed")
    parser.add_argument("--quick", action="store_true", help="little training, few rounds, no pages: a smoke test")
    harness.add_pages(parser)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    journal.add_option(parser)
    parser.add_argument("--rounds", type=int, default=21, help="turns of each at each bucket")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one bucket, at most")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 3, 1.0
    run_on_calling_thread()
    settings = "code runs on the calling thread"
    settings += ", and the allocator keeps what is freed, as in `leptonx serve`" if keep_memory() else ""
    wanted = [name for name in options.presets.split(",") if name]
    if options.peers:
        lacking = [name for name, there in peers.available().items() if not there]
        if lacking:
            console.print(f"not installed, so left out: {', '.join(lacking)}")
    rows = journal.opened("quantization", options, "rounds", "seconds")
    measured: dict[str, Any] = {}
    load = f"{os.getloadavg()[0]:.1f}"
    for name in options.models:
        try:
            console.print(f"{name}: loading, or training where it was not trained before ...")
            model = models.load(name, quick=options.quick)
        except models.MissingError as error:
            console.print(f"{name}: skipped: {error}")
            continue
        measured[name] = measure(model, wanted, options, rows)
        run = harness.machine(["lepton-xla-kernels", *(peers.PACKAGES if options.peers else ())])
        run |= {"command": harness.command(), "load": load, "versions": f"{run['versions']}; {settings}"}
        measured[name]["run"] = run
        show(name, measured[name])
        if options.pages and not options.quick:
            known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
            known |= {f"{name} ({harness.processor(measured[name]['run'])})": measured[name]}
            known = {key: known[key] for name in models.MODELS for key in sorted(known) if key.startswith(f"{name} (")}
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
            write_pages(known)
    harness.write_json(options.json, measured)
    console.print(f"repeat with: {harness.command()}")
    return int(not measured)


if __name__ == "__main__":
    raise SystemExit(main())
