"""What is trained: a function in training mode, its weights and state, and the program that it becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lepton_xla.adapters import modules
from lepton_xla.adapters.training import Apply, linen_training, nnx_training
from lepton_xla.arguments import takes
from lepton_xla.errors import ModelError, TrainingError
from lepton_xla.program import Program, TensorSpec
from lepton_xla.trees import some_names

type Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]]
"""`loss(weights, batch, key, state) -> (loss, metrics, state)`.

`weights` and `state` are flat dicts by path, `batch` maps names to arrays whose first axis is the row, and `key` is a
typed `jax.random` key. The loss is a float32 scalar, the mean over the batch's rows; metrics are scalars by name.

A loss may have a parameter `step`, which then gets the int32 number of the step. It may have an attribute `arrays`, a
pytree, and a method `bind(arrays) -> loss`: the arrays, such as a teacher's weights, then become an argument of the
compiled step instead of constants. It may have an attribute `extra_weights`, by path: weights of its own, which are
trained with the model's and dropped at the end. It may have a method `prepare(batch) -> batch`, which gets each batch
on the host, before it is put on devices, and adds what the loss needs, such as a teacher's stored answers.
"""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model in training mode, and its inference program.

    Attributes:
        apply: `apply(weights, state, key, *inputs) -> (outputs, new_state)`, with dropout and batch statistics.
        weights: path -> array that an optimizer updates.
        state: path -> array that calls write, such as batch statistics.
        program: the program for inference. Its weights are those two dicts together.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> model = lx.train.Model.of(program)
    >>> outputs, state = model.apply(model.weights, model.state, jax.random.key(0), jnp.ones((1, 4)))
    >>> outputs.tolist(), state
    ([[1.0, 1.0, 1.0, 1.0]], {})
    """

    apply: Apply
    weights: dict[str, jax.Array]
    state: dict[str, jax.Array]
    program: Program

    @staticmethod
    def of(model: Model | Program) -> Model:
        """Take a program as a model without state, whose float weights are trained; a `Model` is returned as it is.

        Raises:
            ModelError: if it is neither, or the program is quantized or has no float weight.
        """
        if isinstance(model, Model):
            return model
        if not isinstance(model, Program):
            raise ModelError(f"expected a train.Model or a Program to train, not a {type(model).__name__}")
        quantized = [path for path, leaf in model.weights.items() if not jax.tree_util.all_leaves([leaf])]
        if quantized:
            raise ModelError(
                f"weights {some_names(quantized)} are quantized, so they cannot be trained; train the float program "
                "and quantize it afterwards"
            )
        weights = {path: leaf for path, leaf in model.weights.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
        if not weights:
            raise ModelError("the program has no float weight to train")
        state = {path: leaf for path, leaf in model.weights.items() if path not in weights}
        fn = model.fn

        def apply(weights: Any, state: Any, key: Any, *inputs: Any) -> tuple[Any, dict[str, jax.Array]]:
            return fn({**weights, **state}, *inputs), state

        return Model(apply, weights, state, model)


def from_linen(
    module: Any,
    variables: Mapping[str, Any],
    inputs: Mapping[str, TensorSpec],
    *,
    method: str | None = None,
    rngs: Sequence[str] = ("dropout",),
    **kwargs: Any,
) -> Model:
    """Make a model to train from a Flax Linen module.

    Args:
        module: a `flax.linen.Module`.
        variables: every collection: `params` becomes the weights, all others the state.
        inputs: name -> spec, in the order of the positional arguments; the names are those of a batch's entries.
        method: the method to call; `__call__` by default.
        rngs: names of the random streams that the module draws from in training.
        **kwargs: static keyword arguments in training. Arguments named `train`, `training` or `is_training` are True,
            `deterministic` and `use_running_average` False, unless given here; for inference it is the other way round.

    Raises:
        ModelError: as `lx.from_linen`; or if there is no `params`.

    >>> import flax.linen as nn
    >>> module = nn.Sequential([nn.Dense(3), nn.relu])
    >>> variables = module.init(jax.random.key(0), jnp.ones((1, 4)))
    >>> model = lx.train.from_linen(module, variables, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> sorted(model.weights)
    ['params/layers_0/bias', 'params/layers_0/kernel']
    """
    inference = {name: value for name, value in kwargs.items() if name not in modules.INFERENCE}
    program = modules.from_linen(module, variables, inputs, method=method, **inference)
    apply, weights, state = linen_training(module, variables, method=method, rngs=rngs, kwargs=kwargs)
    return Model(apply, _arrays(weights, program), _arrays(state, program), program)


def from_nnx(module: Any, inputs: Mapping[str, TensorSpec], *, method: str | None = None, **kwargs: Any) -> Model:
    """Make a model to train from a Flax NNX module. The given module is not changed.

    Args:
        module: a `flax.nnx.Module`; its `nnx.Param` become the weights, other variables the state.
        inputs: name -> spec, in the order of the positional arguments; the names are those of a batch's entries.
        method: the method to call; `__call__` by default.
        **kwargs: static keyword arguments for the call.

    Raises:
        ModelError: as `lx.from_nnx`; or if there is no `nnx.Param`.

    >>> from flax import nnx
    >>> model = lx.train.from_nnx(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), {"x": lx.TensorSpec(("batch", 3), "float32")})
    >>> sorted(model.weights), sorted(model.state)
    (['bias', 'scale'], ['mean', 'var'])
    """
    program = modules.from_nnx(module, inputs, method=method, **kwargs)
    apply, weights, state = nnx_training(module, method=method, kwargs=kwargs)
    return Model(apply, _arrays(weights, program), _arrays(state, program), program)


def _arrays(leaves: Mapping[str, Any], program: Program) -> dict[str, jax.Array]:
    """The program's own arrays for these paths."""
    return {path: program.weights[path] for path in leaves}


@takes(label=str)
def supervised(
    model: Model | Program,
    criterion: Callable[[Any, jax.Array], jax.Array] = optax.softmax_cross_entropy_with_integer_labels,
    *,
    label: str = "label",
) -> Loss:
    """Make a loss that compares a model's outputs with the labels of a batch.

    Args:
        model: the model; its inputs are entries of the batch.
        criterion: `criterion(outputs, labels)` -> a loss per row, or a scalar; by default the cross-entropy of logits
            `[batch, classes]` and integer labels `[batch]`.
        label: the batch's entry with the labels.

    Returns:
        The loss. With integer labels and logits `[batch, classes]` it also reports the metric `accuracy`.

    Raises:
        ModelError: if `model` is neither a model nor a program.
        TrainingError: when called, if the batch lacks an entry.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> loss = lx.train.supervised(program)
    >>> batch = {"x": jnp.eye(2), "label": jnp.array([0, 1])}
    >>> value, metrics, _ = loss(program.weights, batch, jax.random.key(0), {})
    >>> round(float(value), 4), float(metrics["accuracy"])
    (0.3133, 1.0)
    """
    trained = Model.of(model)
    names = (*trained.program.inputs, label)

    def loss(weights: Any, batch: Any, key: Any, state: Any) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        *inputs, labels = entries(batch, names)
        outputs, state = trained.apply(weights, state, key, *inputs)
        value = jnp.mean(criterion(outputs, labels).astype(jnp.float32))
        metrics: dict[str, jax.Array] = {}
        if getattr(outputs, "ndim", 0) == labels.ndim + 1 and jnp.issubdtype(labels.dtype, jnp.integer):
            metrics["accuracy"] = jnp.mean((jnp.argmax(outputs, -1) == labels).astype(jnp.float32))
        return value, metrics, state

    return loss


def entries(batch: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """The named entries of a batch.

    Raises:
        TrainingError: if one is missing.

    >>> entries({"x": 1, "label": 2}, ("label",))
    [2]
    """
    missing = [name for name in names if name not in batch]
    if missing:
        raise TrainingError(f"the batch has no entry {missing[0]!r}; it has {some_names(map(repr, batch))}")
    return [batch[name] for name in names]
