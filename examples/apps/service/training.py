"""Trains the model: the kind of each question, and the words of the replies."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import network
import numpy as np
import optax
import questions
import runs
import words

import lepton_xla as lx
from lepton_xla import train

BATCH, WHOLE, LENGTH = 128, 16, 32  # questions of a step, whole replies of it, tokens of a question
RATE, REST, DROPOUT, MISSING = 2e-3, 0.1, 0.2, 0.1
# Shares of the training questions: held out, refused of these; so many strangers are added.
VALIDATION, REFUSED, STRANGE = 0.1, 0.04, 0.1
SLOTS = 8


def untrained(made: words.Words, folder: pathlib.Path | None, seed: int) -> train.Model:
    """The model, whose encoder stays as it is if it was read from a folder."""
    encoder = network.read_encoder(folder) if folder else network.small_encoder(made.first, seed)
    weights = encoder | network.decoder(made, encoder["encoder/norm/weight"].shape[0], seed)
    generator = lx.Generator(
        *network.steps(made), weights, slots=SLOTS, capacity=network.PLACES, encoder_decoder=True,
        end_tokens=[made.first + made.end], tokenizer=made.data,
    )  # fmt: skip
    return train.freeze(generator.program, ["threshold", *(["encoder/.*"] if folder else [])])


def texts_of(task: questions.Task) -> list[str]:
    """All questions that there are to train on."""
    return [*task.train[0], *task.strangers]


def encoded(made: words.Words, task: questions.Task, folder: pathlib.Path) -> np.ndarray:
    """What a fixed encoder makes of all questions, once: float16 `[questions, LENGTH, features]`."""
    tokens, lengths = words.tokens_of(made, texts_of(task), LENGTH)
    weights, encode, found = network.read_encoder(folder), jax.jit(network.encode), list[np.ndarray]()
    for at in range(0, len(tokens), 256):
        rows = np.arange(at, at + 256) % len(tokens)
        found.append(np.asarray(encode(weights, tokens[rows], lengths[rows]), np.float16))
    return np.concatenate(found)[: len(tokens)]


def loss_of(made: words.Words) -> Any:
    """The cross-entropy of the kind of each question, and of all words of some replies.

    Which word follows depends on the kind, so replies of any kind are learned with any question, few in a batch.
    """
    replies = jnp.asarray(made.replies)

    def loss(weights: Any, batch: Any, key: Any, state: Any) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        w = {**state, **weights}
        draws, features, missing, dropped = jax.random.split(key, 4)
        tokens, kinds = batch["tokens"], batch["kind"]
        lost = jax.random.bernoulli(dropped, MISSING, tokens.shape) & (tokens > 3)  # some words are not known
        states, seen = _read(w, {**batch, "tokens": jnp.where(lost, 1, tokens)})
        states = jnp.where(jax.random.bernoulli(features, 1 - DROPOUT, states.shape), states / (1 - DROPOUT), 0.0)
        seen = seen & (jax.random.bernoulli(missing, 1 - MISSING, seen.shape) | (jnp.arange(seen.shape[1])[None] == 0))
        first = _first(w, states, seen)
        of_kind = optax.softmax_cross_entropy_with_integer_labels(first, kinds).mean()
        said = replies[jax.random.randint(draws, (WHOLE,), 0, made.kinds)]
        logits = network.replay(w, states[:WHOLE], seen[:WHOLE], said[:, :-1])[:, 1:]
        there = jnp.concatenate([jnp.ones((WHOLE, 1), bool), said[:, 1:-1] != made.end], 1)  # to the first end
        each = optax.softmax_cross_entropy_with_integer_labels(logits, said[:, 1:])
        of_words = each.mean(where=there)
        right = (first.argmax(-1) == kinds).mean()
        return of_kind + of_words, {"kinds": right, "words_loss": of_words}, state

    return loss


def without(task: questions.Task, kinds: Sequence[int]) -> tuple[questions.Task, np.ndarray]:
    """The task before anybody asked about these kinds, and which of `texts_of` are left."""
    left = [row for row, kind in enumerate(task.train[1]) if kind not in kinds]
    asked = [task.train[0][row] for row in left], [task.train[1][row] for row in left]
    strangers = len(task.train[0]) + np.arange(len(task.strangers))
    return dataclasses.replace(task, train=asked), np.concatenate([np.array(left, int), strangers])


def held_out(task: questions.Task, random: np.random.Generator) -> list[np.ndarray]:
    """Numbers of the training questions that are held out, and of the others."""
    order = random.permutation(len(task.train[0]))
    return np.split(order, [int(len(order) * VALIDATION)])


def trained(
    made: words.Words, task: questions.Task, folder: pathlib.Path | None, states: Callable[[], np.ndarray], seed: int,
    steps: int, kept: pathlib.Path,
) -> tuple[lx.Program, float]:  # fmt: skip
    """Train once, then read what was trained from a folder; `states` gives what a fixed encoder makes of all questions.

    Returns:
        The program, and its threshold: it refuses what it is less certain of than of nearly all held-out questions.
    """
    model = untrained(made, folder, seed)
    name = f"{len(task.train[0])}-{made.count}-{'minilm' if folder else 'small'}-{steps}-{seed}.npz"
    broken_off = train.Checkpoints((kept / name).with_suffix(""), every=200, keep=1)
    found = runs.once(
        kept / name, lambda: _fitted(model, made, task, states if folder else None, seed, steps, broken_off)
    )
    shutil.rmtree(broken_off.folder, ignore_errors=True)  # it is done; what is trained anew begins anew
    weights = {**model.program.weights, **{path: jnp.asarray(leaf) for path, leaf in found.items()}}
    return model.program.replace(weights=weights), float(found["threshold"])


def _fitted(
    model: train.Model, made: words.Words, task: questions.Task, states: Callable[[], np.ndarray] | None, seed: int,
    steps: int, broken_off: train.Checkpoints,
) -> dict[str, jax.Array]:  # fmt: skip
    """The weights that change, and the threshold."""
    kinds = np.array([*task.train[1], *[made.kinds - 1] * len(task.strangers)], np.int32)
    tokens, lengths = words.tokens_of(made, texts_of(task), LENGTH)
    random = np.random.default_rng(seed)
    held, used = held_out(task, random)
    strange = len(task.train[0]) + random.integers(0, len(task.strangers), int(STRANGE * len(used)))
    used = np.concatenate([used, strange])
    rows: dict[str, np.ndarray] = {"tokens": tokens, "lengths": lengths, "kind": kinds}
    if states is not None:
        rows["states"] = states()

    def batch(step: int) -> dict[str, np.ndarray]:
        chosen = used[np.random.default_rng([seed, step]).integers(0, len(used), BATCH)]
        return {name: array[chosen] for name, array in rows.items()}

    optimizer = optax.adamw(
        optax.cosine_decay_schedule(RATE if states is not None else RATE / 2, steps), weight_decay=REST
    )
    result = train.fit(
        model, loss_of(made), optimizer, batch, steps=steps, clip_norm=1.0, seed=seed, checkpoint=broken_off
    )
    threshold = refusing(made, result.program.weights, {name: array[held] for name, array in rows.items()})
    return {**{path: result.program.weights[path] for path in model.weights}, "threshold": jnp.float32(threshold)}


def refusing(made: words.Words, weights: Mapping[str, jax.Array], held: Mapping[str, np.ndarray]) -> float:
    """The certainty that all but few of the questions exceed."""

    @jax.jit
    def certainty(w: Any, rows: Any) -> jax.Array:
        return network.certainty(_first(w, *_read(w, rows)), made)[:, 0]

    found: list[float] = []
    for at in range(0, count := len(held["kind"]), BATCH):
        rows = np.arange(at, at + BATCH) % count
        found += certainty(dict(weights), {name: array[rows] for name, array in held.items()}).tolist()
    return sorted(found[:count])[int(REFUSED * count)]


def _read(w: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
    """Encoded questions, and which of their tokens there are."""
    seen = jnp.arange(rows["tokens"].shape[1])[None] < rows["lengths"][:, None]
    if "states" in rows:
        return rows["states"].astype(jnp.float32), seen
    return network.encode(w, rows["tokens"], rows["lengths"]), seen


def _first(w: Any, states: jax.Array, seen: jax.Array) -> jax.Array:
    """Logits of the first token."""
    return network.replay(w, states, seen, jnp.zeros((len(seen), 0), jnp.int32))[:, 0]
