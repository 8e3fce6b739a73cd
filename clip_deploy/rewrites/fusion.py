"""Fused graphs: our own attention, patches and pooling, and ONNX Runtime's optimizer for GELU and LayerNormalization.

Each rewrite is checked: one that changes the outputs, or makes a graph that does not run, is undone and named.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime.transformers.optimizer as transformer_optimizer
from onnxruntime.transformers.fusion_options import FusionOptions
from onnxscript.optimizer import fold_constants
from onnxscript.optimizer import optimize as simplify
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import gemm_to_matmul_add_rule

from clip_deploy.core.config import OptimizeConfig, Precision
from clip_deploy.core.errors import DeployError
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.ir_tools import array, initializer
from clip_deploy.rewrites.attention import fuse_attention, replace_masks
from clip_deploy.rewrites.early_pooling import pool_early
from clip_deploy.rewrites.half_precision import clamp_masks
from clip_deploy.rewrites.patch_embedding import conv_to_matmul

FOLD_BYTES = 1 << 30  # weights are folded, whatever their size
TOLERANCE = 1e-4  # largest difference that a rewrite may make, relative to the output's largest value

Rewrite = Callable[[Path, Path], bool]
Step = list[tuple[str, Rewrite]]  # alternatives, by name


def rewrites_of(shape: dict[str, int], settings: OptimizeConfig, packed: bool = True) -> list[Step]:
    """The rewrites of a tower, step by step; of several in one step, the first that leaves the outputs is kept."""
    return [
        [("attention", partial(_edit, lambda model: fuse_attention(model, shape["heads"], packed) > 0))],
        [
            ("causal mask", partial(_edit, lambda model: replace_masks(model, causal=True))),
            ("padding mask", partial(_edit, lambda model: replace_masks(model, causal=False))),
        ],
        [("onnxruntime", partial(_rewrite_onnxruntime, False))],
        [("patches", partial(_edit, conv_to_matmul))],
        [("early pooling", partial(_edit, pool_early))],
        [("skip", partial(_rewrite_onnxruntime, True))] if settings.skip_layer_norm else [],
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
    feeds = onnx_file.random_feeds(source, texts)
    expected = onnx_file.run(source, feeds)
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
        onnx_file.save(ir.load(current), output)
    return undone


def _edit(edit: Callable[[ir.Model], bool], source: Path, output: Path) -> bool:
    """Apply an edit of the graph in memory; False where it found nothing to do."""
    model = ir.load(source)
    simplify(model)
    rewrite(model, [gemm_to_matmul_add_rule])
    _gemm_to_matmul(model.graph)
    if not edit(model):
        return False
    simplify(model)
    fold_constants(model, input_size_limit=FOLD_BYTES, output_size_limit=FOLD_BYTES)
    onnx_file.save(model, output)
    return True


def _gemm_to_matmul(graph: ir.Graph) -> None:
    """Gemm without bias to MatMul: dynamic quantisation knows the second only."""
    for node in list(graph):
        weight = array(node.inputs[1]) if node.op_type == "Gemm" and len(node.inputs) == 2 else None
        if weight is None or node.attributes.get_int("transA", 0) or node.attributes.get_float("alpha", 1.0) != 1.0:
            continue
        if node.attributes.get_int("transB", 0):
            weight = np.ascontiguousarray(weight.T)
        matmul = ir.node("MatMul", [node.inputs[0], initializer(graph, f"{node.outputs[0].name}_weight", weight)])
        ir.convenience.replace_nodes_and_values(graph, node, [node], [matmul], node.outputs, matmul.outputs)


def _rewrite_onnxruntime(skip_layer_norm: bool, source: Path, output: Path) -> bool:
    """GELU in its forms, LayerNormalization from its parts, and skip connections with the LayerNormalization behind."""
    options = FusionOptions("clip")
    options.enable_attention = False
    options.enable_bias_gelu = False  # it takes Gelu's tanh approximation (opset 20 and up) for the exact function
    options.enable_skip_layer_norm = options.enable_bias_skip_layer_norm = skip_layer_norm
    fused = transformer_optimizer.optimize_model(
        str(source), model_type="clip", optimization_options=options, opt_level=0
    )
    inputs = onnx.load(source, load_external_data=False).graph.input
    del fused.model.graph.input[:]  # it drops one that nothing reads; the encoder's callers still give it
    fused.model.graph.input.extend(inputs)
    onnx_file.save(ir.from_proto(fused.model), output)
    return True


def _gives(expected: np.ndarray, path: Path, feeds: dict[str, np.ndarray]) -> bool:
    """Whether a graph runs and gives what it gave before."""
    try:
        actual = onnx_file.run(path, feeds)
    except DeployError:
        return False
    limit = TOLERANCE * float(np.abs(expected).max())
    return expected.shape == actual.shape and bool(np.abs(expected - actual).max() <= limit)
