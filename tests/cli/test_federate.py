"""`leptonx federate simulate`: rounds, an artifact, and settings that are refused."""

import numpy as np
import pytest

import lepton_xla as lx
from lepton_xla.cli.federate import federate, round_line
from lepton_xla.federated import RoundReport
from lepton_xla.federated.settings import FORMATS

FILE = """
import jax.numpy as jnp, numpy as np, optax
import lepton_xla as lx

def program():
    fn = lambda w, x: x @ w["w"]
    return lx.trace(fn, {"w": jnp.zeros((4, 3))}, {"x": lx.TensorSpec(("batch", 4), "float32")})

def rows():
    x = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    return {"x": x, "label": x[:, :3].argmax(-1).astype(np.int32)}

def evaluate(predict):
    given = rows()
    return {"accuracy": float((predict(x=given["x"])["output"].argmax(-1) == given["label"]).mean())}

spec = lx.federated.FederatedSpec(program, rows, optax.sgd(0.5), lx.federated.Federation(rounds=9), evaluate=evaluate)
"""


@pytest.fixture
def target(tmp_path):
    (tmp_path / "net.py").write_text(FILE)
    return f"{tmp_path / 'net.py'}:spec"


def test_simulates_and_writes_an_artifact(cli, tmp_path, target):
    options = ("--clients", 3, "--rounds", 4, "--updates", "int8", "--by-label", 1, "--checkpoint", tmp_path / "run")
    found = cli.json("federate", "simulate", target, *options, "-o", tmp_path / "net.lepton", "--buckets", "batch=8")
    assert [done["round"] for done in found["rounds"]] == [1, 2, 3, 4]
    assert found["rounds"][-1]["evaluation"]["accuracy"] > 0.8
    assert found["rounds"][-1]["bytes_up"] == 3 * (12 + 4)
    servable = lx.load(tmp_path / "net.lepton")
    assert servable(x=np.eye(4, dtype=np.float32)[:3])["output"].argmax(-1).tolist() == [0, 1, 2]
    assert cli.ok("federate", "simulate", target, *options) == ""  # the run is done, and nothing is left to do


def test_the_line_of_a_round_says_why_one_was_left_out():
    done = RoundReport(3, 2, {"7": "it says it has inf rows", "9": "gone"}, 20, {}, {}, 80, 80, None, 0.5)
    assert round_line(done) == "round 3: 2 clients, 2 refused (it says it has inf rows), 80 B sent"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--updates", "int4", "--secure"], "cannot take updates = 'int4'"),
        (["--participation", "2"], "participation = 2.0"),
        (["--clients", "100"], "90 rows cannot be split among 100 clients"),
        (["--personal", "head"], "'head' matches no weight"),
        (["--epsilon", "-1"], "epsilon = -1.0"),
    ],
)
def test_refuses_settings_in_one_line(cli, target, options, message):
    assert message in cli.refused("federate", "simulate", target, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "4/3"], "part = '4/3'; expected K/N"),
        (["--part", "1/99"], "90 rows cannot be split among 99 clients"),
        (["--tls-ca", "ca.pem"], "ca.pem: there is no such file"),
    ],
)
def test_a_client_that_could_never_take_part_does_not_start(cli, tmp_path, target, options, message):
    pytest.importorskip("flwr")
    at = ("--server", "127.0.0.1:1", "--folder", tmp_path / "kept")
    assert message in cli.refused("federate", "client", target, *at, *options)


def test_the_commands_and_the_library_know_the_same_updates():
    (option,) = (each for each in federate.commands["simulate"].params if each.name == "updates")
    assert tuple(option.type.choices) == FORMATS
