"""OpenVINO IR of both towers, as OpenVINO's own converter reads them from PyTorch; INT8 by NNCF.

NNCF's accuracy control works on one model at a time: each tower is held to the whole budget while the other stays in
FP32, and validate judges both together. It compiles with the plugin's own choice of precision, bf16 where the CPU has
it; what is shipped, and the share of the budget that is reported, computes in FP32 what is not INT8.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from clip_deploy.accuracy import losses
from clip_deploy.artifact import Target, read_target
from clip_deploy.checkpoint import load_model
from clip_deploy.config import AccuracyBudget, OpenVinoConfig, Precision
from clip_deploy.encode import Embeddings, encode_images, encode_texts
from clip_deploy.errors import UnavailableError
from clip_deploy.prepared import Prepared, feeds

INSTALL = "pip install '.[openvino]'"
CALIBRATION_BATCH = 4
OUTPUTS = {"vision": "image_embeds", "text": "text_embeds"}


def export_openvino(
    checkpoint: Path, settings: OpenVinoConfig, calibration: Prepared, seed: int, output: Path
) -> Target:
    """Write vision.xml and text.xml with their weights, in float32, for bfloat16 (float16 weights) or in INT8.

    Raises UnavailableError where OpenVINO or NNCF is missing, a tower cannot be converted, or the CPU has no bfloat16.
    """
    openvino = _imported("openvino")
    _check_cpu(openvino, settings.precision)
    if settings.precision is Precision.int8:
        _imported("nncf")
    from clip_deploy.towers import dynamic_axes, example_inputs, split  # seconds, which a missing library need not take

    source = read_target(checkpoint)
    inputs = example_inputs(source.model)
    models = {
        name: _convert(openvino, tower, inputs[name], name, source.model, set(dynamic_axes(source.model)[name]))
        for name, tower in split(load_model(checkpoint), inputs).items()
    }
    facts: dict[str, Any] = {"note": "OpenVINO's converter, from PyTorch"}
    if settings.precision is Precision.int8:
        models, facts = _quantise(openvino, models, source.model, settings.accuracy_budget, calibration, seed)
    for name, model in models.items():
        openvino.save_model(model, output / f"{name}.xml", compress_to_fp16=settings.precision is Precision.bf16)
    return Target(
        runtime="openvino",
        precision=settings.precision.value,
        files=sorted(path.name for path in output.iterdir()),
        model=source.model,
        build=facts,
    )


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name} is not installed: {INSTALL}") from error


def _check_cpu(openvino: Any, precision: Precision) -> None:
    if precision is Precision.bf16 and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise UnavailableError("OpenVINO finds no bfloat16 instructions on this CPU")


def _convert(openvino: Any, tower: Any, inputs: tuple, name: str, model: dict[str, Any], axes: set[int]) -> Any:
    names = ["pixel_values"] if name == "vision" else model["text_inputs"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracer warnings: validate checks other shapes
            converted = openvino.convert_model(tower, example_input=inputs)
    except Exception as error:  # the converter's errors share no base class
        raise UnavailableError(f"OpenVINO does not convert the {name} tower: {str(error).splitlines()[0]}") from error
    shapes = {}
    for port, given, values in zip(converted.inputs, names, inputs, strict=True):
        port.get_tensor().set_names({given})
        shapes[given] = openvino.PartialShape([-1 if axis in axes else size for axis, size in enumerate(values.shape)])
    converted.outputs[0].get_tensor().set_names({OUTPUTS[name]})
    converted.reshape(shapes)
    return converted


class _Towers:
    """Compiled models behind the encoder's verbs."""

    image_input = "pixel_values"

    def __init__(self, compiled: dict[str, Any], text_inputs: list[str]) -> None:
        self.compiled, self.text_inputs = compiled, text_inputs

    def encode_images(self, pixel_values: np.ndarray) -> np.ndarray:
        return self.compiled["vision"]({"pixel_values": pixel_values})[0].copy()

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.compiled["text"]({name: given[name] for name in self.text_inputs})[0].copy()

    def embeddings(self, tower: str, prepared: Prepared) -> dict[str, np.ndarray]:
        """What one tower gives for a prepared set, as fields of Embeddings."""
        if tower == "vision":
            return {"images": encode_images(self, prepared.pixel_values)}
        return {"captions": encode_texts(self, prepared.captions), "prompts": encode_texts(self, prepared.prompts)}


def _quantise(
    openvino: Any,
    models: dict[str, Any],
    description: dict[str, Any],
    budget: AccuracyBudget | None,
    calibration: Prepared,
    seed: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    nncf = _imported("nncf")
    text_inputs = description["text_inputs"]
    core = openvino.Core()
    compiled = {
        name: core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}) for name, model in models.items()
    }
    whole = _Towers(compiled, text_inputs)
    reference = Embeddings(**whole.embeddings("vision", calibration), **whole.embeddings("text", calibration))
    facts: dict[str, Any] = {
        "converter": "torch",
        "method": "NNCF",
        "calibration_images": len(calibration.pixel_values),
    }
    quantised = {}
    for name, model in models.items():
        data = nncf.Dataset(list(feeds(calibration.inputs(name, text_inputs), CALIBRATION_BATCH)))
        settings = {"model_type": nncf.ModelType.TRANSFORMER, "preset": nncf.QuantizationPreset.MIXED}
        if budget is None or not description["trained"]:
            quantised[name] = nncf.quantize(model, data, **settings)
            continue
        spent = _budget_spent(name, budget, reference, calibration, text_inputs, seed)
        quantised[name] = nncf.quantize_with_accuracy_control(
            model, data, data, spent, max_drop=1.0, drop_type=nncf.DropType.ABSOLUTE, **settings
        )
        share = -spent(core.compile_model(quantised[name], "CPU"), [])[0]
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
        loss = losses(replace(reference, **own), reference, calibration, seed)
        limits = {"top1_drop": budget.max_top1_drop, "flips": budget.max_flips}
        return -max(max(loss[name], 0.0) / max(limit, 1e-6) for name, limit in limits.items()), None

    return spent
