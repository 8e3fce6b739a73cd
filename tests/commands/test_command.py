"""The one command: what all of its parts keep."""

import re
import subprocess
import sys
from importlib import import_module

import pytest
from support.project import ROOT

from clip_deploy.__main__ import COMMANDS, LIGHT, main

SHARED = {"__init__", "opened", "project"}


def test_each_module_is_a_command_and_its_help_begins_with_the_line_in_the_list():
    modules = {path.stem for path in (ROOT / "clip_deploy" / "commands").glob("*.py")} - SHARED
    assert modules == set(COMMANDS)
    for name, summary in COMMANDS.items():
        assert import_module(f"clip_deploy.commands.{name}").__doc__.startswith(f"{summary}\n\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_itself_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert said.startswith(f"usage: clip-deploy {name} ")
    assert f": clip-deploy {name} " in said[said.index("\nexample") :]


def test_the_whole_command_lists_its_parts_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"\n    {name} " in said for name in COMMANDS)
    for code in (0, 1, 2, 3, 130, 141):
        assert f"\n  {code} " in said[said.index("exit codes:") :]


@pytest.mark.parametrize(
    "words", [[], ["train"], ["verify"], ["compare", "a"], ["gate", "--against"], ["device", "a", "b"]]
)
def test_wrong_usage_ends_with_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: clip-deploy")


@pytest.mark.parametrize(
    ("words", "lacks"),
    [
        (["why"], "params.yaml"),
        (["gate"], "params.yaml"),
        (["apply", "ort-fp16"], "params.yaml"),
        (["package", "ort-fp16", "--output", "out"], "params.yaml"),
        (["device", "cuda"], "params.yaml"),
    ],
)
def test_what_needs_the_project_says_so_elsewhere(words, lacks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert capsys.readouterr().err == (
        f"error: there is no {lacks} here: run it in the project's folder, a clone of its repository\n"
    )
    assert not list(tmp_path.iterdir())


WITHOUT = """
import sys
sys.modules[sys.argv.pop(1)] = None
from clip_deploy.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("library", "words", "install"),
    [
        ("dvc.repo", ["why"], "'clip-deploy[pipeline]'"),
        ("omegaconf", ["gate"], "'clip-deploy[pipeline]'"),
        ("yaml", ["apply", "ort-fp16"], "'clip-deploy[pipeline]'"),
        ("tokenizers", ["predict", "a.png"], "clip-deploy"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_what_to_install(library, words, install):
    command = [sys.executable, "-c", WITHOUT, library, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"error: {words[0]} needs {library}, which is not installed: pip install {install}\n"


IMPORTS = """
import sys
from importlib import import_module
for name in sys.argv[1:]:
    import_module(f"clip_deploy.commands.{name}")
    print(name, *sorted({"dvc", "hydra", "omegaconf", "yaml", "onnx", "torch", "transformers"} & set(sys.modules)))
"""


def test_what_a_deployment_runs_imports_no_library_of_the_pipeline():
    """One after the other: the first line with more than a name is the command's that imports one."""
    command = [sys.executable, "-c", IMPORTS, *LIGHT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == [*LIGHT, ""]


def test_what_readmes_examples_import_is_there():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    imports = [line for block in blocks for line in block.splitlines() if line.startswith("from clip_deploy")]
    assert len(imports) >= 3
    for line in imports:
        exec(line, {})
