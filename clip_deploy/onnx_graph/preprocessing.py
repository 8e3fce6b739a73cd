"""A checkpoint's image preprocessing as ONNX nodes: resize, centre crop, rescale and normalise, from uint8 RGB images.

Pillow, which transformers' processor calls, resizes 8-bit images in fixed point and rounds after each axis. So does
ONNX Runtime's antialiased Resize of uint8, if it leaves out what lies outside (exclude_outside) and its cubic has
Pillow's coefficient: of noise, one pixel in a thousand differs (bilinear: one in a hundred), by one grey level. In
float32, with or without rounding, five times as many to a fifth of all differ. Pillow 13 begins with the vertical axis
where an image is shrunk much more in height than in width; ONNX Runtime always with the horizontal one, so that there
a fifth of the pixels of noise differ.
"""

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from clip_deploy.core.errors import DataError, UnavailableError
from clip_deploy.core.preprocessing import Preprocessing
from clip_deploy.core.records import PixelParity
from clip_deploy.data.preprocessed import Prepared, batches
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.pre_post import PREPROCESSING_PREFIX, Nodes, PrePost

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

IMAGES, PIXELS = "images", "pixel_values"
SCALE = f"{PREPROCESSING_PREFIX}grey_level"  # what one grey level is worth in pixel_values, by channel
BATCH = 8  # images of one size in one call

BILINEAR, BICUBIC = 2, 3  # Pillow's numbers
FILTERS: dict[int, dict[str, Any]] = {BILINEAR: {"mode": "linear"}, BICUBIC: {"mode": "cubic", "cubic_coeff_a": -0.5}}
FILTER_NAMES = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming"}  # of Pillow; ONNX has no antialiased one like them
PROBES = ((61, 83), (130, 97))  # height and width of the images on which the nodes are held against the processor
CLOSE = 1.0  # mean difference in grey levels that passes: a crop one pixel aside gives tens


def preprocessing_nodes(processor: "BaseImageProcessor", image_size: list[int]) -> PrePost:
    """Nodes that turn `images` (uint8 [batch, height, width, 3], RGB, of any size) into what the processor gives.

    Args:
        processor: the checkpoint's own, the one that calls Pillow.
        image_size: [height, width] of pixel_values.

    Raises:
        UnavailableError: the processor has an option that ONNX cannot express, or gives other pixels than the nodes.
    """
    try:
        settings = read_preprocessing(processor)
    except UnavailableError as error:
        raise _unavailable(str(error)) from error
    if settings.max_patches:
        raise _unavailable(f"{type(processor).__name__} cuts images into patches and keeps their proportions")
    pre_post = build_preprocessing(settings, image_size)
    _hold_against(processor, settings, image_size)
    return pre_post


def read_preprocessing(processor: "BaseImageProcessor", filters: Collection[int] = tuple(FILTERS)) -> Preprocessing:
    """Raises UnavailableError naming the option that is none of those that Preprocessing holds, with these filters."""
    name = type(processor).__name__
    if hasattr(processor, "preprocessing"):
        return _stated(name, processor.preprocessing, filters)
    if getattr(processor, "max_num_patches", None):
        return _patching(name, processor, filters)
    size, crop = dict(processor.size or {}), dict(processor.crop_size or {})
    if getattr(processor, "do_pad", None):
        raise UnavailableError(f"{name} pads (do_pad)")
    resample = None
    if processor.do_resize:
        resample = int(BILINEAR if processor.resample is None else processor.resample)
        if resample not in filters:
            raise UnavailableError(f"{name} resizes with resample {FILTER_NAMES.get(resample, resample)}")
        if set(size) not in ({"shortest_edge"}, {"height", "width"}):
            raise UnavailableError(f"{name} resizes to size {size}")
    cropped = bool(getattr(processor, "do_center_crop", False))
    if "shortest_edge" in size and processor.do_resize and not cropped:
        raise UnavailableError(f"{name} resizes to size {size} without do_center_crop")
    return Preprocessing(
        size={name: int(side) for name, side in size.items()} if processor.do_resize else None,
        crop=[crop["height"], crop["width"]] if cropped else None,
        resample=resample,
        **_scaling(processor),
    )


def _scaling(processor: "BaseImageProcessor") -> dict[str, Any]:
    """Of Preprocessing, what becomes of a grey level."""
    black, white = (_middle(processor, level) for level in (0, 255))
    deviation = 1 / (white - black)
    return {
        "rescale_factor": 1 / 255,
        "image_mean": [float(value) for value in -black * deviation],
        "image_std": [float(value) for value in deviation],
    }


def _patching(name: str, processor: "BaseImageProcessor", filters: Collection[int]) -> Preprocessing:
    """Of SigLIP 2 NaFlex's."""
    resample = int(BILINEAR if processor.resample is None else processor.resample)
    if not processor.do_resize or resample not in filters:
        how = f"with resample {FILTER_NAMES.get(resample, resample)}" if processor.do_resize else "nothing (do_resize)"
        raise UnavailableError(f"{name} resizes {how}")
    return Preprocessing(
        size=None,
        crop=None,
        resample=resample,
        **_scaling(processor),
        patch_size=int(processor.patch_size),
        max_patches=int(processor.max_num_patches),
    )


def _stated(name: str, settings: Preprocessing | None, filters: Collection[int]) -> Preprocessing:
    """Of a processor that says itself what it does."""
    if settings is None:
        raise UnavailableError(f"{name} resizes to an edge of images that are no squares")
    if settings.resample is not None and settings.resample not in filters:
        raise UnavailableError(f"{name} resizes with resample {FILTER_NAMES.get(settings.resample, settings.resample)}")
    return settings


def _unavailable(what: str) -> UnavailableError:
    filters = "bilinear and bicubic"
    return UnavailableError(
        f"onnx.preprocess: {what}; a graph can resize ({filters}) to a shortest or longest edge with a centre crop or "
        "to a height and width, rescale and normalise: set onnx.preprocess: false and preprocess before the graph"
    )


def _middle(processor: "BaseImageProcessor", level: int) -> np.ndarray:
    """What a grey level becomes in each channel, [3]: rescaling and normalisation in whatever way."""
    image = np.full((256, 256, 3), level, dtype=np.uint8)
    pixels = processor(image, return_tensors="np", input_data_format="channels_last")[PIXELS][0]
    middle = pixels[0, -3:] if pixels.ndim == 2 else pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2]
    found: np.ndarray = middle.astype(np.float64)
    return found


def build_preprocessing(settings: Preprocessing, image_size: list[int]) -> PrePost:
    """The nodes of `settings`; pixel_values become float32 [batch, 3, *image_size]."""
    nodes = Nodes(PREPROCESSING_PREFIX)
    images = ir.Value(
        name=IMAGES, type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape(["batch", "height", "width", 3])
    )
    pixels = nodes.add("Transpose", [images], perm=[0, 3, 1, 2])
    if settings.resample is not None:
        pixels = _resized(nodes, settings, images, pixels)
    if settings.crop is not None:
        pixels = _cropped(nodes, settings, settings.crop, pixels)
    levels = nodes.add("Cast", [pixels], to=ir.DataType.FLOAT)
    scale, offset = (nodes.constant(part.reshape(1, 3, 1, 1), np.float32) for part in (settings.scale, settings.offset))
    scale.name = SCALE
    affine = nodes.add("Add", [nodes.add("Mul", [levels, scale]), offset])
    result = nodes.add("Reshape", [affine, nodes.constant([-1, 3, *image_size])])  # says the size to shape inference
    result.name, result.dtype, result.shape = PIXELS, ir.DataType.FLOAT, ir.Shape(["batch", 3, *image_size])
    return PrePost(front=nodes.made, image=images)


def _resized(nodes: Nodes, settings: Preprocessing, images: ir.Value, pixels: ir.Value) -> ir.Value:
    assert settings.size is not None  # the caller saw it
    assert settings.resample is not None
    if "height" in settings.size:
        size = nodes.constant([settings.size["height"], settings.size["width"]])
    elif "longest_edge" in settings.size:
        size = _longest(nodes, nodes.add("Shape", [images], start=1, end=3), settings.size["longest_edge"])
    else:
        given = nodes.add("Shape", [images], start=1, end=3)
        product = nodes.add("Mul", [given, nodes.constant([settings.size["shortest_edge"]])])
        size = nodes.add("Div", [product, nodes.add("ReduceMin", [given])])  # integers: it cuts, as the processor does
    batch = nodes.add("Shape", [images], start=0, end=1)
    whole = nodes.add("Concat", [batch, nodes.constant([3]), size], axis=0)
    return nodes.add(
        "Resize",
        [pixels, None, None, whole],
        antialias=1,
        exclude_outside=1,
        coordinate_transformation_mode="half_pixel",
        **FILTERS[settings.resample],
    )


def _longest(nodes: Nodes, given: ir.Value, edge: int) -> ir.Value:
    """Height and width with the longest edge as asked for: in float64 and to the even number, as Python rounds."""
    sides = nodes.add("Cast", [given], to=ir.DataType.DOUBLE)
    ratio = nodes.add("Div", [nodes.add("ReduceMax", [sides]), nodes.constant([edge], np.float64)])
    return nodes.add("Cast", [nodes.add("Round", [nodes.add("Div", [sides, ratio])])], to=ir.DataType.INT64)


def _may_be_smaller(settings: Preprocessing) -> bool:
    """Whether an image can be smaller than the crop, so that the processor pads it."""
    assert settings.crop is not None  # the caller saw it
    if settings.size is None or "longest_edge" in settings.size:
        return True
    least = [settings.size.get(name, settings.size.get("shortest_edge", 0)) for name in ("height", "width")]
    return any(side < wanted for side, wanted in zip(least, settings.crop, strict=True))


def _cropped(nodes: Nodes, settings: Preprocessing, crop: list[int], pixels: ir.Value) -> ir.Value:
    """The middle; of an odd rest, settings.crop_rounding says on which side a pixel more is cut and padded."""
    wanted, down = nodes.constant(crop), settings.crop_rounding == "down"
    if _may_be_smaller(settings):
        nothing = nodes.constant([0, 0])
        size = nodes.add("Shape", [pixels], start=2, end=4)
        missing = nodes.add("Max", [nodes.add("Sub", [wanted, size]), nothing])
        more = nodes.add("Add", [missing, nodes.constant([1])]) if down else missing
        before = nodes.add("Div", [more, nodes.constant([2])])
        after = nodes.add("Sub", [missing, before])
        pads = nodes.add("Concat", [nothing, before, nothing, after], axis=0)
        pixels = nodes.add("Pad", [pixels, pads, nodes.constant(settings.fill, np.uint8)])
    size = nodes.add("Shape", [pixels], start=2, end=4)
    rest = nodes.add("Sub", [size, wanted])
    start = nodes.add("Div", [rest, nodes.constant([2])]) if down else _half_to_even(nodes, rest)
    end = nodes.add("Add", [start, wanted])
    return nodes.add("Slice", [pixels, start, end, nodes.constant([2, 3])])


def _half_to_even(nodes: Nodes, rest: ir.Value) -> ir.Value:
    half = nodes.add("Mul", [nodes.add("Cast", [rest], to=ir.DataType.FLOAT), nodes.constant([0.5], np.float32)])
    return nodes.add("Cast", [nodes.add("Round", [half])], to=ir.DataType.INT64)


def _hold_against(processor: "BaseImageProcessor", settings: Preprocessing, image_size: list[int]) -> None:
    """Raise UnavailableError where the nodes give other pixels of noise: the processor does what its options hide."""
    pre_post = build_preprocessing(settings, image_size)
    assert pre_post.image is not None  # build_preprocessing made it
    graph = ir.Graph(
        [pre_post.image],
        [pre_post.front[-1].outputs[0]],
        nodes=pre_post.front,
        opset_imports={"": 18},
        name="preprocess",
    )
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preprocessing.onnx"
        onnx_file.save(ir.Model(graph, ir_version=10), path)
        for size in PROBES if settings.resample is not None else [image_size]:
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            expected = processor(image, return_tensors="np", input_data_format="channels_last")[PIXELS]
            actual = onnx_file.run(path, {IMAGES: image[None]})
            if (
                expected.shape != actual.shape
                or not np.abs(grey_levels(actual, expected, settings.scale)).mean() < CLOSE
            ):
                raise _unavailable(f"{type(processor).__name__} does something else too")


def pixel_parity(path: Path, prepared: Prepared) -> PixelParity:
    """Hold the preprocessing of the graph in `path` against the prepared pixel_values.

    Pixels, by channel, differ where half a unit of 1/255 or more lies between them.
    """
    if prepared.images is None:
        raise DataError("the prepared set holds no images: run `dvc repro` with onnx.preprocess")
    model, scale = front_of(path)
    session = onnx_file.open_session(ir.to_proto(model).SerializeToString())
    largest, total, differing, count = 0.0, 0.0, 0, 0
    for group in prepared.images.by_size():
        for part in batches(len(group), BATCH):
            rows = group[part]
            actual = session.run(None, {IMAGES: np.stack([prepared.images[row] for row in rows])})[0]
            difference = np.abs(grey_levels(actual, prepared.pixel_values[rows], scale))
            largest, total = max(largest, float(difference.max())), total + float(difference.sum())
            differing, count = differing + int((difference >= 0.5).sum()), count + difference.size
    return PixelParity(largest, mean_diff=total / count, differing_percent=100 * differing / count)


def grey_levels(actual: np.ndarray, expected: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Difference of pixel_values [images, 3, height, width] in units of 1/255 before normalisation."""
    found: np.ndarray = (actual.astype(np.float64) - expected) / scale.reshape(1, 3, 1, 1)
    return found


def front_of(path: Path) -> tuple[ir.Model, np.ndarray]:
    """The preprocessing of a graph as a model of its own, images -> pixel_values, and its `scale`."""
    model = onnx_file.load(path)
    graph = model.graph
    front = [node for node in graph if str(node.name).startswith(PREPROCESSING_PREFIX)]
    scale = next(node for node in front if node.outputs[0].name == SCALE).attributes["value"].as_tensor().numpy()
    graph.remove(front)
    images = graph.inputs.pop(0)
    opsets = dict(graph.opset_imports)
    own = ir.Graph([images], [front[-1].outputs[0]], nodes=front, opset_imports=opsets, name="preprocess")
    return ir.Model(own, ir_version=model.ir_version), scale
