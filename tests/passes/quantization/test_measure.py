"""Timing of products: what is timed, and that calls take turns."""

import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lepton_xla.passes import find_sites
from lepton_xla.passes.core import timing
from lepton_xla.passes.core.timing import Timer
from lepton_xla.passes.core.timing_cache import TimingCache
from lepton_xla.passes.quantization import measurement, selection
from lepton_xla.program import TensorSpec, trace
from lepton_xla.recipe import Recipe

ROWS = {"x": TensorSpec(("batch", 16), "float32")}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 3)


def compare(site, decision, sizes, timer=None):
    (timing,) = measurement.compare([(site, decision, sizes)], timer or Timer())
    return timing


def rule(options=""):
    return Recipe.parse(f'[[quantize]]\nsites = ".*"\n{options}', name="test").quantize[0]


def sites_at(batch, width=24):
    def fn(w, x):
        return jnp.tanh(x @ w["a"]) @ w["b"] + jnp.tanh(x @ w["like_a"]) @ w["b"]

    weights = {"a": jnp.ones((16, width)), "like_a": jnp.zeros((16, width)), "b": jnp.ones((width, 8))}
    return {site.name: site for site in find_sites(trace(fn, weights, ROWS), sizes={"batch": batch})}


@pytest.mark.parametrize("options", ["", "dynamic = false", 'granularity = "tensor"'])
@pytest.mark.parametrize("batch", [1, 4])
def test_times_are_positive_and_rows_padded_only_where_single(options, batch):
    timed = compare(sites_at(batch)["a"], rule(options), {"batch": batch})
    assert timed.sizes == {"batch": batch}
    assert 0 < timed.float_us < 1e6
    assert 0 < timed.integer_us < 1e6
    assert (timed.padded_us is not None) == (batch == 1)
    assert json.loads(json.dumps(timed.to_json()))["float_us"] == timed.float_us


def test_times_of_the_ways_that_there_are():
    assert measurement.Timing({}, 10.0, 5.0, 3.0).us == {"XLA": 5.0, "padded": 3.0}
    timing = measurement.Timing({}, 10.0, 5.0, None, kernel_us=2.0)
    assert (timing.us, timing.best_us) == ({"XLA": 5.0, "kernel": 2.0}, 2.0)


def test_the_fastest_way_depends_on_the_number_of_rows():
    timings = [
        measurement.Timing({}, 10.0, 8.0, 5.0, kernel_us=2.0, rows=1),
        measurement.Timing({}, 100.0, 50.0, None, kernel_us=40.0, rows=64),
        measurement.Timing({}, 100.0, 50.0, None, kernel_us=70.0, rows=64),  # the same rows in another bucket
    ]
    ways = selection.ways(timings)
    assert ways == {1: "kernel", 64: "XLA"}
    assert [selection.way_at(ways, rows) for rows in (1, 4, 40, 1000, "batch")] == ["kernel"] * 2 + ["XLA"] * 3
    assert selection.ratio(timings) == pytest.approx((0.2 * 0.5 * 0.5) ** (1 / 3))
    assert (selection.ways([]), selection.ratio([])) == ({}, 0.0)


def test_sites_that_look_the_same_are_timed_once(monkeypatch):
    timed = []

    def medians(_timer, calls, _budget):
        timed.append(len(calls))
        return [1.0] * len(calls)

    monkeypatch.setattr(Timer, "medians_us", medians)
    timer = Timer()
    sites = sites_at(4)
    for name in ("a", "like_a", "a"):
        compare(sites[name], rule(), {"batch": 4}, timer)
    assert timed == [2]
    compare(sites["b"], rule(), {"batch": 4}, timer)
    compare(sites_at(4, width=32)["a"], rule(), {"batch": 4}, timer)
    compare(sites_at(1)["a"], rule(), {"batch": 1}, timer)
    compare(sites["a"], rule("dynamic = false"), {"batch": 4}, timer)
    assert timed == [2, 2, 2, 3, 2]


def test_medians_of_calls_in_turn(monkeypatch):
    """A clock that each call moves by its own time, the second call by ten times more in one round."""
    now, order = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    seconds = {"a": itertools.repeat(0.001), "b": itertools.chain([0.002] * 3, [0.02], itertools.repeat(0.002))}

    def call(name):
        order.append(name)
        now[0] += next(seconds[name])
        return jnp.zeros(())

    medians = Timer().medians_us([lambda: call("a"), lambda: call("b")])
    np.testing.assert_allclose(medians, [1000, 2000], rtol=1e-6)
    assert "".join(order) == "aabb" + "ab" * 3


def test_quick_calls_run_often_enough_for_the_clock(monkeypatch):
    now, count = [0.0], [0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        count[0] += 1
        now[0] += 1e-5
        return jnp.zeros(())

    (median,) = Timer().medians_us([call])
    np.testing.assert_allclose(median, 10, rtol=1e-6)
    assert count[0] == 2 + 3 * round(timing.ROUND_S / 1e-5)


def test_slow_calls_run_fewer_rounds(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", 100)
    now, count = [0.0], [0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        count[0] += 1
        now[0] += timing.BUDGET_S
        return jnp.zeros(())

    Timer().medians_us([call])
    assert count[0] == 2 + timing.MIN_ROUNDS


@pytest.mark.parametrize(("seconds", "times"), [(1.0, 2), (0.001, 2 + timing.MIN_ROUNDS)])
def test_what_has_lost_is_timed_no_further(monkeypatch, seconds, times):
    """A long call that takes four times the fastest's is made no more; a short one after the fewest rounds."""
    monkeypatch.setattr(timing, "ROUNDS", 7)
    now, counts = [0.0], {1: 0, 2: 0, 4: 0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(share):
        counts[share] += 1
        now[0] += share * seconds
        return jnp.zeros(())

    medians = Timer().medians_us([functools.partial(call, share) for share in counts], 1000.0)
    np.testing.assert_allclose(medians, [seconds * 1e6 * share for share in counts], rtol=1e-6)
    assert counts == {1: 9, 2: 9, 4: times}


def test_a_slow_moment_does_not_decide(monkeypatch):
    """The faster one's single call takes 60 ms, because the machine does something else."""
    now, seconds = [0.0], [itertools.repeat(0.004), itertools.chain([0.002, 0.06], itertools.repeat(0.002))]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(which):
        now[0] += next(seconds[which])
        return jnp.zeros(())

    medians = Timer().medians_us([functools.partial(call, which) for which in (0, 1)])
    np.testing.assert_allclose(medians, [4e3, 2e3], rtol=1e-6)


def test_times_are_paired_within_rounds(monkeypatch):
    """The machine is three times slower for four rounds; in the fourth no more when the second call has its turn."""
    monkeypatch.setattr(timing, "ROUNDS", 7)
    now, calls, slow = [0.0], {1.0: 0, 0.9: 0}, {1.0: 4, 0.9: 3}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(share):
        calls[share] += 1
        now[0] += share * (3.0 if 2 < calls[share] <= 2 + slow[share] else 1.0)  # after two that are no round
        return jnp.zeros(())

    one, other = Timer().medians_us([functools.partial(call, share) for share in calls], 1000.0)
    np.testing.assert_allclose([one, other / one], [3e6, 0.9], rtol=1e-6)  # medians of each say 0.3


def test_equal_programs_are_timed_once(monkeypatch):
    monkeypatch.setattr(Timer, "medians_us", lambda _timer, calls, _budget: [1.0 + k for k, _ in enumerate(calls)])
    functions = [(lambda w, x, k=k: w * x * k, jnp.ones(2)) for k in (2, 3, 2, 3, 5)]
    times = timing.time_programs(functions, [jax.ShapeDtypeStruct((2,), jnp.float32)], Timer(cache=TimingCache(None)))
    assert times == [1.0, 2.0, 1.0, 2.0, 3.0]


def test_programs_are_timed_on_inputs_of_their_dtype():
    seen = []

    def fn(w, x, ids):
        seen.append((x.shape, x.dtype, ids.dtype))
        return x.sum() + w["w"].sum() + ids.sum().astype(jnp.float32)

    shapes = [jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((5,), jnp.int32)]
    times = timing.time_programs([(fn, {"w": jnp.ones(2)}), (fn, {"w": jnp.ones(3)})], shapes)
    assert len(times) == 2
    assert min(times) > 0
    assert set(seen) == {((3, 4), jnp.float32.dtype, jnp.int32.dtype)}


@pytest.mark.parametrize("options", ["", 'activations = "int4"', "dynamic = false"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_right_product_is_no_wrong_one(options, batch):
    for site in sites_at(batch).values():
        timed = compare(site, rule(options), {"batch": batch})
        assert timed.error < 1e-5
        assert not timed.wrong


@pytest.mark.parametrize("fault", ["twice", "one value", "not a number", "where padded"])
def test_a_wrong_product_is_found(monkeypatch, fault):
    right = measurement.products.quantized_dot

    def wrong(*args, pad_single, target):
        out = right(*args, pad_single=pad_single, target=target)
        if fault == "where padded":
            return 2 * out if pad_single else out
        faults = {
            "twice": 2 * out,
            "one value": out.at[0, 3].add(0.2 * jnp.abs(out).max()),
            "not a number": out * jnp.nan,
        }
        return faults[fault]

    monkeypatch.setattr(measurement.products, "quantized_dot", wrong)
    timed = compare(sites_at(1)["a"], rule(), {"batch": 1})
    assert timed.wrong
    expected = {"twice": 1.0, "one value": 0.2, "not a number": np.nan, "where padded": 1.0}[fault]
    np.testing.assert_allclose(timed.error, expected, rtol=1e-3)


def test_a_repeated_product_is_computed_anew_each_time():
    weights = np.arange(12, dtype=np.float32).reshape(3, 4)
    seen = []

    def product(rows: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: seen.append(1))
        return rows @ weights

    rows = np.ones((2, 3), np.float32)
    repeated = jax.jit(measurement._repeated(product, 5))
    got = repeated(rows)
    jax.effects_barrier()
    np.testing.assert_allclose(got, rows @ weights)
    assert len(seen) == 5
    body = repeated.lower(rows).compile().as_text()
    assert re.search(r"while/body/\S*dot_general", body)


@pytest.mark.parametrize("weights", ["int8", "codebook4"])
def test_weights_alone_are_timed_where_no_kernel_multiplies_them(weights):
    """A convolution has none, nor has a codebook of so few levels."""

    layout = ("NHWC", "HWIO", "NHWC")

    def fn(w, x):
        image = jax.lax.conv_general_dilated(x.reshape(-1, 4, 4, 1), w["conv"], (1, 1), "SAME", None, None, layout)
        return image.reshape(-1, 64) @ w["dense"]

    program = trace(fn, {"conv": jnp.ones((3, 3, 1, 4)), "dense": jnp.ones((64, 8))}, ROWS)
    sites = {site.name: site for site in find_sites(program, sizes={"batch": 4})}
    asked = {"conv", *(["dense"] if weights == "codebook4" else [])}
    for name in asked:
        timed = compare(sites[name], rule(f'weights = "{weights}"\nactivations = "none"'), {"batch": 4})
        assert timed.kernel_us is None
        assert timed.integer_us > 0
        assert not timed.wrong
