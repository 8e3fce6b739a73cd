"""The timed process of every contestant: python -m benchmarks.peers.worker FOLDER THREADS

Answers as clip_deploy.timing.latency_worker does; a request with "tower" also names the file of inputs, one for all:
    {"tower": "text", "batch": 8, "tokens": 77, "inputs": "inputs.npz"}
Run by a peer's Python on what the peer built, it needs numpy and that peer's runtime; run by ours, it opens artifacts/.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import contestant
from clip_deploy.timing.latency_worker import serve


def open_contestant(folder: Path, threads: int) -> Any:
    if not (folder / contestant.MANIFEST).exists():
        from clip_deploy.runtimes import open_encoder

        return open_encoder(folder, threads)
    record = contestant.read(folder)
    return RUNTIMES[record["runtime"]](folder, threads, record.get("options", {}))


def prepare_call(encoder: Any, request: dict) -> Callable[[], np.ndarray]:
    with np.load(request["inputs"]) as content:
        names = input_names(request["tower"], request["tokens"], request.get("padded_to"))
        inputs = [np.ascontiguousarray(content[name][: request["batch"]]) for name in names]
    encode = encoder.encode_images if request["tower"] == "vision" else encoder.encode_texts
    return lambda: encode(*inputs)


def input_names(tower: str, tokens: int | None, padded_to: int | None = None) -> list[str]:
    """Arrays of the file of inputs that a tower takes."""
    if tower == "vision":
        return ["pixel_values"]
    length = f"{tokens}_in_{padded_to}" if padded_to and padded_to != tokens else f"{tokens}"
    return [f"input_ids_{length}", f"attention_mask_{length}"]


class Ort:
    def __init__(self, folder: Path, threads: int, _: dict) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.vision, self.text = (
            onnxruntime.InferenceSession(folder / f"{tower}.onnx", options, providers=["CPUExecutionProvider"])
            for tower in ("vision", "text")
        )
        self.text_inputs = [item.name for item in self.text.get_inputs()]
        self.outputs = {session: [session.get_outputs()[0].name] for session in (self.vision, self.text)}

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        return self.vision.run(self.outputs[self.vision], {"pixel_values": pixel_values})[0]

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.text.run(self.outputs[self.text], {name: given[name] for name in self.text_inputs})[0]


class OpenVino:
    """Compiled for latency, as its guide has it for one request at a time.

    https://docs.openvino.ai/2025/openvino-workflow/running-inference/optimize-inference/high-level-performance-hints.html
    """

    def __init__(self, folder: Path, threads: int, options: dict) -> None:
        import openvino

        core = openvino.Core()
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **options}
        self.vision, self.text = (
            core.compile_model(folder / f"{tower}.xml", "CPU", settings) for tower in ("vision", "text")
        )
        self.text_inputs = [port.get_any_name() for port in self.text.inputs]

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        return self.vision({"pixel_values": pixel_values})[0]

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.text({name: given[name] for name in self.text_inputs})[0]


class Torch:
    def __init__(self, folder: Path, threads: int, _: dict) -> None:
        import torch
        from transformers import AutoModel

        torch.set_num_threads(threads)
        self.torch = torch
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.masked = not model.config.model_type.startswith("siglip")
        self.images, self.texts = model.get_image_features, model.get_text_features

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            return self.images(pixel_values=self.torch.from_numpy(pixel_values)).pooler_output.numpy()

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": self.torch.from_numpy(input_ids)}
        if self.masked:
            inputs["attention_mask"] = self.torch.from_numpy(attention_mask)
        with self.torch.inference_mode():
            return self.texts(**inputs).pooler_output.numpy()


class TorchCompile(Torch):
    """Compiled anew for every shape (dynamic=False), which serves a fixed shape best; kept on disk for the next run.

    Frozen, weights are laid out for the kernels beforehand, as PyTorch advises on CPUs; vision gains a few per cent:
    https://github.com/pytorch/pytorch/pull/128010
    """

    def __init__(self, folder: Path, threads: int, options: dict) -> None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes beside the timed ones
        os.environ["TORCHINDUCTOR_FREEZING"] = "1"
        super().__init__(folder, threads, options)
        self.images, self.texts = (self.torch.compile(call, dynamic=False) for call in (self.images, self.texts))


RUNTIMES = {"ort": Ort, "openvino": OpenVino, "eager": Torch, "compile": TorchCompile}

if __name__ == "__main__":
    serve(open_contestant, prepare_call)
