"""What later stages know of a checkpoint's model, so that they can do without transformers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from clip_deploy.core.errors import CheckpointError


@dataclass(frozen=True)
class TowerShape:
    """Transformer layers, heads of one of them (0 where they differ) and width of a token."""

    layers: int
    heads: int
    width: int


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from; `sha256` is over all its files (environment.fingerprint), or a single file's own.

    Attributes:
        parts: what it was put together from, where that is more than one folder: "adapter" and "base", which were
            merged, the "processor" that the model has from elsewhere, or a single file of weights, by its name.
    """

    repo_id: str | None
    revision: str | None
    sha256: str
    parts: dict[str, "Origin"] = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """A zero-shot head behind the image tower: one class a label, its text from the template."""

    labels: list[str]
    template: str


@dataclass(frozen=True)
class Finding:
    """One thing that is not as the family's checkpoints have it.

    Attributes:
        code: one of lint.CODES, by which an error can be allowed.
        severity: "error" where answers are wrong, "warning" where they may be or others will stumble.
        consequence: what happens if nothing is changed.
        allowed: an error that model.allow names.
    """

    code: str
    severity: str
    found: str
    expected: str
    consequence: str
    allowed: bool = False

    def __str__(self) -> str:
        mark = f"{self.severity}, allowed" if self.allowed else self.severity
        return f"{self.code} ({mark}): {self.found}; expected {self.expected}. {self.consequence}"


@dataclass(frozen=True)
class Model:
    """A dual encoder. The defaults are those of a target that could not be built.

    Attributes:
        model_type: transformers' word for it.
        image_size: [height, width] of pixel_values; empty where an image is patches.
        patches: [patches, values of one] of an image that keeps its proportions (SigLIP 2 NaFlex), padded to so many
            patches; empty for all other models.
        context_length: tokens of the longest text.
        positions: tokens that the text tower has positions for.
        pad_to_context: whether every text is padded to the context.
        text_inputs: names of the text tower's inputs.
        example_texts: three tokenised texts of different length, by input.
        trained: False for random weights.
        left_out: weights beside the checkpoint's that were not taken.
        normalize: whether the graphs give embeddings of unit length.
        operations: by tower, how often each operation that can be fused occurs (fusions.KINDS).
    """

    model_type: str = ""
    image_size: list[int] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)
    context_length: int = 0
    positions: int = 0
    pad_to_context: bool = False
    text_inputs: list[str] = field(default_factory=list)
    example_texts: dict[str, list[list[int]]] = field(default_factory=dict)
    towers: dict[str, TowerShape] = field(default_factory=dict)
    trained: bool = True
    checkpoint: Origin | None = None
    left_out: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    normalize: bool = False
    classifier: Head | None = None
    operations: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def image_dtype(self) -> np.dtype[Any]:
        """Of one image as the tower takes it: float32 [3, height, width], or a record with an input in each field."""
        return image_dtype(self.image_size, self.patches)

    @property
    def image_inputs(self) -> list[str]:
        """Names of the image tower's inputs."""
        return list(self.image_dtype.names or ["pixel_values"])

    @property
    def examples(self) -> dict[str, list[Any]]:
        """Whole numbers that both towers take for three texts and three images, by input."""
        if not self.patches:
            return self.example_texts
        count, side = self.patches[0], math.isqrt(self.patches[0])
        shapes = [[side, side], [1, count], [side, max(1, side // 2)]]
        masks = [[int(patch < rows * columns) for patch in range(count)] for rows, columns in shapes]
        return {**self.example_texts, "pixel_attention_mask": masks, "spatial_shapes": shapes}

    def bare(self) -> "Model":
        """The same without what stands around the towers in a graph."""
        return replace(self, normalize=False, classifier=None)


def image_dtype(image_size: list[int], patches: list[int]) -> np.dtype[Any]:
    """Model.image_dtype of these sizes."""
    if not patches:
        return np.dtype((np.float32, (3, *image_size)))
    count, values = patches
    fields = [
        ("pixel_values", np.float32, (count, values)),
        ("pixel_attention_mask", np.int64, (count,)),  # 1 for a patch, 0 for padding
        ("spatial_shapes", np.int64, (2,)),  # rows and columns of patches
    ]
    return np.dtype(fields, align=True)


def random_images(count: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Noise of deviation 1 in a model's image_dtype, always the same; where an image is patches, in a square."""
    images = np.zeros(count, dtype)
    pixels = images
    if dtype.names:
        side = math.isqrt(dtype["pixel_attention_mask"].shape[0])
        images["pixel_attention_mask"][:, : side * side] = 1
        images["spatial_shapes"] = side
        pixels = images["pixel_values"]
    pixels[:] = np.random.default_rng(0).normal(size=pixels.shape)
    return images


def as_images(made: Mapping[str, Any], dtype: np.dtype[Any]) -> np.ndarray:
    """What an image processor of transformers made of some images, [images] in a model's image_dtype."""
    if dtype.names is None:
        return np.ascontiguousarray(made["pixel_values"], dtype=np.float32)
    images = np.zeros(len(made["pixel_values"]), dtype)
    for name in dtype.names:
        images[name] = made[name]
    return images


def image_feed(images: Any) -> dict[str, Any]:
    """An image tower's inputs by name, in their order, of [images] in its image_dtype; a tensor is left as it is."""
    names = getattr(images.dtype, "names", None)
    if names is None:
        return {"pixel_values": images}
    return {name: np.ascontiguousarray(images[name]) for name in names}


FIRST_TOKEN = ("flava",)  # gives a row for each token, of which FlavaForPreTraining compares the first


def embeddings(model: Any, method: str, **inputs: Any) -> Any:
    """What `method`, get_image_features or get_text_features, makes of `inputs`: [batch, width], not normalised.

    Raises CheckpointError where it gives no embedding.
    """
    try:
        rows = getattr(model, method)(**inputs).pooler_output
    except AttributeError as error:  # of a tower without pooling, in a VisionTextDualEncoderModel
        raise CheckpointError(
            f"{method} of {type(model).__name__} fails in transformers itself: {error}; give a model whose towers pool"
        ) from error
    if rows is not None and model.config.model_type in FIRST_TOKEN:
        rows = rows[:, 0]
    if rows is None or rows.dim() != 2:
        made = "no pooler_output" if rows is None else f"a pooler_output of shape {list(rows.shape)}"
        raise CheckpointError(
            f"{method} of {type(model).__name__} gives {made}: one embedding [width] of each image and text is needed"
        )
    return rows
