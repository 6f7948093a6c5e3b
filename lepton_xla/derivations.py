"""How stored weights come from the float weights of a model: the steps that passes took, to take them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lepton_xla.deferred import jax


@dataclasses.dataclass(frozen=True)
class Step:
    """One change of weights by a pass.

    Attributes:
        name: the pass.
        takes: paths of the weights that it reads.
        gives: paths of the weights that it sets.
        fn: `fn(*taken, *data) -> given`, traceable; a value for each of `gives`, and perhaps a flag after them, without
            which the values are wrong. None: it sets `data`.
        data: what else it reads: masks, factors, scales that were found once.
        reason: why other weights cannot be treated so; empty if they can.
        skippable: whether the weights are usable without this step, with larger rounding errors.

    >>> step = Step("prune", ("w",), ("w",), lambda w, mask: (w * mask,), (jnp.array([1.0, 0.0]),))
    >>> step.values({"w": jnp.array([3.0, 4.0])})[0].tolist()
    [3.0, 0.0]
    """

    name: str
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    fn: Callable[..., Sequence[Any]] | None = None
    data: tuple[jax.Array, ...] = ()
    reason: str = ""
    skippable: bool = False

    def values(self, weights: Mapping[str, Any]) -> Sequence[Any]:
        """What it gives, of these weights.

        >>> Step("factors", gives=("f",), data=(jnp.ones(2),)).values({})[0].tolist()
        [1.0, 1.0]
        """
        return self.data if self.fn is None else self.fn(*(weights[path] for path in self.takes), *self.data)


@dataclasses.dataclass(frozen=True)
class Derivation:
    """The float weights of a model, and the steps from them to those of a program.

    Attributes:
        weights: path -> array, before the first pass.
        steps: in order; what no step sets stays as it was.
    """

    weights: Mapping[str, Any]
    steps: tuple[Step, ...] = ()
