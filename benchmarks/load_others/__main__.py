"""The load test of `clip-deploy serve`, at other servers too: python -m benchmarks.load_others [server...]

Each server that is installed (`make load-others` tries) is asked in its own protocol, and every answer is held against
the vectors that are due. First one by one: a few questions of every kind, each mistake twice, and behind each kind one
right question, which tells whether the server still answers; where it does not, it is started anew. Then under load, by
1 to 64 clients, without the kinds of which one was wrong, lost or the server's end before: what is found then comes of
the load. Writes reports/load_others.json and, of that, reports/load_others.md. What is not installed keeps its row.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.load_others.report import Findings, counts, report
from benchmarks.load_others.servers import ROOT, SERVERS, Target, status_of
from clip_deploy.core.environment import hardware
from clip_deploy.core.errors import DeployError, UnavailableError
from clip_deploy.core.files import write_text
from clip_deploy.core.parsing import plain
from clip_deploy.web.load_test import CLIENTS, load_test
from clip_deploy.web.process import Server
from clip_deploy.web.questions import FIRST, Kind, Question, draw

REQUESTS = 20_000  # under load
ROUNDS = 4  # each through all numbers of clients
TWICE = 2
LIMIT_S = 20.0  # of an answer, while one client asks
OUTPUT = ROOT / "reports" / "load_others.json"
REPORT = OUTPUT.with_suffix(".md")


def main(names: Sequence[str]) -> None:
    record: dict[str, Any] = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {"servers": {}}
    for name in names or SERVERS:
        record["servers"][name] = asked_of(name)
        record |= {"requests": REQUESTS, "clients": list(CLIENTS), "machine": asdict(hardware())}
        write_text(OUTPUT, json.dumps(record, indent=2) + "\n")
    write_text(REPORT, report(record))


def asked_of(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            target = SERVERS[name](Path(folder))
            with Restarted(target) as server:
                found = ask(name, target, server)
        except (UnavailableError, DeployError) as error:
            print(f"{name}: {error}", flush=True)
            return {"unavailable": str(error)}
    record: dict[str, Any] = plain(found)
    return record


class Restarted:
    """A server that can be started anew."""

    def __init__(self, target: Target) -> None:
        self.target, self.stack = target, ExitStack()

    def __enter__(self) -> "Restarted":
        self.server: Server = self.stack.enter_context(self.target.start())
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def again(self) -> None:
        self.stack.close()
        self.server = self.stack.enter_context(self.target.start())


def ask(name: str, target: Target, server: Restarted) -> Findings:
    found = Findings(target.version, target.against)
    for kind in target.kinds:
        one_by_one(target, server, kind, found)
    kinds = {kind: asked for kind, asked in target.kinds.items() if kind not in found.left_out}
    print(f"{name}: one by one: {found.reasons}", flush=True)
    loaded = load_test(server.server, draw(kinds, REQUESTS), REQUESTS, ROUNDS)
    found.under_load, found.load_reasons, found.busy = loaded.requests, loaded.reasons, loaded.busy
    print(f"{name}: under load: {counts(loaded.requests)} {loaded.reasons}", flush=True)
    return found


def one_by_one(target: Target, server: Restarted, kind: str, found: Findings) -> None:
    sample = first(target.kinds[kind])
    result = load_test(server.server, sample, len(sample), clients=(1,), limit_s=LIMIT_S)
    found.alone += result.requests
    faults = result.total("wrong") + result.total("lost")
    if result.reasons:
        worst = sorted(result.reasons, key=lambda said: said.startswith(f"{kind}: busy: "))[0]
        found.reasons[kind] = worst.removeprefix(f"{kind}: ")
    right = first(target.kinds[target.sentinel])[:1]
    if not load_test(server.server, right, 1, clients=(1,), limit_s=LIMIT_S).total("answered"):
        found.ends[kind] = status_of(server.server, target.health)
        server.again()
    if faults or kind in found.ends:
        found.left_out.append(kind)


def first(kind: Kind) -> list[Question]:
    """Of a mistake, which is one question, the same one twice."""
    return list(islice(cycle(kind.questions), FIRST if len(kind.questions) > 1 else TWICE))


if __name__ == "__main__":
    main(sys.argv[1:])
