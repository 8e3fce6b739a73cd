"""The one command: what all of its parts keep."""

import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
from support.project import ROOT

from clip_deploy import __main__ as command
from clip_deploy.__main__ import COMMANDS, LIGHT, main, parsed, parsers

SHARED = {"__init__", "opened", "paths", "project", "sweep_leftovers", "sweep_search", "sweep_workers"}


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


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_of_each_argument_what_it_is(name):
    arguments = parsers(name)[1][name]._actions
    assert len(arguments) > 1
    assert [argument.dest for argument in arguments if not argument.help] == []


@pytest.fixture
def beside_package(tmp_path, monkeypatch):
    """A folder in which the default of --package is there."""
    (tmp_path / "artifacts" / "package").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("beside_package")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["predict", "a.jpg", "--top", "2", "a dog", "a cat"], {"image": Path("a.jpg"), "texts": ["a dog", "a cat"]}),
        (["predict", "--top", "2", "a.jpg", "a dog", "--threads", "1"], {"image": Path("a.jpg"), "texts": ["a dog"]}),
        (["predict", "a.jpg", "--top", "2", "--", "-5 degrees"], {"image": Path("a.jpg"), "texts": ["-5 degrees"]}),
        (["predict", "a.jpg", "--top", "2"], {"image": Path("a.jpg"), "texts": []}),
        (["search", "photos", "--top", "2", "a dog"], {"source": "photos", "text": "a dog"}),
        (["embed", "photos", "--dtype", "int8", "out"], {"source": "photos", "output": "out", "dtype": "int8"}),
        (["publish", "new", "--withdraw", "served", "url"], {"subject": "new", "served": Path("served"), "url": "url"}),
        (["why", "--since", "HEAD", "ort-fp32"], {"target": "ort-fp32", "since": "HEAD"}),
    ],
)
def test_options_may_stand_between_a_commands_words(words, expected):
    found = vars(parsed(words, words[0]))
    assert expected.items() <= found.items()


@pytest.mark.usefixtures("beside_package")
def test_what_is_one_word_too_many_is_named_with_the_commands_own_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["search", "photos", "--top", "2", "a dog", "a cat"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("usage: clip-deploy search ")
    assert said.endswith("unrecognized arguments: a cat\n")


@pytest.mark.parametrize(("installed", "said"), [(True, version("clip-deploy")), (False, "of a folder that is not")])
def test_the_command_says_its_version(installed, said, monkeypatch, capsys):
    if not installed:
        monkeypatch.setattr(command, "version", lambda name: version(f"{name}-which-nobody-installed"))
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"clip-deploy {said}")


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
        (["merge", "main"], "params.yaml"),
        (["apply", "ort-fp16"], "params.yaml"),
        (["package", "ort-fp16", "--output", "out"], "params.yaml"),
        (["device", "cuda"], "params.yaml"),
    ],
)
def test_what_needs_the_project_says_so_elsewhere(words, lacks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert capsys.readouterr().err == (
        f"error: there is no {lacks} here: run this command in the project's folder, a clone of its repository\n"
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
        ("dvc.utils.serialize", ["apply", "ort-fp16"], "'clip-deploy[pipeline]'"),
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


def test_why_beside_a_dvc_command_that_runs_is_one_line(here, monkeypatch, capsys):
    from dvc.lock import LockError

    from clip_deploy.commands import why

    def pending(repo):
        raise LockError(
            "'artifacts' is busy, it is being blocked by:\n  (PID 1): dvc repro\n\nIf there are no processes"
        )

    monkeypatch.setattr(why, "Repo", lambda: None)
    monkeypatch.setattr(why, "pending", pending)
    assert main(["why"]) == 1
    said = "error: a `dvc` command is running in this project: ask again when it has ended\n"
    assert capsys.readouterr().err == said
