"""Questions of customers, the reply to each kind of them, and questions that nobody has a reply to.

BANKING77 where it is (the folder `banking77` of `LEPTON_DATA`, or of `../shared/data`), else questions that are made
from the names of its intents; the replies are those of `replies.json`. Questions without a reply, on all subjects from
food to sports, are those of the package `chatterbot-corpus`, which the extra `apps` installs; else a few of this file.
(Its 1,050 pairs of tech support are ten different ones, so there is nothing to learn from them.)
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import os
import pathlib
import random
from collections.abc import Mapping, Sequence

HERE = pathlib.Path(__file__).resolve().parent
UNKNOWN = "I am sorry, I do not know the answer to that. Please put it in other words, or ask for a colleague of mine."
# For questions that are judged and not trained on, the share of the questions of each kind, if nobody split them.
HELD_OUT = 0.25
_FRAMES = (
    "{}?", "what about {}", "I have a question about {}", "tell me about {}", "help me with {} please",
    "something is wrong with {}", "how does {} work?", "can you explain {}", "there is a problem: {}",
    "I need to know more about {}", "why {}?", "hello, {}", "please help, {}", "{} in the app?", "is it about {}?",
    "{} now",
)  # fmt: skip
_OFF_TOPIC = (
    "What is the weather like in Oslo tomorrow?", "Who won the football match last night?", "How do I bake bread?",
    "Tell me a joke about penguins.", "What is the tallest mountain in Africa?", "My cat does not eat any more.",
    "Can you write a poem about autumn?", "How many planets does the sun have?", "Which film should I watch tonight?",
    "My car makes a strange noise.", "What is the square root of two?", "How do I learn to play the piano?",
    "Where can I buy fresh fish?", "Who painted the Mona Lisa?", "What does a neural network do?",
    "My printer is out of ink.", "When does the train to Berlin leave?", "Is it healthy to run every day?",
    "How do I get a stain out of a shirt?", "Translate good morning into Italian.", "How old is the universe?",
    "What should I name my dog?", "Do you like music?", "How tall are giraffes?", "My tooth hurts.",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """What the application learns, and what it is judged on.

    Attributes:
        source: where the questions are from.
        kinds: name of each kind of question; the last one is `unknown`.
        replies: the reply to each kind.
        train, test: questions and the number of their kind.
        strangers: questions that have no reply, trained on as such.
        others: questions that have no reply and are on other subjects than these; judged.
        strangers_from: where both are from.
    """

    source: str
    kinds: tuple[str, ...]
    replies: tuple[str, ...]
    train: tuple[list[str], list[int]]
    test: tuple[list[str], list[int]]
    strangers: list[str]
    others: list[str]
    strangers_from: str


def load() -> Task:
    """The best there is; says what is missing."""
    folder = pathlib.Path(
        os.environ.get("LEPTON_DATA", pathlib.Path(__file__).resolve().parents[4] / "shared" / "data")
    )
    folder = folder / "banking77"
    if (folder / "train.csv").exists():
        return _of(_banking(), _read(folder / "train.csv"), _read(folder / "test.csv"), "BANKING77", *_strangers())
    print("BANKING77 is not here; these questions are made up")
    return made_up()


def made_up(kinds: int | None = None) -> Task:
    """Questions that are made from the names of BANKING77's intents, or of so many of them."""
    replies = dict(list(_banking().items())[:kinds])
    rows = [(frame.format(name.replace("_", " ").strip("?")), name) for name in replies for frame in _FRAMES]
    random.Random(0).shuffle(rows)
    first = int(len(rows) * HELD_OUT)
    return _of(replies, rows[first:], rows[:first], "made-up questions", *_strangers())


def new_kinds(task: Task) -> list[int]:
    """Kinds that nobody asks about at first: those on topping up; the last one where there is none."""
    found = [number for number, name in enumerate(task.kinds) if "top_up" in name or "topping_up" in name]
    return found or [len(task.kinds) - 2]


def _of(
    replies: Mapping[str, str],
    train: Sequence[tuple[str, str]],
    test: Sequence[tuple[str, str]],
    source: str,
    strangers: list[str],
    others: list[str],
    strangers_from: str,
) -> Task:
    kinds = (*replies, "unknown")
    numbers = {name: number for number, name in enumerate(kinds)}
    parts = [([text for text, _ in rows], [numbers[name] for _, name in rows]) for rows in (train, test)]
    return Task(source, kinds, (*replies.values(), UNKNOWN), parts[0], parts[1], strangers, others, strangers_from)


def _banking() -> dict[str, str]:
    return json.loads((HERE / "replies.json").read_text())


def _read(file: pathlib.Path) -> list[tuple[str, str]]:
    known = _banking()
    try:
        with file.open(newline="", encoding="utf-8") as rows:
            found = [(" ".join(row["text"].split()), row["category"]) for row in csv.DictReader(rows)]
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise SystemExit(f"{file} is not a file of BANKING77, with columns text and category: {error!r}") from error
    if unknown := sorted({name for _, name in found} - known.keys()):
        raise SystemExit(f"{file} has kinds of questions without a reply in replies.json: {', '.join(unknown[:5])}")
    return found


def _strangers() -> tuple[list[str], list[str], str]:
    """Questions on other subjects to train on and to judge, and where they are from."""
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None or importlib.util.find_spec("yaml") is None:
        print(
            "missing: chatterbot-corpus and pyyaml, which have questions on other subjects; a few of its own are used"
        )
        return list(_OFF_TOPIC[::2]), list(_OFF_TOPIC[1::2]), "this application"
    import yaml

    folder = pathlib.Path(spec.origin or "").parent / "data" / "english"
    found: tuple[set[str], set[str]] = set(), set()
    for number, file in enumerate(sorted(folder.glob("*.yml"))):  # a subject each
        said = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
        found[number % 2].update(str(each[0]) for each in said)
    return sorted(found[0]), sorted(found[1] - found[0]), "chatterbot-corpus"
