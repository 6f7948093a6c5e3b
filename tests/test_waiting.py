"""What `optimize` costs who waits for it: XLA compiles, seconds that reports account for, memory that is given back."""

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.trees import tree_bytes

COMPILE = "/jax/core/compile/backend_compile_duration"


class Compiles:
    """Counts XLA's compiles."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        self.count += event == COMPILE


@pytest.fixture(scope="module")
def compiles() -> Iterator[Compiles]:
    counter = Compiles()
    jax.monitoring.register_event_duration_secs_listener(counter)
    yield counter
    jax.monitoring.unregister_event_duration_listener(counter)


def mlp(
    widths: tuple[int, ...], inputs: int, between: Callable[..., Any] = jax.nn.relu
) -> tuple[lx.Program, list[dict[str, np.ndarray]]]:
    random = np.random.default_rng(0)
    pairs = list(itertools.pairwise((inputs, *widths)))
    weights = {
        f"{index}": {"kernel": random.normal(size=(a, b)) / a**0.5, "bias": np.zeros(b)}
        for index, (a, b) in enumerate(pairs)
    }

    def fn(weights: Any, x: jax.Array) -> jax.Array:
        for index in range(len(pairs)):
            x = between(x @ weights[f"{index}"]["kernel"] + weights[f"{index}"]["bias"][None])
        return x

    arrays = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), weights)
    data = [{"x": random.normal(size=(8, inputs)).astype(np.float32)} for _ in range(2)]
    return lx.trace(fn, arrays, {"x": lx.TensorSpec(("batch", inputs), "float32")}), data


def optimized(model: tuple[lx.Program, list[dict[str, np.ndarray]]], *batches: int) -> lx.Program:
    program, data = model
    return lx.optimize(program, lx.Recipe.load("int8"), calibration=data, buckets={"batch": batches})


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture(scope="module")
def run(compiles: Compiles) -> dict[str, Any]:
    """One run of `int8` with calibration on an MLP of three layers that differ."""
    model = mlp((40, 24, 10), 56)
    before, count, start = live_bytes(), compiles.count, time.perf_counter()
    small = optimized(model, 1, 32)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "small": small, "compiles": compiles.count - count, "before": before, "model": model}


def test_a_small_model_takes_few_compiles(run: dict[str, Any]) -> None:
    """There were 270 of them and more when each operation on a weight was one."""
    assert run["compiles"] <= 90


def test_the_history_says_where_the_seconds_went(run: dict[str, Any]) -> None:
    explained = sum(report.seconds for report in run["small"].history)
    assert 0.85 * run["seconds"] <= explained <= run["seconds"]
    lower = next(report for report in run["small"].history if report.name == "quantize")
    assert 0.8 * lower.seconds <= sum(lower.metrics["seconds"].values()) <= 1.001 * lower.seconds


def test_nothing_is_kept_but_the_result(run: dict[str, Any]) -> None:
    held = live_bytes() - run["before"]
    assert held <= 1.2 * tree_bytes(run["small"].weights) + 4096


def test_equal_layers_are_compiled_and_timed_once(compiles: Compiles) -> None:
    counts: list[int] = []
    for layers in (2, 8):
        before = compiles.count
        optimized(mlp((48,) * layers, 48), 4)
        counts.append(compiles.count - before)
    assert counts[1] <= counts[0] + 6


def reworded(self: lx.SiteReport, site: str, action: str, reason: str = "", *others: Any, **more: Any) -> None:
    """A report whose sentences say nothing."""
    said = {"notes": tuple("..." for _ in more["notes"])} if "notes" in more else {}
    WORDED(self, site, "...", reason and "...", *others, **more | said)


WORDED = lx.SiteReport.__init__


@pytest.mark.parametrize("init", [WORDED, reworded], ids=["", "whatever reports say"])
def test_a_second_round_does_only_what_is_different(monkeypatch: pytest.MonkeyPatch, init: Callable[..., None]) -> None:
    """A round without multiplying rounds those weights again whose factor it takes back, and counts both rounds."""
    import sys

    monkeypatch.setattr(lx.SiteReport, "__init__", init)

    from lepton_xla.passes.quantization.measurement import Timing

    lower_module = sys.modules["lepton_xla.passes.quantization.integer_arithmetic"]
    gptq_module = sys.modules["lepton_xla.passes.quantization.gptq"]
    tried: list[int] = []
    rounded: list[str] = []
    plain: Callable[..., Any] = gptq_module._round

    def compare(site: Any, _rule: Any, sizes: Any, _timer: Any) -> Timing:
        return Timing(dict(sizes), 10.0, 30.0 if site.path == "0/kernel" else 5.0, None)

    def time_programs(programs: Any, _inputs: Any, timer: Any = None) -> list[float]:
        tried.append(len(programs))
        return [10.0 - index for index, _ in enumerate(programs)]

    def counted(planned: Any, *others: Any) -> Any:
        rounded.append(planned.path)
        return plain(planned, *others)

    def resolved(*given: Any) -> lx.Plan:
        plans.append(lx.passes.resolve(*given))
        return plans[-1]

    plans: list[lx.Plan] = []
    monkeypatch.setattr("lepton_xla.optimization.pipeline.resolve", resolved)
    monkeypatch.setattr(lower_module, "compare", lambda wanted, timer: [compare(*each, timer) for each in wanted])
    monkeypatch.setattr(lower_module, "time_programs", time_programs)
    monkeypatch.setattr(gptq_module, "_round", counted)
    small = optimized(mlp((32, 32, 32), 32, jnp.tanh), 4)  # through which no factor goes
    smooth = next(report for report in small.history if report.name == "smoothquant")
    assert {site.site for site in smooth.sites if site.outcome == "multiplied"} == {"1/kernel", "2/kernel"}
    assert sorted(rounded) == ["0/kernel", "0/kernel", "1/kernel", "2/kernel"]
    assert len(plans) == 1
    lower = next(report for report in small.history if report.name == "quantize")
    assert {site.site: site.outcome for site in lower.sites} == {
        "0/kernel": "changed", "1/kernel": "codes", "2/kernel": "codes"
    }  # fmt: skip
    weights = {site.site: site.metrics["fate"] for site in lx.passes.weights_report(small).sites}
    assert {weights[f"{layer}/kernel"] for layer in range(3)} == {"int8"}
    assert len(tried) == 2  # sets of sites, and unpacking: both in the first round
    assert lower.metrics["whole_program"][0]["lowered_us"] < lower.metrics["whole_program"][0]["float_us"]


def test_equal_layers_are_pruned_and_folded_by_what_is_compiled_once(compiles: Compiles) -> None:
    recipe = {
        method: lx.Recipe.parse(
            f'fold = false\n[[prune]]\nsites = ".*"\nmethod = "{method}"\npattern = "2:4"', name="p"
        )
        for method in ("wanda", "sparsegpt")
    }
    counts: dict[str, list[int]] = {name: [] for name in (*recipe, "fold")}
    for layers in (2, 6):
        program, data = mlp((24,) * layers, 24)
        for method in recipe:
            before = compiles.count
            lx.optimize(program, recipe[method], calibration=data, buckets={"batch": (4,)})
            counts[method].append(compiles.count - before)
        weights = {f"{index}": {"w": jnp.ones((20, 20)), "s": jnp.full(20, 2.0)} for index in range(layers)}

        def scaled(weights: Any, x: jax.Array, layers: int = layers) -> jax.Array:
            for index in range(layers):
                x = jax.nn.relu((x @ weights[f"{index}"]["w"]) * weights[f"{index}"]["s"][None])
            return x

        affine = lx.trace(scaled, weights, {"x": lx.TensorSpec(("batch", 20), "float32")})
        before = compiles.count
        folded = lx.passes.fold(affine)
        counts["fold"].append(compiles.count - before)
        np.testing.assert_array_equal(folded.weights["0/w"], np.full((20, 20), 2.0))
    assert all(many <= few + 2 for few, many in counts.values()), counts
