"""Compiled code of one model, and of several in turn, without a server: what `crowding.py` compares a server with.

    python benchmarks/turns.py ARTIFACT INPUT.npy COUNT,COUNT SECONDS

Prints executions per second by number of models, as JSON: medians of three rounds. Each execution begins with a copy of
its rows, out of as many bodies as `BODIES`, into the one place where all models read them, as in a server. In a process
of its own, because XLA has to run code on the calling thread, as a server has it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence

import numpy as np

import lepton_xla as lx
from lepton_xla.serve.runtime import run_on_calling_thread

BODIES = 16


def rates(artifact: str, rows: np.ndarray, counts: Sequence[int], seconds: float) -> dict[str, float]:
    """Executions per second by number of models, each with weights of its own. Of equal code there is one."""
    memory = np.zeros(rows.nbytes + 64, np.uint8)
    staged = memory[-memory.ctypes.data % 64 :][: rows.nbytes].view(rows.dtype).reshape(rows.shape)
    bodies = [rows.copy() for _ in range(BODIES)]
    runs = [lx.load(artifact).bind({"batch": len(rows)}, [staged]) for _ in range(max(counts))]
    rounds: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(3):
        for count in counts:
            done, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds:
                for index, run in enumerate(runs[:count]):
                    assert run is not None
                    staged[...] = bodies[(done + index) % BODIES]
                    run()
                done += count
            rounds[count].append(done / (time.perf_counter() - began))
    return {str(count): float(np.median(each)) for count, each in rounds.items()}


if __name__ == "__main__":
    run_on_calling_thread()
    path, rows_path, counts, seconds = sys.argv[1:]
    print(json.dumps(rates(path, np.load(rows_path), [int(each) for each in counts.split(",")], float(seconds))))
