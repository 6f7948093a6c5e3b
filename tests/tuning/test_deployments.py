"""The cheapest way to serve: the simulated queue against theory, the choice against trying all, what is refused."""

import numpy as np
import pytest

from lepton_xla.errors import TuningError
from lepton_xla.sharding.topologies import has_compiler
from lepton_xla.tuning.deployments import (
    Measured,
    Prices,
    Slo,
    deploy,
    fewest_replicas,
    predicted_us,
    simulated,
    why_unknown,
)

TIMES = {1: 1000.0, 8: 2000.0, 32: 5000.0}
CALLS = '[per_hour]\ncpu = 1\n[[measured]]\ntarget = "cpu"\nrecipe = "float"\nrows = {rows}\nus = {us}'


def test_without_batches_the_queue_is_pollaczek_and_khinchines():
    # M/D/1: the mean wait is rho s / (2 (1 - rho)), beside the service itself.
    service, rate = 1e-3, 600.0
    rho = service * rate
    found = simulated({1: service * 1e6}, rate, requests=200_000).mean()
    assert found == pytest.approx(service + rho * service / (2 * (1 - rho)), rel=0.03)


def test_batches_carry_what_single_rows_cannot():
    # 6,000 rows a second are 32 in 5 ms and less; one by one they are 6 times too many.
    assert simulated(TIMES, 5000).max() < 0.05
    assert simulated({1: 1000.0}, 5000).max() > 1


def test_the_fewest_replicas_are_the_fewest():
    slo = Slo(0.99, 0.008)
    replicas, seconds = fewest_replicas(TIMES, 20_000, slo)
    taken = [np.quantile(simulated(TIMES, 20_000 / count), 0.99) for count in range(1, replicas + 1)]
    assert taken[-1] == pytest.approx(seconds)
    assert taken[-1] <= slo.seconds
    assert all(each > slo.seconds for each in taken[:-1])


def predict(target, recipe):
    if target == "h100":
        raise TuningError("the compiler of h100 predicts no times, and nothing was measured")
    return {rows: us / 10 for rows, us in TIMES.items()}


def test_the_cheapest_is_found_and_says_where_its_times_are_from():
    prices = Prices({"cpu": 1.0, "v5e:2x2": 20.0, "h100": 4.0}, measured=[Measured("v5e:2x2", "int8", 8, 400.0)])
    here = {"float": TIMES, "int8": {rows: us / 2 for rows, us in TIMES.items()}}
    given = {"targets": ["cpu", "v5e:2x2", "h100"], "prices": prices, "slo": Slo(0.99, 0.02), "rate": 12_000}
    found = deploy(here, predict, **given)
    assert [(each.target, each.recipe, each.source) for each in found.found] == [
        ("cpu", "int8", "measured"),
        ("cpu", "float", "measured"),
        ("v5e:2x2", "float", "predicted"),
        ("v5e:2x2", "int8", "measured"),
    ]
    best = found.found[0]
    assert best.per_million == pytest.approx(best.replicas * 1.0 / (12_000 * 3600) * 1e6)
    # Nothing cheaper: of all buckets and fewer replicas none keeps to the limit.
    for largest in here["int8"]:
        some = {rows: us for rows, us in here["int8"].items() if rows <= largest}
        if best.replicas > 1:
            assert np.quantile(simulated(some, 12_000 / (best.replicas - 1)), 0.99) > 0.02
    assert {(target, recipe) for target, recipe, _ in found.refused} == {("h100", "float"), ("h100", "int8")}
    on_cpu = tuple(("cpu", name, rows, us / 10, here[name][rows]) for name in here for rows, us in TIMES.items())
    assert found.compared == (*on_cpu, ("v5e:2x2", "int8", 8, 200.0, 400.0))
    assert next(each for each in found.found if each.target == "v5e:2x2").mesh == "data=4"


def test_a_limit_that_a_call_alone_breaks_is_told():
    found = deploy({"float": TIMES}, predict, targets=["cpu"], prices=Prices({"cpu": 1.0}), slo=Slo(0.99, 5e-4), rate=1)
    assert found.found == ()
    assert found.refused == (("cpu", "float", "a call alone takes 1 ms: no number of replicas keeps to it"),)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"targets": ["v5e:1x1"]}, "there is no price of v5e:1x1; the prices are of cpu"),
        ({"targets": []}, "no price of no target"),
        ({"rate": 0}, "rate = 0, requests a second: expected"),
        ({"rate": 1e-320}, "rate = 1e-320, requests a second: expected"),
        ({"rate": float("nan")}, "rate = nan, requests a second: expected"),
    ],
)
def test_what_cannot_be_priced_is_refused(given, said):
    with pytest.raises(TuningError, match=said):
        deploy(
            {"float": TIMES},
            predict,
            **({"targets": ["cpu"], "prices": Prices({"cpu": 1.0}), "slo": Slo(0.99, 0.02), "rate": 1} | given),
        )


@pytest.mark.parametrize("text", ["", "p99", "p99=20", "p0=1ms", "p99=0ms", "99=20ms", "p100=1ms", "p99=-1ms"])
def test_limits_that_are_none(text):
    with pytest.raises(TuningError, match="such as p99=20ms"):
        Slo.parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[per_hour]\ncpu = 0", "f: cpu has 0"),
        ("per_hour = 3", "f: Expected `object`"),
        ("[per_hour]\ncpu = 1\n[other]", "unknown field `other`"),
        ("= 3", "f: Invalid"),
        ("[per_hour]\ncpu = nan", "f: cpu has nan"),
        ("[per_hour]\ncpu = 1e-300", "f: cpu has 1e-300"),
        (CALLS.format(rows=0, us=1.0), "f: cpu has rows = 0; expected 1 to 1,048,576"),
        (CALLS.format(rows=10**12, us=1.0), "f: cpu has rows = 1000000000000"),
        (CALLS.format(rows=1, us="inf"), "f: cpu has inf"),
        (CALLS.format(rows=1.5, us=1.0), "f: Expected `int`, got `float`"),
    ],
)
def test_prices_that_are_none(text, said):
    with pytest.raises(TuningError, match=said):
        Prices.parse(text, "f")


def test_times_of_a_recipe_that_is_none_are_told():
    prices = Prices({"cpu": 1.0}, measured=[Measured("cpu", "int9", 1, 9.0), Measured("h100", "int8", 1, 9.0)])
    found = deploy({"float": TIMES}, predict, targets=["cpu"], prices=prices, slo=Slo(0.99, 1), rate=1)
    said = "times of 'int9' are given, which is none of the recipes that hold: float"
    assert found.refused == (("cpu", "int9", said),)


def test_more_replicas_than_are_tried_is_another_reason():
    found = deploy({"float": TIMES}, predict, targets=["cpu"], prices=Prices({"cpu": 1.0}), slo=Slo(0.99, 1), rate=1e9)
    assert found.refused == (("cpu", "float", "takes over 16,384 replicas"),)


def test_a_target_that_nothing_is_known_of_is_told_before_anything_is_tuned():
    measured = Prices({"ours": 1.0}, measured=[Measured("ours", "float", 1, 100.0)])
    with pytest.raises(TuningError, match=r"topology 'v5x:1x1': expected v5e:4x4"):
        why_unknown("v5x:1x1", measured)
    assert why_unknown("ours", measured) == "what was not measured on it, no compiler predicts"
    if not has_compiler("h100"):
        assert "pip install 'jax[cuda12]'" in why_unknown("h100", measured)


def test_cpus_predict_nothing():
    with pytest.raises(TuningError, match="predicts no times"):
        predicted_us(None, {}, "cpu")
