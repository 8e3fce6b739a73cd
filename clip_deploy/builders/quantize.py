"""INT8 graphs by ONNX Runtime's quantizer: dynamic, static (QDQ) with ranges from the calibration set, or weight-only.

Which nodes stay in float, so that an accuracy budget holds, is searched by sensitivity.py.
"""

import logging
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

from clip_deploy.builders.sensitivity import Rounding, Switched, search
from clip_deploy.builders.smooth_quant import smooth
from clip_deploy.core.artifact import Target, read_source
from clip_deploy.core.config import AccuracyBudget, Calibration, Quantization, QuantizeConfig, ReduceRange
from clip_deploy.core.environment import has_vnni
from clip_deploy.core.model import Model
from clip_deploy.core.records import Facts, Search
from clip_deploy.data.preprocessed import Prepared, feeds
from clip_deploy.evaluate.accuracy import Loss, accuracy_cost, within_budget
from clip_deploy.evaluate.embeddings import encode_set
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.pre_post import attach, detach
from clip_deploy.runtimes.ort import Encoder

OPERATORS = ["MatMul", "Gather"]  # the fused graphs' matmuls, patches included, and the embedding tables
OPTIONS = {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}
BLOCK = 128  # weights that share a scale in weight_only
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
    seed: int,
    output: Path,
) -> Target:
    """Quantise both towers of the ONNX target `source` into `output`, within settings.accuracy_budget where one is set.

    Raises UnavailableError where the source could not be built.
    """
    target = read_source(source)
    logging.getLogger().setLevel(logging.ERROR)  # the quantizer advises a pre-processing step that fuse() replaces
    reduced = reduces_range(settings.reduce_range, instruction_sets)
    build = {**target.build, "source": source.name, **_described(settings, calibration, reduced)}
    result = replace(target, precision="int8", build=build)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        towers = _Towers(source, settings, calibration, reduced, target.model, Path(folder))
        if settings.accuracy_budget is None or not target.model.trained:
            towers.write([])
        else:
            result.search = _write_within(towers, settings.accuracy_budget, seed)
            result.build["left_in_float"] = len(result.search.left_in_float)
        towers.finish(output)
    result.files = onnx_file.files_of(output)
    return result


def _described(settings: QuantizeConfig, calibration: Prepared, reduced: bool) -> Facts:
    facts: Facts = {"method": settings.method.value, "per_channel": settings.per_channel}
    if settings.keep_fp32:
        facts["keep_fp32"] = settings.keep_fp32
    if settings.method is Quantization.static:
        facts |= {"calibration": settings.calibration.value, "calibration_images": len(calibration.pixel_values)}
        facts |= {"symmetric": settings.symmetric, "smooth_quant": settings.smooth_quant or "no"}
    if settings.accuracy_budget:
        facts["accuracy_budget"] = asdict(settings.accuracy_budget)
    return facts | {"reduce_range": reduced}


def _write_within(towers: "_Towers", budget: AccuracyBudget, seed: int) -> Search:
    """Search with rounded operands, then judge the real graphs: where they miss the budget, leave more in float.

    From the search's answer upwards in steps of a tenth of the nodes until the budget holds, then back by bisection.
    """
    switched = towers.switched()
    found = search(switched, towers.calibration, budget, seed)
    order = list(found.sensitivity)
    reference = encode_set(towers.encoder(towers.work), towers.calibration)

    def judged(left: int) -> Loss:
        towers.write(order[:left])
        return accuracy_cost(
            encode_set(towers.encoder(towers.small), towers.calibration), reference, towers.calibration, seed
        )

    written = left = len(found.left_in_float)
    missed = left - 1  # the search found the budget missed there, or nothing is left out
    loss = judged(left)
    while not within_budget(loss, budget) and left < len(order):
        missed, left = left, min(len(order), left + math.ceil(len(order) / 10))
        written, loss = left, judged(left)
    while left - missed > 1:
        written = (missed + left) // 2
        trial = judged(written)
        missed, left, loss = (missed, written, trial) if within_budget(trial, budget) else (written, left, loss)
    if written != left:
        towers.write(order[:left])
    return replace(found, left_in_float=order[:left], **vars(loss))


class _Towers:
    """Both towers on their way to INT8, without pre- and post-processing: `work` holds them plain, `small` in INT8."""

    def __init__(
        self,
        source: Path,
        settings: QuantizeConfig,
        calibration: Prepared,
        reduced: bool,
        model: Model,
        work: Path,
    ) -> None:
        self.settings, self.calibration, self.reduced = settings, calibration, reduced
        self.model, self.work, self.small = model, work, work / "int8"
        self.small.mkdir()
        self.plain = {tower: work / f"{tower}.onnx" for tower in ("vision", "text")}
        self.pre_posts = {}
        for tower, path in self.plain.items():
            bare = work / f"{tower}-bare.onnx"
            self.pre_posts[tower] = detach(source / path.name, bare)
            prepare(bare, path)
            if settings.keep_fp32:
                onnx_file.kept_nodes(onnx.load(path, load_external_data=False), tower, settings.keep_fp32)
            if settings.smooth_quant is not None:
                smooth(path, settings.smooth_quant, self._reader(tower))

    def write(self, left_in_float: list[str]) -> None:
        """Write both quantised graphs into `small`, less the nodes named "<tower>: <node>" here or in keep_fp32."""
        for tower, plain in self.plain.items():
            kept = [*self.settings.keep_fp32, *left_in_float]
            excluded = [name.split(": ", 1)[1] for name in kept if name.startswith(f"{tower}: ")]
            small = self.work / f"{tower}-small.onnx"
            self._quantise(tower, plain, small, excluded)
            onnx_file.save(ir.load(small), self.small / f"{tower}.onnx")

    def finish(self, output: Path) -> None:
        """Write the graphs of `small` into `output`, with what stands around them."""
        for tower, pre_post in self.pre_posts.items():
            attach(self.small / f"{tower}.onnx", pre_post, output / f"{tower}.onnx")

    def encoder(self, folder: Path) -> Encoder:
        return Encoder(folder, Target("ort", "int8", model=self.model), None)

    def switched(self) -> Switched:
        """Both towers with a switch at each node; static ranges are those of the fully quantised graphs."""
        rounding = {}
        for tower, plain in self.plain.items():
            rounding[tower] = Rounding(bits=7 if self.reduced else 8, per_channel=self.settings.per_channel)
            if self.settings.method is Quantization.static:
                small = self.work / f"{tower}-small.onnx"
                self._quantise(tower, plain, small, [])
                rounding[tower].ranges = activation_ranges(small)
        return Switched(self.plain, rounding, self.model.text_inputs, self.work)

    def _quantise(self, tower: str, plain: Path, small: Path, excluded: list[str]) -> None:
        if self.settings.method is Quantization.dynamic:
            _dynamic(plain, small, self.settings, self.reduced, excluded)
        elif self.settings.method is Quantization.static:
            _static(plain, small, self.settings, self.reduced, excluded, self._reader(tower))
        else:
            _weight_only(plain, small, excluded)

    def _reader(self, tower: str) -> "Reader":
        return Reader(self.calibration.inputs(tower, self.model.text_inputs))


def reduces_range(choice: ReduceRange, instruction_sets: list[str]) -> bool:
    """Whether weights get 7 bits: without VNNI, AVX2 adds u8 x s8 multiplications in 16 bits, which saturate."""
    if choice is ReduceRange.auto:
        return not has_vnni(instruction_sets)
    return choice is ReduceRange.always


def _dynamic(source: Path, output: Path, settings: QuantizeConfig, reduced: bool, excluded: list[str]) -> None:
    quantize_dynamic(
        source,
        output,
        op_types_to_quantize=OPERATORS,
        nodes_to_exclude=excluded,
        per_channel=settings.per_channel,
        reduce_range=reduced,
        weight_type=QuantType.QInt8,
        extra_options=OPTIONS,
    )


def _static(
    source: Path,
    output: Path,
    settings: QuantizeConfig,
    reduced: bool,
    excluded: list[str],
    reader: CalibrationDataReader,
) -> None:
    quantize_static(
        source,
        output,
        reader,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=OPERATORS,
        nodes_to_exclude=excluded,
        per_channel=settings.per_channel,
        reduce_range=reduced,
        activation_type=QuantType.QInt8 if settings.symmetric else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=METHODS[settings.calibration],
        extra_options={
            **OPTIONS,
            "ActivationSymmetric": settings.symmetric,
            "OpTypesToExcludeOutputQuantization": OPERATORS,  # what follows a matmul computes in float anyhow
        },
    )


def _weight_only(source: Path, output: Path, excluded: list[str]) -> None:
    """INT8 weights in blocks, multiplied by activations that are rounded in blocks as they come: MatMulNBits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # its import turns logging on

    logging.getLogger().setLevel(logging.ERROR)
    quantizer = MatMulNBitsQuantizer(
        onnx.load(source),
        bits=8,
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=4,
        nodes_to_exclude=excluded,
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(output), use_external_data_format=False)


def prepare(source: Path, output: Path) -> None:
    """Copy a graph with a name for each node and the type of each float tensor.

    The quantiser leaves in float what it knows no type of, which is all that ONNX Runtime's own operators give; and the
    exporter's types are stale behind the fusions.
    """
    model = onnx.load(source)
    del model.graph.value_info[:]
    onnx_file.name_nodes(model)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        onnx_file.declare_floats(model, onnx_file.float_tensors(model, Path(folder)))
    large = source.with_name(f"{source.name}.data").exists()
    onnx.save(model, output, save_as_external_data=large, location=f"{output.name}.data")


def activation_ranges(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scale and zero point of each matmul's input in a QDQ graph, by the matmul's name."""
    graph = onnx.load(path).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    found = {}
    for node in graph.node:
        back = made.get(node.input[0]) if node.op_type == "MatMul" else None
        if back is not None and back.op_type == "DequantizeLinear" and back.input[1] in constants:
            scale, zero = (numpy_helper.to_array(constants[name]) for name in back.input[1:3])
            found[node.name] = (scale, zero)
    return found


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds one tower's calibration inputs, a few rows at a time."""

    def __init__(self, inputs: dict[str, np.ndarray]) -> None:
        self.inputs = inputs
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.rows, None)

    def rewind(self) -> None:
        self.rows = feeds(self.inputs, CALIBRATION_BATCH)
