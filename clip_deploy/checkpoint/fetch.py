"""Bring a checkpoint into a folder: from the hub, from a local folder, or with random weights."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from clip_deploy.checkpoint.layout import (
    INDEX,
    OPEN_CLIP_WEIGHTS,
    OTHERS,
    SETTINGS,
    WEIGHTS,
    is_open_clip,
    main_files,
    model_files,
    other_weights,
    refuse_other_layouts,
    tokenizer_files,
    weight_names,
)
from clip_deploy.checkpoint.load import describe
from clip_deploy.checkpoint.verify import verify, verify_settings, without_weights
from clip_deploy.core.artifact import Target
from clip_deploy.core.config import Device, ModelConfig
from clip_deploy.core.environment import fingerprint, located
from clip_deploy.core.errors import CheckpointError
from clip_deploy.core.model import Origin


def fetch(model: ModelConfig, output: Path, device: Device = Device.cpu) -> Target:
    """Put the checkpoint's files into `output` and describe them; it is the reference, which runs on `device`.

    Raises CheckpointError where there is none, its weights are pickled or truncated, or it is no dual encoder.
    """
    source = output
    if model.architecture:
        _initialise(model, output)
    elif model.open_clip:
        with called(output, model):
            source = _convert(model, output)
    else:
        source = _download(model) if model.repo_id else _local_folder(model)
        with called(source, model):
            _copy(source, output)
    with called(output, model):
        verify(output)
        described = describe(output)
    origin = Origin(model.repo_id, model.revision, fingerprint(output))
    known = replace(described, trained=model.trained, checkpoint=origin, left_out=other_weights(source))
    return Target("eager", "fp32", main_files(output), known, device=device.value)


@contextmanager
def called(folder: Path, model: ModelConfig) -> Iterator[None]:
    """Let messages name the checkpoint as its user does, and not the folder that it is read in."""
    try:
        yield
    except CheckpointError as error:
        name = f"{model.repo_id} at {model.revision}" if model.repo_id else str(model.path)
        raise CheckpointError(str(error).replace(str(folder), name)) from error


def _local_folder(model: ModelConfig) -> Path:
    folder = located(str(model.path))
    if not folder.is_dir():
        what = "a file, and no folder" if folder.is_file() else "no such folder"
        raise CheckpointError(f"model.path is {model.path}: {what}; give one in Hugging Face or open_clip layout")
    return folder


def _convert(model: ModelConfig, output: Path) -> Path:
    """Write a training checkpoint of open_clip in its layout, with the tokenizer's files that lie beside it."""
    from clip_deploy.checkpoint.open_clip import convert_training_checkpoint

    path = located(str(model.path))
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise CheckpointError(
            f"model.path is {model.path}: {what}; with model.open_clip it names a checkpoint of open_clip's training, "
            "such as epoch_32.pt"
        )
    convert_training_checkpoint(path, str(model.open_clip), output)
    for name in tokenizer_files(path.parent):
        shutil.copyfile(path.parent / name, output / name)
    return output


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
            verify_settings(folder)
        snapshot(list(OPEN_CLIP_WEIGHTS) if is_open_clip(folder) else [WEIGHTS])
        snapshot(weight_names(folder))
        if not set(weight_names(folder)) & set(model_files(folder)):  # or the network was lost since
            listed = HfApi().list_repo_files(repo_id, revision=revision)
            files, wanted = [Path(name) for name in listed], weight_names(folder)[0]
            raise CheckpointError(without_weights(f"{repo_id} at {revision}", files, wanted))
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
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

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
