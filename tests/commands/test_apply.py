import shutil

import pytest
from support.project import ROOT
from support.records import checked

from clip_deploy.__main__ import main
from clip_deploy.commands.apply import apply
from clip_deploy.core.config import load_params
from clip_deploy.core.errors import ConfigError
from clip_deploy.core.json_files import write_json

NODES = ["vision: MatMul_7", "vision: Add_8"]


@pytest.fixture
def copy(tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return tmp_path


def put(copy, target, *nodes, **record):
    """Write what validate would of a failed target, and apply it; return the lines of params.yaml that changed."""
    place = {"tower": "vision", "layer": "encoder", "node": "MatMul_7", "cosine_before": 1.0, "cosine_after": 0.9}
    drops = [{**place, "nodes": list(nodes)}] if nodes else []
    found = checked(status="fail", diagnosis={"reference": "onnx-fp32", "drops": drops, "notes": [], **record})
    write_json(copy / "reports" / "validate" / f"{target}.json", found)
    before = (copy / "params.yaml").read_text().splitlines()
    apply(target, copy / "params.yaml", copy / "reports" / "validate")
    return [line for line in (copy / "params.yaml").read_text().splitlines() if line not in before]


def test_settings_on_one_line_get_the_nodes_and_nothing_else_changes(copy):
    assert put(copy, "ort-fp16", *NODES) == [
        "  ort-fp16: {keep_fp32: ['vision: MatMul_7', 'vision: Add_8'], source: onnx-fp32,",
        "    precision: fp16}",
    ]
    assert load_params(copy / "params.yaml", ROOT / "conf").optimize["ort-fp16"].keep_fp32 == NODES


def test_settings_of_several_lines_get_a_list(copy):
    assert put(copy, "ort-int8-static", *NODES) == ["    keep_fp32:", *(f"    - '{node}'" for node in NODES)]
    assert load_params(copy / "params.yaml", ROOT / "conf").quantize["ort-int8-static"].keep_fp32 == NODES


def test_a_second_round_adds_to_the_first(copy):
    put(copy, "ort-fp16", *NODES)
    put(copy, "ort-fp16", NODES[1], "text: MatMul_3")
    assert load_params(copy / "params.yaml", ROOT / "conf").optimize["ort-fp16"].keep_fp32 == [*NODES, "text: MatMul_3"]


@pytest.mark.parametrize(
    "written", ["{}", "\n    keep_fp32:  # why\n      - 'vision: MatMul_7'\n    source: onnx-fp32"]
)
def test_settings_written_by_hand_are_understood(copy, written):
    params = copy / "params.yaml"
    params.write_text(params.read_text().replace("quantize:\n", f"quantize:\n  mine: {written}\n"))
    put(copy, "mine", *NODES)
    assert load_params(params, ROOT / "conf").quantize["mine"].keep_fp32 == NODES
    assert len(load_params(params, ROOT / "conf").quantize) == 3


def test_what_cannot_be_applied_is_said_and_changes_nothing(copy):
    with pytest.raises(ConfigError, match="names no nodes to keep in FP32: no layer is named: why"):
        put(copy, "ort-fp16", notes=["no layer is named: why"])
    with pytest.raises(
        ConfigError, match="nothing is not a target under optimize or quantize"
    ):  # whatever was validated
        apply("nothing", copy / "params.yaml", copy / "none")
    with pytest.raises(
        ConfigError, match=r"torch-int8 is not a target under optimize .* accepted are ort-fp32, ort-fp16, ort-int8-"
    ):
        put(copy, "torch-int8", *NODES)
    assert (copy / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_the_command_fails_in_one_line(copy, monkeypatch, capsys):
    monkeypatch.chdir(copy)
    assert main(["apply", "ort-fp16"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: cannot read reports/validate/ort-fp16.json")
    assert said.count("\n") == 1
