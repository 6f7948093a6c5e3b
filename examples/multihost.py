"""Trains one small model on all devices of all processes: on this machine, or wherever `leptonx launch` starts it.

    leptonx launch local --processes 2 --devices 2 --watchdog-s 60 -- python examples/multihost.py
    python examples/multihost.py

Both train the same model, since every process gives the same batches and its devices take their rows.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_xla as lx


def model():
    """Two layers that tell ten classes apart."""
    keys = jax.random.split(jax.random.key(0))
    weights = {
        "first": 0.1 * jax.random.normal(keys[0], (64, 128)),
        "last": 0.1 * jax.random.normal(keys[1], (128, 10)),
    }

    def apply(weights, image):
        return jnp.tanh(image @ weights["first"]) @ weights["last"]

    return lx.trace(apply, weights, {"image": lx.TensorSpec(("batch", 64), "float32")})


def batches(step):
    """The batch of a step, the same in every process: points around one centre for each class."""
    label = np.random.default_rng(step).integers(0, 10, 32)
    noise = np.random.default_rng(10_000 + step).normal(size=(32, 64))
    centres = np.random.default_rng(0).normal(size=(10, 64))
    return {"image": (centres[label] + noise).astype(np.float32), "label": label}


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--checkpoint", help="folder for checkpoints that all processes reach")
    options.add_argument("--log", help="file for the loss of each step, as JSON lines")
    options = options.parse_args()

    place = lx.launch.initialize()
    program = model()
    checkpoint = lx.train.Checkpoints(options.checkpoint, every=10) if options.checkpoint else None
    result = lx.train.fit(
        program, lx.train.supervised(program), optax.adam(1e-2), batches, steps=options.steps, mesh="data=-1",
        checkpoint=checkpoint, log=options.log, log_every=1,
    )  # fmt: skip
    if place.index == 0:
        print(f"{jax.device_count()} devices, {place.count} processes: accuracy {result.metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
