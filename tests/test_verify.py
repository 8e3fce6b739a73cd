import json
import shutil

import pytest

from clip_deploy.core.artifact import read_target, sha256
from clip_deploy.core.config import Gate, GatesConfig
from clip_deploy.validation import manifest
from stages.verify import main

GATES = GatesConfig(fp32=Gate(min_cosine=0.9999))
FACTS = {"model": "tiny-shapes", "versions": {"onnx": "1.23.2"}}


@pytest.fixture
def target(onnx_target, tmp_path):
    """A copy of the exported target, with a manifest beside it."""
    folder = shutil.copytree(onnx_target, tmp_path / "onnx-fp32")
    record = {"status": "pass", "reasons": []}
    text = json.dumps(manifest(folder, record, GATES, FACTS))
    (tmp_path / "onnx-fp32.manifest.json").write_text(text)
    return folder


def said(capsys, folder):
    """The exit code, and the lines without the folder's path."""
    code = main([str(folder)])
    written = capsys.readouterr()
    return code, (written.out + written.err).replace(f"{folder}", "F").splitlines()


def test_a_manifest_says_what_a_target_is_and_how_it_was_judged(target, onnx_target):
    record = json.loads((target.parent / "onnx-fp32.manifest.json").read_text())
    assert list(record["files"]) == ["target.json", "text.onnx", "vision.onnx"]
    assert record["files"]["vision.onnx"]["sha256"] == sha256(onnx_target / "vision.onnx")
    assert record["gate"] == {
        "status": "pass",
        "reasons": [],
        "min_cosine": 0.9999,
        "max_top1_drop": 100.0,
        "max_flips": 100.0,
    }
    assert record["checkpoint"] == read_target(onnx_target).model["checkpoint"]
    assert len(record["checkpoint"]["sha256"]) == 64
    assert record["build"]["opset"] == 18
    assert (record["model"], record["versions"], record["runtime"]) == ("tiny-shapes", {"onnx": "1.23.2"}, "ort")


def test_what_was_built_is_accepted(target, capsys):
    code, lines = said(capsys, target)
    assert code == 0
    assert lines[-1].startswith("F: files: 3, 3.")
    assert lines[-1].endswith(" MB, model tiny-shapes, gate pass")


def test_every_difference_is_named(target, capsys):
    graph = bytearray((target / "vision.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1  # one bit, the same size
    (target / "vision.onnx").write_bytes(graph)
    (target / "text.onnx").unlink()
    (target / "more").mkdir()
    (target / "more" / "model.bin").write_bytes(b"x")
    (target / "elsewhere").symlink_to(target.parent)
    assert said(capsys, target) == (
        1,
        [
            "F/text.onnx: missing",
            "F/vision.onnx: changed",
            "F/elsewhere: added",
            "F/more/model.bin: added",
            "F: not what its manifest says",
        ],
    )


def test_a_package_carries_its_manifest(package, tmp_path, capsys):
    folder = shutil.copytree(package, tmp_path / "package")
    assert said(capsys, folder)[0] == 0
    (folder / "labels.json").write_text("{}")
    assert said(capsys, folder) == (1, ["F/labels.json: changed", "F: not what its manifest says"])


def test_a_manifest_leads_nowhere_else(target, capsys):
    path = target.parent / "onnx-fp32.manifest.json"
    record = json.loads(path.read_text())
    record["files"]["../onnx-fp32.manifest.json"] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    path.write_text(json.dumps(record))
    assert said(capsys, target)[1][0] == "F/../onnx-fp32.manifest.json: missing"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "has no manifest, neither package.manifest.json beside it nor manifest.json inside"),
        ("[]", "manifest.json names no files; make it anew with `dvc repro`"),
        ('{"files": {"a": 3}}', "manifest.json names no files; "),
        ('{"files"', "manifest.json (Expecting"),
    ],
)
def test_a_folder_without_a_manifest_to_believe_is_refused(tmp_path, content, reason, capsys):
    (tmp_path / "package").mkdir()
    if content:
        (tmp_path / "package" / "manifest.json").write_text(content)
    code, (line,) = said(capsys, tmp_path / "package")
    assert code == 1
    assert line.startswith("error: ")
    assert reason in line


def test_a_package_into_which_nothing_went_is_no_delivery(tmp_path, capsys):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"unavailable": "no target passes its gate"}')
    assert said(capsys, folder) == (1, ["F: holds nothing: no target passes its gate"])
    (folder / "vision.onnx").write_bytes(b"smuggled in")
    assert said(capsys, folder) == (1, ["F/vision.onnx: added", "F: not what its manifest says"])


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["no-such-folder"], 1)])
def test_the_command_explains_itself(arguments, code, capsys):
    assert main(arguments) == code
    written = capsys.readouterr()
    assert {0: "Exit code 0", 2: "one folder is needed, 0 given", 1: "no such folder; give"}[code] in (
        written.out + written.err
    )
