"""Wrong models and lost inputs, kind by kind: what came of each before, and what the tests see now."""

import re
from dataclasses import dataclass, field
from pathlib import Path

TEMPORARY = re.compile(r"/\S*/pytest-\d+/[^/\s]+/")  # where a test's folders lie
HEAD = """# Never the wrong model

Written by `make kinds`, whose tests produce the last column. *Before* is what commit e110feb did with the same input.

| Kind | Before | Now |
| --- | --- | --- |
"""


@dataclass
class Kinds:
    rows: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __call__(self, kind: str, before: str, now: object) -> None:
        """Note a kind; `now` is what the test saw: a message, a finding, numbers."""
        self.rows[kind] = before, TEMPORARY.sub("", " ".join(str(now).split())).replace("|", "\\|")

    def write(self, path: Path) -> None:
        lines = [f"| {kind} | {before} | {now} |" for kind, (before, now) in sorted(self.rows.items())]
        path.write_text(HEAD + "\n".join(lines) + "\n")
