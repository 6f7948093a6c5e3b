"""What one step is compiled from: the shapes of its state, and where its leaves go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from lepton_xla.errors import TrainingError
from lepton_xla.sharding import Placement, Rules
from lepton_xla.train.compression import Stage
from lepton_xla.train.placing import state_shardings
from lepton_xla.train.state import State
from lepton_xla.train.steps import Metrics, make_step


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shapes of a state, and where its leaves go on a mesh.

    Attributes:
        shapes: the state's shapes.
        placement: where the weights go; None for one device.
        shardings: a sharding for each leaf; None for one device.
    """

    shapes: State
    placement: Placement | None = None
    shardings: Any = None

    @staticmethod
    def of(stage: Stage, shapes: State, mesh: Mesh | None, rules: Rules) -> Layout:
        """Find where each leaf of a state goes.

        Raises:
            ShardingError: if the rules do not fit the weights or the mesh.
        """
        if mesh is None:
            return Layout(shapes)
        placement = rules.resolve(shapes.weights, mesh, axes=stage.program.axes)
        return Layout(shapes, placement, state_shardings(shapes, placement))

    @property
    def placed(self) -> State:
        """The shapes with their shardings."""
        if self.shardings is None:
            return self.shapes
        placed = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(placed, self.shapes, self.shardings)

    @property
    def batch_pieces(self) -> int:
        """Number of pieces that the rows of a batch are split into."""
        return 1 if self.placement is None else self.placement.batch_pieces


def first_state(stage: Stage, key: jax.Array, *, ema: bool, best: bool) -> State:
    """Return the state before the first step of a stage, without the optimizer's.

    Args:
        stage: the stage.
        key: key of the run.
        ema: whether it has moving averages.
        best: whether it keeps the best weights.
    """
    weights, state = stage.weights, stage.model.state
    return State.first(weights, state, (), key).replace(
        scales=stage.scales, ema=weights if ema else {}, best={**weights, **state} if best else {}
    )


def state_shapes(stage: Stage, fresh: State) -> State:
    """Return the shapes of a first state, the optimizer's included."""
    init = stage.optimizer.init
    return jax.eval_shape(lambda state: state.replace(optimizer=init(state.weights)), fresh)


def trace_step(
    stage: Stage,
    layout: Layout,
    state: State,
    batch: Mapping[str, Any],
    arrays: Any,
    *,
    platform: str,
    accumulate: int,
    **options: Any,
) -> jax.stages.Traced:
    """Trace the training step of a stage: `step(state, batch, arrays) -> (state, Metrics)`. It donates the state.

    Args:
        stage: the stage.
        layout: where the state is.
        state: the state, or its placed shapes.
        batch: a batch, or its placed shapes.
        arrays: those of the stage's loss.
        platform: the kind of device that the step is for.
        accumulate: number of microbatches.
        **options: further arguments of `make_step`.

    Raises:
        TrainingError: if the microbatches do not divide the batch.
    """
    rows, pieces = next(iter(batch.values())).shape[0], layout.batch_pieces
    if rows % (accumulate * pieces):
        raise TrainingError(
            f"accumulate = {accumulate} does not divide the batch: {rows} rows on {pieces} pieces of the mesh; "
            f"give a multiple of {accumulate * pieces} rows"
        )
    unpacked = make_step(
        stage.loss,
        stage.optimizer,
        scale_optimizer=stage.scale_optimizer,
        accumulate=accumulate,
        batch_axes=() if layout.placement is None else layout.placement.batch_axes,
        platform=platform,
        **options,
    )

    def step(state: State, batch: Mapping[str, jax.Array], arrays: Any) -> tuple[State, Metrics]:
        after, metrics = unpacked(state, batch, arrays)
        return after, Metrics.of(metrics)

    shardings = None if layout.shardings is None else (layout.shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=shardings).trace(state, batch, arrays)
