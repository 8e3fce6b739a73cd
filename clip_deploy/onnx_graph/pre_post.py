"""What stands around a tower in its graph: preprocessing in front of it, normalisation and classifier behind it.

Rewrites, half precision and quantisers see the tower alone: pre- and post-processing is detached before and
attached again after, so that it stays as it was exported, in float32. Its nodes are known by their names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from clip_deploy.core.artifact import EMBEDS
from clip_deploy.onnx_graph import onnx_file

PREPROCESSING_PREFIX, POSTPROCESSING_PREFIX = onnx_file.PRE_POST_PREFIXES


@dataclass
class PrePost:
    """Nodes for one graph, to be put on once.

    Attributes:
        front: nodes that turn `image` into the tower's input, the last node's output; empty where there are none.
        image: what the graph takes instead of the tower's input.
        behind: nodes that work on `embeds`.
        embeds: stands for the tower's output.
        outputs: of the graph, by their names; `embeds` may be one of them.
        labels: of the classifier.
    """

    front: list[ir.Node] = field(default_factory=list)
    image: ir.Value | None = None
    behind: list[ir.Node] = field(default_factory=list)
    embeds: ir.Value | None = None
    outputs: dict[str, ir.Value] = field(default_factory=dict)
    labels: str | None = None


class Nodes:
    """Makes nodes of pre- or post-processing, with their prefix in front of their names."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.made: list[ir.Node] = []

    def add(self, kind: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes, name=f"{self.prefix}{kind}_{len(self.made)}")
        node.outputs[0].name = node.name
        self.made.append(node)
        return node.outputs[0]

    def constant(self, content: Any, dtype: type = np.int64) -> ir.Value:
        return self.add("Constant", [], value=ir.tensor(np.array(content, dtype=dtype)))


def detach(source: Path, output: Path) -> PrePost:
    """Write the tower alone to `output`, and return what stood around it."""
    model = onnx_file.load(source)
    pre_post = PrePost(labels=model.metadata_props.pop(onnx_file.LABELS, None))
    _detach_preprocessing(model.graph, pre_post)
    _detach_postprocessing(model.graph, pre_post)
    onnx_file.save(model, output)
    return pre_post


def _detach_preprocessing(graph: ir.Graph, pre_post: PrePost) -> None:
    pre_post.front = [node for node in graph if str(node.name).startswith(PREPROCESSING_PREFIX)]
    if not pre_post.front:
        return
    pixels = pre_post.front[-1].outputs[0]
    bare = ir.Value(name=pixels.name, type=pixels.type, shape=pixels.shape)
    graph.remove(pre_post.front)
    ir.convenience.replace_all_uses_with(pixels, bare)
    pre_post.image = graph.inputs[0]
    graph.inputs[0] = bare


def _detach_postprocessing(graph: ir.Graph, pre_post: PrePost) -> None:
    pre_post.behind = [node for node in graph if str(node.name).startswith(POSTPROCESSING_PREFIX)]
    if not pre_post.behind:
        return
    graph.remove(pre_post.behind)
    made = {output for node in pre_post.behind for output in node.outputs}
    (tower,) = {value for node in pre_post.behind for value in node.inputs if value is not None and value not in made}
    pre_post.embeds = ir.Value(name="embeds", type=tower.type, shape=tower.shape)
    for node in pre_post.behind:
        for index, value in enumerate(node.inputs):
            if value is tower:
                node.replace_input_with(index, pre_post.embeds)
    pre_post.outputs = {str(value.name): pre_post.embeds if value is tower else value for value in graph.outputs}
    graph.outputs[:] = [tower]
    tower.name = next(iter(pre_post.outputs))


def attach(source: Path, pre_post: PrePost, output: Path) -> None:
    """Write the tower in `source` with pre- and post-processing around it to `output`, another file."""
    model = ir.load(source)
    graph = model.graph
    if pre_post.image is not None:
        ir.convenience.replace_all_uses_with(graph.inputs[0], pre_post.front[-1].outputs[0])
        graph.inputs[0] = pre_post.image
        graph.insert_before(graph[0], pre_post.front)
    if pre_post.embeds is not None:
        _attach_postprocessing(graph, pre_post)
    if pre_post.labels is not None:
        model.metadata_props[onnx_file.LABELS] = pre_post.labels
    onnx_file.save(model, output)


def _attach_postprocessing(graph: ir.Graph, pre_post: PrePost) -> None:
    assert pre_post.embeds is not None  # attach saw it
    tower = graph.outputs[0]
    ir.convenience.replace_all_uses_with(pre_post.embeds, tower)
    graph.extend(pre_post.behind)
    outputs = {name: tower if value is pre_post.embeds else value for name, value in pre_post.outputs.items()}
    graph.outputs[:] = list(outputs.values())
    tower.name = "tower_embeds"
    for name, value in outputs.items():
        value.name = name
        if name in EMBEDS.values():
            value.shape = tower.shape
