"""Fused graphs: attention, GELU, LayerNormalization, skip connections, patches and pooling, each found by ourselves.

Each rewrite is checked: one that changes the outputs, or makes a graph that does not run, is undone and named.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
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
from clip_deploy.rewrites.gelu import fuse_gelu
from clip_deploy.rewrites.half_precision import clamp_masks
from clip_deploy.rewrites.layer_norm import fuse_layer_norm
from clip_deploy.rewrites.patch_embedding import multiply_patches
from clip_deploy.rewrites.reshapes import drop_idle_reshapes
from clip_deploy.rewrites.skip_layer_norm import fuse_skip_layer_norm

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
    _multiply_plainly(model.graph)
    if not edit(model):
        return False
    simplify(model)
    fold_constants(model, input_size_limit=FOLD_BYTES, output_size_limit=FOLD_BYTES)
    onnx_file.save(model, output)
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
        actual = onnx_file.run(path, feeds)
    except DeployError:
        return False
    limit = TOLERANCE * float(np.abs(expected).max())
    return expected.shape == actual.shape and bool(np.abs(expected - actual).max() <= limit)
