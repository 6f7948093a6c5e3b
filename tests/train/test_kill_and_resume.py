"""A run that is killed, or told to end, and started again ends with the bits of one that nothing disturbed."""

import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 20

# Trains for 20 steps and saves each fifth. It sends itself a signal: before step N, or while the step is compiled.
# Before step 10 the checkpoint of step 10 has just begun to be saved.
SCRIPT = """
import os, signal, sys
import jax.numpy as jnp, numpy as np, optax
import lepton_xla as lx

folder, moment, number, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
random = np.random.default_rng(0)
weights = {name: jnp.asarray(random.normal(size=(256, 256)) / 16, jnp.float32) for name in "ab"}
program = lx.trace(
    lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"], weights, {"x": lx.TensorSpec(("batch", 256), "float32")}
)
supervised = lx.train.supervised(program)


def loss(*arguments):
    if moment == "compile":
        os.kill(os.getpid(), number)
    return supervised(*arguments)


def data(step):
    print("data of", step, flush=True)
    if moment == str(step):
        os.kill(os.getpid(), number)
    random = np.random.default_rng(step)
    return {"x": random.normal(size=(8, 256)).astype(np.float32), "label": random.integers(0, 256, 8).astype(np.int32)}


checkpoints = lx.train.Checkpoints(folder + "/run", every=5)
result = lx.train.fit(program, loss, optax.adam(0.01), data, steps=steps, checkpoint=checkpoints, progress=False)
np.savez(folder + "/result.npz", **result.state.weights)
"""


def train(folder, moment="never", number=0):
    """Run the script; gives its exit code and the steps whose data it asked for."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "LEPTON_CACHE": "off"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), moment, str(int(number)), str(STEPS)],
        env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    steps = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("data of ")]
    return done.returncode, steps, done.stderr


def trained(folder):
    with np.load(folder / "result.npz") as found:
        return {name: found[name].tobytes() for name in found.files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, steps, said = train(folder)
    assert code == 0, said
    assert steps[-1] == STEPS - 1
    return trained(folder)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("number", "moment", "resumed_at"),
    [
        (signal.SIGKILL, "10", {5, 10}),
        (signal.SIGTERM, "13", {14}),
        slow(signal.SIGKILL, "5", {0, 5}),
        slow(signal.SIGKILL, "13", {5, 10}),
        slow(signal.SIGKILL, "compile", {0}),
        slow(signal.SIGTERM, "10", {11}),
        slow(signal.SIGTERM, "compile", {1}),
    ],
)
def test_weights_are_those_of_a_run_that_nothing_disturbed(tmp_path, undisturbed, number, moment, resumed_at):
    code, _, said = train(tmp_path, moment, number)
    assert code == (75 if number == signal.SIGTERM else -number), said
    assert not (tmp_path / "result.npz").exists()
    code, steps, said = train(tmp_path)
    assert code == 0, said
    assert steps[0] in resumed_at
    assert steps[-1] == STEPS - 1
    assert trained(tmp_path) == undisturbed
