"""Shrink a network while it is trained: most of the training then runs on a small one.

    python examples/shrink_while_training.py [--steps N] [--seeds N]

A network of 1.1 million parameters learns scikit-learn's handwritten digits (1,347 images for training, 450 held out).
After a fifth of the steps its least important hidden units are removed physically, with their batch statistics and
optimizer moments; fewer than 100,000 parameters are trained on. The same network is also trained without shrinking, on
the same batches. Prints both, and writes build/shrink_while_training/summary.json.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from typing import Any

import digits
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_xla as lx

FOLDER = pathlib.Path(__file__).parent.parent / "build" / "shrink_while_training"
BATCH = 64
SHRINK_AT = 0.2  # share of the steps
SHRINK = {"bytes": 0.085, "round_to": 8}


class Net(nn.Module):
    """8 x 8 grey images, float32 [batch, 8, 8, 1] in [0, 1], to 10 logits."""

    @nn.compact
    def __call__(self, image, train: bool = False):
        x = image.reshape(image.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(1024)(x)))
            x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(10)(x)


def main() -> None:
    """Train with and without shrinking, from several seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="training steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    shrink_at = int(SHRINK_AT * given.steps)
    runs: dict[str, list[dict[str, float]]] = {"unshrunk": [], "shrunk": []}
    for seed in range(given.seeds):
        for name in runs:
            shrinks = lx.train.Compression(shrink_at=shrink_at, shrink=SHRINK) if name == "shrunk" else None
            found = run(name, shrinks, given.steps, seed, shrink_at)
            runs[name].append(found)
            print(
                f"seed {seed} {name:<9}{found['parameters']:>10,} parameters, {found['step_ms']:.2f} ms a step, "
                f"{found['seconds']:.1f} s, accuracy {found['accuracy']:.2%}",
                flush=True,
            )
    summary = {"data": "scikit-learn digits", "steps": given.steps, "seeds": given.seeds, **summarize(runs)}
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(
        f"step after / before shrinking {summary['step_time_ratio']:.2f}, whole run with recompiling / unshrunk run "
        f"{summary['run_time_ratio']:.2f}, accuracy {summary['accuracy_difference_points']:+.2f} points"
    )


def run(name: str, compression: lx.train.Compression | None, steps: int, seed: int, shrink_at: int) -> dict[str, float]:
    """Train once; the seconds include tracing, compiling, choosing units, and cutting the state."""
    start = time.perf_counter()
    net = Net()
    variables = net.init(jax.random.key(seed), jnp.ones((1, 8, 8, 1)))
    model = lx.train.from_linen(net, variables, {"image": lx.TensorSpec(("batch", 8, 8, 1), "float32")})
    log = FOLDER / f"{name}-{seed}.jsonl"
    log.unlink(missing_ok=True)
    result = lx.train.fit(
        model,
        lx.train.supervised(model),
        optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=1e-3),
        lambda step: batch(step, seed),
        steps=steps,
        compression=compression,
        seed=seed,
        log=log,
        progress=False,
    )
    seconds = time.perf_counter() - start
    predict = jax.jit(result.program.fn)
    accuracy = digits.evaluate(lambda image: {"output": np.asarray(predict(result.program.weights, image))})
    return {
        "parameters": sum(leaf.size for leaf in result.state.weights.values()),
        "seconds": seconds,
        "step_ms_before": step_ms(log, 0, shrink_at),
        "step_ms": step_ms(log, shrink_at, steps),
        "accuracy": accuracy["accuracy"],
    }


def batch(step: int, seed: int) -> dict[str, Any]:
    """Training images, always the same for a step and seed."""
    images, labels, _, _ = digits.data()
    rows = np.random.default_rng((seed, step)).choice(len(images), BATCH, replace=False)
    return {"image": images[rows], "label": labels[rows]}


def step_ms(log: pathlib.Path, first: int, last: int) -> float:
    """Median time of a step among the records of these steps; compiling is not in them."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rates = [each["steps_per_s"] for each in records if each["kind"] == "train" and first < each["step"] <= last]
    return 1e3 / statistics.median(rates)


def summarize(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Mean accuracies over the seeds, and medians of the ratios of times."""
    shrunk, unshrunk = runs["shrunk"], runs["unshrunk"]
    before, after = (statistics.mean(each["accuracy"] for each in found) for found in (unshrunk, shrunk))
    return {
        "parameters_before": unshrunk[0]["parameters"],
        "parameters_after": max(each["parameters"] for each in shrunk),
        "step_time_ratio": statistics.median(each["step_ms"] / each["step_ms_before"] for each in shrunk),
        "run_time_ratio": statistics.median(
            each["seconds"] / other["seconds"] for each, other in zip(shrunk, unshrunk, strict=True)
        ),
        "accuracy_unshrunk": before,
        "accuracy": after,
        "accuracy_difference_points": 100 * (after - before),
    }


if __name__ == "__main__":
    main()
