"""Distillation: how much of the gap between a student that learns alone and its teacher is closed.

    python benchmarks/distillation.py [--sections mnist,...] [--quick] [--json FILE]

`mnist`: students of 800 hidden units on 5,000 images, judged on 10,000; `four-bits`: LeNet-5 with 4-bit weights and
activations; `shrunk`: a residual CNN with 30 % of its operations; `sentences`: MiniLM with three of its six layers on
BANKING77, taught by labels, logits, a teacher in int8, and features; `smaller`: that student in int8 by one `leptonx
train` command, judged by `leptonx eval` and `leptonx bench`.

Every accuracy comes with its noise. Training is checkpointed and rows are kept when they are measured, so an
interrupted run can continue; `--fresh` measures everything again. Writes docs/benchmarks/distillation.md.
"""

from __future__ import annotations

import argparse

import distillation_page
import harness
import journal
import sections
from rich.console import Console
from sections import Section
from students import four_bits, mnist, sentences, shrunk, smaller

console = Console(width=120, highlight=False)
SECTIONS = {
    name: Section(measure, tables, distillation_page.INTRODUCTIONS[name])
    for name, measure, tables in (
        ("mnist", mnist.measure, distillation_page.mnist_tables),
        ("four-bits", four_bits.measure, distillation_page.four_bits_tables),
        ("shrunk", shrunk.measure, distillation_page.shrunk_tables),
        ("sentences", sentences.measure, distillation_page.sentence_tables),
        ("smaller", smaller.measure, distillation_page.smaller_tables),
    )
}


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sections.add_options(parser, SECTIONS)
    parser.add_argument("--quick", action="store_true", help="little training, no page: a smoke test")
    harness.add_pages(parser)
    journal.add_option(parser)
    options = parser.parse_args()
    options.rows = journal.opened("distillation", options)

    def write(results: sections.Results) -> None:
        if options.pages and not options.quick:
            harness.publish(
                "distillation", results, lambda found: sections.page(distillation_page.HEAD, SECTIONS, found)
            )

    sections.run(SECTIONS, options, lambda name: harness.machine(), write, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
