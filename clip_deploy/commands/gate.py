"""Fail where a target of ci.required misses its gate, has no result or a stale one.

It reads what `dvc repro` left, and prints target, quantity, value and limit of every miss, or the verdicts where there
is none. The limits are those under `ci` in params.yaml and in conf/gates/. `dvc status -q` cannot say the last of these
in CI: the stage probe always runs, so that it never ends with 0; --fresh can.

examples: clip-deploy gate --against HEAD~1
          clip-deploy gate --fresh             # whether `dvc repro` would change anything
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from clip_deploy.commands.project import CONF, PARAMS, PROBED, check_project, probed
from clip_deploy.core.config import Params, load_choice, load_params
from clip_deploy.core.errors import DeployError
from clip_deploy.core.parsing import AGAIN, plain
from clip_deploy.evaluate.gates import GateFailure
from clip_deploy.report.ci_gate import (
    Found,
    Reports,
    at_revision,
    check_reports,
    check_required,
    compare_revisions,
    in_folder,
    refusals,
    time_again,
    undecided,
    verdicts,
)
from clip_deploy.report.why import changed

STATUS = [sys.executable, "-m", "dvc", "status", "--json"]
REPORTS, BUILT = Path("reports"), Path("artifacts")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        metavar="REVISION",
        help="a git revision: fail too where a target lost more than ci.max_... since its reports",
    )
    parser.add_argument(
        "--allow-uncompared",
        action="store_true",
        help="what cannot be held against the revision (another machine, a new target) is a note, and no miss",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="fail only where a result is stale, of any stage; no target is judged"
    )


def run(given: argparse.Namespace) -> int:
    check_project(PARAMS, CONF)
    params, present = load_params(PARAMS, CONF), in_folder(REPORTS)
    if given.fresh:
        return _fresh(given, present)
    names = params.ci.required
    check_required(names, params.targets)
    found = [stale(present), check_reports(names, present, load_choice(CONF, "gates", params.gates), BUILT)]
    if given.against is not None:
        found += _lost(given, params, present)
    if any(missed for part in found for missed in part.values()):
        print(refusals(found))
        raise DeployError(f"not all of the {len(names)} required targets can be defended")
    print(verdicts(names, present))
    if spoiled := undecided(names, present):
        print(f"\nnote: timings of {', '.join(spoiled)} decide nothing: {time_again(spoiled)}")
    since = f", and none lost since {given.against}" if given.against is not None else ""
    print(f"\n{len(names)} required targets pass{since}")
    return 0


def _fresh(given: argparse.Namespace, present: Reports) -> int:
    if given.against is not None or given.allow_uncompared:
        raise DeployError("--fresh judges nothing: give it without --against and --allow-uncompared")
    found = stale(present)
    if names := [name for name, missed in found.items() if missed]:
        print(refusals([found]))
        raise DeployError(f"stale: {', '.join(names)}")
    print("all results are of the present settings, code, files, libraries, machine, weights and data")
    return 0


def _lost(given: argparse.Namespace, params: Params, present: Reports) -> list[Found]:
    """What the targets lost since a revision, and what cannot be told, if that is not allowed."""
    former = at_revision(given.against, REPORTS)
    lost, uncompared = compare_revisions(params.ci.required, present, former, params.ci)
    if not given.allow_uncompared:
        return [lost, uncompared]
    print("".join(f"note: {name}: {miss}\n" for name, missed in uncompared.items() for miss in missed), end="")
    return [lost]


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
