from itertools import accumulate

import torch

from clip_deploy.timing import flops
from clip_deploy.timing.flops import count_flop, matrix_tflops


def test_a_product_is_two_operations_for_each_multiply_add():
    left, right = torch.zeros(3, 5), torch.zeros(5, 7)
    assert count_flop(lambda: left @ right) == 2 * 3 * 5 * 7


def test_a_models_work_is_counted_in_inference_mode_too():
    layer = torch.nn.Linear(5, 7)
    with torch.inference_mode():
        assert count_flop(lambda: layer(torch.zeros(3, 5))) == 2 * 3 * 5 * 7


def test_the_rate_of_products_is_that_of_the_median(monkeypatch):
    """Of 20 products two take 8 s and the others 2 s: 2 * 8^3 operations in 2 s."""
    ends = accumulate([0.0] + [took for end in [8.0] * 2 + [2.0] * 18 for took in (end, 0.0)])
    monkeypatch.setattr(flops, "perf_counter", lambda: next(ends))
    assert matrix_tflops(side=8, device="cpu") == 2 * 8**3 / 2 / 1e12
