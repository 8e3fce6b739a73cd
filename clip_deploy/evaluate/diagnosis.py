"""Where a target that missed its gate leaves the graph that it was built from, and what to keep in FP32 for it.

Both graphs run on the same inputs, those that came out worst, and the outputs of every LayerNormalization are compared:
all that a layer hands on goes through one, and its name survives fusion, half precision and quantisation. Which part
is to blame is found by running each part of the target on the source's values: errors from in front are not its own.
The graphs run on the CPU, whatever the target's device.
"""

import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from clip_deploy.core.artifact import EMBEDS, Target, read_target
from clip_deploy.core.config import GateLimits
from clip_deploy.core.errors import DeployError, first_line
from clip_deploy.core.model import image_feed
from clip_deploy.core.records import Diagnosis, Drop
from clip_deploy.core.similarity import row_cosines
from clip_deploy.data.preprocessed import Prepared, Texts
from clip_deploy.evaluate.embeddings import Embeddings
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.pre_post import detach

ROWS = 8  # the worst ones
NORMS = {"LayerNormalization", "SkipLayerNormalization"}
LAYER = re.compile(r"((?:\w+\.)*?layers?\.\d+\.\w+)\.")  # how transformers names a part of a layer
FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")
ROUNDING = 1e-5  # 1 - cosine of two graphs that differ in the order of float32 sums


def diagnose(
    folder: Path, prepared: Prepared, actual: Embeddings, reference: Embeddings, gate: GateLimits
) -> Diagnosis:
    """Find, for each tower that missed its cosine (for both where none did), where it is lost.

    Args:
        folder: the target's; its source is the folder beside it that target.build names.
        actual, reference: embeddings of the prepared set, the target's and the untouched model's.
    """
    target = read_target(folder)
    if reason := _closed(folder, target):
        return Diagnosis(target.source, [], [reason])
    found: list[Drop | str] = []
    inputs = {"vision": _worst_images(prepared, actual, reference), "text": _worst_texts(prepared, actual, reference)}
    missed = [tower for tower, worst in inputs.items() if not worst.cosine >= gate.min_cosine]
    for tower in missed or inputs:
        allowed = 1 - gate.min_cosine if missed else None
        with tempfile.TemporaryDirectory() as work:
            pair = GraphPair(tower, folder.parent / str(target.source), folder, target, Path(work))
            found.append(pair.drop(inputs[tower], allowed))
    drops = [drop for drop in found if isinstance(drop, Drop)]
    return Diagnosis(target.source, drops, [note for note in found if isinstance(note, str)])


def _closed(folder: Path, target: Target) -> str | None:
    """Why no two graphs can be compared."""
    source = target.source
    if any(not (folder / f"{tower}.onnx").is_file() for tower in EMBEDS):
        return f"no layer is named: a {target.runtime} target gives no outputs but its last"
    if target.precision == "fp8":
        return "no layer is named: a lower accuracy_budget keeps more of its matmuls in fp16"
    if source is None:
        return "no layer is named: it was exported from PyTorch itself, whose inner outputs have other names"
    if not all((folder.parent / source / f"{tower}.onnx").is_file() for tower in EMBEDS):
        return f"no layer is named: {source}, which it was built from, is not beside it; run `dvc repro`"
    return None


@dataclass
class Worst:
    """Inputs of the rows that came out worst, the lowest cosine, and which tokens are text [rows, tokens]."""

    inputs: dict[str, np.ndarray]
    cosine: float
    tokens: np.ndarray | None = None


def _worst_images(prepared: Prepared, actual: Embeddings, reference: Embeddings) -> Worst:
    rows, cosine = _lowest(actual.images, reference.images)
    return Worst(image_feed(np.stack([prepared.pixel_values[row] for row in rows])), cosine)


def _worst_texts(prepared: Prepared, actual: Embeddings, reference: Embeddings) -> Worst:
    """Of the captions or of the prompts, whichever came out worse."""
    sets = (
        (prepared.captions, actual.captions, reference.captions),
        (prepared.prompts, actual.prompts, reference.prompts),
    )
    found: list[tuple[float, np.ndarray, Texts]] = []
    for texts, embeddings, expected in sets:
        if len(texts):
            rows, cosine = _lowest(embeddings, expected)
            found.append((cosine, rows, texts))
    cosine, rows, texts = min(found, key=lambda item: item[0])
    mask = texts.attention_mask[rows]
    return Worst({"input_ids": texts.input_ids[rows], "attention_mask": mask}, cosine, mask.astype(bool))


def _lowest(actual: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, float]:
    cosines = row_cosines(_finite(actual), reference)
    return np.argsort(cosines, kind="stable")[:ROWS], float(cosines.min())


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)


@dataclass
class Part:
    """What lies between two kept outputs.

    Attributes:
        nodes: in the graph's order.
        before, after: 1 - cosine at both ends, as the target runs.
        cost: 1 - cosine behind it where this part alone is the target's, on the source's own values.
    """

    nodes: list[onnx.NodeProto]
    before: float
    after: float
    cost: float


@dataclass
class Cut:
    """The nodes of a graph that compute `output` from the tensors `given`."""

    output: str
    given: list[str]
    nodes: list[onnx.NodeProto]


@dataclass
class Both:
    """One tensor as the target and as its source make it."""

    actual: np.ndarray
    expected: np.ndarray

    @property
    def comparable(self) -> bool:
        return self.actual.shape == self.expected.shape and self.actual.ndim > 1

    def loss(self, tokens: np.ndarray | None) -> float:
        """1 - the lowest cosine of any row; tokens that are padding do not count."""
        return 1 - float(row_cosines(_rows(self.actual, tokens), _rows(self.expected, tokens)).min())


class GraphPair:
    """One tower of a target beside the same tower of its source, both without pre- and post-processing.

    Half precision is named by the nodes of the target's own graph, INT8 by those of the source, as the settings are.
    """

    def __init__(self, tower: str, source: Path, folder: Path, target: Target, work: Path) -> None:
        self.tower, self.work, self.target, self.source = tower, work, target, source.name
        self.plain, self.low = (_bare(place / f"{tower}.onnx", work) for place in (source, folder))
        self.named = self.low
        if target.precision == "int8":
            onnx_file.name_nodes(self.plain)
            self.named = self.plain
        plain, low = (set(onnx_file.float_tensors(model, work, FLOATS)) for model in (self.plain, self.low))
        self.floats = low if self.named is self.low else plain
        self.common = plain & low - {value.name for value in self.low.graph.input}

    def drop(self, worst: Worst, allowed: float | None) -> Drop | str:
        """Where the cosine falls, or why no place is named; `allowed`: 1 - cosine that the gate lets pass."""
        parts = self.parts(worst)
        loss = parts[-1].after
        if loss <= ROUNDING or (allowed is not None and loss <= allowed / 10):
            return f"{self.tower}: no layer is named: on the CPU it agrees with {self.source} (cosine {1 - loss:.6f})"
        chosen = self.choose(parts, loss, (loss if allowed is None else allowed) / 2)
        if not chosen:
            return f"{self.tower}: no layer is named: the nodes behind which cosine falls are in FP32 already"
        first = chosen[0]
        return Drop(
            tower=self.tower,
            layer=label(first),
            node=self.worst_node(first, worst),
            cosine_before=1 - first.before,
            cosine_after=1 - first.after,
            nodes=[name for part in chosen for name in self.candidates(part)],
        )

    def parts(self, worst: Worst) -> list[Part]:
        """The graph cut behind each LayerNormalization that both have; where there is none, behind each sum."""
        kept = self._outputs_of(NORMS) or self._outputs_of({"Add"})
        kept = [name for name in kept if name != EMBEDS[self.tower]] + [EMBEDS[self.tower]]
        both = self.run({*kept, *(name for cut in self.cuts(kept) for name in cut.given)}, worst)
        parts, seen, before = [], set[str](), 0.0
        for cut in self.cuts([name for name in kept if both[name].comparable]):
            made = _makers(self.named.graph, cut.output)
            nodes = [node for node in self.named.graph.node if node.output[0] in made - seen]
            after = both[cut.output].loss(worst.tokens)
            parts.append(Part(nodes, before, after, self.cost(cut, both, worst)))
            before, seen = after, seen | made
        return parts

    def run(self, names: Collection[str], worst: Worst) -> dict[str, Both]:
        """Tensors that both graphs have, as each of them makes them."""
        expected, actual = (_run(model, names, worst.inputs, self.work) for model in (self.plain, self.low))
        return {name: Both(actual[name], expected[name]) for name in names}

    def _outputs_of(self, kinds: set[str]) -> list[str]:
        nodes = [node for node in self.named.graph.node if node.op_type in kinds]
        return [node.output[0] for node in nodes if node.output[0] in self.common]

    def cuts(self, kept: list[str]) -> list[Cut]:
        """The target's graph, a piece for each kept output: what it needs of the pieces in front is given."""
        seen: set[str] = set()
        cuts = []
        for name in kept:
            known = seen & self.common
            needed = _makers(self.low.graph, name, known)
            nodes = [node for node in self.low.graph.node if node.output[0] in needed]
            cuts.append(Cut(name, sorted({given for node in nodes for given in node.input} & known), nodes))
            seen |= _makers(self.low.graph, name)
        return cuts

    def cost(self, cut: Cut, both: dict[str, Both], worst: Worst) -> float:
        """1 - cosine behind a piece of the target's graph that is given the source's values."""
        given = {name: both[name].expected.astype(both[name].actual.dtype) for name in cut.given}
        outputs = _run(_piece(self.low, cut, given), [cut.output], worst.inputs | given, self.work)
        return Both(outputs[cut.output], both[cut.output].expected).loss(worst.tokens)

    def choose(self, parts: list[Part], loss: float, goal: float) -> list[Part]:
        """The fewest parts without which the loss would be within `goal`, if costs add up; in the graph's order."""
        total, rest, chosen = sum(part.cost for part in parts), loss, []
        for index in sorted(range(len(parts)), key=lambda index: -parts[index].cost):
            if rest <= goal:
                break
            if self.candidates(parts[index]) or self.target.precision == "fp32":
                chosen.append(index)
                rest -= loss * parts[index].cost / max(total, ROUNDING)
        return [parts[index] for index in sorted(chosen)]

    def candidates(self, part: Part) -> list[str]:
        """Nodes of a part that are not in FP32 yet: matmuls and tables for INT8, all that computes in floats else."""
        kept = self.target.kept_in_float
        if self.target.precision == "fp32":
            return []
        if self.target.precision == "int8":
            quantised = {node.name for node in onnx_file.quantisable(self.named.graph)}
            names = [node.name for node in part.nodes if node.name in quantised]
        else:
            names = [node.name for node in part.nodes if node.op_type != "Cast" and self.floats & {*node.output}]
        return [name for name in (f"{self.tower}: {name}" for name in names) if name not in kept]

    def worst_node(self, part: Part, worst: Worst) -> str:
        """The node behind which the cosine falls most, of those whose output both graphs have."""
        makers = {name: node for node in part.nodes for name in node.output if name in self.common}
        read = {name for node in makers.values() for name in node.input if name in self.common}
        both = self.run({*makers, *read}, worst)
        losses = {name: pair.loss(worst.tokens) for name, pair in both.items() if pair.comparable}
        known = {name: max((losses.get(given, 0.0) for given in makers[name].input), default=0.0) for name in makers}
        found: str = makers[max(makers, key=lambda name: losses.get(name, 0.0) - known[name])].name
        return found


def label(part: Part) -> str:
    """The layer by the names of its weights, normalisations left out; a tensor's name where there are none."""
    read = [name for node in part.nodes[:-1] for name in node.input if "." in name]
    weights = [name.strip("/").replace("/", ".") for name in read]  # with slashes by PyTorch's older exporter
    found = [match[1].removeprefix("model.") for name in weights if (match := LAYER.match(name))]
    layers = [name for name in found if "norm" not in name.rsplit(".", 1)[1]]
    if layers:
        return layers[0] if layers[0] == layers[-1] else f"{layers[0]} to {layers[-1]}"
    result: str = weights[0].rsplit(".", 1)[0].removeprefix("model.") if weights else part.nodes[-1].output[0]
    return result


def _bare(path: Path, work: Path) -> onnx.ModelProto:
    """The tower alone, without the exporter's types, which are stale behind the fusions."""
    detach(path, work / "bare.onnx")
    model = onnx.load(work / "bare.onnx")
    del model.graph.value_info[:]
    return model


def _makers(graph: onnx.GraphProto, output: str, known: Collection[str] = ()) -> set[str]:
    """Outputs of all nodes that a tensor is computed by, those behind what is `known` left out."""
    by_output = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    stack = [output]
    while stack:
        name = stack.pop()
        if name in by_output and name not in found and name not in known:
            found |= {*by_output[name].output}
            stack += by_output[name].input
    return found


def _piece(model: onnx.ModelProto, cut: Cut, given: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A graph of its own for one piece, with what is given as inputs."""
    read = {name for node in cut.nodes for name in node.input}
    inputs = [value for value in model.graph.input if value.name in read]
    for name, value in given.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        inputs.append(onnx.helper.make_tensor_value_info(name, kind, value.shape))
    constants = [tensor for tensor in model.graph.initializer if tensor.name in read]
    graph = onnx.helper.make_graph(cut.nodes, cut.output, inputs, [onnx.ValueInfoProto(name=cut.output)], constants)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _run(
    model: onnx.ModelProto, names: Collection[str], inputs: dict[str, np.ndarray], work: Path
) -> dict[str, np.ndarray]:
    """Any of a graph's tensors, for `inputs`."""
    if not names:
        return {}
    tapped = onnx_file.copy_of(model)
    del tapped.graph.output[:]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    onnx_file.save(ir.from_proto(tapped), work / "tapped.onnx")
    try:
        session = onnx_file.open_session(work / "tapped.onnx", severity=4)
        feeds = {given.name: inputs[given.name] for given in session.get_inputs()}
        return dict(zip(names, map(np.asarray, session.run(list(names), feeds)), strict=True))
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise DeployError(f"its graph cannot be opened up: {first_line(error)}") from error


def _rows(values: np.ndarray, tokens: np.ndarray | None) -> np.ndarray:
    """Float32 [rows, numbers], with zeros where there is only padding."""
    values = _finite(values)
    if tokens is not None and values.shape[:2] == tokens.shape:
        values = values * tokens.reshape(*tokens.shape, *(1 for _ in values.shape[2:]))
    return values.reshape(len(values), -1)
