import shutil

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from support.models import SMALL, condition, reference, small_tokenizer

from clip_deploy.builders import onnx_export
from clip_deploy.builders.fused import optimize
from clip_deploy.builders.onnx_export import export_onnx
from clip_deploy.builders.quantize import quantize
from clip_deploy.checkpoint.load import load_model, load_processor
from clip_deploy.checkpoint.towers import split
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import (
    DataConfig,
    GateLimits,
    GatesConfig,
    OnnxConfig,
    OptimizeConfig,
    Precision,
    QuantizeConfig,
)
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.fusions import ADVICE, KINDS, print_missed
from clip_deploy.data.dataset import load
from clip_deploy.data.preprocessed import load_prepared, write_prepared
from clip_deploy.evaluate.embeddings import encode_set, save_embeddings
from clip_deploy.evaluate.gates import failures_now
from clip_deploy.evaluate.validation import validate
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.ir_tools import initializer
from clip_deploy.rewrites import fusion
from clip_deploy.runtimes import open_encoder


def optimized(source, folder, calibration=None, **settings):
    settings = OptimizeConfig(**settings)
    fallback = Target("ort", settings.precision.value)
    build(folder, lambda output: optimize(source, settings, calibration, output), fallback)
    return read_target(folder)


@pytest.mark.parametrize("opset", [14, 17, 18, 21, 23])
def test_every_operation_of_both_towers_is_fused(family, onnx_of, tmp_path, opset):
    output = tmp_path / "ort"
    target = optimized(onnx_of(family, opset), output, skip_layer_norm=True)
    assert "rewrites_undone" not in target.build
    for tower, shape in target.model.towers.items():
        found = target.build["fusions"][tower]
        assert list(found) == list(KINDS)
        assert all(count == expected for count, expected in found.values()), found
        onnx_file.check(output / f"{tower}.onnx")
        census = onnx_file.describe(output / f"{tower}.onnx").fusion
        pooling_head = tower == "vision" and target.model.model_type == "siglip"
        attentions = shape.layers + pooling_head
        assert (census["attention"], census["attention_expected"], census["gelu"]) == (attentions,) * 3
        assert attributes(output / f"{tower}.onnx", "num_heads") == {shape.heads}


@pytest.mark.parametrize("opset", [17, 21])  # of both exporters
def test_graphs_of_a_fixed_batch_size_are_fused_too(family, tmp_path, opset):
    target = read_target(family)
    texts = target.model.example_texts
    pixels = torch.zeros(3, 3, *target.model.image_size)
    inputs = {"vision": (pixels,), "text": tuple(torch.tensor(texts[name]) for name in target.model.text_inputs)}
    names = {"vision": ["pixel_values"], "text": target.model.text_inputs}
    write = onnx_export.WRITERS[OnnxConfig(opset=opset).writer]
    for tower, module in split(load_model(family), inputs).items():
        exported, output = tmp_path / f"{tower}-exported.onnx", tmp_path / f"{tower}.onnx"
        write(module, inputs[tower], exported, names[tower], "embeds", {}, opset)
        shape = target.model.towers[tower]
        assert fusion.fuse(exported, output, fusion.rewrites_of(shape, OptimizeConfig()), texts).undone == []
        description = onnx_file.describe(output)
        assert all(sizes[0] == 3 for sizes in description.inputs.values())
        pooling_head = tower == "vision" and target.model.model_type == "siglip"
        census = description.fusion
        assert census["attention"] == census["attention_expected"] == shape.layers + pooling_head


def attributes(path, name):
    nodes = onnx.load(path).graph.node
    return {attribute.i for node in nodes for attribute in node.attribute if attribute.name == name}


@pytest.fixture(scope="module")
def half(onnx_target, sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "ort-fp16"
    optimized(onnx_target, folder, load_prepared(sets / "calibration"), precision=Precision.fp16)
    return folder


@pytest.mark.parametrize(("name", "tolerance"), [("fused", 1e-4), ("half", 3e-2)])
def test_fused_graphs_give_the_same_embeddings(onnx_target, name, tolerance, request):
    folder = request.getfixturevalue(name)
    for tower in ("vision", "text"):
        onnx_file.check(folder / f"{tower}.onnx")
        feeds = onnx_file.random_feeds(onnx_target / f"{tower}.onnx", read_target(folder).model.example_texts)
        expected = onnx_file.run(onnx_target / f"{tower}.onnx", feeds)
        actual = onnx_file.run(folder / f"{tower}.onnx", feeds)
        assert np.abs(actual - expected).max() < tolerance * np.abs(expected).max()


def test_a_text_padded_in_its_middle_gives_the_same_embedding(onnx_target, fused):
    feeds = onnx_file.random_feeds(onnx_target / "text.onnx", read_target(onnx_target).model.example_texts)
    feeds["attention_mask"][:, 1:3] = 0
    expected = onnx_file.run(onnx_target / "text.onnx", feeds)
    np.testing.assert_allclose(onnx_file.run(fused / "text.onnx", feeds), expected, rtol=0, atol=1e-5)
    feeds["attention_mask"][:, 1:3] = 1
    assert np.abs(onnx_file.run(fused / "text.onnx", feeds) - expected).max() > 1e-3


@pytest.mark.parametrize("opset", [17, 18])
def test_the_last_layer_runs_on_the_pooled_token_only(checkpoint, onnx_of, tmp_path, opset):
    optimized(onnx_of(checkpoint, opset), tmp_path / "ort")
    for tower, tokens in (("vision", 37), ("text", 20)):
        *whole, last = attention_shapes(tmp_path / "ort" / f"{tower}.onnx", tokens)
        assert {shape[1] for shape in whole} == {tokens}
        assert last[1] == 1
        kinds = [node.op_type for node in onnx.load(tmp_path / "ort" / f"{tower}.onnx").graph.node]
        assert kinds.count("Split") == len(whole) + 1  # none of the last layer's product for all tokens, query included


def attention_shapes(path, tokens):
    """Shape of the output of each attention, in order, for texts of `tokens` tokens."""
    model = onnx.load(path)
    attentions = [node for node in model.graph.node if node.op_type == "MultiHeadAttention"]
    model.graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for node in attentions)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = onnx_file.random_feeds(path, {name: np.ones((3, tokens)) for name in ("input_ids", "attention_mask")})
    return [output.shape for output in session.run(None, feeds)[1:]]


def test_packed_weights_are_constants(fused):
    graph = onnx.load(fused / "vision.onnx").graph
    constants = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    assert len(products) == 4 * 4 + 3  # four layers, of which the last has its query apart; patches; projection
    assert all(node.input[1] in constants for node in products)


def test_skip_connections_are_fused_where_asked(onnx_target, fused, tmp_path):
    with_skips, without = optimized(onnx_target, tmp_path / "ort", skip_layer_norm=True), read_target(fused)
    found = with_skips.build["fusions"]
    assert found["vision"]["skip_layer_norm"] == [8, 8]  # 4 layers, and the norm behind them in the place of the first
    assert found["text"]["skip_layer_norm"] == [4, 4]
    assert "skip_layer_norm" not in without.build["fusions"]["vision"]


def write_out(path):
    """Write a tower's last LayerNormalization by the norm of the vector: right, and in a form that no rewrite knows."""
    model = ir.load(path)
    node = [node for node in model.graph if node.op_type == "LayerNormalization"][-1]
    source, weight, bias = node.inputs
    width = weight.shape[0]
    axis = initializer(model.graph, "last", np.array([-1]))
    root = initializer(model.graph, "root", np.array(width**0.5, np.float32))
    mean = ir.node("ReduceMean", [source, axis])
    centred = ir.node("Sub", [source, mean.outputs[0]])
    length = ir.node("ReduceL2", [centred.outputs[0], axis])
    unit = ir.node("Div", [centred.outputs[0], length.outputs[0]])
    scaled = ir.node("Mul", [unit.outputs[0], root])
    weighted = ir.node("Mul", [scaled.outputs[0], weight])
    shifted = ir.node("Add", [weighted.outputs[0], bias])
    made = [mean, centred, length, unit, scaled, weighted, shifted]
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], made, node.outputs, shifted.outputs)
    ir.save(model, path)


def test_a_layer_norm_in_an_unknown_form_is_missed_said_shown_and_refused_by_the_gate(
    onnx_target, sets, tmp_path, capsys
):
    source = shutil.copytree(onnx_target, tmp_path / "onnx-fp32")
    write_out(source / "vision.onnx")
    build_facts = optimized(source, tmp_path / "ort-fp32").build
    assert build_facts["fusions"]["vision"]["layer_norm"] == [9, 10]
    line = f"vision: 9 of 10 LayerNormalization fused: {ADVICE}"
    print_missed("ort-fp32", build_facts)
    assert capsys.readouterr().out == f"ort-fp32: {line}\n"
    evaluation = load_prepared(sets / "evaluation"), sets / "evaluation" / "reference.npz"
    records = [validate(tmp_path / "ort-fp32", *evaluation, GatesConfig(fusions=asked), 0) for asked in (False, True)]
    assert [(record.status, record.reasons) for record in records] == [
        ("pass", []),
        ("fail", [f"{line} (gates.fusions)"]),
    ]
    assert [str(miss) for miss in failures_now(records[0], GatesConfig(fusions=True))] == [f"{line} (gates.fusions)"]


def test_a_target_that_missed_nothing_keeps_the_gate(fused, sets):
    evaluation = load_prepared(sets / "evaluation"), sets / "evaluation" / "reference.npz"
    assert validate(fused, *evaluation, GatesConfig(fusions=True), 0).status == "pass"


def test_half_precision_halves_the_file_and_says_what_stays_in_fp32(onnx_target, half):
    assert read_target(half).build["left_in_fp32"] == []
    sizes = [(folder / "vision.onnx").stat().st_size for folder in (onnx_target, half)]
    assert sizes[1] < 0.55 * sizes[0]


def spoil(source, output):
    model = onnx.load(source)
    bias = next(tensor for tensor in model.graph.initializer if "post_layernorm.bias" in tensor.name)
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(model, output)
    return True


def break_it(source, output):
    model = onnx.load(source)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, output)
    return True


@pytest.mark.parametrize("rewrite", [spoil, break_it])
def test_a_rewrite_that_changes_the_outputs_or_does_not_run_is_undone(onnx_target, tmp_path, rewrite):
    good = fusion.rewrites_of(read_target(onnx_target).model.towers["vision"], OptimizeConfig())
    made = fusion.fuse(onnx_target / "vision.onnx", tmp_path / "vision.onnx", [[("bad", rewrite)], *good], {})
    assert made.undone == ["vision: bad"]
    assert onnx_file.describe(tmp_path / "vision.onnx").fusion["attention"] == 4


def test_what_hangs_on_an_unavailable_target_is_unavailable(onnx_target, tmp_path):
    def refuse(folder):
        raise UnavailableError("the dynamo exporter failed")

    build(tmp_path / "onnx-fp32", refuse, Target("ort", "fp32"))
    with pytest.raises(UnavailableError, match="onnx-fp32: the dynamo exporter failed"):
        optimize(tmp_path / "onnx-fp32", OptimizeConfig(), None, tmp_path)
    shutil.rmtree(tmp_path / "onnx-fp32")


TEXT = {"vocab_size": 600, "max_position_embeddings": 32, "eos_token_id": 586, **SMALL}
GROUPS = {"depths": [2, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0], "image_size": 32}
CONVNEXT = {"image_size": 32, "hidden_size": 32, "hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}
EFFICIENTNET = {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.34, "hidden_dim": 80}
UNFUSED = {  # the class, its configuration, and how many attentions and GELUs are fused in its image tower
    "groupvit": (
        transformers.GroupViTModel,
        lambda: transformers.GroupViTConfig(
            text_config=TEXT, vision_config={"patch_size": 8, **SMALL, **GROUPS}, projection_dim=24
        ),
        (6, 11),  # of eight attentions: two assign patches to groups
    ),
    "convnext-bert": (
        transformers.VisionTextDualEncoderModel,
        lambda: transformers.VisionTextDualEncoderConfig(
            text_config={"model_type": "bert", **TEXT},
            vision_config={"model_type": "convnext", **CONVNEXT},
            projection_dim=24,
        ),
        (0, 2),
    ),
    "align": (
        transformers.AlignModel,
        lambda: transformers.AlignConfig(text_config=TEXT, vision_config=EFFICIENTNET, projection_dim=80),
        (0, 0),
    ),
}


NOTED = {  # by model_type: the kind, and what came of it before
    "groupvit": ("10: a tower without a fused attention, GroupViT", "No opset import for domain 'com.microsoft'"),
    "vision-text-dual-encoder": ("10: a tower without heads, ConvNeXt with BERT", "optimize ends: AssertionError"),
    "align": ("28: ALIGN, with batch norms that know their inputs", "FP32 rows fail with random statistics"),
}


@pytest.fixture(scope="module", params=UNFUSED)
def unfused(request, tmp_path_factory):
    """A model whose image tower has attention that is not fused, or none, its sets, and what is fused of it."""
    kind, config, fused = UNFUSED[request.param]
    torch.manual_seed(0)
    model, folder = kind(config()).eval(), tmp_path_factory.mktemp(request.param)
    condition(model)
    size = {"height": 32, "width": 32}
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size)
    checkpoint = reference(model, transformers.CLIPProcessor(images, small_tokenizer(32)), folder)
    processor, described = load_processor(checkpoint), read_target(checkpoint).model
    dataset = load(DataConfig(evaluation_samples=32, calibration_samples=16), 0)
    for name in ("evaluation", "calibration"):
        (folder / name).mkdir()
        write_prepared(name, dataset, ["a photo of a {}"], processor, described, folder / name)
    embeddings = encode_set(open_encoder(checkpoint), load_prepared(folder / "evaluation"))
    save_embeddings(embeddings, folder / "evaluation" / "reference.npz")
    return checkpoint, fused


def test_towers_with_an_attention_that_is_not_fused_or_none_keep_the_gate_in_every_precision(unfused, tmp_path, kinds):
    checkpoint, fused = unfused
    sets = checkpoint.parent
    calibration = load_prepared(sets / "calibration")
    onnx_fp32, int8 = tmp_path / "onnx-fp32", tmp_path / "ort-int8-dynamic"
    build(onnx_fp32, lambda folder: export_onnx(checkpoint, OnnxConfig(), folder), Target("ort", "fp32"))
    for precision in (Precision.fp32, Precision.fp16):
        assert (
            "rewrites_undone"
            not in optimized(onnx_fp32, tmp_path / f"ort-{precision.value}", calibration, precision=precision).build
        )
    build(
        int8,
        lambda folder: quantize(tmp_path / "ort-fp32", QuantizeConfig(), calibration, [], 0, folder),
        Target("ort", "int8"),
    )
    gates = GatesConfig(*(GateLimits(min_cosine=limit) for limit in (0.9999, 0.999, 0.99, 0.9)))
    lowest = {}
    for target in ("onnx-fp32", "ort-fp32", "ort-fp16", "ort-int8-dynamic"):
        evaluation = sets / "evaluation"
        record = validate(tmp_path / target, load_prepared(evaluation), evaluation / "reference.npz", gates, 0)
        assert record.status == "pass", (target, record.reasons)
        lowest[target] = min(parity.cosine_min for parity in record.measured.parity.values())
    census = record.graphs["vision"].fusion
    assert (census["attention"], census["gelu"]) == fused
    kind = read_target(checkpoint).model.model_type
    kinds(
        *NOTED[kind],
        now="pass, lowest cosine " + ", ".join(f"{target} {cosine:.5f}" for target, cosine in lowest.items()),
    )
