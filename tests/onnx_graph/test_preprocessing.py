import numpy as np
import onnx
import onnx_ir as ir
import pytest
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from clip_deploy.builders.fused import optimize
from clip_deploy.builders.quantize import quantize
from clip_deploy.checkpoint.load import load_processor
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import (
    Device,
    GateLimits,
    GatesConfig,
    OnnxConfig,
    OptimizeConfig,
    Precision,
    Quantization,
    QuantizeConfig,
)
from clip_deploy.core.environment import hardware
from clip_deploy.core.errors import ConfigError, UnavailableError
from clip_deploy.data import scenes
from clip_deploy.data.dataset import Dataset, Sample
from clip_deploy.data.preprocessed import load_prepared, write_prepared
from clip_deploy.evaluate.embeddings import encode_images, encode_set, save_embeddings
from clip_deploy.evaluate.validation import validate
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.pre_post import attach, detach
from clip_deploy.onnx_graph.preprocessing import (
    build_preprocessing,
    grey_levels,
    preprocessing_nodes,
    read_preprocessing,
)
from clip_deploy.runtimes import open_encoder
from clip_deploy.timing.latency_worker import prepare_call

SIZES = [(64, 64), (48, 48), (131, 97), (97, 131), (33, 50), (70, 200)]  # height, width: smaller, larger and odd
GATES = GatesConfig(
    *(GateLimits(min_cosine=cosine, max_flips=flips) for cosine, flips in ((0.9999, 1), (0.999, 1), (0.9, 9)))
)


@pytest.fixture(scope="module")
def whole(checkpoint, onnx_of):
    """The built-in model exported with its preprocessing."""
    return onnx_of(checkpoint, preprocess=True)


@pytest.fixture(scope="module")
def mixed(checkpoint, tmp_path_factory):
    """An evaluation set of images of several sizes, kept beside their pixel_values, and a calibration set without."""
    folder = tmp_path_factory.mktemp("mixed")
    rendered = [scenes.render("evaluation", index, index % len(scenes.CLASSES)) for index in range(48)]
    samples = [
        Sample(image.resize(SIZES[index % len(SIZES)][::-1]).copy, (scene.caption,), scene.label)
        for index, (image, scene) in enumerate(rendered)
    ]
    dataset = Dataset(samples, samples[:16], list(scenes.CLASSES), {"evaluation": [], "calibration": []})
    processor, model = load_processor(checkpoint), read_target(checkpoint).model
    for name in ("evaluation", "calibration"):
        (folder / name).mkdir()
        keep = name == "evaluation"
        write_prepared(name, dataset, ["a photo of a {}"], processor, model, folder / name, keep_images=keep)
    embeddings = encode_set(open_encoder(checkpoint), load_prepared(folder / "evaluation"))
    save_embeddings(embeddings, folder / "evaluation" / "reference.npz")
    return folder


def levels(processor, size):
    """Differences between the nodes and the processor on noise of one size, in grey levels."""
    settings = read_preprocessing(processor)
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    expected = processor(list(images), return_tensors="np", input_data_format="channels_last")["pixel_values"]
    shell = build_preprocessing(settings, list(expected.shape[-2:]))
    graph = ir.Graph([shell.image], [shell.front[-1].outputs[0]], nodes=shell.front, opset_imports={"": 18}, name="g")
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(model, full_check=True)
    used = {name for node in model.graph.node for name in node.input} | {model.graph.output[0].name}
    assert [node.name for node in model.graph.node if not used & {*node.output}] == []  # ONNX Runtime warns of each
    from onnxruntime import InferenceSession

    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    actual = session.run(None, {"images": images})[0]
    assert actual.shape == expected.shape
    return np.abs(grey_levels(actual, expected, settings.scale))


@pytest.mark.parametrize("size", [(120, 160), (160, 120), (64, 64), (31, 57), (47, 48), (1, 9)])
@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 49, "width": 64}),
        CLIPImageProcessorPil(do_resize=False, crop_size={"height": 50, "width": 51}),
        SiglipImageProcessorPil(size={"height": 130, "width": 90}),
        SiglipImageProcessorPil(size={"height": 130, "width": 90}, do_normalize=False),
        EfficientNetImageProcessorPil(size={"height": 60, "width": 60}, rescale_offset=True),
    ],
    ids=["crop", "crop that pads", "no resize", "both sides", "no normalisation", "rescale offset"],
)
def test_the_nodes_give_the_pixels_of_the_processor(processor, size):
    difference = levels(processor, size)
    assert difference.max() < 1.01
    assert (difference > 0.5).mean() < 0.002


def test_an_image_that_pillow_squashes_vertically_first_differs_by_its_rounding():
    assert levels(SiglipImageProcessorPil(size={"height": 64, "width": 64}), (300, 70)).mean() < 0.5


def test_bilinear_differs_by_two_levels_at_most():
    difference = levels(CLIPImageProcessorPil(size={"shortest_edge": 48}, resample=2), (64, 64))
    assert difference.max() < 2.01
    assert difference.mean() < 0.1


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (CLIPImageProcessorPil(resample=1), "CLIPImageProcessorPil resizes with resample lanczos; a graph can resize"),
        (CLIPImageProcessorPil(do_center_crop=False), "{'shortest_edge': 224} without do_center_crop"),
        (CLIPImageProcessorPil(size={"longest_edge": 224}), "resizes to size {'longest_edge': 224}"),
        (CLIPImageProcessorPil(do_pad=True), "CLIPImageProcessorPil pads"),
    ],
)
def test_an_option_that_onnx_cannot_express_is_named(processor, message):
    with pytest.raises(UnavailableError) as error:
        preprocessing_nodes(processor, [224, 224])
    assert message in str(error.value)


def test_a_processor_that_does_more_than_its_options_say_is_refused():
    class Mirrored(SiglipImageProcessorPil):
        def resize(self, image, *args, **kwargs):
            return super().resize(image, *args, **kwargs)[..., ::-1]

    with pytest.raises(UnavailableError, match="Mirrored does something else too"):
        preprocessing_nodes(Mirrored(), [224, 224])


def test_old_opsets_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"onnx\.opset is 17 with onnx\.preprocess: .* needs opset 18 or more"):
        OnnxConfig(opset=17, preprocess=True)


@pytest.mark.parametrize("settings", [{"opset": 18, "exporter": "torchscript"}, {"opset": 21}])
def test_any_exporter_and_opset_from_18_on_will_do(siglip, onnx_of, settings):
    from clip_deploy.core.config import Exporter

    exporter = Exporter(settings.get("exporter", "auto"))
    folder = onnx_of(siglip, settings["opset"], exporter=exporter, preprocess=True)
    onnx_file.check(folder / "vision.onnx")
    assert onnx_file.describe(folder / "vision.onnx").inputs == {"images": ["batch", "height", "width", 3]}
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 70, 3), dtype=np.uint8)
    pixels = load_processor(siglip).image_processor(list(images), return_tensors="np")["pixel_values"]
    expected = open_encoder(siglip).encode_images(pixels)
    assert np.abs(open_encoder(folder).encode_images(images) - expected).max() < 1e-2 * np.abs(expected).max()


def test_taking_the_shell_off_gives_the_tower_back(whole, onnx_target, tmp_path):
    shell = detach(whole / "vision.onnx", tmp_path / "bare.onnx")
    feeds = onnx_file.random_feeds(onnx_target / "vision.onnx", {})
    expected = onnx_file.run(onnx_target / "vision.onnx", feeds)
    assert np.array_equal(onnx_file.run(tmp_path / "bare.onnx", feeds), expected)
    attach(tmp_path / "bare.onnx", shell, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (whole / "vision.onnx").read_bytes()


TARGETS = {
    "fused": lambda source, sets, output: optimize(
        source, OptimizeConfig(), load_prepared(sets / "calibration"), output
    ),
    "half": lambda source, sets, output: optimize(
        source, OptimizeConfig(precision=Precision.fp16), load_prepared(sets / "calibration"), output
    ),
    "dynamic": lambda source, sets, output: quantize(
        source, QuantizeConfig(), load_prepared(sets / "calibration"), hardware().instruction_sets, 0, output
    ),
    "static": lambda source, sets, output: quantize(
        source,
        QuantizeConfig(method=Quantization.static, smooth_quant=0.5),
        load_prepared(sets / "calibration"),
        hardware().instruction_sets,
        0,
        output,
    ),
}


@pytest.mark.parametrize("kind", [None, *TARGETS])
def test_every_target_takes_images_and_passes_its_gate(whole, mixed, tmp_path, kind):
    folder = tmp_path / str(kind)
    if kind:
        build(folder, lambda output: TARGETS[kind](whole, mixed, output), Target("ort", "fp32"))
    record = validate(
        folder if kind else whole, load_prepared(mixed / "evaluation"), mixed / "evaluation" / "reference.npz", GATES, 0
    )
    assert record.status == "pass", record.reasons
    assert record.pixels.max_diff < 1.01
    assert record.pixels.mean_diff < 1e-3
    if kind in ("fused", "half"):
        assert record.graphs["vision"].fusion["attention"] == 4


@pytest.mark.gpu
def test_on_a_gpu_the_preprocessing_runs_there_too(whole, mixed, tmp_path):
    settings, calibration = OptimizeConfig(precision=Precision.fp16), load_prepared(mixed / "calibration")
    folder = tmp_path / "ort-cuda-fp16"
    build(folder, lambda output: optimize(whole, settings, calibration, output, Device.cuda), Target("ort", "fp16"))
    record = validate(folder, load_prepared(mixed / "evaluation"), mixed / "evaluation" / "reference.npz", GATES, 0)
    assert record.status == "pass", record.reasons
    assert set(record.placement["vision"].nodes) == {"CUDAExecutionProvider"}
    assert record.placement["vision"].graph


def test_half_precision_leaves_the_preprocessing_in_float32(whole, mixed, tmp_path):
    build(tmp_path / "half", lambda output: TARGETS["half"](whole, mixed, output), Target("ort", "fp16"))
    nodes = {node.name: node for node in onnx.load(tmp_path / "half" / "vision.onnx").graph.node}
    before = {node.name: node for node in onnx.load(whole / "vision.onnx").graph.node}
    kept = [name for name in before if name.startswith("preprocess/")]
    assert len(kept) > 10
    assert all(nodes[name] == before[name] for name in kept)


def test_images_of_several_sizes_are_encoded_in_their_order(whole, mixed):
    encoder, images = open_encoder(whole), load_prepared(mixed / "evaluation").images
    together = encode_images(encoder, images, 4)
    alone = np.concatenate([encoder.encode_images(images[row][None]) for row in range(len(images))])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_images_are_kept_without_loss_only_where_asked_for(mixed):
    images = load_prepared(mixed / "evaluation").images
    assert images[2].shape == (131, 97, 3)
    picture, _ = scenes.render("evaluation", 1, 1)
    assert np.array_equal(images[1], np.array(picture.resize((48, 48))))
    assert load_prepared(mixed / "calibration").images is None


def test_a_set_without_images_says_what_to_do(whole, sets):
    record = validate(whole, load_prepared(sets / "evaluation"), sets / "evaluation" / "reference.npz", GATES, 0)
    assert record.status == "fail"
    assert "run `dvc repro` with onnx.preprocess" in record.reasons[0]


def test_the_worker_times_images_of_the_size_asked_for():
    class Encoder:
        image_input = "images"

        def encode_images(self, images):
            return images

    request = {"tower": "vision", "batch": 2, "image_size": [48, 48], "photo_size": [30, 40]}
    images = prepare_call(Encoder(), request)()
    assert (images.dtype, images.shape) == (np.uint8, (2, 30, 40, 3))
