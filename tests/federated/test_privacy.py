"""Differential privacy: clipping and noise against NumPy, epsilon against closed forms, and who keeps count of it."""

import functools
import math

import fleets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_xla as lx
from lepton_xla.federated import Federation, Privacy, partition, simulate
from lepton_xla.federated.accounting import calibrate_noise, epsilon
from lepton_xla.federated.local_rounds import make_local_round
from lepton_xla.federated.members import Member

MODEL = lx.train.Model.of(fleets.program())


@functools.cache
def compiled(privacy, noise, rate):
    settings = Federation(privacy=privacy)
    loss = lx.train.supervised(MODEL)
    return jax.jit(make_local_round(MODEL, loss, optax.sgd(rate), settings, noise=noise))


def private(privacy, noise, rows, key=0, capacity=None, rate=fleets.RATE):
    """The change of one client's round, by path."""
    count = len(rows["label"])
    padded = {
        name: np.pad(column, [(0, (capacity or count) - count)] + [(0, 0)] * (column.ndim - 1))
        for name, column in rows.items()
    }
    data = {"rows": padded, "count": jnp.int32(count)}
    return compiled(privacy, noise, rate)(MODEL.weights, data, jax.random.key(key))


def clipped_sum(rows, bound):
    grads = fleets.gradients(fleets.start(), rows)
    norms = np.sqrt(sum(np.square(leaf).reshape(len(leaf), -1).sum(1) for leaf in grads.values()))
    factors = np.minimum(1, bound / norms)
    return {path: np.tensordot(factors, leaf, 1) for path, leaf in grads.items()}


def test_each_row_is_clipped_by_itself():
    rows = fleets.table(20)
    delta, n, metrics = private(Privacy(share=1.0, clip_norm=0.5), 0.0, rows, capacity=32)
    for path, total in clipped_sum(rows, 0.5).items():
        np.testing.assert_allclose(delta[path], -fleets.RATE * total / 20, atol=1e-6)
    assert int(n) == 20
    assert metrics == {}  # they would tell of the rows without noise


def test_no_row_moves_the_sum_further_than_the_clipping_norm():
    rows = fleets.table(20)
    without = {name: column[1:] for name, column in rows.items()}
    huge = {**rows, "x": rows["x"].copy()}
    huge["x"][0] *= 1e6
    broken = {**rows, "x": rows["x"].copy()}
    broken["x"][0] = np.nan
    privacy = Privacy(share=1.0, clip_norm=0.5)
    base = private(privacy, 0.0, without)[0]
    for changed, allowed in ((huge, 0.5), (broken, 0.0)):
        delta = private(privacy, 0.0, changed)[0]
        moved = math.sqrt(sum(float(jnp.square(20 * delta[path] - 19 * base[path]).sum()) for path in delta))
        assert moved <= fleets.RATE * allowed * (1 + 1e-4) + 1e-6


def test_noise_has_its_standard_deviation():
    rows = fleets.table(8)
    quiet = private(Privacy(share=1.0), 0.0, rows)[0]
    noisy = np.stack([private(Privacy(share=1.0), 3.0, rows, key=key)[0]["body"] for key in range(60)])
    spread = (noisy - np.asarray(quiet["body"])).std()
    # Learning rate, noise multiplier and clipping norm over eight rows.
    np.testing.assert_allclose(spread, fleets.RATE * 3.0 * 1.0 / 8, rtol=0.1)


def test_each_step_draws_its_rows_by_chance():
    """The mean over many rounds is that of all rows, whatever the share; a round with all rows has no spread."""
    rows, rate, steps = fleets.table(200), 1e-3, 5
    privacy = Privacy(share=0.2, clip_norm=10.0)
    found = np.stack([np.asarray(private(privacy, 0.0, rows, key=key, rate=rate)[0]["body"]) for key in range(60)])
    expected = -rate * steps * clipped_sum(rows, 10.0)["body"] / 200
    error = found.std(0) / np.sqrt(60)
    assert (np.abs(found.mean(0) - expected) < 4 * error + 1e-6).all()
    assert error.max() < 0.1 * np.abs(expected).max()
    # Of a row's gradient in one step: q (1 - q) of its square, by steps.
    grads = fleets.gradients(fleets.start(), rows)["body"]
    spread = rate * np.sqrt(steps * 0.2 * 0.8 * np.square(grads).sum(0)) / (0.2 * 200)
    np.testing.assert_allclose(found.std(0), spread, rtol=0.5)


def gaussian_delta(noise, spent):
    """Balle and Wang 2018, theorem 8: delta of the Gaussian mechanism with sensitivity 1."""
    normal = lambda value: 0.5 * math.erfc(-value / math.sqrt(2))  # noqa: E731
    return normal(0.5 / noise - spent * noise) - math.exp(spent) * normal(-0.5 / noise - spent * noise)


def test_epsilon_agrees_with_the_closed_form_where_there_is_one():
    pytest.importorskip("dp_accounting")
    # Steps that take all rows compose as one with less noise.
    privacy = Privacy(share=1.0, delta=1e-5)
    spent = epsilon(privacy, 8.0, 16)
    np.testing.assert_allclose(gaussian_delta(2.0, spent), 1e-5, rtol=0.02)


def test_the_least_noise_keeps_the_budget(caplog):
    pytest.importorskip("dp_accounting")
    settings = Federation(privacy=Privacy(epsilon=2.0, share=1.0))
    noise = calibrate_noise(settings, 9)
    assert gaussian_delta(noise / 3, 2.0) <= 1e-5
    assert gaussian_delta(noise * 0.98 / 3, 2.0) > 1e-5
    with pytest.raises(lx.FederatedError, match=r"noise = 1 over 9 steps costs epsilon = .*, more than 2;"):
        calibrate_noise(Federation(privacy=Privacy(epsilon=2.0, share=1.0, noise=1.0)), 9)
    with pytest.raises(lx.FederatedError, match="leaves nothing to learn from"):
        calibrate_noise(Federation(privacy=Privacy(epsilon=1e-4, share=1.0)), 10)
    calibrate_noise(Federation(privacy=Privacy(epsilon=8.0, share=0.1)), 5)
    assert not caplog.records  # dp-accounting warns where its sums do not converge


@pytest.mark.slow
def test_a_simulation_reports_what_it_costs():
    pytest.importorskip("dp_accounting")
    settings = Federation(rounds=4, participation=0.5, privacy=Privacy(epsilon=99.0, share=0.5, noise=1.0))
    result = simulate(fleets.spec(rate=0.1), partition(fleets.table(60), 4), settings)
    spent = [done.epsilon for done in result.rounds]
    assert spent[0] == spent[1] < spent[2] == spent[3] == result.epsilon  # each client takes part every other round
    assert result.noise == 1.0
    assert result.rounds[0].metrics == {}


def test_a_client_keeps_its_own_count(tmp_path, monkeypatch):
    """A server that asks for the same round again, or for other terms, gets no more than the budget."""
    monkeypatch.setattr("lepton_xla.federated.members.calibrate_noise", lambda settings, rounds: 1.0)
    monkeypatch.setattr("lepton_xla.federated.members.epsilon", lambda privacy, noise, steps: steps / 10)
    settings = Federation(rounds=2, privacy=Privacy(epsilon=2.0, share=0.1))
    spec, vector = fleets.spec(), np.zeros(15, np.float32)
    first = Member(spec, tmp_path).answer(vector, settings, 0, 0)
    again = Member(spec, tmp_path).answer(vector, settings, 0, 0)
    assert not np.array_equal(first.update["values"], again.update["values"])  # nobody can compute the noise
    with pytest.raises(lx.FederatedError, match="round 3 of this client would cost epsilon = 3, more than its budget"):
        Member(spec, tmp_path).answer(vector, settings, 1, 0)
    with pytest.raises(lx.FederatedError, match="cannot be added up"):
        Member(spec, tmp_path).answer(vector, settings.replace(privacy=Privacy(epsilon=99.0, share=0.1)), 1, 0)
    with pytest.raises(lx.FederatedError, match="the server now asks for none"):
        Member(spec, tmp_path).answer(vector, settings.replace(privacy=None), 1, 0)
    for privacy, asked in ((None, "no privacy"), (Privacy(epsilon=2.0), "epsilon = 2")):
        with pytest.raises(lx.FederatedError, match=f"epsilon up to 1; the server asks for {asked}"):
            Member(spec, tmp_path / "other", 1.0).answer(vector, settings.replace(privacy=privacy), 0, 0)
