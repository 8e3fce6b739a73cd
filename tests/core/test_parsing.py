"""A file of another version gets one line that says what of it is; what was written is read as it was."""

import json
from dataclasses import dataclass, field, replace
from math import isnan, nan

import pytest
from support.records import checked, judged, measured, parity, timing
from support.stages import run_stage

from clip_deploy.core.config import Device, RecommendConfig
from clip_deploy.core.errors import ConfigError, DeployError
from clip_deploy.core.json_files import rounded, write_json
from clip_deploy.core.parsing import FLAT, parse, plain, read_record
from clip_deploy.core.records import Benchmark, Timing, Validation

WHERE = "reports/validate/ort-fp32.json"


def through_a_file(record):
    return json.loads(json.dumps(rounded(plain(record))))


def test_a_record_comes_back_from_its_file_as_it_was():
    record = parse(Validation, checked(files={"a": "0"}, size_mb=3.5), WHERE)
    assert record.measured == measured()
    assert parse(Validation, through_a_file(record), WHERE) == record
    timed = Benchmark(status="measured", towers={"text": {1: timing(), 32: timing(p99_ms=3.0)}})
    assert parse(Benchmark, through_a_file(timed), WHERE) == timed


def test_what_was_not_measured_does_not_stand_in_the_file():
    assert plain(Benchmark(status="unavailable", reason="no GPU")) == {"status": "unavailable", "reason": "no GPU"}
    assert "zero_shot" not in plain(measured(zero_shot=None))


def test_a_number_that_is_nan_stays_one_and_is_not_taken_for_what_was_not_measured():
    record = replace(parse(Validation, checked(), WHERE), size_mb=nan, measured=measured(length_error=nan, flips=nan))
    back = parse(Validation, through_a_file(record), WHERE)
    assert isnan(back.size_mb)
    assert isnan(back.measured.length_error)
    assert isnan(back.measured.flips)


def test_null_in_a_setting_is_no_limit():
    limits = RecommendConfig(max_top1_drop=None, device=Device.cpu)
    assert plain(limits) == {"batch": 1, "max_top1_drop": None, "device": "cpu"}
    assert parse(RecommendConfig, plain(limits), WHERE, null_is_nan=False) == limits


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "it is a list, not a dictionary"),
        ({**checked(), "score": 1}, "it has an unknown entry score"),
        ({key: value for key, value in checked().items() if key != "trained"}, "it lacks trained"),
        ({key: value for key, value in checked().items() if key != "shapes"}, "it lacks shapes"),
        (checked(reasons="none"), "reasons is 'none', not a list"),
        (checked(trained=1), "trained is 1, not bool"),
        (checked(flips="3 %"), "flips is '3 %', not float"),
        (checked(flips=True), "flips is True, not float"),
        (checked(shapes=[1.0]), "shapes is a list, not a dictionary"),
        (checked(parity={"text": {**plain(parity()), "finite": None}}), "parity.text.finite is null, not bool"),
        (checked(parity={"text": {"cosine_min": 1.0}}), "it lacks parity.text.cosine_p1"),
        (checked(status=None), "status is null, not str"),
    ],
)
def test_a_record_of_another_version_is_named_in_one_line(content, said):
    with pytest.raises(ConfigError) as error:
        parse(Validation, content, WHERE)
    assert str(error.value) == f"{WHERE} is of another version of clip-deploy ({said}): run `dvc repro`"


def test_keys_that_are_numbers_are_read_as_numbers():
    assert parse(dict[int, Timing], {"8": plain(timing())}, WHERE) == {8: timing()}
    with pytest.raises(ConfigError, match="it has an entry eight, which is not int"):
        parse(dict[int, Timing], {"eight": plain(timing())}, WHERE)


def test_a_subclass_knows_the_entries_of_its_base():
    assert parse(type(judged()), plain(judged()), WHERE) == judged()


def test_a_mistake_of_our_own_keeps_its_traceback():
    """A KeyError is never taken for a file of another version."""

    class Broken(dict):
        def items(self):
            raise KeyError("of our own")

    with pytest.raises(KeyError, match="of our own"):
        parse(dict[str, float], Broken(), WHERE)


def test_a_stage_that_reads_a_record_of_another_version_fails_in_one_line(tmp_path):
    write_json(tmp_path / "validate" / "ort-fp32.json", checked() | {"new": 1})
    write_json(tmp_path / "benchmark" / "ort-fp32.json", plain(Benchmark(status="unavailable", reason="no GPU")))
    words = [f"{name}={tmp_path}" for name in ("built", "evaluation", "portable", "shipped", "output")]
    words += [f"validation={tmp_path / 'validate'}", f"benchmark_results={tmp_path / 'benchmark'}"]
    done = run_stage("recommend", "targets=[ort-fp32]", *words)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'validate' / 'ort-fp32.json'} is of another version of clip-")
    assert done.stderr.count("\n") == 1


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DeployError, match=r"cannot read .*x.json .*; run `dvc repro`"):
        read_record(Benchmark, tmp_path / "x.json")


@dataclass(frozen=True)
class Size:
    height: int
    width: int


@dataclass(frozen=True)
class Picture:
    name: str
    size: Size = field(metadata=FLAT)


def test_entries_of_a_dataclass_that_must_be_there_are_missed_one_and_all():
    assert parse(Picture, {"name": "a", "height": 2, "width": 3}, WHERE) == Picture("a", Size(2, 3))
    for content in ({"name": "a"}, {"name": "a", "width": 3}):
        with pytest.raises(ConfigError, match="it lacks height"):
            parse(Picture, content, WHERE)
