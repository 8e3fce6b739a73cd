"""A stage's program in the process of the tests, whose imports take longer than most stages."""

import contextlib
import io
import runpy
import sys
import warnings
from dataclasses import dataclass
from unittest.mock import patch

from support.project import ROOT


@dataclass
class Ended:
    """As subprocess.run says it."""

    returncode: int
    stdout: str
    stderr: str


def no_debugger():
    """Coverage traces, which Hydra takes for a debugger, to which it leaves the traceback."""
    return patch("hydra._internal.utils.is_under_debugger", return_value=False)


def run_stage(name: str, *words: str) -> Ended:
    """What `python -m stages.NAME` does with these words, in the repository's folder."""
    said, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(errors),
        patch.object(sys, "argv", [name, *words]),
        # Of all groups' choices, which our help does not show: two seconds.
        patch("hydra._internal.hydra.Hydra.format_config_groups", return_value=""),
        no_debugger(),
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # runpy's, of a stage that a test imported
    ):
        try:
            runpy.run_module(f"stages.{name}", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code or 0
    return Ended(code, said.getvalue(), errors.getvalue())
