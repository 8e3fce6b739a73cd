"""A model repository whose towers are TensorRT engines, for Triton's tensorrt backend, as in NVIDIA's container.

The models around the towers are those of every repository (repository.py). An engine is valid for one GPU and one
version of TensorRT: manifest.json names both, and the container must bring that version.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from clip_deploy.core.artifact import EMBEDS, Target, hashes, read_target
from clip_deploy.core.config import BuildEngineConfig, GatesConfig, TritonConfig
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.core.files import new_folder, sha256, write_text
from clip_deploy.core.json_files import read_json
from clip_deploy.core.manifest import PROVENANCE
from clip_deploy.core.records import Validation
from clip_deploy.data.preprocessed import PREPROCESSOR, SCORES, TOKENIZER
from clip_deploy.evaluate.gates import failures_now
from clip_deploy.serving.repository import (
    described,
    preferred_sizes,
    tower_config,
    write_companions,
    write_model,
    write_warm_up,
)

LOADED = "TensorRT "  # what the backend's library calls itself; it loads no engine of TensorRT-RTX


def write_engine_repository(
    built: Path,
    record: Validation,
    gates: GatesConfig,
    origin: dict[str, Any],
    prepared: Path,
    benchmark: Path,
    engine: BuildEngineConfig,
    settings: TritonConfig,
    output: Path,
) -> dict[str, Any]:
    """Write tensorrt/ and manifest.json into `output`, whole or not at all.

    Args:
        built: the target with the engines.
        record: its reports/validate/<target>.json: only what passes its gate is served.
        gates: what each precision class must reach now.
        origin: its manifest, artifacts/<target>.manifest.json.
        prepared: artifacts/data, for the tokenizer, the preprocessing and what turns cosines into probabilities.
        benchmark: reports/benchmark, whose curves say which batch sizes are preferred.
        engine: the batches that it was built for.

    Returns what output/manifest.json holds: only the reason where there is nothing to serve.

    Raises DeployError where the engines are not those that were judged.
    """
    with new_folder(output) as folder:
        try:
            manifest = _manifest(built, record, gates, prepared, engine)
            found = _fill(folder / "tensorrt", built, manifest, prepared / "portable", benchmark, engine, settings)
            found = {**{key: origin[key] for key in PROVENANCE}, **found, "files": hashes(folder)}
        except UnavailableError as error:
            found = {"unavailable": str(error)}
        write_text(folder / "manifest.json", json.dumps(found, indent=2) + "\n")
    return found


def _manifest(
    built: Path, record: Validation, gates: GatesConfig, prepared: Path, engine: BuildEngineConfig
) -> dict[str, Any]:
    """What repository.py reads of a package's manifest."""
    target = read_target(built)
    _check(target, built, record, gates, engine)
    scores = read_json(prepared / "portable" / SCORES)
    for name in (SCORES, TOKENIZER, PREPROCESSOR):
        if name in scores["unavailable"]:
            raise UnavailableError(scores["unavailable"][name])
    judged = {tower: record.files[f"{tower}.engine"] for tower in EMBEDS}
    with np.load(prepared / "evaluation" / "reference.npz") as reference:
        dimension = int(reference["images"].shape[1])
    return {
        **{name: getattr(target.model, name) for name in ("image_size", "context_length", "pad_to_context")},
        **{name: scores[name] for name in ("logit_scale", "logit_bias", "activation")},
        "towers": {
            "vision": {"target": built.name, "image_input": "pixel_values", "sha256": judged["vision"]},
            "text": {"target": built.name, "inputs": target.model.text_inputs, "sha256": judged["text"]},
        },
        "dimension": dimension,
        "pad_token": read_json(prepared / "evaluation" / "manifest.json")["pad_token"],
        "device": "cuda",
        "valid_for": {name: target.said(name) for name in ("library", "built_for")},
    }


def _check(target: Target, built: Path, record: Validation, gates: GatesConfig, engine: BuildEngineConfig) -> None:
    if target.unavailable:
        raise UnavailableError(f"{built.name}: {target.unavailable}")
    if missed := failures_now(record, gates):
        raise UnavailableError(f"{built.name} is not fit to ship: {'; '.join(map(str, missed))}")
    if not target.said("library").startswith(LOADED):
        raise UnavailableError(
            f"{built.name} was built by {target.build['library']}, and Triton's tensorrt backend loads engines of "
            "TensorRT only: install NVIDIA's `tensorrt`, then `dvc repro`"
        )
    if engine.min_batch > 1:
        raise UnavailableError(f"{built.name} takes no single row: set build_engine.{built.name}.min_batch to 1")
    for name, judged in record.files.items():
        if not (built / name).is_file() or sha256(built / name) != judged:
            raise DeployError(f"{built / name} is not the file that was judged: run `dvc repro`")


def _fill(
    repository: Path,
    built: Path,
    manifest: dict[str, Any],
    portable: Path,
    benchmark: Path,
    engine: BuildEngineConfig,
    settings: TritonConfig,
) -> dict[str, Any]:
    towers = {}
    for tower in EMBEDS:
        most = min(settings.max_batch if tower == "vision" else settings.max_texts, engine.max_batch)
        preferred = preferred_sizes(manifest, tower, benchmark, most)
        config = tower_config(tower, "tensorrt", manifest, preferred, settings) | {"max_batch_size": most}
        del config["parameters"]  # ONNX Runtime's threads
        shutil.copyfile(built / f"{tower}.engine", write_model(repository, config, None) / "model.plan")
        towers[tower] = described(manifest["towers"][tower], preferred)
    write_warm_up(repository / "clip_text", np.ones(manifest["context_length"], dtype=np.int64))
    write_companions(repository, portable, manifest, settings)
    return {
        "towers": towers,
        "backends": ["tensorrt"],
        **manifest["valid_for"],
        "files": hashes(repository.parent),
    }
