"""What the fault tests and the fuzzers saw: kept while they run, and written as JSON at the end.

python tests/support/reliability.py build/test_faults.json ...    # prints reports/reliability.md
"""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

OUTCOMES = ("accepted", "refused", "wrong")
OF_REQUESTS = ("asked", "answered", "refused", "left", "wrong", "lost")

HEAD = """# Faults and hostile input

Written by `make reliability`, whose tests produce every line: `test_faults.py`, `report/test_ci_gate.py`,
`test_hostile.py`, `core/test_manifest.py` and `web/test_load.py` in `tests/`.

## Faults

What was done to a stage while it worked, and what came of it, then and in the next `dvc repro`.

| Fault | Where | Times | Outcome |
| --- | --- | ---: | --- |
"""

REGRESSIONS = """
## A seeded regression

A little noise was put on one weight of a target in a project that had been built whole, and `dvc repro` run. Then
`clip-deploy gate --against HEAD`, which is `make gate AGAINST=HEAD`, printed:

| Target | Quantity | Value | Limit | Exit code |
| --- | --- | ---: | --- | ---: |
"""

HOSTILE = """
## Hostile input

Each input was made by [Hypothesis](https://hypothesis.readthedocs.io) from a sound one, or by hand. *Accepted*: it was
read; checkpoints, images, texts and graphs then gave what transformers, the checkpoint's own processor, tokenizer and
towers give (pixels within 1e-5, of a checkpoint 1e-4, cosine above 0.9999; 16 bits of grey aside, whose upper 8 are
kept where the processor clips), and manifests named the files as they are. *Refused*: with one line that says why; the
linter gives one for each finding. *Wrong*: a traceback, a crash, a hang, or another result than the reference's.

| Input | Tried | Accepted | Refused with a message | Wrong |
| --- | ---: | ---: | ---: | ---: |
"""

LOAD = """
## Load

What `clip-deploy serve` answered to requests of every kind from {clients} clients, each answer held against the
package's own: a vector with a cosine below 0.9999 is *wrong*, and a request that was neither answered nor refused with
the status that it deserves is *lost*. Some clients *left* by intent. {speed}

| Requests | Sent | Answered | Refused | Left | Wrong | Lost |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""


@dataclass
class Load:
    """Of a load test.

    Attributes:
        clients: at once, as words.
        speed: requests/s, the client's share of a core, and memory, in a sentence.
        rows: by kind: asked, answered, refused, left, wrong, lost.
    """

    clients: str
    speed: str
    rows: list[list]

    @classmethod
    def of(cls, found, clients):
        """From what load_test returned."""
        rate = found.total("asked") / found.seconds
        speed = f"{rate:,.0f} requests/s, for which the client computed {found.client_share:.0%} of the time."
        if grown := found.growth:
            interval = f"{grown.low:.2f} to {grown.high:.2f}"
            speed += f" The server's memory was {grown.last_mb:.0f} MB at the end, and grew by {grown.slope:.2f} MB "
            speed += f"[{interval}] for each 10,000 requests."
        rows = [[row.kind, *(getattr(row, name) for name in OF_REQUESTS)] for row in found.requests]
        return cls(", ".join(map(str, clients)), speed, rows)

    def report(self):
        totals = [sum(column) for column in list(zip(*self.rows, strict=True))[1:]]
        rows = [*self.rows, ["all", *totals]]
        lines = [f"| {kind} | " + " | ".join(f"{count:,}" for count in counts) + " |" for kind, *counts in rows]
        return LOAD.format(clients=self.clients, speed=self.speed) + "\n".join(lines) + "\n"


@dataclass
class Outcomes:
    """What came of faults, hostile inputs and load, counted, and what the gate said of a seeded regression."""

    faults: Counter = field(default_factory=Counter)
    regressions: list[list] = field(default_factory=list)
    hostile: dict[str, Counter] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)

    def load(self, load: Load) -> None:
        self.loads.append(load)

    def fault(self, fault: str, where: str, outcome: str, times: int = 1) -> None:
        self.faults[fault, where, outcome] += times

    def regression(self, target: str, quantity: str, value: str, limit: str, code: int) -> None:
        self.regressions.append([target, quantity, value, limit, code])

    def tried(self, kind: str, outcome: str) -> None:
        assert outcome in OUTCOMES
        self.hostile.setdefault(kind, Counter())[outcome] += 1

    def write(self, path: Path) -> None:
        faults = [[*key, times] for key, times in self.faults.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps(
                {
                    "faults": faults,
                    "regressions": self.regressions,
                    "hostile": self.hostile,
                    "loads": [asdict(load) for load in self.loads],
                },
                indent=1,
            )
            + "\n"
        )

    def read(self, path: Path) -> None:
        """Add what another run wrote."""
        found = json.loads(path.read_text())
        for *key, times in found["faults"]:
            self.faults[tuple(key)] += times
        self.regressions += found["regressions"]
        self.loads += [Load(**load) for load in found["loads"]]
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
        caught = [f"| {' | '.join(map(str, row))} |" for row in self.regressions]
        parts = (HEAD, rows), (REGRESSIONS, caught), (HOSTILE, counts)
        text = "".join(head + "\n".join(lines) + "\n" for head, lines in parts)
        return text + "".join(load.report() for load in self.loads)


if __name__ == "__main__":
    outcomes = Outcomes()
    for name in sys.argv[1:]:
        outcomes.read(Path(name))
    print(outcomes.report(), end="")
