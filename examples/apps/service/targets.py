"""What the commands take: the network that run.py trained, to be made small, to be served and to learn on.

The network says first which kind of question it is, and then the reply to that kind. `leptonx tune` judges models by
what they are called with, so formats are found by the reader: that first step as a model of its own, with the network's
weights, a text in, the certainty of each kind out.

leptonx tune examples/apps/service/targets.py:model --metric accuracy --max-drop 0.5 --objective bytes
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import network
import numpy as np
import optax
import questions
import reports
import training
import words

import lepton_xla as lx
from lepton_xla import train

SIZES, ROWS = (1, 8), 64  # of a batch that is tuned for, and that calibrates
# The small tokenizer of a quick run splits words that it has not seen into letters.
LENGTHS, QUICK_LENGTHS = (16, 32, 128), (network.PLACES,)
STEPS, SMALL_STEPS, FEW = 1200, 1500, 100


@dataclasses.dataclass(frozen=True)
class Setting:
    """The run that is meant.

    Attributes:
        task: all questions.
        made: the tokenizer.
        encoder: folder of the encoder; None for a small one that is trained too.
        steps: of training.
        lengths: of questions, in tokens, that are compiled for.
    """

    task: questions.Task
    made: words.Words
    encoder: pathlib.Path | None
    steps: int
    lengths: tuple[int, ...]

    @functools.cached_property
    def states(self) -> np.ndarray:
        """What a fixed encoder makes of all questions."""
        assert self.encoder is not None
        return training.encoded(self.made, self.task, self.encoder)

    def trained(self, seed: int) -> tuple[lx.Program, float]:
        """The network that knows all kinds, and its threshold."""
        folder = reports.folder() / "service" / "runs"
        return training.trained(self.made, self.task, self.encoder, lambda: self.states, seed, self.steps, folder)

    @functools.cached_property
    def before(self) -> questions.Task:
        """The task before anybody asked about what is new."""
        return training.without(self.task, questions.new_kinds(self.task))[0]

    def trained_before(self) -> tuple[lx.Program, float]:
        """The network of then: it has the replies to all kinds, and knows no question of the new ones."""
        task, rows = training.without(self.task, questions.new_kinds(self.task))
        folder = reports.folder() / "service" / "runs"
        return training.trained(self.made, task, self.encoder, lambda: self.states[rows], 0, self.steps, folder)


@functools.cache
def setting() -> Setting:
    """As run.py wrote it to settings.json."""
    file = reports.folder() / "service" / "settings.json"
    known = json.loads(file.read_text()) if file.exists() else {"steps": None, "quick": False}
    task = questions.made_up(6) if known["quick"] else questions.load()
    encoder = words.minilm() if task.source == "BANKING77" else None
    made = words.make(task.kinds, task.replies, task.train[0], encoder)
    lengths = QUICK_LENGTHS if known["quick"] else LENGTHS
    return Setting(task, made, encoder, known["steps"] or (STEPS if encoder else SMALL_STEPS), lengths)


def reader(program: lx.Program, made: words.Words) -> lx.Program:
    """The certainty of each kind, from texts: 1 for `unknown` where no other is certain enough."""

    def kinds(weights: Mapping[str, Any], tokens: jax.Array) -> dict[str, jax.Array]:
        lengths = (tokens != 0).sum(1)
        seen = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        states = network.encode(weights, tokens, lengths)
        logits = network.replay(weights, states, seen, jnp.zeros((tokens.shape[0], 0), jnp.int32))[:, 0]
        return {"kinds": jax.nn.softmax(network.decided(weights, logits, made)[:, : made.kinds], -1)}

    spec = {"tokens": lx.TensorSpec(("batch", training.LENGTH), "int32")}
    return lx.take_texts(lx.trace(kinds, dict(program.weights), spec), made.data, length=training.LENGTH, truncate=True)


def share_right(texts: list[str], labels: np.ndarray) -> Callable[[Any], dict[str, float]]:
    """An evaluation: of these questions, the share whose kind is told."""
    tokens, _ = words.tokens_of(setting().made, texts, training.LENGTH)

    def evaluate(predict: Any) -> dict[str, float]:
        found = [predict(tokens=tokens[k : k + ROWS])["kinds"].argmax(-1) for k in range(0, len(tokens), ROWS)]
        return {"accuracy": float((np.concatenate(found) == labels).mean())}

    return evaluate


def to_choose_by(task: questions.Task) -> tuple[list[str], np.ndarray]:
    """Questions that nothing is trained on, and their kinds; all, where those are few."""
    held, _ = training.held_out(task, np.random.default_rng(0))
    rows = held if len(held) >= FEW else np.arange(len(task.train[0]))
    return [task.train[0][row] for row in rows], np.array(task.train[1])[rows]


@functools.cache
def model() -> lx.ModelSpec:
    """For `leptonx tune`: the reader of the first network."""
    own = setting()
    asked, labels = to_choose_by(own.task)
    read = reader(own.trained(0)[0], own.made)
    return lx.ModelSpec(
        fn=read, buckets={"batch": SIZES}, evaluate=share_right(asked, labels),
        calibration=[read.converted({"text": asked[k : k + ROWS]}) for k in range(0, len(asked), ROWS)],
    )  # fmt: skip


@functools.cache
def served() -> lx.ModelSpec:
    """For `leptonx compile`: the network before anybody asked about what is new, and what it was asked then."""
    own = setting()
    asked, _ = to_choose_by(own.before)
    prompts = [
        {"prompt": asked[k : k + ROWS], "max_tokens": own.made.replies.shape[1]} for k in range(0, len(asked), ROWS)
    ]
    return lx.ModelSpec(fn=own.trained_before()[0], buckets={"length": own.lengths}, calibration=prompts)


def first_right(made: words.Words, texts: list[str], labels: np.ndarray) -> Callable[[Any], dict[str, float]]:
    """An evaluation of a network: the share of questions whose kind is the first token of the reply."""
    tokens, lengths = words.tokens_of(made, texts, training.LENGTH)

    def evaluate(predict: Any) -> dict[str, float]:
        rows = zip(tokens, lengths, labels, strict=True)
        right = [
            predict(tokens=row[None, :size], lengths=np.array([size], np.int32))["logits"].argmax() == made.first + kind
            for row, size, kind in rows
        ]
        return {"accuracy": float(np.mean(right))}

    return evaluate


def learning() -> train.TrainSpec:
    """For `leptonx learn`: as the network was trained, with what is asked now and the right replies to it."""
    own = setting()
    made, task = own.made, own.before
    texts, kinds = training.texts_of(task), np.array([*task.train[1], *[made.kinds - 1] * len(task.strangers)])
    tokens, _ = words.tokens_of(made, texts, training.LENGTH)
    _, used = training.held_out(task, np.random.default_rng(0))
    # A tenth of what is old are questions on other subjects.
    strangers = len(task.train[0]) + np.arange(len(task.strangers))
    both = training.loss_of(made)

    def loss(weights: Any, batch: Any, key: Any, state: Any) -> Any:
        seen = batch["tokens"]
        return both(weights, {"tokens": seen, "lengths": (seen != 0).sum(1), "kind": batch["kind"]}, key, state)

    def old(step: int) -> dict[str, np.ndarray]:
        random, rows = np.random.default_rng([8, step]), training.BATCH
        chosen = np.where(random.random(rows) < 0.1, random.choice(strangers, rows), random.choice(used, rows))
        return {"tokens": tokens[chosen], "kind": kinds[chosen].astype(np.int32)}

    def examples(prompts: list[list[int]], replies: list[str]) -> dict[str, np.ndarray]:
        numbers = {reply: number for number, reply in enumerate(own.task.replies)}
        # Anybody may send another text as feedback: that is left out.
        known = [(prompt, numbers[reply]) for prompt, reply in zip(prompts, replies, strict=True) if reply in numbers]
        table = np.zeros((len(known), training.LENGTH), np.int32)
        for row, (prompt, _) in zip(table, known, strict=True):
            row[: len(prompt)] = prompt[: len(row)]
        return {"tokens": table, "kind": np.array([kind for _, kind in known], np.int32)}

    fixed = ["threshold", *(["encoder/.*"] if own.encoder else [])]
    asked, labels = to_choose_by(task)

    def optimizer(steps: int) -> optax.GradientTransformation:
        # It begins with nothing of what the first training knew of its gradients.
        rate = optax.warmup_cosine_decay_schedule(0.0, training.RATE / 2, steps // 10, steps)
        return optax.adamw(rate, weight_decay=training.REST)

    return train.TrainSpec(
        train.freeze(own.trained_before()[0], fixed), old, 400, optimizer, loss=loss, examples=examples,
        evaluate=first_right(made, asked, labels), options={"clip_norm": 1.0},
    )  # fmt: skip
