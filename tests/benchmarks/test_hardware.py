"""The copy that is measured: set for its model and device, with the rows that were asked for and nothing else."""

from argparse import Namespace

import pytest
import yaml
from support.project import ROOT

from benchmarks import hardware
from clip_deploy.core.config import load_params
from clip_deploy.core.json_files import write_json


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "WORK", tmp_path / "work")
    monkeypatch.setattr(hardware, "RESULTS", tmp_path / "results")
    return tmp_path


def asked(**changes):
    return Namespace(**{"targets": None, "batch": 1, "device": "cuda", **changes})


def test_a_copy_is_set_for_its_model_and_device(work):
    project = hardware.prepared("vit-b-32-untrained", asked(batch=256))
    params = load_params(project / "params.yaml", project / "conf")
    assert (params.model, params.device.value, params.recommend.batch) == ("vit-b-32-untrained", "cuda", 256)
    assert "torch-fused-fp8" in params.targets
    assert yaml.safe_load((ROOT / "params.yaml").read_text())["model"] == "tiny-shapes"


def test_rows_are_limited_to_what_was_asked_for_and_its_sources(work):
    project = hardware.prepared("tiny-shapes", asked(device="cpu", targets="ort-int8-static"))
    params = load_params(project / "params.yaml", project / "conf")
    assert params.targets == ["torch-fp32", "ort-int8-static"]
    assert (list(params.quantize), list(params.optimize)) == (["ort-int8-static"], ["ort-fp32"])
    assert not params.export_torchscript


def test_a_row_that_the_device_does_not_have_is_named(work):
    with pytest.raises(SystemExit, match="--targets names trt-fp16, which is not built on this device"):
        hardware.prepared("tiny-shapes", asked(device="cpu", targets="ort-fp16,trt-fp16"))


def test_a_report_lies_in_the_folder_of_its_gpu(work):
    reports = work / "project" / "reports"
    reports.mkdir(parents=True)
    for name in hardware.KEPT:
        (reports / name).write_text(name)
    found = yaml.safe_load(
        (ROOT / "reports" / "hardware" / "nvidia-h200" / "vit-b-32-untrained-fp8" / "environment.json").read_text()
    )
    write_json(reports / "environment.json", found)
    folder = hardware.keep(work / "project", "tiny-shapes")
    assert folder == work / "results" / "nvidia-h200" / "tiny-shapes"
    assert sorted(path.name for path in folder.iterdir()) == sorted(hardware.KEPT)
