"""dvc.yaml is held against the code: what a stage imports and reads is what DVC watches, no more and no less."""

import ast
import re
from dataclasses import fields
from importlib import import_module
from typing import get_type_hints

import pytest
import yaml
from support.project import ROOT

from clip_deploy.core.config import BUILDERS, GROUPS, is_per_target, sections
from clip_deploy.core.environment import LIBRARIES
from tools.deps import files_of, versions_of, with_deps

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
SCRIPTS = sorted({path.stem for path in (ROOT / "stages").glob("[a-z]*.py")})
WATCHED = [name for name in SCRIPTS if name != "probe"]  # probe always runs


def stage(name):
    entry = STAGES[name]
    return entry.get("do", entry)


def test_every_stage_has_its_script_and_every_script_its_stage():
    assert sorted(STAGES) == SCRIPTS


def test_dvc_yaml_has_the_code_and_the_versions_that_each_stage_needs():
    text = (ROOT / "dvc.yaml").read_text()
    assert with_deps(text) == text, "run `make deps`"


def test_a_missing_and_a_needless_dep_are_put_right_and_all_else_stays():
    text = (ROOT / "dvc.yaml").read_text()
    wrong = text.replace("      - clip_deploy/checkpoint\n", "", 1).replace("software.tokenizers, ", "", 1)
    wrong = wrong.replace("      - stages/package.py\n", "      - stages/package.py\n      - clip_deploy/timing\n")
    assert wrong.count("\n") == text.count("\n")
    assert with_deps(wrong) == text


def test_a_library_that_nobody_lists_is_refused(monkeypatch):
    monkeypatch.setattr("tools.deps.LIBRARIES", tuple(name for name in LIBRARIES if name != "torch"))
    with pytest.raises(SystemExit, match="download imports torch: add it to LIBRARIES"):
        versions_of("download")


EVERY_FILE = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "clip_deploy").rglob("*.py"))


@pytest.mark.parametrize("name", WATCHED)
def test_a_stage_watches_all_that_it_can_import(name):
    deps = stage(name)["deps"]
    assert not [file for file in files_of(name) if not any(file == dep or file.startswith(f"{dep}/") for dep in deps)]


def runs_again(file):
    """The stages that DVC would run after an edit of this file, before any of them wrote other files than before."""
    return {name for name in WATCHED if any(file == dep or file.startswith(f"{dep}/") for dep in stage(name)["deps"])}


@pytest.mark.parametrize("file", [file for file in EVERY_FILE if file.startswith("clip_deploy/rewrites/")])
def test_an_edit_of_a_rewrite_builds_targets_and_times_none(file):
    assert runs_again(file) <= {"export_aoti", "export_openvino", "optimize", "build_engine"}
    assert runs_again(file) or file.endswith("__init__.py")


def test_an_edit_of_the_reports_words_runs_the_report_alone():
    assert runs_again("clip_deploy/report/markdown.py") == {"report"}


def test_the_library_does_not_know_hydra():
    for path in (ROOT / "clip_deploy").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) hydra", path.read_text(), re.MULTILINE), path


def test_the_packages_own_file_holds_no_code():
    """It is imported by everything and watched by nothing."""
    body = ast.parse((ROOT / "clip_deploy" / "__init__.py").read_text()).body
    assert [type(node) for node in body] == [ast.Expr]


@pytest.mark.parametrize("name", WATCHED)
def test_a_stage_watches_exactly_the_settings_it_reads(name):
    schema = import_module(f"stages.{name}").Settings
    expected = set()
    for key in sections(schema):
        templated = "foreach" in STAGES[name] and is_per_target(key)
        expected.add(f"{key}.${{key}}" if templated else key)
        if key in GROUPS:
            expected.add(f"conf/{key}/${{{key}}}.yaml")
    listed = set()
    for entry in stage(name).get("params", []):
        listed |= {entry} if isinstance(entry, str) else {file for file in entry if file.startswith("conf/")}
    assert listed == expected


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_path_of_a_command_is_a_dep_or_an_out(name):
    entry = stage(name)
    words = dict(word.split("=", 1) for word in entry["cmd"].split() if "=" in word)
    outs = [out if isinstance(out, str) else next(iter(out)) for out in entry.get("outs", [])]
    known = [*entry.get("deps", []), *outs]
    for entry_param in entry.get("params", []):
        known += [] if isinstance(entry_param, str) else list(entry_param)
    for key, value in words.items():
        if "/" in value or value == "reports":
            assert any(item == value or item.startswith(f"{value}/") for item in known), f"{name}: {key}={value}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_setting_that_no_section_fills_is_given_on_the_command_line(name):
    schema = import_module(f"stages.{name}").Settings
    words = {word.split("=", 1)[0] for word in stage(name)["cmd"].split() if "=" in word}
    assert words == {item.name for item in fields(schema)} - set(sections(schema))
    assert set(get_type_hints(schema)) >= words


def test_no_measured_result_is_cached():
    """The run cache would replay an old timing as a new one. A target's manifest goes where the target goes."""
    for name in ("probe", "validate", "benchmark", "end_to_end", "validate_serving", "validate_triton", "report"):
        for out in stage(name)["outs"]:
            assert out == "artifacts/${item}.manifest.json" or next(iter(out.values()))["cache"] is False


def test_only_what_is_compiled_or_rounded_for_a_machine_is_built_again_on_another():
    watched = {}
    for name in WATCHED:
        for entry in stage(name).get("params", []):
            versions = entry.get("reports/environment.json", []) if isinstance(entry, dict) else []
            watched |= {name: keys} if (keys := {key for key in versions if key.startswith("hardware.")}) else {}
    assert watched == {
        "export_aoti": {"hardware.instruction_sets", "hardware.gpus"},
        "export_openvino": {"hardware.instruction_sets"},
        "quantize": {"hardware.instruction_sets"},
        "build_engine": {"hardware.gpus"},
    }


def test_target_keys_are_slugs():
    for section in BUILDERS:
        assert all(re.fullmatch(r"[a-z0-9-]+", key) for key in PARAMS[section])
