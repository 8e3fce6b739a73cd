"""The report's section on the package behind `clip-deploy serve`."""

from clip_deploy.core.served import HttpServed, Requests
from clip_deploy.report.contents import Report, Section, Table
from clip_deploy.report.tables import MISSING

TITLE = "Served over HTTP"
RIGHT = "every answer is the package's own, and every mistake was refused"


def serving_section(report: Report) -> Section | None:
    """What web.validation.check_http found."""
    return _section(report.serving) if report.serving else None


def _section(served: HttpServed) -> Section:
    found, reasons = served.answers, "; ".join(served.reasons)
    if found is None:
        return Section(TITLE, [f"`{served.status}`: {reasons}"])
    clients = ", ".join(map(str, found.clients))
    outcome = (
        f"**{served.status}**: {reasons or RIGHT}. "
        f"`clip-deploy serve` was asked by {clients} clients at once. Wrong: a cosine with the package's own vector "
        f"below {found.min_cosine:g}, other scores, or an answer to a mistake. Lost: neither answered nor refused as "
        "the request deserves. Left: the client hung up by intent."
    )
    return Section(TITLE, [outcome, _table(found.requests)])


def _table(rows: list[Requests]) -> Table:
    head = ["Requests", "Sent", "Answered", "Refused", "Left", "Wrong", "Lost", "Lowest cosine"]
    return Table(head, [_cells(row) for row in rows], left=1)


def _cells(row: Requests) -> list[str]:
    counts = [str(count) for count in (row.asked, row.answered, row.refused, row.left)]
    faults = [f"**{count}**" if count else "0" for count in (row.wrong, row.lost)]
    return [row.kind, *counts, *faults, MISSING if row.cosine_min is None else f"{row.cosine_min:.6f}"]
