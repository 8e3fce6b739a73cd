"""One folder with all that a deployment needs of the chosen targets: graphs, tokenizer, preprocessing, labels, hashes.

Only what passed its gate goes in, byte for byte as it was judged. clip_deploy.inference opens the folder, without torch
and transformers.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from clip_deploy.core.artifact import TOWERS, read_target
from clip_deploy.core.config import GatesConfig
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.core.files import sha256, write_text
from clip_deploy.core.json_files import read_json
from clip_deploy.core.manifest import INSIDE, File, Run, files_of, provenance, save_manifest
from clip_deploy.core.package import (
    FORMAT,
    LABELS,
    PREPROCESSOR,
    DualEncoder,
    EmptyPackage,
    ImageTower,
    Labels,
    Package,
    TextTower,
    Towers,
)
from clip_deploy.core.parsing import plain, read_record
from clip_deploy.core.recommendation import Recommendation
from clip_deploy.core.records import Validation
from clip_deploy.data.preprocessed import SCORES, TOKENIZER
from clip_deploy.evaluate.embeddings import load_embeddings
from clip_deploy.evaluate.gates import failures_now

RUNTIME = "ort"  # the one that needs neither torch nor a library of its own
RECOMMENDED = "recommended"


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
    advice: Recommendation, wanted: str, sources: Sources, gates: GatesConfig, run: Run, folder: Path
) -> Package | EmptyPackage:
    """Fill `folder`, and return its manifest.

    Args:
        advice: reports/recommendation.json.
        wanted: a target for both towers, or "recommended" for what the advice says.
        gates: what each precision class must reach now.

    Where the advice has nothing to ship, or what it has cannot be packaged, the folder holds only a manifest with the
    reason, which no runtime opens.

    Raises:
        DeployError: the target asked for is unknown, did not pass, is no ONNX target, or its files are not those that
            were judged.
        UnavailableError: the target asked for by name needs transformers for its texts or images.
    """
    manifest: Package | EmptyPackage
    try:
        manifest = _packaged(advice, wanted, sources, gates, run, folder)
    except UnavailableError as error:
        if wanted != RECOMMENDED:
            raise
        for path in folder.iterdir():
            path.unlink()
        manifest = EmptyPackage(FORMAT, run, str(error))
    save_manifest(folder / INSIDE, manifest, indent=1, ensure_ascii=False)
    return manifest


def _packaged(
    advice: Recommendation, wanted: str, sources: Sources, gates: GatesConfig, run: Run, folder: Path
) -> Package:
    if wanted == RECOMMENDED and not advice.package:
        raise UnavailableError(said(advice))
    towers = advice.package if wanted == RECOMMENDED else dict.fromkeys(TOWERS, wanted)
    names = list(dict.fromkeys(towers.values()))
    records = {name: check_fit(name, advice, sources, gates) for name in names}
    pair = " with ".join(towers[tower] for tower in TOWERS)
    if len(names) > 1 and not (pair in advice.pairs and advice.pairs[pair].status == "pass"):
        raise DeployError(f"{pair} did not pass together (reports/recommendation.json): run `dvc repro`")
    origin = provenance({name: (read_target(sources.built / name), record) for name, record in records.items()}, run)
    pairs = advice.pairs if wanted == RECOMMENDED else {}
    _fill(folder, towers, sources)
    files = files_of(folder)
    return Package(
        format=FORMAT,
        origin=replace(origin, gates={**origin.gates, **pairs}),
        encoder=_encoder(towers, sources, files),
        files=files,
        metrics={name: advice.targets[name].metrics for name in names},
        note=said(advice) if wanted == RECOMMENDED else f"{wanted} was asked for by name",
    )


def said(advice: Recommendation) -> str:
    """The advice's note, behind what speaks against the reference itself."""
    return "; ".join([*advice.doubts, advice.note])


def parts(image_input: str) -> list[str]:
    """The files of the checkpoint's portable parts that a package needs, by what its image tower takes."""
    return [SCORES, TOKENIZER, *([PREPROCESSOR] if image_input == "pixel_values" else [])]


def unpackable(folder: Path, portable: Path) -> str | None:
    """Why no package can be made with the target in `folder` and the checkpoint's portable parts, or None.

    A part that the checkpoint lacks bars every target, and is named first.
    """
    target, unavailable = read_target(folder), read_json(portable / SCORES)["unavailable"]
    if missing := next((file for file in parts(target.image_input) if file in unavailable), None):
        found: str | None = unavailable[missing]
        return found
    if target.runtime != RUNTIME:
        return f"{folder.name} runs with {target.runtime}, and a package with ONNX Runtime alone"
    return None


def check_fit(name: str, advice: Recommendation, sources: Sources, gates: GatesConfig) -> Validation:
    """What validate said of a target; DeployError where it did not pass, or its files are not those that did."""
    known = advice.targets
    if name not in known:
        raise DeployError(f"target is {name!r}: the report knows {', '.join(known)}")
    target, record = known[name], read_record(Validation, sources.validation / f"{name}.json")
    fit = [other for other, row in known.items() if row.status == "pass" and row.runtime == RUNTIME]
    others = [other for other in fit if other != name]
    way_out = f"fit are {', '.join(others)}" if others else "no other target is fit"
    missed = "; ".join(map(str, failures_now(record, gates)))
    if missed or target.status != "pass":
        raise DeployError(f"{name} is not fit to ship: {missed or '; '.join(target.reasons)}; {way_out}")
    if target.runtime != RUNTIME:
        raise DeployError(f"{name} runs with {target.runtime}, and packages with ONNX Runtime alone; {way_out}")
    for file in dict.fromkeys([*record.files, *read_target(sources.built / name).files]):
        path = sources.built / name / file
        if not path.is_file() or sha256(path) != record.files.get(file):
            raise DeployError(f"{path} is not the file that was judged (reports/validate/{name}.json): run `dvc repro`")
    return record


def _fill(folder: Path, towers: dict[str, str], sources: Sources) -> None:
    """Put all files but the manifest into `folder`."""
    targets = {tower: read_target(sources.built / name) for tower, name in towers.items()}
    for name in towers.values():
        if reason := unpackable(sources.built / name, sources.portable):
            raise UnavailableError(reason)
    for tower, name in towers.items():
        for file in targets[tower].files:
            if file.startswith(f"{tower}.onnx"):  # the graph, and its weights where they lie beside it
                shutil.copyfile(sources.built / name / file, folder / file)
    for file in parts(targets["vision"].image_input):
        if file != SCORES:
            shutil.copyfile(sources.portable / file, folder / file)
    evaluation = read_json(sources.evaluation / INSIDE)
    labels = Labels(evaluation["classes"], evaluation["templates"])
    write_text(folder / LABELS, json.dumps(plain(labels), indent=1, ensure_ascii=False) + "\n")


def _encoder(towers: dict[str, str], sources: Sources, files: dict[str, File]) -> DualEncoder:
    vision, text = (read_target(sources.built / towers[tower]) for tower in TOWERS)
    model, scores = vision.model, read_json(sources.portable / SCORES)
    graphs = {tower: f"{tower}.onnx" for tower in TOWERS}
    judged = {tower: files[graph].sha256 for tower, graph in graphs.items()}
    return DualEncoder(
        towers=Towers(
            ImageTower(towers["vision"], vision.precision, graphs["vision"], vision.image_input, judged["vision"]),
            TextTower(towers["text"], text.precision, graphs["text"], text.model.text_inputs, judged["text"]),
        ),
        dimension=int(load_embeddings(sources.evaluation / "reference.npz").images.shape[1]),
        image_size=model.image_size,
        context_length=model.context_length,
        pad_to_context=model.pad_to_context,
        pad_token=read_json(sources.evaluation / INSIDE)["pad_token"],
        logit_scale=scores["logit_scale"],
        logit_bias=scores["logit_bias"],
        activation=scores["activation"],
        normalized=model.normalize,
        device=vision.device,
        patches=model.patches,
    )
