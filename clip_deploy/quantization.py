"""INT8 graphs by ONNX Runtime's quantizer: dynamic, or static (QDQ) with ranges from the calibration set."""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from clip_deploy import onnx_graph
from clip_deploy.artifact import Target, read_target
from clip_deploy.config import Calibration, Quantization, QuantizeConfig, ReduceRange
from clip_deploy.environment import has_vnni
from clip_deploy.errors import UnavailableError
from clip_deploy.prepared import Prepared, batches

DYNAMIC_OPERATORS = ["MatMul", "Gemm", "Gather", "Attention"]  # the patch embedding (Conv) stays in float
STATIC_OPERATORS = ["MatMul", "Gemm"]
METHODS = {
    Calibration.minmax: CalibrationMethod.MinMax,
    Calibration.entropy: CalibrationMethod.Entropy,
    Calibration.percentile: CalibrationMethod.Percentile,
}
CALIBRATION_BATCH = 8


def quantize(
    source: Path,
    settings: QuantizeConfig,
    calibration: Prepared,
    instruction_sets: list[str],
    output: Path,
) -> Target:
    """Quantise both towers of the ONNX target `source` into `output`.

    Raises UnavailableError where the source could not be built.
    """
    target = read_target(source)
    if target.unavailable:
        raise UnavailableError(f"{source.name}: {target.unavailable}")
    logging.getLogger().setLevel(logging.ERROR)  # the quantizer advises a pre-processing step that fuse() replaces
    reduced = reduces_range(settings.reduce_range, instruction_sets)
    for tower in ("vision", "text"):
        with tempfile.TemporaryDirectory(dir=output) as folder:
            plain, small = Path(folder) / "plain.onnx", Path(folder) / "small.onnx"
            _without_value_info(source / f"{tower}.onnx", plain)
            if settings.method is Quantization.dynamic:
                _dynamic(plain, small, settings, reduced)
            else:
                _static(plain, small, settings, reduced, _Reader(calibration, tower, target.model["text_inputs"]))
            onnx_graph.save(ir.load(small), output / f"{tower}.onnx")
    build: dict[str, Any] = {
        "source": source.name,
        "method": settings.method.value,
        "per_channel": settings.per_channel,
    }
    if settings.method is Quantization.static:
        build |= {"calibration": settings.calibration.value, "calibration_images": len(calibration.pixel_values)}
    return Target(
        runtime="ort",
        precision="int8",
        files=onnx_graph.files_of(output),
        model=target.model,
        build={**target.build, **build, "reduce_range": reduced},
    )


def reduces_range(choice: ReduceRange, instruction_sets: list[str]) -> bool:
    """Whether weights get 7 bits: without VNNI, AVX2 adds u8 x s8 products in 16 bits, which saturate."""
    if choice is ReduceRange.auto:
        return not has_vnni(instruction_sets)
    return choice is ReduceRange.always


def _dynamic(source: Path, output: Path, settings: QuantizeConfig, reduced: bool) -> None:
    quantize_dynamic(
        source,
        output,
        op_types_to_quantize=DYNAMIC_OPERATORS,
        per_channel=settings.per_channel,
        reduce_range=reduced,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def _static(source: Path, output: Path, settings: QuantizeConfig, reduced: bool, reader: CalibrationDataReader) -> None:
    quantize_static(
        source,
        output,
        reader,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=STATIC_OPERATORS,
        per_channel=settings.per_channel,
        reduce_range=reduced,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=METHODS[settings.calibration],
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def _without_value_info(source: Path, output: Path) -> None:
    """Copy a graph without its intermediate types: stale after a rewrite, they stop shape inference."""
    model = onnx.load(source)
    del model.graph.value_info[:]
    large = source.with_name(f"{source.name}.data").exists()
    onnx.save(model, output, save_as_external_data=large, location=f"{output.name}.data")


class _Reader(CalibrationDataReader):
    """Feeds one tower's calibration inputs, a few rows at a time."""

    def __init__(self, calibration: Prepared, tower: str, text_inputs: list[str]) -> None:
        texts = calibration.texts
        self.arrays = {name: getattr(texts, name) for name in text_inputs}
        if tower == "vision":
            self.arrays = {"pixel_values": calibration.pixel_values}
        self.rows = self._all_rows()

    def _all_rows(self) -> Iterator[slice]:
        return batches(len(next(iter(self.arrays.values()))), CALIBRATION_BATCH)

    def get_next(self) -> dict[str, np.ndarray] | None:
        rows = next(self.rows, None)
        if rows is None:
            return None
        return {name: np.ascontiguousarray(array[rows]) for name, array in self.arrays.items()}

    def rewind(self) -> None:
        self.rows = self._all_rows()
