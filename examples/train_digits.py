"""Train a small CNN, then prune, round and distil it while it is trained on, and compile it: about a minute on a CPU.

    python examples/train_digits.py [--steps N]

The images are scikit-learn's handwritten digits (see `digits.py`). Writes build/train_digits/digits.lepton and
summary.json: accuracy on 450 held-out images, bytes of the weights on disk, and the time of a call relative to the
float model's. The command line trains the same model:

    leptonx train examples/train_digits.py:training --recipe int8 -o digits.lepton
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time

import digits
import jax
import numpy as np
import optax

import lepton_xla as lx
from lepton_xla import train

FOLDER = pathlib.Path(__file__).parent.parent / "build" / "train_digits"
STEPS, BATCH, SIZES, TIMED_BATCH, ROUNDS = 600, 64, (1, 8, 32), 32, 50
RECIPE = lx.Recipe.load("int8-prune50").replace({"fold": False})


def model() -> train.Model:
    """An untrained network."""
    net = digits.DigitsNet()
    variables = net.init(jax.random.key(2), digits.data()[0][:1])
    return train.from_linen(net, variables, {"image": lx.TensorSpec(("batch", 8, 8, 1), "float32")})


def batch(step: int) -> dict[str, np.ndarray]:
    """The training images of a step; a function of the step needs no position in the data."""
    images, labels, _, _ = digits.data()
    rows = np.random.default_rng([0, step]).integers(0, len(images), BATCH)
    return {"image": images[rows], "label": labels[rows]}


def updates(steps: int) -> optax.GradientTransformation:
    """Adam with a rate that falls to zero."""
    return optax.adam(optax.cosine_decay_schedule(2e-3, steps))


def training() -> train.TrainSpec:
    """What `leptonx train` trains."""
    return train.TrainSpec(model, batch, STEPS, updates, evaluate=digits.evaluate, buckets={"batch": SIZES})


def main() -> None:
    """Train the float model, then its small student."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each training")
    steps = parser.parse_args().steps
    start = time.perf_counter()

    untrained = model()
    teacher = train.fit(untrained, train.supervised(untrained), updates(steps), batch, steps=steps).program
    # The student begins with the teacher's weights.
    student = train.Model(
        untrained.apply,
        {path: teacher.weights[path] for path in untrained.weights},
        {path: teacher.weights[path] for path in untrained.state},
        teacher,
    )
    loss = train.distill(student, teacher, [train.Logits(weight=0.5), train.Labels(weight=0.5)])
    result = train.fit(student, loss, updates(steps), batch, steps=steps, compression=train.schedule(RECIPE, steps))

    FOLDER.mkdir(parents=True, exist_ok=True)
    paths = {"float": FOLDER / "float.lepton", "small": FOLDER / "digits.lepton"}
    for name, program in (("float", teacher), ("small", result.quantized(sizes=[{"batch": size} for size in SIZES]))):
        lx.compile(program, {"batch": SIZES}, name="digits").save(paths[name], overwrite=True)
    loaded = {name: lx.load(path) for name, path in paths.items()}
    summary = {
        "accuracy_float": digits.evaluate(loaded["float"])["accuracy"],
        "accuracy": digits.evaluate(loaded["small"])["accuracy"],
        "bytes_float": stored_bytes(paths["float"]),
        "bytes": stored_bytes(paths["small"]),
        "latency_ratio": latency_ratio(loaded["small"], loaded["float"]),
        "seconds": time.perf_counter() - start,
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"accuracy  {summary['accuracy_float']:.2%} -> {summary['accuracy']:.2%}")
    times = summary["bytes_float"] / summary["bytes"]
    print(f"bytes     {summary['bytes_float']:,} -> {summary['bytes']:,} ({times:.1f} times smaller)")
    print(f"time      {summary['latency_ratio']:.2f} of float's for {TIMED_BATCH} images")
    print(f"wrote {paths['small'].relative_to(FOLDER.parent.parent)} after {summary['seconds']:.0f} s")


def stored_bytes(path: pathlib.Path) -> int:
    """Bytes of an artifact's weights."""
    return sum(file.stat().st_size for file in (path / "weights").rglob("*") if file.is_file())


def latency_ratio(small: lx.Servable, whole: lx.Servable) -> float:
    """Median of the ratios of two calls that take turns."""
    images = digits.data()[2][:TIMED_BATCH]
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for servable in (small, whole):
            servable(image=images)
            start = time.perf_counter()
            servable(image=images)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
