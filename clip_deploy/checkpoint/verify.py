"""Whether a folder holds a whole checkpoint, and what its settings state."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from clip_deploy.checkpoint.layout import (
    INDEX,
    OPEN_CLIP_WEIGHTS,
    PICKLES,
    WEIGHTS,
    is_open_clip,
    read_object,
    refuse_other_layouts,
    weight_names,
)
from clip_deploy.checkpoint.open_clip_files import verify_folder
from clip_deploy.checkpoint.sentence_transformers import refuse_modules
from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.errors import CheckpointError

IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")
ELSEWHERE = "name the model that has it with `processor:` in the model's file in conf/model/ (a folder or an id)"


def verify(folder: Path) -> None:
    """Raise CheckpointError where `folder` is not a dual encoder with whole safetensors weights, and nothing more."""
    verify_model(folder)
    if not is_open_clip(folder):
        verify_processor(folder, read_config(folder))


def verify_model(folder: Path) -> None:
    """The same without its processor, which may come from elsewhere."""
    refuse_modules(folder)
    refuse_other_layouts(folder)
    if is_open_clip(folder):
        _verify_open_clip(folder)
        return
    config = read_config(folder)
    if not all(any(place in config for place in _places(tower)) for tower in TOWERS):
        named = config.get("model_type")
        stated = f"holds a {named!r} model" if named else "has a config.json without model_type"
        raise CheckpointError(
            f"{folder} {stated}: only dual encoders (CLIP, SigLIP, Chinese-CLIP, "
            "ALIGN...) have an image tower and a text tower to deploy"
        )
    if quantized := config.get("quantization_config"):
        kind = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"{folder} holds weights that are quantised already (quantization_config: {kind!s:.40}): give the "
            "checkpoint that they were made from. INT8 is made here, and every target is compared with the original"
        )
    names = weight_names(folder)
    if missing := [name for name in names if not (folder / name).is_file()]:
        if len(names) > 1:
            raise CheckpointError(f"{folder} lacks {missing[0]}, which {INDEX} names: download it again")
        raise CheckpointError(without_weights(str(folder), [path for path in folder.iterdir() if path.is_file()]))
    _verify_depth(folder, config, sum(_tensors(folder / name) for name in names if name != INDEX))


def _verify_open_clip(folder: Path) -> None:
    verify_folder(folder)
    (name,) = weight_names(folder)
    if not (folder / name).is_file():
        raise CheckpointError(without_weights(str(folder), [path for path in folder.iterdir() if path.is_file()], name))
    _tensors(folder / name)


def verify_processor(folder: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError where the image processor's settings or the tokenizer's vocabulary are missing."""
    verify_image_processor(folder)
    verify_tokenizer(folder, config)


def verify_image_processor(folder: Path) -> None:
    """Raise CheckpointError where its settings are missing."""
    if not has_image_processor(folder):
        raise CheckpointError(
            f"{folder} has no preprocessor_config.json: save the processor with `processor.save_pretrained(folder)`, "
            f"or {ELSEWHERE}"
        )


def verify_tokenizer(folder: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError where its vocabulary is missing; `config` is the model's config.json."""
    kind, lacking = lacking_vocabulary(folder, config)
    if lacking:
        unread = lacking == "spiece.model" and (folder / "tokenizer.json").is_file()
        way = ', or set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json to read tokenizer.json'
        raise CheckpointError(
            f"{folder} lacks the vocabulary of its {kind}: {lacking} is missing, and without it all texts look the "
            "same; copy it from the model that this one was fine-tuned from, write it with "
            f"`tokenizer.save_pretrained(folder)`{way if unread else ''}, or {ELSEWHERE}"
        )


def has_image_processor(folder: Path) -> bool:
    """Whether the image processor's settings are there."""
    return any((folder / name).is_file() for name in IMAGE_SETTINGS)


def lacking_vocabulary(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """The tokenizer's class, as transformers chooses it, and the files that it needs and that are not there."""
    from transformers import PreTrainedTokenizerBase, TokenizersBackend
    from transformers.models.auto import tokenization_auto as auto

    stated = stated_settings(folder).get("tokenizer_class") or config.get("tokenizer_class")
    name = stated if isinstance(stated, str) else str(auto.TOKENIZER_MAPPING_NAMES.get(str(config.get("model_type"))))
    found = auto.tokenizer_class_from_name(name)
    known = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
    kind = found if known else TokenizersBackend  # so does AutoTokenizer
    roles = kind.vocab_files_names
    parts = [roles[role] for role in ("vocab_file", "merges_file") if role in roles]
    missing = [part for part in parts if not (folder / part).is_file()]
    fast = issubclass(kind, TokenizersBackend)
    whole = fast and any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    if not roles or whole or (parts and not missing):
        return kind.__name__, ""
    instead = ["tokenizer.json"] if fast and len(missing) == len(parts) else []
    return kind.__name__, " or ".join([*instead, *([" and ".join(missing)] if missing else [])])


def stated_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json as it stands; empty where there is none, as transformers takes it."""
    path = folder / "tokenizer_config.json"
    return read_object(path) if path.is_file() else {}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands."""
    return read_object(folder / "config.json")


WORDS = {"vision": ("image", "vision"), "text": ("text",)}  # the first is FLAVA's


def _places(tower: str) -> list[str]:
    """Where config.json may have a tower's settings; transformers 4 wrote them under other names too."""
    return [f"{word}_config{suffix}" for word in WORDS[tower] for suffix in ("", "_dict")]


def tower_settings(config: dict[str, Any], tower: str) -> dict[str, Any]:
    """What config.json says of a tower, without transformers' defaults; of two places, the one that it heeds."""
    return {key: value for place in _places(tower) for key, value in (config.get(place) or {}).items()}


def _tensors(path: Path) -> int:
    """How many a file of weights holds; CheckpointError where it is not whole."""
    try:
        with safe_open(path, framework="numpy") as content:
            return len(content.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated, or not a safetensors file ({error}): download it again") from error


def _verify_depth(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise CheckpointError where a tower has more layers than there are weights: to build them could take for ever."""
    for place in (place for tower in TOWERS for place in _places(tower)):
        settings = config.get(place) or {}
        if not isinstance(settings, dict):
            raise CheckpointError(f"{folder}/config.json: {place} is {settings!r:.60}: give a dictionary of settings")
        layers = settings.get("num_hidden_layers")
        if isinstance(layers, int | float) and layers > tensors:
            raise CheckpointError(
                f"{folder}/config.json: {place}.num_hidden_layers is {layers}, and the weights are {tensors} tensors: "
                "these files do not belong together"
            )


def without_weights(name: str, files: list[Path], wanted: str = WEIGHTS) -> str:
    """Why a folder or repository that lacks model.safetensors cannot be deployed, and what it has in its place."""
    of_open_clip = wanted in OPEN_CLIP_WEIGHTS
    if pickled := sorted(file.name for file in files if any(file.match(pattern) for pattern in PICKLES)):
        way = (
            f"safetensors.torch.save_file(state_dict, {wanted!r})" if of_open_clip else "model.save_pretrained(folder)"
        )
        return (
            f"{name} has only pickled weights ({pickled[0]}), which can run code when loaded: if you trust it, load it "
            f"once and run `{way}`, or pin a revision with {wanted}"
        )
    other = sorted(file.name for file in files if file.suffix == ".safetensors")
    also = f"; {'open_clip' if of_open_clip else 'transformers'} does not read {', '.join(other[:3])}" if other else ""
    shards = "" if of_open_clip else f", or shards with {INDEX}"
    return f"{name} has no weights: a file {wanted} is needed{shards}{also}"
