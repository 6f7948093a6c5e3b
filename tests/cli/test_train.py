"""`leptonx train`: from a file with a TrainSpec to an artifact that computes what was trained."""

import json
import os
import signal
import subprocess
import sys
import time

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
        (["--set", "fold=false"], "--set without --recipe changes nothing"),
        (["--every", "5"], "--every without --checkpoint"),
        (["--no-resume"], "--no-resume without --checkpoint"),
        (["--overwrite"], "--overwrite without --output"),
        (["--buckets", "batch=4"], "--buckets without --output"),
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


GRAIN = """
import os, pathlib, signal, time
import grain, numpy as np, optax
import lepton_xla as lx
from net import program, evaluate as judge

def sample(number):
    x = np.random.default_rng([1, number]).normal(size=6).astype(np.float32)
    return {"x": x, "label": np.int32(x[:3].argmax(-1))}

def evaluate(predict):
    evaluate.count += 1
    if evaluate.count == 2 and pathlib.Path("kill").exists():  # at step 10
        while not pathlib.Path("run/8").exists():
            time.sleep(0.01)
        pathlib.Path("kill").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return judge(predict)

evaluate.count = 0
data = grain.MapDataset.source(range(48)).shuffle(seed=3).map(sample).batch(8)  # six batches
spec = lx.train.TrainSpec(
    program, data.to_iter_dataset(), 20, optax.adam(0.01), options={"log_every": 1},
    evaluate=lx.train.Evaluation(evaluate, every=5, metric="accuracy"),
)
"""


def losses(log):
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [(each["step"], each["loss"]) for each in records if each["kind"] == "train"]


@pytest.mark.slow
def test_a_killed_run_goes_on_in_grains_data(tmp_path, target):
    """Killed in its second pass over the data; each step's loss and the artifact are those of an undisturbed run."""
    (tmp_path / "grained.py").write_text(GRAIN)

    def train(name):
        command = [sys.executable, "-m", "lepton_xla", "train", "grained.py:spec", "--checkpoint", name, "--every", "4"]
        return subprocess.run(
            [*command, "--log", f"{name}.jsonl", "-o", f"{name}.lepton", "--buckets", "batch=8"],
            cwd=tmp_path, env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{os.getcwd()}:{tmp_path}"},
            capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip

    undisturbed = train("undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    (tmp_path / "kill").touch()
    assert train("run").returncode == -signal.SIGKILL
    assert not (tmp_path / "run.lepton").exists()
    again = train("run")
    assert again.returncode == 0, again.stderr
    expected = losses(tmp_path / "undisturbed.jsonl")
    assert [step for step, _ in expected] == list(range(1, 21))
    assert losses(tmp_path / "run.jsonl") == expected[:10] + expected[8:]
    x = np.random.default_rng(5).normal(size=(8, 6)).astype(np.float32)
    one, other = (lx.load(tmp_path / f"{name}.lepton")(x=x)["output"] for name in ("undisturbed", "run"))
    assert one.tobytes() == other.tobytes()


@pytest.mark.slow
def test_a_process_with_bad_data_ends_all(tmp_path, target):
    """JAX would wait minutes at the end of the process for the others, which wait for it."""
    (tmp_path / "one.py").write_text(
        """
import os
from net import *

def read(step):
    bad = step == 3 and os.environ["LEPTON_PROCESS_ID"] == "1"
    return {name: leaf[: 8 if bad else 16] for name, leaf in batch(step).items()}

spec = lx.train.TrainSpec(program, read, 40, optax.sgd(0.5), options={"mesh": "data=-1"})
"""
    )
    began = time.monotonic()
    command = [sys.executable, "-m", "lepton_xla"]
    done = subprocess.run(
        [*command, "launch", "local", "--processes", "2", "--", *command, "train", "one.py:spec"],
        cwd=tmp_path, env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{os.getcwd()}:{tmp_path}"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "[1] leptonx: batch 3 of the data: 'label' is int32[8], in the first batch int32[16]" in done.stderr
    assert time.monotonic() - began < 100
