"""The result of a race as one table, on the terminal and in Markdown."""

import textwrap
from typing import Any

HEAD = ["Tower", "Batch", "Contestant", "p50 ms", "Ratio to {basis} [95 %]", "Lowest cosine", "Size MB"]
MISSING = "-"
REASON_CHARACTERS = 80


def markdown(record: dict[str, Any]) -> str:
    """The page reports/peers.md: what was compared, on what, and the table."""
    machine, lines = record["machine"], ["# Against its peers", ""]
    lines += [
        f"`{record['model']}`, {record['threads']} threads for each contestant, all interleaved on the same cores; "
        f"ratio of median latencies to `{record['basis']}` over the same rounds (below 1: faster than it), with a 95 % "
        f"bootstrap interval; lowest cosine of any row with `{record['truth']}`; size of both towers' files.",
        "",
        f"- Machine: {machine['cpu']}, {machine['cores']} cores, {', '.join(machine['instruction_sets'])}; "
        f"{machine['memory_gb']} GB; {machine['system']}",
        *(f"- {name}: {_versions(versions)}" for name, versions in record["versions"].items()),
        "",
    ]
    lines += [*rows(record["rows"], record["basis"]), "", "## Our fastest against the peers' fastest", ""]
    return "\n".join([*lines, *duel_rows(record["duels"])]) + "\n"


def _versions(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def rows(found: list[dict[str, Any]], basis: str) -> list[str]:
    """One line for each contestant at each tower, batch size and text length."""
    return _table([title.format(basis=basis) for title in HEAD], [_cells(row) for row in found], numbers={1, 3, 5, 6})


def duel_rows(found: list[dict[str, Any]]) -> list[str]:
    """One line for each precision: our fastest against the peers' fastest."""
    body = [[_tower(row), str(row["batch"]), row["precision"], row["ours"], row["peer"], _ratio(row)] for row in found]
    return _table(["Tower", "Batch", "Precision", "Ours", "Peer", "Ratio of latencies [95 %]"], body, numbers={1})


def _table(head: list[str], body: list[list[str]], numbers: set[int]) -> list[str]:
    """Lines of a Markdown table, padded so that it reads well on the terminal too."""
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    ruler = ["-" * (width - 1) + (":" if column in numbers else "-") for column, width in enumerate(widths)]
    return [_line(cells, widths) for cells in (head, ruler, *body)]


def _line(cells: list[str], widths: list[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def _cells(row: dict[str, Any]) -> list[str]:
    start = [_tower(row), str(row["batch"]), row["contestant"]]
    if "unavailable" in row:
        return [*start, MISSING, f"unavailable: {_short(row['unavailable'])}", MISSING, MISSING]
    numbers = [_number(row, key, style) for key, style in (("cosine_min", ".4f"), ("size_mb", ".1f"))]
    return [*start, _number(row, "p50_ms", ".2f"), _ratio(row), *numbers]


def _tower(row: dict[str, Any]) -> str:
    return row["tower"] if row["tokens"] is None else f"{row['tower']}, {row['tokens']} tokens"


def _short(reason: str) -> str:
    """One line that fits the table; peers.json has all of it."""
    return textwrap.shorten(reason, REASON_CHARACTERS, placeholder="...").replace("|", "\\|")


def _ratio(row: dict[str, Any]) -> str:
    if "ratio" not in row:
        return MISSING
    return f"{row['ratio']:.2f}x [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"


def _number(row: dict[str, Any], key: str, style: str) -> str:
    value = row.get(key)
    return MISSING if value is None else format(value, style)
