import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clip_deploy.builders import tensorrt
from clip_deploy.builders.tensorrt import build_engine, shapes_of
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import BuildEngineConfig, GateLimits, GatesConfig, Precision
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate.validation import validate
from clip_deploy.runtimes import open_encoder, tensorrt_library
from clip_deploy.runtimes.tensorrt_library import is_rtx, load_tensorrt

GATES = GatesConfig(fp32=GateLimits(min_cosine=0.9999), fp16=GateLimits(min_cosine=0.999, max_top1_drop=2, max_flips=5))
H200 = "NVIDIA H200, 143771 MiB, 580.95.05"
H100 = "NVIDIA H100 80GB HBM3, 81559 MiB, 580.95.05"


@pytest.fixture
def library():
    """TensorRT or TensorRT-RTX, where it is installed and can build here."""
    try:
        found = load_tensorrt()
    except UnavailableError as error:
        pytest.skip(str(error))
    if not is_rtx(found) and not tensorrt_library.gpus():
        pytest.skip("TensorRT builds engines only on a machine with an NVIDIA GPU")
    return found


@pytest.fixture
def engine(onnx_target, sets, tmp_path):
    def run(source=onnx_target, name="trt", **settings):
        chosen, calibration = BuildEngineConfig(**settings), load_prepared(sets / "calibration")
        output, fallback = tmp_path / name, Target("tensorrt", chosen.precision.value)
        build(output, lambda folder: build_engine(source, chosen, calibration, folder), fallback)
        return output

    return run


@pytest.fixture
def see(monkeypatch):
    """Say which GPUs nvidia-smi names."""

    def names(*gpus):
        for module in (tensorrt, tensorrt_library):
            monkeypatch.setattr(module, "gpus", lambda: list(gpus))

    return names


class FakeTensorRT:
    """As much of the data centre's TensorRT as a build calls; it counts what it times."""

    __name__, __version__ = "tensorrt", "10.14.1"
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=0)

    def __init__(self):
        self.timed = 0

    class ILogger:
        ERROR = 1

    class OnnxParser:
        def __init__(self, network, log):
            pass

        def parse_from_file(self, path):
            return True

    def Builder(self, log):  # noqa: N802
        config = SimpleNamespace(cache=b"", add_optimization_profile=lambda profile: 0)
        config.create_timing_cache = lambda known: known
        config.set_timing_cache = lambda cache, ignore_mismatch: setattr(config, "cache", cache)
        config.get_timing_cache = lambda: SimpleNamespace(serialize=lambda: config.cache)

        def build_serialized_network(network, config):
            self.timed += not config.cache
            config.cache = config.cache or b"timings"
            return b"engine"

        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(num_inputs=0, num_layers=0),
            create_builder_config=lambda: config,
            create_optimization_profile=SimpleNamespace,
            build_serialized_network=build_serialized_network,
        )


@pytest.fixture
def fake(monkeypatch):
    made = FakeTensorRT()
    monkeypatch.setitem(sys.modules, "tensorrt", made)
    return made


def size(folder):
    return sum((folder / name).stat().st_size for name in read_target(folder).files)


def test_without_the_library_the_row_says_how_to_install_it(engine, monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    assert read_target(engine()).unavailable == "TensorRT is not installed: pip install '.[tensorrt-rtx]'"


def test_a_source_that_could_not_be_built_is_named(engine, fake, see, tmp_path):
    see(H200)

    def refuse(folder):
        raise UnavailableError("the dynamo exporter failed")

    build(tmp_path / "onnx-fp32", refuse, Target("ort", "fp32"))
    assert read_target(engine(tmp_path / "onnx-fp32")).unavailable == "onnx-fp32: the dynamo exporter failed"


def test_both_towers_are_built_and_described(engine, library, see):
    see(H200)
    target = read_target(engine(precision=Precision.fp32, opt_batch=4, max_batch=16))
    assert target.files == ["text.engine", "vision.engine"]
    assert target.build["built_for"] == H200
    assert target.build["library"].endswith(library.__version__)
    assert target.build["batches"] == "1 to 16, best at 4"
    assert target.build["tokens"] == "1 to 32"
    assert "left_in_fp32" not in target.build


def test_an_fp16_engine_lacks_half_of_the_weights(engine, library, onnx_target):
    whole = engine(name="trt-fp32", precision=Precision.fp32)
    half = engine(name="trt-fp16", precision=Precision.fp16)
    assert read_target(half).build["left_in_fp32"] == []
    assert size(whole) - size(half) > 0.4 * size(onnx_target)  # each holds megabytes of kernels besides


def test_every_family_is_built(library, family, engine, onnx_of):
    target = read_target(engine(onnx_of(family)))
    assert target.unavailable is None
    assert ("tokens" in target.build) == (not target.model.pad_to_context)


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.fp16])
def test_attention_of_opset_23_is_built_in_both_precisions(library, checkpoint, engine, onnx_of, precision):
    assert read_target(engine(onnx_of(checkpoint, 23), precision=precision)).unavailable is None


def test_what_stands_around_the_towers_is_left_out(library, checkpoint, engine, onnx_of):
    source = onnx_of(checkpoint, preprocess=True, normalize=True, classifier=["a red circle", "a blue square"])
    target = read_target(engine(source, precision=Precision.fp16))
    assert (target.unavailable, target.image_input, target.model.classifier) == (None, "pixel_values", None)


def test_operators_that_tensorrt_does_not_know_are_named(library, fused, engine):
    reason = read_target(engine(fused)).unavailable
    assert reason.startswith("TensorRT cannot read the vision tower: ")
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((-1, 3, 48, 48), ((2, 3, 48, 48), (4, 3, 48, 48), (64, 3, 48, 48))),
        ((-1, -1), ((2, 1), (4, 77), (64, 77))),
        ((-1, 16), ((2, 16), (4, 16), (64, 16))),  # a model that pads to its context
    ],
)
def test_the_profile_spans_the_batches_and_all_lengths_of_texts(shape, expected):
    assert shapes_of(shape, BuildEngineConfig(min_batch=2, opt_batch=4, max_batch=64), 77) == expected


def test_a_machine_without_a_gpu_cannot_run_an_engine(engine, fake, see, sets, monkeypatch):
    see(H200)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    evaluation = sets / "evaluation"
    record = validate(engine(), load_prepared(evaluation), evaluation / "reference.npz", GATES, seed=0)
    assert (record.status, record.reasons) == ("unavailable", ["no CUDA device that PyTorch can use"])


def test_an_engine_of_another_gpu_is_refused(engine, fake, see, monkeypatch):
    see(H200)
    folder = engine()
    see(H100, H100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DeployError) as refused:
        open_encoder(folder)
    assert str(refused.value) == (
        f"trt does not load: built for {H200} with TensorRT 10.14.1, this machine has {H100} with TensorRT 10.14.1; "
        "run `dvc repro build_engine@trt`"
    )


def test_an_engine_built_without_a_gpu_is_built_anew_where_there_is_one(engine, library, see, monkeypatch):
    see()
    folder = engine()
    see(H200)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DeployError, match=r"built for no GPU in particular .* run `dvc repro build_engine@trt`"):
        open_encoder(folder)


def test_tensorrt_itself_builds_on_a_gpu_only(engine, fake, see):
    see()
    assert read_target(engine()).unavailable.startswith("TensorRT builds engines only on a machine with an NVIDIA GPU")


def test_what_tensorrt_timed_is_kept_for_the_same_gpu_driver_and_version(engine, fake, see, tmp_path):
    see(H200)
    target = read_target(engine())
    assert target.files == ["text.engine", "vision.engine"]
    assert target.build["library"] == "TensorRT 10.14.1"
    assert fake.timed == 1  # the second tower takes what the first has timed
    engine()
    assert fake.timed == 1
    see(H100)
    engine()
    assert fake.timed == 2
    assert len(list(tmp_path.glob(".timing-TensorRT-10.14.1-NVIDIA-H*.cache"))) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [Precision.fp32, Precision.fp16])
def test_embeddings_are_those_of_the_reference(engine, library, sets, precision):
    evaluation = sets / "evaluation"
    record = validate(
        engine(precision=precision), load_prepared(evaluation), evaluation / "reference.npz", GATES, seed=0
    )
    assert record.status == "pass", record.reasons
    assert min(record.measured.parity[tower].cosine_min for tower in ("vision", "text")) > 0.999


@pytest.mark.gpu
def test_a_bound_call_replays_what_encoding_gives(engine, library, sets):
    encoder, prepared = open_encoder(engine(precision=Precision.fp16)), load_prepared(sets / "evaluation")
    for batch in (1, 8):
        pixels, texts = np.array(prepared.pixel_values[:batch]), prepared.texts[:batch]
        inputs = {"vision": [pixels], "text": [texts.input_ids, texts.attention_mask]}
        expected = {"vision": encoder.encode_images(pixels), "text": encoder.encode_texts(*inputs["text"])}
        for tower, arrays in inputs.items():
            call = encoder.bind(tower, arrays)
            for _ in range(3):
                call()
            encoder.wait()
            (graph,) = [graph for key, graph in encoder.captured.items() if key[0] == tower and key[1][0] == batch]
            assert np.allclose(graph.output.cpu().numpy(), expected[tower], atol=1e-2)


@pytest.mark.gpu
def test_inputs_and_outputs_are_those_of_the_onnx_graphs(engine, library):
    encoder = open_encoder(engine(precision=Precision.fp16, max_batch=32))
    text, vision = encoder.towers["text"].engine, encoder.towers["vision"].engine
    assert {text.get_tensor_name(index) for index in range(3)} == {"input_ids", "attention_mask", "text_embeds"}
    assert text.get_tensor_dtype("input_ids") == library.int64
    assert vision.get_tensor_dtype("pixel_values") == vision.get_tensor_dtype("image_embeds") == library.float32
    assert [tuple(shape) for shape in text.get_tensor_profile_shape("input_ids", 0)] == [(1, 1), (8, 32), (32, 32)]


@pytest.mark.gpu
def test_a_batch_outside_the_profile_names_the_setting(engine, library, sets):
    encoder = open_encoder(engine(min_batch=2, opt_batch=2, max_batch=4))
    pixels = np.array(load_prepared(sets / "evaluation").pixel_values[:5])
    with pytest.raises(DeployError, match=r"a batch of 5 lies .* profile of 2 to 4: set build_engine\.trt\.max_batch"):
        encoder.encode_images(pixels)
    with pytest.raises(DeployError, match=r"set build_engine\.trt\.min_batch"):
        encoder.bind("vision", [pixels[:1]])
