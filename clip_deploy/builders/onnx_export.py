"""ONNX export of both towers, by whichever of PyTorch's exporters writes the opset asked for, with what is asked for
around them.
"""

import logging
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from clip_deploy.checkpoint.load import load_model, load_processor
from clip_deploy.checkpoint.operations import count_operations
from clip_deploy.checkpoint.towers import dynamic_axes, example_inputs, split
from clip_deploy.core.artifact import EMBEDS, Target, read_target
from clip_deploy.core.config import OPSETS, OnnxConfig
from clip_deploy.core.errors import DeployError, UnavailableError, one_line
from clip_deploy.core.model import Head, Model
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.postprocessing import add_postprocessing, encode_labels
from clip_deploy.onnx_graph.pre_post import PrePost, attach
from clip_deploy.onnx_graph.preprocessing import IMAGES, PIXELS, preprocessing_nodes


def export_onnx(checkpoint: Path, settings: OnnxConfig, output: Path) -> Target:
    """Write vision.onnx (pixel_values -> image_embeds) and text.onnx (input_ids, attention_mask -> text_embeds).

    vision.onnx of SigLIP 2 NaFlex takes pixel_attention_mask and spatial_shapes besides. The batch axis is dynamic, and
    the text's sequence axis where the model does not pad to its context. With settings.preprocess, vision.onnx takes
    images (uint8 [batch, height, width, 3], RGB, of any size) instead; with settings.classifier it gives probabilities
    [batch, labels] besides.

    Raises:
        UnavailableError: the exporter cannot convert this model, or ONNX cannot express its preprocessing.
        DeployError: the file does not hold the opset asked for.
    """
    source = read_target(checkpoint)
    model = source.model
    pre_posts = _pre_posts(checkpoint, settings, model)
    head = Head(settings.classifier, settings.template) if settings.classifier else None
    model = replace(model, normalize=settings.normalize, classifier=head)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        model = replace(model, operations=_export_towers(checkpoint, settings, model, Path(folder)))
        for name, pre_post in pre_posts.items():
            attach(Path(folder) / f"{name}.onnx", pre_post, output / f"{name}.onnx")
    return Target(
        runtime="ort",
        precision="fp32",
        device=source.device,
        files=onnx_file.files_of(output),
        model=model,
        build={"opset": settings.opset, "exporter": settings.writer, **_asked_for(settings)},
        image_input=IMAGES if settings.preprocess else PIXELS,
    )


def _asked_for(settings: OnnxConfig) -> dict[str, Any]:
    """What is around the towers, for the report."""
    asked: dict[str, Any] = {name: True for name in ("preprocess", "normalize") if getattr(settings, name)}
    return asked | ({"classifier": f"{len(settings.classifier)} labels"} if settings.classifier else {})


def _pre_posts(checkpoint: Path, settings: OnnxConfig, model: Model) -> dict[str, PrePost]:
    pre_posts = {"vision": PrePost(), "text": PrePost()}
    labels = None
    if settings.preprocess:
        pre_posts["vision"] = preprocessing_nodes(load_processor(checkpoint).image_processor, model.image_size)
    if settings.classifier:
        processor = load_processor(checkpoint)
        labels = encode_labels(load_model(checkpoint), processor, model, settings.classifier, settings.template)
    add_postprocessing(pre_posts["vision"], "vision", settings.normalize, labels)
    add_postprocessing(pre_posts["text"], "text", settings.normalize, None)
    return pre_posts


def _failed(writer: str, tower: str, error: Exception) -> str:
    """Which exporter failed and why, by the error at the root of it, and what the other one writes."""
    while isinstance(cause := error.__cause__, Exception):
        error = cause
    other, (low, high) = next((name, opsets) for name, opsets in OPSETS.items() if name != writer)
    return (
        f"the {writer} exporter failed on the {tower} tower: {one_line(error)}; `onnx.exporter: {other}` may write it "
        f"(opset {low} to {high})"
    )


def _export_towers(checkpoint: Path, settings: OnnxConfig, model: Model, output: Path) -> dict[str, dict[str, int]]:
    """Write both towers, and return what each computes: what the fusions of its graph are held against."""
    operations = {}
    inputs, axes = example_inputs(model), _dimensions(model)
    names = {"vision": model.image_inputs, "text": model.text_inputs}
    write = WRITERS[settings.writer]
    for name, tower in split(load_model(checkpoint), inputs).items():
        path = output / f"{name}.onnx"
        operations[name] = count_operations(tower, inputs[name])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecations and tracer warnings: validate checks other shapes
                write(tower, inputs[name], path, names[name], EMBEDS[name], axes[name], settings.opset)
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError) as error:
            raise UnavailableError(_failed(settings.writer, name, error)) from error
        written = onnx_file.opset_of(path)
        if written != settings.opset:
            raise DeployError(
                f"{path.name} holds opset {written}, not the {settings.opset} asked for (exporter {settings.writer}): "
                "set onnx.exporter or onnx.opset to a pair that PyTorch supports"
            )
    return operations


def _dimensions(model: Model) -> dict[str, dict[int, Any]]:
    """dynamic_axes with the longest text: without it, torch.export fails on it, and exports the tower once more."""
    longest = {"sequence": model.positions or None}
    return {
        tower: {axis: Dim(word, max=longest.get(word)) for axis, word in axes.items()}
        for tower, axes in dynamic_axes(model).items()
    }


def _write_dynamo(
    tower: nn.Module,
    inputs: tuple[Any, ...],
    path: Path,
    names: list[str],
    output: str,
    axes: dict[int, Any],
    opset: int,
) -> None:
    for name in ("torch.onnx", "onnxscript"):  # a missing torchvision, and each operator that cannot be folded
        logging.getLogger(name).setLevel(logging.ERROR)
    program = torch.onnx.export(
        tower,
        inputs,
        dynamo=True,
        opset_version=opset,
        input_names=names,
        output_names=[output],
        dynamic_shapes=tuple(axes for _ in inputs),
        verbose=False,
    )
    onnx_file.save(program.model, path)


def _write_torchscript(
    tower: nn.Module,
    inputs: tuple[Any, ...],
    path: Path,
    names: list[str],
    output: str,
    axes: dict[int, Any],
    opset: int,
) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # above 2 GB the exporter spreads weights over files
        traced = Path(folder) / path.name
        words = {axis: dimension.__name__ for axis, dimension in axes.items()}
        torch.onnx.export(
            tower,
            inputs,
            traced,
            dynamo=False,
            opset_version=opset,
            input_names=names,
            output_names=[output],
            dynamic_axes={**{name: words for name in names}, output: {0: "batch"}},
        )
        onnx_file.save(ir.load(traced), path)


WRITERS = {"dynamo": _write_dynamo, "torchscript": _write_torchscript}
