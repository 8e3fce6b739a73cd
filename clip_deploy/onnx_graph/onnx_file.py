"""ONNX files: read, write (external data above 2 GB), check, describe, and count what was fused."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from clip_deploy.core.environment import cores
from clip_deploy.core.errors import ConfigError, DeployError, first_line
from clip_deploy.core.records import Graph

EXTERNAL_BYTES = 1_800_000_000  # protobuf's limit is 2 GiB for the whole file
FUSED_ATTENTION = {"Attention", "MultiHeadAttention", "QAttention", "PackedAttention"}
GELU = {"Gelu", "QuickGelu", "FastGelu", "BiasGelu"}
PRE_POST_PREFIXES = ("preprocess/", "head/")  # how the names of nodes around a tower begin: pre_post.py
RUNTIME = "com.microsoft"  # the domain of ONNX Runtime's own operators
LAYER_NORM_OPSET = 17  # ONNX's own begins there; ONNX Runtime has one for all opsets, in ONNX's domain
CONTRIB_VERSION = 1  # of com.microsoft, and of all other domains that are not ONNX's own
LABELS = "labels"  # key of the classifier's labels, a JSON list, in the file's metadata_props


def load(path: Path) -> ir.Model:
    """A graph of a built target, its weights mapped into memory where they lie beside it.

    DVC may link them into its cache (cache.type hardlink or symlink), and what is linked onnx and onnx_ir refuse to
    read, as an attack: ONNX Runtime does not. A location outside the folder is left to them to refuse.
    """
    model = ir.load(path)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == Path(tensor.location).name:
            value.const_value = _mapped(tensor, path.with_name(tensor.location))
    return model


def _mapped(tensor: ir.ExternalTensor, path: Path) -> ir.Tensor:
    shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype.numpy()
    content = np.memmap(path, dtype, "r", tensor.offset or 0, shape) if tensor.size else np.zeros(shape, dtype)
    return ir.Tensor(np.asarray(content), dtype=tensor.dtype, name=tensor.name)


def save(model: ir.Model, path: Path) -> list[str]:
    """Write `model`, weights beside it where they are too large for one file, and return the names written.

    The exporter's notes (stack traces with paths of the building machine) are left out, a classifier's labels are not.
    Every domain that nodes are of is declared, whoever added them.
    """
    strip_metadata(model)
    declare_domains(model)
    weights = sum(tensor.const_value.nbytes for tensor in model.graph.initializers.values() if tensor.const_value)
    if weights <= EXTERNAL_BYTES:
        ir.save(model, path)
        return [path.name]
    ir.save(model, path, external_data=f"{path.name}.data")
    return [path.name, f"{path.name}.data"]


def strip_metadata(model: ir.Model) -> None:
    """Take out what exporters note of their own doing, in place: it differs between runs. LABELS stays."""
    for key in set(model.metadata_props) - {LABELS}:
        del model.metadata_props[key]
    for graph in model.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


def declare_domains(model: ir.Model) -> None:
    """State a version of each domain that nodes are of: ONNX Runtime's optimizer does not, and the checker wants it."""
    for node in model.graph.all_nodes():
        model.opset_imports.setdefault(node.domain, CONTRIB_VERSION)


def files_of(folder: Path) -> list[str]:
    """Names of the graphs in `folder` and of their external data."""
    return sorted(path.name for path in folder.iterdir() if ".onnx" in path.suffixes)


def check(path: Path) -> None:
    """Raise DeployError where onnx.checker refuses the file; operators of ONNX Runtime's own are let pass."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            onnx.checker.check_model(_unlinked(path, Path(folder)))
    except onnx.checker.ValidationError as error:
        raise DeployError(f"onnx.checker refuses {path.name}: {first_line(error)}") from error


def _unlinked(path: Path, folder: Path) -> Path:
    """The graph in `folder`, with files as long as its weights: the checker reads none of them, and wants no links."""
    for name in files_of(path.parent):
        if name.startswith(f"{path.name}."):
            with (folder / name).open("wb") as file:
                file.truncate((path.parent / name).stat().st_size)  # takes no place on the disk
    copy = folder / path.name
    model = onnx.load(path, load_external_data=False)
    if opset_in(model) >= LAYER_NORM_OPSET:
        return Path(shutil.copyfile(path, copy))
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            node.domain = RUNTIME
    model.opset_import.append(onnx.helper.make_opsetid(RUNTIME, CONTRIB_VERSION))
    onnx.save(model, copy)
    return copy


def opset_of(path: Path) -> int:
    """Version of the standard operator set that the file declares."""
    return opset_in(onnx.load(path, load_external_data=False))


def opset_in(model: onnx.ModelProto) -> int:
    """The opset of ONNX's own operators that a model declares."""
    found: int = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return found


def raise_opset(model: ir.Model, opset: int) -> None:
    """Declare at least this operator set, and the file format that belongs to it.

    For operators that later versions give more types and change in no other way, as those of a fused tower are.
    """
    if model.opset_imports[""] < opset:
        model.opset_imports[""] = opset
    model.ir_version = max(model.ir_version, onnx.helper.OP_SET_ID_VERSION_MAP["ai.onnx", model.opset_imports[""]])


def describe(path: Path) -> Graph:
    """Graph information: IR and opset versions, producer, inputs and outputs with shapes, nodes, the tower's census."""
    model = onnx.load(path, load_external_data=False)
    counts = Counter(node.op_type for node in model.graph.node if not node.name.startswith(PRE_POST_PREFIXES))
    return Graph(
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        inputs={value.name: _shape(value) for value in model.graph.input},
        outputs={value.name: _shape(value) for value in model.graph.output},
        nodes=len(model.graph.node),
        fusion=census(counts),
    )


def census(counts: Counter[str]) -> dict[str, int]:
    """Fused attentions, all attentions (one Softmax each where not fused), and the other fused operators.

    layer_norm counts those of skip_layer_norm too.
    """
    fused = sum(counts[name] for name in FUSED_ATTENTION)
    return {
        "attention": fused,
        "attention_expected": fused + counts["Softmax"],
        "layer_norm": counts["LayerNormalization"] + counts["SkipLayerNormalization"],
        "skip_layer_norm": counts["SkipLayerNormalization"],
        "gelu": sum(counts[name] for name in GELU),
        "quantized_matmul": counts["MatMulInteger"] + counts["DynamicQuantizeMatMul"],
        "quantize_linear": counts["QuantizeLinear"] + counts["DynamicQuantizeLinear"],
    }


def name_nodes(model: onnx.ModelProto) -> None:
    """Give each node a name of its own, <operator>_<position>."""
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"


def kept_nodes(model: onnx.ModelProto, tower: str, keep_fp32: Sequence[str]) -> list[str]:
    """The nodes of one tower among the setting's "<tower>: <node>"; ConfigError where the graph has no such node."""
    names = [name.split(": ", 1)[1] for name in keep_fp32 if name.startswith(f"{tower}: ")]
    if lost := sorted(set(names) - {node.name for node in model.graph.node}):
        raise ConfigError(
            f"keep_fp32 names {tower}: {lost[0]}, which the graph does not have (another opset or source gives nodes "
            "other numbers): remove keep_fp32; if the target then fails its gate, run `clip-deploy apply` again"
        )
    return names


def quantisable(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that multiply by, or look up, a constant matrix."""
    matrices = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
    operand = {"MatMul": 1, "Gather": 0}
    return [node for node in graph.node if node.op_type in operand and node.input[operand[node.op_type]] in matrices]


def float_tensors(model: onnx.ModelProto, work: Path, types: Sequence[str] = ("tensor(float)",)) -> list[str]:
    """Names of the float32 inputs and of the results that are used; ONNX Runtime infers those of its own operators too.

    Args:
        model: a graph that runs.
        work: a folder for temporary files.
        types: which results count, as ONNX Runtime names them.
    """
    inputs = [value.name for value in model.graph.input if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    typed = copy_of(model)
    del typed.graph.output[:]
    typed.graph.output.extend(
        onnx.ValueInfoProto(name=name) for node in model.graph.node for name in node.output if name in used
    )
    save(ir.from_proto(typed), work / "types.onnx")
    session = open_session(work / "types.onnx")
    return inputs + [value.name for value in session.get_outputs() if value.type in types]


def declare_floats(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """State the type of these tensors in the graph, for tools that know no operator of ONNX Runtime's own."""
    declared = {value.name for value in (*model.graph.input, *model.graph.output)}
    model.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in declared
    )


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a whole model, weights included."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    return [item.dim_param or item.dim_value for item in value.type.tensor_type.shape.dim]


def open_session(
    graph: Path | bytes, severity: int = 2, providers: Sequence[str] = ("CPUExecutionProvider",)
) -> onnxruntime.InferenceSession:
    """A graph with a CPU thread for each core left to this process: ONNX Runtime counts those of the machine.

    `severity`: what it logs, from 0 (all) to 4 (fatal errors).
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = cores(), severity
    return onnxruntime.InferenceSession(graph, options, providers=list(providers))


def run(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The first output of a graph for `feeds`, on the CPU; DeployError where it does not run."""
    try:
        found: np.ndarray = open_session(path, severity=4).run(None, feeds)[0]  # the error below says it
        return found
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise DeployError(f"{path.name} does not run: {first_line(error)}") from error


def random_feeds(path: Path, examples: dict[str, list[Any]], seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs that fit the graph, three rows: of whole numbers `examples`, and noise for pixel_values."""
    model = onnx.load(path, load_external_data=False)
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        if value.name in examples:
            feeds[value.name] = np.array(examples[value.name], dtype=np.int64)
        else:
            shape = [item if isinstance(item, int) else 3 for item in _shape(value)]
            feeds[value.name] = rng.normal(size=shape).astype(np.float32)
    return feeds
