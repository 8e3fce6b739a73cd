"""Checkpoints: fetch one, refuse what cannot be deployed, load it. The one module that decides what a checkpoint is."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from clip_deploy.core.artifact import Target, read_target
from clip_deploy.core.config import Device, ModelConfig, Precision, TorchConfig
from clip_deploy.core.environment import fingerprint, located
from clip_deploy.core.errors import CheckpointError, one_line
from clip_deploy.layout import (
    INDEX,
    OTHERS,
    PICKLES,
    SETTINGS,
    WEIGHTS,
    model_files,
    other_weights,
    own_code,
    read_object,
    refuse_other_layouts,
    weight_names,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

EXAMPLE_TEXTS = ["a photo of a cat", "two dogs that run along the beach in the evening light", "red"]
TOWERS = ("vision", "text")


def fetch(model: ModelConfig, output: Path, device: Device = Device.cpu) -> Target:
    """Put the checkpoint's files into `output` and describe them; it is the reference, which runs on `device`.

    Raises CheckpointError where there is none, its weights are pickled or truncated, or it is no dual encoder.
    """
    source = output
    if model.architecture:
        _initialise(model, output)
    else:
        source = _download(model) if model.repo_id else _local_folder(model)
        with called(source, model):
            _copy(source, output)
    with called(output, model):
        verify(output)
        described = describe(output)
    origin = {"repo_id": model.repo_id, "revision": model.revision, "sha256": fingerprint(output)}
    description = {**described, "trained": model.trained, "checkpoint": origin, "left_out": other_weights(source)}
    return Target("eager", "fp32", ["config.json", *weight_names(output)], description, device=device.value)


@contextmanager
def called(folder: Path, model: ModelConfig) -> Iterator[None]:
    """Let messages name the checkpoint as its user does, and not the folder that it is read in."""
    try:
        yield
    except CheckpointError as error:
        name = f"{model.repo_id} at {model.revision}" if model.repo_id else str(model.path)
        raise CheckpointError(str(error).replace(str(folder), name)) from error


def export_torch(checkpoint: Path, settings: TorchConfig, device: Device, output: Path) -> Target:
    """Save the checkpoint in `settings.precision` as safetensors, its configuration and processor beside."""
    import torch

    halves = {Precision.fp16: torch.float16, Precision.bf16: torch.bfloat16}
    source = read_target(checkpoint)
    for name in set(model_files(checkpoint)) - set(source.files):
        shutil.copyfile(checkpoint / name, output / name)
    load_model(checkpoint).to(halves.get(settings.precision, torch.float32)).save_pretrained(output)
    note = (
        "torch.compile for each shape, CUDA graphs"
        if settings.compile
        else f"the checkpoint in {settings.precision.value}"
    )
    return Target(
        runtime="compiled" if settings.compile else "eager",
        precision=settings.precision.value,
        device=device.value,
        files=["config.json", *weight_names(output)],
        model=source.model,
        build={"note": note},
    )


def _local_folder(model: ModelConfig) -> Path:
    folder = located(str(model.path))
    if not folder.is_dir():
        what = "a file, and no folder" if folder.is_file() else "no such folder"
        raise CheckpointError(f"model.path is {model.path}: {what}; give one in Hugging Face layout")
    return folder


def _copy(source: Path, output: Path) -> None:
    verify(source)
    for name in model_files(source):
        shutil.copyfile(source / name, output / name)


def _download(model: ModelConfig) -> Path:
    """Fetch a repository through the Hugging Face cache; HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE hold as usual.

    Its settings come first: what they show to be no checkpoint is refused before the weights are fetched.
    """
    from huggingface_hub import HfApi, snapshot_download

    repo_id, revision = str(model.repo_id), str(model.revision)

    def snapshot(names: list[str]) -> Path:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=names))

    with _hub_errors(repo_id, revision):
        folder = snapshot([*SETTINGS, INDEX, *OTHERS])
        with called(folder, model):
            refuse_other_layouts(folder)
            _verify_processor(folder, read_config(folder))
        snapshot([WEIGHTS])
        snapshot(weight_names(folder))
        if not set(weight_names(folder)) & set(model_files(folder)):  # or the network was lost since
            listed = HfApi().list_repo_files(repo_id, revision=revision)
            raise CheckpointError(_without_weights(f"{repo_id} at {revision}", [Path(name) for name in listed]))
    return folder


@contextmanager
def _hub_errors(repo_id: str, revision: str) -> Iterator[None]:
    """Say in one line why the hub gives no files, and the way out."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx

    what = f"{repo_id} at {revision}"
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(f"{repo_id} is gated: accept its terms on its page, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"the hub has no model {repo_id} that you may read: check the id, or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id} has no revision {revision}: give a commit of the repository") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"cannot reach the hub and {what} is not in the local cache: check the network or HF_ENDPOINT, unset "
            "HF_HUB_OFFLINE, or copy the folder here and use `model: local`"
        ) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the network
        raise CheckpointError(f"downloading {what} failed: {error}; run `dvc repro` again to go on") from error


def _without_weights(name: str, files: list[Path]) -> str:
    """Why a folder or repository that lacks model.safetensors cannot be deployed, and what it has in its place."""
    if pickled := sorted(file.name for file in files if any(file.match(pattern) for pattern in PICKLES)):
        return (
            f"{name} has only pickled weights ({pickled[0]}), which can run code when loaded: where you "
            "trust it, load it once and `model.save_pretrained(folder)`, or pin a revision with model.safetensors"
        )
    other = sorted(file.name for file in files if file.suffix == ".safetensors")
    also = f"; {', '.join(other[:3])} is none that transformers reads" if other else ""
    return f"{name} has no weights: a file {WEIGHTS} is needed, or shards with {INDEX}{also}"


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
    """Raise CheckpointError where `folder` is not a dual encoder with whole safetensors weights, and nothing more."""
    refuse_other_layouts(folder)
    config = read_config(folder)
    if not all(_stated(config, tower) for tower in TOWERS):
        raise CheckpointError(
            f"{folder} holds a {config.get('model_type')!r} model: only dual encoders (CLIP, SigLIP, Chinese-CLIP, "
            "ALIGN...) have an image tower and a text tower to deploy"
        )
    if quantized := config.get("quantization_config"):
        kind = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"{folder} holds weights that are quantised already (quantization_config: {kind!s:.40}): give the "
            "checkpoint that they were made from, against which every form can be held; INT8 is made here"
        )
    names = weight_names(folder)
    if missing := [name for name in names if not (folder / name).is_file()]:
        if len(names) > 1:
            raise CheckpointError(f"{folder} lacks {missing[0]}, which {INDEX} names: fetch it again")
        raise CheckpointError(_without_weights(str(folder), [path for path in folder.iterdir() if path.is_file()]))
    _verify_depth(folder, config, sum(_tensors(folder / name) for name in names if name != INDEX))
    _verify_processor(folder, config)


def _verify_processor(folder: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError where the image processor's settings or the tokenizer's vocabulary are missing."""
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise CheckpointError(
            f"{folder} has no preprocessor_config.json: save the processor with `processor.save_pretrained(folder)`"
        )
    kind, lacking = _lacking_vocabulary(folder, config)
    if lacking:
        unread = lacking == "spiece.model" and (folder / "tokenizer.json").is_file()
        way = ', or set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json to read tokenizer.json'
        raise CheckpointError(
            f"{folder} lacks the vocabulary of its {kind}, without which all texts are read alike: missing is "
            f"{lacking}; copy it from the model that this one was fine-tuned from, or write it with "
            f"`tokenizer.save_pretrained(folder)`{way if unread else ''}"
        )


def _lacking_vocabulary(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
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


def _stated(config: dict[str, Any], tower: str) -> bool:
    """Whether config.json has settings of a tower; transformers 4 wrote them under other names too."""
    return f"{tower}_config" in config or f"{tower}_config_dict" in config


def tower_settings(config: dict[str, Any], tower: str) -> dict[str, Any]:
    """What config.json says of a tower, without transformers' defaults; of two places, the one that it heeds."""
    return {**(config.get(f"{tower}_config") or {}), **(config.get(f"{tower}_config_dict") or {})}


def _tensors(path: Path) -> int:
    """How many a file of weights holds; CheckpointError where it is not whole."""
    try:
        with safe_open(path, framework="numpy") as content:
            return len(content.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}): fetch it again") from error


def _verify_depth(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise CheckpointError where a tower has more layers than there are weights: to build them could take for ever."""
    for place in (f"{tower}_config{suffix}" for tower in TOWERS for suffix in ("", "_dict")):
        settings = config.get(place) or {}
        if not isinstance(settings, dict):
            raise CheckpointError(f"{folder}/config.json: {place} is {settings!r:.60}: it must hold settings")
        layers = settings.get("num_hidden_layers")
        if isinstance(layers, int | float) and layers > tensors:
            raise CheckpointError(
                f"{folder}/config.json: {place}.num_hidden_layers is {layers}, and the weights are {tensors} tensors: "
                "these files do not belong together"
            )


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
            config=load_config(folder),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
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
    config.return_dict = True
    config._attn_implementation = None  # transformers then takes PyTorch's own
    return config


def load_processor(folder: Path) -> "ProcessorMixin":
    """The checkpoint's own tokenizer and image processor (the PIL one: it runs everywhere)."""
    from transformers import AutoImageProcessor, AutoProcessor

    local = {"local_files_only": True, "trust_remote_code": False}
    try:
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
        raise CheckpointError(f"{folder}: its processor cannot be loaded: {one_line(error)}") from error
    return processor


def _verify_words(folder: Path, tokenizer: Any) -> None:
    """Raise CheckpointError where there are none: transformers then makes a vocabulary of special tokens, silently."""
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()):
        raise CheckpointError(
            f"{folder}: the vocabulary of its {type(tokenizer).__name__} is empty, so that all texts are read alike: "
            "take it from the model that this one was fine-tuned from"
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
            f"{folder}: its configuration, tokenizer and image processor do not work together: {one_line(error)}"
        ) from error


def _describe(folder: Path) -> dict[str, Any]:
    config = load_config(folder)
    skeleton = _skeleton(folder, config)
    processor = load_processor(folder)
    kind = config.model_type
    siglip = kind.startswith("siglip")
    positions = _positions(skeleton, config.text_config)
    lengths = (processor.tokenizer.model_max_length, trained_context(kind, processor.tokenizer))
    context = int(min(positions, *lengths))
    text_inputs = ["input_ids"] if siglip else ["input_ids", "attention_mask"]
    tokens = processor.tokenizer(
        EXAMPLE_TEXTS, padding="max_length" if siglip else "longest", truncation=True, max_length=context
    )
    return {
        "model_type": kind,
        "image_size": _image_size(folder, processor.image_processor),
        "context_length": context,
        "positions": positions,
        # SigLIP was trained on texts padded to the context, without a mask, as transformers' processor gives them.
        "pad_to_context": siglip,
        "text_inputs": text_inputs,
        "example_texts": {name: tokens[name] for name in text_inputs},
        "towers": {"vision": _tower(config.vision_config), "text": _tower(config.text_config)},
    }


def _skeleton(folder: Path, config: "PreTrainedConfig") -> "PreTrainedModel":
    """The model without weights; CheckpointError where it embeds no images or no texts."""
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    name = type(model).__name__
    if hasattr(model, "get_video_features"):
        raise CheckpointError(f"{folder} is a {name}, which embeds videos: only towers for images can be deployed")
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise CheckpointError(f"{folder} is a {name}: it has no get_image_features/get_text_features")
    return model


def _positions(skeleton: "PreTrainedModel", text: Any) -> int:
    """Tokens that the text tower has positions for. RoBERTa and its like count them from behind the padding's."""
    known = int(text.max_position_embeddings)
    tables = [table for name, table in skeleton.named_modules() if name.endswith("position_embeddings")]
    taken = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return known - max(taken) - 1 if taken else known


def _image_size(folder: Path, processor: Any) -> list[int]:
    """Height and width of what the image processor makes of a square image."""
    from PIL import Image

    made = processor(Image.new("RGB", (64, 64)), return_tensors="np")
    shape = list(made["pixel_values"].shape)
    if "spatial_shapes" in made:
        raise CheckpointError(
            f"{folder} takes images of varying resolution (NaFlex): use a fixed-resolution checkpoint"
        )
    if len(shape) != 4:
        raise CheckpointError(
            f"{folder}: its image processor makes pixel_values of shape {shape}: four axes are needed"
        )
    return shape[-2:]


# Tokens: https://github.com/OFA-Sys/Chinese-CLIP/blob/master/cn_clip/clip/utils.py (tokenize)
TRAINED_CONTEXT = {"chinese_clip": 52}


def trained_context(kind: str, tokenizer: Any) -> float:
    """The longest text in tokens that a family was trained on, where its tokenizer states none; infinity otherwise."""
    stated = tokenizer.model_max_length < 1e9
    return math.inf if stated else TRAINED_CONTEXT.get(kind, math.inf)


def _tower(config: Any) -> dict[str, int]:
    """Layers, heads and width; 0 where a tower has none (ALIGN's EfficientNet), or others in each stage (Swin)."""
    names = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "width": "hidden_size"}
    found = {key: getattr(config, name, 0) for key, name in names.items()}
    return {key: 0 if isinstance(value, list | tuple) else int(value or 0) for key, value in found.items()}
