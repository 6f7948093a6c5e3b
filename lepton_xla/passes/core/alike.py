"""Sites of equal shape, which share compiled code and measured times."""

from __future__ import annotations

from lepton_xla.passes.core.layouts import layout_key
from lepton_xla.passes.core.sites import Site


class Alike:
    """A site that equals every other site with the same product, operand shapes and layout.

    Jitted functions of passes take it as a static argument, so that equal layers of a model share compiled code. Such
    functions must not depend on the weight's name or the equation, which differ between alike sites.

    Attributes:
        site: one of the alike sites.
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
