"""Fused targets: the towers of an ONNX target, rewritten for ONNX Runtime, TensorRT or PyTorch; FP8 by fp8.py."""

import logging
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from clip_deploy.builders import fp8
from clip_deploy.builders.preparation import Preparation
from clip_deploy.builders.sensitivity import FP8_OPSET
from clip_deploy.core.artifact import Target, read_source
from clip_deploy.core.config import Device, OptimizeConfig, Precision, Provider
from clip_deploy.core.model import TowerShape
from clip_deploy.core.records import Facts, Search
from clip_deploy.data.preprocessed import Prepared
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.pre_post import PrePost, attach
from clip_deploy.rewrites.fusion import Step, causal_only, for_cuda, rewrites_of
from clip_deploy.rewrites.half_precision import to_bfloat16

RUNTIME_OF_PROVIDER = {Provider.own: "ort", Provider.tensorrt: "ort_tensorrt", Provider.torch: "fused"}


def optimize(
    source: Path,
    settings: OptimizeConfig,
    calibration: Prepared,
    output: Path,
    device: Device = Device.cpu,
    seed: int = 0,
) -> Target:
    """Fuse both towers of the ONNX target `source` into `output`, in the settings' precision, to run on `device`.

    FP8 keeps to settings.accuracy_budget where one is set. For PyTorch, what stands around the towers (preprocessing,
    heads) is left out.
    Raises UnavailableError where the source could not be built, or gives NaN or Inf on the calibration set in float16.
    """
    target = read_source(source)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # what cannot be folded
    towers = Preparation(source, target, calibration, device)
    search = None
    with tempfile.TemporaryDirectory(dir=output) as folder:
        graphs, around = {}, {}
        for tower, shape in target.model.towers.items():
            rewrites = _rewrites(shape, settings, device, target.model.context_length)
            graphs[tower], around[tower] = towers.fuse(tower, rewrites, Path(folder))
        if settings.precision is Precision.fp8:
            budget = settings.accuracy_budget
            scales, search = fp8.choose(graphs, target.model, calibration, budget, seed, device)
        for tower, graph in graphs.items():
            if settings.precision in (Precision.fp16, Precision.fp8):
                towers.to_float16(tower, graph, settings.keep_fp32)
            elif settings.precision is Precision.bf16:
                to_bfloat16(graph, settings.keep_fp32)
            if settings.precision is Precision.fp8:
                scales[tower] = fp8.quantise(graph, scales[tower])
            bare = settings.provider is Provider.torch
            attach(graph, PrePost() if bare else around[tower], output / graph.name)
    facts = towers.facts()
    if settings.keep_fp32:
        facts["keep_fp32"] = settings.keep_fp32
    if settings.precision is Precision.fp32 and settings.provider is Provider.own and device is Device.cuda:
        facts["matmuls"] = "may be in TF32, the provider's default for float32"
    if settings.provider is Provider.torch:
        target = replace(target, image_input="pixel_values", model=target.model.bare())
        facts["kernels"] = "ours or the library's, the faster for each shape"
    if settings.precision is Precision.fp8:
        facts |= _fp8_facts(settings, scales, search, device)
        facts["opset"] = max(target.opset or 0, FP8_OPSET)
    return replace(
        target,
        runtime=RUNTIME_OF_PROVIDER[settings.provider],
        precision=settings.precision.value,
        device=device.value,
        search=search,
        files=onnx_file.files_of(output),
        build={**target.build, "source": source.name, **facts},
    )


def _fp8_facts(settings: OptimizeConfig, scales: dict[str, fp8.Scales], search: Search | None, device: Device) -> Facts:
    facts: Facts = {"fp8_matmuls": sum(map(len, scales.values()))}
    if settings.accuracy_budget is not None:
        facts["accuracy_budget"] = asdict(settings.accuracy_budget)
    if search is not None:
        facts["left_in_float"] = len(search.left_in_float)
    if device is Device.cpu:
        facts["kernels"] = "FP8 simulated in float32, rounded exactly: accurate and slow"
    return facts


def _rewrites(shape: TowerShape, settings: OptimizeConfig, device: Device, context: int) -> list[Step]:
    rewrites = rewrites_of(shape, settings)
    if settings.provider is Provider.tensorrt:
        return rewrites[-1:]  # masks alone: TensorRT reads no operators of ONNX Runtime's own
    if settings.provider is Provider.torch:
        return causal_only(rewrites)
    return for_cuda(rewrites, context) if device is Device.cuda else rewrites
