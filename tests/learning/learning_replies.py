"""A model that generates, is trained in a second, and learns replies to prompts that it has not known before."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_xla as lx
from lepton_xla import train

TOKENS, END, LONGEST = 16, 15, 4
OPTIMIZER = optax.sgd(4.0, momentum=0.8)
KNOWN, NEW = range(1, 5), range(5, 9)


def init_cache(w, B, S):
    return jnp.zeros((B, S), jnp.int32)


def prefill(w, tokens, length):
    return jax.nn.one_hot(tokens[:, 0], TOKENS) @ w["first"], init_cache(w, *tokens.shape)


def decode(w, cache, token, position):
    rows = jnp.arange(len(token))
    return jax.nn.one_hot(token, TOKENS) @ w["next"], cache.at[rows, position].set(token)


def generator():
    weights = {"first": jnp.zeros((TOKENS, TOKENS)), "next": jnp.zeros((TOKENS, TOKENS))}
    return lx.Generator(
        init_cache, prefill, decode, weights, slots=2, capacity=8, encoder_decoder=True, end_tokens=[END]
    )


def reply(kind):
    """The right reply: two tokens, of which the second follows from the first."""
    return [kind + 1, 10 + kind % 5]


def prompts(count, seed, kinds):
    random = np.random.default_rng([3, seed])
    return [[int(random.choice(kinds)), *random.integers(1, 15, random.integers(0, 3)).tolist()] for _ in range(count)]


def examples(asked, replies):
    tokens = np.zeros((len(asked), LONGEST), np.int32)
    for row, prompt in zip(tokens, asked, strict=True):
        row[: len(prompt)] = prompt
    said = [[*map(int, each.split()), END] for each in replies]
    return {"tokens": tokens, "said": np.array(said, np.int32).reshape(-1, 3)}


def batch(step):
    asked = prompts(32, 100 + step, KNOWN)
    return examples(asked, [" ".join(map(str, reply(each[0]))) for each in asked])


def loss(weights, batch, key, state):
    first = jax.nn.one_hot(batch["tokens"][:, 0], TOKENS) @ weights["first"]
    later = jax.nn.one_hot(batch["said"][:, :-1], TOKENS) @ weights["next"]
    logits = jnp.concatenate([first[:, None], later], 1)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["said"]).mean(), {}, state


def evaluate(predict):
    asked = prompts(40, 1, KNOWN)
    found = [
        predict(tokens=np.int32([each]), lengths=np.int32([len(each)]))["logits"].argmax() == reply(each[0])[0]
        for each in asked
    ]
    return {"accuracy": float(np.mean(found))}


def trained():
    model = train.fit(generator().program, loss, OPTIMIZER, batch, steps=60, progress=False)
    return model.program


def spec(**changes):
    """What `leptonx learn` gets: it begins with the float master."""
    given = {
        "model": lambda: generator().program,
        "data": batch,
        "steps": 80,
        "optimizer": OPTIMIZER,
    }
    return train.TrainSpec(**(given | {"loss": loss, "examples": examples, "evaluate": evaluate} | changes))
