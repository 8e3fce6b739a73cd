"""OpenVINO IR of both towers, read from our fused graphs; INT8 by NNCF.

OpenVINO's own reading of a PyTorch tower computes the last layer for every token and QuickGELU in three nodes; from the
fused graph it takes pooling, patches and activations as they are. Query, key and value keep a matmul each: its plugin
cuts a packed INT8 matmul by copying it.

NNCF's accuracy control works on one model at a time: each tower is held to the whole budget while the other stays in
FP32, and validate judges both together.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from clip_deploy.core.artifact import EMBEDS, Target, read_source
from clip_deploy.core.config import AccuracyBudget, OpenVinoConfig, OptimizeConfig, Precision
from clip_deploy.core.environment import hardware, has_vnni
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.model import Model, image_feed
from clip_deploy.core.records import Facts
from clip_deploy.data.preprocessed import Prepared, feeds
from clip_deploy.evaluate.accuracy import accuracy_cost
from clip_deploy.evaluate.embeddings import Embeddings, encode_images, encode_texts
from clip_deploy.runtimes import text_feed

INSTALL = "pip install '.[openvino]'"
CALIBRATION_BATCH = 4


def export_openvino(source: Path, settings: OpenVinoConfig, calibration: Prepared, seed: int, output: Path) -> Target:
    """Write vision.xml and text.xml with their weights, in float32, for bfloat16 (float16 weights) or in INT8.

    `source` is an ONNX target in FP32; what stands around its towers (preprocessing, heads) is left out.
    Raises UnavailableError where the source could not be built, OpenVINO or NNCF is missing, a tower cannot be
    converted, or the CPU has no bfloat16.
    """
    openvino = _imported("openvino")
    _check_cpu(openvino, settings.precision)
    nncf = _imported("nncf") if settings.precision is Precision.int8 else None
    target = read_source(source)
    models, fusions = _convert(openvino, source, target, calibration, output)
    facts: dict[str, Any] = {name: target.build[name] for name in ("opset", "exporter")} | {"source": source.name}
    facts |= fusions
    if nncf is not None:
        models, made = _quantise(openvino, nncf, models, target.model, settings.accuracy_budget, calibration, seed)
        budget = {"accuracy_budget": asdict(settings.accuracy_budget)} if settings.accuracy_budget else {}
        facts |= budget | made
    for name, model in models.items():
        openvino.save_model(model, output / f"{name}.xml", compress_to_fp16=settings.precision is Precision.bf16)
    return Target(
        runtime="openvino",
        precision=settings.precision.value,
        files=sorted(path.name for path in output.iterdir()),
        model=target.model.bare(),
        build=facts,
    )


def _imported(name: str) -> Any:
    """Import a library of Intel's, without what sends statistics of its use to Google from the first import on."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name} is not installed: {INSTALL}") from error


def _check_cpu(openvino: Any, precision: Precision) -> None:
    if precision is Precision.bf16 and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError("this CPU has no bfloat16 instructions that OpenVINO knows")


def _convert(
    openvino: Any, source: Path, target: Target, calibration: Prepared, output: Path
) -> tuple[dict[str, Any], Facts]:
    """Both towers, fused, as OpenVINO models; and what was fused, for the target's build."""
    from clip_deploy.builders.preparation import Preparation  # seconds, which a missing library need not take
    from clip_deploy.rewrites.fusion import rewrites_of

    models, towers = {}, Preparation(source, target, calibration)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        for tower, shape in target.model.towers.items():
            graph, _ = towers.fuse(tower, rewrites_of(shape, OptimizeConfig(), packed=False), Path(folder))
            inputs = target.model.image_inputs if tower == "vision" else target.model.text_inputs
            models[tower] = _read(openvino, graph, inputs)
    return models, towers.facts()


def _read(openvino: Any, path: Path, inputs: list[str]) -> Any:
    try:
        converted = openvino.convert_model(path)
    except Exception as error:  # the converter's errors share no base class
        reason = str(error).strip().splitlines()[-1]
        raise UnavailableError(f"OpenVINO cannot convert the {path.stem} tower: {reason}") from error
    for port, name in zip(converted.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    converted.outputs[0].get_tensor().set_names({EMBEDS[path.stem]})
    return converted


class _Towers:
    """Compiled models behind the encoder's verbs."""

    image_input = "pixel_values"

    def __init__(self, compiled: dict[str, Any], text_inputs: list[str]) -> None:
        self.compiled, self.text_inputs = compiled, text_inputs

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.compiled["vision"](image_feed(images))[0].copy()
        return found

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.compiled["text"](text_feed(self.text_inputs, input_ids, attention_mask))[0].copy()
        return found

    def embeddings(self, tower: str, prepared: Prepared) -> dict[str, np.ndarray]:
        """What one tower gives for a prepared set, as fields of Embeddings."""
        if tower == "vision":
            return {"images": encode_images(self, prepared.pixel_values)}
        return {"captions": encode_texts(self, prepared.captions), "prompts": encode_texts(self, prepared.prompts)}


def _quantise(
    openvino: Any,
    nncf: Any,
    models: dict[str, Any],
    description: Model,
    budget: AccuracyBudget | None,
    calibration: Prepared,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both towers in INT8, and how. The fastest arrangement is tried first: symmetric, without SmoothQuant's scaling.

    Where that breaks the budget, NNCF's accuracy control searches from its most accurate one.
    """
    text_inputs = description.text_inputs
    core = openvino.Core()
    compiled = {
        name: core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}) for name, model in models.items()
    }
    whole = _Towers(compiled, text_inputs)
    reference = Embeddings(**whole.embeddings("vision", calibration), **whole.embeddings("text", calibration))
    facts: dict[str, Any] = {"method": "NNCF", "calibration_images": len(calibration.pixel_values)}
    transformer = {"model_type": nncf.ModelType.TRANSFORMER}
    reduced = not has_vnni(hardware().instruction_sets)  # AVX2 adds u8 x s8 in 16 bits, which saturate
    facts["reduce_range"] = reduced
    half = {"overflow_fix": nncf.OverflowFix.ENABLE} if reduced else {}
    plain = nncf.AdvancedQuantizationParameters(
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1), **half
    )
    smooth = nncf.AdvancedQuantizationParameters(**half)
    fastest = {"preset": nncf.QuantizationPreset.PERFORMANCE, "advanced_parameters": plain, **transformer}
    accurate = {"preset": nncf.QuantizationPreset.MIXED, "advanced_quantization_parameters": smooth, **transformer}
    quantised = {}
    for name, model in models.items():
        data = nncf.Dataset(list(feeds(calibration.inputs(name, text_inputs), CALIBRATION_BATCH)))
        quantised[name] = nncf.quantize(model, data, **fastest)
        if budget is None or not description.trained:
            continue
        spent = _budget_spent(name, budget, reference, calibration, text_inputs, seed)
        share = -spent(core.compile_model(quantised[name], "CPU"), None)[0]
        facts[f"{name}_arrangement"] = "symmetric"
        if share > 1:
            quantised[name] = nncf.quantize_with_accuracy_control(
                model, data, data, spent, max_drop=1.0, drop_type=nncf.DropType.ABSOLUTE, **accurate
            )
            share = -spent(core.compile_model(quantised[name], "CPU"), None)[0]
            facts[f"{name}_arrangement"] = "SmoothQuant and accuracy control"
        facts[f"budget_spent_by_{name}"] = f"{100 * share:.0f} %"
    return quantised, facts


def _budget_spent(
    tower: str,
    budget: AccuracyBudget,
    reference: Embeddings,
    calibration: Prepared,
    text_inputs: list[str],
    seed: int,
) -> Callable[[Any, Any], tuple[float, None]]:
    """NNCF's metric: minus the share of the budget that a tower spends, so that a drop of 1 is all of it."""

    def spent(compiled: Any, _: Any) -> tuple[float, None]:
        own = _Towers({tower: compiled}, text_inputs).embeddings(tower, calibration)
        loss = accuracy_cost(replace(reference, **own), reference, calibration, seed)
        against = ((loss.top1_drop, budget.max_top1_drop), (loss.flips, budget.max_flips))
        return -max(max(lost, 0.0) / max(limit, 1e-6) for lost, limit in against), None

    return spent
