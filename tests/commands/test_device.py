import shutil

import pytest
from support.project import ROOT

from clip_deploy.__main__ import main
from clip_deploy.commands.device import choose
from clip_deploy.core.config import Device, load_params
from clip_deploy.core.errors import ConfigError


@pytest.fixture
def copy(tmp_path, monkeypatch):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def edited(copy):
    """The same where a target's line was taken out of params.yaml."""
    params = copy / "params.yaml"
    params.write_text(params.read_text().replace("\n- ort-fp16\n", "\n# - ort-fp16, for now\n"))
    return copy


def files(folder):
    """What every file holds."""
    return {path.relative_to(folder): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_other_device_changes_params_yaml_alone_and_back_again_nothing(copy, capsys):
    before = files(copy)
    assert main(["device", "cuda"]) == 0
    assert capsys.readouterr().out == "params.yaml is set for cuda\n"
    assert {path.as_posix() for path, text in files(copy).items() if before[path] != text} == {"params.yaml"}
    chosen = load_params(copy / "params.yaml", copy / "conf")
    assert chosen.device is Device.cuda
    assert "ort-cuda-fp16" in chosen.targets
    main(["device", "cpu"])
    assert files(copy) == before


def test_the_device_in_use_is_left_alone(edited, capsys):
    before = files(edited)
    main(["device", "cpu"])
    assert capsys.readouterr().out == "params.yaml is set for cpu already\n"
    assert files(edited) == before


def test_edits_are_not_lost_without_a_word(edited, capsys):
    before = files(edited)
    assert main(["device", "cuda"]) == 1
    assert capsys.readouterr().err == (
        "error: params.yaml has lines for cpu that differ from conf/devices/cpu.yaml and would be lost: "
        "--keep saves them there first, --discard drops them\n"
    )
    assert files(edited) == before


def test_edits_are_kept_in_the_devices_file(edited, capsys):
    before = (edited / "params.yaml").read_text()
    main(["device", "cuda", "--keep"])
    assert capsys.readouterr().out.endswith("; what it held for cpu is in conf/devices/cpu.yaml\n")
    main(["device", "cpu"])
    assert (edited / "params.yaml").read_text() == before


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_edits_are_given_up_when_told_to(edited, device):
    main(["device", device, "--discard"])
    main(["device", "cpu"])
    assert files(edited / "conf") == files(ROOT / "conf")
    assert (edited / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()


def test_an_unknown_device_and_a_lost_line_are_named(copy):
    params, devices = copy / "params.yaml", copy / "conf" / "devices"
    with pytest.raises(ConfigError, match="device is 'tpu': accepted are cpu, cuda"):
        choose("tpu", params, devices)
    params.write_text(params.read_text().replace("device: cpu\n", ""))
    with pytest.raises(ConfigError, match="has no line `device: cpu`"):
        choose("cuda", params, devices)
