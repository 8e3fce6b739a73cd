"""Tables in Markdown, and numbers as the report states them."""

import math
from typing import Any

from clip_deploy.report.rows import Row, best_throughput

MISSING = "-"


def table(head: list[str], body: list[list[str]], left: int = 2) -> list[str]:
    """Lines of a Markdown table; columns behind the first `left` are set flush right."""
    rule = [*("---" for _ in head[:left]), *("---:" for _ in head[left:])]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


def number(value: float | None) -> str:
    """Three significant digits, never in scientific notation."""
    if value is None:
        return MISSING
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:,.{max(decimals, 0)}f}"


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def stated(timing: dict[str, Any], key: str) -> str:
    """A number of a timing, with ~ in front where it decides nothing."""
    return _mark(timing.get("undecided")) + number(timing.get(key))


def stated_throughput(row: Row) -> str:
    """Images per second at the best batch size, with ~ where one of its timings decides nothing."""
    return _mark(row.is_undecided("vision")) + number(best_throughput(row, "vision"))


def _mark(is_undecided: bool | None) -> str:
    return "~ " if is_undecided else ""


def _speedup(timing: dict[str, Any]) -> str:
    if not timing:
        return MISSING
    mark, interval = _mark(timing["unstable"]), f"[{timing['speedup_low']:.2f}, {timing['speedup_high']:.2f}]"
    return f"{mark}{timing['speedup']:.2f}x {interval}"


def _interval(record: dict[str, float], key: str) -> str:
    if key not in record:
        return MISSING
    return f"{record[key]:.2f} [{record[f'{key}_low']:.2f}, {record[f'{key}_high']:.2f}]"


def _percentiles(timing: dict[str, Any]) -> str:
    found = " / ".join(number(timing.get(f"p{q}_ms")) for q in (50, 90, 99))
    return _mark(timing["undecided"]) + found if timing else MISSING
