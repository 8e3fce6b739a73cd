"""Build everything twice and compare byte for byte: python -m benchmarks.reproducible (or `make reproducible`)

Two clean copies of the repository, in folders of different depth, with other seeds of Python's hashes and other
folders for temporary files, build all targets of params.yaml, those of EXTRA, and those of a GPU that can be built
here. What is packaged depends on what was timed: the second copy takes the first's timings, and checks its own files.

Writes the SHA-256 of each file of both to reports/reproducible.json, and reports/reproducible.md. Exit code 1 where a
file differs that EXPECTED does not explain.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pipeline import ROOT, copy_project, environment
from clip_deploy.core.artifact import MANIFEST_NAME
from clip_deploy.core.files import sha256, write_text
from clip_deploy.core.json_files import read_json, write_json

BUILDS = (
    *("download", "prepare", "export_torch", "export_torchscript", "export_aoti", "export_openvino", "export_onnx"),
    *("optimize", "quantize", "build_engine"),
)
SHIPPED = ("recommend", "package", "triton_repository")
EXTRA = {
    "export_torch: {}": "export_torch: {torch-bf16: {precision: bf16}}",
    "export_aoti: {}": "export_aoti: {aoti-fp32: {precision: fp32}}",
    "benchmark: standard": "benchmark: quick",
}
EXPECTED = {  # the end of a path: which bytes differ, and why
    ".pt2": (
        "AOTInductor hands the C++ compiler sources by their full paths, and these stay: in the commands that its .cpp "
        "files end with, in the name of the kernels' file (a hash over its source, path included), in the library's "
        "error messages and in its debug sections. Built twice in one folder, the bytes are the same."
    ),
    "aoti-fp32/target.json": "It holds the SHA-256 of the two .pt2 files.",
}
DESCRIPTIONS = ("target.json", "manifest.json")
MODELS = (".onnx", ".data", ".pt", ".pt2", ".safetensors", ".xml", ".bin", ".engine", ".plan")
SHOWN = 16  # characters of a hash in the table
Hashes = dict[str, str]  # path below artifacts/: SHA-256


class Copy:
    """A clean copy of the repository with surroundings of its own."""

    def __init__(self, path: Path, seed: str) -> None:
        self.path, temporary = copy_project(path), path.with_name(f"{path.name}-temporary")
        temporary.mkdir()
        self.environment = environment() | {"PYTHONHASHSEED": seed, "TMPDIR": str(temporary)}
        params = path / "params.yaml"
        params.write_text(extended(params.read_text()))

    def run(self, *command: str) -> None:
        subprocess.run(command, cwd=self.path, env=self.environment, check=True, stdout=subprocess.DEVNULL)

    def repro(self, *arguments: str) -> None:
        self.run("dvc", "repro", *arguments)

    def hashes(self) -> Hashes:
        """Of all that was built; what stands for a target that could not be is none of it."""
        built, missing, end = self.path / "artifacts", self.unavailable(), MANIFEST_NAME.format("")
        paths = [path for path in sorted(built.rglob("*")) if path.is_file()]
        paths = [path for path in paths if not missing.keys() & {path.parent.name, path.name.removesuffix(end)}]
        return {path.relative_to(built).as_posix(): sha256(path) for path in paths}

    def unavailable(self) -> dict[str, str]:
        """The targets that could not be built here, and why."""
        paths = [path for path in sorted((self.path / "artifacts").glob("*/*.json")) if path.name in DESCRIPTIONS]
        return {path.parent.name: reason for path in paths if (reason := read_json(path).get("unavailable"))}


def extended(params: str) -> str:
    """params.yaml with EXTRA, which replaces what is switched off there."""
    for old, new in EXTRA.items():
        if old not in params:
            sys.exit(f"error: params.yaml has no `{old}`, which this replaces by `{new}`: run it on the committed file")
        params = params.replace(old, new)
    return params


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Copy(Path(folder) / "a", "1"), Copy(Path(folder) / "another/longer/path", "2")
        hashes, unavailable = build_both(first, second)
        environment = read_json(first.path / "reports/environment.json")
    record = {"files": compare(*hashes), "unavailable": unavailable} | environment
    write_json(ROOT / "reports/reproducible.json", record)
    write_text(ROOT / "reports/reproducible.md", markdown(record))
    left = unexplained(record["files"])
    print(summary(record["files"]), *left, sep="\n")
    sys.exit(bool(left))


def build_both(first: Copy, second: Copy) -> tuple[tuple[Hashes, Hashes, Hashes], dict[str, str]]:
    """What both built, for a CPU and then for a GPU, what the first built anew where the path matters, and what neither
    could build."""
    for copy in (first, second):
        copy.repro(*BUILDS)
    first.repro("triton_repository")
    second.repro("validate")
    shutil.copytree(first.path / "reports/benchmark", second.path / "reports/benchmark")
    second.repro("--single-item", "--force", *SHIPPED)
    on_cpu, missing = (first.hashes(), second.hashes()), first.unavailable()
    first.repro("--single-item", "--force", "export_aoti")
    again = {path: digest for path, digest in first.hashes().items() if expected(path)}
    for copy in (first, second):
        copy.run(sys.executable, "-m", "clip_deploy", "device", "cuda", "--discard")
        copy.repro(*BUILDS)
    built = first.hashes() | on_cpu[0], second.hashes() | on_cpu[1], again
    return built, missing | first.unavailable()


def compare(first: Hashes, second: Hashes, again: Hashes) -> dict[str, Any]:
    """The hashes of each file, and whether all that must be equal are."""
    return {
        path: {"first": first.get(path), "second": second.get(path), "equal": first.get(path) == second.get(path)}
        | ({"first_again": again[path], "equal_again": first.get(path) == again[path]} if path in again else {})
        for path in sorted(first | second)
    }


def expected(path: str) -> str | None:
    return next((reason for end, reason in EXPECTED.items() if path.endswith(end)), None)


def unexplained(files: dict[str, Any]) -> list[str]:
    """The files that differ, and must not."""
    return [
        f"{path} differs"
        for path, row in files.items()
        if not row["equal"] and not (expected(path) and row.get("equal_again"))
    ]


def summary(files: dict[str, Any]) -> str:
    """How many are equal, of models and of what lies beside them (descriptions, data, configurations)."""
    said = []
    for what, is_model in (("model files", True), ("other files", False)):
        rows = [row["equal"] for path, row in files.items() if (Path(path).suffix in MODELS) == is_model]
        said.append(f"{sum(rows)} of {len(rows)} {what}")
    return f"{' and '.join(said)} are equal, byte for byte; {len(unexplained(files))} differ unexpectedly"


def formats(files: dict[str, Any]) -> list[str]:
    """A table of the model files by format, with what differs and why."""
    lines = ["| Format | Files | Equal | Equal in the same folder | Which bytes differ, and why |"]
    lines += ["| --- | ---: | ---: | ---: | --- |"]
    for suffix in MODELS:
        rows = [row for path, row in files.items() if Path(path).suffix == suffix]
        equal, again = (sum(bool(row.get(key)) for row in rows) for key in ("equal", "equal_again"))
        differing = [path for path, row in files.items() if Path(path).suffix == suffix and not row["equal"]]
        why = (expected(differing[0]) or "not known: a fault") if differing else "none"
        lines += [f"| `{suffix}` | {len(rows)} | {equal} | {again or '-'} | {why} |"] if rows else []
    return lines


def markdown(record: dict[str, Any]) -> str:
    files, hardware = record["files"], record["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in record["software"].items() if version)
    lines = [
        "# Two clean builds, byte for byte",
        "",
        f"Made by `make reproducible` on {hardware['cpu']}: {versions}.",
        "",
    ]
    lines += [f"{summary(files)}. Whole hashes: [reproducible.json](reproducible.json).", "", *formats(files), ""]
    if missing := record["unavailable"]:
        lines += ["Not built here, and so not compared and not counted:", ""]
        lines += [*(f"- `{target}`: {reason}" for target, reason in missing.items()), ""]
    lines += ["| File below artifacts/ | SHA-256, first | SHA-256, second | Equal |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{path}` | `{str(row['first'])[:SHOWN]}` | `{str(row['second'])[:SHOWN]}` | {verdict(row)} |"
        for path, row in files.items()
    ]
    return "\n".join(lines) + "\n"


def verdict(row: dict[str, Any]) -> str:
    if row["equal"]:
        return "yes"
    return "in the same folder" if row.get("equal_again") else "NO"


if __name__ == "__main__":
    main()
