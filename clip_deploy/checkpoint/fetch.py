"""Bring a checkpoint into a folder: from the hub, from a local folder, or with random weights."""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clip_deploy.checkpoint.adapters import FILES, check_settings, check_weights, merge
from clip_deploy.checkpoint.dense_heads import fold
from clip_deploy.checkpoint.layout import (
    ADAPTER,
    INDEX,
    OPEN_CLIP_WEIGHTS,
    OTHERS,
    PICKLES,
    SETTINGS,
    TEXT_CONFIG,
    WEIGHTS,
    is_adapter,
    is_open_clip,
    main_files,
    matching,
    model_files,
    other_weights,
    refuse_other_layouts,
    tokenizer_files,
    weight_names,
)
from clip_deploy.checkpoint.load import describe
from clip_deploy.checkpoint.open_clip_files import find_text_config, verify_folder
from clip_deploy.checkpoint.places import FILE, Place, base_place, model_place, processor_place
from clip_deploy.checkpoint.processor import processor_files, refuse_unused
from clip_deploy.checkpoint.sentence_transformers import (
    model_folder,
    modules_of,
    refuse_modules,
    refuse_other_texts,
)
from clip_deploy.checkpoint.verify import read_config, verify, verify_model, verify_processor, without_weights
from clip_deploy.core.artifact import Target
from clip_deploy.core.config import Device, ModelConfig
from clip_deploy.core.environment import fingerprint, located
from clip_deploy.core.errors import CheckpointError
from clip_deploy.core.files import sha256
from clip_deploy.core.model import Origin
from clip_deploy.core.records import Facts


def fetch(model: ModelConfig, output: Path, device: Device = Device.cpu) -> Target:
    """Put the checkpoint's files into `output` and describe them; it is the reference, which runs on `device`.

    Raises CheckpointError where there is none, its weights are pickled or truncated, or it is no dual encoder.
    """
    if model.architecture:
        _initialise(model, output)
        made = Made(output)
    elif model.open_clip or _is_weight_file(model):
        with called(output, model):
            made = _convert(model, output)
    else:
        made = _put_together(model, output)
    with called(output, model):
        verify(output)
        described = describe(output)
    origin = Origin(model.repo_id, model.revision, fingerprint(output), made.parts)
    known = replace(described, trained=model.trained, checkpoint=origin, left_out=other_weights(made.weights))
    return Target("eager", "fp32", main_files(output), known, made.build, device=device.value)


@dataclass(frozen=True)
class Made:
    """Where the weights come from, what else the checkpoint was made of, and how, for the report."""

    weights: Path
    parts: dict[str, Origin] = field(default_factory=dict)
    build: Facts = field(default_factory=dict)


def _put_together(model: ModelConfig, output: Path) -> Made:
    """Fill `output` with the model, or an adapter merged into its base, and with the processor that goes with it."""
    place, other = model_place(model), processor_place(model)
    given = _bring(place, is_whole=other is None)
    if is_open_clip(given):
        return _take_open_clip(given, place, model, output)
    adapter = _adapter_settings(given, place, model)
    if adapter is None:
        base, weights, folders = place, given, [given]
    else:
        base = base_place(model, adapter)
        weights = _bring(base, is_whole=False)
        folders = [given, weights]
    lent = [_bring_processor(other)] if other else []
    with called(output, place), called(given, place), called(weights, base):
        verify_model(weights)
        files = processor_files([*folders, *lent], read_config(weights))
        if other:
            refuse_unused(other, lent[0], files)
        for path in files:
            shutil.copyfile(path, output / path.name)
        borrowed = [path.name for path in files if path.parent in lent]
        parts = {"processor": _origin(other, lent[0], borrowed)} if other else {}
        heads = [head for folder in folders for head in _heads(folder, read_config(weights))]
        if adapter is None and heads:
            note = fold(weights, heads, output)
            parts |= {head.name: _origin(place, head, ["config.json", WEIGHTS]) for head in heads}
            return Made(weights, parts, {"note": note})
        if adapter is None:
            for name in ("config.json", *weight_names(weights)):
                shutil.copyfile(weights / name, output / name)
            return Made(weights, parts)
        if heads:
            raise CheckpointError(f"{given} holds an adapter with Dense behind it: merge it, and save the whole model")
        merged = merge(given, weights, output)
    names = {"adapter": (place, given, FILES), "base": (base, weights, model_files(weights))}
    parts = {name: _origin(*part) for name, part in names.items()} | parts
    return Made(weights, parts, {"note": merged})


def _take_open_clip(given: Path, place: Place, model: ModelConfig, output: Path) -> Made:
    """Copy a folder in open_clip's layout, which names tokenizer and preprocessing itself."""
    _refuse_parts(model, f"{place} is open_clip's")
    with called(given, place):
        verify(given)
    for name in model_files(given):
        shutil.copyfile(given / name, output / name)
    with called(given, place):
        _bring_text_config(given, output)
    return Made(given)


def _bring_text_config(given: Path, output: Path) -> None:
    """Put the configuration of a text tower of transformers into `output`, so that no hub is asked again."""
    found = find_text_config(given)
    if found is not None and not (output / TEXT_CONFIG).is_file():
        shutil.copyfile(found, output / TEXT_CONFIG)


def _heads(folder: Path, config: dict[str, Any]) -> list[Path]:
    """The Dense heads of sentence-transformers behind a model or an adapter."""
    found = modules_of(folder)
    if found:
        refuse_other_texts(found, config)
    return found.heads if found else []


def _adapter_settings(folder: Path, place: Place, model: ModelConfig) -> dict[str, Any] | None:
    """Those of an adapter in `folder`; None where it holds a model."""
    if is_adapter(folder):
        with called(folder, place):
            refuse_modules(folder)
            settings = check_settings(folder)
            check_weights(folder)
        return settings
    for name in ("base", "base_revision"):
        if given := getattr(model, name):
            raise CheckpointError(f"model.{name} is {given}, but {place} holds no adapter ({ADAPTER}): remove `{name}`")
    return None


def _origin(place: Place, folder: Path, names: Iterable[str]) -> Origin:
    here = [name for name in names if (folder / name).is_file()]
    return Origin(place.repo_id, place.revision, fingerprint(folder, here))


@contextmanager
def called(folder: Path, place: Place | ModelConfig) -> Iterator[None]:
    """Let messages name the checkpoint as its user does, and not the folder that it is read in."""
    try:
        yield
    except CheckpointError as error:
        name = f"{place.repo_id} at {place.revision}" if place.repo_id else str(place.path)
        if Path(name) == folder:
            raise  # a short path such as "clip" would be found within words
        raise CheckpointError(str(error).replace(str(folder), name)) from error


def _bring(place: Place, is_whole: bool) -> Path:
    """The folder of a model or an adapter, fetched where it is a repository; `is_whole`: it has its processor too."""
    return _download(place, is_whole) if place.repo_id else _local_folder(place)


def _bring_processor(place: Place) -> Path:
    """The folder that a processor is taken from: of a repository, its settings alone."""
    if not place.repo_id:
        return _local_folder(place)
    with _hub_errors(place):
        return _settings(place)


def _local_folder(place: Place) -> Path:
    folder = located(str(place.path))
    if not folder.is_dir():
        what = "a file, and no folder" if folder.is_file() else "no such folder"
        raise CheckpointError(f"{place.setting} is {place.path}: {what}; give one in Hugging Face or open_clip layout")
    with called(folder, place):
        return model_folder(folder)


def _is_weight_file(model: ModelConfig) -> bool:
    """Whether `path` is a single file of weights, as OpenAI gives them."""
    path = located(str(model.path))
    return bool(model.path) and path.is_file() and any(path.match(pattern) for pattern in PICKLES)


def _convert(model: ModelConfig, output: Path) -> Made:
    """Write a single file of weights in open_clip's layout, with the tokenizer that lies beside it, save OpenAI's."""
    from clip_deploy.checkpoint.weight_files import OPENAI, convert

    path = located(str(model.path))
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise CheckpointError(
            f"model.path is {model.path}: {what}; with model.open_clip it names a checkpoint of open_clip's training, "
            "such as epoch_32.pt, or OpenAI's weights"
        )
    _refuse_parts(model, f"{model.path} is one file of weights")
    note = convert(path, model.open_clip, output)
    beside = [*tokenizer_files(path.parent), *matching(path.parent, (TEXT_CONFIG,))]
    for name in beside if model.open_clip not in (None, OPENAI) else []:
        shutil.copyfile(path.parent / name, output / name)
    _bring_text_config(output, output)
    return Made(output, {path.name: Origin(None, None, sha256(path))}, {"note": note})


def _refuse_parts(model: ModelConfig, what: str) -> None:
    """Raise CheckpointError where `base` or `processor` is set for what needs none."""
    if set_here := next((name for name in ("base", "processor") if getattr(model, name)), None):
        raise CheckpointError(f"model.{set_here} is set, but {what} and needs none: remove it")


def _snapshot(place: Place, names: Iterable[str]) -> Path:
    """The files of a repository that match, through the Hugging Face cache.

    HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE hold as usual. Raises CheckpointError where the revision is no commit.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(str(place.repo_id), revision=place.revision, allow_patterns=list(names)))
    if folder.name != place.revision:  # the cache names it by its commit
        raise CheckpointError(
            f"model.{place.pin} is {place.revision}, a name that can move to other weights. {place.repo_id} is now at "
            f"{folder.name}: set `{place.pin}: {folder.name}` in {FILE}"
        )
    return folder


def _settings(place: Place) -> Path:
    """The folder of a repository in which the model lies, with all but its weights."""
    names = [*SETTINGS, INDEX, TEXT_CONFIG, *OTHERS]
    folder = _snapshot(place, names)
    with called(folder, place):
        if found := modules_of(folder):
            _snapshot(place, [f"{where}/{name}" for where in found.folders for name in names])
        return model_folder(folder)


def _download(place: Place, is_whole: bool) -> Path:
    """Fetch a repository: its settings first, so that what they show to be no checkpoint costs no weights."""
    from huggingface_hub import HfApi

    with _hub_errors(place):
        folder = _settings(place)
        found = modules_of(folder)
        root, inner = (found.root, found.where) if found else (folder, "")
        if (folder / ADAPTER).is_file():
            with called(folder, place):
                check_settings(folder)
            whole = [WEIGHTS] if (folder / "config.json").is_file() else []
            _snapshot(place, [str(Path(inner, name)) for name in (FILES[1], *whole)])
            return folder
        with called(root, place), called(folder, place):
            refuse_modules(folder)
            refuse_other_layouts(folder)
            if is_open_clip(folder):
                verify_folder(folder)
                find_text_config(folder)
            elif is_whole:
                verify_processor(folder, read_config(folder))
        heads = found.heads if found else []
        weights = OPEN_CLIP_WEIGHTS if is_open_clip(folder) else [WEIGHTS]
        _snapshot(place, [*(str(Path(inner, name)) for name in weights), *(f"{head.name}/{WEIGHTS}" for head in heads)])
        _snapshot(place, [str(Path(inner, name)) for name in weight_names(folder)])
        if not set(weight_names(folder)) & set(model_files(folder)):  # or the network was lost since
            listed = HfApi().list_repo_files(str(place.repo_id), revision=place.revision)
            raise CheckpointError(without_weights(str(place), [Path(name) for name in listed], weight_names(folder)[0]))
    return folder


@contextmanager
def _hub_errors(place: Place) -> Iterator[None]:
    """Say in one line why the hub gives no files, and the way out."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    repo_id, revision, what = place.repo_id, place.revision, str(place)
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id} is gated: accept its terms on its page at huggingface.co, then set HF_TOKEN"
        ) from error
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
        raise CheckpointError(f"downloading {what} failed: {error}; run `dvc repro` again to continue") from error


def _initialise(model: ModelConfig, output: Path) -> None:
    """Write a checkpoint of the given architecture with seeded random weights."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoProcessor

    tokens = AutoProcessor.from_pretrained(_local_folder(model_place(model)))
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
