"""Whether a folder in open_clip's layout is whole, and one of those that can be deployed."""

from pathlib import Path
from typing import Any

from clip_deploy.checkpoint.layout import OPEN_CLIP, TEXT_CONFIG, read_object
from clip_deploy.core.errors import CheckpointError, one_line

TEXT_TOWERS = ("bert", "m2m_100", "roberta", "xlm-roberta")  # of transformers, by model_type; NLLB is an M2M100
INSTALL = "pip install 'clip-deploy[open-clip]'"


def require_library() -> None:
    """Raise CheckpointError, with the way out, where open_clip or what it needs is not installed."""
    try:
        import ftfy  # noqa: F401 - its version decides how texts are cleaned
        import open_clip  # noqa: F401
        import timm  # noqa: F401
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # torchvision of another PyTorch raises the second
        raise CheckpointError(
            f"an open_clip checkpoint needs the library open_clip_torch, which cannot be imported ({one_line(error)}): "
            f"{INSTALL}, with a torchvision that was made for the PyTorch that is installed"
        ) from error


def read_settings(folder: Path) -> dict[str, Any]:
    """open_clip_config.json as it stands; CheckpointError where it lacks a tower, or names one that is not built here.

    The library is not needed for it.
    """
    path = folder / OPEN_CLIP
    settings = read_object(path)
    model = settings.get("model_cfg")
    towers = [model.get(name) if isinstance(model, dict) else None for name in ("vision_cfg", "text_cfg")]
    if not all(isinstance(tower, dict) for tower in towers):
        raise CheckpointError(f"{path} lacks model_cfg with vision_cfg and text_cfg: download it again")
    vision, text = (dict(tower or {}) for tower in towers)
    if ":" in str(name := vision.get("timm_model_name", "")):
        raise CheckpointError(f"{path}: timm_model_name is {name!r:.60}: only architectures of timm can be built")
    tokenizer = text.get("tokenizer_kwargs") or {}
    if (mode := text.get("tokenizer_mode")) or (mode := tokenizer.get("reduction_mask")):
        raise CheckpointError(f"{path}: its tokenizer works in mode {mode!r:.40}, which cannot be deployed")
    return settings


def find_text_config(folder: Path) -> Path | None:
    """The configuration of a text tower of transformers: beside the model, or of the hub, as open_clip takes it.

    None where the tower is open_clip's own. Raises CheckpointError where it is found nowhere, or is of no known kind.
    """
    name = read_settings(folder)["model_cfg"]["text_cfg"].get("hf_model_name")
    if not name:
        return None
    path = folder / TEXT_CONFIG
    if not path.is_file():
        path = _of_the_hub(folder, str(name))
    if (kind := read_object(path).get("model_type")) not in TEXT_TOWERS:
        raise CheckpointError(
            f"{folder}: its text tower, {name!r:.60} (hf_model_name), is a {kind!r:.40} of transformers: accepted are "
            f"{', '.join(TEXT_TOWERS)}"
        )
    return path


def _of_the_hub(folder: Path, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # whatever the hub, the network and the cache meet
        raise CheckpointError(
            f"{folder} lacks the configuration of its text tower, {name!r:.60} of transformers (hf_model_name), and "
            f"neither the hub nor its cache has it ({one_line(error):.80}): check the network or HF_ENDPOINT, unset "
            f"HF_HUB_OFFLINE, or copy that model's config.json into the folder as {TEXT_CONFIG}"
        ) from error


def verify_folder(folder: Path) -> None:
    """Raise CheckpointError where open_clip, or a checkpoint's settings or tokenizer, is missing or unknown."""
    require_library()
    settings = read_settings(folder)
    name = settings["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
    if name and not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(
            f"{folder} lacks its tokenizer, {name!r:.60} (hf_tokenizer_name): put its files into the folder with "
            f"`AutoTokenizer.from_pretrained({name!r:.60}).save_pretrained(folder)`"
        )
