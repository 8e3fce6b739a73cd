"""TensorRT engines of both towers, from the graphs as they were exported: it fuses by itself, and our fused graphs hold
operators of ONNX Runtime's own.

The network is strongly typed: what runs in float16 is what the graph says, so a node that would overflow stays in FP32.
An engine is valid for the GPU, the driver and the version of TensorRT that built it, and for nothing else.
"""

import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from clip_deploy.core.artifact import Target, read_source
from clip_deploy.core.config import BuildEngineConfig, Device, Precision
from clip_deploy.core.environment import gpus
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.model import Model
from clip_deploy.core.records import Facts
from clip_deploy.data.preprocessed import Prepared, feeds
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.pre_post import detach
from clip_deploy.rewrites.half_precision import SCAN_ROWS, clamp_masks, in_words, to_float16
from clip_deploy.runtimes.tensorrt_library import INSTALL, is_rtx, load_tensorrt, log_of, validity

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def build_engine(source: Path, settings: BuildEngineConfig, calibration: Prepared, output: Path) -> Target:
    """Write vision.engine and text.engine for this machine's GPU, in float32 or float16; inputs and outputs as in ONNX.

    `source` is an ONNX target in FP32, not fused; what stands around its towers (preprocessing, heads) is left out.
    TensorRT-RTX builds without a GPU too.

    Raises UnavailableError where the source could not be built, TensorRT is missing or lacks the GPU that it needs, it
    does not read or build a tower, or float16 gives NaN or Inf on the calibration set.
    """
    library = load_tensorrt()
    if not is_rtx(library) and not gpus():
        raise UnavailableError(
            "TensorRT builds engines only on a machine with an NVIDIA GPU. TensorRT-RTX builds them anywhere: "
            f"{INSTALL}"
        )
    target = read_source(source)
    in_fp32: list[str] = []
    with tempfile.TemporaryDirectory(dir=output) as folder:
        for tower in target.model.towers:
            bare, graph = Path(folder) / f"{tower}-bare.onnx", Path(folder) / f"{tower}.onnx"
            detach(source / graph.name, bare)
            if settings.precision is Precision.fp32:
                graph = bare
            else:
                kept = _to_float16(bare, graph, calibration.inputs(tower, target.model.text_inputs))
                in_fp32 += in_words(tower, kept)
            _build(library, graph, settings, target.model.context_length, output / f"{tower}.engine")
    facts = {name: target.build[name] for name in ("opset", "exporter")} | {"source": source.name, **validity(library)}
    return Target(
        runtime="tensorrt",
        precision=settings.precision.value,
        device="cuda",
        files=["text.engine", "vision.engine"],
        model=target.model.bare(),
        build={**facts, **_choices(library, settings, target.model), **_precision(settings, in_fp32)},
    )


def _choices(library: Any, settings: BuildEngineConfig, model: Model) -> dict[str, str]:
    facts = {"batches": f"{settings.min_batch} to {settings.max_batch}, best at {settings.opt_batch}"}
    if not model.pad_to_context:
        facts["tokens"] = f"1 to {model.context_length}"
    return facts | ({"supported": "by NVIDIA on RTX cards only"} if is_rtx(library) else {})


def _precision(settings: BuildEngineConfig, in_fp32: list[str]) -> Facts:
    if settings.precision is Precision.fp16:
        return {"left_in_fp32": in_fp32}
    return {"matmuls": "may be in TF32, TensorRT's default for float32"}


def _to_float16(bare: Path, half: Path, inputs: dict[str, Any]) -> dict[str, float]:
    """Write the graph in float16, and return the nodes that stay in float32 with their largest values."""
    model = ir.load(bare)
    clamp_masks(model)
    onnx_file.save(model, half)
    return to_float16(half, partial(feeds, inputs, SCAN_ROWS), device=Device.cuda)


def _build(library: Any, graph: Path, settings: BuildEngineConfig, context: int, output: Path) -> None:
    """Write one tower's engine."""
    log = log_of(library)
    builder = library.Builder(log)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        reason = parser.get_error(0).desc().strip().splitlines()[0]
        raise UnavailableError(f"TensorRT cannot read the {output.stem} tower: {reason}")
    _take_attention_apart(library, network)
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, settings, context))
    cache = _configure(library, config, output)
    log.errors.clear()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UnavailableError(f"TensorRT cannot build the {output.stem} tower: {log.first_error()}")
    output.write_bytes(engine)
    if cache is not None:
        timed = output.with_name(cache.name)
        timed.write_bytes(config.get_timing_cache().serialize())
        timed.replace(cache)


def _take_attention_apart(library: Any, network: Any) -> None:
    """Allow ONNX's own Attention (opset 23) to become several kernels where none does all of it, as in float32."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = library.IAttentionInputLayer  # the binding's way to what a kind of layer has of its own
            layer.attention.decomposable = True


def _profile(builder: Any, network: Any, settings: BuildEngineConfig, context: int) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *shapes_of(tuple(tensor.shape), settings, context))
    return profile


def shapes_of(shape: tuple[int, ...], settings: BuildEngineConfig, context: int) -> Shapes:
    """An input's smallest, usual and largest shape: the batch, and a text's tokens where their number is free (-1)."""

    def at(batch: int, tokens: int) -> tuple[int, ...]:
        free = (batch, tokens)
        return tuple(free[axis] if size < 0 else size for axis, size in enumerate(shape))

    return at(settings.min_batch, 1), at(settings.opt_batch, context), at(settings.max_batch, context)


def _configure(library: Any, config: Any, output: Path) -> Path | None:
    """Say how to build, and return where to keep what the builder has timed.

    TensorRT-RTX times nothing: its kernels are compiled where they run. Given a timing cache it would ask for a GPU.
    https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/timing-cache-migration.html
    """
    if is_rtx(library):
        return None
    valid = "-".join(validity(library).values())
    cache = output.parent.parent / f".timing-{re.sub('[^A-Za-z0-9.]+', '-', valid)}.cache"  # beside the targets
    known = cache.read_bytes() if cache.exists() else b""
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return cache
