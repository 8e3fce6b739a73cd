"""params.yaml and conf/ have the form in which `dvc exp run -S` writes them, so that it changes no other line."""

import difflib

import pytest
from dvc.utils.hydra import apply_overrides
from support.project import ROOT

from clip_deploy.commands.device import choose

CHOICES = [
    path for path in sorted((ROOT / "conf").rglob("*.yaml")) if path.parent.name != "sweep"
]  # -S sets none there
FILES = ["params.yaml", *(path.relative_to(ROOT).as_posix() for path in CHOICES)]


def changed(path, text, *overrides):
    """The lines that DVC's -S takes out of a file with this text, and those that it puts there."""
    path.write_text(text)
    apply_overrides(path, list(overrides))
    lines = difflib.ndiff(text.splitlines(), path.read_text().splitlines())
    return [line for line in lines if line[0] in "+-"]


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_written_as_it_is(name, tmp_path):
    assert changed(tmp_path / "some.yaml", (ROOT / name).read_text()) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model=local", "model: local"),
        ("onnx.opset=20", "  opset: 20               # 14 to 23"),
        ("recommend.max_p95_ms=10", "  max_p95_ms: 10          # of each tower"),
        ("end_to_end.workers=4", "  workers: 4 "),
        ("ci.max_slow_down=20", "  max_slow_down: 20       # percent"),
    ],
)
def test_an_override_changes_its_own_line_and_keeps_the_comment(device, override, line, tmp_path):
    params = tmp_path / "params.yaml"
    params.write_text((ROOT / "params.yaml").read_text())
    choose(device, params, ROOT / "conf" / "devices")
    removed, added = changed(params, params.read_text(), override)
    assert removed.startswith(f"- {line.split(':')[0]}:")
    assert added.startswith(f"+ {line}")


def test_a_target_that_is_taken_out_is_the_only_line(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    targets = [line.removeprefix("- ") for line in text.partition("\ntargets:")[2].splitlines() if line[:2] == "- "]
    targets.remove("ort-fp16")
    assert changed(tmp_path / "params.yaml", text, f"targets=[{','.join(targets)}]") == ["- - ort-fp16"]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("conf/model/")])
def test_a_checkpoints_path_is_the_only_line(name, tmp_path):
    text = (ROOT / name).read_text()
    setting = "path" if "\npath:" in text else "repo_id"
    removed, added = changed(tmp_path / "some.yaml", text, f"{setting}=/a/checkpoint")
    assert added.startswith(f"+ {setting}: /a/checkpoint")
    assert "#" not in removed or "#" in added
