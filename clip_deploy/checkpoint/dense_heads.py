"""Dense heads of sentence-transformers: merged into the projections in front of them.

A head without bias and activation is a matrix: its product with a projection takes the projection's place.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from clip_deploy.checkpoint.layout import WEIGHTS, read_object
from clip_deploy.checkpoint.load import describe, load_model
from clip_deploy.checkpoint.trial import apart, embed, load_whole, trial_inputs
from clip_deploy.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

PROJECTIONS = ("visual_projection", "text_projection")


def weights_of(head: Path) -> "Tensor":
    """A Dense head's matrix, float32 [out, in]; CheckpointError where there is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (head / WEIGHTS).is_file():
        raise CheckpointError(f"{head} lacks {WEIGHTS}: load the model once with sentence-transformers, and save it")
    try:
        weights = load_file(head / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{head / WEIGHTS} is not a safetensors file ({error}): download it again") from error
    if set(weights) != {"linear.weight"} or weights["linear.weight"].dim() != 2:
        held = ", ".join(sorted(weights)) or "nothing"
        raise CheckpointError(f"{head / WEIGHTS} holds {held}: a linear.weight is needed")
    found: Tensor = weights["linear.weight"].float()
    return found


def fold(folder: Path, heads: list[Path], output: Path) -> str:
    """Write into `output`, which has the processor already, the model with its Dense heads in both projections.

    Returns what was done, in words. Raises CheckpointError where the model has no such projections.
    """
    from torch.nn import Linear

    shutil.copyfile(folder / "config.json", output / "config.json")
    model = load_whole(folder)
    inputs = trial_inputs(describe(output), model)
    expected = embed(model, inputs)
    layers = [getattr(model, name, None) for name in PROJECTIONS]
    for head in heads:
        matrix = weights_of(head)
        for layer in layers:
            if not isinstance(layer, Linear) or layer.bias is not None or layer.out_features != matrix.shape[1]:
                raise CheckpointError(
                    f"{head} takes {matrix.shape[1]} values, and {folder} has no projections without bias of that "
                    f"width ({' and '.join(PROJECTIONS)}) that it could become part of"
                )
            layer.weight.data = (matrix.double() @ layer.weight.data.double()).float()
            layer.out_features = len(matrix)
        expected = [rows @ matrix.T for rows in expected]
    model.save_pretrained(output)
    config = read_object(folder / "config.json") | {"projection_dim": len(matrix)}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if (difference := max(apart(expected, embed(load_model(output), inputs)))) > 1e-5:
        raise CheckpointError(
            f"{folder} gives other embeddings with its Dense head in the projections (1 - cosine is {difference:.2g}): "
            "this version does not know what follows them in this model"
        )
    return f"{len(heads)} Dense in the projections, {len(matrix)} values"
