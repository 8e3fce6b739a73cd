from dataclasses import replace

from support.project import ROOT
from support.records import parity, served

from clip_deploy.core.json_files import write_json
from clip_deploy.core.parsing import plain, read_record
from clip_deploy.core.served import Agreement, Fault, Load, Served, VersionStep
from clip_deploy.report.contents import Report
from clip_deploy.report.markdown import markdown

LOAD = [
    Load(
        model="clip_vision",
        note="one image",
        protocol="grpc",
        clients=8,
        requests_per_s=1234.5,
        windows_per_s=[1200.0, 1300.0, 1203.5],
        p50_ms=5.25,
        p90_ms=8.0,
        queue_ms=0.5,
        mean_batch=4.5,
    ),
    Load(
        model="clip_zero_shot",
        note="one image file, 8 texts",
        protocol="grpc",
        clients=1,
        requests_per_s=100.0,
        windows_per_s=[99.0, 100.0, 101.0],
        p50_ms=10.0,
        queue_ms=0.001,
        mean_batch=1.0,
    ),
]
FOUND = {
    "load": LOAD,
    "parity": {
        "images, grpc": replace(parity(0.99999951), max_abs_diff=0.00123),
        "probabilities, grpc": Agreement(32, same_answer_percent=96.9, max_abs_diff=0.02),
    },
    "versions": [
        VersionStep("two", ["1", "2"], "2", "", as_expected=True, right=True, sent=40, failed=0, error=""),
        VersionStep("back", ["1"], "1", "", as_expected=True, right=False, sent=50, failed=3, error="closed"),
    ],
    "faults": [Fault("noise", "400: a|b", refused=True, survived=True), Fault("silence", "closed", None, True)],
}


def written(record):
    """The section's lines."""
    text = markdown(Report("title", [], served=record))
    return text.split("## Served by Triton\n\n")[1].split("\n\n## ")[0].splitlines()


def test_load_parity_versions_faults_and_drift_are_rows():
    lines = written(served(**FOUND))
    assert "| `clip_vision` | one image | grpc | 8 | 1,234 [1,200, 1,300] | 5.25 / 8.00 / - | 0.500 | 4.50 |" in lines
    assert "| images, grpc | 1.000000 | 0.0012 | - |" in lines
    assert "| probabilities, grpc | - | 0.02 | 96.9 |" in lines
    assert "| two | 1, 2 | version 2 | yes | 40 | 0 |" in lines
    assert "| back | 1 | version 1 | **no** | 50 | 3 |" in lines
    assert "| noise | 400: a\\|b | yes | yes |" in lines
    assert "| silence | closed | - | yes |" in lines
    assert "| dark | drift | 0.035 | 0.0021 | 0.001 | 0.910 |" in lines


def test_the_ensembles_own_queue_and_batches_are_left_out():
    (line,) = [line for line in written(served(**FOUND)) if line.startswith("| `clip_zero_shot`")]
    assert line.endswith("| 10.0 / - / - | - | - |")


def test_without_a_server_the_reason_stands_there():
    lines = written(Served("unavailable", ["no Triton server: run `make triton-env`"]))
    assert lines == ["`unavailable`: no Triton server: run `make triton-env`"]


def test_what_failed_is_named():
    lines = written(served("fail", ["back: 3 requests failed"]))
    assert lines[0].startswith("**fail**: back: 3 requests failed (")


def test_a_server_that_ended_at_its_start_has_its_reason():
    lines = written(Served("fail", ["Triton ended with code 1: no such backend"]))
    assert lines == ["`fail`: Triton ended with code 1: no such backend"]


def test_the_record_in_git_is_read_and_written_as_it_stands(tmp_path):
    record = read_record(Served, ROOT / "reports/triton.json")
    write_json(tmp_path / "triton.json", plain(record))
    assert (tmp_path / "triton.json").read_bytes() == (ROOT / "reports/triton.json").read_bytes()


def test_embeddings_that_are_not_finite_are_shown_as_such(tmp_path):
    broken = replace(parity(0.0, finite=False), max_abs_diff=float("nan"))
    write_json(tmp_path / "triton.json", plain(served("fail", ["NaN"], parity={"texts, http": broken})))
    lines = written(read_record(Served, tmp_path / "triton.json"))
    assert "| texts, http | 0.000000 | nan | - |" in lines
