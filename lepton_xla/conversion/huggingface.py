"""Tokenizers that an artifact carries as data: JSON of Hugging Face's `tokenizers`."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Generator, Sequence
from typing import Any

from lepton_xla.environment.extras import Needs
from lepton_xla.errors import ArtifactError, InputError

MAX_TOKENIZER_BYTES = 64 << 20


@contextlib.contextmanager
def _told() -> Generator[None, None, None]:
    try:
        yield
    except Exception as error:  # of no class of its own
        raise InputError(f"the tokenizer has no tokens for a text: {error}") from error


class HuggingFace:
    """A tokenizer of Hugging Face's `tokenizers`, which the extra `text` installs.

    Args:
        data: its JSON.
        length: largest number of tokens of a text, if what the JSON says of lengths and padding is not to hold.
        truncate: whether longer texts are cut to this length, special tokens kept.

    Raises:
        ArtifactError: if it cannot be read.
        MissingPackageError: if the package tokenizers is missing.
    """

    def __init__(self, data: bytes, length: int | None = None, *, truncate: bool = False) -> None:
        if len(data) > MAX_TOKENIZER_BYTES:
            raise ArtifactError(f"the tokenizer has {len(data)} bytes, more than {MAX_TOKENIZER_BYTES}")
        with Needs("text", "a model with a tokenizer"):
            tokenizers: Any = importlib.import_module("tokenizers")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(data.decode())
            if length is not None:
                self._tokenizer.no_padding()
                self._tokenizer.no_truncation()
                if truncate:
                    self._tokenizer.enable_truncation(length)
        except Exception as error:  # of no class of its own
            raise ArtifactError(f"the tokenizer cannot be read: {error}") from error

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with the special ones that the tokenizer adds.

        Raises:
            InputError: for text that is not Unicode, or has no tokens, which only some tokenizers have for every text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("the prompt is not valid Unicode: it holds half of a surrogate pair") from error
        with _told():
            return list(self._tokenizer.encode(text).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of several texts, as `encode`, which other threads of Python may go on beside."""
        with _told():
            return [list(each.ids) for each in self._tokenizer.encode_batch(list(texts))]

    def names(self) -> list[str]:
        """Each token as people read it, in order: its text, or where it is no text by itself, the tokenizer's word."""
        count = int(self._tokenizer.get_vocab_size(with_added_tokens=True))
        texts = self._tokenizer.decode_batch([[token] for token in range(count)], skip_special_tokens=False)
        return [
            text if text and "\ufffd" not in text else str(self._tokenizer.id_to_token(token) or token)
            for token, text in enumerate(map(str, texts))
        ]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))
