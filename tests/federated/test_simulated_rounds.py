"""The simulation against NumPy in float64, and against clients one by one."""

import fleets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.federated import FederatedSpec, Federation, Privacy, partition, simulate
from lepton_xla.federated.aggregation import Mean, ServerState, move
from lepton_xla.federated.client_rounds import Client
from lepton_xla.federated.local_rounds import make_local_round


def uneven(*sizes):
    rows = fleets.table(sum(sizes))
    ends = np.cumsum(sizes)
    return [
        {name: column[end - size : end] for name, column in rows.items()} for size, end in zip(sizes, ends, strict=True)
    ]


# Batches larger than any client's rows are the whole of them, some more than once; equal sizes keep them full batches.
@pytest.mark.parametrize("epochs", [1, 3])
def test_federated_averaging_by_hand(epochs):
    clients = [*uneven(8, 8), {name: np.repeat(column, 2, 0) for name, column in uneven(4)[0].items()}]
    result = simulate(fleets.spec(), clients, Federation(rounds=2, epochs=epochs, batch_rows=8))
    expected = fleets.start()
    for _ in range(2):
        expected = fleets.averaged(expected, clients, steps=epochs)
    for path, leaf in expected.items():
        np.testing.assert_allclose(result.program.weights[path], leaf, atol=1e-6)


def test_clients_count_by_their_rows():
    clients = uneven(4, 8, 12)
    # One step each: the batch has as many rows as the largest client, and smaller ones fill it by whole repetitions.
    result = simulate(fleets.spec(), [clients[0], clients[2]], Federation(rounds=1, batch_rows=12))
    expected = fleets.averaged(fleets.start(), [clients[0], clients[2]])
    np.testing.assert_allclose(result.program.weights["body"], expected["body"], atol=1e-6)
    assert result.rounds[0].rows == 16
    assert result.rounds[0].bytes_up == 2 * 4 * 15 == result.rounds[0].bytes_down


def test_one_client_is_plain_gradient_descent():
    rows = fleets.table(16)
    result = simulate(fleets.spec(), [rows], Federation(rounds=5, batch_rows=16))
    expected = fleets.start()
    for _ in range(5):
        expected = fleets.local(expected, rows)
    np.testing.assert_allclose(result.program.weights["body"], expected["body"], atol=1e-6)


def test_proximal_pulls_towards_the_server():
    clients = uneven(8, 8)
    result = simulate(fleets.spec(), clients, Federation(rounds=1, epochs=4, batch_rows=8, proximal=0.7))
    expected = fleets.averaged(fleets.start(), clients, steps=4, proximal=0.7)
    np.testing.assert_allclose(result.program.weights["body"], expected["body"], atol=1e-6)


def by_hand(spec, clients, settings, rounds, noise=0.0):
    """What a server and its clients do, each client by itself and without padding."""
    model = spec.trained()
    weights = {**model.weights, **model.state}
    client = Client(weights, settings)
    rounds_of = jax.jit(
        client.make_round(make_local_round(model, spec.loss_of(model), spec.optimizer, settings, noise=noise))
    )
    kept = [client.begin(weights) for _ in clients]
    state = ServerState.begin(weights, client.layout.length)
    for number in range(rounds):
        mean = Mean(settings, client.layout.length)
        for index, rows in enumerate(clients):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), number), index)
            data = {"rows": rows, "count": jnp.int32(len(rows["label"]))}
            update, kept[index], n, _ = rounds_of(state.weights, kept[index], data, key)
            client.codec.check(jax.device_get(update))
            mean.add(str(index), client.codec.decode(update), int(n))
        state = move(state, mean.result(), client.layout, settings)
    return state, kept


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"updates": "float32", "rule": "adam", "alpha": 0.1}, marks=pytest.mark.slow),
        {"updates": "int8", "personal": ("head",)},
        pytest.param({"updates": "int4", "rule": "momentum", "most_norm": 0.2}, marks=pytest.mark.slow),
        {"updates": "top-k", "kept": 0.2, "proximal": 0.1},
        {"privacy": Privacy(epsilon=1e6, noise=0.5, share=0.5)},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_the_simulation_computes_what_clients_do(changes, monkeypatch):
    monkeypatch.setattr("lepton_xla.federated.simulation.calibrate_noise", lambda settings, rounds: 0.5)
    monkeypatch.setattr("lepton_xla.federated.simulation.epsilon", lambda *args: 1.0)
    assert jax.local_device_count() == 2
    clients = uneven(5, 12, 5, 12, 12, 5, 12)  # four on one device, three and padding on the other
    settings = Federation(rounds=3, epochs=2, batch_rows=4, seed=3, **changes)
    result = simulate(fleets.spec(), clients, settings)
    state, kept = by_hand(fleets.spec(), clients, settings, 3, noise=0.5)
    for path, leaf in state.weights.items():
        np.testing.assert_allclose(result.program.weights[path], leaf, atol=2e-5, err_msg=path)
    if settings.personal:
        heads = result.personal["head"]
        np.testing.assert_allclose(heads, [each["personal"]["head"] for each in kept], atol=2e-5)
        np.testing.assert_array_equal(result.program.weights["head"], fleets.program().weights["head"])
        assert not np.allclose(heads[0], heads[1], atol=1e-3)
        np.testing.assert_array_equal(result.program_of(2).weights["head"], heads[2])


@pytest.mark.slow
def test_it_learns_with_ten_and_with_fifty_clients():
    held_out = fleets.table(200, seed=9)

    def evaluate(predict):
        return {"accuracy": float((predict(x=held_out["x"])["output"].argmax(-1) == held_out["label"]).mean())}

    accuracies = {}
    for count, label in ((10, None), (10, "label"), (50, None)):
        clients = partition(fleets.table(400), count, label=label, concentration=0.3)
        settings = Federation(rounds=6, participation=0.5, updates="int4", batch_rows=8)
        result = simulate(fleets.spec(rate=0.1, evaluate=evaluate), clients, settings)
        accuracies[count, label] = result.rounds[-1].evaluation["accuracy"]
        assert [done.clients for done in result.rounds] == [count // 2] * 6
    before = evaluate(lambda x: {"output": x @ np.asarray(fleets.program().weights["body"])})["accuracy"]
    assert before < 0.5 < 0.8 < min(accuracies.values()), accuracies


def test_a_run_that_was_killed_goes_on_with_the_same_result(tmp_path):
    clients = uneven(8, 6, 7)
    settings = Federation(
        rounds=4, batch_rows=4, updates="int4", rule="momentum", personal=("head",), participation=0.6
    )
    whole = simulate(fleets.spec(), clients, settings)
    checkpoint = lx.train.Checkpoints(tmp_path / "run", every=1)

    def die(done):
        if done.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(fleets.spec(), clients, settings, checkpoint=checkpoint, report=die)
    seen = []
    again = simulate(fleets.spec(), clients, settings, checkpoint=checkpoint, report=seen.append)
    assert [done.round for done in seen] == [3, 4]
    assert [done.round for done in again.rounds] == [1, 2, 3, 4]
    for path, leaf in whole.program.weights.items():
        np.testing.assert_array_equal(again.program.weights[path], leaf)
    np.testing.assert_array_equal(again.personal["head"], whole.personal["head"])
    with pytest.raises(lx.CheckpointError, match="the settings differ"):
        simulate(fleets.spec(), clients, settings.replace(alpha=0.5), checkpoint=checkpoint)


def test_a_client_that_comes_to_nan_is_left_out():
    clients = uneven(8, 8, 8)
    clients[1]["x"][3, 0] = np.nan
    settings = Federation(rounds=2, batch_rows=8, updates="int8")
    result = simulate(fleets.spec(), clients, settings)
    assert [list(done.refused) for done in result.rounds] == [["1"], ["1"]]
    others, _ = by_hand(fleets.spec(), [clients[0], clients[2]], settings, 2)
    np.testing.assert_allclose(result.program.weights["body"], others.weights["body"], atol=1e-6)
    assert np.isfinite(result.rounds[-1].metrics["loss"])
    still = simulate(fleets.spec(), clients, settings.replace(least_clients=3))
    np.testing.assert_array_equal(still.program.weights["body"], fleets.program().weights["body"])


def test_state_that_calls_write_is_averaged_too():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))

    variables = Net().init(jax.random.key(0), jnp.ones((1, fleets.WIDTH)))
    model = lx.train.from_linen(Net(), variables, {"x": lx.TensorSpec(("batch", fleets.WIDTH), "float32")})
    clients = uneven(8, 8)
    result = simulate(FederatedSpec(model, {}), clients, Federation(rounds=1, batch_rows=8))
    means = np.mean([client["x"].mean(0) for client in clients], 0)
    np.testing.assert_allclose(result.program.weights["batch_stats/BatchNorm_0/mean"], means * 0.5, atol=1e-6)
    with pytest.raises(lx.FederatedError, match="batch_stats/BatchNorm_0/mean"):
        make_local_round(model, lx.train.supervised(model), None, Federation(privacy=Privacy()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda clients: clients.clear(), "there are no clients"),
        (lambda clients: clients[1].update(x=clients[1]["x"][:, :2]), r"client 1: column 'x' is float32\[rows, 2\]"),
        (lambda clients: clients[1].pop("label"), "client 1: column 'label' is missing"),
        (lambda clients: clients[1].update(label=clients[1]["label"][:-1]), "column 'x' has 8 rows and 'label' has 7"),
        (lambda clients: clients[1].update(x=np.zeros((0, 4)), label=np.zeros(0)), "client 1: there are no rows"),
    ],
)
def test_clients_that_do_not_fit_are_named(change, message):
    clients = uneven(8, 8)
    change(clients)
    with pytest.raises(lx.FederatedError, match=message):
        simulate(fleets.spec(), clients)


def test_agrees_with_flowers_own_averaging():
    pytest.importorskip("flwr")
    from flwr.server.strategy.aggregate import aggregate

    clients = uneven(4, 12)
    result = simulate(fleets.spec(), clients, Federation(rounds=1, batch_rows=12))
    ends = [(list(fleets.local(fleets.start(), part).values()), len(part["label"])) for part in clients]
    for path, leaf in zip(fleets.start(), aggregate(ends), strict=True):
        np.testing.assert_allclose(result.program.weights[path], leaf, atol=1e-6)
