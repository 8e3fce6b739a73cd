"""What a tower computes, counted on the PyTorch model while it runs: what the fusions of its graph are held against.

Nothing here reads a graph: an exporter that writes an operation in a form that no fusion knows does not change the
count.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clip_deploy.core.fusions import KINDS

ATTENTIONS = {"scaled_dot_product_attention", "multi_head_attention_forward", "softmax"}
ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
RESHAPES = {"flatten", "reshape", "view"}


def count_operations(tower: nn.Module, inputs: Sequence[Tensor]) -> dict[str, int]:
    """How often each operation that can be fused occurs in one call of a tower.

    Only what the embedding is computed from counts; an exporter leaves out the rest.

    Returns:
        attention: calls of PyTorch's attention, or of softmax where a model writes attention out.
        layer_norm: layer normalizations, those of skip_layer_norm included.
        skip_layer_norm: those of a sum [batch, tokens, width] of a linear layer's output and another tensor of its
            shape, or of one token that is taken of such a sum behind an attention; sums of embeddings are none.
        gelu: activations whose class is called GELU in any form, and calls of PyTorch's.
        patch_embedding: 1 where a convolution whose stride is its kernel turns the image into a row of patches.
        early_pooling: 1 where one of several tokens is taken behind an attention.
    """
    counter = _Counter(inputs[0])
    tower.requires_grad_()  # the embedding's gradient leads to all that it is computed from
    with torch.enable_grad(), _watched(tower, counter), counter:
        embeds = tower(*inputs)
    used = _steps_behind(embeds)
    return {kind: len({step for step in counter.steps[kind] if step in used}) for kind in KINDS}


class _Counter(TorchFunctionMode):  # type: ignore[misc]
    """Notes the calls of PyTorch's functions, by kind, and remembers which tensors came of which."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = image
        self.steps: dict[str, list[Any]] = {kind: [] for kind in KINDS}  # of the gradient: one for each result
        self.linear: list[Tensor] = []
        self.sums: list[Tensor] = []
        self.patches: list[Tensor] = []
        self.inside_gelu = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._remember(func.__name__, args, kwargs, result)
            for kind in self._kinds(func.__name__, args, result):
                self.note(kind, result)
        return result

    def note(self, kind: str, result: Tensor) -> None:
        self.steps[kind].append(result.grad_fn)

    def _kinds(self, name: str, args: Sequence[Any], result: Tensor) -> Iterator[str]:
        """What a call counts as."""
        if name in ATTENTIONS:
            yield "attention"
        if name == "layer_norm":
            yield "layer_norm"
        if name == "layer_norm" and _is_among(args[0], self.sums):
            yield "skip_layer_norm"
        if name == "gelu" and not self.inside_gelu:
            yield "gelu"
        if name in RESHAPES and _is_among(args[0], self.patches):
            yield "patch_embedding"
        if name == "__getitem__" and self._pools(args[0], result):
            yield "early_pooling"

    def _remember(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
        if name == "linear":
            self.linear.append(result)
        elif (name in ADDITIONS and self._is_skip(args)) or (name == "__getitem__" and self._takes_a_sum(args, result)):
            self.sums.append(result)
        elif name == "conv2d" and args[0] is self.image and _cuts(*args[1:], **kwargs):
            self.patches.append(result)

    def _pools(self, tokens: Tensor, taken: Any) -> bool:
        return bool(self.steps["attention"]) and _takes_a_token(tokens, taken)

    def _takes_a_sum(self, args: Sequence[Any], taken: Any) -> bool:
        return _is_among(args[0], self.sums) and self._pools(args[0], taken)

    def _is_skip(self, args: Sequence[Any]) -> bool:
        both = [item for item in args[:2] if isinstance(item, Tensor) and not isinstance(item, nn.Parameter)]
        if len(both) < 2 or both[0].shape != both[1].shape or both[0].dim() != 3:
            return False
        return any(_is_among(item, self.linear) for item in both)


@contextmanager
def _watched(tower: nn.Module, counter: _Counter) -> Iterator[None]:
    """Note the activations that are modules of their own: most are arithmetic that only their class names."""

    def enter(*_: Any) -> None:
        counter.inside_gelu += 1

    def leave(_: nn.Module, __: Any, result: Tensor) -> None:
        counter.inside_gelu -= 1
        counter.note("gelu", result)

    activations = [module for module in tower.modules() if "gelu" in type(module).__name__.lower()]
    hooks = [module.register_forward_pre_hook(enter) for module in activations]
    hooks += [module.register_forward_hook(leave) for module in activations]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _steps_behind(result: Tensor) -> set[Any]:
    """All steps of the gradient behind a tensor."""
    seen: set[Any] = set()
    stack = [result.grad_fn]
    while stack:
        step = stack.pop()
        if step is not None and step not in seen:
            seen.add(step)
            stack += [before for before, _ in step.next_functions]
    return seen


def _is_among(tensor: Any, others: Sequence[Tensor]) -> bool:
    return any(tensor is other for other in others)


def _cuts(
    weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> bool:
    """Whether a convolution's patches neither overlap nor leave gaps."""
    sizes = tuple(weight.shape[2:])
    plain = padding in (0, (0, 0), "valid") and dilation in (1, (1, 1)) and groups == 1
    return plain and stride in (sizes, list(sizes)) and max(sizes) > 1


def _takes_a_token(tokens: Tensor, taken: Any) -> bool:
    """Whether [batch, width] was taken of [batch, several tokens, width]."""
    return tokens.dim() == 3 and tokens.shape[1] > 1 and tuple(taken.shape) == (tokens.shape[0], tokens.shape[2])
