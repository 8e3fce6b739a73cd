"""Checkpoints: fetch one, refuse what cannot be deployed, load it. The one module that decides what a checkpoint is."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from clip_deploy.core.artifact import Target, read_target
from clip_deploy.core.config import Device, ModelConfig, Precision, TorchConfig
from clip_deploy.core.environment import fingerprint, located
from clip_deploy.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

# Configuration, tokenizer and weights; never pickles, never code.
PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model")
EXAMPLE_TEXTS = ["a photo of a cat", "two dogs that run along the beach in the evening light", "red"]
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def fetch(model: ModelConfig, output: Path, device: Device = Device.cpu) -> Target:
    """Put the checkpoint's files into `output` and describe them; it is the reference, which runs on `device`.

    Raises CheckpointError where there is none, its weights are pickled or truncated, or it is no dual encoder.
    """
    if model.repo_id:
        _copy(_download(model.repo_id, str(model.revision)), output)
    elif model.architecture:
        _initialise(model, output)
    else:
        _copy(_local_folder(model), output)
    verify(output)
    weights = sorted(path.name for path in output.glob("*.safetensors"))
    origin = {"repo_id": model.repo_id, "revision": model.revision, "sha256": fingerprint(output)}
    description = {**describe(output), "trained": model.trained, "checkpoint": origin}
    return Target("eager", "fp32", ["config.json", *weights], description, device=device.value)


def export_torch(checkpoint: Path, settings: TorchConfig, device: Device, output: Path) -> Target:
    """Save the checkpoint in `settings.precision` as safetensors, its configuration and processor beside."""
    import torch

    halves = {Precision.fp16: torch.float16, Precision.bf16: torch.bfloat16}
    source = read_target(checkpoint)
    for path in checkpoint.glob("*"):
        if path.name not in source.files and any(path.match(pattern) for pattern in PATTERNS):
            shutil.copyfile(path, output / path.name)
    load_model(checkpoint).to(halves.get(settings.precision, torch.float32)).save_pretrained(output)
    weights = sorted(path.name for path in output.glob("*.safetensors"))
    note = (
        "torch.compile for each shape, CUDA graphs"
        if settings.compile
        else f"the checkpoint in {settings.precision.value}"
    )
    return Target(
        runtime="compiled" if settings.compile else "eager",
        precision=settings.precision.value,
        device=device.value,
        files=["config.json", *weights],
        model=source.model,
        build={"note": note},
    )


def _local_folder(model: ModelConfig) -> Path:
    folder = located(str(model.path))
    if not folder.is_dir():
        raise CheckpointError(f"model.path is {model.path}: no such folder; give one in Hugging Face layout")
    return folder


def _copy(source: Path, output: Path) -> None:
    verify(source)
    for path in sorted(source.iterdir()):
        if any(path.match(pattern) for pattern in PATTERNS):
            shutil.copyfile(path, output / path.name)


def _download(repo_id: str, revision: str) -> Path:
    """Fetch a repository through the Hugging Face cache; HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE hold as usual."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx

    what = f"{repo_id} at {revision}"
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(PATTERNS)))
    except GatedRepoError as error:
        raise CheckpointError(f"{repo_id} is gated: accept its terms on its page, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no model {repo_id} that you may read: check the id, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id} has no revision {revision}: give a commit of the repository") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"cannot reach the hub and {what} is not in the local cache: check the network or HF_ENDPOINT, unset "
            "HF_HUB_OFFLINE, or copy the folder here and use `model: local`"
        ) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the network
        raise CheckpointError(f"downloading {what} failed: {error}; run `dvc repro` again to go on") from error


def _initialise(model: ModelConfig, output: Path) -> None:
    """Write a checkpoint of the given architecture with seeded random weights."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoProcessor

    tokens = AutoProcessor.from_pretrained(_local_folder(model))
    architecture = dict(model.architecture or {})
    try:
        config = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"model.architecture is not a transformers configuration: {error}") from error
    torch.manual_seed(model.seed)
    AutoModel.from_config(config).save_pretrained(output)
    size = config.vision_config.image_size
    tokens.image_processor.size = {"shortest_edge": size}
    tokens.image_processor.crop_size = {"height": size, "width": size}
    tokens.tokenizer.model_max_length = config.text_config.max_position_embeddings
    tokens.tokenizer.save_pretrained(output)
    tokens.image_processor.save_pretrained(output)


def verify(folder: Path) -> None:
    """Raise CheckpointError where `folder` is not a dual encoder with whole safetensors weights."""
    config = read_config(folder)
    kind = config.get("model_type")
    if "vision_config" not in config or "text_config" not in config:
        raise CheckpointError(
            f"{folder} holds a {kind!r} model: only dual encoders (CLIP, SigLIP, Chinese-CLIP, ALIGN...) have an image "
            "tower and a text tower to deploy"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickled:
            raise CheckpointError(
                f"{folder} has only pickled weights ({pickled[0]}), which can run code when loaded: where you "
                "trust it, load it once and `model.save_pretrained(folder)`, or pin a revision with model.safetensors"
            )
        raise CheckpointError(f"{folder} has no weights: a file model.safetensors is needed")
    _verify_depth(folder, config, sum(_tensors(path) for path in weights))
    _verify_shards(folder, {path.name for path in weights})
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        if not (folder / name).is_file() and not (folder / "processor_config.json").is_file():
            raise CheckpointError(
                f"{folder} has no {name}: save the processor with `processor.save_pretrained(folder)`"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands; CheckpointError where there is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no config.json: give a folder in Hugging Face layout") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no configuration")
    return config


def _tensors(path: Path) -> int:
    """How many a file of weights holds; CheckpointError where it is not whole."""
    try:
        with safe_open(path, framework="numpy") as content:
            return len(content.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}): fetch it again") from error


def _verify_depth(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise CheckpointError where a tower has more layers than there are weights: to build them could take for ever."""
    for tower in ("vision_config", "text_config"):
        if not isinstance(config[tower], dict):
            raise CheckpointError(f"{folder}/config.json: {tower} is {config[tower]!r:.60}: it must hold settings")
        layers = config[tower].get("num_hidden_layers")
        if isinstance(layers, int | float) and layers > tensors:
            raise CheckpointError(
                f"{folder}/config.json: {tower}.num_hidden_layers is {layers}, and the weights are {tensors} tensors: "
                "these files do not belong together"
            )


def _verify_shards(folder: Path, present: set[str]) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            needed = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        except (ValueError, RecursionError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is no index of weights ({error}): fetch it again") from error
        if missing := sorted(needed - present):
            raise CheckpointError(f"{folder} lacks {missing[0]}, which {index.name} names: fetch it again")


def load_model(folder: Path) -> "PreTrainedModel":
    """The whole dual encoder in float32, in evaluation mode."""
    model, loading = _load(folder)
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks the weight {missing[0]} ({len(missing)} missing): it is not a whole {type(model).__name__}"
        )
    if broken := next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None):
        raise CheckpointError(
            f"{folder}: the weight {broken} holds NaN or infinity: its training diverged, or the file is damaged; "
            "take an earlier checkpoint, or fetch it again"
        )
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise CheckpointError(f"{folder} is a {type(model).__name__}: it has no get_image_features/get_text_features")
    return model.eval()


def load_as_is(folder: Path) -> tuple["PreTrainedModel", dict[str, Any]]:
    """The model however it loads, and transformers' record: missing_keys, unexpected_keys, mismatched_keys."""
    return _load(folder, ignore_mismatched_sizes=True)


def _load(folder: Path, **options: Any) -> tuple["PreTrainedModel", dict[str, Any]]:
    import torch
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        return AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # whatever transformers and torch meet in its files
        raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}") from error


def load_processor(folder: Path) -> "ProcessorMixin":
    """The checkpoint's own tokenizer and image processor (the PIL one: it runs everywhere)."""
    from transformers import AutoImageProcessor, AutoProcessor

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        processor = AutoProcessor.from_pretrained(folder, **local)
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **local)
        if not hasattr(processor, "tokenizer"):
            raise CheckpointError(f"{folder} has no tokenizer: save it there with `tokenizer.save_pretrained(folder)`")
        _verify_filter(folder, processor.image_processor)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers and tokenizers meet in its files
        raise CheckpointError(f"{folder}: its processor cannot be loaded: {first_line(error)}") from error
    return processor


def _verify_filter(folder: Path, processor: Any) -> None:
    """Raise CheckpointError where `resample` is no number of Pillow's: transformers silently takes bilinear then."""
    from PIL import Image

    given = getattr(processor, "resample", None)
    if given is not None and (type(given) is bool or not isinstance(given, int) or given not in set(Image.Resampling)):
        numbers = ", ".join(f"{kind.value} {kind.name.lower()}" for kind in Image.Resampling)
        raise CheckpointError(
            f"{folder}: its image processor's resample is {given!r:.60}: accepted are Pillow's numbers, {numbers}"
        )


def describe(folder: Path) -> dict[str, Any]:
    """What later stages need to know of the model, so that they can do without transformers.

    Returns:
        model_type, image_size [height, width] in pixels, context_length in tokens, text_inputs (names), example_texts
        (three tokenised texts of different length, by input), and for each tower its layers, heads and width.

    Raises CheckpointError where its files do not say so, or contradict each other.
    """
    try:
        return _describe(folder)
    except CheckpointError:
        raise
    except Exception as error:  # whatever transformers meets when it uses them
        raise CheckpointError(
            f"{folder}: its configuration, tokenizer and image processor do not work together: {first_line(error)}"
        ) from error


def _describe(folder: Path) -> dict[str, Any]:
    from PIL import Image
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(
            f"{folder}: its config.json is not one that transformers knows: {first_line(error)}"
        ) from error
    processor = load_processor(folder)
    pixels = processor.image_processor(Image.new("RGB", (64, 64)), return_tensors="np")["pixel_values"]
    if pixels.ndim != 4:
        raise CheckpointError(
            f"{folder} takes images of varying resolution (NaFlex): use a fixed-resolution checkpoint"
        )
    kind = config.model_type
    siglip = kind.startswith("siglip")
    context = int(min(config.text_config.max_position_embeddings, processor.tokenizer.model_max_length))
    text_inputs = ["input_ids"] if siglip else ["input_ids", "attention_mask"]
    tokens = processor.tokenizer(
        EXAMPLE_TEXTS, padding="max_length" if siglip else "longest", truncation=True, max_length=context
    )
    return {
        "model_type": kind,
        "image_size": list(pixels.shape[-2:]),
        "context_length": context,
        # SigLIP was trained on texts padded to the context, without a mask, as transformers' processor gives them.
        "pad_to_context": siglip,
        "text_inputs": text_inputs,
        "example_texts": {name: tokens[name] for name in text_inputs},
        "towers": {"vision": _tower(config.vision_config), "text": _tower(config.text_config)},
    }


def _tower(config: Any) -> dict[str, int]:
    """Layers, heads and width; 0 where a tower has none (ALIGN's EfficientNet)."""
    names = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size"}
    return {key: int(getattr(config, name, 0) or 0) for key, name in names.items()}


def first_line(error: Exception) -> str:
    """What an exception says, in one line; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
