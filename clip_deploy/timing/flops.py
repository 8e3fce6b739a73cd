"""How much work a call is, and how much this GPU does: the share of its matrix rate that a target reaches."""

from collections.abc import Callable
from time import perf_counter

import torch
from torch.utils.flop_counter import FlopCounterMode

SIDE = 8192  # of the matrices: large enough for any of today's GPUs
MATMULS = 20


def count_flop(call: Callable[[], object]) -> int:
    """Floating-point operations of a call's matmuls, convolutions and attention, two for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matrix_tflops(side: int = SIDE, device: str = "cuda") -> float:
    """What one FP16 matmul of two square matrices of random numbers reaches here, in TFLOP/s: the median."""
    left, right = (torch.randn(side, side, device=device).half() for _ in range(2))
    times = []
    for _ in range(MATMULS):
        _synchronize(device)
        start = perf_counter()
        left @ right
        _synchronize(device)
        times.append(perf_counter() - start)
    return 2 * side**3 / sorted(times)[MATMULS // 2] / 1e12


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
