"""`leptonx train`: from a file with a TrainSpec to an artifact that computes what was trained."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import lepton_xla as lx

FILE = """
import jax.numpy as jnp, numpy as np, optax
import lepton_xla as lx

W = {"up": jnp.ones((6, 8)) * 0.1 + jnp.arange(48.0).reshape(6, 8) % 5 * 0.1, "down": jnp.ones((8, 3)) * 0.1}

def program():
    fn = lambda w, x: jnp.maximum(x @ w["up"], 0) @ w["down"]
    return lx.trace(fn, W, {"x": lx.TensorSpec(("batch", 6), "float32")})

def batch(step):
    x = np.random.default_rng([1, step]).normal(size=(16, 6)).astype(np.float32)
    return {"x": x, "label": x[:, :3].argmax(-1).astype(np.int32)}

def evaluate(predict):
    given = batch(10**6)
    return {"accuracy": float((predict(x=given["x"])["output"].argmax(-1) == given["label"]).mean())}

spec = lx.train.TrainSpec(program, batch, 40, optax.sgd(0.5, momentum=0.9), evaluate=evaluate)
teacher = lx.ModelSpec({"x": lx.TensorSpec(("batch", 6), "float32")}, fn=lambda w, x: x @ w, weights=jnp.eye(6, 3) * 5)
number = 5

def carried():
    print("loaded")
    return lx.train.TrainSpec(program, batch, 40, optax.sgd(0.5), options={"seed": 3, "log": "spec.jsonl"})
"""


@pytest.fixture
def target(tmp_path):
    (tmp_path / "net.py").write_text(FILE)
    return f"{tmp_path / 'net.py'}:spec"


def test_trains_and_writes_an_artifact(cli, tmp_path, target):
    log = tmp_path / "log.jsonl"
    document = cli.json(
        "train", target, "--recipe", "int8", "--buckets", "batch=1,16", "-o", tmp_path / "net.lepton", "--log", log
    )
    assert document["steps"] == 40
    assert document["evaluations"][-1]["accuracy"] > 0.6
    assert document["weights_bytes"] < document["weights_bytes_float"] / 2
    kinds = [json.loads(line)["kind"] for line in log.read_text().splitlines()]
    assert {"train", "evaluation", "stage"} == set(kinds)
    servable = lx.load(tmp_path / "net.lepton")
    rng = np.random.default_rng(5)
    x = rng.normal(size=(16, 6)).astype(np.float32)
    assert (servable(x=x)["output"].argmax(-1) == x[:, :3].argmax(-1)).mean() > 0.6


def test_goes_on_with_a_teacher(cli, tmp_path, target):
    common = ("train", target, "--teacher", target.replace(":spec", ":teacher"), "--checkpoint", tmp_path / "run")
    cli.json(*common, "--steps", 10, "--every", 5)
    said = cli.ok(*common, "--steps", 30)
    assert said.startswith("30 steps, stopped by steps")
    refused = cli.refused(*common, "--steps", 30, "--no-resume")
    assert "has checkpoints" in refused


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--recipe", "no-such"], "no-such"),
        (["--set", "fold=false"], "give --recipe too"),
        (["--every", "5"], "give --checkpoint too"),
        (["--rules", "rules.toml"], "rules"),
        (["--mesh", "data=64"], "64"),
        (["--teacher", "nothing.py:teacher"], "no file nothing.py"),
        (["--steps", "0"], "--steps"),
        (["-o", "{folder}"], "exists"),
        (["--recipe", "w4a8-none.toml"], "w4a8-none"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(cli, tmp_path, target, more, said):
    assert said in cli.refused("train", target, *(each.replace("{folder}", str(tmp_path)) for each in more))


def test_the_command_line_replaces_options_and_stdout_is_for_results(cli, tmp_path, target):
    log = tmp_path / "here.jsonl"
    document = cli.json("train", target.replace(":spec", ":carried"), "--steps", 2, "--log", log)
    assert document["steps"] == 2
    assert log.exists()
    assert not (tmp_path / "spec.jsonl").exists()


@pytest.mark.parametrize("name", ["clipnorm", "steps", "model"])
def test_an_option_that_fit_does_not_take_is_refused_by_name(name):
    with pytest.raises(lx.TrainingError, match=f"options has '{name}'"):
        lx.train.TrainSpec(None, [], 1, None, options={name: 1})


@pytest.mark.parametrize("name", ["number", "nothing", "teacher"])
def test_refuses_what_is_no_spec(cli, target, name):
    assert f"{name}" in cli.refused("train", target.replace(":spec", f":{name}"))


@pytest.mark.slow
def test_several_processes_write_one_artifact(cli, tmp_path, target):
    """The weights are cut over two processes while they are trained, and whole in the artifact."""
    (tmp_path / "rules.toml").write_text('[[rules]]\nweights = "up"\nspec = ["", "data"]\n')
    command = [sys.executable, "-m", "lepton_xla"]
    train = ["train", target, "--recipe", "int8", "--mesh", "data=-1", "--rules", tmp_path / "rules.toml"]
    done = subprocess.run(
        [*command, "launch", "local", "--processes", "2", "--", *command, *train, "-o", tmp_path / "net.lepton"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    x = np.random.default_rng(5).normal(size=(8, 6)).astype(np.float32)
    output = lx.load(tmp_path / "net.lepton")(x=x)["output"]
    assert (output.argmax(-1) == x[:, :3].argmax(-1)).mean() > 0.6
