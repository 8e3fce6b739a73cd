"""Fused graphs: onnxscript's ort_fusions first, ONNX Runtime's transformer optimizer after.

The first finds the attentions of towers exported from transformers 5, which the second no longer recognises; the second
adds QuickGELU and the LayerNormalization that follows a skip connection. A rewrite that changes the outputs is undone.
"""

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime.transformers.optimizer as transformer_optimizer
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.ort_fusions._core import fuse_xformers
from onnxscript.rewriter.rules.common import gemm_to_matmul_add_rule

from clip_deploy import onnx_graph
from clip_deploy.artifact import Target, read_target
from clip_deploy.config import Precision
from clip_deploy.errors import DeployError, UnavailableError

FOLD_BYTES = 1 << 30  # packed query, key and value weights are folded, whatever their size
TOLERANCE = 1e-3  # largest difference that a rewrite may make, relative to the output's largest value


def optimize(source: Path, precision: Precision, output: Path) -> Target:
    """Fuse both towers of the ONNX target `source` into `output`, in float32 or float16.

    Raises UnavailableError where the source could not be built.
    """
    target = read_target(source)
    if target.unavailable:
        raise UnavailableError(f"{source.name}: {target.unavailable}")
    undone: list[str] = []
    for tower, shape in target.model["towers"].items():
        undone += fuse(source / f"{tower}.onnx", output / f"{tower}.onnx", shape)
        if precision is Precision.fp16:
            halve(output / f"{tower}.onnx")
    return Target(
        runtime="ort",
        precision=precision.value,
        files=onnx_graph.files_of(output),
        model=target.model,
        build={**target.build, "source": source.name, **({"rewrites_undone": undone} if undone else {})},
    )


def fuse(source: Path, output: Path, shape: dict[str, int]) -> list[str]:
    """Fuse one tower with its own head count and width, and return the rewrites that had to be undone."""
    feeds = onnx_graph.random_feeds(source)
    expected = onnx_graph.run(source, feeds)
    undone = []
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        current = source
        for name, rewrite in (("ort_fusions", _rewrite_onnxscript), ("onnxruntime", _rewrite_onnxruntime)):
            step = Path(folder) / f"{name}.onnx"
            rewrite(current, step, shape)
            if _gives(expected, step, feeds):
                current = step
            else:
                undone.append(f"{output.stem}: {name}")
        onnx_graph.save(ir.load(current), output)
    return undone


def _rewrite_onnxscript(source: Path, output: Path, shape: dict[str, int]) -> None:
    """The fusions of onnxscript's optimize_for_ort without its FusedMatMul rules.

    FusedMatMul refuses operands of different rank when it runs (SigLIP's pooling head); where it fits, ONNX Runtime
    makes it itself.
    """
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it names each operator that it cannot fold
    model = ir.load(source)
    rewrite(model, [gemm_to_matmul_add_rule])
    model, _ = fuse_xformers(model)
    fold_constants(model, input_size_limit=FOLD_BYTES, output_size_limit=FOLD_BYTES)
    onnx_graph.save(model, output)


def _rewrite_onnxruntime(source: Path, output: Path, shape: dict[str, int]) -> None:
    fused = transformer_optimizer.optimize_model(
        str(source), model_type="clip", num_heads=shape["heads"], hidden_size=shape["width"], opt_level=0
    )
    onnx_graph.save(ir.from_proto(fused.model), output)


def halve(path: Path) -> None:
    """Convert a graph's weights and computation to float16 in place; inputs and outputs stay float32."""
    model = onnx.load(path)
    del model.graph.value_info[:]  # the fusions leave stale types
    halved = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
    for part in path.parent.glob(f"{path.name}*"):
        part.unlink()
    result = ir.from_proto(halved)
    result.graph.sort()  # the converter appends its casts of the inputs at the end
    onnx_graph.save(result, path)


def _gives(expected: np.ndarray, path: Path, feeds: dict[str, np.ndarray]) -> bool:
    """Whether a graph runs and gives what it gave before."""
    try:
        actual = onnx_graph.run(path, feeds)
    except DeployError:
        return False
    limit = TOLERANCE * float(np.abs(expected).max())
    return expected.shape == actual.shape and bool(np.abs(expected - actual).max() <= limit)
