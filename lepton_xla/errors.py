"""All errors that a user can cause. Each is a `LeptonError`."""

# Characters of another's message that are shown: XLA's may hold a whole program.
_SHOWN = 300


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut where it is long: what JAX and XLA add after it is for themselves."""
    lines = str(error).strip().splitlines()
    return lines[0][:_SHOWN] if lines else "no message"


class LeptonError(Exception):
    """Base class. The message says what is wrong, where, and what to do."""


class ModelError(LeptonError):
    """A model, its weights, or its inputs do not fit what was declared."""


class RecipeError(LeptonError):
    """A recipe is malformed, or does not fit the program it is applied to."""


class UnsupportedError(LeptonError):
    """A pass found a site, a primitive or a container that it cannot handle."""


class CalibrationError(LeptonError):
    """Calibration data is missing, empty, wrongly shaped or not finite."""


class CompileError(LeptonError):
    """A program cannot be compiled ahead of time."""


class ExecutionError(LeptonError):
    """Compiled code cannot run: there is no device or no memory, or it failed."""


class ArtifactError(LeptonError):
    """An artifact is missing, damaged, foreign, or cannot be written."""


class InputError(LeptonError):
    """An inference input has a wrong name, dtype, rank or size."""


class ServeError(LeptonError):
    """The server cannot start or cannot take a request."""
