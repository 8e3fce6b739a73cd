"""Time the towers of a `torch-fused-fp16` or `-fp8` target with one of its choices taken back at a time, on a GPU.

    python -m benchmarks.ablation source=artifacts/torch-fused-fp16 output=reports/hardware/nvidia-h200/ablation.md

Each choice is timed in ROUNDS turns beside the target as it ships, every turn a replay from a CUDA graph
(autotune.median_ms), the eager calls aside. The table is written after each row.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import ModuleType
from uuid import uuid4

import onnx_ir as ir
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clip_deploy.core.artifact import TOWERS, read_target
from clip_deploy.core.errors import first_line
from clip_deploy.core.files import write_text
from clip_deploy.core.model import Model, image_feed, random_images
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.torch_module import GraphModule, Operators
from clip_deploy.report.tables import number, table
from clip_deploy.runtimes import autotune, kernels
from clip_deploy.runtimes.autotune import TunedOperators, median_ms
from clip_deploy.runtimes.choices import Choices

BATCHES = (1, 8, 32, 256)
ROUNDS = 3
SHORT = 16  # tokens of texts that are cut
CALLS = 20  # of a turn without a CUDA graph


class PyTorchAttention(TunedOperators):
    """Our kernels, but PyTorch's attention over queries, keys and values copied apart."""

    def attention(self, packed: Tensor, heads: int, scale: float, causal: bool, inverse: float | None = None) -> Tensor:
        return Operators.attention(self, packed, heads, scale, causal, inverse)


class PyTorchPooling(TunedOperators):
    """Our kernels, but PyTorch's attention of the one token that the last layer computes."""

    pooled_attention = Operators.pooled_attention


def tuned_anew() -> TunedOperators:
    """Our kernels, of which none was chosen before: what can be chosen is changed."""
    operators = TunedOperators()
    operators.choices = Choices(str(uuid4()))
    return operators


@contextmanager
def instead(module: ModuleType, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def descriptors_alone() -> Iterator[None]:
    """Every matmul of ours copies its tiles by descriptors."""
    split = [way for way in kernels.SPLIT if way[0].descriptors]
    with instead(kernels, "FEW", ()), instead(kernels, "SPLIT", split):
        yield


@contextmanager
def sums_in_fp16() -> Iterator[None]:
    """cuBLAS may add up in FP16."""
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False


@dataclass
class Choice:
    """What is changed of the target: its operators, how they run, whether a CUDA graph replays them."""

    name: str
    operators: Callable[[], Operators] = TunedOperators
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    graph: bool = True


SHIPPED = Choice("as shipped")
CHOICES = (
    Choice("no CUDA graph", graph=False),
    Choice(
        "no programmatic dependent launch", within=partial(instead, kernels, "_launch", lambda: {"DEPENDENT": False})
    ),
    Choice(
        "no weights asked for ahead",
        within=partial(instead, kernels, "_lines", lambda weight, rows, parts: (weight[0].nbytes, 0)),
    ),
    Choice("few rows: descriptors alone", tuned_anew, descriptors_alone),
    Choice("few rows: tuned on warm weights", tuned_anew, partial(instead, autotune, "other_layers", lambda given: [])),
    Choice("PyTorch's pooled attention", PyTorchPooling),
    Choice("PyTorch's operators alone", operators=Operators),
    Choice("PyTorch's flash attention", PyTorchAttention, partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)),
    Choice("cuDNN's attention", PyTorchAttention, partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
    Choice("cuBLAS adds up in FP16", within=sums_in_fp16),
)


@torch.inference_mode()  # type: ignore[untyped-decorator]
def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    source = Path(given["source"])
    head = ["Tower", "Changed", *(f"{what} @{batch}" for batch in BATCHES for what in ("ms", "ratio")), "Lowest cosine"]
    lines = [
        f"# Choices of {source.name} on {torch.cuda.get_device_name()}",
        "",
        f"`python -m benchmarks.ablation`, towers of {depths(source)}: torch {torch.__version__}, triton "
        f"{triton.__version__}; milliseconds of a tower, and the median [least, most] of {ROUNDS} turns' ratios to the "
        "target as shipped, timed in the same turns (above 1: slower). Cosine: to the embeddings as shipped.",
        "",
    ]
    rows: list[list[str]] = []
    for tower in TOWERS:
        for row in compare(source, tower):
            rows.append(row)
            print(" ".join(row), flush=True)
            write_text(Path(given["output"]), "\n".join([*lines, *table(head, rows), ""]))


def depths(source: Path) -> str:
    towers = read_target(source).model.towers.values()
    return " and ".join(f"{tower.layers} layers of width {tower.width}" for tower in towers)


def compare(source: Path, tower: str) -> Iterator[list[str]]:
    graph = onnx_file.load(source / f"{tower}.onnx")
    shipped = module(graph, SHIPPED)
    model = read_target(source).model
    batches = [inputs(model, tower, batch) for batch in BATCHES]
    times = [number(time(SHIPPED, shipped, given)) for given in batches]
    yield [tower, SHIPPED.name, *(cell for shown in times for cell in (shown, "")), ""]
    for choice in CHOICES:
        changed = module(graph, choice)
        yield [tower, choice.name, *cells(choice, changed, shipped, batches)]
    if tower == "text":
        others: dict[str, Callable[[Tensor], Tensor]] = {
            f"texts cut to {SHORT} tokens": lambda given: given[:, :SHORT],
            "texts that are all alike": lambda given: given[:1].expand_as(given),
        }
        for name, change in others.items():
            others_given = [tuple(change(tensor).contiguous() for tensor in given) for given in batches]
            both = zip(others_given, batches, strict=True)
            timed = [ratios(SHIPPED, shipped, one, shipped, given) for one, given in both]
            yield [tower, name, *(cell for pair in timed for cell in pair), ""]


def cells(choice: Choice, changed: GraphModule, shipped: GraphModule, batches: list[tuple[Tensor, ...]]) -> list[str]:
    timed, lowest = [], 1.0
    for given in batches:
        try:
            with choice.within():
                embeddings = changed(*given)
        except RuntimeError as error:  # a kernel that does not take these shapes or masks
            return [*["-"] * 2 * len(batches), first_line(error)[:80]]
        lowest = min(lowest, F.cosine_similarity(embeddings, shipped(*given)).min().item())
        timed.append(ratios(choice, changed, given, shipped, given))
    return [*(cell for pair in timed for cell in pair), f"{lowest:.5f}"]


def ratios(
    choice: Choice,
    changed: GraphModule,
    given: tuple[Tensor, ...],
    shipped: GraphModule,
    as_shipped: tuple[Tensor, ...],
) -> tuple[str, str]:
    turns = [(time(choice, changed, given), time(SHIPPED, shipped, as_shipped)) for _ in range(ROUNDS)]
    found = [ours / theirs for ours, theirs in turns]
    return number(median(ours for ours, _ in turns)), f"{median(found):.2f} [{min(found):.2f}, {max(found):.2f}]"


def time(choice: Choice, tower: GraphModule, given: tuple[Tensor, ...]) -> float:
    """Milliseconds of a call."""
    with choice.within():
        tower(*given)  # a new shape only begins to compile its kernels
        if choice.graph:
            return median_ms(tower, given)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            tower(*given)
            mark.record()
        torch.cuda.synchronize()
        found: float = median(start.elapsed_time(end) for start, end in pairwise(marks))
        return found


def module(graph: ir.Model, choice: Choice) -> GraphModule:
    found: GraphModule = GraphModule(graph, operators=choice.operators()).to("cuda")
    return found


def inputs(model: Model, tower: str, batch: int) -> tuple[Tensor, ...]:
    """Random pixels, or texts of the full context whose words are drawn from the model's examples."""
    if tower == "vision":
        images = image_feed(random_images(batch, model.image_dtype))
        return tuple(torch.from_numpy(rows).to("cuda") for rows in images.values())
    words = torch.tensor(model.example_texts["input_ids"], device="cuda").unique()
    ids = words[torch.randint(len(words), (batch, model.context_length), device="cuda")]
    held = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return tuple(held[name] for name in model.text_inputs)


if __name__ == "__main__":
    main()
