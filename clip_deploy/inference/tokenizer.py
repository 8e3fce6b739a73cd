"""Texts as a text tower takes them, with `tokenizers` alone, as the checkpoint's own tokenizer does it."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from clip_deploy.core.errors import DataError

SHOWN = 60  # characters of a text in a message


class Tokenizer:
    """A package's tokenizer.json with the model's context and padding."""

    def __init__(self, path: Path, context_length: int, pad_to_context: bool, pad_token: int) -> None:
        self.context_length = context_length
        self.inner = tokenizers.Tokenizer.from_file(str(path))
        self.inner.enable_truncation(context_length)
        self.inner.enable_padding(
            pad_id=pad_token,
            pad_token=self.inner.id_to_token(pad_token) or "",
            length=context_length if pad_to_context else None,
        )

    def __call__(self, texts: list[str]) -> dict[str, np.ndarray]:
        """input_ids and attention_mask, int64 [texts, tokens]; a text beyond the context is cut, with a warning."""
        encoded = self.inner.encode_batch(texts)
        for text, tokens in zip(texts, encoded, strict=True):
            if tokens.overflowing:
                warnings.warn(
                    f"a text is longer than {self.context_length} tokens and was cut: {shown(text)}", stacklevel=2
                )
        return {
            "input_ids": np.array([tokens.ids for tokens in encoded], dtype=np.int64),
            "attention_mask": np.array([tokens.attention_mask for tokens in encoded], dtype=np.int64),
        }


def vocabulary(path: Path) -> int:
    """Of a tokenizer.json: one more than its highest token id."""
    return max(tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values()) + 1


def check_texts(texts: Sequence[str]) -> None:
    """Raise DataError where there is no text, or one that says nothing."""
    if isinstance(texts, str):
        raise DataError(f"texts is one string, {shown(texts)}: give a list of strings")
    if not isinstance(texts, Sequence):
        raise DataError(f"texts is {texts!r:.80}: give a list of strings")
    if not texts:
        raise DataError("there are no texts: give one or more")
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"text {row + 1} of {len(texts)} is {text!r}: give words")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"text {row + 1} of {len(texts)} is not valid Unicode: {shown(text)}") from error


def shown(text: str) -> str:
    """A text as messages show it: in quotes, and cut where it is long."""
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
