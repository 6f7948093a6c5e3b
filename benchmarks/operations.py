"""Operating a server: what changes cost the requests that come meanwhile.

    python benchmarks/operations.py [--sections NAMES] [--triton PYTHON] [--mlserver PYTHON]
                                    [--quick] [--json FILE]

Section `swaps`: versions take each other's place under an open loop at 60 % of the capacity, weights alone and whole
artifacts; a swap of 100 MB of weights; and 1,000 reloads of one model under traffic to another. Section `many`: 200
models under a budget of memory that has room for a quarter, and 1 to 50 models that share one device. Section
`monitor`: what sketches and feedback cost, and when drift is noticed. Section `learn`: a model whose data shift, and
`leptonx learn` beside it. Section `traffic`: what it costs to share requests among versions, and to ask a shadow too.
Section `triton`: several models and reloads in Triton, with a Python that has nvidia-pytriton (see `serving.py`), and
several models in MLServer, with a Python that has that.
The server has all cores except the last, which is the load generator's. Rows are kept when they are measured, so an
interrupted run can continue; `--fresh` measures everything again. Writes
docs/benchmarks/operations.md; a run of some sections replaces only these.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import crowding
import harness
import journal
import rivals
import sections
import sharing
import shifts
import swapping
import watching
from rich.console import Console
from sections import Section

console = Console(width=120, highlight=False)

SECTIONS = {
    "swaps": Section(swapping.measure, swapping.tables, swapping.INTRODUCTION),
    "many": Section(crowding.measure, crowding.tables, crowding.INTRODUCTION),
    "monitor": Section(watching.measure, watching.tables, watching.INTRODUCTION),
    "learn": Section(shifts.measure, shifts.tables, shifts.INTRODUCTION),
    "triton": Section(rivals.measure, rivals.tables, rivals.INTRODUCTION),
    "traffic": Section(sharing.measure, sharing.tables, sharing.INTRODUCTION),
}


def page(results: Mapping[str, Any]) -> str:
    """docs/benchmarks/operations.md."""
    return sections.page(["# Operating a server"], SECTIONS, results)


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no page: a smoke test")
    sections.add_options(parser, SECTIONS)
    journal.add_option(parser)
    parser.add_argument("--triton", help="a Python that has nvidia-pytriton 0.7.0")
    parser.add_argument("--mlserver", help="a Python that has mlserver 1.7.1")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each closed loop that finds a capacity")
    options = parser.parse_args()
    if options.quick:
        options.seconds = 0.5

    def write(results: sections.Results) -> None:
        if not options.quick:
            harness.publish("operations", results, page)

    sections.run(SECTIONS, options, lambda name: harness.machine(), write, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
