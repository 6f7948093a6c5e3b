"""What clients send: sizes, errors, and that nothing is lost for good."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.federated import Federation
from lepton_xla.federated.aggregation import Mean, ServerState, move
from lepton_xla.federated.client_rounds import Client
from lepton_xla.federated.updates import Codec, Layout

LENGTH = 1000
VECTOR = np.random.default_rng(0).normal(size=LENGTH).astype(np.float32)


# By hand: 1,000 numbers are padded to 1,024 in 4 groups, with a bfloat16 scale each; 5 % of them are 50, whose places
# take two bytes each, and which share one float32 scale. int3 has five numbers in two bytes.
@pytest.mark.parametrize(
    ("updates", "size"),
    [("float32", 4000), ("int8", 1024 + 8), ("int4", 512 + 8), ("int3", 400 + 8), ("top-k", 50 * 3 + 4)],
)
def test_bytes_of_an_update(updates, size):
    codec = Codec(Federation(updates=updates), LENGTH)
    update = jax.device_get(codec.encode(jnp.asarray(VECTOR)))
    assert sum(leaf.nbytes for leaf in update.values()) == size == codec.size_bytes
    codec.check(update)


@pytest.mark.parametrize(("updates", "codes"), [("int8", 127), ("int4", 7), ("int3", 4)])
def test_codes_are_within_half_a_step(updates, codes):
    codec = Codec(Federation(updates=updates), LENGTH)
    error = np.abs(np.asarray(codec.decode(codec.encode(jnp.asarray(VECTOR)))) - VECTOR)
    for start in range(0, LENGTH, 256):
        group = slice(start, start + 256)
        assert error[group].max() <= np.abs(VECTOR[group]).max() / codes * 0.5 * 1.02  # scales are bfloat16


def test_int3_by_hand():
    """Codes -4 to 4 as digits of a number in base 9, the first the lowest; a group of zeros stays zero."""
    codec = Codec(Federation(updates="int3"), 258)
    vector = np.zeros(258, np.float32)
    vector[:6] = [4.0, -4.0, 1.4, -0.6, 0.0, 2.0]
    update = jax.device_get(codec.encode(jnp.asarray(vector)))
    assert update["codes"].tolist()[:2] == [8 + 0 * 9 + 5 * 81 + 3 * 729 + 4 * 6561, 6 + 4 * (9 + 81 + 729 + 6561)]
    assert update["scales"].tolist() == [0x3F80, 0]  # bfloat16 1, and 0
    decoded = np.asarray(codec.decode(update))
    assert decoded[:6].tolist() == [4.0, -4.0, 1.0, -1.0, 0.0, 2.0]
    assert not decoded[6:].any()


def test_top_k_keeps_the_largest():
    codec = Codec(Federation(updates="top-k", kept=0.1), LENGTH)
    decoded = np.asarray(codec.decode(codec.encode(jnp.asarray(VECTOR))))
    largest = np.argsort(-np.abs(VECTOR))[:100]
    assert set(np.flatnonzero(decoded)) == set(largest)
    np.testing.assert_allclose(decoded[largest], VECTOR[largest], atol=np.abs(VECTOR).max() / 127 * 0.51)


@pytest.mark.parametrize("updates", ["int8", "int4", "int3", "top-k"])
def test_what_rounding_leaves_out_is_sent_later(updates):
    """After any number of rounds, what was sent and what is left is what was trained."""
    client = Client({"w": jnp.zeros(LENGTH)}, Federation(updates=updates, kept=0.2))
    steps = np.random.default_rng(1).normal(size=(12, LENGTH)).astype(np.float32) * 0.01 + 0.02
    round_ = jax.jit(client.make_round(lambda weights, data, key: ({"w": data}, jnp.int32(1), {})))
    kept, sent = client.begin({"w": jnp.zeros(LENGTH)}), np.zeros(LENGTH)
    for step in steps:
        update, kept, _, _ = round_({"w": jnp.zeros(LENGTH)}, kept, step, jax.random.key(0))
        sent += np.asarray(client.codec.decode(update))
    np.testing.assert_allclose(sent + np.asarray(kept["residual"]), steps.sum(0), atol=1e-4)
    without = 12 * np.asarray(client.codec.decode(client.codec.encode(jnp.asarray(steps[0]))))
    assert np.linalg.norm(sent - steps.sum(0)) < 0.5 * np.linalg.norm(without - steps.sum(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda update: update.pop("places"), "'places' is missing"),
        (lambda update: update.update(more=np.zeros(9)), "'more' is not asked for"),
        (lambda update: update.update(codes=np.zeros((51, 1), np.int8)), r"'codes' is int8\[51, 1\]; expected int8"),
        (lambda update: update.update(codes=update["codes"].astype(np.int32)), "'codes' is int32"),
        (lambda update: update["places"].fill(1000), "'places' has 1000, and there are 1000 numbers"),
    ],
)
def test_updates_that_do_not_fit_are_refused(change, message):
    codec = Codec(Federation(updates="top-k"), LENGTH)
    update = {name: np.array(leaf) for name, leaf in codec.encode(jnp.asarray(VECTOR)).items()}
    change(update)
    with pytest.raises(lx.FederatedError, match=message):
        codec.check(update)


@pytest.mark.parametrize(
    ("vector", "rows", "message"),
    [
        ([1.0, np.nan], 1, "NaN"),
        ([1.0, np.inf], 1, "infinity"),
        ([1.0, 2.0, 3.0], 1, r"shape \[3\]; expected \[2\]"),
        ([1.0, 2.0], 0, "0 rows"),
        ([1.0, 2.0], 11, "11 rows; expected 1 to 10"),
        ([1.0, 2.0], 1.5, "1.5 rows"),
    ],
)
def test_a_mean_takes_only_what_is_good(vector, rows, message):
    mean = Mean(Federation(most_rows=10), 2)
    mean.add("good", np.float32([2.0, 4.0]), 10)
    with pytest.raises(lx.FederatedError, match=message):
        mean.add("bad", np.asarray(vector), rows)
    with pytest.raises(lx.FederatedError, match="before"):
        mean.add("good", np.float32([0.0, 0.0]), 1)
    assert mean.result().tolist() == [2.0, 4.0]
    assert Mean(Federation(), 2).result() is None


def test_a_huge_update_is_scaled_down():
    mean = Mean(Federation(most_norm=5.0), 2)
    mean.add("huge", np.float32([3e30, 4e30]), 1)
    np.testing.assert_allclose(mean.result(), [3.0, 4.0], rtol=1e-6)


def test_rules_of_the_server_by_hand():
    layout, theta = Layout({"w": np.zeros(2)}), np.float32([1.0, -1.0])
    moves = [np.array([0.5, -0.25]), np.array([0.25, 0.5])]

    def run(settings):
        state = ServerState.begin({"w": theta, "n": np.int32([7])}, 2)
        for step in moves:
            state = move(state, step, layout, settings)
        assert state.weights["n"].tolist() == [7]
        assert state.round == 2
        return state.weights["w"]

    np.testing.assert_allclose(run(Federation(alpha=0.5)), theta + 0.5 * (moves[0] + moves[1]), rtol=1e-6)
    np.testing.assert_allclose(
        run(Federation(rule="momentum", momentum=0.5)), theta + moves[0] + (0.5 * moves[0] + moves[1]), rtol=1e-6
    )
    # Reddi et al. 2021, algorithm 2, with beta_1 = 0.9, beta_2 = 0.99, tau = 1e-3.
    first, second, expected = np.zeros(2), np.zeros(2), theta.astype(np.float64)
    for step in moves:
        first, second = 0.9 * first + 0.1 * step, 0.99 * second + 0.01 * step**2
        expected = expected + 0.1 * first / (np.sqrt(second) + 1e-3)
    np.testing.assert_allclose(run(Federation(rule="adam", alpha=0.1)), expected, rtol=1e-5)
