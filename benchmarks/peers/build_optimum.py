"""What optimum-onnx makes of a checkpoint: python -m benchmarks.peers.build_optimum CHECKPOINT OUTPUT CALIBRATION KEY

Its exporter on a loaded model (what ORTModel.from_pretrained(export=True) calls; for a whole CLIP that gives one graph,
in which neither tower can be run alone), its optimisation levels and its dynamic INT8, as its guides show them:
https://huggingface.co/docs/optimum-onnx/onnx/usage_guides/export_a_model
https://huggingface.co/docs/optimum-onnx/onnxruntime/usage_guides/optimization
https://huggingface.co/docs/optimum-onnx/onnxruntime/usage_guides/quantization
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.onnx.model_configs import CLIPTextWithProjectionOnnxConfig, CLIPVisionModelOnnxConfig
from optimum.onnxruntime import ORTOptimizer, ORTQuantizer
from optimum.onnxruntime.configuration import AutoOptimizationConfig, AutoQuantizationConfig
from transformers import AutoConfig

from benchmarks.peers.clip_towers import load_tower
from benchmarks.peers.contestant import build_all, need_clip

FILES = ["vision.onnx", "text.onnx"]
LEVELS = {"o1": AutoOptimizationConfig.O1, "o2": AutoOptimizationConfig.O2, "o3": AutoOptimizationConfig.O3}
INSTRUCTIONS = {"avx2": AutoQuantizationConfig.avx2, "avx512-vnni": AutoQuantizationConfig.avx512_vnni}


class VisionConfig(CLIPVisionModelOnnxConfig):  # type: ignore[misc]
    """Optimum's own stops before the projection (huggingface/optimum#1884): custom_onnx_configs is its way out."""

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"image_embeds": {0: "batch_size"}}


class TextConfig(CLIPTextWithProjectionOnnxConfig):  # type: ignore[misc]
    """Takes no attention_mask: behind a causal mask the first EOS token sees no padding."""

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"text_embeds": {0: "batch_size"}}


TOWERS = {"vision": VisionConfig, "text": TextConfig}


def main() -> None:
    checkpoint, output = Path(sys.argv[1]), Path(sys.argv[2])
    need_clip(checkpoint, "Optimum")
    exported = output / "optimum-export"
    build_all(
        output,
        sys.argv[4],
        {
            "optimum-export": partial(export, checkpoint),
            **{f"optimum-{level}": partial(optimize, checkpoint, exported, level) for level in LEVELS},
            **{f"optimum-int8-{name}": partial(quantize, exported, name) for name in INSTRUCTIONS},
            **{f"optimum-o2-int8-{name}": partial(quantize, output / "optimum-o2", name) for name in INSTRUCTIONS},
        },
    )


def export(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Both towers, with eager attention: O2 fuses none of the default one's attentions, and all of these."""
    for tower, config in TOWERS.items():
        model = load_tower(checkpoint, tower)
        onnx_export_from_model(
            model,
            folder / tower,
            custom_onnx_configs={"model": config(model.config, task="feature-extraction")},
            task="feature-extraction",
            do_validation=False,  # every contestant is held against torch-fp32 when it is timed
        )
        (folder / tower / "model.onnx").replace(folder / f"{tower}.onnx")
    return {"runtime": "ort", "precision": "fp32", "files": FILES, "build": {"optimization": "none"}}


def optimize(checkpoint: Path, exported: Path, level: str, folder: Path) -> dict[str, Any]:
    """ORTOptimizer knows model type "clip", no tower of it, and takes heads and width from its text_config."""
    for tower in TOWERS:
        config = AutoConfig.from_pretrained(checkpoint)
        config.text_config = getattr(config, f"{tower}_config")
        optimizer = ORTOptimizer([exported / f"{tower}.onnx"], config)
        optimizer.optimize(LEVELS[level](), save_dir=folder, file_suffix=None)
    return {"runtime": "ort", "precision": "fp32", "files": FILES, "build": {"optimization": level}}


def quantize(source: Path, name: str, folder: Path) -> dict[str, Any]:
    """Dynamic INT8 of `source` by Optimum's settings for the instruction set, at their defaults."""
    settings = INSTRUCTIONS[name](is_static=False)
    for file in FILES:
        ORTQuantizer.from_pretrained(source, file_name=file).quantize(settings, save_dir=folder, file_suffix=None)
    made = {"source": source.name, "quantization": name}
    return {"runtime": "ort", "precision": "int8", "files": FILES, "build": made}


if __name__ == "__main__":
    main()
