"""Checkpoints of open_clip, read with its own library: what runs, tokenises and preprocesses here is its own code.

A folder holds open_clip_config.json, open_clip_model.safetensors and, where its tokenizer is one of transformers, the
tokenizer's files. Both towers are built as open_clip's CustomTextCLIP, whose parts are two modules; CoCa's decoder is
left out.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from clip_deploy.checkpoint.layout import OPEN_CLIP, OPEN_CLIP_WEIGHTS, TEXT_CONFIG, weight_names
from clip_deploy.checkpoint.open_clip_files import find_text_config, read_settings, require_library
from clip_deploy.core.errors import CheckpointError, one_line
from clip_deploy.core.model import Model, TowerShape
from clip_deploy.core.preprocessing import Preprocessing

KIND = "open_clip"  # in the place of transformers' model_type
DECODER = "text_decoder."  # CoCa's, which writes captions
FILTERS = {"bilinear": 2, "bicubic": 3, "random": 3}  # Pillow's numbers; "random" is bicubic outside training


@dataclass
class Features:
    """What transformers' models answer with."""

    pooler_output: torch.Tensor


class OpenClipModel(nn.Module):  # type: ignore[misc]
    """Both towers of an open_clip model, with the methods that transformers' dual encoders have."""

    def __init__(self, settings: dict[str, Any], text_config: Path | None = None) -> None:
        """Build it, with random weights.

        Args:
            settings: what open_clip_config.json holds.
            text_config: the configuration of a text tower of transformers, where it is one.
        """
        from open_clip import CustomTextCLIP

        super().__init__()
        self.settings = settings
        self.text_config = text_config.read_text(encoding="utf-8") if text_config else None
        model = _of_two_towers(settings["model_cfg"])
        if text_config:
            model["text_cfg"] |= {"hf_model_name": str(text_config), "hf_model_pretrained": False}
        built = CustomTextCLIP(**model)
        self.visual, self.text = built.visual, built.text
        self.logit_scale, self.logit_bias = built.logit_scale, built.logit_bias
        self.config = SimpleNamespace(model_type=KIND)
        if hasattr(self.text, "token_embedding"):  # open_clip asks a Linear layer, which has none when it is quantised
            self.text.transformer.get_cast_dtype = partial(_type_of, self.text.token_embedding)

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def get_image_features(self, pixel_values: torch.Tensor) -> Features:
        return Features(self.visual(pixel_values))

    def get_text_features(self, input_ids: torch.Tensor) -> Features:
        return Features(self.text(input_ids))

    def save_pretrained(self, folder: Path) -> None:
        """Write it in open_clip's own layout, which open_clip opens too."""
        from safetensors.torch import save_file

        settings = {**self.settings, "model_cfg": {**_of_two_towers(self.settings["model_cfg"]), "custom_text": True}}
        (folder / OPEN_CLIP).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if self.text_config:
            (folder / TEXT_CONFIG).write_text(self.text_config, encoding="utf-8")
        weights = {name: weight.contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, folder / OPEN_CLIP_WEIGHTS[0], {"format": "pt"})


def _type_of(embedding: nn.Embedding) -> torch.dtype:
    return embedding.weight.dtype


def _of_two_towers(model: dict[str, Any]) -> dict[str, Any]:
    """model_cfg without CoCa's decoder, and without what has open_clip fetch weights or give tokens besides."""
    made = {name: value for name, value in deepcopy(model).items() if name not in ("custom_text", "multimodal_cfg")}
    for tower in ("vision_cfg", "text_cfg"):
        made[tower]["output_tokens"] = False
    made["vision_cfg"].pop("timm_model_pretrained", None)
    return made


def load(folder: Path) -> tuple[OpenClipModel, dict[str, Any]]:
    """The model in float32 and, as transformers records them: missing_keys, unexpected_keys, mismatched_keys."""
    require_library()
    from open_clip.factory import load_checkpoint

    settings = read_settings(folder)
    try:
        model = OpenClipModel(settings, find_text_config(folder)).float()
        found = load_checkpoint(model, str(folder / weight_names(folder)[0]), strict=False)
    except CheckpointError:
        raise
    except Exception as error:  # whatever open_clip and timm meet in its files
        raise CheckpointError(f"{folder} cannot be loaded by open_clip: {one_line(error)}") from error
    unexpected = [name for name in found.unexpected_keys if not name.startswith(DECODER)]
    return model.eval(), {
        "missing_keys": set(found.missing_keys),
        "unexpected_keys": set(unexpected),
        "mismatched_keys": set(),
    }


class OpenClipTokenizer:
    """open_clip's own tokenizer, called as those of transformers are: texts are padded to the context.

    Attributes:
        own: open_clip's SimpleTokenizer or HFTokenizer.
        cleaning: what is done to a text first: "lower", "whitespace" or "canonicalize".
    """

    padding_side = "right"

    def __init__(self, own: Any, cleaning: str) -> None:
        self.own, self.cleaning = own, cleaning
        self.inner = getattr(own, "tokenizer", None)  # of transformers, where there is one
        self.model_max_length = int(own.context_length)

    @property
    def pad_token_id(self) -> int:
        return 0 if self.inner is None else int(self.inner.pad_token_id or 0)

    @property
    def all_special_tokens(self) -> list[str]:
        if self.inner is not None:
            return list(self.inner.all_special_tokens)
        return [self.own.decoder[token] for token in self.own.all_special_ids]

    def get_vocab(self) -> dict[str, int]:
        return dict(self.own.encoder if self.inner is None else self.inner.get_vocab())

    def __call__(
        self, texts: str | list[str], max_length: int | None = None, return_tensors: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """input_ids and attention_mask, [texts, context]; open_clip's models take no mask."""
        rows = [texts] if isinstance(texts, str) else list(texts)
        ids = self.own(rows, context_length=max_length).numpy().astype(np.int64)
        filled = ids != self.pad_token_id  # padding is what no other token follows: "!" has CLIP's padding's number
        mask = (np.cumsum(filled[:, ::-1], axis=1)[:, ::-1] > 0).astype(np.int64)
        found = {"input_ids": ids, "attention_mask": mask}
        return found if return_tensors else {name: value.tolist() for name, value in found.items()}


class OpenClipImages:
    """open_clip's own preprocessing of images, called as transformers' image processors are.

    Attributes:
        preprocessing: the same for Pillow and numpy alone; None where they cannot do it.
    """

    def __init__(self, settings: dict[str, Any], size: tuple[int, int]) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        merged = merge_preprocess_dict(PreprocessCfg(), settings.get("preprocess_cfg") or {})
        self.cfg = PreprocessCfg(**{**merged, "size": size})
        self.own = image_transform_v2(self.cfg, is_train=False)
        self.preprocessing = _preprocessing(self.cfg)

    def __call__(self, images: Any, **_: Any) -> dict[str, np.ndarray]:
        """pixel_values, float32 [images, 3, height, width], of one RGB picture or several."""
        several = images if isinstance(images, Sequence) else [images]
        pictures = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in several]
        return {"pixel_values": np.stack([self.own(picture).numpy() for picture in pictures])}


def _preprocessing(cfg: Any) -> Preprocessing | None:
    height, width = cfg.size
    sizes = {"squash": {"height": height, "width": width}}
    if height == width:
        sizes |= {"shortest": {"shortest_edge": height}, "longest": {"longest_edge": height}}
    if cfg.resize_mode not in sizes:
        return None
    padded = cfg.resize_mode == "longest"
    return Preprocessing(
        size=sizes[cfg.resize_mode],
        crop=None if cfg.resize_mode == "squash" else [height, width],
        resample=FILTERS[cfg.interpolation],
        rescale_factor=1 / 255,
        image_mean=_by_channel(cfg.mean),
        image_std=_by_channel(cfg.std),
        crop_rounding="even",
        fill=int(cfg.fill_color) if padded else 0,
    )


def _by_channel(values: Any) -> list[float]:
    return [float(value) for value in (values if isinstance(values, Sequence) else [values] * 3)]


@dataclass
class OpenClipProcessor:
    """What transformers calls a processor: tokenizer and image processor of an open_clip checkpoint."""

    tokenizer: OpenClipTokenizer
    image_processor: OpenClipImages


def load_processor(folder: Path) -> OpenClipProcessor:
    """The checkpoint's own tokenizer and preprocessing."""
    require_library()
    import open_clip

    settings = read_settings(folder)
    text = settings["model_cfg"]["text_cfg"]
    kind = "whitespace" if text.get("hf_tokenizer_name") else "lower"  # open_clip's own defaults
    try:
        own = open_clip.get_tokenizer(f"local-dir:{folder}")
        tokenizer = OpenClipTokenizer(own, (text.get("tokenizer_kwargs") or {}).get("clean", kind))
        images = OpenClipImages(settings, _image_size(settings))
    except Exception as error:  # whatever open_clip and transformers meet in its files
        raise CheckpointError(f"{folder}: its tokenizer or preprocessing does not load: {one_line(error)}") from error
    return OpenClipProcessor(tokenizer, images)


def _image_size(settings: dict[str, Any]) -> tuple[int, int]:
    """Height and width that the vision tower is built for: open_clip takes them and not those of preprocess_cfg."""
    given = settings["model_cfg"]["vision_cfg"].get("image_size", 224)
    height, width = given if isinstance(given, Sequence) else (given, given)
    return int(height), int(width)


def describe(folder: Path, example_texts: list[str]) -> Model:
    """What later stages need to know of the model, so that they can do without open_clip."""
    processor = load_processor(folder)
    try:
        with torch.device("meta"):
            model = OpenClipModel(read_settings(folder), find_text_config(folder))
        tokens = processor.tokenizer(example_texts)
    except Exception as error:  # whatever open_clip and timm meet in open_clip_config.json
        raise CheckpointError(
            f"{folder}: open_clip cannot build the model of {OPEN_CLIP}: {one_line(error)}"
        ) from error
    context = processor.tokenizer.model_max_length
    return Model(
        model_type=KIND,
        image_size=list(_image_size(model.settings)),
        context_length=context,
        positions=context if model.text_config else int(model.text.context_length),
        pad_to_context=True,
        text_inputs=["input_ids"],
        example_texts={"input_ids": tokens["input_ids"]},
        towers={"vision": _shape(model.visual), "text": _shape(model.text)},
    )


def _shape(tower: nn.Module) -> TowerShape:
    """Layers, heads and width; 0 where a tower has none (ConvNeXt), or others in each stage."""
    if (config := getattr(tower, "config", None)) is not None:  # of transformers
        return TowerShape(int(config.num_hidden_layers), int(config.num_attention_heads), int(config.hidden_size))
    layers = [part.attn for part in tower.modules() if hasattr(part, "attn") and hasattr(part.attn, "num_heads")]
    shapes = {(int(layer.num_heads), _width(layer)) for layer in layers}
    if len(shapes) != 1:
        pools = [part for part in tower.modules() if type(part).__name__ == "AttentionPool2d"]  # a ResNet's
        return TowerShape(0, pools[0].num_heads, 0) if len(pools) == 1 else TowerShape(0, 0, 0)
    return TowerShape(len(layers), *shapes.pop())


def _width(attention: nn.Module) -> int:
    if hasattr(attention, "embed_dim"):
        return int(attention.embed_dim)
    projection = getattr(attention, "qkv", None) or getattr(attention, "q_proj", None)
    return int(getattr(projection, "in_features", 0))
