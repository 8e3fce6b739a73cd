import torch

from clip_deploy.timing.flops import count_flop, matrix_tflops


def test_a_product_is_two_operations_for_each_multiply_add():
    left, right = torch.zeros(3, 5), torch.zeros(5, 7)
    assert count_flop(lambda: left @ right) == 2 * 3 * 5 * 7


def test_a_models_work_is_counted_in_inference_mode_too():
    layer = torch.nn.Linear(5, 7)
    with torch.inference_mode():
        assert count_flop(lambda: layer(torch.zeros(3, 5))) == 2 * 3 * 5 * 7


def test_the_rate_of_products_is_a_positive_number():
    assert matrix_tflops(side=8, device="cpu") > 0
