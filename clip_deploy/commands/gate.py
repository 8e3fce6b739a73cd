"""Fail if a target of ci.required misses its gate, or if its result is missing or stale.

It reads the results of `dvc repro`. For every miss it prints target, quantity, value and limit; if there is none, it
prints the verdicts. The limits are those under `ci` in params.yaml and in conf/gates/. Use --fresh to find stale
results in CI: `dvc status -q` never ends with 0 here, because the stage probe always runs.

examples: clip-deploy gate --against HEAD~1
          clip-deploy gate --against origin/main --comment comment.md
          clip-deploy gate --fresh             # whether `dvc repro` would change anything
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from clip_deploy.commands.paths import local_path
from clip_deploy.commands.project import CONF, PARAMS, PROBED, check_project, probed
from clip_deploy.core.config import load_choice, load_params
from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import write_text
from clip_deploy.core.parsing import AGAIN, plain
from clip_deploy.evaluate.gates import GateFailure
from clip_deploy.report.ci_comment import comment
from clip_deploy.report.ci_gate import (
    MEANT,
    Found,
    Reports,
    asked,
    asked_otherwise,
    at_revision,
    check_reports,
    check_required,
    compare_revisions,
    in_folder,
    other_weights,
    refusals,
    strictest,
    time_again,
    undecided,
    verdicts,
)
from clip_deploy.report.revisions import commit_of, committed
from clip_deploy.report.why import changed

STATUS = [sys.executable, "-m", "dvc", "status", "--json"]
OTHER_MODEL = "{revision} has another checkpoint than `model: {model}` here ({files}): two models are compared"
REPORTS, BUILT = Path("reports"), Path("artifacts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        metavar="REVISION",
        help="a git revision: also fail if a target lost more than ci.max_... since then",
    )
    parser.add_argument(
        "--allow-uncompared",
        action="store_true",
        help="print a note, and do not fail, for what cannot be compared (another machine, a new target)",
    )
    parser.add_argument(
        "--comment",
        metavar="FILE",
        type=local_path,
        help="write a comment for a pull request there: the verdict, what ships, and what moved beyond its interval",
    )
    parser.add_argument("--page", metavar="URL", help="the address of report.html, for that comment")
    parser.add_argument(
        "--fresh", action="store_true", help="fail only if a result of any stage is stale; no target is checked"
    )


def run(given: argparse.Namespace) -> int:
    check_project(PARAMS, CONF)
    params, present = load_params(PARAMS, CONF), in_folder(REPORTS)
    if given.fresh:
        return _fresh(given, present)
    names, former = params.ci.required, None if given.against is None else at_revision(given.against, REPORTS)
    if given.comment and former is None:
        raise DeployError("--comment says what changed since a revision: give --against too")
    if given.comment and given.comment.is_dir():
        raise DeployError(f"--comment is {given.comment}, a folder: give a file, for example comment.md")
    if given.allow_uncompared and former is None:
        raise DeployError("--allow-uncompared is about what cannot be compared with a revision: give --against too")
    if given.page and not given.comment:
        raise DeployError("--page is a link of the comment: give --comment too")
    check_required(names, params.targets)
    found = [stale(present), check_reports(names, present, load_choice(CONF, "gates", params.gates), BUILT)]
    notes: list[str] = []
    otherwise: list[str] = []
    limits = params.ci
    if former:
        now, then = asked(_text, PARAMS, CONF), asked(partial(committed, commit=commit_of(given.against)), PARAMS, CONF)
        otherwise, limits = asked_otherwise(now, then), strictest(params.ci, then)
        if weights := other_weights(present, former):
            notes = [OTHER_MODEL.format(revision=given.against, model=params.model, files=", ".join(weights))]
        lost, uncompared = compare_revisions(names, present, former, params.ci)
        found.append(lost)
        if given.allow_uncompared:
            notes += [_note(name, miss) for name, missed in uncompared.items() for miss in missed]
        else:
            found.append(uncompared)
    is_open = not any(missed for part in found for missed in part.values())
    said = verdicts(names, present) if is_open else refusals(found)
    if given.comment and former:
        text = comment(said, is_open, present, former, given.against, limits, notes, given.page, otherwise)
        write_text(given.comment, text)
    differs = [f"note: the gate asks otherwise than at {given.against}: {line}" for line in otherwise]
    print("\n".join([*differs, *(f"note: {note}" for note in notes), said]))
    if not is_open:
        raise DeployError(f"not all of the {len(names)} required targets pass: the table above says why")
    if spoiled := undecided(names, present):
        print(f"\nnote: timings of {', '.join(spoiled)} decide nothing: {time_again(spoiled)}")
    since = f", and none lost since {given.against}" if former else ""
    print(f"\n{len(names)} required targets pass{since}")
    return 0


def _note(name: str, miss: GateFailure) -> str:
    """What could not be compared, and need not be."""
    way_out = miss.limit.removesuffix(MEANT).removesuffix("; ")
    return f"{name}: {miss.quantity} {miss.value}" + (f": {way_out}" if way_out else "")


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _fresh(given: argparse.Namespace, present: Reports) -> int:
    if given.against is not None or given.allow_uncompared or given.comment or given.page:
        raise DeployError(
            "--fresh only looks for stale results: give it without --against, --allow-uncompared, --comment and --page"
        )
    found = stale(present)
    if names := [name for name, missed in found.items() if missed]:
        print(refusals([found]))
        raise DeployError(f"stale: {', '.join(names)}")
    print("all results are of the present settings, code, files, libraries, machine, weights and data")
    return 0


def stale(present: Reports) -> Found:
    """What `dvc repro` would do again: results of other settings, code, files, libraries, machine, weights or data.

    DVC sees the last three only once the probe has run: here they are looked at anew.
    """
    done = subprocess.run(STATUS, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeployError(f"`dvc status` cannot tell what is stale: {done.stderr.strip()}")
    status = json.loads(done.stdout)
    found = {name: [in_words(what) for what in why if what != "always changed"] for name, why in status.items()}
    now = probed()
    environment, inputs = (now[path] for path in PROBED)
    read, known = present.read(dict[str, str], "inputs.json") or {}, present.environment()
    found["probe"] = [*changed(plain(known) if known else {}, environment, "reports/environment.json")]
    found["probe"] += [
        f"{name}: what lies on this disk is not what was read  (reports/inputs.json)"
        for name, what in inputs.items()
        if what != read.get(name)
    ]
    return {name: [GateFailure("stale", what, AGAIN) for what in why] for name, why in found.items()}


def in_words(what: str | dict[str, Any]) -> str:
    """As "changed command", or {"changed deps": {"params.yaml": {"onnx.opset": "modified"}, "stages/a.py": ...}}."""
    if isinstance(what, str):
        return what
    return "; ".join(f"{kind}: {', '.join(_changed(names))}" for kind, names in what.items())


def _changed(names: dict[str, Any]) -> list[str]:
    return [f"{name} {', '.join(inner)}" if isinstance(inner, dict) else name for name, inner in names.items()]
