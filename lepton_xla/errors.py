"""All errors that a user can cause. Each is a `LeptonError`."""

from typing import Literal

# Characters of another's message that are shown: XLA's may hold a whole program.
_SHOWN = 300


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut where it is long: what JAX and XLA add after it is for themselves.

    >>> first_line(ValueError(f"no such thing{chr(10)}because"))
    'no such thing'
    """
    lines = str(error).strip().splitlines()
    return lines[0][:_SHOWN] if lines else "no message"


class LeptonError(Exception):
    """Base class. The message says what is wrong, where, and what to do.

    >>> try:
    ...     lx.Recipe.load("no-such-recipe")
    ... except lx.LeptonError as error:
    ...     type(error).__name__
    'RecipeError'
    """


class MissingPackageError(LeptonError, ImportError):
    """A part needs packages that this installation lacks; the message says which, and which extra brings them.

    >>> from lepton_xla.environment.extras import Needs
    >>> with Needs("train", "lx.train"):
    ...     import no_such_package
    Traceback (most recent call last):
    lepton_xla.errors.MissingPackageError: lx.train needs the package no_such_package: pip install 'lepton-xla[train]'
    """


class ModelError(LeptonError):
    """A model, its weights, or its inputs do not fit what was declared.

    >>> lx.TensorSpec((-1, 3), "float32")
    Traceback (most recent call last):
    lepton_xla.errors.ModelError: TensorSpec(-1, 3): dimension -1 is neither a size >= 0 nor a name like 'batch'
    """


class RecipeError(LeptonError):
    """A recipe is malformed, or does not fit the program it is applied to.

    >>> lx.Recipe.parse("prune = [{sites = '.*', sparsity = 2.0}]", name="mine")
    Traceback (most recent call last):
    lepton_xla.errors.RecipeError: recipe 'mine': prune[0].sparsity = 2.0: ...
    """


class UnsupportedError(LeptonError):
    """A pass found a site, a primitive or a container that it cannot handle.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.ones((3, 4))}, {"x": lx.TensorSpec((2, 3), "float32")})
    >>> rule = lx.train.PruneRule(sites=".*", pattern="2:4")
    >>> lx.passes.resolve(lx.Recipe(prune=(rule,)), program)
    Traceback (most recent call last):
    lepton_xla.errors.UnsupportedError: recipe '': site 'w' (dot_general): not pruned: groups of 4 do not divide its ...
    """


class CalibrationError(LeptonError):
    """Calibration data is missing, empty, wrongly shaped or not finite.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.ones((3, 4))}, {"x": lx.TensorSpec((2, 3), "float32")})
    >>> plan = lx.passes.resolve(lx.Recipe.load("int8").replace({"quantize.0.dynamic": False}), program)
    >>> lx.passes.calibrate(program, plan, [])
    Traceback (most recent call last):
    lepton_xla.errors.CalibrationError: calibration data is empty: give at least one batch, ...
    """


class CompileError(LeptonError):
    """A program cannot be compiled ahead of time.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> lx.compile(program, {})
    Traceback (most recent call last):
    lepton_xla.errors.CompileError: buckets lack the dimension 'batch': give its sizes, such as {'batch': (1, 8, 32)}
    """


class ExecutionError(LeptonError):
    """Compiled code cannot run: there is no device or no memory, or it failed.

    >>> issubclass(lx.ExecutionError, lx.LeptonError)
    True
    """


class ArtifactError(LeptonError):
    """An artifact is missing, damaged, foreign, or cannot be written.

    >>> lx.load("nothing-here.lepton")
    Traceback (most recent call last):
    lepton_xla.errors.ArtifactError: nothing-here.lepton: manifest.json is missing: there is no such folder
    """


class TrustError(ArtifactError):
    """An artifact is not signed by a trusted key or cannot be decrypted, or a key cannot be used.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> _ = lx.compile(program, {"batch": (1,)}).save("tiny.lepton")
    >>> key, public = lx.trust.create_keys("release")
    >>> lx.load("tiny.lepton", trust=public)
    Traceback (most recent call last):
    lepton_xla.errors.TrustError: tiny.lepton: is not signed (no model.sig), and only signed artifacts are trusted here
    """


class InputError(LeptonError):
    """An inference input has a wrong name, dtype, rank or size.

    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": lx.TensorSpec(("batch", 4), "float32")})
    >>> _ = lx.compile(program, {"batch": (1,)}).save("tiny.lepton")
    >>> lx.load("tiny.lepton")(y=[[1.0, 2.0, 3.0, 4.0]])
    Traceback (most recent call last):
    lepton_xla.errors.InputError: unknown input 'y'; the model takes 'x'
    """


class ServeError(LeptonError):
    """The server cannot start or cannot take a request.

    >>> from lepton_xla.serve import Options
    >>> Options(port=70000)
    Traceback (most recent call last):
    lepton_xla.errors.ServeError: port must be 0 to 65535, not 70000
    """


class RepositoryError(LeptonError):
    """A change to a repository of models is refused or failed, or the repository cannot be read.

    Attributes:
        kind: `invalid` (a name, a version, an artifact or a file that is not allowed), `missing` (no such model,
            version or label), `conflict` (what is there stands against it), `failed` (the disk or the network did), or
            `large` (more than the memory for all models).

    >>> from lepton_xla.serve.models.repository import Repository
    >>> try:
    ...     Repository("models").promote("digits", "4")
    ... except lx.RepositoryError as error:
    ...     print(error.kind, "|", error)
    missing | models: there is no model 'digits'
    """

    def __init__(self, kind: Literal["invalid", "missing", "conflict", "failed", "large"], message: str) -> None:
        super().__init__(message)
        self.kind: Literal["invalid", "missing", "conflict", "failed", "large"] = kind


class ShardingError(LeptonError):
    """A mesh or partition rules do not fit the devices, the model or the batch.

    >>> issubclass(lx.ShardingError, lx.LeptonError)
    True
    """


class TrainingError(LeptonError):
    """Training cannot start or cannot go on: the loss, the data, the schedule or the teacher is at fault.

    >>> issubclass(lx.TrainingError, lx.LeptonError)
    True
    """


class TuningError(LeptonError):
    """No recipe can be looked for: the constraints, the data, the evaluation or the journal is at fault.

    >>> lx.tuning.Constraints(max_drop=-1.0)
    Traceback (most recent call last):
    lepton_xla.errors.TuningError: max_drop = -1.0: expected a number above or equal to 0, in hundredths of the metric
    """


class CheckpointError(LeptonError):
    """A checkpoint is missing, foreign, in use, or cannot be read or written.

    >>> issubclass(lx.CheckpointError, lx.LeptonError)
    True
    """


class LaunchError(LeptonError):
    """Processes of one run cannot be started, or do not find each other.

    >>> issubclass(lx.LaunchError, lx.LeptonError)
    True
    """


class SampleError(LeptonError):
    """Samples of requests cannot be read or kept, or a model's settings of them do not fit it.

    >>> from lepton_xla.samples import Samples
    >>> Samples("nothing-here", "digits")
    Traceback (most recent call last):
    lepton_xla.errors.SampleError: nothing-here/digits: there are no samples of this model: ...
    """


class LearningError(LeptonError):
    """A model cannot learn from its samples: there are too few, they do not fit it, or a step failed.

    >>> issubclass(lx.LearningError, lx.LeptonError)
    True
    """


class FederatedError(LeptonError):
    """A federated training cannot start or go on: its settings, its rows, or what a client or the server sent is at
    fault.

    >>> lx.federated.Federation(alpha=2.0)
    Traceback (most recent call last):
    lepton_xla.errors.FederatedError: federation: alpha = 2.0; expected a number above 0 and at most 1
    """
