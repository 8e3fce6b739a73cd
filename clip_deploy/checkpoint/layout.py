"""Which files of a folder are the model, and what a folder is where it is no checkpoint as transformers saves one.

A folder can hold more than a model: an adapter, a head behind it, a second set of weights. Whatever transformers would
leave out without a word is told here, before anything is loaded.
"""

import json
from pathlib import Path
from typing import Any

from clip_deploy.core.errors import CheckpointError

# What transformers reads besides the weights; never pickles, never code.
SETTINGS = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "bpe.codes",
    "*.model",
)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
MODULES, MODALITIES, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
OPEN_CLIP, PIPELINE = "open_clip_config.json", "model_index.json"
TEXT_CONFIG = "text_config.json"  # of an open_clip checkpoint: config.json of its text tower of transformers
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")  # as open_clip prefers them
OF_TRANSFORMERS = ("config.json", "preprocessor_config.json", "processor_config.json")  # all other settings: tokenizers
OTHERS = (ADAPTER, MODULES, MODALITIES, PROMPTS, OPEN_CLIP, PIPELINE)  # what tells that a folder is another tool's
ADAPTERS = (ADAPTER, "adapter_model.*")
WHOLE = (WEIGHTS, INDEX, "pytorch_model*")  # weights of a whole model, which an adapter can lie beside
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
SHOWN = 5  # names in a message


def model_files(folder: Path) -> list[str]:
    """Names of all files that make the model in `folder`: settings, tokenizer, processor and weights."""
    of_open_clip = [OPEN_CLIP, *matching(folder, (TEXT_CONFIG,)), *tokenizer_files(folder)]
    settings = of_open_clip if is_open_clip(folder) else matching(folder, SETTINGS)
    return sorted({*settings, *(name for name in weight_names(folder) if (folder / name).is_file())})


def tokenizer_files(folder: Path) -> list[str]:
    """Names of the files of a tokenizer of transformers."""
    return matching(folder, tuple(name for name in SETTINGS if name not in OF_TRANSFORMERS))


def is_open_clip(folder: Path) -> bool:
    """Whether it is read with open_clip's library; where transformers' form lies beside, that one is taken."""
    return (folder / OPEN_CLIP).is_file() and not (folder / "config.json").is_file()


def main_files(folder: Path) -> list[str]:
    """The files that hold the model itself: its configuration and weights."""
    return [OPEN_CLIP if is_open_clip(folder) else "config.json", *weight_names(folder)]


def looked_at(folder: Path) -> list[str]:
    """The same, and what decides whether the folder is taken: all whose change makes another checkpoint of it."""
    return sorted({*model_files(folder), *matching(folder, (*OTHERS, *ADAPTERS))})


def weight_names(folder: Path) -> list[str]:
    """The files of weights, as transformers chooses them: model.safetensors, or else the shards of its index.

    Of an open_clip checkpoint the one that open_clip prefers.
    """
    if is_open_clip(folder):
        return [next((name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()), OPEN_CLIP_WEIGHTS[0])]
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    shards = read_object(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{folder / INDEX} is not an index of weights: download it again")
    if outside := next((name for name in shards.values() if Path(name).name != name), None):
        raise CheckpointError(
            f"{folder / INDEX} names {outside!r:.80}, which is not a file beside it: download it again"
        )
    return [INDEX, *sorted(set(shards.values()))]


def other_weights(folder: Path) -> list[str]:
    """Files of weights that are left alone."""
    return sorted(set(matching(folder, ("*.safetensors",))) - set(weight_names(folder)))


def matching(folder: Path, patterns: tuple[str, ...]) -> list[str]:
    """Names of the files of a folder that match one of the patterns."""
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; CheckpointError where it does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; save or download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds no configuration: {json.dumps(content):.40} where an object is expected ({{...}}); save or "
            "download it again"
        )
    return content


def refuse_other_layouts(folder: Path) -> None:
    """Raise CheckpointError, with the way out, where `folder` is or holds what another tool made."""
    _refuse_adapter(folder)
    if not (folder / "config.json").is_file() and not is_open_clip(folder):
        raise CheckpointError(f"{folder} {_seen(folder)}")


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter of PEFT, and no weights of a whole model."""
    return bool(matching(folder, ADAPTERS)) and not matching(folder, WHOLE)


def _refuse_adapter(folder: Path) -> None:
    """An adapter beside a whole model may be merged into it already, or not: nothing in the files tells."""
    if not (names := matching(folder, ADAPTERS)):
        return
    files = " and ".join(names)
    if is_adapter(folder):
        raise CheckpointError(f"{folder} holds an adapter ({files}) and no model: give the model that it was made for")
    raise CheckpointError(
        f"{folder} holds an adapter ({files}) beside a whole model. Nothing shows whether the model contains the "
        "adapter already. If it does not, move these files to a folder of their own, and set `path` to that folder and "
        f"`base: {folder}`. If it does, or to deploy the base, move them away"
    )


def _seen(folder: Path) -> str:
    """What a folder without config.json is, and the way to one that has it."""
    if (folder / PIPELINE).is_file():
        return f"is a diffusers pipeline ({PIPELINE}), not a dual encoder: give a CLIP checkpoint"
    inside = [path.parent for depth in ("*", "*/*", "*/*/*") for path in folder.glob(f"{depth}/config.json")]
    if inside:
        named = ", ".join(str(path.relative_to(folder)) for path in sorted(inside)[:SHOWN])
        return f"has no config.json, but {named} below it has one: give that folder as the path"
    if pickled := matching(folder, PICKLES):
        return (
            f"has no config.json, and {pickled[0]}: a training checkpoint or a state_dict. If it is from OpenAI or "
            "from open_clip's training, give the file itself as the path (for open_clip with `open_clip: "
            "ARCHITECTURE`). If not, load it into its transformers model, and run `model.save_pretrained(folder)` and "
            "`processor.save_pretrained(folder)`"
        )
    names = sorted(path.name for path in folder.iterdir())
    held = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "") or "nothing"
    return f"has no config.json, and holds {held}: give a folder that transformers' save_pretrained wrote"


def own_code(folder: Path) -> list[str]:
    """The JSON files that name code of the checkpoint's own (auto_map), which is never run here."""
    names = matching(folder, tuple(name for name in SETTINGS if name.endswith("config.json")))
    return [name for name in names if _names_code(read_object(folder / name))]


def _names_code(settings: Any) -> bool:
    """Whether settings, or those of a part of the model in them, hold an auto_map."""
    if not isinstance(settings, dict):
        return False
    return bool(settings.get("auto_map")) or any(_names_code(part) for part in settings.values())
