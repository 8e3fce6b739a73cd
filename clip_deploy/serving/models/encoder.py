"""Triton Python model: one tower, opened by the runtime that judged it, as the package does.

Needs what deploy/requirements.txt names; the part of clip_deploy that opens packages lies beside. What the dynamic
batcher hands over together is encoded in one call. Embeddings of texts are kept, and no errors: Triton's own response
cache keeps both, and answers an error's second request with 200 and no output (2.51).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

DEVICES = {"CPU": "cpu", "GPU": "cuda"}
MISTAKES = ("DataError", "InvalidArgument")  # a client's: clip_deploy's error, and ONNX Runtime's
ENTRY_BYTES = 400  # of the cache, around an embedding's float32 numbers


class TritonPythonModel:
    """A tower of the package by the code that runs its row in the table: arrays [batch, ...] to embeddings."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.inputs = [given["name"] for given in config["input"]]
        self.output = config["output"][0]["name"]
        threads = int(config["parameters"]["intra_op_thread_count"]["string_value"])
        version = Path(args["model_repository"]) / args["model_version"]
        sys.path.insert(0, str(version))
        from clip_deploy.inference.encoders import PackageEncoder, read_encoder
        from clip_deploy.inference.text_cache import TextCache

        tower = "vision" if self.output == "image_embeds" else "text"
        device, settings = DEVICES[args["model_instance_kind"]], read_encoder(version / "settings.json")
        self.encoder = PackageEncoder(version, settings, device, threads, [tower])
        if tower == "text":
            cache_bytes = int(config["parameters"]["cache_bytes"]["string_value"])
            size = cache_bytes // (4 * settings.dimension + ENTRY_BYTES)
            self.cache = TextCache(settings.towers.text.sha256, settings.dimension, size)
            for batch in config.get("model_warmup", []):  # Triton's own repeats one row, which the cache answers
                ids = np.zeros((batch["batch_size"], settings.context_length), dtype=np.int64)
                self.encoder.encode_texts(ids, np.ones_like(ids))

    def execute(self, requests: list[Any]) -> list[Any]:
        fed = [self._arrays(request) for request in requests]
        try:
            return [_response(self.output, rows) for rows in self._together(fed)]
        except Exception:  # one of them is bad: only that one gets an error
            return [self._alone(arrays) for arrays in fed]

    def encode(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        if "input_ids" not in arrays:
            return self.encoder.encode_images(*arrays.values())
        ids = arrays["input_ids"]
        return self._encode_texts(ids, arrays.get("attention_mask", np.ones_like(ids)))

    def _encode_texts(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Rows that were encoded before are what they were then; the others are encoded in one call."""
        keys = [f"{row.tobytes().hex()} {seen.tobytes().hex()}" for row, seen in zip(ids, mask, strict=True)]
        found = {key: embedding for key in keys if (embedding := self.cache.get(key)) is not None}
        missing = {key: row for row, key in enumerate(keys) if key not in found}
        if missing:
            rows = list(missing.values())
            for key, embedding in zip(missing, self.encoder.encode_texts(ids[rows], mask[rows]), strict=True):
                found[key] = embedding.copy()  # a view would keep the whole batch in memory
                self.cache.put(key, found[key])
        return np.stack([found[key] for key in keys])

    def _arrays(self, request: Any) -> dict[str, np.ndarray]:
        return {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}

    def _together(self, fed: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        whole = {name: np.concatenate([arrays[name] for arrays in fed]) for name in self.inputs}
        counts = [len(arrays[self.inputs[0]]) for arrays in fed]
        return np.split(self.encode(whole), np.cumsum(counts)[:-1])

    def _alone(self, arrays: dict[str, np.ndarray]) -> Any:
        try:
            return _response(self.output, self.encode(arrays))
        except Exception as error:
            errors = pb_utils.TritonError
            code = errors.INVALID_ARG if type(error).__name__ in MISTAKES else errors.INTERNAL
            return pb_utils.InferenceResponse(error=errors(f"cannot encode this request: {error}", code))


def _response(name: str, rows: np.ndarray) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, rows.astype(np.float32, copy=False))])
