"""Checkpoints: fetch one, refuse what cannot be deployed, load it. The one module that decides what a checkpoint is."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from clip_deploy.checkpoint.layout import SETTINGS, is_open_clip, matching, own_code, read_object
from clip_deploy.checkpoint.verify import stated_settings
from clip_deploy.core.errors import CheckpointError, one_line
from clip_deploy.core.model import Model, TowerShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin


EXAMPLE_TEXTS = ["a photo of a cat", "two dogs that run along the beach in the evening light", "red"]


def load_model(folder: Path) -> "PreTrainedModel":
    """The whole dual encoder in float32, in evaluation mode."""
    model, loading = _load(folder)
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks the weight {missing[0]} ({len(missing)} missing): it is not a whole {type(model).__name__}"
        )
    if broken := next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None):
        raise CheckpointError(
            f"{folder}: the weight {broken} holds NaN or infinity: its training diverged, or the file is damaged; take "
            "an earlier checkpoint, or download it again"
        )
    return model.eval()


def load_with_report(folder: Path) -> tuple["PreTrainedModel", dict[str, Any]]:
    """The model however it loads, and transformers' record: missing_keys, unexpected_keys, mismatched_keys."""
    return _load(folder, ignore_mismatched_sizes=True)


def _load(folder: Path, **options: Any) -> tuple["PreTrainedModel", dict[str, Any]]:
    if is_open_clip(folder):
        from clip_deploy.checkpoint import open_clip

        return open_clip.load(folder)
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        found: tuple[PreTrainedModel, dict[str, Any]] = AutoModel.from_pretrained(
            folder,
            config=load_config(folder),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        return found
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers and torch meet in its files
        raise CheckpointError(f"{folder} cannot be loaded: {one_line(error)}") from error


def load_config(folder: Path) -> "PreTrainedConfig":
    """The checkpoint's configuration, without what says how to run it and not what it computes.

    A checkpoint may ask for tuples in the place of outputs by name, or for kernels that are not installed here.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers meets in config.json
        code = ", ".join(own_code(folder))
        way = f"; {code} names code of its own (auto_map), which is never run here" if code else ""
        raise CheckpointError(
            f"{folder}: its config.json is not one that transformers knows: {one_line(error)}{way}"
        ) from error
    if config.model_type == "flava":  # its word for it is another
        config.vision_config = config.image_config
    config.return_dict = True
    config._attn_implementation = None  # transformers then takes PyTorch's own
    return config


def load_processor(folder: Path) -> "ProcessorMixin":
    """The checkpoint's own tokenizer and image processor (the PIL one: it runs everywhere)."""
    if is_open_clip(folder):
        from clip_deploy.checkpoint import open_clip

        return open_clip.load_processor(folder)
    from transformers import AutoImageProcessor, AutoProcessor

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        if _asks_for(folder, "Tipsv2ImageProcessor"):
            processor = _tipsv2_processor(folder)
        else:
            processor = AutoProcessor.from_pretrained(folder, **local)
            processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **local)
        if not hasattr(processor, "tokenizer"):
            raise CheckpointError(f"{folder} has no tokenizer: save it there with `tokenizer.save_pretrained(folder)`")
        _verify_words(folder, processor.tokenizer)
        _lower_as_stated(folder, processor.tokenizer)
        _verify_filter(folder, processor.image_processor)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers and tokenizers meet in its files
        _verify_files(folder)
        raise CheckpointError(f"{folder}: its processor cannot be loaded: {one_line(error)}") from error
    return processor


def _verify_files(folder: Path) -> None:
    """Raise CheckpointError where one of the processor's files is none of its kind: transformers does not say which."""
    from tokenizers import Tokenizer

    for name in matching(folder, SETTINGS):
        path = folder / name
        content = read_object(path) if path.suffix == ".json" else {}
        if name != "tokenizer.json":
            continue
        try:
            if lacking := sorted({"added_tokens", "model"} - set(content)):
                raise ValueError(f"it has no {' and no '.join(lacking)}")
            Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise CheckpointError(
                f"{path} holds no tokenizer ({one_line(error)}): copy it from the model that this one was fine-tuned "
                "from, or write it with `tokenizer.save_pretrained(folder)`"
            ) from error


def _asks_for(folder: Path, image_processor: str) -> bool:
    from transformers.image_processing_base import ImageProcessingMixin

    settings, _ = ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)
    return bool(settings.get("image_processor_type") == image_processor)


def _tipsv2_processor(folder: Path) -> "ProcessorMixin":
    """TIPSv2's by Pillow: transformers has its image processor for torchvision alone."""
    from transformers import AutoTokenizer, Tipsv2Processor, ViTImageProcessorPil

    class Tipsv2ImageProcessorPil(ViTImageProcessorPil):  # type: ignore[misc]
        size: ClassVar = {"height": 448, "width": 448}
        do_normalize = False

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Tipsv2Processor(Tipsv2ImageProcessorPil.from_pretrained(folder, local_files_only=True), tokenizer)


def _verify_words(folder: Path, tokenizer: Any) -> None:
    """Raise CheckpointError where there are none: transformers then makes a vocabulary of special tokens, silently."""
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()):
        raise CheckpointError(
            f"{folder}: the vocabulary of its {type(tokenizer).__name__} is empty, so all texts look the same: copy it "
            "from the model that this one was fine-tuned from"
        )


CAPITALS = "A Photo of a RED Circle"


def _lower_as_stated(folder: Path, tokenizer: Any) -> None:
    """Put lower-casing in front where it is stated and not done, as SigLIP 2 was trained with GemmaTokenizer.

    Siglip2Tokenizer does the same: https://github.com/huggingface/transformers/issues/43054
    """
    from tokenizers import normalizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or stated_settings(folder).get("do_lower_case") is not True:
        return
    if tokenizer(CAPITALS)["input_ids"] != tokenizer(CAPITALS.lower())["input_ids"]:
        given = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *given])


def _verify_filter(folder: Path, processor: Any) -> None:
    """Raise CheckpointError where `resample` is no number of Pillow's: transformers silently takes bilinear then."""
    from PIL import Image

    given = getattr(processor, "resample", None)
    if given is not None and (type(given) is bool or not isinstance(given, int) or given not in set(Image.Resampling)):
        numbers = ", ".join(f"{kind.value} {kind.name.lower()}" for kind in Image.Resampling)
        raise CheckpointError(
            f"{folder}: its image processor's resample is {given!r:.60}: accepted are Pillow's numbers, {numbers}"
        )


def describe(folder: Path) -> Model:
    """What later stages need to know of the model, so that they can do without transformers.

    Raises CheckpointError where its files do not say so, or contradict each other.
    """
    if is_open_clip(folder):
        from clip_deploy.checkpoint import open_clip

        return open_clip.describe(folder, EXAMPLE_TEXTS)
    try:
        return _describe(folder)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers meets when it uses them
        raise CheckpointError(
            f"{folder}: its configuration, tokenizer and image processor do not work together: {one_line(error)}"
        ) from error


def _describe(folder: Path) -> Model:
    config = load_config(folder)
    skeleton = _skeleton(folder, config)
    processor = load_processor(folder)
    kind = config.model_type
    siglip = kind.startswith("siglip")
    positions = _positions(skeleton, config.text_config)
    lengths = (processor.tokenizer.model_max_length, trained_context(kind, processor.tokenizer))
    context = int(min(positions, *lengths))
    text_inputs = ["input_ids"] if siglip else ["input_ids", "attention_mask"]
    image_size, patches = _image_shape(folder, processor.image_processor)
    tokens = processor.tokenizer(
        EXAMPLE_TEXTS,
        padding="max_length" if siglip else "longest",
        truncation=True,
        max_length=context,
        return_attention_mask=True,  # also where its model_input_names leave it out
    )
    return Model(
        model_type=kind,
        image_size=image_size,
        patches=patches,
        context_length=context,
        positions=positions,
        # SigLIP was trained on texts padded to the context, without a mask, as transformers' processor gives them.
        pad_to_context=siglip,
        text_inputs=text_inputs,
        example_texts={name: tokens[name] for name in text_inputs},
        towers={"vision": _tower(config.vision_config), "text": _tower(config.text_config)},
    )


FEATURES = ("get_image_features", "get_text_features")


def _skeleton(folder: Path, config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model without weights; CheckpointError where it embeds no images or no texts."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    name = type(model).__name__
    if hasattr(model, "get_video_features"):
        raise CheckpointError(f"{folder} is a {name}, which embeds videos: only towers for images can be deployed")
    if lacking := [method for method in FEATURES if not hasattr(model, method)]:
        raise CheckpointError(
            f"{folder} is a {name}, which has no {' and no '.join(lacking)}: only models that embed images and texts "
            "apart can be deployed (CLIP, SigLIP...)"
        )
    if hasattr(model, "language_model"):
        raise CheckpointError(
            f"{folder} is a {name}, whose texts go through a language model. That gives a vector for each token and no "
            "embedding: only models with a text tower can be deployed (CLIP, SigLIP...)"
        )
    return model


def _positions(skeleton: "PreTrainedModel", text: Any) -> int:
    """Tokens that the text tower has positions for. RoBERTa and its like count them from behind the padding's."""
    known = int(text.max_position_embeddings)
    tables = [table for name, table in skeleton.named_modules() if name.endswith("position_embeddings")]
    taken = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return known - max(taken) - 1 if taken else known


def _image_shape(folder: Path, processor: Any) -> tuple[list[int], list[int]]:
    """The model's image_size and patches, of which one is empty, as the image processor makes a square image."""
    from PIL import Image

    made = processor(Image.new("RGB", (64, 64)), return_tensors="np")
    shape = list(made["pixel_values"].shape)
    if "spatial_shapes" in made:
        return [], shape[1:]
    if len(shape) != 4:
        raise CheckpointError(
            f"{folder}: its image processor makes pixel_values of shape {shape}: four axes are needed"
        )
    return shape[-2:], []


# Tokens: https://github.com/OFA-Sys/Chinese-CLIP/blob/master/cn_clip/clip/utils.py (tokenize)
TRAINED_CONTEXT = {"chinese_clip": 52}


def trained_context(kind: str, tokenizer: Any) -> float:
    """The longest text in tokens that a family was trained on, where its tokenizer states none; infinity otherwise."""
    stated = tokenizer.model_max_length < 1e9
    return math.inf if stated else TRAINED_CONTEXT.get(kind, math.inf)


def _tower(config: Any) -> TowerShape:
    """Layers, heads and width; 0 where a tower has none (ALIGN's EfficientNet), or others in each stage (Swin)."""
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    found = [getattr(config, name, 0) for name in names]
    return TowerShape(*(0 if isinstance(value, list | tuple) else int(value or 0) for value in found))
