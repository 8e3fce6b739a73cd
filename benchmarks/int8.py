"""What each way to INT8 costs in accuracy: python -m benchmarks.int8 (or `make bench-int8`), after `dvc repro`.

Our settings beside ONNX Runtime's quantize_static and quantize_dynamic with their defaults (one scale a tensor) on the
exported graphs. All are calibrated and judged on the same sets. Writes reports/int8.md and reports/int8.json.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import quantize_dynamic, quantize_static

from clip_deploy.builders.quantize import Reader, prepare, quantize
from clip_deploy.core.artifact import Target, build, read_target, size_bytes
from clip_deploy.core.config import AccuracyBudget, Calibration, Quantization, QuantizeConfig
from clip_deploy.core.environment import Environment
from clip_deploy.core.errors import first_line
from clip_deploy.core.files import write_text
from clip_deploy.core.json_files import write_json
from clip_deploy.core.parsing import plain, read_record
from clip_deploy.core.similarity import row_cosines
from clip_deploy.data.preprocessed import Prepared, load_prepared
from clip_deploy.evaluate.accuracy import flips, zero_shot
from clip_deploy.evaluate.embeddings import Embeddings, encode_set, load_embeddings
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.runtimes import open_encoder

ROOT = Path(__file__).resolve().parent.parent
ARTIFACTS, REPORTS = ROOT / "artifacts", ROOT / "reports"
SEED = 0
TYPES = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # what they cannot infer
BUDGET = AccuracyBudget(max_top1_drop=1.0, max_flips=2.0)
STATIC = partial(QuantizeConfig, method=Quantization.static)
OURS = {
    "dynamic": QuantizeConfig(),
    "dynamic, one scale a tensor": QuantizeConfig(per_channel=False),
    "static, minmax": STATIC(),
    "static, percentile": STATIC(calibration=Calibration.percentile),
    "static, entropy": STATIC(calibration=Calibration.entropy),
    "static, symmetric": STATIC(symmetric=True),
    "static, SmoothQuant 0.5": STATIC(smooth_quant=0.5),
    "static, one scale a tensor": STATIC(per_channel=False),
    "static, entropy, within the budget": STATIC(calibration=Calibration.entropy, accuracy_budget=BUDGET),
    "weight-only": QuantizeConfig(method=Quantization.weight_only),
}
HEAD = ("Way", "Left in float", "Top-1 %", "Drop in points, 95 % interval", "Flips %", "Lowest cosine", "Size MB")


def main() -> None:
    calibration, evaluation = (load_prepared(ARTIFACTS / "data" / name) for name in ("calibration", "evaluation"))
    reference = load_embeddings(ARTIFACTS / "data" / "evaluation" / "reference.npz")
    environment = read_record(Environment, REPORTS / "environment.json", null_is_nan=False)
    sets = environment.hardware.instruction_sets
    ways: dict[str, Callable[[Path], Target]] = {
        "ONNX Runtime's defaults, static": partial(by_defaults, "static", calibration),
        "ONNX Runtime's defaults, dynamic": partial(by_defaults, "dynamic", calibration),
    }
    for name, settings in OURS.items():
        ways[name] = partial(quantize, ARTIFACTS / "ort-fp32", settings, calibration, sets, SEED)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make in ways.items():
            output = Path(folder) / "int8"
            build(output, make, Target("ort", "int8"))
            rows.append({"way": name, **judged(output, evaluation, reference)})
            print(" | ".join(cells(rows[-1])), flush=True)
            shutil.rmtree(output)
    write_json(REPORTS / "int8.json", {"environment": plain(environment), "rows": rows})
    write_text(REPORTS / "int8.md", page(rows, environment))


def by_defaults(method: str, calibration: Prepared, output: Path) -> Target:
    """The exported graphs by ONNX Runtime's own quantiser, with its defaults."""
    logging.getLogger().setLevel(logging.ERROR)
    source = read_target(ARTIFACTS / "onnx-fp32")
    for tower in ("vision", "text"):
        with tempfile.TemporaryDirectory() as folder:
            ready = Path(folder) / "ready.onnx"
            prepare(ARTIFACTS / "onnx-fp32" / f"{tower}.onnx", ready)  # both stumble over the exporter's types
            if method == "static":
                reader = Reader(calibration.inputs(tower, source.model.text_inputs))
                quantize_static(ready, output / f"{tower}.onnx", reader, extra_options=TYPES)
            else:
                quantize_dynamic(ready, output / f"{tower}.onnx", extra_options=TYPES)
    return Target("ort", "int8", files=onnx_file.files_of(output), model=source.model)


def judged(folder: Path, evaluation: Prepared, reference: Embeddings) -> dict[str, Any]:
    target = read_target(folder)
    if target.unavailable:
        return {"unavailable": target.unavailable}
    try:
        actual = encode_set(open_encoder(folder), evaluation)
    except Exception as error:  # the runtime's errors share no base class
        return {"unavailable": first_line(error)}
    return {
        "left_in_float": len(target.search.left_in_float) if target.search else 0,
        **asdict(zero_shot(actual, reference, evaluation, SEED)),
        "flips": flips(actual, reference, evaluation),
        "cosine_min": {
            "vision": float(row_cosines(actual.images, reference.images).min()),
            "text": float(row_cosines(actual.captions, reference.captions).min()),
        },
        "size_mb": size_bytes(folder) / 1e6,
    }


def cells(row: dict[str, Any]) -> list[str]:
    if "unavailable" in row:
        return [row["way"], row["unavailable"], *[""] * (len(HEAD) - 2)]
    return [
        row["way"],
        str(row["left_in_float"]),
        f"{row['top1']:.2f}",
        f"{row['top1_drop']:.2f} [{row['top1_drop_low']:.2f}, {row['top1_drop_high']:.2f}]",
        f"{row['flips']:.2f}",
        " / ".join(f"{value:.4f}" for value in row["cosine_min"].values()),
        f"{row['size_mb']:.2f}",
    ]


def page(rows: list[dict[str, Any]], environment: Environment) -> str:
    hardware, software = environment.hardware, environment.software
    lines = [
        "# INT8: what each way costs",
        "",
        f"{hardware.cpu}; onnxruntime {software['onnxruntime']}. Written by `make bench-int8` from what the last",
        "`dvc repro` built. Drop and flips are those of the evaluation set against `torch-fp32`; cosine:",
        "vision / text. Our ways start from `ort-fp32`, ONNX Runtime's defaults from `onnx-fp32`. The budget, on the",
        f"calibration set: {BUDGET.max_top1_drop} point and {BUDGET.max_flips} % flips.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---|" + "---:|" * (len(HEAD) - 1),
    ]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)]) + "\n"


if __name__ == "__main__":
    main()
