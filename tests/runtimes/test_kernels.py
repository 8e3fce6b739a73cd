"""Our kernels give what PyTorch's operators give: on a GPU where there is one, else in Triton's interpreter."""

import shutil

import onnx_ir as ir
import pytest
import torch

from clip_deploy.builders.fused import optimize
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import OptimizeConfig, Precision, Provider
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.onnx_graph.torch_module import Activation, GraphModule, Operators
from clip_deploy.runtimes import open_encoder

ON_GPU = shutil.which("nvidia-smi") is not None
kernels = pytest.importorskip("clip_deploy.runtimes.kernels", exc_type=ModuleNotFoundError)

DEVICE = "cuda" if ON_GPU else "cpu"
LIBRARY = Operators()


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
    actual = kernels.attention(packed, heads, 0.125, causal, blocks)
    torch.testing.assert_close(actual.float(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("activation", [None, *map(Activation, ("QuickGelu", "Gelu", "FastGelu"))])
@pytest.mark.parametrize("tiles", [kernels.LARGE[0], kernels.SMALL[-1]], ids=str)
def test_a_product_adds_its_bias_and_applies_its_activation(tiles, activation, dtype):
    rows, weight, bias = random(70, 96, dtype=dtype), random(160, 96, dtype=dtype, scale=0.1), random(160, dtype=dtype)
    tolerance = 3e-3 if dtype is torch.float16 else 2e-2
    for added in (bias, None):
        expected = LIBRARY.linear(rows.float(), weight.float(), whole(added), activation)
        actual = kernels.triton_linear(rows, weight, added, activation, tiles)
        torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)
        if ON_GPU or activation is None or activation.kind != "FastGelu":  # cuBLAS's own GELU has no CPU counterpart
            library = kernels.cublas_linear(rows, weight, added, activation)
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


@pytest.mark.parametrize("has_added", [False, True])
@pytest.mark.parametrize(("tiles", "parts"), kernels.SPLIT)
def test_a_product_in_parts_is_summed_where_it_is_normalised(tiles, parts, has_added):
    rows, matrix, skip = random(2, 35, 512), random(160, 512, scale=0.05), random(2, 35, 160)
    weight, bias, added = random(160), random(160), random(160) if has_added else None
    sides = [whole(tensor) for tensor in (skip, weight, bias, added)]
    expected = LIBRARY.linear_skip_layer_norm(rows.float(), matrix.float(), None, *sides, epsilon=1e-5)
    actual = kernels.linear_skip_layer_norm(rows, matrix, skip, weight, bias, added, 1e-5, tiles, parts)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=6e-3, rtol=6e-3)


@pytest.mark.parametrize("size", [(4, 4), (2, 6), (8, 3)])
def test_patches_are_cut_row_by_row_and_rounded(size):
    pixels = random(2, 3, 8, 12, dtype=torch.float32)
    assert torch.equal(kernels.patchify(pixels, size, torch.float16), LIBRARY.patchify(pixels, size, torch.float16))


def test_the_fastest_way_is_found_once_for_each_shape(monkeypatch, tmp_path):
    """Timed on a GPU; without one the last way counts as the fastest."""
    from clip_deploy.runtimes import autotune

    monkeypatch.setenv("CLIP_DEPLOY_CACHE", str(tmp_path))
    timed, operators = [], autotune.TunedOperators()
    measure = autotune.median_ms if ON_GPU else lambda way, given: -len(timed)
    monkeypatch.setattr(autotune, "median_ms", lambda way, given: timed.append(way) or measure(way, given))
    rows, weight = random(64, 128), random(256, 128)
    first = operators.linear(rows, weight)
    count = len(timed)
    assert count > 1
    torch.testing.assert_close(operators.linear(rows, weight), first)
    assert torch.equal(autotune.TunedOperators().linear(rows, weight), first)  # as another process would
    assert len(timed) == count


@pytest.fixture(scope="module")
def target(onnx_target, sets, tmp_path_factory):
    """The built-in model as our kernels run it."""
    folder, calibration = tmp_path_factory.mktemp("kernels") / "torch-fused-fp16", load_prepared(sets / "calibration")
    settings = OptimizeConfig(precision=Precision.fp16, provider=Provider.torch, skip_layer_norm=True)
    build(folder, lambda output: optimize(onnx_target, settings, calibration, output), Target("fused", "fp16"))
    return folder


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_a_tower_by_our_kernels_gives_the_references_embeddings(tower, checkpoint, target, sets, monkeypatch):
    """Every choice falls on the last way, which is ours; on a GPU the faster one is taken."""
    from clip_deploy.runtimes import autotune

    calibration = load_prepared(sets / "calibration")
    monkeypatch.setattr(autotune.TunedOperators, "_choose", lambda self, key, ways, *given: ways[-1](*given))
    module = GraphModule(ir.load(target / f"{tower}.onnx"), torch.float32, autotune.TunedOperators()).to(DEVICE)
    reference, model = open_encoder(checkpoint), read_target(checkpoint).model
    inputs = {name: array[:2].copy() for name, array in calibration.inputs(tower, model.text_inputs).items()}
    encode = reference.encode_images if tower == "vision" else reference.encode_texts
    actual = module(*(torch.from_numpy(inputs[name]).to(DEVICE) for name in module.inputs)).cpu()
    cosines = torch.nn.functional.cosine_similarity(actual, torch.from_numpy(encode(*inputs.values())))
    assert cosines.min() > 0.9999
