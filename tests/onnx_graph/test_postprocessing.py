"""Targets whose graphs preprocess, normalise and classify, from the export to the gate."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from PIL import Image
from support.project import ROOT

from clip_deploy.builders.fused import optimize
from clip_deploy.builders.quantize import quantize
from clip_deploy.checkpoint.load import load_processor
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import (
    AccuracyBudget,
    DataConfig,
    Device,
    GateLimits,
    GatesConfig,
    OptimizeConfig,
    Precision,
    Provider,
    Quantization,
    QuantizeConfig,
)
from clip_deploy.core.environment import hardware
from clip_deploy.core.records import HeadAgreement
from clip_deploy.data.dataset import load
from clip_deploy.data.preprocessed import load_prepared, write_prepared
from clip_deploy.evaluate.validation import validate
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.torch_module import GraphModule
from clip_deploy.runtimes import open_encoder

HERE = hardware().instruction_sets  # INT8 made for another CPU saturates on one without VNNI
GATES = GatesConfig(
    fp32=GateLimits(min_cosine=0.9999, max_flips=0.2),
    fp16=GateLimits(min_cosine=0.999, max_flips=2),
    int8=GateLimits(min_cosine=0.95, max_top1_drop=4, max_flips=8),
)
LABELS = ["small red circle", "large blue square", "small green triangle"]
TEMPLATE = "a photo of a {}"


@pytest.fixture(scope="module")
def images(checkpoint, sets, tmp_path_factory):
    """The evaluation set with its images kept."""
    folder = tmp_path_factory.mktemp("images") / "evaluation"
    folder.mkdir()
    data = DataConfig(evaluation_samples=96, calibration_samples=16, templates=[TEMPLATE, "a {}"])
    model, processor = read_target(checkpoint).model, load_processor(checkpoint)
    write_prepared("evaluation", load(data, 0), data.templates, processor, model, folder, keep_images=True)
    shutil.copy(sets / "evaluation" / "reference.npz", folder)
    return folder


@pytest.fixture(scope="module")
def labels(images):
    return load_prepared(images).contents.classes


@pytest.fixture(scope="module")
def exported(checkpoint, labels, onnx_of):
    return onnx_of(checkpoint, preprocess=True, normalize=True, classifier=labels, template=TEMPLATE)


@pytest.fixture(scope="module")
def fused(exported, sets, tmp_path_factory):
    folder, calibration = tmp_path_factory.mktemp("whole") / "ort-fp32", load_prepared(sets / "calibration")
    build(folder, lambda output: optimize(exported, OptimizeConfig(), calibration, output), Target("ort", "fp32"))
    return folder


def check(folder, images):
    record = validate(folder, load_prepared(images), images / "reference.npz", GATES, 0)
    assert record.status == "pass", record.reasons
    return record


def test_the_exported_graph_takes_images_and_gives_unit_embeddings_and_probabilities(exported, images, labels):
    record = check(exported, images)
    graph = record.graphs["vision"]
    assert graph.inputs == {"images": ["batch", "height", "width", 3]}
    assert list(graph.outputs) == ["image_embeds", "probabilities"]
    assert graph.outputs["image_embeds"] == ["batch", 64]
    assert record.graphs["text"].outputs == {"text_embeds": ["batch", 64]}
    assert graph.outputs["probabilities"] == ["batch", len(labels)]
    assert record.measured.classifier == HeadAgreement(labels=len(labels), agreement_percent=100.0)
    assert record.pixels.max_diff <= 1.01
    assert record.measured.parity["vision"].max_abs_diff < 1e-2
    known = {item.key: item.value for item in onnx.load(exported / "vision.onnx").metadata_props}
    assert json.loads(known["labels"]) == labels


def test_fusion_sees_the_encoder_through_what_is_around_it(fused, images):
    record = check(fused, images)
    assert record.graphs["vision"].fusion["attention"] == 4
    assert record.graphs["vision"].fusion["attention_expected"] == 4
    assert record.graphs["vision"].outputs["image_embeds"] == ["batch", 64]
    assert record.measured.classifier.agreement_percent == 100


def test_fp16_keeps_what_is_around_the_encoder_in_fp32(exported, images, sets, tmp_path):
    settings, calibration = OptimizeConfig(precision=Precision.fp16), load_prepared(sets / "calibration")
    folder = tmp_path / "ort-fp16"
    build(folder, lambda output: optimize(exported, settings, calibration, output), Target("ort", "fp16"))
    record = check(folder, images)
    assert record.pixels.max_diff <= 1.01
    assert record.measured.classifier.agreement_percent > 98


def test_what_pytorch_runs_with_our_kernels_is_the_encoder_alone(exported, sets, tmp_path):
    settings = OptimizeConfig(precision=Precision.fp16, provider=Provider.torch, skip_layer_norm=True)
    target = optimize(exported, settings, load_prepared(sets / "calibration"), tmp_path, Device.cuda)
    assert (target.runtime, target.precision, target.device) == ("fused", "fp16", "cuda")
    assert (target.image_input, target.model.normalize, target.model.classifier) == ("pixel_values", False, None)
    steps = [step.call for step in GraphModule(ir.load(tmp_path / "vision.onnx")).steps]
    named = [getattr(call, "func", call).__name__ for call in steps]
    layers = target.model.towers["vision"].layers
    assert [named.count(name) for name in ("patchify", "attention")] == [1, layers - 1]  # the last takes one query
    assert named.count("linear_skip_layer_norm") >= 2 * (layers - 1)
    assert not {"_activate", "_cast"} & set(named[:-1])


@pytest.mark.parametrize("method", Quantization)
def test_int8_quantises_the_encoder_alone(fused, images, sets, tmp_path, method):
    budget = None if method is Quantization.weight_only else AccuracyBudget(max_top1_drop=7, max_flips=7)
    settings = QuantizeConfig(source="ort-fp32", method=method, accuracy_budget=budget)
    calibration, folder = load_prepared(sets / "calibration"), tmp_path / "int8"
    build(folder, lambda output: quantize(fused, settings, calibration, HERE, 0, output), Target("ort", "int8"))
    record = check(folder, images)
    assert record.pixels.max_diff <= 1.01
    head = [node.op_type for node in onnx.load(folder / "vision.onnx").graph.node if node.name.startswith("head/")]
    assert "MatMul" in head
    assert not any("Quant" in kind or "NBits" in kind for kind in head)


def test_probabilities_are_a_softmax_for_clip(exported, images):
    encoder = open_encoder(exported)
    pixels = load_prepared(images).images[0][None]
    probabilities = encoder.classify(pixels)
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert np.linalg.norm(encoder.encode_images(pixels)) == pytest.approx(1, abs=1e-5)


def test_embeddings_that_are_not_of_unit_length_fail(exported, images, tmp_path):
    folder = tmp_path / "onnx"
    shutil.copytree(exported, folder)
    model = onnx.load(folder / "text.onnx")
    last = next(node for node in model.graph.node if "text_embeds" in node.output)
    model.graph.output[0].name = "twice"
    model.graph.node.append(onnx.helper.make_node("Add", [last.output[0]] * 2, ["twice"]))
    onnx.save(model, folder / "text.onnx")
    record = validate(folder, load_prepared(images), images / "reference.npz", GATES, 0)
    assert record.status == "fail"
    assert "an embedding's length is off 1 by 1.0e+00" in " ".join(record.reasons)


def test_siglip_scores_labels_with_its_bias_and_a_sigmoid(siglip, onnx_of):
    import torch

    from clip_deploy.checkpoint.load import load_model
    from clip_deploy.data.preprocessed import tokenize

    folder = onnx_of(siglip, classifier=LABELS, template=TEMPLATE)
    target = read_target(folder)
    model, processor = load_model(siglip), load_processor(siglip)
    texts = tokenize(processor, target.model, [TEMPLATE.format(label) for label in LABELS])
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    with torch.inference_mode():
        scores = model(input_ids=torch.from_numpy(texts.input_ids), pixel_values=torch.from_numpy(pixels))
    expected = scores.logits_per_image.sigmoid().numpy()
    assert np.abs(open_encoder(folder).classify(pixels) - expected).max() < 1e-5


def test_labels_of_another_set_cannot_be_checked_and_the_record_says_so(checkpoint, sets, onnx_of):
    folder = onnx_of(checkpoint, classifier=["cat", "dog"])
    record = validate(folder, load_prepared(sets / "evaluation"), sets / "evaluation" / "reference.npz", GATES, 0)
    assert record.status == "pass"
    assert "lacks a label" in record.measured.classifier.unchecked


def test_a_head_that_answers_otherwise_fails(exported, images, tmp_path):
    folder = tmp_path / "onnx"
    shutil.copytree(exported, folder)
    model = onnx.load(folder / "vision.onnx")
    weights = max(
        (
            node.attribute[0].t
            for node in model.graph.node
            if node.name.startswith("head/") and node.op_type == "Constant"
        ),
        key=lambda tensor: len(tensor.raw_data),
    )
    array = onnx.numpy_helper.to_array(weights)
    weights.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array[:, ::-1])))
    onnx.save(model, folder / "vision.onnx")
    record = validate(folder, load_prepared(images), images / "reference.npz", GATES, 0)
    assert record.status == "fail"
    assert "the zero-shot head changes" in " ".join(record.reasons)


def test_a_deployment_needs_neither_torch_nor_transformers(exported, tmp_path):
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.png")
    program = f"""
import json, sys
import numpy, onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession({str(exported / "vision.onnx")!r}, providers=["CPUExecutionProvider"])
labels = json.loads(session.get_modelmeta().custom_metadata_map["labels"])
image = numpy.array(Image.open({str(tmp_path / "photo.png")!r}).convert("RGB"))
(probabilities,) = session.run(["probabilities"], {{"images": image[None]}})
print(labels[probabilities[0].argmax()], sorted({{"torch", "transformers", "clip_deploy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert "red" in done.stdout


def test_graphs_without_anything_around_them_stay_as_they_were(onnx_target):
    assert list(onnx_file.describe(onnx_target / "vision.onnx").inputs) == ["pixel_values"]
    assert read_target(onnx_target).image_input == "pixel_values"
