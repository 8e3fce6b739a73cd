"""The operations that fusion looks for in a tower's graph, and which of them it missed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = {
    "attention": "attention",
    "layer_norm": "LayerNormalization",
    "skip_layer_norm": "SkipLayerNormalization",
    "gelu": "GELU",
    "patch_embedding": "patch embedding",
    "early_pooling": "early pooling",
}
ADVICE = "another onnx.opset or onnx.exporter may write it in a form that is known"


@dataclass(frozen=True)
class Missed:
    """Operations of one kind in one tower, fewer of which were fused than there are."""

    tower: str
    kind: str
    found: int
    expected: int

    def __str__(self) -> str:
        return f"{self.tower}: {self.found} of {self.expected} {KINDS[self.kind]} fused"


def missed(build: Mapping[str, Any]) -> list[Missed]:
    """What a target's fusions missed of what it asks for, by its build facts; nothing where none were asked for."""
    return [
        Missed(tower, kind, found, expected)
        for tower, kinds in build.get("fusions", {}).items()
        for kind, (found, expected) in kinds.items()
        if found < expected
    ]


def print_missed(name: str, build: Mapping[str, Any]) -> None:
    """One line for each kind that was missed, and what to do."""
    for line in missed(build):
        print(f"{name}: {line}: {ADVICE}")
