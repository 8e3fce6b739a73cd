"""On a GPU: every runtime there gives the reference's embeddings, and what is timed is what is checked."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clip_deploy.builders.aoti import export_aoti
from clip_deploy.builders.fused import optimize
from clip_deploy.builders.torch_checkpoint import export_torch
from clip_deploy.builders.torchscript import export_torchscript
from clip_deploy.core import environment
from clip_deploy.core.artifact import Target, build, read_target
from clip_deploy.core.config import (
    BenchmarkConfig,
    Device,
    GateLimits,
    GatesConfig,
    OptimizeConfig,
    Precision,
    Provider,
    TorchConfig,
)
from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.model import Model, image_feed, random_images
from clip_deploy.core.subprocesses import ending
from clip_deploy.core.vectors import unit
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate.validation import validate
from clip_deploy.runtimes import open_encoder, pytorch
from clip_deploy.runtimes.ort_tensorrt import find_devices
from clip_deploy.timing import nvml as gpu
from clip_deploy.timing.latency import _power, measure

CUDA = Device.cuda
GATES = GatesConfig(
    fp32=GateLimits(min_cosine=0.9999), fp16=GateLimits(min_cosine=0.999), bf16=GateLimits(min_cosine=0.99)
)


def fused(precision):
    return OptimizeConfig(precision=precision, provider=Provider.torch, skip_layer_norm=True)


BUILDS = {
    "torch-fp16": lambda s, folder: export_torch(s.checkpoint, TorchConfig(Precision.fp16), CUDA, folder),
    "torch-bf16": lambda s, folder: export_torch(s.checkpoint, TorchConfig(Precision.bf16), CUDA, folder),
    "torch-compile-fp16": lambda s, folder: export_torch(s.checkpoint, TorchConfig(Precision.fp16, True), CUDA, folder),
    "torchscript-fp16": lambda s, folder: export_torchscript(s.checkpoint, Precision.fp16, folder, CUDA),
    "torch-fused-fp16": lambda s, folder: optimize(s.onnx, fused(Precision.fp16), s.calibration, folder, CUDA),
    "torch-fused-bf16": lambda s, folder: optimize(s.onnx, fused(Precision.bf16), s.calibration, folder, CUDA),
    "aoti-fp16": lambda s, folder: export_aoti(s.onnx, Precision.fp16, s.calibration, folder, CUDA),
    "ort-cuda-fp32": lambda s, folder: optimize(s.onnx, OptimizeConfig(), s.calibration, folder, CUDA),
    "ort-cuda-fp16": lambda s, folder: optimize(
        s.onnx, OptimizeConfig(precision=Precision.fp16, skip_layer_norm=True), s.calibration, folder, CUDA
    ),
    "ort-cuda-bf16": lambda s, folder: optimize(
        s.onnx, OptimizeConfig(precision=Precision.bf16, skip_layer_norm=True), s.calibration, folder, CUDA
    ),
    "ort-trt-fp16": lambda s, folder: optimize(
        s.onnx, OptimizeConfig(precision=Precision.fp16, provider=Provider.tensorrt), s.calibration, folder, CUDA
    ),
}


# SigLIP 2 NaFlex takes three inputs and masks patches. Of AOTInductor one model is enough: it takes minutes.
OF_NAFLEX = [name for name in BUILDS if name.endswith("-fp16") and name != "aoti-fp16"]
CASES = [*((name, "checkpoint", "sets") for name in BUILDS), *((name, "naflex", "naflex_sets") for name in OF_NAFLEX)]


class Sources:
    def __init__(self, checkpoint, onnx, sets):
        self.checkpoint, self.onnx, self.calibration = checkpoint, onnx, load_prepared(sets / "calibration")


def _skip_without_tensorrt():
    try:
        find_devices()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} {case[1]}")
def case(request) -> tuple[str, Path, Path]:
    """A target's name, its checkpoint, and the sets prepared for that."""
    name, checkpoint, sets = request.param
    return name, request.getfixturevalue(checkpoint), request.getfixturevalue(sets)


@pytest.fixture(scope="module")
def built(case, onnx_of, tmp_path_factory) -> Path:
    name, checkpoint, sets = case
    folder = tmp_path_factory.mktemp("gpu") / name
    if name == "ort-trt-fp16":
        _skip_without_tensorrt()
    sources = Sources(checkpoint, onnx_of(checkpoint), sets)
    build(folder, lambda output: BUILDS[name](sources, output), Target("eager", "fp32"))
    if name == "aoti-fp16":
        if reason := read_target(folder).unavailable:
            pytest.skip(reason)  # no C++ compiler here that makes packages which open
        _open_in_a_process(folder)
    return folder


def _open_in_a_process(folder):
    """Machine code that crashes fails its own tests, and not the whole run."""
    opened = "import sys, pathlib, clip_deploy.runtimes as r; r.open_encoder(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-X", "faulthandler", "-c", opened, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"opening {folder} {ending(done.returncode)}:\n{done.stderr}"


@pytest.mark.gpu
def test_a_target_on_the_gpu_gives_the_references_embeddings(built, case):
    sets = case[2]
    evaluation = load_prepared(sets / "evaluation")
    record = validate(built, evaluation, sets / "evaluation" / "reference.npz", GATES, 0)
    assert record.status == "pass", record.reasons
    for tower, placed in record.placement.items():
        assert "CPUExecutionProvider" not in placed.nodes, tower
        assert placed.graph, tower


@pytest.mark.gpu
def test_a_bound_call_gives_what_encoding_gives(built):
    encoder = open_encoder(built)
    images = random_images(2, read_target(built).model.image_dtype)
    expected = encoder.encode_images(images)
    call = encoder.bind("vision", list(image_feed(images).values()))
    call()
    encoder.wait()
    np.testing.assert_allclose(encoder.encode_images(images), expected, atol=0.01)
    turned = encoder.encode_images(images[::-1].copy())  # of the same shape: the same graph, other inputs
    np.testing.assert_allclose(turned[::-1], expected, atol=0.01)
    assert np.abs(turned - expected).max() > 0.1


@pytest.mark.gpu
def test_a_second_batch_is_asked_for_before_the_first_is_taken(built):
    encoder = open_encoder(built)
    if not isinstance(encoder, pytorch.Encoder):
        pytest.skip("takes arrays of the host alone")
    images = random_images(4, read_target(built).model.image_dtype)
    if images.dtype.names:
        pytest.skip("takes records of patches")
    batches = images[:2], images[2:]
    finish = [encoder.begin_images(torch.from_numpy(batch).cuda()) for batch in batches]
    for batch, found in zip(batches, [each() for each in finish], strict=True):
        np.testing.assert_allclose(found, encoder.encode_images(batch), atol=0.01)


@pytest.mark.gpu
def test_the_gpu_makes_embeddings_of_unit_length(built):
    encoder = open_encoder(built)
    if not isinstance(encoder, pytorch.Encoder):
        pytest.skip("the host makes them")
    images = random_images(2, read_target(built).model.image_dtype)
    expected = unit(encoder.encode_images(images))
    encoder.normalise()
    np.testing.assert_allclose(encoder.encode_images(images), expected, atol=1e-3)


@pytest.mark.gpu
def test_memory_and_power_of_the_gpu_are_measured(checkpoint, tmp_path):
    folder = tmp_path / "torch-fp16"
    build(
        folder,
        lambda output: export_torch(checkpoint, TorchConfig(Precision.fp16), CUDA, output),
        Target("eager", "fp16"),
    )
    settings = BenchmarkConfig(batch_sizes=[1, 8], seconds=0.1, power_s=0.5)
    record = measure(folder, folder, settings)
    assert record.gpu_memory_mb > 100
    assert record.power.mean_w > 20
    assert all(clock > 0 for clock in record.power.clock_mhz)


def test_without_a_gpu_every_target_for_one_says_so(checkpoint, onnx_target, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match="no CUDA device that PyTorch can use"):
        open_encoder(checkpoint, device="cuda")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnavailableError, match="this ONNX Runtime has no CUDA provider"):
        open_encoder(onnx_target, device="cuda")


def test_energy_is_counted_over_the_images_that_it_encoded(monkeypatch):
    energies = iter([1000.0, 1050.0])
    monkeypatch.setattr(gpu, "energy_j", lambda: next(energies))
    monkeypatch.setattr(gpu, "clock_mhz", lambda: 1980)
    asked = []

    class Worker:
        def ask(self, request):
            asked.append(request)
            return {"calls": 100} if "seconds" in request else {}

    model = Model(image_size=[32, 32], context_length=16, example_texts={"input_ids": [[1, 2]]})
    target = Target("ort", "fp16", model=model, device="cuda")
    rates = {1: 900.0, 32: 9000.0, 256: 8000.0}
    sizes = {batch: SimpleNamespace(throughput_per_s=rate) for batch, rate in rates.items()}
    power = _power(Worker(), target, sizes, BenchmarkConfig(), 345)
    assert power.batch == 32
    assert power.j_per_1000_images == 1000 * 50.0 / 3200
    assert power.clock_mhz == [345, 1980]
    assert [request["batch"] for request in asked if "batch" in request] == [32]


def test_of_several_gpus_the_one_that_cuda_shows_is_measured(monkeypatch):
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda name: name,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    for visible, handle in ((None, 0), ("1", 1), ("3,2", 3), ("GPU-5a", "GPU-5a")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpu._nvml.__wrapped__() == (nvml, handle)


def test_gpus_are_those_that_cuda_shows(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho $@\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment.gpus() == ["--query-gpu=name,memory.total,driver_version --format=csv,noheader"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert environment.gpus() == ["-i 1 --query-gpu=name,memory.total,driver_version --format=csv,noheader"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment.gpus() == []


def test_nvml_that_is_missing_measures_nothing(monkeypatch):
    monkeypatch.setattr(gpu, "_nvml", lambda: None)
    assert gpu.process_bytes(1) is None
    assert gpu.energy_j() is None
    assert gpu.clock_mhz() is None


def test_a_checkpoint_in_half_precision_is_half_as_large_and_loads(checkpoint, tmp_path):
    folder = tmp_path / "torch-fp16"
    settings = TorchConfig(Precision.fp16)
    build(folder, lambda output: export_torch(checkpoint, settings, Device.cpu, output), Target("eager", "fp16"))
    weights = [(path / "model.safetensors").stat().st_size for path in (folder, checkpoint)]
    assert weights[0] == pytest.approx(weights[1] / 2, rel=0.05)
    images = np.zeros((1, 3, *read_target(checkpoint).model.image_size), np.float32)
    half, whole = (open_encoder(path).encode_images(images)[0] for path in (folder, checkpoint))
    assert half @ whole / np.linalg.norm(half) / np.linalg.norm(whole) > 0.999
    assert read_target(folder).runtime == "eager"
