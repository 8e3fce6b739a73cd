"""Defects planted in one layer: the diagnosis names that layer, and keeping its nodes in FP32 passes the gate."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.project import ROOT

from clip_deploy.builders.fused import optimize
from clip_deploy.builders.quantize import quantize
from clip_deploy.commands.apply import apply
from clip_deploy.core.artifact import Target, build
from clip_deploy.core.config import OptimizeConfig, Precision, Quantization, QuantizeConfig, load_choice, load_params
from clip_deploy.core.environment import hardware
from clip_deploy.core.errors import ConfigError
from clip_deploy.core.json_files import write_json
from clip_deploy.core.parsing import plain
from clip_deploy.core.records import Diagnosis
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate.diagnosis import diagnose
from clip_deploy.evaluate.embeddings import load_embeddings
from clip_deploy.evaluate.validation import validate

GATES = load_choice(ROOT / "conf", "gates", "standard")
ATTENTION = "model.vision_model.encoder.layers.2.self_attn"
HERE = hardware().instruction_sets  # INT8 made for another CPU saturates on one without VNNI


@pytest.fixture
def check(sets):
    def run(folder):
        return validate(folder, load_prepared(sets / "evaluation"), sets / "evaluation" / "reference.npz", GATES, 0)

    return run


def weight_of(model, bias):
    """The weight of the product to which a bias is added."""
    add = next(node for node in model.graph.node if bias in node.input)
    made = {name: node for node in model.graph.node for name in node.output}
    return next(made[name] for name in add.input if name in made).input[1]


def multiply(path, factors):
    """Multiply the weights that `factors(model)` names."""
    model = onnx.load(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, factor in factors(model).items():
        array = (numpy_helper.to_array(weights[name]) * factor).astype(np.float32)
        weights[name].CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, path)


def fade(model):
    """Values so small that FP16 has no digits for them, and an output that makes up for it: FP32 gives the same."""
    value, out = f"{ATTENTION}.v_proj.bias", weight_of(model, f"{ATTENTION}.out_proj.bias")
    return {value: 3e-7, weight_of(model, value): 3e-7, out: 1 / 3e-7}


def stretch(model):
    """One channel so large that INT8 has no steps left for the others, and weights that make up for it."""
    layer = "model.vision_model.encoder.layers.1"
    norm = next(node for node in model.graph.node if f"{layer}.layer_norm2.weight" in node.input)
    factor = np.ones(128)
    factor[0] = 300
    return {
        norm.input[1]: factor,
        norm.input[2]: factor,
        weight_of(model, f"{layer}.mlp.fc1.bias"): 1 / factor[:, None],
    }


@pytest.fixture(scope="module")
def planted(onnx_target, sets, tmp_path_factory):
    """The exported model with either defect, and its fused FP32 form."""

    def make(name, factors):
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(onnx_target, folder / "onnx-fp32")
        multiply(folder / "onnx-fp32" / "vision.onnx", factors)
        return folder

    return make


def halved(folder, sets, keep_fp32=()):
    settings = OptimizeConfig(precision=Precision.fp16, keep_fp32=list(keep_fp32))
    calibration = load_prepared(sets / "calibration")
    made = folder / "ort-fp16"
    build(made, lambda output: optimize(folder / "onnx-fp32", settings, calibration, output), Target("ort", "fp16"))
    return made


def fused(folder, sets):
    made = folder / "ort-fp32"
    calibration = load_prepared(sets / "calibration")
    build(
        made,
        lambda output: optimize(folder / "onnx-fp32", OptimizeConfig(), calibration, output),
        Target("ort", "fp32"),
    )
    return made


def applied(record, target, tmp_path):
    """The target's settings in params.yaml behind `clip-deploy apply`."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    write_json(tmp_path / "validate" / f"{target}.json", plain(record))
    apply(target, tmp_path / "params.yaml", tmp_path / "validate")
    return load_params(tmp_path / "params.yaml", ROOT / "conf")


def test_half_precision_that_loses_a_layers_values_is_found_and_mended(planted, check, sets, tmp_path):
    folder = planted("faded", fade)
    assert check(folder / "onnx-fp32").status == "pass"
    record = check(halved(folder, sets))
    assert record.status == "fail"
    (drop,) = record.diagnosis.drops
    assert (record.diagnosis.reference, drop.tower) == ("onnx-fp32", "vision")
    assert drop.layer == "vision_model.encoder.layers.2.self_attn"
    assert drop.cosine_before > 0.9999 > 0.99 > drop.cosine_after
    kept = applied(record, "ort-fp16", tmp_path).optimize["ort-fp16"].keep_fp32
    assert kept == drop.nodes
    assert "vision: MatMul_39" in kept  # the products of queries, keys and values, in one
    mended = check(halved(folder, sets, kept))
    assert (mended.status, mended.reasons) == ("pass", [])
    assert mended.diagnosis is None
    assert mended.build["keep_fp32"] == kept


def test_int8_that_a_large_channel_spoils_is_found_and_mended(planted, check, sets, tmp_path):
    folder = planted("stretched", stretch)
    source, calibration = fused(folder, sets), load_prepared(sets / "calibration")
    assert check(source).status == "pass"

    def quantised(method, keep_fp32=()):
        settings = QuantizeConfig(source="ort-fp32", method=method, keep_fp32=list(keep_fp32))
        made = folder / "ort-int8"
        build(made, lambda out: quantize(source, settings, calibration, HERE, 0, out), Target("ort", "int8"))
        return check(made)

    for target, method in (("ort-int8-dynamic", Quantization.dynamic), ("ort-int8-static", Quantization.static)):
        record = quantised(method)
        assert record.status == "fail"
        (drop,) = record.diagnosis.drops
        assert (record.diagnosis.reference, drop.layer) == ("ort-fp32", "vision_model.encoder.layers.1.mlp")
        kept = applied(record, target, tmp_path).quantize[target].keep_fp32
        products = [node for node in onnx.load(source / "vision.onnx").graph.node if node.op_type == "MatMul"]
        assert len(kept) == 2 < len(products) / 5
        assert quantised(method, kept).status == "pass"


def spoil(folder, tower, bias, value):
    """Put another value into a bias of one target's graph."""
    model = onnx.load(folder / f"{tower}.onnx")
    tensor = next(item for item in model.graph.initializer if item.name.startswith(bias))
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.full_like(array, value), tensor.name))
    onnx.save(model, folder / f"{tower}.onnx")


def test_a_layer_that_gives_nan_is_named(onnx_target, check, sets, tmp_path):
    shutil.copytree(onnx_target, tmp_path / "onnx-fp32")
    folder = halved(tmp_path, sets)
    spoil(folder, "vision", "model.vision_model.encoder.layers.1.mlp.fc1.bias", np.nan)
    (drop,) = check(folder).diagnosis.drops
    assert drop.layer == "vision_model.encoder.layers.1.mlp"
    assert drop.node.startswith("Add_")
    assert drop.cosine_after == 0


def test_a_wrong_fusion_is_named_without_nodes_to_keep(onnx_target, check, sets, tmp_path):
    shutil.copytree(onnx_target, tmp_path / "onnx-fp32")
    folder = fused(tmp_path, sets)
    spoil(folder, "text", "model.text_model.encoder.layers.0.mlp.fc2.bias", 1.0)
    (drop,) = check(folder).diagnosis.drops
    assert (drop.tower, drop.layer) == ("text", "text_model.encoder.layers.0.mlp")
    assert drop.nodes == []


def test_what_has_no_second_graph_says_so(onnx_target, check, sets, tmp_path):
    folder = shutil.copytree(onnx_target, tmp_path / "onnx-fp32")
    spoil(folder, "vision", "model.vision_model.encoder.layers.1.mlp.fc1.bias", 1.0)
    named = "no layer is named: it was exported from PyTorch itself, whose inner outputs have other names"
    assert check(folder).diagnosis == Diagnosis(reference=None, drops=[], notes=[named])
    build(tmp_path / "t", lambda output: Target("torchscript", "int8"), Target("torchscript", "int8"))
    embeddings = load_embeddings(sets / "evaluation" / "reference.npz")
    found = diagnose(tmp_path / "t", load_prepared(sets / "evaluation"), embeddings, embeddings, GATES.int8)
    assert found.notes == ["no layer is named: a torchscript target gives no outputs but its last"]


def test_a_node_that_the_graph_has_not_is_refused(onnx_target, sets, tmp_path):
    shutil.copytree(onnx_target, tmp_path / "onnx-fp32")
    with pytest.raises(ConfigError, match="keep_fp32 names vision: MatMul_999, which the graph does not have"):
        halved(tmp_path, sets, ["vision: MatMul_999"])
    with pytest.raises(ConfigError, match="keep_fp32 names text: Gather_999, which the graph does not have"):
        quantize(
            tmp_path / "onnx-fp32",
            QuantizeConfig(keep_fp32=["text: Gather_999"]),
            load_prepared(sets / "calibration"),
            HERE,
            0,
            tmp_path,
        )
    with pytest.raises(ConfigError, match="keep_fp32 holds 'MatMul_9': accepted are nodes of a tower"):
        QuantizeConfig(keep_fp32=["MatMul_9"])
    with pytest.raises(ConfigError, match="keep_fp32 is for precision fp16, bf16 and fp8"):
        OptimizeConfig(keep_fp32=["vision: MatMul_9"])
    assert json.loads((tmp_path / "onnx-fp32" / "target.json").read_text())["precision"] == "fp32"
