"""`fit`: trains a model, compresses it on the way, keeps checkpoints, and says how far it is."""

from __future__ import annotations

import contextlib
import hashlib
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import msgspec
import numpy as np
import optax
from jax.sharding import Mesh

from lepton_xla.arguments import takes
from lepton_xla.errors import TrainingError
from lepton_xla.program import Program
from lepton_xla.recipe import to_toml
from lepton_xla.sharding import Rules
from lepton_xla.sharding import mesh as make_mesh
from lepton_xla.train.checkpoints import CheckpointFolder, Checkpoints
from lepton_xla.train.compression import Compression, Stage
from lepton_xla.train.evaluations import Evaluation
from lepton_xla.train.feeding import Data, Feed
from lepton_xla.train.models import Loss, Model
from lepton_xla.train.preemption import Preemption
from lepton_xla.train.runs import Result, Run
from lepton_xla.train.telemetry import Telemetry
from lepton_xla.trees import abstract, name_leaves


@takes(optimizer=optax.GradientTransformation, loss=Callable)
def fit(
    model: Model | Program,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    data: Data,
    *,
    steps: int,
    mesh: Mesh | str | None = None,
    rules: Rules | None = None,
    local_batches: bool = False,
    accumulate: int = 1,
    compute_dtype: str | None = None,
    clip_norm: float | None = None,
    on_nan: Literal["stop", "skip", "restore"] = "stop",
    ema: float | None = None,
    evaluate: Evaluation | None = None,
    compression: Compression | None = None,
    checkpoint: Checkpoints | None = None,
    seed: int = 0,
    log: str | pathlib.Path | None = None,
    log_every: int = 10,
    tensorboard: str | pathlib.Path | None = None,
    progress: bool | None = None,
) -> Result:
    """Train a model.

    The same call runs on one device, on several (`mesh`), and in several processes (`lx.launch.initialize` first).
    With `checkpoint`, a run that was interrupted goes on where it was; called again after its end it returns at once.

    Args:
        model: from `train.from_linen`, `train.from_nnx`, or a program. Its arrays are not changed.
        loss: `loss(weights, batch, key, state) -> (loss, metrics, state)`, such as from `train.supervised`.
        optimizer: an optax optimizer.
        data: batches: an iterable, which is begun again when it ends; a function `data(step) -> batch`; or a Grain
            dataset. Each process gives the whole batch, of which its devices take their rows.
        steps: number of steps, those of the interrupted run included.
        mesh: the devices, `lx.sharding.mesh("data=-1")` or its text; None for one device.
        rules: where the weights go on the mesh; by default whole on each device, so that only batches are split.
        local_batches: whether each process gives only its own rows of a batch.
        accumulate: number of microbatches that a batch is cut into, to save memory.
        compute_dtype: dtype of the loss' computations, such as `bfloat16`; the trained weights stay float32.
        clip_norm: largest norm of all gradients together; larger ones are scaled down.
        on_nan: what to do if a loss or gradient is not finite. Such a step never changes the weights. `stop` raises an
            error, `skip` goes on, `restore` goes back to the last checkpoint and on with the next data.
        ema: decay of a moving average of the weights, which is then evaluated and returned, such as 0.999.
        evaluate: when and how to evaluate.
        compression: what a recipe does to the model while it is trained.
        checkpoint: where and when to save.
        seed: seed of dropout and the like.
        log: file to which metrics are appended as JSON lines.
        log_every: steps between two logged records; each has the mean over its steps.
        tensorboard: folder for TensorBoard; needs the extra `tensorboard`.
        progress: whether to show progress on stderr; by default on a terminal.

    Returns:
        The trained program, the state, and what was measured.

    Raises:
        TrainingError: if an argument is out of range, the loss or the data cannot be used, or a loss is not finite.
        ShardingError: if mesh, rules and batch do not fit.
        CheckpointError: if the folder is another run's, is in use, or cannot be read.
        Preempted: after SIGTERM, when the state is saved; a `SystemExit` with code 75.

    >>> import optax
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": lx.TensorSpec(("batch", 2), "float32")})
    >>> batch = {"x": np.eye(2, dtype=np.float32), "label": np.array([1, 0])}
    >>> result = lx.train.fit(program, lx.train.supervised(program), optax.sgd(1.0), [batch], steps=50)
    >>> result.metrics["accuracy"]
    1.0
    """
    _check(steps, accumulate, compute_dtype, clip_norm, on_nan, ema, log_every, checkpoint)
    trained = Model.of(model)
    stage = Stage.begin(compression or Compression(), trained, loss, optimizer)
    shared = make_mesh(mesh) if isinstance(mesh, str) else mesh
    if rules is not None and shared is None:
        raise TrainingError("rules say where weights go on a mesh; give mesh too, such as mesh='data=-1'")
    options = {
        "accumulate": accumulate, "compute_dtype": compute_dtype, "clip_norm": clip_norm, "ema": ema, "mesh": shared,
    }  # fmt: skip
    writes = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(Preemption())
        telemetry = Telemetry(
            steps,
            log=log if writes else None,
            tensorboard=tensorboard if writes else None,
            progress=progress if writes else False,
        )
        stack.callback(telemetry.close)
        folder = None
        if checkpoint is not None:
            folder = stack.enter_context(CheckpointFolder(checkpoint, _identity(stage, loss, optimizer)))
        run = Run(stage, Feed(data), steps, shared, rules or Rules(), local_batches, options, evaluate, folder,
                   preemption, telemetry, on_nan, log_every)  # fmt: skip
        return run.run(loss, optimizer, jax.random.key(seed))


def _identity(stage: Stage, loss: Loss, optimizer: optax.GradientTransformation) -> dict[str, str]:
    """What must be the same for a run to go on: digests of the model, the compression, the optimizer, the teacher."""
    weights = {**stage.whole.program.weights, **stage.weights}
    moments = jax.eval_shape(optimizer.init, abstract(stage.weights))
    teacher = getattr(loss, "teacher_digest", None)
    return ({} if teacher is None else {"teacher": teacher}) | {
        "model": _digest(sorted((path, leaf.shape, str(leaf.dtype)) for path, leaf in weights.items())),
        "compression": _digest(_described(stage.compression)),
        "optimizer": _digest(
            [(name, leaf.shape, str(leaf.dtype)) for name, leaf in name_leaves(moments, single="state").items()]
        ),
    }


def _described(compression: Compression) -> Any:
    """What of a compression decides shapes and values; functions, such as schedules, cannot be compared."""
    fields = {
        name: getattr(compression, name) for name in ("quantize_from", "freeze_ranges_at", "learn_scales", "shrink_at")
    }
    # As TOML, which leaves usual values out: a key that a later version adds makes no other run of this one.
    rules = to_toml(msgspec.structs.replace(compression.rules, name="", description=""))
    return rules, fields, sorted((compression.shrink or {}).items())


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _check(
    steps: Any, accumulate: Any, dtype: Any, clip_norm: Any, on_nan: Any, ema: Any, log_every: Any, checkpoint: Any
) -> None:
    for name, value in (("steps", steps), ("accumulate", accumulate), ("log_every", log_every)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise TrainingError(f"fit: {name} = {value!r}; expected a whole number of at least 1")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise TrainingError(f"fit: compute_dtype = {dtype!r}; expected bfloat16, float16 or float32")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise TrainingError(f"fit: clip_norm = {clip_norm!r}; expected a number above 0")
    if ema is not None and not 0 < ema < 1:
        raise TrainingError(f"fit: ema = {ema!r}; expected a decay between 0 and 1, such as 0.999")
    if on_nan not in ("stop", "skip", "restore"):
        raise TrainingError(f"fit: on_nan = {on_nan!r}; expected 'stop', 'skip' or 'restore'")
    if on_nan == "restore" and checkpoint is None:
        raise TrainingError("fit: on_nan='restore' goes back to a checkpoint; give checkpoint too")
