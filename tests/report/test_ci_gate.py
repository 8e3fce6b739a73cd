"""What shuts the gate: every way in which a green could be false, and what was lost since another revision."""

import contextlib
import copy
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.project import ROOT
from support.records import HARDWARE, advised, parity, timing

from clip_deploy.__main__ import main
from clip_deploy.commands.gate import in_words
from clip_deploy.core.artifact import hashes, write_manifest
from clip_deploy.core.config import REFERENCE, CiConfig, GateLimits, GatesConfig
from clip_deploy.core.errors import ConfigError, DeployError
from clip_deploy.core.files import sha256
from clip_deploy.core.json_files import rounded
from clip_deploy.core.manifest import Run, save_manifest
from clip_deploy.core.parsing import parse, plain
from clip_deploy.core.records import Validation
from clip_deploy.data.preprocessed import load_prepared
from clip_deploy.evaluate.gates import GateFailure
from clip_deploy.evaluate.validation import manifest, validate
from clip_deploy.report.ci_gate import (
    Reports,
    asked,
    asked_otherwise,
    at_revision,
    check_reports,
    check_required,
    compare_revisions,
    other_weights,
    refusals,
    strictest,
    undecided,
    verdicts,
)

TARGET = "onnx-fp32"
GATES = GatesConfig(fp32=GateLimits(min_cosine=0.9999, max_top1_drop=0.1, max_flips=0.5))
TIMING = plain(timing(reference_p50_ms=1.48))
TIMED = {"status": "measured", "threads": 2, "towers": {"vision": {"1": TIMING}, "text": {"1": TIMING}}}
NOTHING_PACKAGED = {"unavailable": "nothing is fit"}
VISION = f"{TARGET}/vision.onnx"  # in a package


@pytest.fixture(scope="module")
def check(sets):
    """What the stage `validate` writes of a target's folder."""

    def run(folder):
        reference = sets / "evaluation" / "reference.npz"
        return json.loads(
            json.dumps(rounded(plain(validate(folder, load_prepared(sets / "evaluation"), reference, GATES, 0))))
        )

    return run


@pytest.fixture(scope="module")
def sound(check, onnx_target):
    return check(onnx_target)


def reports_of(checked):
    """reports/ of one target, as a dictionary of its files."""
    return copy.deepcopy(
        {
            f"validate/{TARGET}.json": checked,
            f"benchmark/{TARGET}.json": TIMED,
            "targets.json": {TARGET: {"status": checked["status"]}},
            "recommendation.json": advised({TARGET: {"files": checked["files"]}}),
            "environment.json": {"software": {}, "hardware": HARDWARE},
        }
    )


@pytest.fixture
def artifacts(tmp_path, onnx_target, sound, sets):
    """A folder with one target, the prepared data and an empty package."""
    deliver(tmp_path, onnx_target, sound)
    for name in ("calibration", "evaluation", "portable"):
        write_manifest(shutil.copytree(sets / name, tmp_path / "data" / name))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "manifest.json").write_text(json.dumps(NOTHING_PACKAGED))
    return tmp_path


def deliver(artifacts, folder, checked):
    if folder != artifacts / TARGET:
        shutil.copytree(folder, artifacts / TARGET)
    described = manifest(artifacts / TARGET, parse(Validation, checked, "it"), Run("tiny", 0, {}))
    save_manifest(artifacts / f"{TARGET}.manifest.json", described, indent=1)


def missed(reports, artifacts):
    """What shuts the gate, as "target: quantity value limit"."""
    found = check_reports([TARGET], Reports(reports.get), GATES, artifacts)
    return [f"{name}: {miss}" for name, misses in found.items() for miss in misses]


def test_a_sound_target_passes(sound, artifacts):
    reports = reports_of(sound)
    assert missed(reports, artifacts) == []
    assert f"| `{TARGET}` | pass | 1.0000 | 0.00 | 0.00 | 3.00 [2.90, 3.10] | 3.00 [2.90, 3.10] |" in verdicts(
        [TARGET], Reports(reports.get)
    )


@pytest.mark.parametrize(
    ("file", "path", "value", "said"),
    [
        ("validate", [], None, "validation no result"),
        ("validate", ["status"], "fail", "gate fail"),
        ("validate", ["status"], "unavailable", "gate unavailable"),
        ("validate", ["parity", "text", "cosine_min"], 0.98, "text: cosine 0.980000 < 0.9999 (gates.fp32.min_cosine)"),
        ("validate", ["parity", "vision", "cosine_min"], None, "vision: cosine nan < 0.9999 (gates.fp32.min_cosine)"),
        ("validate", ["parity", "vision", "finite"], False, "vision gives NaN or infinity"),
        ("validate", ["shapes", "text, batch 3"], 0.5, "text, batch 3: cosine 0.500000 < 0.9999"),
        ("validate", ["zero_shot", "top1_drop"], 2.0, "top-1 drop 2.00 points > 0.1 (gates.fp32.max_top1_drop)"),
        ("validate", ["zero_shot", "top1_drop"], None, "top-1 drop nan points > 0.1"),
        ("validate", ["flips"], None, "flips nan % > 0.5 (gates.fp32.max_flips)"),
        ("validate", ["parity"], {}, "gate pass, and not all was measured"),
        ("validate", ["parity"], {"text": plain(parity())}, "gate pass, and not all was measured"),
        ("validate", ["files"], {}, "files not those that were judged"),
        ("validate", ["files", "vision.onnx"], "0" * 64, "files not those that were judged"),
        ("benchmark", [], None, "timing no result"),
        ("benchmark", ["status"], "unavailable", "timing unavailable"),
        ("benchmark", ["towers"], {}, "vision: timing no result"),
        ("benchmark", ["towers", "text"], {}, "text: timing no result"),
        ("benchmark", ["towers", "text", "1", "speedup"], None, "text, batch 1: speed-up not a number"),
    ],
)
def test_no_result_passes_that_is_missing_broken_or_below_a_limit(sound, artifacts, file, path, value, said):
    reports = reports_of(sound)
    at, name = reports, f"{file}/{TARGET}.json"
    for key in path:
        at, name = at[name], key
    at[name] = value
    assert any(line.startswith(f"{TARGET}: {said}") for line in missed(reports, artifacts)), missed(reports, artifacts)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("targets.json", {TARGET: {"status": "fail"}}, "targets.json says fail"),
        ("targets.json", None, "targets.json says None"),
        ("recommendation.json", advised({TARGET: {}}), "recommendation.json is of other files"),
    ],
)
def test_a_report_of_other_results_is_stale(sound, artifacts, file, content, said):
    assert missed(reports_of(sound) | {file: content}, artifacts) == [f"{TARGET}: {said} run `dvc repro`"]


def test_files_that_are_not_those_that_were_judged_do_not_pass(sound, artifacts):
    (artifacts / TARGET / "more.bin").write_bytes(b"x")
    (artifacts / TARGET / "text.onnx").write_bytes(b"another model")
    assert missed(reports_of(sound), artifacts) == [
        f"{TARGET}: files text.onnx: changed run `dvc repro`",
        f"{TARGET}: files more.bin: added run `dvc repro`",
    ]
    (artifacts / f"{TARGET}.manifest.json").unlink()
    assert f"{TARGET}: files {artifacts / TARGET} has no manifest" in missed(reports_of(sound), artifacts)[0]


@pytest.mark.parametrize(
    ("name", "file"), [("calibration", "texts.npz"), ("evaluation", "manifest.json"), ("portable", "preprocessor.json")]
)
def test_prepared_data_that_rotted_shut_the_gate(sound, artifacts, name, file):
    path = artifacts / "data" / name / file
    path.write_bytes(path.read_bytes()[:-2] + b"x\n")
    assert missed(reports_of(sound), artifacts) == [f"data/{name}: files {file}: changed run `dvc repro -f prepare`"]
    (artifacts / "data" / f"{name}.manifest.json").unlink()
    (without,) = missed(reports_of(sound), artifacts)
    assert without.startswith(f"data/{name}: files ")


def package(artifacts, checked):
    """artifacts/package with the target's image tower alone."""
    graph = artifacts / "package" / VISION
    graph.parent.mkdir()
    shutil.copyfile(artifacts / TARGET / "vision.onnx", graph)
    entry = {"sha256": checked["files"]["vision.onnx"], "bytes": graph.stat().st_size}
    tower = {"target": TARGET, "files": [VISION], "sha256": entry["sha256"]}
    record = {"files": {VISION: entry}, "towers": {"vision": tower}}
    (artifacts / "package" / "manifest.json").write_text(json.dumps(record))


def test_what_failed_shuts_the_gate_where_it_is_packaged(sound, artifacts):
    package(artifacts, sound)
    assert missed(reports_of(sound), artifacts) == []
    failed = {**sound, "status": "fail", "reasons": ["crashed"]}
    assert missed(reports_of(failed), artifacts) == [
        f"{TARGET}: gate fail crashed",
        f"package: files vision: {TARGET} did not pass as it is packaged run `dvc repro`",
    ]


def test_a_package_whose_graph_was_not_judged_shuts_the_gate(sound, artifacts):
    """The manifest agrees with the files, and its tower with the record: only between the two is nothing."""
    package(artifacts, sound)
    path = artifacts / "package" / "manifest.json"
    record = json.loads(path.read_text())
    (artifacts / "package" / VISION).write_bytes(b"another graph")
    record["files"] = hashes(artifacts / "package")
    del record["files"]["manifest.json"]
    said = f"package: files vision: {TARGET} did not pass as it is packaged run `dvc repro`"
    path.write_text(json.dumps(record))
    assert missed(reports_of(sound), artifacts) == [said]
    path.write_text(json.dumps({**record, "towers": {}}))
    unnamed = f"package: files {VISION}: of no tower, and so not judged run `dvc repro`"
    assert missed(reports_of(sound), artifacts) == [unnamed]
    (artifacts / "package" / VISION).rename(artifacts / "package" / "labels.json")
    files = {"labels.json": record["files"][VISION]}
    path.write_text(json.dumps({**record, "files": files}))
    assert missed(reports_of(sound), artifacts) == [said]


def test_a_package_that_was_changed_shuts_the_gate(sound, artifacts):
    (artifacts / "package" / "vision.onnx").write_bytes(b"smuggled in")
    assert missed(reports_of(sound), artifacts) == ["package: files vision.onnx: added run `dvc repro`"]


def disturb(path, deviation):
    """Noise on the largest weight of a graph, whose own deviation is 0.05."""
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    array = onnx.numpy_helper.to_array(weight)
    noise = np.random.default_rng(0).normal(0, deviation, array.shape).astype(array.dtype)
    weight.CopyFrom(onnx.numpy_helper.from_array(array + noise, weight.name))
    onnx.save(model, path)


def test_a_seeded_regression_is_caught_by_the_real_validation(sound, check, artifacts):
    """Noise on one weight of the image tower: validate judges it, the manifest is its own, and all files agree."""
    disturb(artifacts / TARGET / "vision.onnx", 0.3)
    checked = check(artifacts / TARGET)
    deliver(artifacts, artifacts / TARGET, checked)
    reports = reports_of(checked)
    assert [line for line in missed(reports, artifacts) if ": cosine" in line and "(gates.fp32.min_cosine)" in line]
    lost, uncompared = compare_revisions([TARGET], Reports(reports.get), Reports(reports_of(sound).get), CiConfig())
    assert {miss.quantity for miss in lost[TARGET]} >= {"vision: cosine", "top-1"}
    assert not any(uncompared.values())
    assert f"| `{TARGET}` | vision: cosine | " in refusals([lost])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "ci.required is empty, so nothing would be checked: name some of torch-fp32, ort-fp32"),
        (["ort-fp31"], "ci.required lists 'ort-fp31', which is not among targets: torch-fp32, ort-fp32; take it out"),
    ],
)
def test_a_gate_that_would_check_nothing_or_what_is_unknown_is_refused(names, said):
    with pytest.raises(ConfigError, match=said):
        check_required(names, ["torch-fp32", "ort-fp32"])


PROJECT = {
    "params.yaml": "ci: {required: [a, b], max_cosine_drop: 0.001, max_top1_drop: 0.5}\ngates: usual\nseed: 0\n",
    "conf/gates/usual.yaml": "int8: {min_cosine: 0.9}\n",
    "conf/gates/loose.yaml": "int8: {min_cosine: 0.5}\n",
}


def asks(**changed):
    files = PROJECT | {name.replace("__", "/") + ".yaml": text for name, text in changed.items()}
    return asked(lambda path: files.get(path.as_posix()), Path("params.yaml"), Path("conf"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, []),
        ({"params": PROJECT["params.yaml"].replace("seed: 0", "seed: 1")}, []),
        ({"params": PROJECT["params.yaml"].replace("[a, b]", "[a]")}, ["ci.required: -b  (params.yaml)"]),
        (
            {"params": PROJECT["params.yaml"].replace("0.001", "0.5")},
            ["ci.max_cosine_drop: 0.001 -> 0.5  (params.yaml)"],
        ),
        (
            {"params": PROJECT["params.yaml"].replace("usual", "loose")},
            ["gates: usual -> loose  (params.yaml)", "int8.min_cosine: 0.9 -> 0.5  (conf/gates)"],
        ),
        ({"conf__gates__usual": "int8: {min_cosine: 0.8}"}, ["int8.min_cosine: 0.9 -> 0.8  (conf/gates)"]),
    ],
)
def test_what_the_gate_asks_otherwise_than_before_is_named(changed, said):
    assert asked_otherwise(asks(**changed), asks()) == said


@pytest.mark.parametrize("former", ["", "ci: 3", "ci: {max_cosine_drop: [1]}", "[", "a"])
def test_a_revision_that_asks_nothing_of_this_kind_changes_nothing(former):
    files = {"params.yaml": former}
    then = asked(lambda path: files.get(path.as_posix()), Path("params.yaml"), Path("conf"))
    assert strictest(CiConfig(["a"]), then) == CiConfig(["a"])
    assert asked_otherwise(asks(), asked(lambda path: None, Path("params.yaml"), Path("conf"))) == []


def test_many_targets_with_the_same_miss_are_one_line():
    same, other = GateFailure("stale", "changed deps: core", "run `dvc repro`"), GateFailure("gate", "fail")
    few = {name: [same] for name in "abcd"}
    assert refusals([few, {"e": [other]}]).splitlines()[2:] == [
        *(f"| `{name}` | stale | changed deps: core | run `dvc repro` |" for name in "abcd"),
        "| `e` | gate | fail |  |",
    ]
    many = refusals([few, {"e": [other, same]}]).splitlines()[2:]
    assert many[0] == "| `a`, `b`, `c` and 2 more | stale | changed deps: core | run `dvc repro` |"
    assert many[1:] == ["| `e` | gate | fail |  |"]


def test_what_moved_is_told_by_the_stricter_limit():
    assert strictest(CiConfig(["a"], max_cosine_drop=0.5, max_top1_drop=0.1), asks()) == CiConfig(
        ["a"], max_cosine_drop=0.001, max_top1_drop=0.1
    )


def lost_since(sound, change, former=None, slow_down=10):
    """What `change(reports)` loses against the sound reports, as changed by `former`."""
    now, before = reports_of(sound), reports_of(sound)
    change(now)
    if former:
        former(before)
    lost, uncompared = compare_revisions(
        [TARGET], Reports(now.get), Reports(before.get), CiConfig(max_slow_down=slow_down)
    )
    return [str(miss) for miss in lost[TARGET]], [str(miss) for missed in uncompared.values() for miss in missed]


def checked(**changes):
    def change(reports):
        reports[f"validate/{TARGET}.json"] |= changes

    return change


def timed(**changes):
    def change(reports):
        found = plain(timing(**{"reference_p50_ms": 1.48, **changes}))
        reports[f"benchmark/{TARGET}.json"]["towers"]["text"]["1"] |= found

    return change


def answered(**changes):
    def change(reports):
        reports[f"validate/{TARGET}.json"]["zero_shot"] |= changes

    return change


TOP1 = answered(top1=92.0, top1_drop=0.1, top1_drop_low=-0.2, top1_drop_high=0.4)


@pytest.mark.parametrize(
    ("change", "former", "said"),
    [
        (checked(size_mb=4.3), checked(size_mb=4.0), "size 4.30 MB > 4.00 MB by more than 5 % (ci.max_size_growth)"),
        (
            checked(parity={"vision": plain(parity(0.99))}),
            None,
            "vision: cosine 0.990000 < 1.000000 by more",
        ),
        (answered(top1=91.4), TOP1, "top-1 91.40 % < 92.00 % by more than 0.5 points (ci.max_top1_drop)"),
        (
            answered(top1=92.0, top1_drop=1.1, top1_drop_low=1.0, top1_drop_high=1.2),
            TOP1,
            "top-1 drop 1.10 [1.00, 1.20] above 0.10 [-0.20, 0.40] by more than 0.5 points (ci.max_top1_drop)",
        ),
        (
            timed(speedup=2.5, speedup_low=2.4, speedup_high=2.6),
            None,
            "text, batch 1: speed-up 2.50 [2.40, 2.60] below 3.00 [2.90, 3.10] by more than 10 % (ci.max_slow_down)",
        ),
    ],
)
def test_what_was_lost_since_a_revision_is_named(sound, change, former, said):
    assert any(line.startswith(said) for line in lost_since(sound, change, former)[0])


@pytest.mark.parametrize(
    ("change", "former"),
    [
        (checked(size_mb=4.1), checked(size_mb=4.0)),
        (answered(top1=91.6, top1_drop=0.5, top1_drop_low=0.2, top1_drop_high=0.8), TOP1),
        (answered(top1=91.6, top1_drop=0.8, top1_drop_low=0.7, top1_drop_high=0.9), TOP1),  # 0.3 between the intervals
        (timed(speedup=2.6, speedup_low=2.2, speedup_high=2.95), None),  # the intervals meet
        (timed(speedup=2.5, speedup_low=2.4, speedup_high=2.62), None),  # 17 % slower, and 9.7 % between the intervals
        (timed(speedup=9.0, speedup_low=8.9, speedup_high=9.1), None),
    ],
)
def test_what_is_within_the_limits_is_not(sound, change, former):
    assert lost_since(sound, change, former) == ([], [])


@pytest.mark.parametrize(("high", "limit", "is_lost"), [(2.9, 0, False), (2.89, 0, True), (2.89, 1, False)])
def test_without_a_tolerance_the_intervals_alone_decide(sound, high, limit, is_lost):
    slower = timed(speedup=high - 0.05, speedup_low=high - 0.1, speedup_high=high)
    assert bool(lost_since(sound, slower, slow_down=limit)[0]) == is_lost


@pytest.mark.parametrize(("low", "is_lost"), [(2.2, False), (2.4, True)])
def test_on_a_gpu_p50_decides_and_not_a_reference_that_waits_for_python(sound, low, is_lost):
    before = timed(p50_ms=2.0, p50_low_ms=1.9, p50_high_ms=2.1)
    slower = timed(p50_ms=2.5, p50_low_ms=low, p50_high_ms=2.6, speedup=1.0, speedup_low=0.9, speedup_high=1.1)
    lost = lost_since({**sound, "device": "cuda"}, slower, before)[0]
    found = f"vision, batch 1: p50 ms 2.5 [{low}, 2.6] above 2 [1.9, 2.1] by more than 10 % (ci.max_slow_down)"
    assert any(line.startswith(found) for line in lost) == is_lost
    assert not any("speed-up" in line for line in lost)


SHAPES = [[], "text", 3, {"status": {}}, {"parity": []}, {"parity": {"vision": 1}}, {"towers": [1]}, {"targets": [1]}]


@pytest.mark.parametrize("content", SHAPES)
@pytest.mark.parametrize("name", [f"validate/{TARGET}.json", f"benchmark/{TARGET}.json", "recommendation.json"])
def test_a_report_of_another_shape_never_passes_and_gives_no_traceback(sound, artifacts, name, content):
    try:
        assert missed(reports_of(sound) | {name: content}, artifacts)
    except DeployError as error:
        assert f"reports/{name} is of another version of clip-deploy (" in str(error)  # noqa: PT017
    with contextlib.suppress(DeployError):
        compare_revisions(
            [TARGET], Reports((reports_of(sound) | {name: content}).get), Reports(reports_of(sound).get), CiConfig()
        )
    with contextlib.suppress(DeployError):
        compare_revisions(
            [TARGET], Reports(reports_of(sound).get), Reports((reports_of(sound) | {name: content}).get), CiConfig()
        )


def test_a_mistake_of_our_own_keeps_its_traceback_and_is_not_blamed_on_a_report(sound, artifacts, monkeypatch):
    def wrong(*_):
        raise KeyError("of our own")

    monkeypatch.setattr("clip_deploy.report.ci_gate._timing", wrong)
    with pytest.raises(KeyError, match="of our own"):
        missed(reports_of(sound), artifacts)


def test_a_former_report_of_another_version_is_named_with_the_revision(repository):
    (repository / "environment.json").write_text('{"hardware": {}}')
    subprocess.run(["git", "add", "-A"], check=True)
    who = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    subprocess.run(["git", *who, "commit", "-q", "-m", "Another version"], check=True)
    former = at_revision("HEAD", repository.relative_to(repository.parent))
    with pytest.raises(ConfigError) as error:
        former.environment()
    assert str(error.value) == (
        "reports/environment.json at HEAD is of another version of clip-deploy (it lacks software): "
        "name another revision"
    )


MEANT = "--allow-uncompared lets it pass"


def test_another_machine_is_a_miss_of_its_own_as_its_timings_cannot_be_compared(sound):
    slow = timed(speedup=1.0, speedup_low=0.9, speedup_high=1.1)
    xeon = {"environment.json": {"software": {}, "hardware": {**HARDWARE, "cpu": "Xeon"}}}
    line = "hardware.cpu: Xeon -> EPYC  (reports/environment.json)"
    assert lost_since(sound, slow, lambda reports: reports.update(xeon)) == (
        [],
        [f"timings not compared, another machine: {line} {MEANT}"],
    )


def test_another_machine_of_the_same_type_is_told_apart_by_its_id(sound, kinds):
    def on(machine):
        hardware = {"software": {}, "hardware": {**HARDWARE, "machine": machine}}
        return lambda reports: reports.update({"environment.json": hardware})

    assert lost_since(sound, on("4f1b"), on("4f1b")) == ([], [])
    (found,) = lost_since(sound, on("4f1b"), on("90aa"))[1]
    line = "hardware.machine: 90aa -> 4f1b  (reports/environment.json)"
    assert found == f"timings not compared, another machine: {line} {MEANT}"
    kinds(
        "21: two machines of one type",
        before="equal environment.json: their timings met in one table, and `gate --against` compared them",
        now=found,
    )


AGAIN = (
    f"time again on a quiet machine: `dvc repro --force --single-item benchmark@torch-fp32 benchmark@{TARGET} "
    f"&& dvc repro`; {MEANT}"
)
BUSY = {"speedup": 775.44, "speedup_low": 68.1, "speedup_high": 782.76, "reference_p50_ms": 321.0}
HONEST = {"speedup": 4.85, "speedup_low": 4.7, "speedup_high": 5.0}


def beside_the_reference(change):
    """`change`, in reports in which the reference took 1.48 ms for its own row."""
    alone = {**TIMING, "p50_ms": 1.48, "speedup": 1.0, "speedup_low": 0.99, "speedup_high": 1.01}
    own = {"status": "measured", "threads": 2, "towers": {tower: {"1": alone} for tower in ("vision", "text")}}

    def changed(reports):
        reports["benchmark/torch-fp32.json"] = copy.deepcopy(own)
        reports[f"benchmark/{TARGET}.json"] = json.loads(json.dumps(TIMED))  # each tower with a timing of its own
        change(reports)

    return changed


def test_a_timing_that_decides_nothing_is_a_miss_with_one_command_and_is_neither_lost_nor_kept(sound, kinds):
    now, before = (beside_the_reference(timed(**change)) for change in (BUSY, HONEST))
    lost, (missed,) = lost_since(sound, now, before)
    assert lost == []
    assert missed == f"timings decide nothing: text, batch 1 {AGAIN}"
    kinds(
        "21: a timing of a busy machine in `gate --against`",
        before='"pass ... 775.44 [68.10, 782.76]" and "none lost", while images/s fell from 5,123 to 1,280',
        now=missed,
    )


def test_a_baseline_that_decides_nothing_makes_no_honest_timing_red_for_ever(sound, kinds):
    now, before = (beside_the_reference(timed(**change)) for change in (HONEST, BUSY))
    lost, (missed,) = lost_since(sound, now, before)
    assert lost == []
    assert missed == (
        "timings decided nothing at that revision: text, batch 1 "
        f"later revisions are held against the results that are committed now; {MEANT}"
    )
    kinds(
        "21: the revision of a busy machine as a baseline",
        before="an honest 4.85x was red against 775.44 [68.10, 782.76], at every later run",
        now=missed,
    )


def test_what_was_timed_well_is_compared_beside_what_was_not(sound):
    def change(reports):
        towers = reports[f"benchmark/{TARGET}.json"]["towers"]
        towers["vision"]["1"] |= {"speedup": 1.0, "speedup_low": 0.9, "speedup_high": 1.1, "p50_ms": 1.48}
        towers["text"]["1"] = plain(timing(**BUSY))

    lost, (missed,) = lost_since(sound, beside_the_reference(change), beside_the_reference(lambda reports: None))
    assert [line.split(" below")[0] for line in lost] == ["vision, batch 1: speed-up 1.00 [0.90, 1.10]"]
    assert missed.startswith("timings decide nothing: text, batch 1 time again")


def test_all_targets_that_were_spoiled_are_timed_again_by_one_command(sound):
    now, before = reports_of(sound), reports_of(sound)
    for reports in (now, before):
        for name in ("a", "b"):
            reports[f"validate/{name}.json"] = reports[f"validate/{TARGET}.json"]
            reports[f"benchmark/{name}.json"] = copy.deepcopy(TIMED)
    for name in ("a", "b"):
        now[f"benchmark/{name}.json"]["towers"]["text"]["1"] |= {"speedup_high": 9.0}
    _, uncompared = compare_revisions([TARGET, "a", "b"], Reports(now.get), Reports(before.get), CiConfig())
    command = "`dvc repro --force --single-item benchmark@torch-fp32 benchmark@a benchmark@b && dvc repro`"
    assert {name: len(misses) for name, misses in uncompared.items()} == {"machine": 0, TARGET: 0, "a": 1, "b": 1}
    assert all(command in uncompared[name][0].limit for name in ("a", "b"))


def test_without_a_revision_a_spoiled_timing_is_no_miss_and_no_number_either(sound, artifacts):
    reports = reports_of(sound)
    beside_the_reference(timed(**BUSY))(reports)
    assert missed(reports, artifacts) == []
    assert verdicts([TARGET], Reports(reports.get)).endswith("| 3.00 [2.90, 3.10] | undecided |")
    assert undecided([TARGET], Reports(reports.get)) == {TARGET: ["text, batch 1"]}


def test_on_a_gpu_a_row_whose_own_calls_differ_is_the_one_that_decides_nothing(sound):
    def gpu(**changes):
        def change(reports):
            for tower in ("vision", "text"):
                at = reports[f"benchmark/{TARGET}.json"]["towers"][tower]["1"]
                at |= {"p50_ms": 2.0, "p50_low_ms": 1.9, "p50_high_ms": 2.1, **changes}

        return change

    on_gpu = {**sound, "device": "cuda"}
    assert lost_since(on_gpu, gpu(speedup_high=90.0), gpu()) == ([], [])  # the reference waited for Python
    (missed,) = lost_since(on_gpu, gpu(p90_ms=3.1), gpu())[1]
    assert missed.startswith("timings decide nothing: vision, batch 1; text, batch 1 time again")


def test_another_number_of_threads_is_a_miss_of_its_own(sound):
    slow = timed(speedup=1.0, speedup_low=0.9, speedup_high=1.1)
    four = lost_since(sound, slow, lambda reports: reports[f"benchmark/{TARGET}.json"].update(threads=4))
    assert four == ([], [f"timings not compared: threads were 4, and are 2 {MEANT}"])


def test_a_target_that_the_revision_has_not_is_a_miss_of_its_own(sound):
    now, before = reports_of(sound), reports_of(sound)
    now["validate/new.json"], now["benchmark/new.json"] = now[f"validate/{TARGET}.json"], TIMED
    lost, uncompared = compare_revisions([TARGET, "new"], Reports(now.get), Reports(before.get), CiConfig())
    assert list(lost) == [TARGET]
    assert [str(miss) for miss in uncompared["new"]] == [f"all not compared: that revision has no result of it {MEANT}"]


def test_another_evaluation_set_is_a_miss_of_its_own_where_top1_is_not_compared(sound):
    def fewer(reports):
        TOP1(reports)
        reports[f"validate/{TARGET}.json"]["evaluation"] = "other images, labels, classes or templates"

    miss = f"top-1 not compared, its drop is: another evaluation set {MEANT}"
    assert lost_since(sound, answered(top1=10.0), fewer) == ([], [miss])


def test_a_batch_size_that_is_not_timed_any_more_is_a_miss_of_its_own(sound):
    gone = lost_since(sound, lambda reports: reports[f"benchmark/{TARGET}.json"]["towers"].pop("text"))
    assert gone == ([], [f"timings not compared: not timed any more: text, batch 1 {MEANT}"])


def test_a_revision_of_another_checkpoint_is_known_by_its_weights(sound):
    def reports(**files):
        return Reports({f"validate/{REFERENCE}.json": sound | {"files": files}}.get)

    now = reports(**{"config.json": "1", "model.safetensors": "a"})
    assert other_weights(now, reports(**{"config.json": "2", "model.safetensors": "a"})) == []
    assert other_weights(now, reports(**{"model.safetensors": "b"})) == ["model.safetensors"]
    assert other_weights(now, reports(**{"a.safetensors": "a"})) == ["a.safetensors", "model.safetensors"]
    assert other_weights(now, Reports({}.get)) == other_weights(reports(), now) == []


def test_a_revision_without_results_is_refused(sound):
    with pytest.raises(DeployError, match="has no result of any required target"):
        compare_revisions([TARGET], Reports(reports_of(sound).get), Reports({}.get), CiConfig())


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "targets.json").write_text('{"first": 1}')
    who = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "First"]):
        subprocess.run(["git", *words], check=True)
    (tmp_path / "reports" / "targets.json").write_text('{"second": 2}')
    return tmp_path / "reports"


def test_former_reports_are_read_from_git(repository):
    former = at_revision("HEAD", repository.relative_to(repository.parent))
    assert former.content("targets.json") == {"first": 1}
    assert former.content("validate/ort-fp32.json") is None


@pytest.mark.parametrize("revision", ["HEAD~1", "no-such-branch", "--all", ""])
def test_a_revision_that_git_does_not_know_is_named(repository, revision):
    with pytest.raises(
        DeployError,
        match=f"git knows no revision '{revision}' here, and DVC no experiment of that name: give a revision",
    ):
        at_revision(revision, repository)


def test_make_hands_on_a_revision_even_where_it_is_empty():
    """As of a variable that CI lacks: without it the gate would compare nothing, and pass."""
    for words, said in (
        (["AGAINST="], "--against ''"),
        (["AGAINST=HEAD~1"], "--against 'HEAD~1'"),
        ([], "clip_deploy gate"),
    ):
        command = ["make", "--no-print-directory", "-n", "gate", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1].strip().endswith(said)


def test_what_dvc_calls_stale_is_said_in_words():
    assert in_words("changed command") == "changed command"
    changed = {"changed deps": {"params.yaml": {"onnx.opset": "modified"}, "stages/a.py": "modified"}}
    assert in_words(changed) == "changed deps: params.yaml onnx.opset, stages/a.py"


def shut_by(gate, path):
    """The only miss where the last byte of a file is another, which is then put back."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, out, _ = gate()
    path.write_bytes(whole)
    assert code == 1
    return out.splitlines()[-1]


def seed_regression(project, target):
    """A little noise on a weight of a target, as if its stage had built it so; all behind it runs again."""
    folder = project.path / "artifacts" / target
    disturb(folder / "vision.onnx", 0.03)
    described = json.loads((folder / "target.json").read_text())
    described["sha256"]["vision.onnx"] = sha256(folder / "vision.onnx")
    (folder / "target.json").write_text(json.dumps(described))
    project.run("dvc", "commit", "--force", f"optimize@{target}")
    assert f"validate@{target}" in project.repro()


def steady(project):
    """Every timing as on a machine that did nothing else, committed: the tests keep theirs busy."""
    for path in (project.path / "reports/benchmark").glob("*.json"):
        record = json.loads(path.read_text())
        for each in (each for sizes in record.get("towers", {}).values() for each in sizes.values()):
            each |= {
                "p50_ms": 1.0,
                "speedup": 1.0,
                "speedup_low": 0.99,
                "speedup_high": 1.01,
                "reference_p50_ms": 1.0,
            }
        path.write_text(json.dumps(record))
    project.run("dvc", "commit", "--force", "benchmark")
    assert "report" in project.repro()
    project.run("git", "commit", "-q", "-a", "-m", "On a quiet machine")


FRESH = "all results are of the present settings, code, files, libraries, machine, weights and data"


def asks_less(project, gate):
    """What a branch takes back of the gate is named, on the terminal and in the comment."""
    project.edit("params.yaml", "  - ort-fp16\n  - ort-int8-dynamic", "  - ort-int8-dynamic")
    project.edit("params.yaml", "max_cosine_drop: 0.001", "max_cosine_drop: 0.5")
    code, out, _ = gate("--against", "HEAD", "--allow-uncompared", "--comment", "comment.md")
    assert code == 0
    said = ["ci.required: -ort-fp16  (params.yaml)", "ci.max_cosine_drop: 0.001 -> 0.5  (params.yaml)"]
    assert out.splitlines()[:2] == [f"note: the gate asks otherwise than at HEAD: {line}" for line in said]
    lines = "\n".join(f"- {line}" for line in said)
    assert f"### The gate asks otherwise than at HEAD\n\n{lines}\n\n" in (project.path / "comment.md").read_text()
    project.run("git", "checkout", "-q", "params.yaml")


@pytest.mark.slow
def test_the_gate_of_a_built_project_opens_and_shuts(built, tmp_path, outcomes, monkeypatch, capsys):
    project = built.copy(tmp_path / "project")
    monkeypatch.chdir(project.path)
    steady(project)

    def gate(*words):
        capsys.readouterr()
        return main(["gate", *words]), *capsys.readouterr()

    assert gate("--fresh") == (0, f"{FRESH}\n", "")
    code, out, err = gate("--against", "HEAD")
    assert (code, err) == (0, "")
    assert "8 required targets pass, and none lost since HEAD" in out
    assert gate("--against", "")[0] == 1
    assert shut_by(gate, project.path / "assets/tiny-shapes/model.safetensors") == (
        "| `probe` | stale | model: what lies on this disk is not what was read  (reports/inputs.json) "
        "| run `dvc repro` |"
    )
    project.edit("reports/environment.json", '"cores": ', '"cores": 9')
    project.run("git", "commit", "-q", "-a", "-m", "On another machine")
    project.edit("reports/environment.json", '"cores": 9', '"cores": ')
    code, out, _ = gate("--against", "HEAD")
    assert code == 1
    assert out.splitlines()[-1].startswith("| `machine` | timings | not compared, another machine: hardware.cores: 9")
    code, out, _ = gate("--against", "HEAD", "--allow-uncompared")
    assert code == 0
    assert out.startswith("note: machine: timings not compared, another machine: hardware.cores: 9")
    project.run("git", "reset", "-q", "HEAD~1")
    sha = json.loads((project.path / "reports/validate/torch-fp32.json").read_text())["files"]["model.safetensors"]
    project.edit("reports/validate/torch-fp32.json", sha, "0" * 64)
    project.run("git", "commit", "-q", "-a", "-m", "Of another checkpoint")
    project.edit("reports/validate/torch-fp32.json", "0" * 64, sha)
    code, out, _ = gate("--against", "HEAD")
    assert code == 0
    assert out.startswith("note: HEAD has another checkpoint than `model: tiny-shapes` here (model.safetensors): two")
    project.run("git", "reset", "-q", "HEAD~1")
    asks_less(project, gate)
    seed_regression(project, "ort-fp16")
    code, out, err = gate("--against", "HEAD")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]
    assert code == 1
    assert err.startswith("error: not all of the 8 required targets pass: the table above says why")
    rows = [row for row in rows if row[1] != "timings"]  # the tests may keep the machine busy
    assert {target for target, *_ in rows} == {"`ort-fp16`"}
    limits = [limit for _, quantity, _, limit in rows if quantity == "vision: cosine"]
    assert limits[0].startswith("< 0.999 (gates.fp16.min_cosine)")
    assert limits[1] == "< 1.000000 by more than 0.001 (ci.max_cosine_drop)"
    for row in rows:
        outcomes.regression(*row, code)
    project.edit("params.yaml", "opset: 18", "opset: 20")
    code, out, err = gate("--fresh")
    assert (code, err) == (1, "error: stale: export_onnx\n")
    assert out.splitlines()[2:] == ["| `export_onnx` | stale | changed deps: params.yaml onnx | run `dvc repro` |"]
    assert "| `export_onnx` | stale | changed deps: params.yaml onnx | run `dvc repro` |" in gate()[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--comment", "c.md"], "--comment says what changed since a revision: give --against too"),
        (["--against", "HEAD", "--comment", "docs"], "--comment is docs, a folder: give a file"),
        (["--allow-uncompared"], "--allow-uncompared is about what cannot be compared with a revision: give --against"),
        (["--page", "https://example.com"], "--page is a link of the comment: give --comment too"),
        (["--fresh", "--page", "https://example.com"], "--fresh only looks for stale results: give it without"),
    ],
)
def test_an_option_that_will_not_do_is_refused(words, said, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["gate", *words]) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}")
