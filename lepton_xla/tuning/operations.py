"""Counts operations: multiply-adds of one call at its products, those by weights that are not zero.

Rounding changes none but where it rounds to zero; pruning and removing channels do. Products of two activations count
whole. What a device skips is another question, which measured times answer: without kernels for sparse weights it
multiplies by zeros too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lepton_xla.passes.core.costs import cost
from lepton_xla.passes.core.sites import find_sites
from lepton_xla.program import Program
from lepton_xla.quant import QTensor
from lepton_xla.tuning.choices import Group


@dataclasses.dataclass(frozen=True)
class Operations:
    """Multiply-adds of one call if no weight is zero.

    Attributes:
        of_site: by site.
        path_of: path of each site's weight; None of a product of two activations.

    >>> x = lx.TensorSpec(("batch", 4), "float32")
    >>> program = lx.trace(lambda w, x: x @ w["w"], {"w": jnp.eye(4)}, {"x": x})
    >>> found = Operations.of(program, {"batch": 2})
    >>> found.of_site, found.by(program.weights)  # three of four weights are zero
    ({'w': 32}, 8)
    """

    of_site: Mapping[str, int]
    path_of: Mapping[str, str | None]

    @staticmethod
    def of(program: Program, at: Mapping[str, int]) -> Operations:
        """Count.

        Args:
            program: a float program.
            at: sizes of its symbolic dimensions.
        """
        counted = {each.site: each.flops // 2 for each in cost(program, at).sites if each.flops}
        return Operations(counted, {site.name: site.path for site in find_sites(program, sizes=at)})

    def by(self, weights: Mapping[str, Any]) -> int:
        """Multiply-adds by weights that are not zero.

        Args:
            weights: by path, as they are stored; sites without one here count whole.
        """
        paths = {path for site in self.of_site if (path := self.path_of.get(site)) is not None and path in weights}
        shares = {path: share_of_nonzeros(weights[path]) for path in paths}
        return round(sum(each * shares.get(self.path_of.get(site) or "", 1.0) for site, each in self.of_site.items()))

    def of_choices(
        self, groups: Sequence[Group], stored: Mapping[str, Mapping[str, Any]]
    ) -> tuple[list[np.ndarray], int]:
        """Multiply-adds of each choice for each group, float64 [choices], and those at sites of no group.

        Args:
            groups: from `find_groups`.
            stored: from `stored_weights`.
        """
        owned = {site for group in groups for site in group.sites}
        rest = sum(each for site, each in self.of_site.items() if site not in owned)

        def count(group: Group, name: str) -> float:
            shares = {path: share_of_nonzeros(stored[name][path]) for path in group.paths}
            return sum(
                self.of_site.get(site, 0) * shares.get(self.path_of.get(site) or "", 1.0) for site in group.sites
            )

        return [np.array([count(group, each.name) for each in group.choices], np.float64) for group in groups], rest


def share_of_nonzeros(weight: Any) -> float:
    """Share of a weight's elements that are not zero, as it is stored.

    >>> share_of_nonzeros(jnp.eye(4))
    0.25
    """
    whole = weight.dequantize() if isinstance(weight, QTensor) else jnp.asarray(weight)
    return float(jnp.count_nonzero(whole)) / max(whole.size, 1)
