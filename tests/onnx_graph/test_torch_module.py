import shutil
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from clip_deploy.checkpoint.towers import dynamic_axes, example_inputs
from clip_deploy.core.artifact import read_target
from clip_deploy.core.config import OptimizeConfig
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.torch_module import GraphModule
from clip_deploy.rewrites.fusion import for_cuda, fuse, rewrites_of
from clip_deploy.rewrites.half_precision import to_bfloat16, to_float16


@pytest.fixture(scope="module", params=[17, 18, 23])
def source(family, onnx_of, request):
    """An ONNX target of each family, of both exporters, and with ONNX's own Attention."""
    return onnx_of(family, request.param)


@pytest.fixture(scope="module")
def for_gpu(source, tmp_path_factory):
    """for_gpu(tower): what is fused for a GPU, once for all tests, and its model's description."""
    return cache(lambda tower: rewritten(source, tower, tmp_path_factory.mktemp("gpu"), on_gpu=True))


def rewritten(source, tower, output, on_gpu=False):
    """The tower's fused graph, and its model's description."""
    model = read_target(source).model
    rewrites = rewrites_of(model.towers[tower], OptimizeConfig(skip_layer_norm=on_gpu))
    if on_gpu:
        rewrites = for_cuda(rewrites, model.context_length)
    made = fuse(source / f"{tower}.onnx", output / f"{tower}.onnx", rewrites, model.example_texts)
    assert made.undone == []
    return output / f"{tower}.onnx", model


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_the_module_gives_what_the_graph_gives_and_is_exported_for_any_batch(source, tower, tmp_path):
    path, model = rewritten(source, tower, tmp_path)
    feeds = onnx_file.random_feeds(path, model.example_texts)
    module = GraphModule(ir.load(path)).eval()
    inputs = tuple(torch.from_numpy(feeds[name]) for name in module.inputs)
    expected = onnx_file.run(path, feeds)
    with torch.inference_mode():
        np.testing.assert_allclose(module(*inputs), expected, atol=1e-4 * np.abs(expected).max())

    shapes = {axis: torch.export.Dim.DYNAMIC for axis in dynamic_axes(model)[tower]}
    example = example_inputs(model)[tower]
    program = torch.export.export(module, example, dynamic_shapes=(tuple(shapes for _ in example),))
    actual = program.module()(*inputs).detach()
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_half_precision_is_the_modules_own_affair(fused):
    path = fused / "vision.onnx"
    feeds = onnx_file.random_feeds(path, {})
    module = GraphModule(ir.load(path), torch.bfloat16).eval()
    assert {buffer.dtype for buffer in module.buffers() if buffer.is_floating_point()} == {torch.bfloat16}
    with torch.inference_mode():
        actual = module(torch.from_numpy(feeds["pixel_values"]))
    expected = onnx_file.run(path, feeds)
    assert actual.dtype == torch.float32
    assert np.abs(actual.numpy() - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_graph_in_float16_stays_in_float16(fused, sets, tower, tmp_path):
    path, model = Path(shutil.copy(fused / f"{tower}.onnx", tmp_path)), read_target(fused).model
    inputs = load_prepared(sets / "calibration").inputs(tower, model.text_inputs)
    feeds = {name: array[:4].copy() for name, array in inputs.items()}
    to_float16(path, lambda: [feeds])
    module = GraphModule(ir.load(path)).eval()
    assert {buffer.dtype for buffer in module.buffers() if buffer.is_floating_point()} == {torch.float16}
    with torch.inference_mode():
        actual = module(*(torch.from_numpy(feeds[name]) for name in module.inputs))
    expected = onnx_file.run(path, feeds)
    assert actual.dtype == torch.float32
    assert np.abs(actual.numpy() - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_graph_in_bfloat16_gives_nearly_what_it_gave(fused, tower, tmp_path):
    path, model = Path(shutil.copy(fused / f"{tower}.onnx", tmp_path)), read_target(fused).model
    feeds = onnx_file.random_feeds(path, model.example_texts)
    expected = onnx_file.run(path, feeds)
    to_bfloat16(path)
    module = GraphModule(ir.load(path), torch.bfloat16).eval()
    with torch.inference_mode():
        actual = module(*(torch.from_numpy(feeds[name]) for name in module.inputs))
    assert all(buffer.is_contiguous() for buffer in module.buffers())  # as our kernels read weights
    assert actual.dtype == torch.float32
    assert np.abs(actual.numpy() - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_graph_in_bfloat16_for_a_gpu_lacks_nothing_but_the_gpu(for_gpu, tower, tmp_path):
    made, model = for_gpu(tower)
    path = Path(shutil.copy(made, tmp_path))
    to_bfloat16(path)
    stored = {tensor.dtype for value in ir.load(path).graph.initializers.values() if (tensor := value.const_value)}
    assert ir.DataType.BFLOAT16 in stored
    with pytest.raises(DeployError, match="NOT_IMPLEMENTED"):  # what does not fit together is refused before that
        onnx_file.run(path, onnx_file.random_feeds(path, model.example_texts))


def test_an_unknown_operator_is_named(onnx_target, tmp_path):
    model = ir.load(onnx_target / "vision.onnx")  # not fused: its Softmax has no counterpart
    with pytest.raises(UnavailableError, match=r"the graph has \w+, which has no PyTorch counterpart here"):
        GraphModule(model)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_graph_for_a_gpu_searches_in_float_and_holds_its_products(source, for_gpu, tower):
    path, model = for_gpu(tower)
    graph = ir.load(path).graph
    kinds = [node.op_type for node in graph]
    layers = model.towers[tower].layers
    assert kinds.count("Attention") >= layers - 1
    assert kinds.count("Split") <= 1
    assert "SkipLayerNormalization" in kinds
    searches = [node.inputs[0].producer().op_type for node in graph if node.op_type == "ArgMax"]
    assert set(searches) <= {"Add"}
    feeds = onnx_file.random_feeds(source / path.name, model.example_texts)
    expected = onnx_file.run(source / path.name, feeds)
    np.testing.assert_allclose(onnx_file.run(path, feeds), expected, atol=1e-4 * np.abs(expected).max())
