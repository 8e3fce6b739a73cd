"""SigLIP 2 NaFlex, whose images keep their proportions, from file to answer: patches, mask and arrangement."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from support import models
from support.fast_feed import need_fast_feed
from support.targets import packed
from transformers import AutoModel, AutoProcessor
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from clip_deploy.builders.fused import optimize
from clip_deploy.builders.onnx_export import export_onnx
from clip_deploy.builders.quantize import quantize
from clip_deploy.checkpoint.plain_modules import NaflexEmbeddings
from clip_deploy.core.artifact import build, read_target
from clip_deploy.core.config import (
    AccuracyBudget,
    BenchmarkConfig,
    EndToEndConfig,
    GatesConfig,
    OnnxConfig,
    OptimizeConfig,
    Precision,
    Quantization,
    QuantizeConfig,
    TritonConfig,
)
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.model import as_images
from clip_deploy.core.preprocessing import to_pixels
from clip_deploy.core.similarity import row_cosines
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate.diagnosis import diagnose
from clip_deploy.evaluate.embeddings import encode_set
from clip_deploy.evaluate.gates import gate_of
from clip_deploy.evaluate.validation import validate
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.preprocessing import read_preprocessing
from clip_deploy.onnx_graph.torch_module import GraphModule
from clip_deploy.runtimes import open_encoder
from clip_deploy.serving.repository import NoRepository, write_repository
from clip_deploy.timing.end_to_end import measure_feeds
from clip_deploy.timing.latency import measure


@pytest.fixture(scope="module")
def forms(naflex, naflex_sets):
    """The exported graphs, fused ones in FP32 and FP16, and INT8."""
    folder, calibration = naflex.parent, load_prepared(naflex_sets / "calibration")
    static = QuantizeConfig(method=Quantization.static, smooth_quant=0.5)

    exported, fused = folder / "onnx-fp32", folder / "ort-fp32"
    half = OptimizeConfig(precision=Precision.fp16)
    build(exported, lambda output: export_onnx(naflex, OnnxConfig(), output), None)
    build(fused, lambda output: optimize(exported, OptimizeConfig(), calibration, output), None)
    build(folder / "ort-fp16", lambda output: optimize(exported, half, calibration, output), None)
    build(folder / "ort-int8-static", lambda output: quantize(fused, static, calibration, [], 0, output), None)
    return folder


@pytest.mark.parametrize("source", [4, 16])
def test_positions_are_resized_as_transformers_does_it(source):
    config = models.naflex_config(words=8)
    config.vision_config.num_patches = source**2
    theirs = Siglip2VisionEmbeddings(config.vision_config)
    shapes = torch.tensor([[16, 16], [8, 32], [32, 8], [13, 19], [1, 200], [3, 80], [24, 10], [5, 5], [1, 1], [2, 3]])
    patches = torch.randn(len(shapes), 256, 3 * 8 * 8)
    expected, found = theirs(patches, shapes), NaflexEmbeddings(theirs)(patches, shapes)
    assert (expected - found).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (31, 33), (64, 48), (97, 211), (640, 480), (1000, 17)])
@pytest.mark.parametrize("patches", [(8, 16), (16, 256), (14, 100)])
def test_pixels_are_cut_as_transformers_cuts_them(size, patches):
    from transformers import Siglip2ImageProcessorPil

    processor = Siglip2ImageProcessorPil(patch_size=patches[0], max_num_patches=patches[1])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    found = read_preprocessing(processor)(image)
    expected = as_images(processor(image, return_tensors="np"), found.dtype)[0]
    for name in ("pixel_attention_mask", "spatial_shapes"):
        np.testing.assert_array_equal(found[name], expected[name])
    np.testing.assert_allclose(found["pixel_values"], expected["pixel_values"], atol=1e-6)
    rows, columns = expected["spatial_shapes"]
    pixels = to_pixels(found)
    assert pixels.shape == (3, rows * patches[0], columns * patches[0])
    top_left = found["pixel_values"][0].reshape(patches[0], patches[0], 3)
    np.testing.assert_array_equal(pixels[:, : patches[0], : patches[0]], top_left.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["torch-fp32", "onnx-fp32", "ort-fp32", "ort-fp16", "ort-int8-static"])
def test_a_form_is_judged_like_any_other(name, forms, naflex_sets):
    record = validate(
        forms / name,
        load_prepared(naflex_sets / "evaluation"),
        naflex_sets / "evaluation" / "reference.npz",
        GatesConfig(),
        seed=0,
    )
    assert record.measured is not None, record.reasons
    lowest = min(record.measured.parity["vision"].cosine_min, *record.measured.shapes.values())
    assert lowest > {"fp32": 0.999999, "fp16": 0.99999, "int8": 0.95}[name.split("-")[1]]


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_pytorch_runs_the_fused_graph_as_onnx_runtime_does(tower, forms):
    path = forms / "ort-fp32" / f"{tower}.onnx"
    feeds = onnx_file.random_feeds(path, read_target(path.parent).model.examples)
    found = GraphModule(onnx_file.load(path))(*map(torch.from_numpy, feeds.values()))
    np.testing.assert_allclose(found.detach().numpy(), onnx_file.run(path, feeds), atol=1e-5)


def test_what_a_target_loses_is_looked_for_on_its_worst_images(forms, naflex_sets):
    evaluation = load_prepared(naflex_sets / "evaluation")
    reference, actual = (encode_set(open_encoder(forms / name), evaluation) for name in ("ort-fp32", "ort-int8-static"))
    found = diagnose(forms / "ort-int8-static", evaluation, actual, reference, gate_of(GatesConfig(), "fp32"))
    assert {drop.tower for drop in found.drops} == {"vision", "text"}, found.notes


def test_int8_is_searched_for_within_a_budget(forms, naflex_sets, tmp_path):
    """Random weights, taken as trained ones."""
    source = forms / "ort-fp32"
    target = read_target(source)
    assert target.model.trained
    settings = QuantizeConfig(accuracy_budget=AccuracyBudget(max_top1_drop=100.0, max_flips=100.0))
    calibration = load_prepared(naflex_sets / "calibration")
    build(tmp_path / "int8", lambda output: quantize(source, settings, calibration, [], 0, output), None)
    searched = read_target(tmp_path / "int8").search
    assert {name.split(": ")[0] for name in searched.sensitivity} == {"vision", "text"}


def test_a_package_answers_as_transformers_does(forms, naflex_sets, tmp_path):
    """Pictures of any proportions, several in one batch."""
    (tmp_path / "package").mkdir()
    package = packed(forms / "onnx-fp32", naflex_sets, tmp_path / "package")
    classifier = ZeroShotClassifier.open(package, device="cpu")
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((9, 80), (64, 64), (70, 30))
    ]
    texts = ["a red circle", "two blue squares"]
    model, processor = AutoModel.from_pretrained(forms), AutoProcessor.from_pretrained(forms, backend="pil")
    words = processor(text=texts, padding="max_length", max_length=16, return_tensors="pt")
    with torch.inference_mode():
        output = model.eval()(**words, **processor.image_processor(pictures, return_tensors="pt"))
    expected = output.logits_per_image.sigmoid().numpy()
    assert row_cosines(classifier.embed_images(pictures), output.image_embeds.numpy()).min() > 0.999999
    for picture, row in zip(pictures, expected, strict=True):
        given = {found.text: found.probability for found in classifier.predict(picture, texts)}
        np.testing.assert_allclose([given[text] for text in texts], row, rtol=1e-4)
    made = write_repository(package, tmp_path, TritonConfig(), tmp_path / "triton")
    assert isinstance(made, NoRepository)
    assert "takes patches, their mask and their arrangement (SigLIP 2 NaFlex)" in made.unavailable


def test_it_is_timed(naflex, forms):
    record = measure(forms / "ort-fp32", naflex, BenchmarkConfig(batch_sizes=[2], threads=1, seconds=0.01, warmup=1))
    assert record.status == "measured", record.reason
    assert record.towers["vision"][2].p50_ms > 0


def test_it_is_fed_by_pillow_and_by_the_fast_feed_alone(naflex, forms, naflex_sets):
    need_fast_feed()
    benchmark = BenchmarkConfig(batch_sizes=[2], threads=1)
    settings = EndToEndConfig(images=3, passes=1, seconds=0.01)
    prepared = load_prepared(naflex_sets / "evaluation")
    found = measure_feeds(forms / "ort-fp32", naflex, prepared, benchmark, settings, GatesConfig(), 0)
    assert found.feeds["pil"].status == "measured", found.feeds["pil"]
    assert found.feeds["fast"].status == "measured", found.feeds["fast"]
    assert (
        found.feeds["torchvision"].reason == "only pil and fast cut images in their proportions into patches (NaFlex)"
    )


def test_a_graph_does_not_preprocess_it(naflex, tmp_path):
    said = "onnx.preprocess: Siglip2ImageProcessorPil cuts images into patches and keeps their proportions; a graph can"
    with pytest.raises(UnavailableError, match=re.escape(said)):
        export_onnx(naflex, OnnxConfig(preprocess=True), tmp_path)
