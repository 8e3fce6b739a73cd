"""A single file of weights, written as a folder in open_clip's layout: OpenAI's, or what open_clip's training saved."""

import json
import re
from collections.abc import Iterable
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from clip_deploy.checkpoint.layout import OPEN_CLIP, OPEN_CLIP_WEIGHTS
from clip_deploy.checkpoint.open_clip_files import require_library
from clip_deploy.checkpoint.torchscript import is_torchscript, read_torchscript
from clip_deploy.core.errors import CheckpointError, one_line

OPENAI = "openai"  # in the place of an architecture's name: OpenAI's layout with QuickGELU, whose weights tell the rest
STATES = ("state_dict", "model_state_dict")  # where training checkpoints hold the weights
PREFIX = "module."  # of DistributedDataParallel
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # what OpenAI's modules hold besides
HEAD_WIDTH = 64  # in every model of OpenAI
STRIDE = 32  # pixels to a position of a ResNet's last layer

ACCEPTED = (
    f"accepted are OpenAI's archives, a state_dict in their layout with `open_clip: {OPENAI}`, and a state_dict or "
    "checkpoint of open_clip's training with the architecture's name there"
)

State = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


def convert(path: Path, architecture: str | None, output: Path) -> str:
    """Write the weights of a file into `output` in open_clip's layout, and say what they were taken for.

    Args:
        architecture: its name in open_clip, "ViT-B-32" say, or OPENAI; None is enough for a TorchScript archive.

    Raises CheckpointError where the file holds more than tensors, is none, open_clip knows no such architecture, or
    nothing tells the architecture.
    """
    require_library()
    from safetensors.torch import save_file

    named = None if architecture in (None, OPENAI) else _named(str(architecture))
    if is_torchscript(path):
        settings, state, note = _from_archive(path, architecture, named)
    else:
        settings, state, note = _from_state(path, architecture, named)
    (output / OPEN_CLIP).write_text(json.dumps(settings, indent=2) + "\n")
    weights = {name: weight.contiguous() for name, weight in state.items()}
    save_file(weights, output / OPEN_CLIP_WEIGHTS[0], {"format": "pt"})
    return f"made from {path.name}, {note}"


def _named(architecture: str) -> dict[str, Any]:
    """open_clip's settings of an architecture."""
    import open_clip

    found: dict[str, Any] | None = open_clip.get_model_config(architecture) if ":" not in architecture else None
    if found is None:
        raise CheckpointError(
            f"model.open_clip is {architecture!r:.60}: open_clip has no architecture of that name; "
            "`open_clip.list_models()` lists them"
        )
    return found


def _from_archive(
    path: Path, architecture: str | None, named: dict[str, Any] | None
) -> tuple[dict[str, Any], State, str]:
    """Settings and weights of a TorchScript archive; its code, which is not run, tells the activation."""
    state, calls_gelu = read_torchscript(path)
    settings, weights = _as_openai(path, state, quick_gelu=not calls_gelu)
    told = settings["model_cfg"]
    if named and {**named, "quick_gelu": told["quick_gelu"]} != told:
        raise CheckpointError(
            f"model.open_clip is {architecture!r:.60}, and {path} holds another architecture (a width of "
            f"{told['vision_cfg']['width']} and {told['text_cfg']['width']}, layers {told['vision_cfg']['layers']} and "
            f"{told['text_cfg']['layers']}): set `open_clip: {OPENAI}`, which takes the architecture from the archive"
        )
    activation = "GELU" if calls_gelu else "QuickGELU"
    return settings, weights, f"a TorchScript archive: {activation}, as its code says; weights in FP32"


def _from_state(
    path: Path, architecture: str | None, named: dict[str, Any] | None
) -> tuple[dict[str, Any], State, str]:
    """The same of what torch.save wrote."""
    state = _state(path)
    if architecture is None:
        raise CheckpointError(
            f"{path} holds a state_dict, and weights do not show whether the model uses QuickGELU or GELU. In the "
            f"model's file in conf/model/, set `open_clip: {OPENAI}` if they were trained from OpenAI's weights "
            "(QuickGELU), or set `open_clip:` to the architecture's name in open_clip. For a transformers model, give "
            "its folder"
        )
    if named:
        return {"model_cfg": named, "preprocess_cfg": {}}, state, f"read as {architecture}"
    return *_as_openai(path, state, quick_gelu=True), "read as OpenAI's: QuickGELU; weights in FP32"


def _state(path: Path) -> State:
    """The weights in a training checkpoint or a state_dict, without the prefix of data parallel training."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch.load meets
        raise CheckpointError(_unread(path, error)) from error
    state = content if isinstance(content, dict) else {}
    state = next((state[name] for name in STATES if name in state), state)
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state_dict: {ACCEPTED}")
    return {str(name).removeprefix(PREFIX): weight.clone() for name, weight in state.items()}


def _unread(path: Path, error: Exception) -> str:
    """Why torch.load gives no weights, and the way out."""
    if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"{path} cannot be read without running code from it (its pickle names {named[1]:.80}): if you trust it, "
            "load it with `torch.load(path, weights_only=False)` and save its weights alone, "
            "`torch.save(model.state_dict(), path)` of a model, `torch.save({'state_dict': checkpoint['state_dict']}, "
            "path)` of a training checkpoint"
        )
    return f"{path} is damaged, or torch.save did not write it ({one_line(error)}): {ACCEPTED}"


def _as_openai(path: Path, state: State, quick_gelu: bool) -> tuple[dict[str, Any], State]:
    """The settings that weights in OpenAI's layout tell, and the weights in float32, as open_clip runs them on a CPU.

    Raises CheckpointError where the weights are not all of that architecture's and no others.
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    weights = {
        name: weight.float() if weight.is_floating_point() else weight
        for name, weight in state.items()
        if name.split(".")[-1] not in NO_WEIGHTS
    }
    told = _told(path, {name: tuple(weight.shape) for name, weight in weights.items()}, quick_gelu)
    pixels = {
        "mean": list(OPENAI_DATASET_MEAN),
        "std": list(OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return {"model_cfg": told, "preprocess_cfg": pixels}, weights


def _told(path: Path, shapes: Shapes, quick_gelu: bool) -> dict[str, Any]:
    """The architecture, held against what open_clip makes of it; CheckpointError where a weight has no place in it."""
    from open_clip import CLIP

    try:
        told = architecture_of(shapes, quick_gelu)
        with torch.device("meta"):
            expected = {name: tuple(weight.shape) for name, weight in CLIP(**told).state_dict().items()}
    except Exception as error:  # a weight that is missing, or whatever open_clip meets
        what = f"it has no weight {error}" if isinstance(error, KeyError) else one_line(error)
        raise CheckpointError(f"{path} holds no CLIP of OpenAI's ({what}): {ACCEPTED}") from error
    if wrong := [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]:
        given, wanted = (found.get(wrong[0], "none") for found in (shapes, expected))
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{path} holds no CLIP of OpenAI's (of {wrong[0]!r:.80} it has {given}, and needs {wanted}{more}): "
            f"{ACCEPTED}"
        )
    return told


def architecture_of(shapes: Shapes, quick_gelu: bool) -> dict[str, Any]:
    """open_clip's model_cfg of weights in OpenAI's layout, by their shapes, as OpenAI's own build_model finds it.

    Raises KeyError where a weight is missing that it needs.
    """
    width = shapes["ln_final.weight"][0]
    text = {
        "context_length": shapes["positional_embedding"][0],
        "vocab_size": shapes["token_embedding.weight"][0],
        "width": width,
        "heads": width // HEAD_WIDTH,
        "layers": _count(shapes, "transformer.resblocks."),
    }
    vision = _vit(shapes) if "visual.proj" in shapes else _resnet(shapes)
    embeds = shapes["text_projection"][1]
    return {"embed_dim": embeds, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}


def _vit(shapes: Shapes) -> dict[str, Any]:
    width, *_, patch = shapes["visual.conv1.weight"]
    size = patch * isqrt(shapes["visual.positional_embedding"][0] - 1)
    layers = _count(shapes, "visual.transformer.resblocks.")
    return {"image_size": size, "layers": layers, "width": width, "patch_size": patch}


def _resnet(shapes: Shapes) -> dict[str, Any]:
    size = STRIDE * isqrt(shapes["visual.attnpool.positional_embedding"][0] - 1)
    layers = [_count(shapes, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
    return {
        "image_size": size,
        "layers": layers,
        "width": shapes["visual.layer1.0.conv1.weight"][0],
        "patch_size": None,
    }


def _count(names: Iterable[str], prefix: str) -> int:
    """How many layers have weights behind a prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)})
