"""Fused targets: the towers of an ONNX target, rewritten for ONNX Runtime, TensorRT or PyTorch."""

import logging
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from clip_deploy.core.artifact import Target, read_target
from clip_deploy.core.config import Device, OptimizeConfig, Precision, Provider
from clip_deploy.core.errors import UnavailableError
from clip_deploy.data.preprocessed import Prepared, feeds
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.pre_post import PrePost, attach, detach
from clip_deploy.rewrites.attention import fuse_packed_attention, replace_masks
from clip_deploy.rewrites.early_pooling import float_argmax
from clip_deploy.rewrites.fusion import Fused, Rewrite, Step, _edit, facts_of, fuse, rewrites_of
from clip_deploy.rewrites.half_precision import SCAN_ROWS, to_bfloat16, to_float16

RUNTIME_OF_PROVIDER = {Provider.own: "ort", Provider.tensorrt: "ort_tensorrt", Provider.torch: "fused"}


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
    made: dict[str, Fused] = {}
    in_fp32: list[str] = []
    with tempfile.TemporaryDirectory(dir=output) as folder:
        for tower, shape in target.model["towers"].items():
            bare, fused = Path(folder) / f"{tower}-bare.onnx", Path(folder) / f"{tower}.onnx"
            pre_post = detach(source / fused.name, bare)
            if settings.provider is Provider.torch:
                pre_post = PrePost()
            rewrites = rewrites_of(shape, settings)
            if settings.provider is Provider.tensorrt:
                rewrites = rewrites[-1:]  # masks alone: TensorRT reads no operators of ONNX Runtime's own
            elif settings.provider is Provider.torch:
                rewrites = causal_only(rewrites)
            elif device is Device.cuda:
                rewrites = for_cuda(rewrites, target.model["context_length"])
            made[tower] = fuse(bare, fused, rewrites, target.model["example_texts"])
            if settings.precision is Precision.fp16:
                inputs = calibration.inputs(tower, target.model["text_inputs"])
                kept = to_float16(fused, partial(feeds, inputs, SCAN_ROWS), settings.keep_fp32, device)
                in_fp32 += [f"{tower}: {node} ({value:.3g})" for node, value in kept.items()]
            elif settings.precision is Precision.bf16:
                to_bfloat16(fused, settings.keep_fp32)
            attach(fused, pre_post, output / fused.name)
    facts = facts_of(made, target.model["operations"])
    if settings.keep_fp32:
        facts["keep_fp32"] = settings.keep_fp32
    if settings.precision is Precision.fp16:
        facts["left_in_fp32"] = in_fp32
    elif settings.precision is Precision.fp32 and settings.provider is Provider.own and device is Device.cuda:
        facts["matmuls"] = "may be in TF32, the provider's default for float32"
    if settings.provider is Provider.torch:
        bare_model = {**target.model, "normalize": False, "classifier": None}
        target = replace(target, image_input="pixel_values", model=bare_model)
        facts["kernels"] = "ours or the library's, the faster for each shape"
    return replace(
        target,
        runtime=RUNTIME_OF_PROVIDER[settings.provider],
        precision=settings.precision.value,
        device=device.value,
        files=onnx_file.files_of(output),
        build={**target.build, "source": source.name, **facts},
    )


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
