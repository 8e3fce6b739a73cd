"""README and docs/: links lead somewhere, commands and examples exist, what repeats code or reports is up to date."""

import json
import os
import re
import shlex
import shutil
import statistics
import sys
import tomllib
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from dvc.cli import DvcParserError
from dvc.cli.parser import get_main_parser
from support.project import TINY

from clip_deploy.__main__ import parsers
from clip_deploy.data.scenes import CLASSES, render
from tools.docs import PICTURE, advised, pages, pictured, reports, settings_page, stale, written_by_hand
from tools.tables import with_rows

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
GENERATED = sorted((ROOT / "docs/reference").glob("*.md"))
WRITTEN = written_by_hand()
PAGES = [*WRITTEN, *(path for path in GENERATED if path not in WRITTEN)]
MAX_LINES, MAX_MEDIAN_WORDS, MAX_PICTURE = 160, 12, 200_000
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:clip-deploy|make|dvc|python -m) [^`\n]+)`")
PLACEHOLDER = re.compile(r"\b(?:COMMAND|STAGE|NAME)\b(?!=)|…")
# Programs that are not ours, of which nothing is checked.
OTHERS = {
    "cat",
    "chmod",
    "cp",
    "curl",
    "docker",
    "git",
    "grep",
    "head",
    "kubectl",
    "mkdir",
    "openssl",
    "printf",
    "serve",
    "source",
}


def by_name(path):
    return path.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=by_name)


def read(path):
    return path.read_text(encoding="utf-8")


# Links.


def anchors(text):
    """The ids that GitHub and MyST give to headings."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    plain = (LINK.sub("", heading).lower().replace("[", "") for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def broken(page):
    """Links of a page that lead nowhere."""
    text = read(page)
    for target in LINK.findall(re.sub(r"`[^`]*`", "", BLOCK.sub("", text))):
        name, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        aim = (page.parent / name).resolve() if name else page
        if not aim.exists() or (anchor and anchor not in anchors(read(aim))):
            yield target


@every_page
def test_links_lead_somewhere(page):
    assert list(broken(page)) == []


def test_a_link_to_a_missing_page_or_heading_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Here it is\n[a](#here-it-is) [b](#there) [c](page.md#here-it-is) [d](other.md) [e](page.md#no)\n"
    )
    assert list(broken(page)) == ["#there", "other.md", "page.md#no"]


def test_llms_txt_names_every_page():
    named = {(ROOT / target).resolve() for target in LINK.findall(read(ROOT / "llms.txt"))}
    folders = {"guides", "concepts", "reference"}
    apart = {path for path in PAGES if path.parent.name in folders and path.stem != "index"}
    assert list(broken(ROOT / "llms.txt")) == []
    assert sorted(map(by_name, apart - named)) == []


# Commands.


def commands(text):
    """The command lines of a page: of console blocks, and, with --help behind them, those that its prose names."""
    for kind, block in BLOCK.findall(text):
        if kind == "console":
            for entry in re.split(r"^ *\$ ", re.sub(r"\\\n", " ", block), flags=re.MULTILINE)[1:]:
                line, _, _ = entry.partition("\n")
                yield entry.strip() if line.count('"') % 2 else line  # a string of several lines, or answers behind it
    prose = BLOCK.sub("", text)
    for line in INLINE.findall(prose):
        if not PLACEHOLDER.search(line):
            yield (
                f"{line.removesuffix(' -S')} --help" if re.match(r"clip-deploy|dvc", line) and "|" not in line else line
            )


def answers(block):
    """The lines of a console block that are no commands: what the last one prints."""
    entries = re.split(r"^ *\$ ", re.sub(r"\\\n", " ", block), flags=re.MULTILINE)[1:]
    line, _, rest = entries[-1].partition("\n")
    return [] if line.count('"') % 2 else rest.splitlines()


def simple_commands(line):
    """The words of each command of a line, without what stands around it in a shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    lexer.commenters = "#" if " # " in line else ""
    words = []
    for word in lexer:
        if re.fullmatch(r"[&|;]+", word):
            yield words
            words = []
        elif re.fullmatch(r"[<>]+", word):
            next(lexer)
        elif words or not re.fullmatch(r"\w+=\S*", word):  # of the environment
            words.append(word)
    yield words


def check_line(line):
    for words in simple_commands(line):
        check(words)


def check(words):
    """Raise where a command has no such name, option or setting."""
    program, *given = words
    if program == "clip-deploy":
        _ends_well(lambda: _parse(given))
    elif program == "dvc":
        _ends_well(lambda: get_main_parser().parse_args([word for word in given if word != "..."]))
        _check_settings([value for option, value in pairwise(given) if option == "-S"])
    elif program == "make":
        known = re.findall(r"^([$()\w./-]+):", read(ROOT / "Makefile").replace("$(VENV)", ".venv"), re.MULTILINE)
        assert [word for word in given if "=" not in word and word not in known] == []
    elif program == "python":
        assert given[0] == "-c" or (given[0] == "-m" and find_spec(given[1]))
    elif program.endswith("pip"):
        extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
        asked = re.findall(r"(?:clip-deploy|\.)\[([\w,-]+)\]", " ".join(given))
        assert {name for names in asked for name in names.split(",")} <= set(extras)
    elif program == "sed":
        _check_sed(given)
    elif not (program in OTHERS or (ROOT / program).exists() or program == "$EDITOR"):
        raise AssertionError(f"unknown program {program}")


def _parse(given):
    """With the parsers of `clip-deploy`, whatever lies on this disk."""
    chosen = next((word for word in given if not word.startswith("-")), None)
    whole, commands = parsers(chosen)
    if chosen not in commands:
        return whole.parse_args(given)
    for action in commands[chosen]._actions:
        action.type = None  # some look whether a folder is there
    unknown = {word for word in given if word.startswith("--")} - set(commands[chosen]._option_string_actions)
    assert not unknown, f"{chosen} has no {', '.join(unknown)}"
    return commands[chosen].parse_intermixed_args([word for word in given if word != chosen])


def _ends_well(parse):
    try:
        parse()
    except DvcParserError as error:
        raise AssertionError("DVC refuses it") from error
    except SystemExit as end:
        if end.code:
            raise AssertionError("the parser refuses it") from end


def _check_settings(overrides):
    for override in overrides:
        where, _, _ = override.partition("=")
        path, _, key = where.rpartition(":")
        content = yaml.safe_load(read(ROOT / (path or "params.yaml")))
        for part in key.split("."):
            assert part in content, f"{path or 'params.yaml'} has no {key}"
            content = content[part]


def _check_sed(given):
    """A replacement in a file of ours finds something to replace."""
    if "-i" in given:
        script, path = given[given.index("-i") + 1 :]
        pattern = script[2:].partition(script[1])[0]
        assert re.search(pattern, read(ROOT / path), re.MULTILINE), f"{path} has nothing like {pattern}"


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """DVC's parser looks at the command line of the process too, which is pytest's."""
    monkeypatch.setattr(sys, "argv", ["dvc"])


@every_page
def test_commands_exist(page, capsys):
    wrong = []
    for line in commands(read(page)):
        try:
            check_line(line)
        except AssertionError as error:
            wrong.append(f"{line}: {error} {capsys.readouterr().err}")
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    [
        "clip-deploy embed photos",
        "clip-deploy serve artifacts/package --index-folder x",
        "clip-deploy nothing",
        "dvc exp run -S onnx.opsets=20",
        "dvc exp run -S conf/model/local.yaml:paths=x",
        "dvc exps show",
        "make nothing",
        "make repro && clip-deploy gates",
        "python -m benchmarks.nothing",
        "pip install '.[nothing]'",
        "sed -i 's/^opsets: 18/opset: 20/' params.yaml",
        "rm -rf artifacts",
    ],
)
def test_a_command_that_does_not_exist_is_found(line, capsys):
    with pytest.raises(AssertionError):
        check_line(line)


def test_workflows_run_targets_of_make_that_exist():
    nightly = yaml.safe_load(read(ROOT / ".github/workflows/nightly.yaml"))["jobs"]["run"]
    assert "make ${{ matrix.command }}" in [step.get("run") for step in nightly["steps"]]
    for command in nightly["strategy"]["matrix"]["command"]:
        check_line(f"make {command}")
    with pytest.raises(AssertionError):
        check_line("make nothing ARGS=--nightly")


def test_a_page_has_the_commands_that_it_shows():
    shown = "$ dvc repro && make gate  # both\nan answer\n$ dvc exp run \\\n    -S seed=1\n"
    text = f"Run `make repro`.\n\n```console\n{shown}```\n"
    assert [list(simple_commands(line)) for line in commands(text)] == [
        [["dvc", "repro"], ["make", "gate"]],
        [["dvc", "exp", "run", "-S", "seed=1"]],
        [["make", "repro"]],
    ]


@every_page
def test_what_examples_in_python_import_is_there(page):
    for kind, block in BLOCK.findall(read(page)):
        if kind == "python":
            compile(block, by_name(page), "exec")
            for line in block.splitlines():
                if line.startswith("from clip_deploy"):
                    exec(line, {})


RUN = re.compile(r"^<!-- run -->\n\n```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NIGHTLY = re.compile(r"^<!-- run nightly -->\n\n```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN_PAGES = (  # in this order: embeddings of the first are searched, and the last changes a setting
    *("get-started.md", "guides/package.md", "guides/own-program.md", "guides/search.md", "skill.md"),
    *("concepts/targets.md", "concepts/what-runs-again.md"),
)


@pytest.mark.slow
def test_marked_examples_run_and_answer_what_is_shown(built, tmp_path):
    project = built.copy(tmp_path / "project")
    for page in RUN_PAGES:
        for kind, block in RUN.findall(read(ROOT / "docs" / page)):
            if kind == "python":
                project.run("python", "-c", block)
            else:
                script = "\n".join(commands(f"```console\n{block}```"))
                done = project.run("bash", "-euo", "pipefail", "-c", script)
                assert done.stdout.endswith("".join(f"{line}\n" for line in answers(block)))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What stands where the documentation has a reader's own paths: the built-in checkpoint, and scenes by class."""
    folder = tmp_path_factory.mktemp("a reader")
    shutil.copytree(TINY, folder / "checkpoint")
    for index in range(96):
        named = folder / "scenes" / CLASSES[index % 12]
        named.mkdir(parents=True, exist_ok=True)
        render("mine", index, index % 12)[0].save(named / f"{index}.png")
    return {"/path/to/checkpoint": folder / "checkpoint", "/path/to/class-named-folders": folder / "scenes"}


@pytest.mark.nightly
@pytest.mark.parametrize("page", [path for path in WRITTEN if "<!-- run nightly -->" in read(path)], ids=by_name)
def test_long_examples_run(page, built, places, tmp_path):
    """As a reader runs them, from a project that has run once; a stop at the first command that fails."""
    project = built.copy(tmp_path / "project")
    for block in NIGHTLY.findall(read(page)):
        script = "\n".join(commands(f"```console\n{block}```"))
        for path, mine in places.items():
            script = script.replace(path, shlex.quote(str(mine)))
        project.run("bash", "-euo", "pipefail", "-c", script)
    shipped = json.loads((project.path / "reports/recommendation.json").read_text())
    assert set(shipped["ship"]) == {"vision", "text"}
    assert json.loads((project.path / "artifacts/package/manifest.json").read_text())["model"] == "local"


def test_every_marked_example_is_run():
    assert sum(read(path).count("<!-- run nightly -->") for path in WRITTEN) == sum(
        len(NIGHTLY.findall(read(path))) for path in WRITTEN
    )
    marked = {path.relative_to(ROOT / "docs").as_posix() for path in WRITTEN if "<!-- run -->" in read(path)}
    assert marked == {*RUN_PAGES}
    assert sum(read(ROOT / "docs" / page).count("<!-- run -->") for page in RUN_PAGES) == sum(
        len(RUN.findall(read(ROOT / "docs" / page))) for page in RUN_PAGES
    )


# What repeats code or reports.


def test_pages_that_repeat_code_or_reports_are_up_to_date():
    """`python -m tools.docs` writes them anew; the lines that are shown are those that it would write."""
    made = pages()
    wanted = {path: made[path].splitlines() for path in stale(made)}
    had = {path: read(path).splitlines() if path.exists() else [] for path in wanted}
    assert {by_name(path): [line for line in lines if line not in had[path]] for path, lines in wanted.items()} == {}


def test_a_row_that_reports_do_not_have_is_replaced():
    table = "| Precision | Cosine | Drop | Flips |\n| --- | ---: | ---: | ---: |\n"
    wrong = f"<!-- rows: conf/gates/standard.yaml -->\n\n{table}| `fp32` | 0.9 | 0.1 | 0.2 |\n\nNext."
    halves = ("fp32` | 0.9999 | 0.1 | 0.2", "fp16` | 0.999 | 0.5 | 1", "bf16` | 0.99 | 1 | 2")
    right = (*halves, "fp8` | 0.95 | 1 | 4", "int8` | 0.9 | 1.5 | 8")
    rows = "".join(f"| `{row} |\n" for row in right)
    assert with_rows(wrong) == f"<!-- rows: conf/gates/standard.yaml -->\n\n{table}{rows}\nNext."


def test_every_setting_says_what_it_means():
    """A comment behind it in config.py, or in the line before it."""
    rows = re.findall(r"^\| `(\w+)` \| `.*?` \| .*? \| (.*) \|$", settings_page(), re.MULTILINE)
    assert len(rows) > 100
    assert [name for name, meaning in rows if not meaning.strip()] == []


def test_the_citation_names_this_version():
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    cited = yaml.safe_load(read(ROOT / "CITATION.cff"))
    assert (cited["title"], cited["version"], cited["license"]) == (
        *(project[key] for key in ("name", "version", "license")),
    )
    assert f"\n## [{cited['version']}] - {cited['date-released']}\n" in read(ROOT / "CHANGELOG.md")


def test_reports_get_pages_of_their_own():
    assert reports()["nvidia-h200-kernels"] == "reports/hardware/nvidia-h200/kernels.md"
    assert len(set(reports().values())) == len(reports()) == len(list((ROOT / "reports").rglob("*.md")))


# Words.


def sentences(text):
    """Numbers of words of the sentences of a page: code, tables and headings aside, a piece of code as one word."""
    paragraphs = re.split(r"\n\n|\n(?=- |\d+\. )", BLOCK.sub("", text))
    prose = (part for part in paragraphs if not part.lstrip().startswith(("#", "|", "<", "!", "[")))
    for part in prose:
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", part.strip()))
        for sentence in re.split(r"(?<=[.!?])\s+", plain):
            if words := re.findall(r"[\w][\w'./-]*", sentence):
                yield len(words)


def test_readme_is_one_page_of_short_sentences():
    assert [path.name for path in READMES if read(path).count("\n") > MAX_LINES] == []
    assert statistics.median(sentences(read(READMES[0]))) <= MAX_MEDIAN_WORDS


def test_pages_are_written_in_short_sentences():
    medians = {by_name(path): statistics.median([*sentences(read(path)), 0, 0]) for path in WRITTEN}
    assert {name: median for name, median in medians.items() if median > MAX_MEDIAN_WORDS + 3} == {}


def test_both_languages_have_the_same_sections_commands_and_links():
    english, chinese = map(read, READMES)
    assert english.count("\n## ") == chinese.count("\n## ")
    assert [re.sub(" +#.*", "", line) for line in commands(english)] == [
        re.sub(" +#.*", "", line) for line in commands(chinese)
    ]
    assert {*LINK.findall(english)} - {"README.zh-CN.md"} == {*LINK.findall(chinese)} - {"README.md"}


def test_the_picture_of_the_report_is_small_and_shows_what_the_report_says():
    """`python -m tools.docs` takes it anew, where Chromium is."""
    assert os.path.getsize(PICTURE) < MAX_PICTURE
    assert pictured(PICTURE) == advised()
