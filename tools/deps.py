"""Write into dvc.yaml what each stage's code needs: the modules that it imports and the versions of its libraries.

usage: python -m tools.deps      (`make deps`)

A room of clip_deploy of which a stage needs a good part is one dep: its folder. Of any other room the modules stand
alone, so that a change to one runs few stages again that it cannot affect. All else in dvc.yaml stays, comments too.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterable
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import grimp
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from clip_deploy.core.artifact import RUNTIMES
from clip_deploy.core.environment import LIBRARIES
from clip_deploy.core.files import write_text
from clip_deploy.serving.repository import BESIDES, OPENING

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120
SHARE = 1 / 3  # of a room's modules: from here on its folder is the dep
SHARES = {"clip_deploy/report": 1 / 2, "clip_deploy/builders": 1, "clip_deploy/timing": 1}  # jobs of different stages
ALWAYS_RUN = {"probe"}

# What the import statements do not show: modules opened by name, processes and files.
RUNTIME_MODULES = {f"clip_deploy.runtimes.{name}" for name in RUNTIMES}
OPENED = {
    "prepare": {"clip_deploy.runtimes.eager"},  # it opens the checkpoint
    "validate": RUNTIME_MODULES,
    "benchmark": {"clip_deploy.timing.latency_worker", *RUNTIME_MODULES},
    "end_to_end": {"clip_deploy.runtimes.gpu_preprocessing", *RUNTIME_MODULES},
    "recommend": RUNTIME_MODULES,
    "validate_serving": {"clip_deploy.__main__", "clip_deploy.commands.serve", *RUNTIME_MODULES},  # the server
    "validate_triton": {"clip_deploy.serving.client", *RUNTIME_MODULES},  # the client in the server's environment
}
SERVED = "clip_deploy/serving/models"
OPENED_BY = {f"clip_deploy/{part}" for part in (*OPENING, *(room for rooms in BESIDES.values() for room in rooms))}
READ = {
    "report": {"clip_deploy/report/report.html"},
    "triton_repository": {SERVED, "clip_deploy/serving/deploy", *OPENED_BY},
    "triton_engines": {SERVED},
}

# Nor libraries opened by name, or by another library.
CALLED = {
    "download": {"sentencepiece"},
    "export_onnx": {"onnxscript"},
    "export_openvino": {"openvino", "nncf"},
    "build_engine": {"tensorrt"},
}
# Libraries that change no result: what they read are settings, files of a pinned revision or progress.
TOOLS = {"hydra", "omegaconf", "yaml", "huggingface_hub", "tqdm"}
ELSEWHERE = {"tritonclient"}  # in the server's environment, whose versions are in reports/inputs.json
IDLE = {  # stages in which a library decides nothing: it checks what was made, or comes with a module for others
    "onnxruntime": {"prepare", "export_onnx"},
    "onnx": {"prepare"},
    "onnx_ir": {"prepare"},
    "tokenizers": {"export_torch", "export_torchscript"},
    "ftfy": {"export_torch", "export_torchscript"},
    "torchvision": {"export_torch", "export_torchscript"},
    "faiss": {"validate_serving"},  # it serves no index
    "pyarrow": {"validate_serving"},
    "pillow": {  # pictures are read by prepare, and by what depends on all libraries
        *("download", "export_torch", "export_torchscript", "export_aoti", "export_openvino", "export_onnx"),
        *("optimize", "quantize", "build_engine", "triton_engines", "vectors"),
    },
}
NAMES = {"PIL": "pillow", "nvidia": "nvimgcodec"}
PROBED = "reports/environment.json"
DIVISION = r"(?<=,) (?=\"?(?:artifacts|reports)/(?!inputs))"  # of a stage's deps or params


def main() -> None:
    path = ROOT / "dvc.yaml"
    text = path.read_text(encoding="utf-8")
    written = with_deps(text)
    if written == text:
        print("dvc.yaml is as the code is")
    else:
        write_text(path, written)
        print("dvc.yaml is written anew; look at `git diff dvc.yaml`")


def with_deps(text: str) -> str:
    """dvc.yaml's text with the deps and versions of every stage as the code in this folder has them."""
    yaml = YAML()
    yaml.width = WIDTH
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    content = yaml.load(text)
    for name, entry in content["stages"].items():
        if name not in ALWAYS_RUN:
            stage = entry.get("do", entry)
            _set_code(stage["deps"], code_of(name))
            _set_versions(stage, versions_of(name))
    written = StringIO()
    yaml.dump(content, written)
    plain = re.sub(r" +$", "", written.getvalue(), flags=re.MULTILINE)
    return re.sub(
        r"^( +(?:deps|params): \[)(.*?\])$(?=\n +(?:params|outs):)", _wrapped, plain, flags=re.MULTILINE | re.DOTALL
    )


def code_of(stage: str) -> list[str]:
    """Of a stage: its script, what all stages share, and of each room the folder or the modules that it can run."""
    files = files_of(stage)
    rooms = sorted({room for file in files if (room := _room(file))})
    found = {file for file in files if _room(file) is None} | READ.get(stage, set())
    for room in rooms:
        inside = {file for file in files if _room(file) == room}
        share = len(inside - {f"{room}/__init__.py"}) / len(_modules(room))
        found |= {room} if share >= SHARES.get(room, SHARE) else inside
    first = ["stages/__init__.py", f"stages/{stage}.py"]
    inside = {path for path in found if _room(path) in found}
    return first + sorted(found - set(first) - inside)


def files_of(stage: str) -> set[str]:
    """Every file of ours that a stage's process, and those that it starts, can import."""
    modules = {f"stages.{stage}", *OPENED.get(stage, set())}
    for module in list(modules):
        modules |= _graph().find_upstream_modules(module)
    return {_path(module) for module in modules if module not in ("clip_deploy", "stages")} | {"stages/__init__.py"}


def versions_of(stage: str) -> set[str]:
    """The libraries, by their names in reports/environment.json, that a stage's files import.

    Raises SystemExit where one is unknown.
    """
    used = {NAMES.get(name, name) for file in files_of(stage) for name in _imported(ROOT / file)}
    used |= CALLED.get(stage, set())
    used -= {name for name in used if stage in IDLE.get(name, ())} | TOOLS | ELSEWHERE
    if unknown := used - set(LIBRARIES):
        sys.exit(f"{stage} imports {', '.join(unknown)}: add it to LIBRARIES of core/environment.py, or to TOOLS here")
    return used


def _wrapped(found: re.Match[str]) -> str:
    """A list that fits the page, what is no code and the versions on lines of their own: ruamel breaks one anywhere."""
    start, text = found[1], " ".join(found[2].split()).replace("[ ", "[")
    parts = [text] if len(start + text) <= WIDTH else re.split(DIVISION, text, maxsplit=1)
    fit = [
        textwrap.wrap(part, WIDTH - len(start), break_on_hyphens=False, subsequent_indent=" " * ("[" in part))
        for part in parts
    ]
    return start + f"\n{' ' * len(start)}".join(line for lines in fit for line in lines)


def _set_code(deps: CommentedSeq, code: list[str]) -> None:
    """Put the code before the artifacts and reports."""
    wanted = [*code, *(dep for dep in deps if not dep.startswith(("stages/", "clip_deploy/")))]
    deps[:] = [DoubleQuotedScalarString(path) if "{" in path else path for path in wanted]
    deps.fa.set_flow_style()


def _set_versions(stage: dict[str, Any], names: set[str]) -> None:
    """Write the versions in the order of LIBRARIES, and the hardware as it was; none where the whole file is read."""
    if PROBED in stage["deps"]:
        return
    entries = [entry for entry in stage["params"] if isinstance(entry, dict) and PROBED in entry]
    if not entries:
        entries = [{PROBED: CommentedSeq()}]
        stage["params"].append(entries[0])
    keys = entries[0][PROBED]
    hardware = [key for key in keys if not key.startswith("software.")]
    wanted = [*(f"software.{name}" for name in LIBRARIES if name in names), *hardware]
    if list(keys) != wanted:
        keys[:] = wanted
        keys.fa.set_flow_style()


def _room(file: str) -> str | None:
    """The folder of clip_deploy in which a file lies."""
    parts = file.split("/")
    return "/".join(parts[:2]) if parts[0] == "clip_deploy" and len(parts) > 2 else None


def _modules(room: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / room).rglob("*.py")} - {f"{room}/__init__.py"}


def _path(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if (ROOT / path).is_dir() else f"{path}.py"


@cache
def _graph() -> grimp.ImportGraph:
    return grimp.build_graph("stages", "clip_deploy", exclude_type_checking_imports=True, cache_dir=None)


@cache
def _imported(path: Path) -> set[str]:
    """The top-level names of other people's modules that a file imports when it runs."""
    tree = ast.parse(path.read_text())
    typing = {id(node) for test in ast.walk(tree) if _is_typing(test) for node in ast.walk(test)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in typing:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing:
            found.add(node.module)
    return _top(found) - {*sys.stdlib_module_names, "stages", "clip_deploy"}


def _top(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


if __name__ == "__main__":
    main()
