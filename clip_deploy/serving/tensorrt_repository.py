"""A model repository whose towers are TensorRT engines, for Triton's tensorrt backend, as in NVIDIA's container.

The models around the towers are those of every repository (repository.py). An engine is valid for one GPU and one
version of TensorRT: manifest.json names both, and the container must bring that version.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from clip_deploy.core.artifact import EMBEDS, Target, read_target
from clip_deploy.core.config import BuildEngineConfig, GatesConfig, TritonConfig
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.core.files import new_folder, sha256
from clip_deploy.core.json_files import read_json
from clip_deploy.core.manifest import INSIDE, Provenance, files_of, save_manifest
from clip_deploy.core.package import PREPROCESSOR, TOKENIZER, DualEncoder, ImageTower, TextTower, Towers
from clip_deploy.core.records import Validation
from clip_deploy.data.preprocessed import SCORES
from clip_deploy.evaluate.gates import failures_now
from clip_deploy.inference.tokenizer import vocabulary
from clip_deploy.serving.repository import (
    NoRepository,
    Repository,
    ServedTower,
    check_inputs,
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
    origin: Provenance,
    prepared: Path,
    benchmark: Path,
    engine: BuildEngineConfig,
    settings: TritonConfig,
    output: Path,
) -> Repository | NoRepository:
    """Write tensorrt/ and manifest.json into `output`, whole or not at all.

    Args:
        built: the target with the engines.
        record: its reports/validate/<target>.json: only what passes its gate is served.
        gates: what each precision class must reach now.
        origin: what artifacts/<target>.manifest.json says of it.
        prepared: artifacts/data, for the tokenizer, the preprocessing and what turns cosines into probabilities.
        benchmark: reports/benchmark, whose curves say which batch sizes are preferred.
        engine: the batches that it was built for.

    Returns what output/manifest.json holds.

    Raises DeployError where the engines are not those that were judged.
    """
    found: Repository | NoRepository
    with new_folder(output) as folder:
        try:
            target = read_target(built)
            _check(target, built, record, gates, engine)
            encoder = _encoder(target, built, record, prepared)
            check_inputs(encoder)
            towers = _fill(folder / "tensorrt", built, encoder, prepared / "portable", benchmark, engine, settings)
            found = Repository(
                origin=origin,
                towers=towers,
                backends=["tensorrt"],
                library=target.said("library"),
                built_for=target.said("built_for"),
                files=files_of(folder),
            )
        except UnavailableError as error:
            found = NoRepository(str(error))
        save_manifest(folder / INSIDE, found, indent=2)
    return found


def _encoder(target: Target, built: Path, record: Validation, prepared: Path) -> DualEncoder:
    """What a package's manifest would say of the engines."""
    scores = read_json(prepared / "portable" / SCORES)
    for name in (SCORES, TOKENIZER, PREPROCESSOR):
        if name in scores["unavailable"]:
            raise UnavailableError(scores["unavailable"][name])
    towers = {tower: _tower(tower, target, built.name, record) for tower in EMBEDS}
    with np.load(prepared / "evaluation" / "reference.npz") as reference:
        dimension = int(reference["images"].shape[1])
    return DualEncoder(
        towers=Towers(
            ImageTower(**towers["vision"], image_input="pixel_values"),
            TextTower(**towers["text"], inputs=target.model.text_inputs),
        ),
        dimension=dimension,
        image_size=target.model.image_size,
        vocabulary=vocabulary(prepared / "portable" / TOKENIZER),
        context_length=target.model.context_length,
        pad_to_context=target.model.pad_to_context,
        pad_token=read_json(prepared / "evaluation" / INSIDE)["pad_token"],
        logit_scale=scores["logit_scale"],
        logit_bias=scores["logit_bias"],
        activation=scores["activation"],
        normalized=target.model.normalize,
        device="cuda",
        requires=[],
        patches=target.model.patches,
    )


def _tower(tower: str, target: Target, name: str, record: Validation) -> dict[str, Any]:
    file = f"{tower}.engine"
    return {
        "target": name,
        "precision": target.precision,
        "runtime": target.runtime,
        "files": [file],
        "sha256": record.files[file],
        "batch_sizes": [],
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
            raise DeployError(f"{built / name} is not the file that was checked: run `dvc repro`")


def _fill(
    repository: Path,
    built: Path,
    encoder: DualEncoder,
    portable: Path,
    benchmark: Path,
    engine: BuildEngineConfig,
    settings: TritonConfig,
) -> dict[str, ServedTower]:
    towers = {}
    for tower in EMBEDS:
        most = min(settings.max_batch if tower == "vision" else settings.max_texts, engine.max_batch)
        preferred = preferred_sizes(built.name, tower, benchmark, most)
        config = tower_config(tower, "tensorrt", encoder, preferred, settings) | {"max_batch_size": most}
        del config["parameters"]  # ONNX Runtime's threads
        shutil.copyfile(built / f"{tower}.engine", write_model(repository, config, None) / "model.plan")
        towers[tower] = described(encoder.towers[tower], preferred)
    write_warm_up(repository / "clip_text", encoder.context_length)
    write_companions(repository, portable, encoder, settings)
    return towers
