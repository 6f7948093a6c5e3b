"""Maps masks of computed weights to the weights that they are computed from, if that only moves elements."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_xla.errors import ModelError
from lepton_xla.passes.core.expressions import Expression, evaluate, only_moves, stored_shape
from lepton_xla.passes.core.plans import Plan
from lepton_xla.trees import some_names


@dataclasses.dataclass(frozen=True)
class Carrier:
    """Maps arrays between weights and the computed weights of a plan.

    Attributes:
        sources: path of the computed weight -> its expression, which has only layout operations, concatenation and
            slicing.
    """

    sources: Mapping[str, Expression]

    @staticmethod
    def of(plan: Plan, weights: Mapping[str, Any]) -> Carrier:
        """Make the carrier for the computed weights that a plan prunes and that are not among `weights` (path ->
        array).

        Raises:
            ModelError: if the mask of a computed weight cannot be mapped; names it and says what to do.
        """
        pruned = {entry.site.path: entry.site.source for entry in plan.sites if entry.prune is not None}
        sources = {path: source for path, source in pruned.items() if path and source and path not in weights}
        for path, source in sources.items():
            missing = [other for other in source.weights if other not in weights]
            if missing:
                raise ModelError(
                    f"the plan prunes {path!r}, which is computed from {missing[0]!r}; that is not among "
                    f"{some_names(weights)}; give the tree of weights that the plan's program has"
                )
            if not only_moves(source):
                raise _refused(path, source, "which changes their values, so that its mask is none of theirs")
        return Carrier(sources)

    def check_apart(self, paths: Iterable[str], weights: Mapping[str, Any]) -> None:
        """Check that no element belongs to two pruned weights, which could need different masks.

        Args:
            paths: paths of all pruned weights, computed or not.
            weights: path -> array, or its shape.

        Raises:
            ModelError: if one does; names a weight.
        """
        with jax.ensure_compile_time_eval():
            taken = {path: jnp.ones(weights[path].shape) for path in paths if path not in self.sources}
            for path, source in self.sources.items():
                whole = jnp.ones(stored_shape(source, weights).shape, bool)
                for other, count in _carried_back(source, whole, weights).items():
                    taken[other] = taken.get(other, 0) + count.astype(jnp.float32)
                    if bool((taken[other] > 1).any()):
                        raise _refused(path, source, f"some elements of which ({other!r}) are pruned more than once")

    def origins(self, paths: Iterable[str]) -> list[str]:
        """Paths of the stored weights behind the masks of `paths`."""
        found = [self.sources[path].weights if path in self.sources else (path,) for path in paths]
        return list(dict.fromkeys(path for each in found for path in each))

    def shapes(self, weights: Mapping[str, Any]) -> dict[str, Any]:
        """The weights, together with shapes and dtypes of the computed ones."""
        return {**weights, **{path: stored_shape(source, weights) for path, source in self.sources.items()}}

    def there(self, arrays: Mapping[str, jax.Array], weights: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Map arrays with the shapes of weights to the computed weights; return both, by path.

        Booleans stay booleans; a weight without an array counts as ones.
        """
        found = dict(arrays)
        for path, source in self.sources.items():
            own = {
                other: jnp.asarray(arrays[other], weights[other].dtype)
                if other in arrays
                else jnp.ones(weights[other].shape, weights[other].dtype)
                for other in source.weights
            }
            (made,) = evaluate([source], own)
            boolean = all(arrays[other].dtype == bool for other in source.weights if other in arrays)
            found[path] = made != 0 if boolean else made
        return found

    def back(self, masks: Mapping[str, jax.Array], weights: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Map masks back to stored weights: False where the mask of the weight itself or of a computed one is."""
        found = {path: mask for path, mask in masks.items() if path not in self.sources}
        for path, source in self.sources.items():
            for other, count in _carried_back(source, ~masks[path], weights).items():
                found[other] = (count == 0) & found.get(other, jnp.ones(count.shape, bool))
        return found


def _carried_back(source: Expression, flags: jax.Array, weights: Mapping[str, Any]) -> dict[str, jax.Array]:
    """For each element of the weights: how many flagged elements of the computed weight it became."""
    like = {path: jax.ShapeDtypeStruct(weights[path].shape, weights[path].dtype) for path in source.weights}
    (counts,) = jax.linear_transpose(lambda own: evaluate([source], own)[0], like)(
        flags.astype(stored_shape(source, weights).dtype)
    )
    return counts


def _refused(path: str, source: Expression, why: str) -> ModelError:
    return ModelError(
        f"the plan prunes {path!r}, which is computed from {some_names(source.weights)}, {why}; prune those weights "
        f"themselves, by rules that name them, or train precompute(program), which has it for a weight"
    )
