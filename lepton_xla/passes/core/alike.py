"""Sites of one shape: what is compiled, or timed, for one of them serves all."""

from __future__ import annotations

from lepton_xla.passes.core.sites import Site, layout_key


class Alike:
    """A site as far as its shapes: equal to that of any other site of the same product, operands and layout.

    It is what jitted functions of passes take as their static argument, so that the equal layers of a model share what
    is compiled. Operators of one shape differ in their weights' names and equations only, which such functions must
    not look at.

    Attributes:
        site: one of these sites.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self.facts = (
            site.kind,
            site.weight_operand,
            tuple((operand.shape, operand.dtype.name) for operand in site.operands),
            str(sorted(site.params.items(), key=lambda item: item[0])),
            layout_key(site.layout),
        )

    def __hash__(self) -> int:
        return hash(self.facts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike) and self.facts == other.facts
