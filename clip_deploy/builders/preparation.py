"""The towers of an ONNX target as the builders take them on: detached from what stands around them, fused, rounded."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from clip_deploy.core.artifact import Target
from clip_deploy.core.config import Device
from clip_deploy.core.records import Facts
from clip_deploy.data.preprocessed import Prepared, feeds
from clip_deploy.onnx_graph.pre_post import PrePost, detach
from clip_deploy.rewrites.fusion import Fused, Step, facts_of, fuse
from clip_deploy.rewrites.half_precision import SCAN_ROWS, in_words, to_float16


@dataclass
class Preparation:
    """Prepares one tower after the other and remembers what the target's `build` says of it.

    Attributes:
        source: folder of an ONNX target in float32.
        target: what it holds.
        calibration: the prepared set that float16 is tried on.
        device: where the graphs will run.
        fused: by tower, what was fused.
        left_in_fp32: nodes whose values float16 does not hold; None where nothing was rounded.
    """

    source: Path
    target: Target
    calibration: Prepared
    device: Device = Device.cpu
    fused: dict[str, Fused] = field(default_factory=dict)
    left_in_fp32: list[str] | None = None

    def fuse(self, tower: str, rewrites: list[Step], folder: Path) -> tuple[Path, PrePost]:
        """Write one tower's graph with `rewrites` applied into `folder`; return it and what stood around it."""
        bare, graph = folder / f"{tower}-bare.onnx", folder / f"{tower}.onnx"
        pre_post = detach(self.source / graph.name, bare)
        self.fused[tower] = fuse(bare, graph, rewrites, self.target.model.examples)
        return graph, pre_post

    def to_float16(self, tower: str, graph: Path, keep_fp32: list[str] | None = None) -> None:
        """Rewrite a graph in float16, but for `keep_fp32` and what overflows on the calibration set."""
        inputs = self.calibration.inputs(tower, self.target.model.text_inputs)
        kept = to_float16(graph, partial(feeds, inputs, SCAN_ROWS), keep_fp32 or [], self.device)
        self.left_in_fp32 = [*(self.left_in_fp32 or []), *in_words(tower, kept)]

    def facts(self) -> Facts:
        """What was fused of what there is, and what float16 left in float32."""
        rounded: Facts = {} if self.left_in_fp32 is None else {"left_in_fp32": self.left_in_fp32}
        return facts_of(self.fused, self.target.model.operations) | rounded
