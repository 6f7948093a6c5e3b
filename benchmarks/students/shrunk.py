"""The residual CNN with 30 % of its operations left, trained on from labels alone, and from the whole network too."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import harness
from models.residual import ResidualNet

import lepton_xla as lx
from lepton_xla import train
from students import base, digits
from students.base import learn

SEEDS, WHOLE_EPOCHS, EPOCHS = 3, 6, 10
LEFT, ROUND_TO, RATE, TEMPERATURE = 0.3, 8, 1e-3, 2.0
WAYS = ("labels alone", "distilled")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Accuracy of the whole network and of the shrunk ones; more and more seeds."""
    learned, judged = digits.part(options.quick)
    first, epochs = (1, 1) if options.quick else (WHOLE_EPOCHS, EPOCHS)
    model = digits.model(ResidualNet(), 0)

    @functools.cache
    def whole() -> lx.Program:
        folder = None if options.quick else base.FOLDER / f"residual, {first} epochs"
        return learn(
            model,
            train.supervised(model),
            digits.moved(learned, 0),
            steps=digits.steps(learned, first),
            rate=2 * RATE,
            decay=1e-3,
            folder=folder,
        ).program

    def row(way: str, seed: int) -> dict[str, float]:
        student = digits.trained(model, whole())
        loss = (
            train.supervised(student)
            if way == "labels alone"
            else train.distill(student, whole(), [train.Logits(TEMPERATURE, weight=0.5), train.Labels(weight=0.5)])
        )
        program = learn(
            student,
            loss,
            digits.moved(learned, 100 + seed),
            steps=digits.steps(learned, epochs),
            rate=RATE,
            decay=1e-3,
            folder=None,
            seed=seed,
            compression=train.Compression(shrink_at=0, shrink={"flops": LEFT, "round_to": ROUND_TO}),
        ).program
        flops, before = (lx.passes.cost(each, {"batch": 1}).flops for each in (program, whole()))
        return {
            "accuracy": digits.accuracy(program, judged),
            "flops": flops / before,
            "bytes": program.weights_bytes / whole().weights_bytes,
        }

    found: dict[str, Any] = {
        "epochs": [first, epochs],
        "tested": len(judged["label"]),
        "whole": options.rows.row("shrunk: whole", lambda: digits.accuracy(whole(), judged)),
        "rows": {way: [] for way in WAYS},
    }
    for seed in range(1 if options.quick else SEEDS):
        for way in reversed(WAYS):
            name = f"shrunk: {way}, seed {seed}"
            found["rows"][way].append(options.rows.row(name, functools.partial(row, way, seed)))
            print(f"  {name}: {harness.percent(found['rows'][way][-1]['accuracy'])} %", flush=True)
        yield found
