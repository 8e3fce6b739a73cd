"""Triton Python model: texts to token ids, as the checkpoint's own tokenizer gives them. Needs numpy and tokenizers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer

STEP = 8  # lengths are rounded up to a multiple of it: requests of one length can be encoded in one call


class TritonPythonModel:
    """Texts [texts, 1] to token ids and their mask [texts, tokens], by the package's tokenizer.json."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.context, self.pad_token = settings["context_length"], settings["pad_token"]
        self.pad_to_context = settings["pad_to_context"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.context)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(pb_utils.get_input_tensor_by_name(request, "texts").as_numpy()) for request in requests]

    def _answer(self, texts: np.ndarray) -> Any:
        try:
            words = [text.decode("utf-8") for text in texts.reshape(-1)]
        except UnicodeDecodeError as error:
            return _refused(f"a text is not UTF-8: {error}")
        if empty := [row for row, word in enumerate(words, 1) if not word.strip()]:
            return _refused(f"text {empty[0]} of {len(words)} is empty: give each text at least one word")
        ids, mask = self.tokens(words)
        return pb_utils.InferenceResponse([pb_utils.Tensor("input_ids", ids), pb_utils.Tensor("attention_mask", mask)])

    def tokens(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and attention_mask, int64 [texts, tokens]; a text longer than the context is cut."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(words)]
        longest = max(map(len, rows), default=1)
        length = self.context if self.pad_to_context else min(self.context, -(-longest // STEP) * STEP)
        ids = np.full((len(rows), length), self.pad_token, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        return ids, mask


def _refused(why: str) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(why, pb_utils.TritonError.INVALID_ARG))
