import shutil

import numpy as np
import onnx
import pytest

from clip_deploy import fusion, onnx_graph
from clip_deploy.artifact import Target, build, read_target
from clip_deploy.config import OnnxConfig, Precision
from clip_deploy.errors import UnavailableError
from clip_deploy.fusion import optimize
from clip_deploy.onnx_export import export_onnx


@pytest.mark.parametrize("opset", [18, 20])
def test_every_attention_of_both_towers_is_fused(checkpoint, tmp_path, opset):
    source, output = tmp_path / "onnx", tmp_path / "ort"
    build(source, lambda folder: export_onnx(checkpoint, OnnxConfig(opset=opset), folder), Target("ort", "fp32"))
    build(output, lambda folder: optimize(source, Precision.fp32, folder), Target("ort", "fp32"))
    vision, text = (onnx_graph.describe(output / f"{tower}.onnx")["fusion"] for tower in ("vision", "text"))
    assert (vision["attention"], vision["attention_expected"]) == (4, 4)
    assert (text["attention"], text["attention_expected"]) == (2, 2)
    assert (vision["gelu"], text["gelu"]) == (4, 2)
    heads = {
        attribute.i
        for node in onnx.load(output / "text.onnx").graph.node
        for attribute in node.attribute
        if attribute.name == "num_heads"
    }
    assert heads == {3}


@pytest.mark.parametrize(("precision", "tolerance"), [(Precision.fp32, 1e-4), (Precision.fp16, 3e-2)])
def test_fused_graphs_give_the_same_embeddings(onnx_target, tmp_path, precision, tolerance):
    build(tmp_path / "ort", lambda folder: optimize(onnx_target, precision, folder), Target("ort", "fp32"))
    for tower in ("vision", "text"):
        onnx_graph.check(tmp_path / "ort" / f"{tower}.onnx")
        feeds = onnx_graph.random_feeds(onnx_target / f"{tower}.onnx")
        expected = onnx_graph.run(onnx_target / f"{tower}.onnx", feeds)
        actual = onnx_graph.run(tmp_path / "ort" / f"{tower}.onnx", feeds)
        assert np.abs(actual - expected).max() < tolerance * np.abs(expected).max()


def test_siglips_layers_are_fused_and_its_pooling_head_is_counted_as_not(siglip, tmp_path):
    """Its pooling head once got a FusedMatMul that ONNX Runtime refused to run."""
    source, output = tmp_path / "onnx", tmp_path / "ort"
    build(source, lambda folder: export_onnx(siglip, OnnxConfig(), folder), Target("ort", "fp32"))
    build(output, lambda folder: optimize(source, Precision.fp32, folder), Target("ort", "fp32"))
    vision, text = (onnx_graph.describe(output / f"{tower}.onnx")["fusion"] for tower in ("vision", "text"))
    assert (vision["attention"], vision["attention_expected"]) == (2, 3)
    assert (text["attention"], text["attention_expected"]) == (2, 2)
    assert "rewrites_undone" not in read_target(output).build


def test_packed_weights_are_folded_not_concatenated_at_run_time(onnx_target, tmp_path):
    build(tmp_path / "ort", lambda folder: optimize(onnx_target, Precision.fp32, folder), Target("ort", "fp32"))
    nodes = onnx.load(tmp_path / "ort" / "vision.onnx").graph.node
    made = {name for node in nodes for name in node.output}
    attentions = [node for node in nodes if node.op_type == "Attention"]
    assert all(node.input[1] not in made for node in attentions)


def test_half_precision_halves_the_file(onnx_target, tmp_path):
    build(tmp_path / "ort", lambda folder: optimize(onnx_target, Precision.fp16, folder), Target("ort", "fp16"))
    sizes = [(folder / "vision.onnx").stat().st_size for folder in (onnx_target, tmp_path / "ort")]
    assert sizes[1] < 0.55 * sizes[0]


def test_a_rewrite_that_changes_the_outputs_is_undone(onnx_target, tmp_path, monkeypatch):
    def spoil(source, output, shape):
        model = onnx.load(source)
        bias = next(tensor for tensor in model.graph.initializer if "post_layernorm.bias" in tensor.name)
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
        onnx.save(model, output)

    monkeypatch.setattr(fusion, "_rewrite_onnxruntime", spoil)
    undone = fusion.fuse(onnx_target / "vision.onnx", tmp_path / "vision.onnx", {"heads": 4, "width": 128})
    assert undone == ["vision: onnxruntime"]
    assert onnx_graph.describe(tmp_path / "vision.onnx")["fusion"]["attention"] == 4


def test_a_rewrite_that_does_not_run_is_undone(onnx_target, tmp_path, monkeypatch):
    def break_it(source, output, shape):
        model = onnx.load(source)
        model.graph.node[0].op_type = "NoSuchOperator"
        onnx.save(model, output)

    monkeypatch.setattr(fusion, "_rewrite_onnxscript", break_it)
    undone = fusion.fuse(onnx_target / "vision.onnx", tmp_path / "vision.onnx", {"heads": 4, "width": 128})
    assert undone == ["vision: ort_fusions"]
    feeds = onnx_graph.random_feeds(tmp_path / "vision.onnx")
    assert onnx_graph.run(tmp_path / "vision.onnx", feeds).shape == (3, 64)


def test_what_hangs_on_an_unavailable_target_is_unavailable(onnx_target, tmp_path):
    def refuse(folder):
        raise UnavailableError("the dynamo exporter failed")

    build(tmp_path / "onnx-fp32", refuse, Target("ort", "fp32"))
    with pytest.raises(UnavailableError, match="onnx-fp32: the dynamo exporter failed"):
        optimize(tmp_path / "onnx-fp32", Precision.fp32, tmp_path)
    shutil.rmtree(tmp_path / "onnx-fp32")
