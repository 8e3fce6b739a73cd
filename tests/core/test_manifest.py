import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.records import checked

from clip_deploy.__main__ import main
from clip_deploy.core.artifact import read_target
from clip_deploy.core.files import sha256
from clip_deploy.core.manifest import Run, described, read_manifest, save_manifest
from clip_deploy.core.parsing import parse, plain
from clip_deploy.core.records import Validation
from clip_deploy.evaluate.validation import manifest

LIMITS = {"min_cosine": {"limit": 0.999, "value": 1.0}}
RUN = Run("tiny-shapes", 0, {"onnx": "1.23.2"})


@pytest.fixture
def target(onnx_target, tmp_path):
    """A copy of the exported target, with a manifest beside it."""
    folder = shutil.copytree(onnx_target, tmp_path / "onnx-fp32")
    record = parse(Validation, checked(limits=LIMITS), "the record")
    save_manifest(tmp_path / "onnx-fp32.manifest.json", manifest(folder, record, RUN), indent=1)
    return folder


def said(capsys, folder):
    """The exit code, and the lines without the folder's path."""
    code = main(["verify", str(folder)])
    written = capsys.readouterr()
    return code, (written.out + written.err).replace(f"{folder}", "F").splitlines()


def test_a_manifest_says_what_a_target_is_and_how_it_was_judged(target, onnx_target):
    record = json.loads((target.parent / "onnx-fp32.manifest.json").read_text())
    assert list(record["files"]) == ["target.json", "text.onnx", "vision.onnx"]
    assert record["files"]["vision.onnx"]["sha256"] == sha256(onnx_target / "vision.onnx")
    assert record["gates"] == {"onnx-fp32": {"status": "pass", "reasons": [], "precision": "fp32", **LIMITS}}
    assert record["checkpoint"] == plain(read_target(onnx_target).model.checkpoint)
    assert len(record["checkpoint"]["sha256"]) == 64
    build = record["builds"]["onnx-fp32"]
    assert (build["runtime"], build["precision"], build["device"], build["opset"]) == ("ort", "fp32", "cpu", 18)
    assert {name: record[name] for name in plain(RUN)} == plain(RUN)


def test_what_was_built_is_accepted(target, capsys):
    code, lines = said(capsys, target)
    assert code == 0
    assert lines[-1].startswith("F: files: 3, 3.")
    assert lines[-1].endswith(" MB, model tiny-shapes, onnx-fp32: gate pass")


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
        ("[]", "manifest.json names no files; make it again with `dvc repro`"),
        ('{"files": {"a": 3}}', "manifest.json names no files; "),
        ('{"files": {}}', "manifest.json names no files; "),
        (
            '{"unavailable": 3}',
            "manifest.json is not a manifest of clip-deploy (its unavailable is of another kind); make it again",
        ),
        (
            '{"unavailable": "", "towers": {"text": {"target": "", "sha256": "", "files": 3}}}',
            "(its towers is of another kind); make it again",
        ),
        ("[" * 100_000, "manifest.json (maximum recursion depth exceeded"),
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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """The path of everything in a manifest."""
    yield path
    for key in value if isinstance(value, dict) else ():
        yield from places(value[key], (*path, key))


def changed(record, path, value):
    """The manifest with another value at a path; without it where the value is ..."""
    if not path:
        return {} if value is ... else value
    key, *rest = path
    inner = changed(record[key], rest, value) if rest else value
    return {name: item for name, item in ({**record, key: inner}).items() if item is not ...}


def test_any_manifest_is_accepted_or_refused_in_words(target, fuzz, outcomes, capsys):
    path = target.parent / "onnx-fp32.manifest.json"
    sound = json.loads(path.read_text())

    @fuzz(300)
    @given(st.sampled_from(list(places(sound))), st.just(...) | JSON)
    def tried(place, value):
        hostile = changed(sound, place, value)
        path.write_text(json.dumps(hostile))
        code, lines = said(capsys, target)
        assert lines
        assert all(line.startswith(("F", "error: ")) and line.isprintable() for line in lines), lines
        if code == 0:
            assert hostile["files"] == sound["files"]
        outcomes.tried("manifests of targets", "accepted" if code == 0 else "refused")

    tried()


def test_a_package_into_which_nothing_went_is_no_delivery(tmp_path, capsys):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"unavailable": "no target passes its gate"}')
    assert said(capsys, folder) == (1, ["F: holds nothing: no target passes its gate"])
    (folder / "vision.onnx").write_bytes(b"smuggled in")
    assert said(capsys, folder) == (1, ["F/vision.onnx: added", "F: not what its manifest says"])


def test_what_is_no_folder_is_named(tmp_path, capsys):
    (tmp_path / "a.onnx").write_bytes(b"")
    assert main(["verify", str(tmp_path / "a.onnx")]) == 1
    assert f"{tmp_path}/a.onnx is a file; give" in capsys.readouterr().err
    assert main(["verify", "no-such-folder"]) == 1
    assert "no-such-folder does not exist; give" in capsys.readouterr().err


def test_what_a_checkpoint_was_put_together_from_is_named(tmp_path):
    known = {"repo_id": "someone/lora", "revision": "1", "sha256": "a"}
    parts = {"adapter": known, "base": {**known, "repo_id": "someone/clip", "revision": "2"}}
    content = {"files": {"a": {"sha256": "0", "bytes": 1}}, "checkpoint": {**known, "parts": parts}}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    found = read_manifest(tmp_path / "manifest.json")
    assert described(found) == "files: 1, 0.00 MB, someone/lora at 1, base someone/clip at 2"
