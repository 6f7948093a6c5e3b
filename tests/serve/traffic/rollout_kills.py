"""Kills a process at every call into the system that a decision about a rollout makes, and looks after each.

Run as `python rollout_kills.py FOLDER KIND`; prints how many kills there were. It is a process of its own because it
forks, which a process with JAX's threads must not.
"""

import asyncio
import pathlib
import sys

from test_rollouts import Simulated

from lepton_xla.serve.protocol.traffic import Stage

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "models"))

from repository_kills import killed_at

FIGURES = {"promoted": {}, "rolled back": {"accuracy": {"1": 0.9, "2": 0.0}}, "stage": {}}
LABELS = {"promoted": "2", "rolled back": "1", "stage": "1"}


async def inline(function, *arguments):
    """Instead of a thread, whose calls would not be seen."""
    return function(*arguments)


def look_until(subject, kind):
    """Has the rollout decided about, by as many looks as that takes."""
    for _ in range(20):
        if ended(subject, kind):
            return
        subject.look(requests=200, **FIGURES[kind])


def ended(subject, kind):
    """Whether the decision is written."""
    rollout = subject.rollout
    return rollout.stage == 1 if kind == "stage" else rollout.state == kind


def main(folder, kind):
    asyncio.to_thread = inline
    stages = {
        "promoted": (Stage(share=0.5, answers=90),),
        "rolled back": (Stage(share=0.5, answers=10**6),),
        "stage": (Stage(share=0.5, answers=90), Stage(share=0.6, answers=10**6)),
    }[kind]
    step = 0
    while True:
        place = pathlib.Path(folder) / str(step)
        place.mkdir()
        subject = Simulated(place, stages=stages)
        subject.look(requests=10)  # its counters begin here
        before = subject.rollout
        was_killed = killed_at(step, lambda subject=subject: look_until(subject, kind))
        rollout, stands_on = subject.rollout, subject.stands_on  # the files can be read
        assert rollout == before or ended(subject, kind), step
        assert stands_on in ("1", LABELS[kind]), step
        if ended(subject, kind):
            assert stands_on == LABELS[kind], step
        if not was_killed:
            assert ended(subject, kind)
            break
        subject.restart()
        look_until(subject, kind)
        assert ended(subject, kind), step
        assert subject.stands_on == LABELS[kind], step
        step += 1
    sys.stdout.write(str(step))


if __name__ == "__main__":
    main(*sys.argv[1:])
