"""A small training run that ends itself: `python killable.py FOLDER`, and `KILL=PLACE:SIGNAL:DELAY` says where.

Prints the SHA-256 of its state after the last step, and of all evaluations.
"""

import hashlib
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_xla as lx
from lepton_xla.train import Checkpoints, Evaluation, fit, supervised

STEPS, EVERY, WIDTH = 10, 4, 512
PLACE, NAME, DELAY = os.environ.get("KILL", "::0").split(":")


def strike(place, folder):
    """Send this process the signal if this is the place, after writing down which checkpoints are complete."""
    if place != PLACE:
        return
    while place in ("between", "evaluate") and not (folder / str(EVERY)).exists():
        time.sleep(0.01)  # no save is going on at these places
    if float(DELAY):
        threading.Timer(float(DELAY), send, [folder]).start()
    else:
        send(folder)
    if NAME == "KILL":
        time.sleep(60)  # nothing after this place happens


def send(folder):
    complete = sorted(each.name for each in folder.iterdir() if each.name.isdigit())
    folder.with_suffix(".struck").write_text(" ".join(complete))
    os.kill(os.getpid(), signal.Signals[f"SIG{NAME}"])


def main(folder):
    draw = np.random.default_rng(3)
    weights = {"a": draw.normal(size=(6, WIDTH)) / 3, "b": draw.normal(size=(WIDTH, WIDTH)) / 20}
    weights = {name: jnp.asarray(leaf, "float32") for name, leaf in weights.items()}
    inputs = {"x": lx.TensorSpec(("batch", 6), "float32")}
    program = lx.trace(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"][:, :3], weights, inputs)
    plain = supervised(program)

    def loss(weights, batch, key, state):
        keep = jax.random.bernoulli(key, 0.8, batch["x"].shape).astype("float32")
        return plain(weights, {**batch, "x": batch["x"] * keep}, key, state)

    def data(step):
        if step == EVERY:
            strike("save", folder)  # checkpoint 4 has just begun to be written
        if step == EVERY + 2:
            strike("between", folder)
        x = np.random.default_rng([7, step]).normal(size=(8, 6)).astype("float32")
        return {"x": x, "label": x[:, :3].argmax(-1).astype("int32")}

    evaluations = []

    def evaluate(predict):
        batch = data(1000)
        evaluations.append(1)
        if len(evaluations) == 2:  # after step 6
            strike("evaluate", folder)
        return {"accuracy": float((predict(x=batch["x"])["output"].argmax(-1) == batch["label"]).mean())}

    result = fit(
        program, loss, optax.adam(0.01), data, steps=STEPS,
        evaluate=Evaluation(evaluate, every=3, metric="accuracy"), checkpoint=Checkpoints(folder, every=EVERY),
    )  # fmt: skip
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(result.state.replace(key=jax.random.key_data(result.state.key))):
        digest.update(np.asarray(leaf).tobytes())
    digest.update(repr(result.history).encode())
    sys.stdout.write(digest.hexdigest())


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
