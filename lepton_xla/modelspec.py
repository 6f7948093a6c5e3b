"""`ModelSpec`: a model for the command line, with its inputs and optionally calibration data and an evaluation."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lepton_xla.adapters import Generator, from_linen, from_nnx
from lepton_xla.errors import LeptonError, ModelError
from lepton_xla.program import Program, TensorSpec, trace

type Predict = Callable[..., dict[str, np.ndarray]]
"""`predict(**inputs) -> outputs`, both by name, any batch size."""


def figures_of(found: Any, error: type[LeptonError]) -> dict[str, float]:
    """The metrics that an `evaluate` returned, as floats by name.

    Raises:
        LeptonError: of this type, if they are no numbers by name.

    >>> from lepton_xla.modelspec import figures_of
    >>> figures_of({"accuracy": 1}, lx.errors.LeptonError)
    {'accuracy': 1.0}
    """
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError):
        raise error(
            f"evaluate returned {found!r:.200}; expected numbers by name, such as {{'accuracy': 0.98}}"
        ) from None


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model for the `leptonx` commands. Give either `fn`, `module` or `generator`.

    Attributes:
        inputs: name -> spec, in call order.
        fn: `fn(weights, *inputs)`, any JAX function; or a `Program`, which has weights and inputs of its own.
        module: a Flax Linen module (its variables in `weights`) or NNX module (which holds its own).
        weights: a pytree of arrays; for Linen the variables, all collections.
        buckets: symbolic dimension -> sizes to compile for; `--buckets` on the command line overrides it.
        calibration: input dicts, or a function that returns them, for recipes that need calibration data, and for the
            profile that drift is measured against. Of a generator, what it is asked: dicts of `prompt`, a list of
            prompts, and how they are continued, such as `max_tokens`.
        generator: a model that generates tokens; it has weights and inputs of its own.
        convert: what clients send instead of some inputs, and get instead of some outputs: a function such as
            `lambda program: lx.take_texts(program, "tokenizer.json")`. Calibration data may be either.
        evaluate: `evaluate(predict) -> {"accuracy": 0.98, ...}`; commands print these metrics next to size and speed.
        rows: labelled rows for `leptonx eval`: arrays by the names of inputs and `label`, the class of each row; or a
            function that returns them.

    >>> spec = lx.ModelSpec({"x": lx.TensorSpec(("batch", 4), "float32")}, fn=lambda w, x: x @ w, weights=jnp.eye(4))
    >>> print(spec.program().outputs["output"], spec.calibration_batches(), spec.labelled_rows())
    float32[batch, 4] None None
    """

    inputs: Mapping[str, TensorSpec] = dataclasses.field(default_factory=dict[str, TensorSpec])
    fn: Callable[..., Any] | Program | None = None
    module: Any = None
    weights: Any = None
    buckets: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict[str, tuple[int, ...]])
    calibration: Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]] | None = None
    evaluate: Callable[[Predict], Mapping[str, float]] | None = None
    generator: Generator | None = None
    rows: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None
    convert: Callable[[Program], Program] | None = None

    def program(self) -> Program:
        """Make the program.

        Raises:
            ModelError: if both or neither of `fn` and `module` are given, or the model cannot be traced.
        """
        if [self.fn is None, self.module is None, self.generator is None].count(False) != 1:
            raise ModelError("a ModelSpec takes either fn and weights, or module, or generator")
        if self.generator is not None:
            return self.generator.program
        program = self._plain()
        return program if self.convert is None else self.convert(program)

    def _plain(self) -> Program:
        if isinstance(self.fn, Program):
            return self.fn
        if self.fn is not None:
            return trace(self.fn, self.weights, self.inputs)
        if hasattr(self.module, "apply"):
            if self.weights is None:
                raise ModelError("a ModelSpec of a Linen module takes its variables as weights")
            return from_linen(self.module, self.weights, self.inputs)
        return from_nnx(self.module, self.inputs)

    def calibration_batches(self) -> Iterable[Mapping[str, Any]] | None:
        """The calibration data, or None."""
        batches = self.calibration() if callable(self.calibration) else self.calibration
        if batches is None or self.convert is None:
            return batches
        program = self.program()
        return [program.converted(batch) for batch in batches]

    def labelled_rows(self) -> Mapping[str, Any] | None:
        """The labelled rows, or None."""
        rows = self.rows() if callable(self.rows) else self.rows
        return rows if rows is None or self.convert is None else self.program().converted(rows)


# What is taken where a kind of spec is asked for, and the spec of it.
_TAKEN_AS: dict[type[Any], dict[type[Any], Callable[[Any], Any]]] = {
    ModelSpec: {
        Program: lambda program: ModelSpec(fn=program),
        Generator: lambda generator: ModelSpec(generator=generator),
    }
}


def load_named[T](target: str, kind: type[T]) -> T:
    """Import what the command line names: a `ModelSpec`, or another kind of spec.

    Where a `ModelSpec` is asked for, a `Program` or a `Generator` is taken as one that has nothing else.

    Args:
        target: `FILE.py:NAME` or `package.module:NAME`; NAME is an object of the kind, or a function without arguments
            that returns one.
        kind: its class.

    Raises:
        ModelError: if the file or the name is missing, the file fails, or the name is something else.

    >>> load_named("model.py", ModelSpec)
    Traceback (most recent call last):
    lepton_xla.errors.ModelError: ...
    """
    source, _, name = target.rpartition(":")
    if not source or not name:
        raise ModelError(f"{target!r}: expected FILE.py:NAME or package.module:NAME")
    module = _import(source, target)
    if not hasattr(module, name):
        specs = [key for key, value in vars(module).items() if isinstance(_spec_of(value, kind), kind)]
        raise ModelError(f"{source} has no {name!r}" + (f"; it has {', '.join(specs)}" if specs else ""))
    found = _spec_of(getattr(module, name), kind)
    if isinstance(found, kind):
        return found
    if callable(found):
        if _takes_arguments(found):
            raise ModelError(f"{target} takes arguments; expected {_expected(kind)}")
        try:
            found = _spec_of(found(), kind)
        except LeptonError:
            raise
        except Exception as error:
            raise ModelError(f"{target}: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise ModelError(f"{target} is a {type(found).__name__}; expected {_expected(kind)}")
    return found


def _expected(kind: type[Any]) -> str:
    kinds = (*_TAKEN_AS.get(kind, {}), kind)
    return f"{', '.join(f'a {cls.__name__}' for cls in kinds)}, or a function without arguments that returns one"


def _takes_arguments(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    except ValueError:  # some of those in C tell none
        return False
    return False


def _spec_of(found: Any, kind: type[Any]) -> Any:
    for other, make in _TAKEN_AS.get(kind, {}).items():
        if isinstance(found, other):
            return make(found)
    return found


def _import(source: str, target: str) -> Any:
    path = pathlib.Path(source)
    try:
        if path.suffix != ".py":
            # `leptonx` is a script, so its own folder is on the path, but not the working directory, where users'
            # packages are.
            if (here := str(pathlib.Path.cwd())) not in sys.path:
                sys.path.insert(0, here)
            return importlib.import_module(source)
        if not path.is_file():
            raise ModelError(f"{target!r}: no file {source}")
        # A unique module name, so that a file called json.py or jax.py replaces no other module.
        spec = importlib.util.spec_from_file_location(f"leptonx_target_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Register the module and add its folder to the path, as Python does for a script: dataclasses and imports of
        # neighbouring files need it.
        sys.modules[spec.name] = module
        sys.path.insert(0, str(path.parent.resolve()))
        spec.loader.exec_module(module)
    except LeptonError:
        raise
    except Exception as error:
        raise ModelError(f"{target}: {type(error).__name__}: {error}") from error
    return module
