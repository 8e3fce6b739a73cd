"""Fused graphs: attention, GELU, LayerNormalization, skip connections, patches and pooling, each found by ourselves.

Each rewrite is checked: one that changes the outputs, or makes a graph that does not run, is undone and named.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer import fold_constants
from onnxscript.optimizer import optimize as simplify
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import gemm_to_matmul_add_rule

from clip_deploy.core.config import OptimizeConfig, Precision
from clip_deploy.core.errors import DeployError
from clip_deploy.core.fusions import KINDS
from clip_deploy.core.model import TowerShape
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.ir_tools import array, initializer
from clip_deploy.rewrites.attention import fuse_attention, fuse_packed_attention, replace_masks
from clip_deploy.rewrites.early_pooling import float_argmax, pool_early
from clip_deploy.rewrites.gelu import fuse_gelu
from clip_deploy.rewrites.half_precision import clamp_masks
from clip_deploy.rewrites.layer_norm import fuse_layer_norm
from clip_deploy.rewrites.patch_embedding import conv_to_matmul
from clip_deploy.rewrites.reshapes import drop_idle_reshapes, join_shapes
from clip_deploy.rewrites.skip_layer_norm import fuse_skip_layer_norm

FOLD_BYTES = 1 << 30  # weights are folded, whatever their size
TOLERANCE = 1e-4  # largest difference that a rewrite may make, relative to the output's largest value

Rewrite = Callable[[Path, Path], bool]
Step = list[tuple[str, Rewrite]]  # alternatives, by name


@dataclass
class Fused:
    """What became of a tower's rewrites.

    Attributes:
        undone: the steps that changed the outputs, with the tower's name.
        found: how many operations of each kind that was asked for the graph has now, by the kinds of core.fusions.
    """

    undone: list[str]
    found: dict[str, int]


def facts_of(made: Mapping[str, Fused], operations: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """What a target's build says of its fusions, by tower: `rewrites_undone` and `fusions`, each where there is any.

    Args:
        made: by tower, what fuse returned.
        operations: by tower, what there is to be found, as the export counted it on the PyTorch model.
    """
    undone = [step for tower in made.values() for step in tower.undone]
    fusions = {
        name: {kind: [found, operations[name][kind]] for kind, found in tower.found.items()}
        for name, tower in made.items()
        if tower.found
    }
    return ({"rewrites_undone": undone} if undone else {}) | ({"fusions": fusions} if fusions else {})


def rewrites_of(shape: TowerShape, settings: OptimizeConfig, packed: bool = True) -> list[Step]:
    """The rewrites of a tower, step by step; of several in one step, the first that leaves the outputs is kept."""
    return [
        [("attention", partial(_edit, lambda model: fuse_attention(model, shape.heads, packed) > 0))],
        [
            ("causal mask", partial(_edit, lambda model: replace_masks(model, causal=True))),
            ("padding mask", partial(_edit, lambda model: replace_masks(model, causal=False))),
        ],
        [("gelu", partial(_edit, lambda model: fuse_gelu(model) > 0))],
        [("layer_norm", partial(_edit, lambda model: fuse_layer_norm(model) > 0))],
        [("reshapes", partial(_edit, _simplify_shapes))],
        [("patch_embedding", partial(_edit, conv_to_matmul))],
        [("early_pooling", partial(_edit, pool_early))],
        [("skip_layer_norm", partial(_edit, lambda model: fuse_skip_layer_norm(model) > 0))]
        if settings.skip_layer_norm
        else [],
        [("masks", partial(_edit, clamp_masks))] if settings.precision is Precision.fp16 else [],
    ]


def causal_only(rewrites: list[Step]) -> list[Step]:
    """The same without a mask of padding where the order of tokens masks enough: a GPU's fastest kernels take none."""
    alone: Rewrite = partial(_edit, lambda model: replace_masks(model, causal=True, padding=False))
    first = [("causal mask alone", alone)]
    return [first + step if step and step[0][0] == "causal mask" else step for step in rewrites]


def for_cuda(rewrites: list[Step], context: int) -> list[Step]:
    """The same with what ONNX Runtime needs on a GPU: the packed matmul inside attention, and no search in integers."""
    held: Rewrite = partial(_edit, fuse_packed_attention)
    return [
        *causal_only(rewrites),
        [("packed attention", held)],
        [("end of text", partial(_edit, lambda model: float_argmax(model, context)))],
    ]


def fuse(source: Path, output: Path, rewrites: list[Step], examples: dict[str, list[Any]]) -> Fused:
    """Rewrite one tower, and say what was found and what had to be undone.

    Args:
        source: the graph as it was exported.
        output: where to write the fused one.
        rewrites: as rewrites_of gives them.
        examples: Model.examples, on which the outputs are compared.
    """
    feeds = onnx_file.random_feeds(source, examples)
    expected = onnx_file.run(source, feeds)
    undone: list[str] = []
    done: set[str] = set()
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        current = Path(folder) / "simplified.onnx"
        _edit(lambda model: True, source, current)
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
                    done.add(name)
                    break
            if tried and kept is None:
                undone.append(f"{output.stem}: {', '.join(tried)}")
            current = kept or current
        onnx_file.save(ir.load(current), output)
    asked = [kind for kind in KINDS if any(kind == name for step in rewrites for name, _ in step)]
    counts = onnx_file.describe(output).fusion
    return Fused(undone, {kind: counts.get(kind, int(kind in done)) for kind in asked})


def _edit(edit: Callable[[ir.Model], bool], source: Path, output: Path) -> bool:
    """Apply an edit of the graph in memory; False where it found nothing to do."""
    model = ir.load(source)
    if not edit(model):
        return False
    simplify(model)
    rewrite(model, [gemm_to_matmul_add_rule])
    _gemm_to_matmul(model.graph)
    fold_constants(model, input_size_limit=FOLD_BYTES, output_size_limit=FOLD_BYTES)
    onnx_file.save(model, output)
    return True


def _simplify_shapes(model: ir.Model) -> bool:
    """True in any case: _edit itself leaves a simpler graph."""
    drop_idle_reshapes(model)
    join_shapes(model)
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


def _gives(expected: np.ndarray, path: Path, feeds: dict[str, np.ndarray]) -> bool:
    """Whether a graph runs and gives what it gave before."""
    try:
        actual = onnx_file.run(path, feeds)
    except DeployError:
        return False
    limit = TOLERANCE * float(np.abs(expected).max())
    return expected.shape == actual.shape and bool(np.abs(expected - actual).max() <= limit)
