"""CLIP's towers with their projection, as transformers has classes for them. Needs torch and transformers only."""

from pathlib import Path

import torch
from transformers import AutoConfig, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

CLASSES = {"vision": CLIPVisionModelWithProjection, "text": CLIPTextModelWithProjection}


def load_tower(checkpoint: Path, tower: str) -> torch.nn.Module:
    """One tower ("vision", "text") in float32, in evaluation mode, with eager attention.

    ONNX Runtime's optimizer finds the eager attention's pattern in an exported graph, and not that of the default one.
    A tower's part of config.json may name another projection_dim than the whole model has, by default 512.
    """
    whole = AutoConfig.from_pretrained(checkpoint)
    config = getattr(whole, f"{tower}_config")
    config.projection_dim = whole.projection_dim
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    return CLASSES[tower].from_pretrained(checkpoint, config=config, **settings).eval()
