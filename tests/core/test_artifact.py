import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.project import ROOT

from clip_deploy.core.artifact import Target, build, check_files, read_source, read_target, size_bytes, write_target
from clip_deploy.core.errors import CheckpointError, ConfigError, DataError, DeployError, DiskError, UnavailableError
from clip_deploy.core.files import new_folder, write_text
from clip_deploy.core.json_files import rounded, write_json


def test_a_failed_build_leaves_the_old_target(tmp_path):
    output = tmp_path / "target"
    build(output, lambda folder: Target("ort", "fp32", build={"opset": 18}), Target("ort", "fp32"))

    def fail(folder):
        (folder / "half.onnx").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(output, fail, Target("ort", "fp32"))
    assert read_target(output).build == {"opset": 18}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_the_former_target_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    output = tmp_path / "target"
    build(output, lambda folder: Target("ort", "fp32", build={"opset": 18}), Target("ort", "fp32"))
    move = Path.replace

    def refuse(path, to):
        if path.name == ".target.new.partial":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return move(path, to)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(DeployError, match=r"cannot write .*target: Permission denied"):
        build(output, lambda folder: Target("ort", "fp32", build={"opset": 17}), Target("ort", "fp32"))
    assert read_target(output).build == {"opset": 18}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    for left in (".target.new.partial", ".target.former.partial"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half.onnx").write_text("half")
    with new_folder(tmp_path / "target") as folder:
        assert not list(folder.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_an_unavailable_target_keeps_its_reason(tmp_path):
    def refuse(folder):
        raise UnavailableError("no such exporter")

    build(tmp_path / "target", refuse, Target("ort", "fp16"))
    target = read_target(tmp_path / "target")
    assert target.unavailable == "no such exporter"
    assert target.precision == "fp16"


def test_size_counts_the_deployed_files_only(tmp_path):
    def make(folder):
        (folder / "vision.onnx").write_bytes(b"x" * 100)
        (folder / "vision.onnx.data").write_bytes(b"x" * 1000)
        (folder / "notes.txt").write_bytes(b"x" * 7)
        return Target("ort", "fp32", files=["vision.onnx", "vision.onnx.data"])

    build(tmp_path / "target", make, Target("ort", "fp32"))
    assert size_bytes(tmp_path / "target") == 1100


def test_a_folder_that_is_no_target_is_refused(tmp_path):
    with pytest.raises(DeployError, match="is not a built target"):
        read_target(tmp_path)


@pytest.mark.parametrize(
    ("runtime", "precision", "files"), [("ort", "int8", ["vision.onnx"]), ("eager", "fp32", ["config.json"])]
)
def test_a_source_of_another_kind_is_refused(runtime, precision, files, tmp_path):
    write_target(tmp_path, Target(runtime, precision, files))
    with pytest.raises(ConfigError, match=f"a target of {runtime} in {precision}: accepted are the export"):
        read_source(tmp_path)


def test_a_file_that_is_not_the_one_that_was_built_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(folder):
        (folder / "vision.onnx").write_bytes(b"weights")
        return Target("ort", "fp32", files=["vision.onnx"])

    build(tmp_path / "t", make, Target("ort", "fp32"))
    check_files(tmp_path / "t")
    (tmp_path / "t" / "vision.onnx").write_bytes(b"weightz")
    with pytest.raises(
        DeployError, match=r"vision.onnx is not the file that was built .*; `rm -r \S*t` and `dvc repro`"
    ):
        check_files(tmp_path / "t")
    folder = tmp_path / ".dvc" / "cache" / "files" / "md5" / "ab"
    folder.mkdir(parents=True)
    (folder / "12").write_bytes(b"weights")  # of the same size
    (folder / "34").write_bytes(b"weightz")
    with pytest.raises(DeployError, match=r"`rm -r \S*t \.dvc/cache/files/md5/ab/34` and `dvc repro`"):
        check_files(tmp_path / "t")


def test_a_native_librarys_words_for_a_full_disk_are_understood(tmp_path):
    def fill(folder):
        raise RuntimeError("PytorchStreamWriter failed: No space left on device")

    with pytest.raises(DeployError, match=r"cannot write .*target: No space left on device; free some space"):
        build(tmp_path / "target", fill, Target("torchscript", "fp32"))
    with pytest.raises(RuntimeError, match="another"), new_folder(tmp_path / "target"):
        raise RuntimeError("another")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path):
    def fill(folder):
        with open("/dev/full", "w") as full:
            full.write("x" * 10_000_000)
        return Target("ort", "fp32")

    with pytest.raises(DeployError, match=r"cannot write .*target: No space left on device; free some space"):
        build(tmp_path / "target", fill, Target("ort", "fp32"))
    assert not list(tmp_path.iterdir())


def test_a_read_only_folder_is_said_in_one_line(tmp_path, monkeypatch):
    """Root may write anywhere, so the kernel's answer is played by hand."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with (
        pytest.raises(DeployError, match=r"cannot write .*target: Read-only file system; .*mount it writable"),
        new_folder(tmp_path / "target"),
    ):
        pass


def test_a_file_in_the_way_is_said_in_one_line(tmp_path):
    (tmp_path / "artifacts").write_text("")
    with (
        pytest.raises(DeployError, match="a file stands where a folder is needed"),
        new_folder(tmp_path / "artifacts" / "target"),
    ):
        pass


def test_a_result_file_is_rounded_and_ends_with_a_newline(tmp_path):
    write_json(tmp_path / "result.json", {"p50_ms": 1.23456789, "cosine": 0.99999999, "bad": float("nan"), "n": 3})
    assert (tmp_path / "result.json").read_text() == (
        '{\n  "p50_ms": 1.2346,\n  "cosine": 1.0,\n  "bad": null,\n  "n": 3\n}\n'
    )
    assert rounded([1234567.0, True, "x"]) == [1234600.0, True, "x"]


def test_a_text_is_written_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "a.md", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.md", "new \ud800")
    assert (tmp_path / "a.md").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.md"]


def raised(error):
    def make(folder):
        (folder / "vision.onnx").write_text("half")
        raise error

    return make


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Gather_3: idx=514 must be\nwithin bounds"), "RuntimeError: Gather_3: idx=514 must be "),
        (DeployError("text.onnx does not run: bounds"), "text.onnx does not run: bounds "),
        (KeyError("heads"), "KeyError: 'heads' "),
        (MemoryError(), "MemoryError: memory ran out "),
    ],
)
def test_an_unexpected_error_fails_its_own_target(tmp_path, monkeypatch, capsys, error, reason):
    monkeypatch.setenv("DVC_STAGE", "optimize@ort-fp32")
    build(tmp_path / "target", raised(error), Target("ort", "fp16"))
    target = read_target(tmp_path / "target")
    again = "(its traceback is in the terminal); `dvc repro -fs optimize@ort-fp32 && dvc repro` tries it again"
    assert (target.failed, target.unavailable, target.precision) == (True, reason + again, "fp16")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["target.json"]
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ConfigError, CheckpointError, DataError, DiskError])
def test_what_concerns_every_target_stops_the_run(tmp_path, kind):
    with pytest.raises(kind, match="wrong"):
        build(tmp_path / "target", raised(kind("wrong")), Target("ort", "fp32"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_behind_another_error_stops_the_run(tmp_path):
    """An exporter that takes it for a failure of its own would leave a row `unavailable` on every full disk."""

    def export(folder):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UnavailableError("the exporter failed") from error

    with pytest.raises(DiskError, match="No space left on device; free some space"):
        build(tmp_path / "target", export, Target("ort", "fp32"))


def test_the_reference_has_no_row_that_could_fail(tmp_path):
    with pytest.raises(RuntimeError, match="wrong"):
        build(tmp_path / "torch-fp32", raised(RuntimeError("wrong")), None)
    assert not list(tmp_path.iterdir())


STAGE = """
from pathlib import Path
from clip_deploy.core.artifact import Target, build
def make(folder):
    if Path("broken").exists():
        raise RuntimeError("of a library")
    return Target("ort", "fp32")
build(Path("out"), make, Target("ort", "fp32"))
"""
PIPELINE = "stages: {optimize: {foreach: {ort-fp32: {}}, do: {cmd: python stage.py, outs: [out]}}}"


def test_dvc_goes_on_behind_a_failed_target_and_the_reasons_command_tries_it_again(tmp_path, kinds):
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "broken").touch()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

    def run(command):
        variables = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("dvc init -q --no-scm && dvc repro")
    failed = read_target(tmp_path / "out")
    assert failed.failed
    assert "didn't change, skipping" in run("dvc repro")
    (tmp_path / "broken").unlink()
    assert "dvc repro -fs optimize@ort-fp32 && dvc repro" in failed.unavailable
    run("dvc repro -fs optimize@ort-fp32 && dvc repro")
    assert not read_target(tmp_path / "out").failed
    kinds("11b: a target's unexpected failure", before="a traceback, and the run ends", now=failed.unavailable)
