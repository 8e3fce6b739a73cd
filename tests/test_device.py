import os
import shutil
import subprocess
import sys

import onnx_ir as ir
import pytest
from support.project import ROOT

from clip_deploy.builders.fused import optimize
from clip_deploy.core.config import Device, OptimizeConfig, Precision, Provider, load_params
from clip_deploy.core.errors import ConfigError, UnavailableError
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.runtimes import ort_tensorrt
from clip_deploy.runtimes.ort_tensorrt import find_devices
from stages.device import choose


@pytest.fixture
def copy(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    return tmp_path


def test_both_devices_settings_are_whole_and_going_there_and_back_loses_nothing(copy):
    params, conf = copy / "params.yaml", copy / "conf"
    params.write_text(params.read_text().replace("  - ort-fp16\n", "  # - ort-fp16, for now\n"))
    before = params.read_text()
    head = before[: before.index("device:")]

    assert choose("cuda", params, conf / "devices").endswith(f"what it held for cpu is in {conf}/devices/cpu.yaml")
    chosen = load_params(params, conf)
    assert chosen.device is Device.cuda
    assert "ort-cuda-fp16" in chosen.targets
    assert params.read_text().startswith(head)
    assert not (conf / "devices" / "cuda.yaml").exists()

    choose("cpu", params, conf / "devices")
    assert params.read_text() == before
    assert (conf / "devices" / "cuda.yaml").read_bytes() == (ROOT / "conf" / "devices" / "cuda.yaml").read_bytes()


def test_the_device_in_use_is_left_alone(copy):
    before = (copy / "params.yaml").read_bytes()
    assert choose("cpu", copy / "params.yaml", copy / "conf" / "devices").endswith("is set for cpu already")
    assert (copy / "params.yaml").read_bytes() == before


def test_an_unknown_device_and_a_lost_line_are_named(copy):
    params, devices = copy / "params.yaml", copy / "conf" / "devices"
    with pytest.raises(ConfigError, match="device is 'tpu': accepted are cpu, cuda"):
        choose("tpu", params, devices)
    params.write_text(params.read_text().replace("device: cpu\n", ""))
    with pytest.raises(ConfigError, match="has no line `device: cpu`"):
        choose("cuda", params, devices)


@pytest.mark.parametrize(("words", "said"), [([], "usage: "), (["tpu"], "error: device is 'tpu'")])
def test_the_command_fails_in_one_line(copy, words, said):
    command = [sys.executable, "-m", "stages.device", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


def test_what_tensorrt_reads_holds_no_operator_of_onnx_runtimes_own(onnx_target, sets, tmp_path):
    settings = OptimizeConfig(precision=Precision.fp16, provider=Provider.tensorrt)
    calibration = load_prepared(sets / "calibration")
    target = optimize(onnx_target, settings, calibration, tmp_path, Device.cuda)
    assert (target.runtime, target.precision, target.device) == ("ort_tensorrt", "fp16", "cuda")
    for tower in ("vision", "text"):
        graph = ir.load(tmp_path / f"{tower}.onnx")
        assert {node.domain for node in graph.graph} == {""}
        assert {value.dtype for value in graph.graph.initializers.values()} >= {ir.DataType.FLOAT16}


def test_float32_on_cuda_says_that_products_are_in_tf32(onnx_target, sets, tmp_path):
    target = optimize(onnx_target, OptimizeConfig(), load_prepared(sets / "calibration"), tmp_path, Device.cuda)
    assert "TF32" in target.build["matmuls"]


def test_a_missing_tensorrt_is_named(monkeypatch):
    find_devices.cache_clear()
    monkeypatch.setattr(ort_tensorrt, "_is_installed", lambda name: False)
    with pytest.raises(UnavailableError, match="pip install tensorrt, or onnxruntime-ep-nv-tensorrt-rtx-cu13"):
        find_devices()


def test_tensorrt_has_no_place_on_a_cpu(copy):
    params = copy / "params.yaml"
    text = params.read_text().replace("precision: fp16}", "precision: fp16, provider: tensorrt}")
    params.write_text(text)
    with pytest.raises(ConfigError, match=r"device is cpu and optimize\.ort-fp16 has provider tensorrt"):
        load_params(params, copy / "conf")
