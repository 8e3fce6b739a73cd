"""The result of a race as Markdown that also reads well on the terminal."""

from typing import Any

MISSING = "-"
NOTES = """\
Each tower's inputs are the same for all, {threads} threads each; all take turns on the same cores. *Ratio*: latency
over that of `{basis}` in the same rounds, the median of them (below 1: faster than it), with a 95 % interval; ~ marks
one too wide to decide anything. *Cosine*: the lowest of any row with `{truth}`, at either batch size. *Size*: both
towers' files, and their share of those of `{basis}`. `{truth}` and `torch-eager` are the same program in two
environments: their difference is noise."""
DUELS = """\
Ours takes part where its lowest cosine is at least 0.9999 (fp32) or 0.99 (others), a peer in any case."""
PADDING = """\
`{basis}`: latency of texts of {tokens} tokens over that of the same texts padded to {context}, taking turns."""


def markdown(record: dict[str, Any]) -> str:
    """The page reports/peers.md: on what it was measured, who won, and all contestants."""
    machine = record["machine"]
    lines = [
        f"# `{record['model']}` against its peers",
        "",
        NOTES.format(**record),
        "",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores, {', '.join(machine['instruction_sets'])}; "
        f"{machine['memory_gb']} GB; {machine['system']}",
        *(f"- {name}: {_versions(versions)}" for name, versions in record["versions"].items()),
        f"- Command: `{record['command']}`",
        "",
        *["## Our fastest against the peers' fastest", "", DUELS, "", *duel_rows(record["duels"]), ""],
        *_padding(record),
    ]
    for tower, tokens in dict.fromkeys((row["tower"], row["tokens"]) for row in record["rows"]):
        found = [row for row in record["rows"] if (row["tower"], row["tokens"]) == (tower, tokens)]
        lines += [f"## {_place(found[0]).capitalize()}", "", *rows(found, record["contestants"], record["basis"]), ""]
    return "\n".join([*lines, *reasons(record["rows"])])


def reasons(found: list[dict[str, Any]]) -> list[str]:
    """Why each contestant that is missing somewhere is missing."""
    said = {row["contestant"]: row["unavailable"] for row in found if "unavailable" in row}
    lines = [f"- `{name}`: {' '.join(reason.split())}" for name, reason in said.items()]
    return ["## Unavailable", "", *lines, ""] if lines else []


def rows(found: list[dict[str, Any]], contestants: list[dict[str, Any]], basis: str) -> list[str]:
    """One line for each contestant at one tower and text length, all batch sizes beside each other."""
    batches = list(dict.fromkeys(row["batch"] for row in found))
    titles = [title for batch in batches for title in (f"p50 ms, batch {batch}", f"Ratio to {basis}, batch {batch}")]
    head = ["Contestant", "Precision", *titles, "Cosine", "Size MB", "Size %"]
    body = [_cells(one, [row for row in found if row["contestant"] == one["name"]]) for one in contestants]
    return _table(head, body, text={0, 1})


def _cells(one: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    timings = [cell for row in found for cell in (_number(row.get("p50_ms"), ".2f"), _ratio(row))]
    if any("unavailable" in row for row in found):
        timings[timings.index(MISSING)] = "unavailable"
    cosines = [row["cosine_min"] for row in found if row.get("cosine_min") is not None]
    share = None if one["size_share"] is None else 100 * one["size_share"]
    sizes = [_number(one["size_mb"], ".1f"), _number(share, ".1f")]
    return [one["name"], one["precision"] or MISSING, *timings, _number(min(cosines, default=None), ".4f"), *sizes]


def duel_rows(found: list[dict[str, Any]]) -> list[str]:
    """One line for each precision: our fastest against the peers' fastest."""
    head = ["Tower", "Batch", "Precision", "Ours", "Cosine", "Peer", "Cosine", "Ratio of latencies, ours / peer [95 %]"]
    body = [
        [
            *[_place(row), str(row["batch"]), row["precision"]],
            *[row["ours"], _number(row["ours_cosine_min"], ".4f"), row["peer"], _number(row["peer_cosine_min"], ".4f")],
            _ratio(row),
        ]
        for row in found
    ]
    return _table(head, body, text={0, 2, 3, 5})


def _padding(record: dict[str, Any]) -> list[str]:
    """Nothing for a model whose texts are always padded."""
    if not record["padding"]:
        return []
    context = max(row["tokens"] for row in record["rows"] if row["tokens"])
    body = [[str(row["batch"]), _ratio(row), _number(row.get("cosine_min"), ".4f")] for row in record["padding"]]
    words = PADDING.format(basis=record["basis"], tokens=record["padding"][0]["tokens"], context=context)
    table = _table(["Batch", "Ratio [95 %]", "Cosine of short with padded"], body, text=set())
    return ["## Short texts", "", words, "", *table, ""]


def _versions(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _table(head: list[str], body: list[list[str]], text: set[int]) -> list[str]:
    """Lines of a Markdown table; columns that are not `text` are aligned to the right."""
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    ruler = ["-" * (width - 1) + ("-" if column in text else ":") for column, width in enumerate(widths)]
    return [_line(cells, widths, text) for cells in (head, ruler, *body)]


def _line(cells: list[str], widths: list[int], text: set[int]) -> str:
    padded = [
        cell.ljust(width) if column in text else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def _place(row: dict[str, Any]) -> str:
    return row["tower"] if row["tokens"] is None else f"{row['tower']}, {row['tokens']} tokens"


def _ratio(row: dict[str, Any]) -> str:
    if "ratio" not in row:
        return MISSING
    mark = "~ " if row["unstable"] else ""
    return f"{mark}{row['ratio']:.2f}x [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"


def _number(value: float | None, style: str) -> str:
    return MISSING if value is None else format(value, style)
