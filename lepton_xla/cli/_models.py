"""Models for the commands: importing, calibration data, running in float, evaluation, test inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_xla.cli._common import NO_RECIPE
from lepton_xla.compiler import Servable
from lepton_xla.errors import ArtifactError, CompileError, InputError, LeptonError, ModelError, ShardingError
from lepton_xla.modelspec import ModelSpec, Predict, load_named
from lepton_xla.passes.core.calibration import check_batch
from lepton_xla.program import Program, TensorSpec
from lepton_xla.recipe import Recipe
from lepton_xla.recipe.changes import parse_setting
from lepton_xla.sharding import Placement, Rules
from lepton_xla.sharding.meshes import abstract_mesh
from lepton_xla.sharding.meshes import mesh as mesh_of

_PROMPT = "prompt"


def load_target[T](target: str, kind: type[T] = ModelSpec) -> T:
    """Import what a command names; what its file prints goes to stderr, because stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        return load_named(target, kind)


def load_recipe(name_or_path: str, settings: Sequence[str] = (), exclude: Sequence[str] = ()) -> Recipe:
    """Load a recipe; `none` leaves the model unchanged.

    Args:
        name_or_path: a preset or a file.
        settings: changes, as `key=value`.
        exclude: regular expressions for sites to leave unchanged.

    Raises:
        RecipeError: if there is no such recipe, or a change does not fit it.
    """
    if name_or_path == NO_RECIPE:
        recipe = Recipe(name=NO_RECIPE, description="the float model as it is", fold=False)
    else:
        recipe = Recipe.load(name_or_path)
    if not settings and not exclude:
        return recipe
    changes = dict(parse_setting(text) for text in settings)
    recipe = recipe.replace(changes, exclude=exclude)
    return recipe if "name" in changes else recipe.replace(name=f"{recipe.name}, changed")


def placement(program: Program, mesh: str, rules: str | None) -> Placement:
    """Decide where weights go on a mesh, whose devices need not exist.

    Raises:
        ShardingError: if the mesh or the file of rules is malformed, or does not fit the model.
    """
    given = Rules.load(rules) if rules is not None else Rules()
    return given.resolve(program, abstract_mesh(mesh, jax.device_count()))


@dataclasses.dataclass(frozen=True)
class Spread:
    """A program with its weights on a mesh.

    Attributes:
        program: the program.
        mesh: the mesh, or its text if its devices are not here; None if there is none.
        rules: what is left to cut: of a mesh that is here, the batches only.
    """

    program: Program
    mesh: jax.sharding.Mesh | str | None = None
    rules: Rules | None = None


def put_on_mesh(program: Program, mesh: str | None, rules: str | None, *, here: bool) -> Spread:
    """Put the weights of a program on the mesh of a command, if it has one whose devices are here.

    Raises:
        ShardingError: if the mesh or the file of rules is malformed, or does not fit the model or this machine.
    """
    if mesh is None:
        check_rules_have_mesh(mesh, rules)
        return Spread(program)
    given = Rules.load(rules) if rules is not None else Rules()
    if not here:
        return Spread(program, mesh, given)
    placement = given.resolve(program, mesh_of(mesh))
    weights = placement.put(program.weights)
    return Spread(program.replace(weights=weights), mesh_of(mesh), Rules(batch=given.batch))


def check_rules_have_mesh(mesh: str | None, rules: str | None) -> None:
    """Check that a command has a mesh, if it has rules.

    Raises:
        ShardingError: if it has not.
    """
    if rules is not None and mesh is None:
        raise ShardingError("--rules says how to cut weights over a mesh; add --mesh, such as --mesh data=-1,model=2")


def bucket_sizes(spec: ModelSpec, program: Program, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Sizes to compile for: those of the command line, else those of the model.

    Raises:
        CompileError: if a symbolic dimension has no sizes.
    """
    chosen = {**spec.buckets, **given}
    for symbol in program.symbols:
        if symbol not in chosen:
            raise CompileError(
                f"no sizes to compile for dimension {symbol!r}: add --buckets {symbol}=1,8,32, or buckets to the "
                "ModelSpec"
            )
    return chosen


def default_name(target: str) -> str:
    """Derives a model's name from its location: `digits` for `examples/digits.py:model`."""
    source = target.rpartition(":")[0]
    stem = pathlib.PurePath(source).stem if source.endswith(".py") else source.rpartition(".")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-") or "model"


def calibration(
    spec: ModelSpec, program: Program
) -> tuple[Iterable[Mapping[str, Any]] | None, dict[str, np.ndarray] | None]:
    """Returns the calibration data and its first batch, checked; None for both if the model has no data.

    Raises:
        CalibrationError: if the first batch does not fit the program, or holds NaN.
        ModelError: if the model's own code fails.
    """
    with _user_code("calibration"):
        batches = spec.calibration_batches()
        if batches is None:
            return None, None
        rest = iter(batches)
        first = next(rest, None)
    if first is None:
        return (), None
    if program.generation is not None and _PROMPT in first:
        return None, None  # prompts say what is asked, not what its steps are to be calibrated with
    check_batch(program, first, "calibration batch 0")
    # The data may be a generator, which yields the first batch only once and may fail at any batch.
    rest = _guarded(rest)
    return itertools.chain([first], rest), {name: np.asarray(value) for name, value in first.items()}


def to_profile(spec: ModelSpec, program: Program) -> Iterable[Mapping[str, Any]] | None:
    """The data that an artifact's profile is made of, or None: of a model that generates, prompts.

    Raises:
        CalibrationError, ModelError: as `calibration`.
    """
    if program.generation is None:
        return calibration(spec, program)[0]
    with _user_code("calibration"):
        batches = spec.calibration_batches()
    prompts = (batch for batch in _guarded(iter(batches or ())) if _PROMPT in batch)
    first = next(prompts, None)
    return None if first is None else itertools.chain([first], prompts)  # a profile reads so many rows and no more


def _guarded(batches: Iterator[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    end: Any = object()
    while True:
        with _user_code("calibration"):
            batch = next(batches, end)
        if batch is end:
            return
        yield batch


def evaluate(spec: ModelSpec, predict: Predict) -> dict[str, float]:
    """Run the model's `evaluate` with `predict`; return its metrics, or none if it has no `evaluate`.

    Raises:
        ModelError: if it fails, or returns anything but names and numbers.
    """
    if spec.evaluate is None:
        return {}
    with _user_code("evaluate"):
        metrics = dict(spec.evaluate(predict))
        return {str(name): float(value) for name, value in metrics.items()}


@contextlib.contextmanager
def _user_code(what: str) -> Generator[None, None, None]:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except LeptonError:
        raise
    except Exception as error:  # user code may raise anything
        raise ModelError(f"the model's {what} fails: {type(error).__name__}: {error}") from error


def float_predict(program: Program) -> Callable[..., dict[str, np.ndarray]]:
    """The unchanged program under `jax.jit`, with the call signature of a loaded artifact."""
    compiled = jax.jit(program.named_outputs)
    names = list(program.inputs)

    def predict(**inputs: Any) -> dict[str, np.ndarray]:
        if set(inputs) != set(names):
            raise InputError(f"got inputs {sorted(inputs)}, but the model takes {sorted(names)}")
        arrays = [_as_declared(name, program.inputs[name], inputs[name]) for name in names]
        return jax.device_get(compiled(program.weights, *arrays))

    return predict


def check_same_inputs(servable: Servable, program: Program, path: str, target: str) -> None:
    """Check that an artifact has the inputs and outputs of the model that it is compared with.

    Raises:
        ArtifactError: if their inputs or outputs differ.
    """
    for what in ("inputs", "outputs"):
        found, expected = getattr(servable, what), getattr(program, what)
        if found != expected:
            raise ArtifactError(f"{path} has {what} {_specs(found)}, but {target} has {_specs(expected)}")


def _specs(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name}: {spec}" for name, spec in specs.items())


def _as_declared(name: str, spec: TensorSpec, value: Any) -> np.ndarray:
    dtype = jnp.dtype(spec.dtype)
    if not hasattr(value, "dtype"):
        return np.asarray(value, dtype)
    if value.dtype != dtype:
        raise InputError(
            f"input {name!r} has dtype {value.dtype}, expected {dtype}; cast it with .astype({str(dtype)!r})"
        )
    return np.asarray(value)


def inputs_at(
    specs: Mapping[str, TensorSpec], sizes: Mapping[str, int], examples: Mapping[str, np.ndarray] | None
) -> dict[str, np.ndarray]:
    """Inputs of a bucket's sizes: examples, repeated or truncated, or random values that are valid for any model."""
    random = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for name, spec in specs.items():
        shape, dtype = spec.at(sizes).shape, jnp.dtype(spec.dtype)
        if examples is not None:
            cut = functools.reduce(
                lambda array, axis: np.take(array, np.arange(shape[axis]) % array.shape[axis], axis),
                range(len(shape)),
                examples[name],
            )
            made[name] = np.asarray(cut, order="C")
        elif jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.complexfloating):
            made[name] = random.standard_normal(shape).astype(dtype)
        else:
            # 0 and 1 are valid both as a mask and as an index into a table.
            made[name] = random.integers(0, 2, shape).astype(dtype)
    return made
