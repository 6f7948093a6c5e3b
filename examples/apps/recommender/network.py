"""A GRU over a session, in plain JAX: films to the score of every film."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lepton_xla as lx

WIDTH, NEGATIVES, DROPOUT, PARTS_LEFT_OUT = 64, 256, 0.3, 0.2
# Ages of films in years, from one that comes out next year or later; and the years in which films are seen.
AGES, NOW = 60, (1990, 2040)
type Weights = Mapping[str, Any]


def begin(
    films: int, features: Mapping[str, np.ndarray], seed: int, width: int = WIDTH, *, ids: bool = True
) -> dict[str, jax.Array]:
    """Random weights: a vector (with `ids`) and a bias for each film, a matrix for each feature, and the GRU."""
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape) * scale, jnp.float32)

    return {
        **({"films": normal(films + 1, width, scale=0.02)} if ids else {}),
        "bias": jnp.zeros(films + 1),
        "age": jnp.zeros(AGES),
        **{f"from_{name}": normal(table.shape[1], width, scale=0.02) for name, table in features.items()},
        "gru/input": normal(width, 3 * width, scale=width**-0.5),
        "gru/state": normal(width, 3 * width, scale=width**-0.5),
        "gru/bias": jnp.zeros(3 * width),
        "gru/state_bias": jnp.zeros(3 * width),
        "out": normal(width, width, scale=width**-0.5),
    }


def joined(weights: Weights, features: Mapping[str, Any], keep: Mapping[str, Any] | None = None) -> jax.Array:
    """The vector of each film: its own, and what its features add. A film without one has zeros there."""
    found = weights["films"] if "films" in weights else jnp.zeros((len(weights["bias"]), len(weights["out"])))
    for name, table in features.items():
        part = table @ weights[f"from_{name}"]
        found = found + (part if keep is None else part * keep[name])
    return found


def states(weights: Weights, vectors: jax.Array, session: jax.Array) -> jax.Array:
    """What the GRU makes of a session up to each film, `[batch, length, width]`; 0 changes nothing.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014); Hidasi et al.,
    "Session-based Recommendations with Recurrent Neural Networks" (2015).
    """
    seen = jnp.moveaxis(vectors, 1, 0) @ weights["gru/input"] + weights["gru/bias"]
    there = jnp.moveaxis(session > 0, 1, 0)[..., None]

    def step(state: jax.Array, given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        entering, is_there = given
        own = state @ weights["gru/state"] + weights["gru/state_bias"]
        (reset, update, new), (own_reset, own_update, own_new) = jnp.split(entering, 3, 1), jnp.split(own, 3, 1)
        gate = jax.nn.sigmoid(update + own_update)
        proposed = jnp.tanh(new + jax.nn.sigmoid(reset + own_reset) * own_new)
        after = jnp.where(is_there, (1 - gate) * state + gate * proposed, state)
        return after, after

    start = jnp.zeros((session.shape[0], vectors.shape[-1]))
    _, all_states = jax.lax.scan(step, start, (seen, there))
    return jnp.moveaxis(all_states, 0, 1)


def by_age(weights: Weights, years: jax.Array, now: jax.Array) -> jax.Array:
    """What the age of a film adds to its score: nobody sees what is not out yet."""
    return weights["age"][jnp.clip(now[..., None] - years + 1, 0, AGES - 1)]


def scores(weights: Weights, session: jax.Array, year: jax.Array) -> jax.Array:
    """The score of every film to come next, `[batch, films + 1]`; a film of the session, or none, has the least.

    A film of the session that is not known, because its number is none of those trained on, is left out of it.
    """
    session = jnp.where((session > 0) & (session < weights["films"].shape[0]), session, 0)
    last = states(weights, weights["films"][session], session)[:, -1]
    found = (last @ weights["out"]) @ weights["films"].T + weights["bias"]
    found = found + by_age(weights, weights["years"], year)
    rows = jnp.arange(session.shape[0])[:, None]
    return found.at[rows, session].set(-1e9).at[:, 0].set(-1e9)


INPUTS = {"session": lx.TensorSpec(("batch", 50), "int32"), "year": lx.TensorSpec(("batch",), "int32")}


def served(weights: Weights, features: Mapping[str, np.ndarray], years: np.ndarray) -> lx.Program:
    """The trained model as it is served: the features are added to the films' vectors once."""
    kept = {name: leaf for name, leaf in weights.items() if not name.startswith("from_")}
    kept["films"] = jax.jit(joined)(dict(weights), {name: jnp.asarray(each) for name, each in features.items()})
    kept["years"] = jnp.asarray(years, jnp.int32)
    return lx.trace(scores, kept, INPUTS)


def to_train(weights: Weights, features: Mapping[str, np.ndarray], years: np.ndarray) -> lx.Program:
    """The model as `fit` takes it: features and the years of films are no weights there."""
    tables, out = {name: jnp.asarray(each) for name, each in features.items()}, jnp.asarray(years, jnp.int32)

    def all_scores(weights: Any, session: jax.Array, year: jax.Array) -> jax.Array:
        return scores({**weights, "films": joined(weights, tables), "years": out}, session, year)

    return lx.trace(all_scores, weights, INPUTS)


def with_top(program: lx.Program, count: int, *, whole: bool = False) -> lx.Program:
    """The program that gives the best films and their scores; or, `whole`, the scores of all films."""

    def top(fn: Callable[..., Any]) -> Callable[..., Any]:
        def best(weights: Any, session: jax.Array, year: jax.Array) -> dict[str, jax.Array]:
            every = fn(weights, session, year)
            values, places = jax.lax.top_k(every, count)
            return {"films": places, "scores": every if whole else values}

        return best

    expansion = program.expansion
    if expansion is not None:
        expansion = type(expansion)(expansion.expand, top(expansion.fn))
    (every,) = program.outputs.values()
    some = lx.TensorSpec(("batch", count), "float32")
    outputs = {"films": lx.TensorSpec(("batch", count), "int32"), "scores": every if whole else some}
    return program.replace(fn=top(program.fn), expansion=expansion, outputs=outputs)


def sampled_softmax(features: Mapping[str, np.ndarray], years: np.ndarray) -> Callable[..., Any]:
    """The loss: the cross-entropy of the film that follows among 256 uniformly drawn ones.

    Features of a batch are left out at random, so that films without one are known too.
    """
    tables = {name: jnp.asarray(each) for name, each in features.items()}
    out, films = jnp.asarray(years, jnp.int32), len(years) - 1

    def loss(weights: Any, batch: Any, key: Any, state: Any) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        session, following = batch["session"], batch["next"]
        draws, drops, parts = jax.random.split(key, 3)
        keep = {
            name: jax.random.bernoulli(part, 1 - PARTS_LEFT_OUT).astype(jnp.float32)
            for name, part in zip(tables, jax.random.split(parts, max(len(tables), 1)), strict=False)
        }
        vectors = joined(weights, tables, keep)
        kept = jax.random.bernoulli(drops, 1 - DROPOUT, (*session.shape, vectors.shape[1])) / (1 - DROPOUT)
        found = states(weights, vectors[session] * kept, session) @ weights["out"]
        others = jax.random.randint(draws, (NEGATIVES,), 1, films + 1)
        right = (found * vectors[following]).sum(-1) + weights["bias"][following]
        right = right + by_age(weights, out[following][..., None], batch["year"])[..., 0]
        # The ages of all others in each year, and of these the row of the year: a gather of every pair is slow.
        nows = jnp.arange(*NOW)
        aged = jax.nn.one_hot(batch["year"] - NOW[0], len(nows)) @ by_age(weights, out[others], nows)
        wrong = found @ vectors[others].T + weights["bias"][others] + aged
        wrong = jnp.where(others == following[..., None], -1e9, wrong)
        total = jax.nn.logsumexp(jnp.concatenate([right[..., None], wrong], -1), -1)
        there = (following > 0).astype(jnp.float32)
        return ((total - right) * there).sum() / jnp.maximum(there.sum(), 1.0), {}, state

    return loss
