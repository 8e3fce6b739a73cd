"""dvc.yaml is held against the code: what a stage imports and reads is what DVC watches, no more and no less."""

import ast
import re
import sys
from dataclasses import fields
from importlib import import_module
from typing import get_type_hints

import grimp
import pytest
import yaml
from conftest import COMMANDS, ROOT

from clip_deploy.core.config import BUILDERS, GROUPS, is_per_target, sections
from clip_deploy.core.environment import LIBRARIES
from clip_deploy.runtimes import RUNTIMES

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
SCRIPTS = sorted({path.stem for path in (ROOT / "stages").glob("[a-z]*.py")} - COMMANDS)
WATCHED = [name for name in SCRIPTS if name != "probe"]  # probe always runs

# What the import statements do not show: modules opened by name, processes and files.
RUNTIME_MODULES = {f"clip_deploy.runtimes.{name}" for name in RUNTIMES}
EXTRA = {
    "prepare": {"clip_deploy.runtimes.eager"},  # it opens the checkpoint
    "validate": RUNTIME_MODULES,
    "benchmark": {"clip_deploy.worker", *RUNTIME_MODULES},
    "end_to_end": RUNTIME_MODULES,
    "recommend": RUNTIME_MODULES,
    "validate_triton": {"clip_deploy.serving.client"},  # it runs in the server's environment
}
SHARED = "clip_deploy.core"  # watched as a folder: every stage uses most of it
SERVED = {path.relative_to(ROOT).as_posix() for path in (ROOT / "clip_deploy" / "serving" / "models").glob("*.py")}
DATA_FILES = {"report": {"clip_deploy/report.html"}, "triton_repository": SERVED, "triton_engines": SERVED}


def stage(name):
    entry = STAGES[name]
    return entry.get("do", entry)


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("stages", "clip_deploy", exclude_type_checking_imports=True, cache_dir=None)


def path_of(module):
    parts = ROOT.joinpath(*module.split("."))
    return f"{'/'.join(module.split('.'))}/__init__.py" if parts.is_dir() else f"{'/'.join(module.split('.'))}.py"


def needed(graph, name):
    modules = {f"stages.{name}", *EXTRA.get(name, set())}
    for module in list(modules):
        modules |= graph.find_upstream_modules(module)
    if any(module.startswith(SHARED) for module in modules):
        modules |= {SHARED, *graph.find_descendants(SHARED)}
    return {path_of(module) for module in modules - {"clip_deploy"}} | DATA_FILES.get(name, set())


def watched(name):
    files = set()
    for dep in stage(name)["deps"]:
        if dep.startswith(("stages", "clip_deploy")):
            path = ROOT / dep
            files |= {f"{dep}/{file.name}" for file in path.glob("*.py")} if path.is_dir() else {dep}
    return files


@pytest.mark.parametrize("name", WATCHED)
def test_a_stage_depends_on_exactly_the_code_it_can_run(graph, name):
    assert watched(name) == needed(graph, name)


# Libraries that change no result: what they read are settings, files of a pinned revision or progress.
TOOLS = {"hydra", "omegaconf", "yaml", "huggingface_hub", "tqdm"}
ELSEWHERE = {"tritonclient"}  # in the server's environment, whose versions are in reports/inputs.json
IDLE = {  # stages in which a library decides nothing: it checks what was made, or comes with a module for others
    "onnxruntime": {"prepare", "export_onnx"},
    "onnx": {"prepare"},
    "onnx_ir": {"prepare"},
    "tokenizers": {"export_torch", "export_torchscript"},
    "pillow": {  # pictures are read by prepare, and by what depends on all libraries
        *("download", "export_torch", "export_torchscript", "export_aoti", "export_openvino", "export_onnx"),
        *("optimize", "quantize", "build_engine", "triton_engines"),
    },
}


def imported(path):
    """The top-level names of other people's modules that a file imports when it runs."""
    tree = ast.parse(path.read_text())
    typing = {id(node) for test in ast.walk(tree) if is_typing(test) for node in ast.walk(test)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in typing:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing:
            found.add(node.module)
    return {name.split(".")[0] for name in found} - {*sys.stdlib_module_names, "stages", "clip_deploy"}


def is_typing(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("name", WATCHED)
def test_a_stage_depends_on_every_library_that_it_imports(graph, name):
    files = [ROOT / file for file in needed(graph, name) - SERVED if file.endswith(".py")]
    used = {"pillow" if library == "PIL" else library for file in files for library in imported(file)}
    used -= {library for library in used if name in IDLE.get(library, ())} | TOOLS | ELSEWHERE
    assert used <= set(LIBRARIES), "add it to LIBRARIES of core/environment.py, or to TOOLS"
    if "reports/environment.json" not in stage(name)["deps"]:
        keys = [entry.get("reports/environment.json", []) for entry in stage(name)["params"] if isinstance(entry, dict)]
        assert {f"software.{library}" for library in used} <= {key for part in keys for key in part}


def test_the_library_knows_neither_the_stages_nor_hydra(graph):
    assert not [
        module
        for module in graph.modules
        if module.startswith("clip_deploy") and graph.find_upstream_modules(module) & {"stages"}
    ]
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
    for name in ("probe", "validate", "benchmark", "end_to_end", "validate_triton", "report"):
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
