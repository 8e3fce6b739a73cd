"""What stands around a tower in its graph: preprocessing in front of it, normalisation and classifier behind it.

Rewrites, half precision and quantisers see the tower alone: its shell is taken off before and put on again after, so
that it stays as it was exported, in float32. Its nodes are known by their names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from clip_deploy.onnx_graph import onnx_file

FRONT, BEHIND = onnx_file.SHELL
EMBEDS = {"vision": "image_embeds", "text": "text_embeds"}  # first output of each tower's graph


@dataclass
class Shell:
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
    """Makes nodes of a shell, with its prefix in front of their names."""

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


def take_off(source: Path, output: Path) -> Shell:
    """Write the tower alone to `output`, and return what stood around it."""
    model = onnx_file.load(source)
    shell = Shell(labels=model.metadata_props.pop(onnx_file.LABELS, None))
    _take_front(model.graph, shell)
    _take_behind(model.graph, shell)
    onnx_file.save(model, output)
    return shell


def _take_front(graph: ir.Graph, shell: Shell) -> None:
    shell.front = [node for node in graph if str(node.name).startswith(FRONT)]
    if not shell.front:
        return
    pixels = shell.front[-1].outputs[0]
    bare = ir.Value(name=pixels.name, type=pixels.type, shape=pixels.shape)
    graph.remove(shell.front)
    ir.convenience.replace_all_uses_with(pixels, bare)
    shell.image = graph.inputs[0]
    graph.inputs[0] = bare


def _take_behind(graph: ir.Graph, shell: Shell) -> None:
    shell.behind = [node for node in graph if str(node.name).startswith(BEHIND)]
    if not shell.behind:
        return
    graph.remove(shell.behind)
    made = {output for node in shell.behind for output in node.outputs}
    (tower,) = {value for node in shell.behind for value in node.inputs if value is not None and value not in made}
    shell.embeds = ir.Value(name="embeds", type=tower.type, shape=tower.shape)
    for node in shell.behind:
        for index, value in enumerate(node.inputs):
            if value is tower:
                node.replace_input_with(index, shell.embeds)
    shell.outputs = {str(value.name): shell.embeds if value is tower else value for value in graph.outputs}
    graph.outputs[:] = [tower]
    tower.name = next(iter(shell.outputs))


def put_on(source: Path, shell: Shell, output: Path) -> None:
    """Write the tower in `source` with the shell around it to `output`, another file."""
    model = ir.load(source)
    graph = model.graph
    if shell.image is not None:
        ir.convenience.replace_all_uses_with(graph.inputs[0], shell.front[-1].outputs[0])
        graph.inputs[0] = shell.image
        graph.insert_before(graph[0], shell.front)
    if shell.embeds is not None:
        _put_behind(graph, shell)
    if shell.labels is not None:
        model.metadata_props[onnx_file.LABELS] = shell.labels
    onnx_file.save(model, output)


def _put_behind(graph: ir.Graph, shell: Shell) -> None:
    assert shell.embeds is not None  # put_on saw it
    tower = graph.outputs[0]
    ir.convenience.replace_all_uses_with(shell.embeds, tower)
    graph.extend(shell.behind)
    outputs = {name: tower if value is shell.embeds else value for name, value in shell.outputs.items()}
    graph.outputs[:] = list(outputs.values())
    tower.name = "tower_embeds"
    for name, value in outputs.items():
        value.name = name
