"""A small training run that does something to itself: `python killable.py FOLDER`, also as one of several processes.

`STRIKE=PLACE:WHAT:DELAY:RANK` says where, what (a signal, `HANG`, or a number of bytes: files may not be larger from
there on until step 7), after how many seconds, and in which process (by default in each). It happens in the first run
only. `STEPS` is the number of steps; with `LOCAL` each process gives its own rows, with `GRAIN` the data is Grain's.

Prints the samples of each batch, and at the end the SHA-256 of state and evaluations.
"""

import hashlib
import os
import pathlib
import resource
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

import lepton_xla as lx
from lepton_xla.train import Checkpoints, Evaluation, fit, supervised

STEPS, EVERY, WIDTH = int(os.environ.get("STEPS", 10)), 4, 512
PLACE, WHAT, DELAY, RANK = (os.environ.get("STRIKE", "") + ":::").split(":")[:4]
LOWERED, COMPILED = "jaxpr_to_mlir_module_duration", "backend_compile_duration"


def tell(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def strike(place, folder):
    """Do it if this is the place, after writing down which checkpoints are complete."""
    if place != PLACE or RANK not in ("", str(jax.process_index())) or struck(folder).exists():
        return
    while place in ("between", "evaluate") and not (folder / str(EVERY)).exists():
        time.sleep(0.01)  # no save is going on at these places
    if float(DELAY or 0):
        threading.Timer(float(DELAY), act, [folder]).start()
    else:
        act(folder)
    if WHAT == "KILL":
        time.sleep(60)  # nothing after this place happens


def struck(folder):
    return folder.with_suffix(".struck")


def act(folder):
    if os.environ.get("STRIKE_AGAIN") is None:
        struck(folder).write_text(" ".join(sorted(each.name for each in folder.iterdir() if each.name.isdigit())))
    if WHAT == "HANG":
        time.sleep(600)
    elif WHAT.isdigit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(WHAT), resource.RLIM_INFINITY))
    else:
        os.kill(os.getpid(), signal.Signals[f"SIG{WHAT}"])


def strike_in_compile(folder):
    """Strike while XLA compiles the step, from a thread."""
    compiling = []

    def listen(event, seconds, **named):
        if event.endswith(LOWERED) and "step" in named.get("fun_name", ""):
            compiling.append(event)
            threading.Timer(0.5, during, [folder]).start()
        elif event.endswith(COMPILED):
            compiling.clear()

    def during(folder):
        assert compiling, "the step was compiled too soon"
        strike("compile", folder)

    jax.monitoring.register_event_duration_secs_listener(listen)


def main(folder):
    lx.launch.initialize()
    several = jax.process_count() > 1
    draw = np.random.default_rng(3)
    weights = {"a": draw.normal(size=(6, WIDTH)) / 3, "b": draw.normal(size=(WIDTH, WIDTH)) / 20}
    weights = {name: jnp.asarray(leaf, "float32") for name, leaf in weights.items()}
    inputs = {"x": lx.TensorSpec(("batch", 6), "float32")}
    program = lx.trace(lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"][:, :3], weights, inputs)
    plain = supervised(program)

    def loss(weights, batch, key, state):
        strike("trace", folder)
        keep = jax.random.bernoulli(key, 0.8, batch["x"].shape).astype("float32")
        value, metrics, state = plain(weights, {**batch, "x": batch["x"] * keep}, key, state)
        if "LONG_COMPILE" in os.environ:  # XLA takes half a second for a sort
            for size in range(10, 20):
                value = value + 1e-6 * jnp.sort(jnp.sin(weights["a"][0, :size] * size)).max()
        return value, metrics, state

    def sample(number):
        x = np.random.default_rng([7, number]).normal(size=6).astype("float32")
        return {"x": x, "label": np.int32(x[:3].argmax(-1)), "id": np.int32(number)}

    def batch_of(step):
        samples = [sample(8 * step + row) for row in range(8)]
        return {name: np.stack([each[name] for each in samples]) for name in samples[0]}

    def data(step):
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        for place, at in (("before", EVERY - 1), ("save", EVERY), ("between", EVERY + 2), ("again", 2 * EVERY)):
            if step == at:
                strike(place, folder)  # at `save` and `again`, a checkpoint has just begun to be written
        if several and WHAT == "TERM":
            time.sleep(0.6)  # JAX's service looks for the signal once a second
        tell("data of", step)
        batch = batch_of(step)
        if "LOCAL" not in os.environ:
            return batch
        return {name: np.split(leaf, jax.process_count())[jax.process_index()] for name, leaf in batch.items()}

    def evaluate(predict):
        batch = batch_of(1000)
        evaluate.count += 1
        if evaluate.count == 2:  # after step 6
            strike("evaluate", folder)
        found = float((predict(x=batch["x"])["output"].argmax(-1) == batch["label"]).mean())
        # With `UNEQUAL` each process but the first finds the first evaluation to be the best.
        return {"accuracy": 1 / evaluate.count if "UNEQUAL" in os.environ and jax.process_index() else found}

    evaluate.count = 0
    if PLACE == "compile":
        strike_in_compile(folder)
    result = fit(
        program, loss, optax.adam(0.01), grain_data(sample) if "GRAIN" in os.environ else data, steps=STEPS,
        mesh="data=-1" if several else None, local_batches="LOCAL" in os.environ,
        rules=lx.sharding.Rules([("b", ("data",))]) if several else None,
        evaluate=Evaluation(evaluate, every=3, metric="accuracy"), checkpoint=Checkpoints(folder, every=EVERY),
        log=os.environ.get("LOG"), log_every=1,
    )  # fmt: skip
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(result.state.replace(key=jax.random.key_data(result.state.key))):
        whole = leaf if leaf.is_fully_replicated else multihost_utils.process_allgather(leaf, tiled=True)
        digest.update(np.asarray(whole).tobytes())
    digest.update(repr(result.history).encode())
    if jax.process_index() == 0:
        tell("digest", digest.hexdigest())


def grain_data(sample):
    import grain

    def show(batch):
        if jax.process_index() == 0:
            tell("samples", *batch["id"])
        return batch

    numbers = grain.MapDataset.source(range(64)).shuffle(seed=5).map(sample).batch(8)
    return Shown(numbers.to_iter_dataset(), show)


class Shown:
    """A Grain dataset whose batches are shown when training takes them, not when Grain reads ahead."""

    def __init__(self, dataset, show):
        self.dataset, self.show = dataset, show

    def __iter__(self):
        return ShownIterator(iter(self.dataset), self.show)


class ShownIterator:
    def __init__(self, iterator, show):
        self.iterator, self.show = iterator, show
        self.get_state, self.set_state = iterator.get_state, iterator.set_state

    def __iter__(self):
        return self

    def __next__(self):
        return self.show(next(self.iterator))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
