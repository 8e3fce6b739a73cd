import json
import shutil
import subprocess
import sys

import pytest
from support.project import ROOT

from clip_deploy.__main__ import main

ROW = {
    "status": "pass",
    "vision_p50_ms": 3.0,
    "text_p50_ms": 1.0,
    "images_per_s": 1234.5,
    "memory_mb": 60.0,
    "size_mb": 4.0,
    "cosine_min": 0.99991,
    "top1_percent": 92.2,
    "top1_drop_points": 0.5,
    "flips_percent": 1.25,
}
HARDWARE = {"cpu": "Xeon", "cores": 2, "gpus": []}
SOFTWARE = {"python": "3.11.7", "torch": "2.13.0", "openvino": None}


def reports(folder, metrics, hardware=HARDWARE, software=SOFTWARE):
    folder.mkdir()
    (folder / "targets.json").write_text(json.dumps(metrics))
    (folder / "environment.json").write_text(json.dumps({"hardware": hardware, "software": software}))
    return str(folder)


@pytest.fixture
def a(tmp_path):
    return reports(tmp_path / "a", {"torch-fp32": ROW, "ort-fp32": ROW, "trt-fp16": {"status": "unavailable"}})


@pytest.fixture
def b(tmp_path):
    faster = {
        **ROW,
        "vision_p50_ms": 1.5,
        "text_p50_ms": 2.0,
        "status": "fail",
        "cosine_min": 0.9,
        "top1_percent": 90.0,
    }
    hardware = {"cpu": "EPYC", "cores": 16, "gpus": ["NVIDIA H100, 81559 MiB, 570.1"]}
    software = {**SOFTWARE, "torch": "2.12.0", "openvino": "2026.4"}
    return reports(tmp_path / "b", {"torch-fp32": faster, "trt-fp16": ROW, "tensorrt": ROW}, hardware, software)


def test_both_machines_and_the_versions_that_differ_stand_above_the_table(a, b, capsys):
    assert main(["compare", str(a), str(b)]) == 0
    assert capsys.readouterr().out.splitlines()[:6] == [
        f"- **A**: {a}: Xeon, 2 cores, GPU: none",
        f"- **B**: {b}: EPYC, 16 cores, GPU: NVIDIA H100, 81559 MiB, 570.1",
        "- **Same machine**: no, another machine",
        "- **Versions that differ, A / B**: torch 2.13.0 / 2.12.0, openvino - / 2026.4",
        "- **Timings that decide nothing, A / B**: none / none",
        "",
    ]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("4f1b", "4f1b", "yes"),
        ("4f1b", "90aa", "no, another machine of the same type"),
        (None, "90aa", "not known: of one type, and without an id in environment.json"),
        (None, None, "not known: of one type, and without an id in environment.json"),
    ],
)
def test_two_machines_of_one_type_are_told_apart_by_their_ids(tmp_path, capsys, first, second, said):
    folders = [
        reports(tmp_path / name, {"torch-fp32": ROW}, {**HARDWARE, "machine": machine})
        for name, machine in (("a", first), ("b", second))
    ]
    assert main(["compare", *map(str, folders)]) == 0
    assert f"- **Same machine**: {said}\n" in capsys.readouterr().out


def test_a_timing_that_decides_nothing_has_no_ratio(a, tmp_path, capsys):
    busy = {**ROW, "vision_p50_ms": None, "images_per_s": None, "timing": "undecided"}
    assert main(["compare", str(a), str(reports(tmp_path / "busy", {"ort-fp32": busy}))]) == 0
    out = capsys.readouterr().out
    assert "- **Timings that decide nothing, A / B**: none / ort-fp32\n" in out
    assert "| `ort-fp32` | pass / pass | 3.00 / - | - | 1.00 / 1.00 | 1.00x | 1,234 / - | " in out


def test_every_target_of_either_run_has_a_line(a, b, capsys):
    main(["compare", str(a), str(b)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert lines == [
        "| `torch-fp32` | pass / fail | 3.00 / 1.50 | 2.00x | 1.00 / 2.00 | 0.50x | 1,234 / 1,234 | 60.0 / 60.0 | "
        "4.00 / 4.00 | 0.9999 / 0.9000 | 92.2 / 90.0 | 0.500 / 0.500 | 1.25 / 1.25 |",
        "| `ort-fp32` | pass / - | 3.00 / - | - | 1.00 / - | - | 1,234 / - | 60.0 / - | 4.00 / - | 0.9999 / - | "
        "92.2 / - | 0.500 / - | 1.25 / - |",
        "| `trt-fp16` | unavailable / pass | - / 3.00 | - | - / 1.00 | - | - / 1,234 | - / 60.0 | - / 4.00 | "
        "- / 0.9999 | - / 92.2 | - / 0.500 | - / 1.25 |",
        "| `tensorrt` | - / pass | - / 3.00 | - | - / 1.00 | - | - / 1,234 | - / 60.0 | - / 4.00 | "
        "- / 0.9999 | - / 92.2 | - / 0.500 | - / 1.25 |",
    ]


def test_a_run_against_itself_differs_in_no_version(a, capsys):
    assert main(["compare", str(a), str(a)]) == 0
    out = capsys.readouterr().out
    assert "- **Versions that differ, A / B**: none\n" in out
    assert "| Images/s, best batch, A / B |" in out
    assert (
        "\n\np50 is of a call at the smallest batch size of each run. Above 1.00x, a run took less time than A." in out
    )


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Its commit has a run, a branch `faster` another, and DVC an experiment of each at other commits."""
    monkeypatch.chdir(tmp_path)
    git("init", "-q", "-b", "main")
    commits = []
    for p50 in (3.0, 1.5, 1.0):
        shutil.rmtree("reports", ignore_errors=True)
        reports(tmp_path / "reports", {"ort-fp32": {**ROW, "vision_p50_ms": p50}})
        git("add", "-A")
        git("commit", "-q", "-m", f"{p50} ms")
        commits.append(git("rev-parse", "HEAD").strip())
    git("reset", "-q", "--hard", commits[0])
    git("branch", "faster", commits[1])
    for place, name, commit in (("ab/cd", "tidal-hoes", 2), ("ab/cd", "twice", 0), ("ef/01", "twice", 1)):
        git("update-ref", f"refs/exps/{place}/{name}", commits[commit])
    git("update-ref", "refs/exps/exec/EXEC_HEAD", commits[0])
    return tmp_path


def git(*words):
    who = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    return subprocess.run(["git", *who, *words], check=True, capture_output=True, text=True).stdout


def test_runs_are_folders_revisions_and_experiments(repository, capsys):
    copied = shutil.copytree("reports", "of-the-xeon")
    assert main(["compare", "HEAD", "faster", "tidal-hoes", str(copied)]) == 0
    out = capsys.readouterr().out
    assert "- **C**: tidal-hoes: Xeon, 2 cores, GPU: none\n" in out
    unknown = "not known: of one type, and without an id in environment.json"
    assert f"- **Same machine**: B: {unknown}; C: {unknown}; D: {unknown}\n" in out
    assert "| Vision p50 ms, A / B / C / D | A over B, C, D |" in out
    assert "| 3.00 / 1.50 / 1.00 / 3.00 | 2.00x / 3.00x / 1.00x |" in out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "no-such",
            "git knows no revision 'no-such' here, and DVC no experiment of that name: give a revision, for example",
        ),
        ("twice", "2 experiments are called 'twice': give the commit of one, which"),
        ("EXEC_HEAD", "git knows no revision 'EXEC_HEAD' here, and DVC no experiment"),
        ("HEAD:reports", "git knows no revision 'HEAD:reports' here"),
        ("--all", "git knows no revision '--all' here"),
    ],
)
def test_a_name_that_is_none_of_them_is_refused(repository, name, said, capsys):
    code, line = refused(capsys, "HEAD", "--", name) if name.startswith("-") else refused(capsys, "HEAD", name)
    assert code == 1
    assert line.startswith(f"error: {said}")


def test_a_revision_without_reports_is_refused(repository, capsys):
    git("rm", "-q", "-r", "reports")
    git("commit", "-q", "-m", "None")
    assert refused(capsys, "faster", "HEAD") == (1, f"error: HEAD has no targets.json; {GIVE}")


def refused(capsys, *arguments):
    """The exit code and the one line on standard error."""
    code = main(["compare", *map(str, arguments)])
    written = capsys.readouterr()
    assert written.out == ""
    (line,) = written.err.splitlines()
    return code, line


GIVE = "give a reports folder, with targets.json and environment.json as `dvc repro` writes them"


def test_a_missing_folder_is_named(a, tmp_path, capsys):
    assert refused(capsys, a, tmp_path / "c") == (1, f"error: {tmp_path}/c does not exist; {GIVE}")


@pytest.mark.parametrize("name", ["targets.json", "environment.json"])
def test_a_missing_file_is_named(a, b, tmp_path, name, capsys):
    (tmp_path / "b" / name).unlink()
    assert refused(capsys, a, b) == (1, f"error: {b} has no {name}; {GIVE}")


def test_broken_json_is_named(a, b, tmp_path, capsys):
    (tmp_path / "b" / "targets.json").write_text('{"torch-fp32": {')
    code, line = refused(capsys, a, b)
    assert code == 1
    assert line.startswith(f"error: cannot read {b}/targets.json (Expecting property name")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("targets.json", "[]"),
        ("targets.json", '{"torch-fp32": 3}'),
        ("targets.json", '{"torch-fp32": {"vision_p50_ms": "fast"}}'),
        ("targets.json", '{"torch-fp32": {"vision_p50_ms": NaN}}'),
        ("environment.json", "[]"),
        ("environment.json", '{"hardware": {"cpu": "Xeon"}, "software": {}}'),
    ],
)
def test_json_of_another_kind_is_refused(a, b, tmp_path, name, content, capsys):
    (tmp_path / "b" / name).write_text(content)
    assert refused(capsys, a, b) == (1, f"error: {b}/{name} is not the JSON that `dvc repro` writes; {GIVE}")


def test_the_shipped_report_can_be_compared_without_torch():
    code = (
        "import sys; from clip_deploy.__main__ import main; main(['compare', 'reports', 'reports']); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| `torch-fp32` | pass / pass | " in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
