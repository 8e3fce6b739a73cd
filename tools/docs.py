"""Write what the documentation repeats: pages of docs/reference/, the picture of the rooms, and rows of tables.

usage: python -m tools.docs      (`make docs` runs it first)

Where the advice in reports/ is other than in README's picture of the report, that is taken anew, which needs Chromium.

Settings come from the dataclasses of core/config.py, commands from the parsers of `clip-deploy`, stages and `make` from
their own descriptions, rows of tables from reports/ (tools/tables.py). tests/test_docs.py holds the files to what this
would write. The pages of docs/results/ are copies of reports/, which Sphinx has made while it builds (docs/conf.py).
"""

import argparse
import ast
import hashlib
import html
import re
import shutil
import subprocess
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory

import grimp
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clip_deploy.__main__ import COMMANDS, EPILOG, LIGHT, parsers
from clip_deploy.checkpoint.lint import CODES
from clip_deploy.core import config, errors
from clip_deploy.core.files import write_text
from tools.tables import with_rows

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PICTURE, COLOURS = DOCS / "images/report.png", 64
WRITTEN = "<!-- Written by `python -m tools.docs`: change the code, not this page. -->\n\n"
YAML = {"None": "null", "True": "true", "False": "false"}


def main() -> None:
    made = pages()
    for path in stale(made):
        write_text(path, made[path])
        print(f"{path.relative_to(ROOT)} is written anew")
    if pictured(PICTURE) != advised():
        print(take_picture(PICTURE))


def advised() -> str:
    """What reports/report.md says above its table of targets, as a SHA-256: the picture of the report shows that."""
    text = (ROOT / "reports/report.md").read_text(encoding="utf-8").partition("\n## Targets\n")[0]
    return hashlib.sha256(text.encode()).hexdigest()


def pictured(path: Path) -> str | None:
    """What `advised` was when a picture was taken, which stands in the file."""
    with Image.open(path) as image:
        return image.info.get("advice")


def take_picture(path: Path) -> str:
    """Draw the top of reports/report.html by Chromium; what was done, in words."""
    chromium, name = shutil.which("chromium") or shutil.which("google-chrome"), path.relative_to(ROOT)
    if chromium is None:
        return f"{name} shows other advice than reports/report.html: run this again where Chromium is"
    mark = PngInfo()
    mark.add_text("advice", advised())
    with TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--screenshot={shot}"]
        command += [f"--user-data-dir={folder}/profile", "--window-size=1280,1000"]
        subprocess.run([*command, (ROOT / "reports/report.html").as_uri()], capture_output=True, check=True)
        with Image.open(shot) as image:
            image.convert("RGB").quantize(COLOURS).save(path, optimize=True, pnginfo=mark)
    return f"{name} is taken anew"


def pages() -> dict[Path, str]:
    """What each file that repeats code or reports should hold."""
    reference = DOCS / "reference"
    found = {path: with_rows(path.read_text(encoding="utf-8")) for path in written_by_hand()}
    return found | {
        reference / "settings.md": settings_page(),
        reference / "cli.md": cli_page(),
        reference / "stages.md": stages_page(),
        reference / "errors.md": errors_page(),
        reference / "modules.md": modules_page(),
        DOCS / "images/rooms.svg": rooms_picture(),
    }


def written_by_hand() -> list[Path]:
    """README in both languages, CONTRIBUTING, and the pages of docs/ that git keeps."""
    copies = reports()
    pages = [path for path in sorted(DOCS.rglob("*.md")) if path.parent.name != "results" or path.stem not in copies]
    return [*sorted(ROOT.glob("README*.md")), ROOT / "CONTRIBUTING.md", *pages]


def stale(made: dict[Path, str]) -> list[Path]:
    """Of the files that pages() gives, those that hold something else."""
    return [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def reports() -> dict[str, str]:
    """Every report in Markdown, by the name of its page in docs/results/: nvidia-h200-kernels of hardware/..."""
    paths = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "reports").rglob("*.md"))
    return {
        re.sub(r"^reports/(hardware/)?|(/report)?\.md$", "", path).replace("/", "-").replace("_", "-"): path
        for path in paths
    }


def results() -> dict[str, str]:
    """The pages of docs/results/, by file name: each report, with links to other files of its folder as their names."""
    found = {}
    for name, source in reports().items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = re.sub(r"\[([^\]]*)\]\((?!https?://|#)[^)]*\)", r"\1", text)
        title, _, rest = text.partition("\n")
        found[f"{name}.md"] = f"{title}\n\n*A copy of `{source}`.*\n{rest}"
    return found


# Settings.


def settings_page() -> str:
    module = ast.parse(source := Path(config.__file__).read_text(encoding="utf-8"))
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    lines = source.splitlines()
    text = WRITTEN + (
        "# Settings\n\n"
        "`params.yaml` holds the settings that you change. Four of its keys name a file: `model`, `data`, `benchmark`\n"
        "and `gates`. `model: local` selects `conf/model/local.yaml`.\n\n"
        "A setting without a default must be in the file. A wrong value stops the run before anything is built.\n"
        "Each table is followed by the messages of what is refused; … stands for the value given.\n\n"
        "## params.yaml\n\n"
    )
    text += _fields(classes["Params"], lines) + _refused(classes["Params"])
    for section, kind in _sections(classes["Params"]):
        text += f"## `{section}`\n\n" + _setting(classes[kind], lines)
    text += "## Files in conf/\n\nEach file is one choice. Its first line shows how to select it.\n\n"
    for group, schema in config.SCHEMAS.items():
        text += f"### conf/{group}/\n\n{_choices(group)}" + _setting(classes[schema.__name__], lines)
    for group in ("devices", "sweep"):
        text += f"### conf/{group}/\n\n{_choices(group)}"
    text += "## Parts of settings\n\n"
    for name in ("AccuracyBudget", "GateLimits"):
        text += f"### {name}\n\n" + _setting(classes[name], lines)
    text += "## Accepted words\n\n| Type | Meaning | Values |\n| --- | --- | --- |\n"
    for name, node in classes.items():
        kind = getattr(config, name)
        if issubclass(kind, Enum):
            text += f"| `{name}` | {ast.get_docstring(node)} | {'; '.join(_words(node, lines))} |\n"
    return text


def _sections(params: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """The sections of params.yaml that are dataclasses, and which."""
    for node in params.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = re.sub(r"^dict\[str, (.*)\]$", r"\1", ast.unparse(node.annotation))
            if is_dataclass(getattr(config, name, None)):
                yield node.target.id, name


def _setting(node: ast.ClassDef, lines: list[str]) -> str:
    about = ast.get_docstring(node)
    return (f"{about}\n\n" if about else "") + _fields(node, lines) + _refused(node)


def _fields(node: ast.ClassDef, lines: list[str]) -> str:
    text = "| Setting | Type | Default | Meaning |\n| --- | --- | --- | --- |\n"
    sections = dict(_sections(node)) if node.name == "Params" else {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            meaning = _comment(item, lines)
            if node.name == "Params" and item.target.id in config.GROUPS:
                meaning = f"a file of [conf/{item.target.id}/](#conf{item.target.id})"
            elif node.name == "Params" and item.target.id in sections:
                meaning = f"{meaning + ': ' if meaning else ''}[settings](#{item.target.id})"
            row = (f"`{item.target.id}`", f"`{ast.unparse(item.annotation)}`", _default(item), meaning)
            text += f"| {' | '.join(part.replace('|', chr(92) + '|') for part in row)} |\n"
    return text + "\n"


def _default(item: ast.AnnAssign) -> str:
    if item.value is None:
        return "needed"
    text = ast.unparse(item.value)
    made = re.fullmatch(r"field\(default_factory=(?:lambda: )?(.*)\)", text, re.DOTALL)
    text = {"list": "[]", "dict": "{}"}.get(made[1], made[1]) if made else text
    if re.fullmatch(r"[A-Z]\w+", text) and is_dataclass(getattr(config, text, None)):
        return "see below"
    value = getattr(config, text, text) if text.isidentifier() else re.sub(r"^[A-Z]\w+\.", "", text)
    return f"`{YAML.get(value, value)}`"


def _comment(node: ast.stmt, lines: list[str]) -> str:
    """Behind it, or in the line before it."""
    line = lines[(node.end_lineno or node.lineno) - 1].encode()[node.end_col_offset or 0 :].decode()
    before = re.fullmatch(r" +# (.*)", lines[node.lineno - 2])
    return line.partition("#")[2].strip() or (before[1] if before else "")


def _words(node: ast.ClassDef, lines: list[str]) -> Iterator[str]:
    for item in node.body:
        if isinstance(item, ast.Assign):
            word = ast.literal_eval(item.value)
            yield f"`{word}`" + (f" ({comment})" if (comment := _comment(item, lines)) else "")


def _refused(node: ast.ClassDef) -> str:
    """The messages of its __post_init__, with the names over which a loop goes in the place of its variable."""
    found = []
    for inner in ast.walk(node):
        if isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call) and inner.exc.args:
            found.append(_message(inner.exc.args[0], _loops(node, inner)))
    return "Refused:\n\n" + "".join(f"- {message}\n" for message in found) + "\n" if found else ""


def _loops(node: ast.AST, inner: ast.AST) -> dict[str, str]:
    """Loop variables around a node, with the words that they take."""
    words: dict[str, str] = {}
    for loop in ast.walk(node):
        if isinstance(loop, ast.For) and inner in ast.walk(loop) and isinstance(loop.iter, ast.Tuple):
            target = loop.target.elts[0] if isinstance(loop.target, ast.Tuple) else loop.target
            values = [item.elts[0] if isinstance(item, ast.Tuple) else item for item in loop.iter.elts]
            if isinstance(target, ast.Name) and all(isinstance(value, ast.Constant) for value in values):
                words[target.id] = " / ".join(str(ast.literal_eval(value)) for value in values)
    return words


def _message(node: ast.expr, loops: dict[str, str]) -> str:
    """A message's text, code as code: what is formatted into it is … ."""
    if not isinstance(node, ast.JoinedStr):
        return _plain(str(ast.literal_eval(node)))
    parts = []
    for part in node.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value))
        elif isinstance(part, ast.FormattedValue):
            value = ast.unparse(part.value)
            known = loops.get(value) or getattr(config, value, "…")
            parts.append(str(known))
    return _plain("".join(parts))


def _plain(text: str) -> str:
    """For Markdown: what is not code between backticks is taken as it is written."""
    parts = " ".join(text.split()).split("`")
    parts[::2] = [re.sub(r"([*\[\]])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2]]
    return "`".join(parts)


def _choices(group: str) -> str:
    text = "| File | What it is |\n| --- | --- |\n"
    for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        about = first.removeprefix("# ").rstrip(".") if first.startswith("#") else f"`clip-deploy device {path.stem}`"
        command, _, meaning = about.partition(": ")
        about = f"`{command}`: {meaning}" if meaning else f"`{command}`" if first.startswith("#") else about
        text += f"| `{path.name}` | {about} |\n"
    return text + "\n"


# Commands, stages, targets of make.


EXTRAS = {"embed": "parquet", "index": "index", "search": "parquet", "serve": "serve"}  # what a command needs besides


def cli_page() -> str:
    text = WRITTEN + "# Commands\n\n`clip-deploy COMMAND --help` shows the same in a terminal.\n\n"
    text += "*Light* is `pip install clip-deploy`, *full* is `make repro` or `pip install 'clip-deploy[pipeline]'`.\n\n"
    text += "| Command | What it does | Install |\n| --- | --- | --- |\n"
    for name, summary in COMMANDS.items():
        needs = "light" if name in LIGHT else "full"
        needs += f", with `[{EXTRAS[name]}]`" if name in EXTRAS else ""
        text += f"| [`{name}`](#{name}) | {summary} | {needs} |\n"
    codes = EPILOG.partition("exit codes:\n")[2]
    text += "\n## Exit codes\n\n| Code | Meaning |\n| ---: | --- |\n"
    for code, meaning in re.findall(r"^  (\d+) +(.*)$", codes, re.MULTILINE):
        text += f"| {code} | {_escaped(meaning)} |\n"
    for name in COMMANDS:
        text += f"\n## {name}\n\n{_command(parsers(name)[1][name])}"
    return text


def _command(parser: argparse.ArgumentParser) -> str:
    about, _, examples = (parser.description or "").partition("\n\nexample")
    text = about.strip() + "\n\n"
    if examples:
        body = examples.removeprefix("s").removeprefix(":")
        lines = [line.strip() for line in body.strip().splitlines()]
        text += "```console\n" + "".join(f"$ {line}\n" for line in lines) + "```\n\n"
    text += "| Argument | Meaning | Accepted |\n| --- | --- | --- |\n"
    for action in sorted(parser._actions, key=lambda action: bool(action.option_strings)):
        if not isinstance(action, argparse._HelpAction):
            accepted = ", ".join(f"`{choice}`" for choice in action.choices) if action.choices else ""
            text += f"| {_argument(action)} | {_escaped((action.help or '') % vars(action))} | {accepted} |\n"
    return text


def _argument(action: argparse.Action) -> str:
    shown = action.metavar or action.dest.upper()
    if not action.option_strings:
        name = " or ".join(shown) if isinstance(shown, tuple) else shown
        return f"`{_escaped(name)}`"
    value = "" if action.nargs == 0 else f" {shown}"
    return ", ".join(f"`{option}{value}`" for option in action.option_strings)


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


def stages_page() -> str:
    text = WRITTEN + (
        "# Stages and make\n\n"
        "`dvc repro` runs the stages. `dvc repro STAGE` runs one and what it needs.\n"
        "`python -m stages.NAME --help` shows the settings of one; Hydra's overrides and `-m` work there.\n\n"
        "| Stage | What it does |\n| --- | --- |\n"
    )
    for path in sorted((ROOT / "stages").glob("[a-z]*.py")):
        text += f"| `{path.stem}` | {_about(path)} |\n"
    text += "\n## make\n\n| Command | What it does |\n| --- | --- |\n"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, about in re.findall(r"^([a-z0-9-]+):.*?## (.*)$", makefile, re.MULTILINE):
        text += f"| `make {name}` | {_escaped(about[0].upper() + about[1:])} |\n"
    return text


def modules_page() -> str:
    """Every module with the first sentences of its docstring, by room."""
    text = (
        f"{WRITTEN}# Modules\n\nWhat each file is for, in its own words. Only the [Python API](python.md) is public.\n"
    )
    rooms = [path.parent for path in sorted((ROOT / "clip_deploy").glob("*/__init__.py"))]
    for folder in [*rooms, ROOT / "benchmarks"]:
        text += f"\n## {folder.relative_to(ROOT).as_posix()}/\n\n"
        text += f"{_about(folder / '__init__.py')}\n\n" if folder in rooms else ""
        text += "| File | What it is |\n| --- | --- |\n"
        for path in sorted(folder.rglob("*.py")):
            if path.name != "__init__.py":
                text += f"| `{path.relative_to(folder).as_posix()}` | {_about(path)} |\n"
    return text


def _about(path: Path) -> str:
    """The first paragraph of a module's docstring."""
    about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return _escaped(html.escape(" ".join(about.partition("\n\n")[0].split()), quote=False)).replace("*", r"\*")


def errors_page() -> str:
    text = WRITTEN + (
        "# Errors\n\n"
        "A mistake of yours gives one line: what was given, what is accepted, the way out. The exit code is 1.\n"
        "In Python it is one of these, of [`core/errors.py`](../../clip_deploy/core/errors.py).\n\n"
        "| Class | When |\n| --- | --- |\n"
    )
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.DeployError):
            text += f"| `{name}` | {' '.join((kind.__doc__ or '').split())} |\n"
    text += (
        "\nMessages about settings stand beside them, in [Settings](settings.md).\n\n"
        "## Findings of `download`\n\n"
        "`download` compares a checkpoint with its tokenizer, processor, weights and family. An *error* stops it.\n"
        "`allow: [CODE]` in the file under `conf/model/` lifts it. A *warning* is shown in the report.\n"
        "`alike` cannot be lifted.\n\n"
        "| Code | Severity | What is looked at |\n| --- | --- | --- |\n"
    )
    for code, severities, about in _findings():
        text += f"| `{code}` | {severities} | {about} |\n"
    text += "\n## Messages\n\nEvery message, by its class; … stands for what is filled in.\n"
    for name, said in _messages().items():
        text += f"\n### {name}\n\n" + "".join(f"- {message}\n" for message in said)
    return text


def _messages() -> dict[str, list[str]]:
    """What the library raises, by the class: in the order of its files, but for settings, which have their own page."""
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "clip_deploy").rglob("*.py"))
        if path != Path(config.__file__)
    }
    named: dict[str, set[str]] = defaultdict(
        set
    )  # constants of modules; those of one name and several values are left …
    for tree in trees.values():
        for item in tree.body:
            if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant):
                named[ast.unparse(item.targets[0])].add(str(item.value.value))
    constants = {name: values.pop() for name, values in named.items() if len(values) == 1}
    found: dict[str, list[str]] = {name: [] for name in vars(errors) if name.endswith("Error")}
    for tree in trees.values():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            kind, said = ast.unparse(node.exc.func), node.exc.args[0]
            if kind in found and isinstance(said, ast.JoinedStr | ast.Constant):
                message = _message(said, constants)
                if message.count(" ") > 2 and message not in found[kind]:
                    found[kind].append(message)
    return {name: said for name, said in found.items() if said}


def _findings() -> Iterator[tuple[str, str, str]]:
    """Codes of lint.py in their order there, with what the check that finds them says of itself."""
    tree = ast.parse((ROOT / "clip_deploy/checkpoint/lint.py").read_text(encoding="utf-8"))
    found: dict[str, tuple[set[str], list[str]]] = {code: (set(), []) for code in CODES}
    checks = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for check in checks:
        callers = [other for other in checks if other is not check and f"{check.name}(" in ast.unparse(other)]
        said = [ast.get_docstring(one) for one in (check, *callers)]
        about = _escaped(html.escape(next(filter(None, said), "").partition("\n")[0], quote=False))
        for node in ast.walk(check):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Finding" and len(node.args) >= 2:
                severities, abouts = found[ast.literal_eval(node.args[0])]
                severities |= {name.lower() for name in re.findall("ERROR|WARNING", ast.unparse(node.args[1]))}
                abouts += [about] if about and about not in abouts else []
    for code, (severities, abouts) in found.items():
        yield code, ", ".join(sorted(severities)), " ".join(abouts)


# The rooms of the library.

WIDTH, HEIGHT, GAP = 132, 34, 36
SHIFTED = {"stages": -1, "clip_deploy.commands": 1, "clip_deploy.checkpoint": 1}  # by columns: arrows pass beside them
LEFT_OUT = "clip_deploy.__main__"  # it imports a command by its name


def rooms_picture() -> str:
    """The layers of import-linter's contract from top to bottom, with an arrow for each import between two of them.

    An import that others imply is left out.
    """
    layers = [line.split(" | ") for line in _layers() if line != LEFT_OUT]
    imports = _imports([room for line in layers for room in line])
    widest = max(len(line) for line in layers)
    whole = widest * (WIDTH + 20) + 20
    places = {}
    for row, line in enumerate(layers):
        start = (whole - len(line) * (WIDTH + 20) + 20) / 2
        for column, room in enumerate(line):
            places[room] = (start + (column + SHIFTED.get(room, 0)) * (WIDTH + 20), 10 + row * (HEIGHT + GAP))
    tall = len(layers) * (HEIGHT + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {tall}" role="img" font-family="sans-serif">',
        "<title>Which room of clip_deploy imports which</title>",
        '<defs><marker id="end" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#7a8aa0"/></marker></defs>',
        f'<rect width="{whole}" height="{tall}" fill="#ffffff"/>',
    ]
    lines += [_arrow(places[start], places[end]) for start, end in imports]
    for room, (x, y) in places.items():
        lines.append(
            f'<rect x="{x:g}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#e8eef7" stroke="#4a6285"/>'
        )
        middle = f'x="{x + WIDTH / 2:g}" y="{y + HEIGHT / 2 + 5:g}"'
        lines.append(f'<text {middle} text-anchor="middle" font-size="14" fill="#1c2b3f">{_short(room)}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _layers() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers: list[str] = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    return layers


def _imports(rooms: list[str]) -> list[tuple[str, str]]:
    """Pairs of rooms, from top to bottom, of which the first imports the second and none between them does."""
    graph = grimp.build_graph("stages", "clip_deploy", exclude_type_checking_imports=True, cache_dir=None)
    for room in rooms:
        if graph.find_children(room):
            graph.squash_module(room)
    found = {room: graph.find_modules_directly_imported_by(room) & {*rooms} - {room} for room in rooms}
    behind: dict[str, set[str]] = {}
    for room in reversed(rooms):
        behind[room] = found[room].union(*(behind.get(other, set()) for other in found[room]))
    return [
        (room, other)
        for room in rooms
        for other in rooms
        if other in found[room] and not any(other in behind[between] for between in found[room] - {other})
    ]


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    x, y = start[0] + WIDTH / 2, start[1] + HEIGHT
    to_x, to_y = end[0] + WIDTH / 2, end[1]
    path = f"M{x:g},{y:g} C{x:g},{y + GAP / 2:g} {to_x:g},{to_y - GAP / 2:g} {to_x:g},{to_y:g}"
    return f'<path d="{path}" fill="none" stroke="#7a8aa0" stroke-opacity="0.55" marker-end="url(#end)"/>'


def _short(room: str) -> str:
    return room.removeprefix("clip_deploy.")


if __name__ == "__main__":
    main()
