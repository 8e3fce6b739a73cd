"""Our kernels give what PyTorch's operators give: on a GPU where there is one, else in Triton's interpreter."""

import shutil
from concurrent.futures import Future
from threading import Timer

import ml_dtypes
import numpy as np
import pytest
import torch

from clip_deploy.builders.fused import optimize
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import AccuracyBudget, OptimizeConfig, Precision, Provider
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.onnx_graph import onnx_file
from clip_deploy.onnx_graph.torch_module import FP8, MAX_FP8, Activation, GraphModule, Operators, _multi_head_attention
from clip_deploy.runtimes import open_encoder

ON_GPU = shutil.which("nvidia-smi") is not None
kernels = pytest.importorskip("clip_deploy.runtimes.kernels", exc_type=ModuleNotFoundError)

DEVICE = "cuda" if ON_GPU else "cpu"
LIBRARY = Operators()


@pytest.fixture(autouse=True)
def interpreted_fp8(monkeypatch):
    """Triton's interpreter loses a carry where it rounds to FP8: ml_dtypes rounds instead."""
    if ON_GPU:
        return
    from triton.runtime import interpreter

    def convert(numbers, given, wanted, mode):
        if str(wanted) != "fp8e4nv" or given.primitive_bitwidth < 16:
            return whole_interpreter(numbers, given, wanted, mode)
        return numbers.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)

    whole_interpreter = interpreter._convert_float
    monkeypatch.setattr(interpreter, "_convert_float", convert)


def random(*shape, dtype=torch.float16, scale=1.0):
    generator = torch.Generator().manual_seed(len(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def whole(tensor):
    return None if tensor is None else tensor.float()


@pytest.mark.parametrize("blocks", kernels.QUERIES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "heads", "width"), [(2, 50, 4, 64), (1, 77, 2, 64), (3, 9, 2, 32)])
def test_attention_takes_its_parts_from_the_packed_product(batch, tokens, heads, width, causal, blocks):
    packed = random(batch, tokens, 3 * heads * width)
    expected = LIBRARY.attention(packed.float(), heads, 0.125, causal)
    actual = kernels.attention(packed, heads, 0.125, causal, blocks=blocks)
    torch.testing.assert_close(actual.float(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("batch", "count", "tokens", "heads", "width"), [(2, 1, 50, 4, 64), (3, 2, 77, 2, 32)])
def test_few_queries_attend_to_packed_keys_and_values(batch, count, tokens, heads, width, masked):
    query, packed = random(batch, count, heads * width), random(batch, tokens, 2 * heads * width)
    mask = torch.ones(batch, tokens, dtype=torch.int32, device=DEVICE)
    mask[0, 9:] = 0
    mask[1, : 70 if tokens > 70 else 20] = 0  # the first block of keys as a whole, in the longer sequence
    given = (mask,) if masked else ()
    expected = LIBRARY.pooled_attention(query.float(), packed.float(), *given, heads=heads, scale=0.125)
    actual = kernels.pooled_attention(query, packed, mask if masked else None, heads, 0.125)
    torch.testing.assert_close(actual.float(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("activation", [None, *map(Activation, ("QuickGelu", "Gelu", "FastGelu"))])
@pytest.mark.parametrize("tiles", [kernels.LARGE[0], kernels.SMALL[-1], kernels.FEW[0], kernels.FEW[-1]], ids=str)
def test_a_product_adds_its_bias_and_applies_its_activation(tiles, activation, dtype):
    depth = 96 if tiles.descriptors else 256  # whole steps, as it is chosen for
    rows, weight = random(70, depth, dtype=dtype), random(152, depth, dtype=dtype, scale=0.05)
    bias = random(152, dtype=dtype)
    tolerance = 3e-3 if dtype is torch.float16 else 2e-2
    for added in (bias, None):
        expected = LIBRARY.linear(rows.float(), weight.float(), whole(added), activation=activation)
        actual = kernels.triton_linear(rows, weight, added, None, activation, None, tiles)
        torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)
        if ON_GPU or activation is None or activation.kind != "FastGelu":  # cuBLAS's own GELU has no CPU counterpart
            library = kernels.cublas_linear(rows, weight, added, None, activation, None)
            torch.testing.assert_close(library.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("has_added", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_sum_is_normalised_and_kept(has_bias, has_added):
    rows, skip, weight = random(3, 7, 96), random(3, 7, 96), random(96)
    bias, added = random(96) if has_bias else None, random(96) if has_added else None
    given = (rows, skip, weight, bias, added)
    expected = LIBRARY.skip_layer_norm(*map(whole, given), epsilon=1e-5)
    actual = kernels.skip_layer_norm(*given, 1e-5)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=4e-3, rtol=4e-3)


def test_one_row_of_a_batch_is_added_to_all():
    rows, skip, weight, bias = random(3, 7, 96), random(1, 7, 96), random(96), random(96)
    expected = LIBRARY.skip_layer_norm(*map(whole, (rows, skip, weight, bias)), epsilon=1e-5)
    actual = kernels.skip_layer_norm(rows, skip, weight, bias, None, 1e-5)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("has_added", [False, True])
@pytest.mark.parametrize(("tiles", "parts"), kernels.SPLIT)
def test_a_product_in_parts_is_summed_where_it_is_normalised(tiles, parts, has_added):
    rows, matrix, skip = random(2, 35, 512), random(160, 512, scale=0.05), random(2, 35, 160)
    weight, bias, added = random(160), random(160), random(160) if has_added else None
    sides = [whole(tensor) for tensor in (skip, weight, bias, added)]
    expected = LIBRARY.linear_skip_layer_norm(rows.float(), matrix.float(), None, None, *sides, epsilon=1e-5)
    actual = kernels.linear_skip_layer_norm(rows, matrix, None, skip, weight, bias, added, 1e-5, None, tiles, parts)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=6e-3, rtol=6e-3)


def fp8(*shape):
    """FP8 values, and what one of them stands for."""
    values = random(*shape, dtype=torch.float32)
    scale = values.abs().max().item() / MAX_FP8
    return LIBRARY.quantise(values, 1 / scale), scale


def assert_rounded_alike(ours, theirs, atol=2**-9):
    """FP8 numbers are the same but for those next to a rounding's edge: a step is an eighth of the number at most."""
    assert ours.dtype is theirs.dtype is FP8
    ours, theirs = ours.float(), theirs.float()
    torch.testing.assert_close(ours, theirs, rtol=0.13, atol=atol)
    assert (ours == theirs).float().mean() > 0.98


@pytest.fixture(scope="module")
def fp8_matmul():
    """Rows, weight, bias and scales of a matmul in FP8, and one over the scale of its result."""
    (rows, hidden), (weight, one) = fp8(70, 256), fp8(160, 256)
    scale = 0.02 * hidden * one * torch.linspace(0.5, 2.0, 160, device=DEVICE)
    return rows, weight, random(160), scale, 4.0


@pytest.mark.parametrize("activation", [None, *map(Activation, ("QuickGelu", "Gelu", "FastGelu"))])
@pytest.mark.parametrize("tiles", [kernels.LARGE[-1], kernels.SMALL[0], kernels.FEW[0]], ids=str)
def test_a_product_of_fp8_is_scaled_and_rounded_again(tiles, activation, fp8_matmul):
    *given, inverse = fp8_matmul
    for rounds in (None, inverse):
        expected = LIBRARY.linear(*given, activation=activation, inverse=rounds)
        actual = kernels.triton_linear(*given, activation, rounds, tiles)
        if rounds:
            assert_rounded_alike(actual, expected)
        else:
            assert actual.dtype is torch.float16
            torch.testing.assert_close(actual, expected, atol=5e-3, rtol=5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, Activation("QuickGelu")])
@pytest.mark.parametrize("way", [kernels.cublas_linear, kernels.cublas_fp8_linear])
def test_cublas_multiplies_fp8(way, activation, fp8_matmul):
    *given, inverse = fp8_matmul
    expected = LIBRARY.linear(*given, activation=activation)
    torch.testing.assert_close(way(*given, activation, None), expected, atol=2e-2, rtol=2e-2)
    rounded = LIBRARY.linear(*given, activation=activation, inverse=inverse)
    torch.testing.assert_close(way(*given, activation, inverse).float(), rounded.float(), rtol=0.13, atol=0.1)


def test_attention_is_rounded_as_it_is_written():
    packed = random(2, 50, 3 * 128)
    expected = LIBRARY.attention(packed, 2, 0.125, False, 100.0)
    assert_rounded_alike(kernels.attention(packed, 2, 0.125, False, 100.0, blocks=kernels.QUERIES[3]), expected, 2e-2)


def test_what_is_normalised_is_rounded_and_its_sum_is_not():
    rows, skip, weight, bias = random(3, 7, 96), random(3, 7, 96), random(96), random(96)
    expected = LIBRARY.skip_layer_norm(rows, skip, weight, bias, epsilon=1e-5, inverse=100.0)
    normalized, total = kernels.skip_layer_norm(rows, skip, weight, bias, None, 1e-5, 100.0)
    assert_rounded_alike(normalized, expected[0])
    torch.testing.assert_close(total, expected[1], atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(("tiles", "parts"), [kernels.SPLIT[0], kernels.SPLIT[-2]])
def test_a_product_of_fp8_in_parts_is_summed_where_it_is_normalised(tiles, parts):
    (rows, hidden), (matrix, one) = fp8(70, 512), fp8(160, 512)
    scale = 0.02 * hidden * one * torch.linspace(0.5, 2.0, 160, device=DEVICE)
    skip, weight, bias, added = random(2, 35, 160), random(160), random(160), random(160)
    rows = rows.view(2, 35, 512)
    given = (rows, matrix, None, scale, skip, weight, bias, added)
    expected = LIBRARY.linear_skip_layer_norm(*given, epsilon=1e-5, inverse=100.0)
    actual = kernels.linear_skip_layer_norm(rows, matrix, scale, skip, weight, bias, added, 1e-5, 100.0, tiles, parts)
    assert_rounded_alike(actual[0], expected[0], 0.5)
    torch.testing.assert_close(actual[1], expected[1], atol=2e-2, rtol=6e-3)


def test_values_beyond_the_largest_fp8_number_become_it():
    given = torch.tensor([-1e4, -448.0, 0.0, 449.0, 6e4], device=DEVICE).half()
    expected = [-448.0, -448.0, 0.0, 448.0, 448.0]
    for operators in (LIBRARY, kernels):
        assert operators.quantise(given, 1.0).float().tolist() == expected


@pytest.mark.parametrize("size", [(4, 4), (2, 6), (8, 3)])
def test_patches_are_cut_row_by_row_and_rounded(size):
    pixels = random(2, 3, 8, 12, dtype=torch.float32)
    assert torch.equal(kernels.patchify(pixels, size, torch.float16), LIBRARY.patchify(pixels, size, torch.float16))


def test_the_fastest_way_is_found_once_for_each_shape(monkeypatch, tmp_path):
    """Timed on a GPU; without one the last way counts as the fastest."""
    from clip_deploy.runtimes import autotune

    monkeypatch.setenv("CLIP_DEPLOY_CACHE", str(tmp_path))
    timed, operators = [], autotune.TunedOperators()
    if not ON_GPU:
        monkeypatch.setattr(autotune, "compile_all", lambda ways, given: [])
    measure = autotune.median_ms if ON_GPU else lambda way, *given: -len(timed)
    monkeypatch.setattr(autotune, "median_ms", lambda way, *given: timed.append(way) or measure(way, *given))
    rows, weight = random(64, 128), random(256, 128)
    first = operators.linear(rows, weight)
    assert not timed  # kernels are compiled meanwhile
    fastest = operators.linear(rows, weight)
    torch.testing.assert_close(fastest, first)
    count = len(timed)
    assert count > 1
    assert torch.equal(operators.linear(rows, weight), fastest)
    assert torch.equal(autotune.TunedOperators().linear(rows, weight), fastest)  # as another process would
    assert len(timed) == count


def test_what_another_kernel_is_compiled_for_ends_before_one_is_timed(monkeypatch, tmp_path):
    from clip_deploy.runtimes import autotune

    monkeypatch.setenv("CLIP_DEPLOY_CACHE", str(tmp_path))
    begun = []

    def compile_all(ways, given):
        begun.append(Future())
        return begun[-1:]

    monkeypatch.setattr(autotune, "compile_all", compile_all)
    monkeypatch.setattr(autotune, "median_ms", lambda way, *given: 1.0 if all(one.done() for one in begun) else 1 / 0)
    operators, rows = autotune.TunedOperators(), random(64, 128)
    for width in (256, 512):
        operators.linear(rows, random(width, 128))
    Timer(0.2, lambda: [one.set_result(None) for one in begun]).start()
    operators.linear(rows, random(256, 128))
    assert len(begun) == 2
    assert len(operators.fastest) == 1


@pytest.mark.gpu
def test_a_kernel_that_cannot_be_compiled_says_so(monkeypatch, tmp_path):
    from clip_deploy.runtimes import autotune

    def fail(*given):
        raise ValueError("no such tiles")

    monkeypatch.setenv("CLIP_DEPLOY_CACHE", str(tmp_path))
    operators, rows = autotune.TunedOperators(), random(64, 128)
    operators._choose(("any",), [torch.relu, fail], rows)
    with pytest.raises(ValueError, match="no such tiles"):
        operators._choose(("any",), [torch.relu, fail], rows)


def test_layers_of_one_shape_keep_their_own_scales(monkeypatch, tmp_path):
    """The way that was found for one layer serves the others."""
    from clip_deploy.runtimes import autotune

    monkeypatch.setenv("CLIP_DEPLOY_CACHE", str(tmp_path))
    if not ON_GPU:
        monkeypatch.setattr(autotune, "median_ms", lambda way, *given: 1.0)
        monkeypatch.setattr(autotune, "compile_all", lambda ways, given: [])
    operators = autotune.TunedOperators()
    rows, matrix, skip, weight = random(1, 64, 256), random(128, 256, scale=0.05), random(1, 64, 128), random(128)
    given, packed = (rows, matrix, None, None, skip, weight), random(1, 64, 3 * 64)
    for inverse, epsilon in ((100.0, 1e-5), (25.0, 1e-1), (50.0, 1e-2)):  # the second call finds the way
        settings = {"epsilon": epsilon, "inverse": inverse}
        normalized, _ = operators.linear_skip_layer_norm(*given, **settings)
        assert_rounded_alike(normalized, LIBRARY.linear_skip_layer_norm(*given, **settings)[0])
        linear = LIBRARY.linear(rows, matrix, inverse=inverse)
        assert_rounded_alike(operators.linear(rows, matrix, inverse=inverse), linear, 2e-2)
        attended = LIBRARY.attention(packed, 2, 0.125, False, inverse)
        assert_rounded_alike(operators.attention(packed, 2, 0.125, False, inverse), attended, 2e-2)


@pytest.fixture(scope="module", params=["fp16", "fp8"])
def target(onnx_target, sets, tmp_path_factory, request):
    """The built-in model as our kernels run it."""
    folder = tmp_path_factory.mktemp("kernels") / f"torch-fused-{request.param}"
    settings = OptimizeConfig(
        precision=Precision(request.param),
        provider=Provider.torch,
        skip_layer_norm=True,
        accuracy_budget=AccuracyBudget(1.0, 2.0) if request.param == "fp8" else None,
    )
    calibration = load_prepared(sets / "calibration")
    build(folder, lambda output: optimize(onnx_target, settings, calibration, output), Target("fused", request.param))
    return folder


@pytest.mark.no_cover  # the interpreter is slow enough
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_tower_by_our_kernels_gives_the_references_embeddings(tower, checkpoint, target, sets, monkeypatch):
    """Every choice falls on the last way, which is ours; on a GPU the faster one is taken."""
    from clip_deploy.runtimes import autotune

    calibration = load_prepared(sets / "calibration")
    monkeypatch.setattr(autotune.TunedOperators, "_choose", lambda self, key, ways, *given: ways[-1](*given))
    module = GraphModule(onnx_file.load(target / f"{tower}.onnx"), torch.float32, autotune.TunedOperators()).to(DEVICE)
    reference, model = open_encoder(checkpoint), read_target(checkpoint).model
    inputs = {name: array[:1].copy() for name, array in calibration.inputs(tower, model.text_inputs).items()}
    encode = reference.encode_images if tower == "vision" else reference.encode_texts
    actual = module(*(torch.from_numpy(inputs[name]).to(DEVICE) for name in module.inputs)).cpu()
    cosines = torch.nn.functional.cosine_similarity(actual, torch.from_numpy(encode(*inputs.values())))
    assert cosines.min() > (0.9999 if target.name.endswith("fp16") else 0.99)


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_sums_before_a_norm_and_the_pooled_attention_are_operators_of_ours(tower, target):
    module = GraphModule(onnx_file.load(target / f"{tower}.onnx"))
    calls = [getattr(step.call, "func", step.call) for step in module.steps]
    own = module.operators
    assert calls.count(own.pooled_attention) == 1  # of the last layer, which computes one token alone
    assert calls.count(own.skip_layer_norm) == 1  # embeddings and positions
    blocks = read_target(target).model.towers[tower].layers
    assert calls.count(own.linear_skip_layer_norm) == 2 * blocks
    assert _multi_head_attention not in calls
