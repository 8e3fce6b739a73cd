"""Fused graphs: attention, GELU, LayerNormalization, skip connections, patches and pooling, each found by ourselves.

Each rewrite is checked: one that changes the outputs, or makes a graph that does not run, is undone and named.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer import fold_constants
from onnxscript.optimizer import optimize as simplify
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import gemm_to_matmul_add_rule

from clip_deploy import onnx_graph
from clip_deploy.attention import array, fuse_attention, initializer, replace_masks, take_in_products
from clip_deploy.core.artifact import Target, read_target
from clip_deploy.core.config import Device, OptimizeConfig, Precision, Provider
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.float16 import SCAN_ROWS, clamp_masks, halve, to_bfloat16
from clip_deploy.gelu import fuse_gelu
from clip_deploy.layer_norm import fuse_layer_norm
from clip_deploy.patches import multiply_patches
from clip_deploy.pooling import find_in_float, pool_early
from clip_deploy.prepared import Prepared, feeds
from clip_deploy.reshapes import drop_idle_reshapes
from clip_deploy.shell import Shell, put_on, take_off
from clip_deploy.skip_layer_norm import fuse_skip_layer_norm

FOLD_BYTES = 1 << 30  # weights are folded, whatever their size
TOLERANCE = 1e-4  # largest difference that a rewrite may make, relative to the output's largest value

Rewrite = Callable[[Path, Path], bool]
Step = list[tuple[str, Rewrite]]  # alternatives, by name


RUNTIMES = {Provider.own: "ort", Provider.tensorrt: "ort_tensorrt", Provider.torch: "fused"}


def optimize(
    source: Path, settings: OptimizeConfig, calibration: Prepared, output: Path, device: Device = Device.cpu
) -> Target:
    """Fuse both towers of the ONNX target `source` into `output`, in float32, float16 or bfloat16, to run on `device`.

    For PyTorch, what stands around the towers (preprocessing, heads) is left out.
    Raises UnavailableError where the source could not be built, or gives NaN or Inf on the calibration set in float16.
    """
    target = read_target(source)
    if target.unavailable:
        raise UnavailableError(f"{source.name}: {target.unavailable}")
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # what cannot be folded
    undone: list[str] = []
    in_fp32: list[str] = []
    with tempfile.TemporaryDirectory(dir=output) as folder:
        for tower, shape in target.model["towers"].items():
            bare, fused = Path(folder) / f"{tower}-bare.onnx", Path(folder) / f"{tower}.onnx"
            shell = take_off(source / fused.name, bare)
            if settings.provider is Provider.torch:
                shell = Shell()
            rewrites = rewrites_of(shape, settings)
            if settings.provider is Provider.tensorrt:
                rewrites = rewrites[-1:]  # masks alone: TensorRT reads no operators of ONNX Runtime's own
            elif settings.provider is Provider.torch:
                rewrites = by_order(rewrites)
            elif device is Device.cuda:
                rewrites = for_cuda(rewrites, target.model["context_length"])
            undone += fuse(bare, fused, rewrites, target.model["example_texts"])
            if settings.precision is Precision.fp16:
                inputs = calibration.inputs(tower, target.model["text_inputs"])
                kept = halve(fused, partial(feeds, inputs, SCAN_ROWS), settings.keep_fp32, device)
                in_fp32 += [f"{tower}: {node} ({value:.3g})" for node, value in kept.items()]
            elif settings.precision is Precision.bf16:
                to_bfloat16(fused, settings.keep_fp32)
            put_on(fused, shell, output / fused.name)
    facts: dict[str, Any] = {"rewrites_undone": undone} if undone else {}
    if settings.keep_fp32:
        facts["keep_fp32"] = settings.keep_fp32
    if settings.precision is Precision.fp16:
        facts["left_in_fp32"] = in_fp32
    elif settings.precision is Precision.fp32 and settings.provider is Provider.own and device is Device.cuda:
        facts["products"] = "may be in TF32, the provider's default for float32"
    if settings.provider is Provider.torch:
        bare_model = {**target.model, "normalize": False, "classifier": None}
        target = replace(target, image_input="pixel_values", model=bare_model)
        facts["kernels"] = "ours or the library's, the faster for each shape"
    return replace(
        target,
        runtime=RUNTIMES[settings.provider],
        precision=settings.precision.value,
        device=device.value,
        files=onnx_graph.files_of(output),
        build={**target.build, "source": source.name, **facts},
    )


def by_order(rewrites: list[Step]) -> list[Step]:
    """The same without a mask of padding where the order of tokens masks enough: a GPU's fastest kernels take none."""
    alone: Rewrite = partial(_edit, lambda model: replace_masks(model, causal=True, padding=False))
    first = [("causal mask alone", alone)]
    return [first + step if step and step[0][0] == "causal mask" else step for step in rewrites]


def for_cuda(rewrites: list[Step], context: int) -> list[Step]:
    """The same with what ONNX Runtime needs on a GPU: products inside attention, and no search in integers."""
    held: Rewrite = partial(_edit, take_in_products)
    return [
        *by_order(rewrites),
        [("packed attention", held)],
        [("end of text", partial(_edit, lambda model: find_in_float(model, context)))],
    ]


def rewrites_of(shape: dict[str, int], settings: OptimizeConfig, packed: bool = True) -> list[Step]:
    """The rewrites of a tower, step by step; of several in one step, the first that leaves the outputs is kept."""
    return [
        [("attention", partial(_edit, lambda model: fuse_attention(model, shape["heads"], packed) > 0))],
        [
            ("causal mask", partial(_edit, lambda model: replace_masks(model, causal=True))),
            ("padding mask", partial(_edit, lambda model: replace_masks(model, causal=False))),
        ],
        [("gelu", partial(_edit, lambda model: fuse_gelu(model) > 0))],
        [("layer_norm", partial(_edit, lambda model: fuse_layer_norm(model) > 0))],
        [("reshapes", partial(_edit, lambda model: drop_idle_reshapes(model) > 0))],
        [("patches", partial(_edit, multiply_patches))],
        [("early pooling", partial(_edit, pool_early))],
        [("skip_layer_norm", partial(_edit, lambda model: fuse_skip_layer_norm(model) > 0))]
        if settings.skip_layer_norm
        else [],
        [("masks", partial(_edit, clamp_masks))] if settings.precision is Precision.fp16 else [],
    ]


def fuse(source: Path, output: Path, rewrites: list[Step], texts: dict[str, list]) -> list[str]:
    """Rewrite one tower, and return the steps that had to be undone.

    Args:
        source: the graph as it was exported.
        output: where to write the fused one.
        rewrites: as rewrites_of gives them.
        texts: tokenised example texts, on which the text tower's outputs are compared.
    """
    feeds = onnx_graph.random_feeds(source, texts)
    expected = onnx_graph.run(source, feeds)
    undone = []
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        current = source
        for step in rewrites:
            kept = None
            tried = []
            for name, apply in step:
                candidate = Path(folder) / f"{name.replace(' ', '-')}.onnx"
                if not apply(current, candidate):
                    continue
                tried.append(name)
                if _gives(expected, candidate, feeds):
                    kept = candidate
                    break
            if tried and kept is None:
                undone.append(f"{output.stem}: {', '.join(tried)}")
            current = kept or current
        onnx_graph.save(ir.load(current), output)
    return undone


def _edit(edit: Callable[[ir.Model], bool], source: Path, output: Path) -> bool:
    """Apply an edit of the graph in memory; False where it found nothing to do."""
    model = ir.load(source)
    simplify(model)
    rewrite(model, [gemm_to_matmul_add_rule])
    _multiply_plainly(model.graph)
    if not edit(model):
        return False
    simplify(model)
    fold_constants(model, input_size_limit=FOLD_BYTES, output_size_limit=FOLD_BYTES)
    onnx_graph.save(model, output)
    return True


def _multiply_plainly(graph: ir.Graph) -> None:
    """Gemm without bias to MatMul: dynamic quantisation knows the second only."""
    for node in list(graph):
        weight = array(node.inputs[1]) if node.op_type == "Gemm" and len(node.inputs) == 2 else None
        if weight is None or node.attributes.get_int("transA", 0) or node.attributes.get_float("alpha", 1.0) != 1.0:
            continue
        if node.attributes.get_int("transB", 0):
            weight = np.ascontiguousarray(weight.T)
        product = ir.node("MatMul", [node.inputs[0], initializer(graph, f"{node.outputs[0].name}_weight", weight)])
        ir.convenience.replace_nodes_and_values(graph, node, [node], [product], node.outputs, product.outputs)


def _gives(expected: np.ndarray, path: Path, feeds: dict[str, np.ndarray]) -> bool:
    """Whether a graph runs and gives what it gave before."""
    try:
        actual = onnx_graph.run(path, feeds)
    except DeployError:
        return False
    limit = TOLERANCE * float(np.abs(expected).max())
    return expected.shape == actual.shape and bool(np.abs(expected - actual).max() <= limit)
