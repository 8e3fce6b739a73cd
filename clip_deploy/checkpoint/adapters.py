"""Adapters of PEFT (LoRA and its like): merged into the model that they were made for, by PEFT itself.

What comes out is a checkpoint of transformers like any other, whose embeddings are held against those of the adapter at
work beside its base.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from clip_deploy.checkpoint.layout import ADAPTER, read_object
from clip_deploy.checkpoint.load import describe, load_model
from clip_deploy.checkpoint.trial import apart, embed, load_whole, some, trial_inputs
from clip_deploy.core.errors import CheckpointError, one_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
FILES = (ADAPTER, WEIGHTS)
# Kinds that hold no change of weights: tokens put before a layer's input, or several adapters that take turns.
NOT_MERGEABLE = {
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE", "ADAPTION_PROMPT"),
    *("XLORA", "POLY", "ARROW"),
}
SAME = 1e-5  # 1 - cosine, between the adapter at work and merged


def check_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter that can be merged: what it shows is said before weights are fetched.

    Raises CheckpointError where it cannot, or where peft is not installed.
    """
    if not (folder / ADAPTER).is_file():
        raise CheckpointError(f"{folder} holds weights of an adapter without {ADAPTER}: copy that file here too")
    settings = read_object(folder / ADAPTER)
    kind, rank = settings.get("peft_type"), settings.get("r")
    if isinstance(kind, str) and kind in NOT_MERGEABLE:
        raise CheckpointError(
            f"{folder} holds an adapter of the kind {kind}, which changes no weights of its base and cannot be merged "
            "into it: give a LoRA or a similar adapter"
        )
    if isinstance(rank, int) and rank < 1:
        raise CheckpointError(
            f"{folder} holds an adapter of rank {rank} (r in {ADAPTER}), which changes nothing: give the trained "
            "adapter, or deploy the base"
        )
    if settings.get("layer_replication"):
        raise CheckpointError(
            f"{folder} holds an adapter that repeats layers of its base (layer_replication in {ADAPTER}): merge it "
            "yourself, and give the merged model"
        )
    try:
        import peft  # noqa: F401 - it is asked for here, so that nothing is fetched in vain
    except ImportError as error:
        raise CheckpointError(
            f"{folder} holds an adapter. The library peft merges it into its base: install peft with `.venv/bin/pip "
            f"install '.[peft]'` ({one_line(error)})"
        ) from error
    return settings


def check_weights(folder: Path) -> None:
    """Raise CheckpointError where the adapter's weights are missing, pickled, truncated, or of rank 0."""
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        what = (
            "adapter_model.bin alone is there, a pickle, which can run code when loaded" if pickled else "it is missing"
        )
        raise CheckpointError(
            f"{folder} holds an adapter whose weights belong in {WEIGHTS}, and {what}: if you trust it, load it once "
            "and run `model.save_pretrained(folder)`"
        )
    if not (shapes := _shapes(folder / WEIGHTS)):
        raise CheckpointError(f"{folder / WEIGHTS} holds no weights: save the adapter again")
    if empty := next((name for name, shape in shapes.items() if 0 in shape), None):
        raise CheckpointError(f"{folder / WEIGHTS}: {empty} is empty, of shape {shapes[empty]}: save the adapter again")


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="numpy") as content:
            return {name: content.get_slice(name).get_shape() for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated, or not a safetensors file ({error}): download it again") from error


def merge(adapter: Path, base: Path, output: Path) -> str:
    """Write into `output`, which has the processor already, the base with the adapter merged.

    Returns what was merged, in words.

    Raises CheckpointError where the adapter was not made for that base, or changes nothing in it.
    """
    model = load_whole(base)
    shutil.copyfile(base / "config.json", output / "config.json")
    inputs = trial_inputs(describe(output), model)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with _library_errors(adapter), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = _adapted(adapter, model)
        expected = embed(adapted, inputs)
        merged = adapted.merge_and_unload(safe_merge=True)
        merged.save_pretrained(output)
    shutil.copyfile(base / "config.json", output / "config.json")  # as it stands: the linter reads what it leaves out
    changed = [name for name, value in merged.state_dict().items() if name not in own or not value.equal(own[name])]
    if not changed:
        raise CheckpointError(
            f"{adapter} holds an adapter that changes nothing in its base. All that it adds is zero, as before "
            "training: give the trained adapter, or deploy the base"
        )
    if (difference := max(apart(expected, embed(load_model(output), inputs)))) > SAME:
        # PEFT wraps a layer that its module does not call, as PyTorch's own attention does not call its out_proj
        raise CheckpointError(
            f"{adapter} holds an adapter that gives other embeddings once it is merged (1 - cosine is "
            f"{difference:.2g}): one of its target_modules is not run as a layer of its own: train without it"
        )
    settings = read_object(adapter / ADAPTER)
    rank = f" of rank {settings['r']}" if isinstance(settings.get("r"), int) else ""
    parts = sorted({name.split(".")[0] for name in changed})
    return f"{settings.get('peft_type')}{rank} merged into {len(changed)} weights ({', '.join(parts)})"


def _adapted(folder: Path, model: "PreTrainedModel") -> "PeftModel":
    """The base with the adapter at work in it, and each of the adapter's weights in its place."""
    from peft import PeftModel, get_peft_model_state_dict

    adapted = PeftModel.from_pretrained(model, str(folder), torch_device="cpu").eval()
    given = set(_shapes(folder / WEIGHTS))
    places = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    way = "it was made for another base; name that one with `base:` (a folder or id) in the model's file in conf/model/"
    if left := sorted(given - places):
        raise CheckpointError(f"{folder} holds an adapter that does not fit its base: no place for {some(left)}: {way}")
    if empty := sorted(places - given):
        raise CheckpointError(
            f"{folder} holds an adapter that does not fit its base: nothing for {some(empty)}: {way}, or, if it was "
            f"trained on one tower alone, let target_modules in {ADAPTER} name the modules of that tower"
        )
    return adapted


@contextmanager
def _library_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # whatever peft and torch meet in its files
        raise CheckpointError(
            f"{folder} holds an adapter that cannot be merged into its base. Perhaps it was trained on another base: "
            f"{one_line(error)}"
        ) from error
