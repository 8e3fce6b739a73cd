import onnx_ir as ir
import pytest
from support.project import ROOT

from clip_deploy.builders.fused import optimize
from clip_deploy.core.config import Device, OptimizeConfig, Precision, Provider, load_params
from clip_deploy.core.errors import ConfigError, UnavailableError
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.runtimes import ort_tensorrt
from clip_deploy.runtimes.ort_tensorrt import find_devices


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


def test_tensorrt_has_no_place_on_a_cpu(tmp_path):
    params = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text().replace("precision: fp16}", "precision: fp16, provider: tensorrt}")
    params.write_text(text)
    with pytest.raises(ConfigError, match=r"device is cpu and optimize\.ort-fp16 has provider tensorrt"):
        load_params(params, ROOT / "conf")
