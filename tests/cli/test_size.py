"""`leptonx size`: what it prints, and what it refuses."""

import os
import subprocess
import sys

import pytest

from lepton_xla.sharding import topologies

FILE = """
import jax.numpy as jnp, numpy as np, optax
import lepton_xla as lx

def program():
    weights = {"up": jnp.ones((6, 8)), "down": jnp.ones((8, 4))}
    inputs = {"x": lx.TensorSpec(("batch", 6), "float32")}
    return lx.trace(lambda w, x: jnp.tanh(x @ w["up"]) @ w["down"], weights, inputs)

def batch(step):
    return {"x": np.zeros((16, 6), np.float32), "label": np.zeros(16, np.int32)}

spec = lx.train.TrainSpec(program, batch, 40, optax.sgd(0.5, momentum=0.9), options={"clip_norm": 1.0, "seed": 3})
number = 5
"""
WEIGHTS = 4 * (6 * 8 + 8 * 4)
there = topologies.has_compiler("v5e:1x2")


@pytest.fixture
def target(tmp_path):
    (tmp_path / "net.py").write_text(FILE)
    return f"{tmp_path / 'net.py'}:spec"


def test_what_it_says(cli, target):
    document = cli.json("size", target, "--topology", "v5e:1x2", "--no-largest")
    assert document["bytes"] == {"weights": WEIGHTS, "optimizer": WEIGHTS, "batch": 8 * (6 * 4 + 4)}
    assert (document["mesh"], document["rows"], document["fits"]) == ({"data": 2}, 16, True)
    assert document["exact"] == there
    assert "largest_rows" not in document
    text = " ".join(cli.ok("size", target, "--topology", "v5e:1x2", "--no-largest").split())
    for said in ("2 x TPU v5 lite, 16 rows a step", "each device sends: all-reduce", "predicted time of a step"):
        assert said in text
    assert ("CPU devices stand for them" in text) != there


def test_options_reach_the_step(cli, target):
    more = ("--batch", 4096, "--no-largest")
    plain = cli.json("size", target, "--topology", "v5e:1x2", *more)
    cut = cli.json("size", target, "--topology", "v5e:1x2", *more, "--accumulate", 8, "--compute-dtype", "bfloat16")
    assert there or cut["temporary_bytes"] < 0.7 * plain["temporary_bytes"]  # a TPU keeps so few on the chip
    rounded = cli.json("size", target, "--topology", "v5e:1x2", "--recipe", "int8", "--no-largest")
    assert rounded["stage"] == "rounded"


def test_rules_cut_weights(cli, target, tmp_path):
    (tmp_path / "rules.toml").write_text('[[rules]]\nweights = "up"\nspec = ["", "model"]\n')
    more = ("--mesh", "data=1,model=2", "--rules", tmp_path / "rules.toml", "--no-largest")
    assert cli.json("size", target, "--topology", "v5e:1x2", *more)["bytes"]["weights"] == 4 * (6 * 4 + 8 * 4)


@pytest.mark.slow
def test_the_largest_batch_of_a_small_memory(cli, target):
    document = cli.json("size", target, "--topology", "v5e:1x2", "--memory", 0.001, "--accumulate", 2)
    rows, refused = document["largest_rows"], document["rows_that_do_not_fit"]
    assert 0 < rows < refused <= rows * 33 / 32 + 4
    assert rows % 4 == 0
    fits = [
        cli.json("size", target, "--topology", "v5e:1x2", *more, "--memory", 0.001, "--accumulate", 2)["fits"]
        for more in (["--batch", rows, "--no-largest"], ["--batch", refused, "--no-largest"])
    ]
    assert fits == [True, False]


def test_a_model_that_fits_at_no_batch(cli, target):
    text = " ".join(cli.ok("size", target, "--topology", "v5e:1x2", "--memory", 1e-7).split())
    assert "does not fit the 107 B of a device" in text
    assert "no batch fits, not even one of 2 rows: cut the weights over more devices" in text
    assert cli.json("size", target, "--topology", "v5e:1x2", "--memory", 1e-7)["largest_rows"] == 0


def test_this_machine(cli, target):
    document = cli.json("size", target)
    assert (document["topology"], document["exact"], document["fits"]) == ("this machine", True, None)
    assert document["step_seconds_least"] is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--topology", "v9:2x2"], "topology 'v9:2x2': "),
        (["--topology", "v5e:banana"], "topology 'v5e:banana': "),
        (["--topology", "h100:1x1x8"], "topology 'h100:1x1x8': expected v5e:4x4, "),
        (["--topology", "v5e:1x2", "--mesh", "data=3"], "mesh 'data=3' takes 3 devices, but there are 2"),
        (["--topology", "v5e:1x2", "--mesh", "data"], "mesh 'data'"),
        (["--topology", "v5e:1x2", "--batch", "3"], "has 3 rows, which data=2 cannot split evenly"),
        (["--topology", "v5e:1x2", "--accumulate", "5"], "accumulate = 5 does not divide the batch"),
        (["--topology", "v5e:1x2", "--rules", "none.toml"], "none.toml"),
        (["--rules", "none.toml"], "none.toml"),
        (["--rules", "{folder}/rules.toml"], "give mesh or topology too"),
        (["--set", "fold=false"], "--set without --recipe changes nothing"),
        (["--memory", "0"], "--memory"),
        (["--batch", "0"], "--batch"),
        (["--recipe", "no-such"], "no-such"),
    ],
)
def test_bad_input_is_one_line(cli, target, more, said, tmp_path):
    (tmp_path / "rules.toml").write_text('fallback = "data"')
    assert said in cli.refused("size", target, *(text.replace("{folder}", str(tmp_path)) for text in more))


def test_a_target_that_is_no_training(cli, target):
    assert "number" in cli.refused("size", target.replace(":spec", ":number"))


@pytest.mark.skipif(there, reason="TPU's compiler needs no stand-ins")
def test_a_process_of_its_own_makes_the_stand_ins(target):
    unwanted = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    command = [sys.executable, "-m", "lepton_xla", "size", target, "--topology", "v5e:4x4", "--mesh", "data=8,model=2"]
    done = subprocess.run([*command, "--no-largest"], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "16 x TPU v5 lite" in done.stdout
