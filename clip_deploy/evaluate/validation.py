"""Check one target against the untouched FP32 model: is the file sound, the embeddings close, the answers the same?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from clip_deploy.core.artifact import Target, failure, read_target, size_bytes
from clip_deploy.core.config import GateLimits, GatesConfig
from clip_deploy.core.errors import DeployError, UnavailableError, first_line
from clip_deploy.core.files import sha256
from clip_deploy.core.manifest import Run, TargetManifest, files_of, provenance
from clip_deploy.core.model import Head
from clip_deploy.core.records import Diagnosis, Graph, HeadAgreement, Measured, PixelParity, Validation
from clip_deploy.core.similarity import normalized, row_cosines, similarity
from clip_deploy.core.subprocesses import CrashError, call_in_child
from clip_deploy.data.preprocessed import Images, Prepared
from clip_deploy.evaluate import accuracy
from clip_deploy.evaluate.chance import doubts
from clip_deploy.evaluate.embeddings import (
    Embeddings,
    encode_images,
    encode_set,
    encode_texts,
    image_inputs,
    load_embeddings,
)
from clip_deploy.evaluate.gates import (
    check_gate,
    fusion_failures,
    gate_of,
    limits,
    reference_failures,
    search_failures,
)
from clip_deploy.runtimes import Encoder, PlacedEncoder, open_encoder

FORMAT = 1  # of a target's manifest
BATCHES = (1, 3, 8)  # a batch size baked into a graph shows at one of them


def validate_apart(folder: Path, prepared: Prepared, reference: Path, gates: GatesConfig, seed: int) -> Validation:
    """As validate, in a process of its own: a runtime that crashes, hangs or eats all memory makes the target fail."""
    try:
        found: Validation = call_in_child(validate, folder, prepared, reference, gates, seed, timeout_s=gates.timeout_s)
        return found
    except Exception as error:  # whatever a library raises is this row's result
        target, reason = read_target(folder), str(error) if isinstance(error, CrashError) else failure(error)
        return _record(target, "fail", reason)


def validate(folder: Path, prepared: Prepared, reference: Path, gates: GatesConfig, seed: int) -> Validation:
    """Judge the target in `folder`.

    Args:
        prepared: the evaluation set.
        reference: the .npz of the untouched model's embeddings of that set.
        gates: what each precision class must reach.

    Its status is "pass", "fail" (with reasons) or "unavailable" (with the reason).
    """
    target = read_target(folder)
    try:
        encoder = open_encoder(folder)
    except UnavailableError as error:
        return _record(target, "fail" if target.failed else "unavailable", str(error))
    except DeployError as error:
        return _record(target, "fail", str(error))
    files = {name: sha256(folder / name) for name in target.files}
    record = replace(_record(target, "pass"), size_mb=size_bytes(folder) / 1e6, files=files)
    return _judged(record, folder, encoder, prepared, load_embeddings(reference), gates, seed)


def _record(target: Target, status: str, *reasons: str) -> Validation:
    """What is known of a target before it is opened."""
    return Validation(
        status=status,
        reasons=list(reasons),
        precision=target.precision,
        runtime=target.runtime,
        device=target.device,
        build=target.build,
        trained=target.model.trained,
        search=target.search,
    )


def _judged(
    record: Validation,
    folder: Path,
    encoder: Encoder,
    prepared: Prepared,
    reference: Embeddings,
    gates: GatesConfig,
    seed: int,
) -> Validation:
    """The record of an opened target, with all that can be measured of it."""
    target, gate = read_target(folder), gate_of(gates, record.precision)
    try:
        if any(name.endswith(".onnx") for name in target.files):
            record = replace(record, graphs=graphs(folder, target.opset))
            record = replace(record, pixels=pixels(folder, target, prepared))
        record = replace(record, doubts=doubts(reference, prepared) if record.trained else [])
        measured = measure(encoder, prepared, reference, target, seed)
    except UnavailableError as error:
        return replace(record, status="unavailable", reasons=[str(error)])
    except DeployError as error:
        return replace(record, status="fail", reasons=[str(error)])
    placed = encoder.placement() if isinstance(encoder, PlacedEncoder) and target.device == "cuda" else {}
    record = replace(record, measured=measured, placement=placed)
    if reasons := check_gate(measured, record.trained, gate, target.precision):
        record = replace(record, diagnosis=diagnosis(folder, encoder, prepared, reference, gate))
    others = reference_failures(record, gates) + fusion_failures(record, gates) + search_failures(record)
    reasons = [*map(str, others), *reasons]
    status = "fail" if reasons else "pass"
    return replace(record, status=status, reasons=reasons, limits=limits(measured, record.trained, gate))


def manifest(folder: Path, record: Validation, run: Run) -> TargetManifest:
    """What stands beside a target's folder: what it was made from and how, how it was judged, and all its files.

    `record` is what validate said of it.
    """
    origin = provenance({folder.name: (read_target(folder), record)}, run)
    return TargetManifest(FORMAT, folder.name, origin, files_of(folder, record.files))


def graphs(folder: Path, opset: int | None) -> dict[str, Graph]:
    """Checker and graph information of both towers; DeployError where a file does not declare the opset asked for."""
    from clip_deploy.onnx_graph import onnx_file  # the targets of PyTorch need no onnx

    described = {}
    for tower in ("vision", "text"):
        path = folder / f"{tower}.onnx"
        onnx_file.check(path)
        described[tower] = onnx_file.describe(path)
        written = described[tower].opsets["ai.onnx"]
        if written != opset:
            raise DeployError(f"{path.name} declares opset {written}, onnx.opset asked for {opset}")
    return described


def diagnosis(folder: Path, encoder: Encoder, prepared: Prepared, reference: Embeddings, gate: GateLimits) -> Diagnosis:
    """Where the target loses what its gate asks for; a note where its graphs cannot be opened up."""
    from clip_deploy.evaluate.diagnosis import diagnose  # the targets of PyTorch need no onnx

    try:
        return diagnose(folder, prepared, encode_set(encoder, prepared), reference, gate)
    except DeployError as error:
        return Diagnosis(None, [], [f"no layer is named: {error}"])


def pixels(folder: Path, target: Target, prepared: Prepared) -> PixelParity | None:
    """The preprocessing in front of the image tower, held against the checkpoint's own processor."""
    if target.image_input == "pixel_values" or prepared.images is None:
        return None
    from clip_deploy.onnx_graph.preprocessing import pixel_parity  # the targets of PyTorch need no onnx

    return pixel_parity(folder / "vision.onnx", prepared)


def measure(encoder: Encoder, prepared: Prepared, reference: Embeddings, target: Target, seed: int) -> Measured:
    """Parity, batches, sequence lengths, zero-shot, retrieval and flips of an opened target."""
    try:
        actual = encode_set(encoder, prepared)
        shapes = other_shapes(encoder, prepared, reference, target)
    except UnavailableError:
        raise
    except Exception as error:  # whatever the runtime raises is this row's result
        raise DeployError(f"encoding failed: {first_line(error)}") from error
    alike = normalized if target.model.normalize else np.asarray  # lengths are compared where they are kept
    clean = Embeddings(*(np.nan_to_num(part) for part in (actual.images, actual.captions, actual.prompts)))
    settings, classes = target.model.classifier, prepared.contents.classes
    return Measured(
        parity={
            "vision": similarity(actual.images, alike(reference.images)),
            "text": similarity(_texts(actual), alike(_texts(reference))),
        },
        shapes=shapes,
        length_error=_length_error(actual) if target.model.normalize else None,
        classifier=classifier(encoder, prepared, reference, settings) if settings else None,
        zero_shot=accuracy.zero_shot(clean, reference, prepared, seed) if classes else None,
        retrieval=accuracy.retrieval(clean, prepared) if len(prepared.captions) else None,
        flips=accuracy.flips(clean, reference, prepared),
        evaluation=prepared.identity,
    )


def _length_error(embeddings: Embeddings) -> float:
    lengths = np.linalg.norm(np.concatenate([embeddings.images, _texts(embeddings)]), axis=1)
    return float(np.abs(lengths - 1).max())


def classifier(encoder: Encoder, prepared: Prepared, reference: Embeddings, settings: Head) -> HeadAgreement:
    """Share of images to which a zero-shot head gives the label that the untouched model gives.

    The set's prompts hold the labels' embeddings where its classes and templates do; else there is nothing to compare.
    """
    classes, templates = prepared.contents.classes, prepared.contents.templates
    if settings.template not in templates or not set(settings.labels) <= set(classes):
        return HeadAgreement(
            unchecked="the evaluation set lacks a label of onnx.classifier among its classes, or onnx.template"
        )
    template = templates.index(settings.template)
    rows = [classes.index(label) * len(templates) + template for label in settings.labels]
    expected = normalized(reference.images) @ normalized(reference.prompts[rows]).T
    actual = encode_images(_Classifier(encoder), image_inputs(encoder, prepared))
    agree = actual.argmax(axis=1) == expected.argmax(axis=1)
    return HeadAgreement(labels=len(rows), agreement_percent=100 * float(agree.mean()))


class _Classifier:
    """A head's probabilities in the place of embeddings."""

    def __init__(self, encoder: Any) -> None:
        self.image_input, self.encode_images = encoder.image_input, encoder.classify
        self.encode_texts, self.text_inputs = encoder.encode_texts, encoder.text_inputs


def _texts(embeddings: Embeddings) -> np.ndarray:
    parts = [part for part in (embeddings.captions, embeddings.prompts) if len(part)]
    return np.concatenate(parts)


def other_shapes(encoder: Encoder, prepared: Prepared, reference: Embeddings, target: Target) -> dict[str, float]:
    """Lowest cosine with the reference at each other shape: batches of 1, 3 and 8, and texts padded to the context."""
    rows = max(BATCHES)
    images, image_rows = _alike(image_inputs(encoder, prepared), rows)
    texts = prepared.texts[:rows]
    expected = (reference.captions if len(prepared.captions) else reference.prompts)[:rows]
    lowest = {}
    for batch in BATCHES:
        embeddings = encode_images(encoder, images, batch)
        lowest[f"vision, batch {batch}"] = float(row_cosines(embeddings, reference.images[image_rows]).min())
        encoded = encode_texts(encoder, texts, batch)
        lowest[f"text, batch {batch}"] = float(row_cosines(encoded, expected).min())
    context = target.model.context_length
    if texts.input_ids.shape[1] < context:
        padded = texts.padded(context, prepared.contents.pad_token)
        lowest[f"text, {context} tokens"] = float(row_cosines(encode_texts(encoder, padded), expected).min())
    return lowest


def _alike(inputs: np.ndarray | Images, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images of one size and their rows; some come twice where fewer have that size."""
    known = inputs.by_size()[0] if isinstance(inputs, Images) else np.arange(len(inputs))
    rows = np.resize(known[:count], count)
    return np.stack([inputs[row] for row in rows]), rows
