"""`FederatedSpec`: what is trained, on which rows, for the command line and for each end of a federation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

from lepton_xla.errors import FederatedError
from lepton_xla.federated.partitions import Rows, rows_of
from lepton_xla.federated.settings import Federation
from lepton_xla.program import Program
from lepton_xla.train.models import Loss, Model, supervised


@dataclasses.dataclass(frozen=True)
class FederatedSpec:
    """A federated training for `leptonx federate`.

    The server and its clients each have a file of this kind, with the same model. The server's settings hold for all;
    its rows are not used, and a client's own rows never leave it.

    Attributes:
        model: what is trained, or a function that makes it. It must be the same at all ends, initial weights included
            only for the server.
        rows: columns of rows by name, or a function that returns them: all rows of a simulation, or those of a client.
        optimizer: of the clients; an optax optimizer, whose state begins anew in each round.
        federation: the settings.
        loss: the loss; by default cross-entropy with the column `label`.
        evaluate: `evaluate(predict) -> {"accuracy": 0.98}`, run by the server or the simulation after each round.
        buckets: symbolic dimension -> sizes to compile the result for.
        label: the column of classes.

    >>> x = lx.TensorSpec(("batch", 2), "float32")
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.zeros((2, 2))}, {"x": x})
    >>> rows = {"x": np.eye(2, dtype=np.float32), "label": np.array([0, 1])}
    >>> spec = lx.federated.FederatedSpec(program, lambda: rows)
    >>> len(spec.table()["label"]), list(spec.trained().weights)
    (2, ['w'])
    """

    model: Model | Program | Callable[[], Model | Program]
    rows: Rows | Callable[[], Rows]
    optimizer: optax.GradientTransformation = dataclasses.field(default_factory=lambda: optax.sgd(0.1))
    federation: Federation = dataclasses.field(default_factory=Federation)
    loss: Loss | None = None
    evaluate: Callable[..., Mapping[str, float]] | None = None
    buckets: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict[str, tuple[int, ...]])
    label: str = "label"

    def trained(self) -> Model:
        """The model.

        Raises:
            ModelError: if it is none.

        >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": lx.TensorSpec((2, 2), "float32")})
        >>> sorted(FederatedSpec(lambda: program, {}).trained().weights)
        ['w']
        """
        made = self.model() if callable(self.model) and not isinstance(self.model, Program) else self.model
        return Model.of(made)

    def table(self) -> dict[str, np.ndarray]:
        """The rows, as columns of equal length.

        Raises:
            FederatedError: if they are none.
        """
        found = self.rows() if callable(self.rows) else self.rows
        if not isinstance(found, Mapping):
            raise FederatedError(f"the rows are a {type(found).__name__}; expected columns by name")
        columns = {str(name): np.asarray(column) for name, column in found.items()}
        rows_of(columns)
        return columns

    def replace(self, **changes: Any) -> FederatedSpec:
        """A copy with other fields.

        >>> FederatedSpec(None, {}).replace(label="class").label
        'class'
        """
        return dataclasses.replace(self, **changes)

    def loss_of(self, model: Model) -> Loss:
        """The loss for a model that `trained` made.

        >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(2)}, {"x": lx.TensorSpec((2, 2), "float32")})
        >>> callable(FederatedSpec(program, {}).loss_of(lx.train.Model.of(program)))
        True
        """
        return self.loss or supervised(model, label=self.label)
