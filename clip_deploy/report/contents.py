"""What the report holds, before it gets a face: sections of Markdown, tables and plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clip_deploy.core.model import Finding
from clip_deploy.core.records import EndToEnd, Metrics, StoredVectors
from clip_deploy.core.served import HttpServed, Served
from clip_deploy.report.recommend import Shipping
from clip_deploy.report.rows import Row

Key = float | str | None  # what a cell is sorted by; None is last


@dataclass(frozen=True)
class Table:
    """Cells are Markdown; columns behind the first `left` are set flush right.

    Attributes:
        keys: what each cell is sorted by; a table without them is not sorted.
        folded: numbers of the rows that hold nothing but dashes; the page folds them away.
        folded_as: why, in lines of Markdown.
    """

    head: list[str]
    body: list[list[str]]
    left: int = 2
    keys: list[list[Key]] = field(default_factory=list)
    folded: list[int] = field(default_factory=list)
    folded_as: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """A plot of the page; `spec` is Vega-Lite. Its numbers stand in a table beside it."""

    caption: str
    description: str
    spec: dict[str, Any]


Block = str | Table | Figure  # a str is a paragraph, a list or a heading of Markdown


@dataclass(frozen=True)
class Section:
    """A part of the report: its title, and its blocks of text, tables and plots in their order."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Report:
    """All that is reported of one run.

    Attributes:
        about: what was measured: the model and the data, in words.
        run: on what: the machine and the versions, in words.
        flows: rows.read_flows.
        shipping: recommend.shown; None where nothing was asked for.
        findings: of the checkpoint's check.
        served, serving: what validate_triton and validate_serving wrote; None where they did not run.
        summary: recommend.summary, for metrics.json.
        vectors: what vectors of fewer dimensions and bits cost a search; None where it was not measured.
    """

    title: str
    rows: list[Row]
    about: dict[str, str] = field(default_factory=dict)
    run: dict[str, str] = field(default_factory=dict)
    flows: Mapping[str, EndToEnd] = field(default_factory=dict)
    shipping: Shipping | None = None
    findings: Sequence[Finding] = ()
    served: Served | None = None
    serving: HttpServed | None = None
    vectors: StoredVectors | None = None
    summary: Metrics = field(default_factory=dict)
