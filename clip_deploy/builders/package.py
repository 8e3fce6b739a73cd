"""One folder with all that a deployment needs of the chosen targets: models, tokenizer, preprocessing, labels, hashes.

Only what passed its gate goes in, byte for byte as it was judged, and clip_deploy.inference opens it with the runtime
that judged it: of the libraries of others it needs none.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clip_deploy.core.artifact import TOWERS, Target, read_target, write_target
from clip_deploy.core.config import GatesConfig
from clip_deploy.core.environment import LIBRARIES
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.core.files import sha256, write_text
from clip_deploy.core.json_files import read_json
from clip_deploy.core.manifest import INSIDE, File, Run, files_of, provenance, save_manifest
from clip_deploy.core.package import (
    FORMAT,
    LABELS,
    PREPROCESSOR,
    TOKENIZER,
    DualEncoder,
    EmptyPackage,
    ImageTower,
    Labels,
    Package,
    TextTower,
    Towers,
    tower_hash,
)
from clip_deploy.core.parsing import plain, read_record
from clip_deploy.core.recommendation import Shipment
from clip_deploy.core.records import Validation
from clip_deploy.data.preprocessed import SCORES
from clip_deploy.evaluate.embeddings import load_embeddings
from clip_deploy.evaluate.gates import failures_now
from clip_deploy.inference.tokenizer import vocabulary

RECOMMENDED = "recommended"
LIBRARIES_OF = {  # a runtime's libraries, by the names of environment.LIBRARIES
    "eager": ("torch", "transformers"),
    "compiled": ("torch", "transformers"),
    "torchscript": ("torch",),
    "aoti": ("torch",),
    "fused": ("torch", "onnx", "onnx_ir"),
    "ort": ("onnxruntime",),
    "ort_tensorrt": ("onnxruntime", "tensorrt"),
    "openvino": ("openvino",),
    "tensorrt": ("torch", "tensorrt"),
}
OPEN_CLIP = ("open_clip", "timm")  # besides, of its checkpoints where they run as they are


@dataclass
class Sources:
    """Where a package's parts come from.

    Attributes:
        built: the folder with the targets' folders.
        validation: the folder with what validate said of each.
        portable: the checkpoint's tokenizer, preprocessing and scale (portable.write_portable).
        evaluation: the prepared set, for classes and templates.
    """

    built: Path
    validation: Path
    portable: Path
    evaluation: Path


def write_package(
    advice: Shipment, wanted: str, sources: Sources, gates: GatesConfig, run: Run, folder: Path
) -> Package | EmptyPackage:
    """Fill `folder`, and return its manifest.

    Args:
        advice: reports/shipped.json, or reports/recommendation.json for a target by its name.
        wanted: a target for both towers, or "recommended" for what the advice says.
        gates: what each precision class must reach now.

    Where the advice has nothing to ship, or what it has cannot be packaged, the folder holds only a manifest with the
    reason, which no runtime opens.

    Raises:
        DeployError: the target asked for is unknown, did not pass, or its files are not those that were judged.
        UnavailableError: the target asked for by name needs transformers for its texts or images.
    """
    manifest: Package | EmptyPackage
    try:
        manifest = _packaged(advice, wanted, sources, gates, run, folder)
    except UnavailableError as error:
        if wanted != RECOMMENDED:
            raise
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        manifest = EmptyPackage(FORMAT, run, str(error))
    save_manifest(folder / INSIDE, manifest, indent=1, ensure_ascii=False)
    return manifest


def _packaged(advice: Shipment, wanted: str, sources: Sources, gates: GatesConfig, run: Run, folder: Path) -> Package:
    if wanted == RECOMMENDED and not advice.ship:
        raise UnavailableError(said(advice))
    towers = advice.ship if wanted == RECOMMENDED else dict.fromkeys(TOWERS, wanted)
    names = list(dict.fromkeys(towers.values()))
    records = {name: check_fit(name, advice, sources, gates) for name in names}
    pair = " with ".join(towers[tower] for tower in TOWERS)
    if len(names) > 1 and not (pair in advice.pairs and advice.pairs[pair].status == "pass"):
        raise DeployError(f"{pair} failed their gate together (reports/recommendation.json): run `dvc repro`")
    origin = provenance({name: (read_target(sources.built / name), record) for name, record in records.items()}, run)
    pairs = advice.pairs if wanted == RECOMMENDED else {}
    _fill(folder, towers, sources)
    files = files_of(folder)
    return Package(
        format=FORMAT,
        origin=replace(origin, gates={**origin.gates, **pairs}),
        encoder=_encoder(towers, advice, sources, files, run),
        files=files,
        metrics={name: advice.targets[name].metrics for name in names},
        note=said(advice) if wanted == RECOMMENDED else f"{wanted} was asked for by name",
    )


def said(advice: Shipment) -> str:
    """The advice's note, behind what speaks against the reference itself."""
    return "; ".join([*advice.doubts, advice.note])


def parts(image_input: str) -> list[str]:
    """The files of the checkpoint's portable parts that a package needs, by what its image tower takes."""
    return [SCORES, TOKENIZER, *([PREPROCESSOR] if image_input == "pixel_values" else [])]


def unpackable(folder: Path, portable: Path) -> str | None:
    """Which part of the checkpoint lacks for a package with the target in `folder`, and why; or None."""
    target, unavailable = read_target(folder), read_json(portable / SCORES)["unavailable"]
    missing = next((file for file in parts(target.image_input) if file in unavailable), None)
    return unavailable[missing] if missing else None


def check_fit(name: str, advice: Shipment, sources: Sources, gates: GatesConfig) -> Validation:
    """What validate said of a target; DeployError where it did not pass, or its files are not those that did."""
    known = advice.targets
    if name not in known:
        raise DeployError(f"target is {name!r}: accepted are {', '.join(known)}")
    target, record = known[name], read_record(Validation, sources.validation / f"{name}.json")
    others = [other for other, row in known.items() if row.status == "pass" and other != name]
    way_out = f"fit are {', '.join(others)}" if others else "the report says whether another is: run `dvc repro`"
    missed = "; ".join(map(str, failures_now(record, gates)))
    if missed or target.status != "pass":
        raise DeployError(f"{name} is not fit to ship: {missed or '; '.join(target.reasons)}; {way_out}")
    for file in dict.fromkeys([*record.files, *read_target(sources.built / name).files]):
        path = sources.built / name / file
        if not path.is_file() or sha256(path) != record.files.get(file):
            raise DeployError(
                f"{path} is not the file that was checked (reports/validate/{name}.json): run `dvc repro`"
            )
    return record


def _fill(folder: Path, towers: dict[str, str], sources: Sources) -> None:
    """Put all files but the manifest into `folder`."""
    for name in towers.values():
        if reason := unpackable(sources.built / name, sources.portable):
            raise UnavailableError(reason)
    for name in dict.fromkeys(towers.values()):
        _copy_target(sources.built / name, [tower for tower in TOWERS if towers[tower] == name], folder / name)
    for file in parts(read_target(sources.built / towers["vision"]).image_input):
        if file != SCORES:
            shutil.copyfile(sources.portable / file, folder / file)
    evaluation = read_json(sources.evaluation / INSIDE)
    labels = Labels(evaluation["classes"], evaluation["templates"])
    write_text(folder / LABELS, json.dumps(plain(labels), indent=1, ensure_ascii=False) + "\n")


def _copy_target(built: Path, towers: list[str], folder: Path) -> None:
    """A target with what these of its towers need, as open_encoder takes it."""
    target = read_target(built)
    files = target.files_of(towers)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built / file, folder / file)
    write_target(folder, replace(target, files=files, sha256={file: target.sha256[file] for file in files}))


def _encoder(
    towers: dict[str, str], advice: Shipment, sources: Sources, files: dict[str, File], run: Run
) -> DualEncoder:
    targets = {tower: read_target(sources.built / name) for tower, name in towers.items()}
    vision, text = (targets[tower] for tower in TOWERS)
    model, scores = vision.model, read_json(sources.portable / SCORES)

    def described(tower: str) -> dict[str, Any]:
        name, target = towers[tower], targets[tower]
        names = [f"{name}/{file}" for file in target.files_of([tower])]
        return {
            "target": name,
            "precision": target.precision,
            "runtime": target.runtime,
            "files": names,
            "sha256": tower_hash(names, files),
            "batch_sizes": advice.targets[name].batch_sizes.get(tower, []),
        }

    return DualEncoder(
        towers=Towers(
            ImageTower(**described("vision"), image_input=vision.image_input),
            TextTower(**described("text"), inputs=text.model.text_inputs),
        ),
        dimension=int(load_embeddings(sources.evaluation / "reference.npz").images.shape[1]),
        image_size=model.image_size,
        vocabulary=vocabulary(sources.portable / TOKENIZER),
        context_length=model.context_length,
        pad_to_context=model.pad_to_context,
        pad_token=read_json(sources.evaluation / INSIDE)["pad_token"],
        logit_scale=scores["logit_scale"],
        logit_bias=scores["logit_bias"],
        activation=scores["activation"],
        normalized=model.normalize,
        device=vision.device,
        requires=list(dict.fromkeys(line for target in targets.values() for line in requirements(target, run))),
        patches=model.patches,
    )


def requirements(target: Target, run: Run) -> list[str]:
    """What pip installs to open a target: its runtime's libraries, in the versions of the run."""
    names = LIBRARIES_OF[target.runtime]
    if target.model.model_type == "open_clip" and "transformers" in names:
        names += OPEN_CLIP
    return [
        f"{distribution}=={version.partition('+')[0]}" if (version := run.versions.get(name)) else distribution
        for name in names
        for distribution in _distributions(name, target)
    ]


def _distributions(name: str, target: Target) -> Sequence[str]:
    if name == "onnxruntime":
        return ["onnxruntime-gpu" if target.device == "cuda" else "onnxruntime"]
    if name == "tensorrt" and target.said("library").startswith("TensorRT-RTX"):
        return ["tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"]
    return LIBRARIES[name][:1]
