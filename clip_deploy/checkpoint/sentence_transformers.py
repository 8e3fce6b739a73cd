"""Folders of sentence-transformers: where the model lies in them, and what they do to texts and embeddings besides."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip_deploy.checkpoint.layout import MODALITIES, MODULES, PROMPTS, looked_at, read_object
from clip_deploy.core.errors import CheckpointError

FIRST_MODULES = ("Transformer", "CLIPModel")  # what runs the checkpoint itself
FEATURES = {"text": "get_text_features", "image": "get_image_features"}
IDENTITY = "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class Modules:
    """What modules.json in `root` lists: its first module with its folder there, and those behind it."""

    root: Path
    first: str
    where: str
    behind: list[tuple[str, str]] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.root / self.where

    @property
    def folders(self) -> list[str]:
        """Those below `root`."""
        return [where for where in (self.where, *(where for _, where in self.behind)) if where]

    @property
    def heads(self) -> list[Path]:
        return [self.root / where for kind, where in self.behind if kind == "Dense"]


def modules_of(folder: Path) -> Modules | None:
    """What is listed in `folder`, or above it for the model in it; None where it is none of sentence-transformers'."""
    if found := _read(folder):
        return found
    above = _read(folder.parent)
    return above if above and above.where == folder.name else None


def _read(root: Path) -> Modules | None:
    path = root / MODULES
    if not path.is_file():
        return None
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise CheckpointError(f"{path} lists no modules of sentence-transformers")
    found = [(_kind(module), str(module.get("path", "")).strip("/")) for module in listed] or [("nothing", "")]
    if outside := next((where for _, where in found if Path(where).name != where or where == ".."), None):
        raise CheckpointError(f"{path} names {outside!r:.80}, which is not a folder beside it: save the model again")
    return Modules(root, *found[0], found[1:])


def _kind(module: dict[str, Any]) -> str:
    return str(module.get("type", "")).rpartition(".")[2]


def model_folder(folder: Path) -> Path:
    """Where the model of a folder lies: in the one that modules.json names first, else in `folder` itself."""
    found = _read(folder)
    if not found or not found.where:
        return folder
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds two models: one beside {MODULES}, and one in {found.where}/, which {MODULES} names. Move "
            "one of them away"
        )
    if not found.model.is_dir():
        raise CheckpointError(f"{folder} lacks {found.where}/, which {MODULES} names: download it again")
    return found.model


def read_here(folder: Path) -> list[str]:
    """Files in `folder`, by their paths there, whose change makes another checkpoint of it."""
    names = looked_at(folder)
    try:
        found = _read(folder)
    except CheckpointError:  # `download` says it
        return names
    inner = found.folders if found else []
    return names + [f"{where}/{name}" for where in inner for name in looked_at(folder / where)]


def refuse_modules(folder: Path) -> None:
    """Raise CheckpointError where a model embeds otherwise in sentence-transformers than its two towers do."""
    found = modules_of(folder)
    if not found:
        return
    behind = [kind for kind, _ in found.behind if kind not in ("Normalize", "Dense")]  # cosines need no Normalize
    kinds = [found.first, *(kind for kind, _ in found.behind)] if found.first not in FIRST_MODULES else behind
    if kinds:
        raise CheckpointError(
            f"{folder} is of a sentence-transformers model with {' and '.join(kinds)} ({MODULES}). They would be left "
            "out, and embeddings would change: only a CLIP model followed by Dense and Normalize can be deployed"
        )
    _refuse_texts(found)
    _refuse_methods(found.model)
    for head in found.heads:
        _refuse_head(head)


def _refuse_texts(found: Modules) -> None:
    """What it does to texts and embeddings by settings, and not by modules."""
    path = found.root / PROMPTS
    if not path.is_file():
        return
    settings = read_object(path)
    prompts, name = settings.get("prompts"), str(settings.get("default_prompt_name"))
    if isinstance(prompts, dict) and prompts.get(name):
        raise CheckpointError(
            f"{path} puts {prompts[name]!r:.60} before every text (default_prompt_name). The towers do not: set it to "
            "null, and write it into your texts and templates"
        )
    if settings.get("truncate_dim"):
        raise CheckpointError(
            f"{path} cuts embeddings to their first {settings['truncate_dim']!s:.20} values (truncate_dim). The towers "
            "do not: set it to null, and cut embeddings where you search"
        )


def _refuse_methods(folder: Path) -> None:
    """It may take another output of the model than its features, or read texts in another way."""
    if not (folder / MODALITIES).is_file():
        return
    settings, path = read_object(folder / MODALITIES), folder / MODALITIES
    stated = settings.get("modality_config")
    for modality, of in (stated if isinstance(stated, dict) else {}).items():
        method = of.get("method") if isinstance(of, dict) else None
        if modality in FEATURES and method not in (None, FEATURES[modality]):
            raise CheckpointError(f"{path} takes {method} for {modality}s: only {FEATURES[modality]} can be deployed")
    tokenizer = folder / "tokenizer_config.json"
    stated = read_object(tokenizer) if tokenizer.is_file() else {}
    for name, here in (("do_lower_case", "do_lower_case"), ("max_seq_length", "model_max_length")):
        if settings.get(name) not in (None, False, stated.get(here)):
            raise CheckpointError(
                f"{path} states {name}: {settings[name]!s:.20}, and tokenizer_config.json {here}: "
                f"{stated.get(here)!s:.20}: texts would be read in another way; state the same in both"
            )


def refuse_other_texts(found: Modules, config: dict[str, Any]) -> None:
    """Raise CheckpointError where texts are padded in another way than the model was trained on, or cut, or more.

    sentence-transformers pads to the longest of a batch. A model with a mask does not see it. SigLIP has none and was
    trained on texts padded to its context: it embeds them otherwise, and otherwise in each batch.

    Args:
        config: the model's config.json.
    """
    path = found.model / MODALITIES
    settings = read_object(path).get("processing_kwargs") if path.is_file() else None
    given = {f"{part}.{name}": value for part, of in _items(settings) for name, value in _items(of)}
    padding = given.pop("text.padding", given.pop("common.padding", None))
    given = {name: value for name, value in given.items() if not (name.endswith(".truncation") and value is True)}
    if given:
        raise CheckpointError(
            f"{path} states processing_kwargs {', '.join(given)}: only text.padding is known here; let the processor's "
            "own settings say it"
        )
    if str(config.get("model_type")).startswith("siglip") and padding != "max_length":
        raise CheckpointError(
            f"{path} pads texts to the longest of a batch, and this model was trained on texts padded to its context: "
            'write "processing_kwargs": {"text": {"padding": "max_length"}} there. If it was trained otherwise, this '
            f"version cannot deploy it. To deploy it as transformers reads it, move {MODULES} away"
        )


def _items(settings: Any) -> list[tuple[str, Any]]:
    return list(settings.items()) if isinstance(settings, dict) else []


def _refuse_head(folder: Path) -> None:
    """Raise CheckpointError where a Dense head is no product of matrices, or not whole."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} lacks config.json, and {MODULES} names it as a Dense head: download it again")
    settings = read_object(folder / "config.json")
    stated = str(settings.get("activation_function", "Tanh"))
    told = [f"the activation {stated.rpartition('.')[2]}"] if stated != IDENTITY else []
    told += ["a bias"] * bool(settings.get("bias", True)) + ["a residual"] * bool(settings.get("use_residual"))
    names = {str(settings.get(f"module_{end}_name")) for end in ("input", "output")} - {"None", "sentence_embedding"}
    told += [f"another input or output ({', '.join(sorted(names))})"] if names else []
    if told:
        raise CheckpointError(
            f"{folder} is a Dense head with {' and '.join(told)}, and only a plain product (bias=False, "
            "activation_function=Identity) can become part of both projections: this version cannot deploy it"
        )
