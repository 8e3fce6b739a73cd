"""What Olive makes of a checkpoint: python -m benchmarks.peers.build_olive CHECKPOINT OUTPUT CALIBRATION KEY

Each tower as a PyTorch model with a loader, as in its CLIP example, and the passes that its `auto-opt` runs on a CPU,
without OnnxPeepholeOptimizer: its rewrites hide the text tower's attentions from the fusion that follows.
https://github.com/microsoft/Olive/blob/main/examples/clip/qdq/clip_script.py
https://github.com/microsoft/Olive/blob/main/olive/cli/auto_opt.py (TEMPLATE)
"""

import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from olive import run
from transformers import AutoConfig

from benchmarks.peers.clip_towers import load_tower
from benchmarks.peers.contestant import build_all, need_clip

FILES = ["vision.onnx", "text.onnx"]
OPSET = 17  # of Olive's CLIP example for the CPU

PASSES = {
    "conversion": {
        "type": "OnnxConversion",
        "torch_dtype": "float32",
        "use_dynamo_exporter": False,
        "target_opset": OPSET,
    },
    # At its default level, as in `olive optimize`; model type, heads and width are added for each tower. Type "clip"
    # fuses the vision tower's attentions, "vit" none.
    "transformers": {"type": "OrtTransformersOptimization"},
}
INT8 = {"quantization": {"type": "OnnxDynamicQuantization", "precision": "int8"}}


def main() -> None:
    checkpoint, output = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    need_clip(checkpoint, "Olive")
    passes = {"olive-fp32": PASSES, "olive-int8": PASSES | INT8}
    build_all(output, sys.argv[4], {name: partial(optimize, checkpoint, chosen) for name, chosen in passes.items()})


def optimize(checkpoint: Path, passes: dict[str, Any], folder: Path) -> dict[str, Any]:
    for tower in ("vision", "text"):
        with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:  # Olive keeps every step
            found = run(workflow(checkpoint, tower, passes, Path(scratch)))
            Path(found.get_best_candidate().model_path).replace(folder / f"{tower}.onnx")
    precision = "int8" if "quantization" in passes else "fp32"
    made = {"passes": [step["type"] for step in passes.values()]}
    return {"runtime": "ort", "precision": precision, "files": FILES, "build": made}


def workflow(checkpoint: Path, tower: str, passes: dict[str, Any], output: Path) -> dict[str, Any]:
    config = getattr(AutoConfig.from_pretrained(checkpoint), f"{tower}_config")
    sizes = {"model_type": "clip", "num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
    return {
        "input_model": {
            "type": "PyTorchModel",
            "model_path": str(checkpoint),
            "model_loader": f"load_{tower}",
            "model_script": str(Path(__file__).resolve()),
            "io_config": io_config(tower, getattr(config, "image_size", 0)),
        },
        "systems": {
            "local_system": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "passes": {**passes, "transformers": {**passes["transformers"], **sizes}},
        "host": "local_system",
        "target": "local_system",
        "no_artifacts": True,
        "output_dir": str(output),
        "cache_dir": str(output / "cache"),
    }


def io_config(tower: str, image_size: int) -> dict[str, Any]:
    """Without attention_mask: behind a causal mask the first EOS token sees no padding, and the graph is smaller."""
    if tower == "vision":
        return {
            "input_names": ["pixel_values"],
            "input_shapes": [[2, 3, image_size, image_size]],
            "input_types": ["float32"],
            "output_names": ["image_embeds"],
            "dynamic_axes": {"pixel_values": {"0": "batch"}, "image_embeds": {"0": "batch"}},
        }
    return {
        "input_names": ["input_ids"],
        "input_shapes": [[2, 16]],
        "input_types": ["int64"],
        "output_names": ["text_embeds"],
        "dynamic_axes": {"input_ids": {"0": "batch", "1": "sequence"}, "text_embeds": {"0": "batch"}},
    }


def load_vision(checkpoint: str) -> torch.nn.Module:
    """Olive calls it by name; its own commands, too, load models with eager attention."""
    return load_tower(Path(checkpoint), "vision")


def load_text(checkpoint: str) -> torch.nn.Module:
    return load_tower(Path(checkpoint), "text")


if __name__ == "__main__":
    main()
