"""What OpenVINO and NNCF make of it: python -m benchmarks.peers.build_openvino CHECKPOINT OUTPUT CALIBRATION KEY

`convert_model` on each tower and `nncf.quantize` as OpenVINO's CLIP notebook shows them (228-clip-zero-shot-quantize):
https://docs.openvino.ai/2023.3/notebooks/228-clip-zero-shot-quantize-with-output.html
https://docs.openvino.ai/2025/openvino-workflow/model-optimization-guide/quantizing-models-post-training/basic-quantization-flow.html
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import torch
from transformers import AutoModel

from benchmarks.peers.contestant import build_all, model_type

Arrays = dict[str, np.ndarray]
FILES = ["vision.xml", "vision.bin", "text.xml", "text.bin"]
PRECISIONS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}  # OpenVINO's name to ours


class Tower(torch.nn.Module):  # type: ignore[misc]
    """One tower with its projection; only what it calls ends up in the converted graph."""

    def __init__(self, model: torch.nn.Module, method: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.method, self.names = model, method, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self.method)(**dict(zip(self.names, inputs, strict=True))).pooler_output


def main() -> None:
    checkpoint, output, calibration = Path(sys.argv[1]), Path(sys.argv[2]), dict(np.load(sys.argv[3]))
    fp32 = output / "ov-fp32"
    if model_type(checkpoint) == "clip":
        del calibration["attention_mask"]  # behind a causal mask EOS sees no padding, and it runs a little faster
    build_all(
        output,
        sys.argv[4],
        {
            "ov-fp32": partial(convert, checkpoint, calibration),
            "ov-auto": partial(same_files, fp32),
            "nncf-int8": partial(quantize, fp32, calibration),
        },
    )


def convert(checkpoint: Path, calibration: Arrays, folder: Path) -> dict[str, Any]:
    """Weights stay float32 in the file (save_model halves them by default), and the plugin computes in float32."""
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    for tower, inputs in example_inputs(calibration).items():
        wrapped = Tower(model, "get_image_features" if tower == "vision" else "get_text_features", tuple(inputs))
        converted = ov.convert_model(
            wrapped,
            example_input=tuple(torch.from_numpy(value) for value in inputs.values()),
            input=[ov.PartialShape(dynamic(value)) for value in inputs.values()],
        )
        for port, name in zip(converted.inputs, inputs, strict=True):
            port.get_tensor().set_names({name})
        ov.save_model(converted, folder / f"{tower}.xml", compress_to_fp16=False)
    return {
        "runtime": "openvino",
        "precision": "fp32",
        "files": FILES,
        "options": {"INFERENCE_PRECISION_HINT": "f32"},
        "build": {"convert": "float32"},
    }


def dynamic(value: np.ndarray) -> list[int]:
    """The batch may vary, and a text's length; an image's size may not: as in the other contestants."""
    return [-1, *value.shape[1:]] if value.ndim == 4 else [-1, -1]


def example_inputs(calibration: Arrays) -> dict[str, dict[str, np.ndarray]]:
    names: tuple[str, ...] = ("input_ids", "attention_mask")
    texts = {name: calibration[name][:2] for name in names if name in calibration}
    return {"vision": {"pixel_values": calibration["pixel_values"][:2]}, "text": texts}


def same_files(fp32: Path, folder: Path) -> dict[str, Any]:
    """The same files at the plugin's own choice of precision: bfloat16 where the CPU multiplies it natively.

    https://docs.openvino.ai/2025/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html
    """
    for name in FILES:
        (folder / name).hardlink_to(fp32 / name)
    chosen = ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    return {"runtime": "openvino", "precision": PRECISIONS[chosen], "files": FILES, "build": {"convert": "float32"}}


def quantize(fp32: Path, calibration: Arrays, folder: Path) -> dict[str, Any]:
    """Post-training INT8 of weights and activations, by NNCF's settings for transformers."""
    count = len(calibration["pixel_values"])
    for tower, names in example_inputs(calibration).items():
        samples = [{name: calibration[name][row : row + 1] for name in names} for row in range(count)]
        model = ov.Core().read_model(fp32 / f"{tower}.xml")
        quantized = nncf.quantize(
            model, nncf.Dataset(samples), subset_size=count, model_type=nncf.ModelType.TRANSFORMER
        )
        ov.save_model(quantized, folder / f"{tower}.xml")
    made = {"quantization": "nncf.quantize, model_type=TRANSFORMER"}
    return {"runtime": "openvino", "precision": "int8", "files": FILES, "build": made}


if __name__ == "__main__":
    main()
