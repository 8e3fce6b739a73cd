"""What the fault tests and the fuzzers saw: kept while they run, and written as JSON at the end.

python tests/reliability.py build/faults.json build/hostile.json    # prints reports/reliability.md
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

OUTCOMES = ("accepted", "refused", "wrong")

HEAD = """# Faults and hostile input

Written by `make reliability`, whose tests produce every line: `tests/test_faults.py` and `tests/test_hostile.py`.

## Faults

What was done to a stage while it worked, and what came of it, then and in the next `dvc repro`.

| Fault | Where | Times | Outcome |
| --- | --- | ---: | --- |
"""

HOSTILE = """
## Hostile input

Each input was made by [Hypothesis](https://hypothesis.readthedocs.io) from a sound one, or by hand. *Accepted*: it was
read; checkpoints, images, texts and graphs then gave what transformers, the checkpoint's own processor, tokenizer and
towers give (pixels within 1e-5, of a checkpoint 1e-4, cosine above 0.9999; 16 bits of grey aside, whose upper 8 are
kept where the processor clips). *Refused*: with one line that says why; the linter gives one for each finding. *Wrong*:
a traceback, a crash, a hang, or another result than the reference's.

| Input | Tried | Accepted | Refused with a message | Wrong |
| --- | ---: | ---: | ---: | ---: |
"""


@dataclass
class Outcomes:
    """Counts of the faults by (fault, where, outcome), and of the hostile inputs by kind and outcome."""

    faults: Counter = field(default_factory=Counter)
    hostile: dict[str, Counter] = field(default_factory=dict)

    def fault(self, fault: str, where: str, outcome: str, times: int = 1) -> None:
        self.faults[fault, where, outcome] += times

    def tried(self, kind: str, outcome: str) -> None:
        assert outcome in OUTCOMES
        self.hostile.setdefault(kind, Counter())[outcome] += 1

    def write(self, path: Path) -> None:
        faults = [[*key, times] for key, times in self.faults.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"faults": faults, "hostile": self.hostile}, indent=1) + "\n")

    def read(self, path: Path) -> None:
        """Add what another run wrote."""
        found = json.loads(path.read_text())
        for *key, times in found["faults"]:
            self.faults[tuple(key)] += times
        for kind, counts in found["hostile"].items():
            self.hostile.setdefault(kind, Counter()).update(counts)

    def report(self) -> str:
        rows = [f"| {fault} | {where} | {times} | {said} |" for (fault, where, said), times in self.faults.items()]
        counts = [
            f"| {kind} | {found.total():,} | " + " | ".join(f"{found[name]:,}" for name in OUTCOMES) + " |"
            for kind, found in self.hostile.items()
        ]
        total = sum(self.hostile.values(), Counter())
        counts.append(f"| all | {total.total():,} | " + " | ".join(f"{total[name]:,}" for name in OUTCOMES) + " |")
        return HEAD + "\n".join(rows) + "\n" + HOSTILE + "\n".join(counts) + "\n"


if __name__ == "__main__":
    outcomes = Outcomes()
    for name in sys.argv[1:]:
        outcomes.read(Path(name))
    print(outcomes.report(), end="")
