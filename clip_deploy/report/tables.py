"""Tables in Markdown, and numbers as the report states them."""

import math
from collections.abc import Iterable

from clip_deploy.core.records import ZeroShot
from clip_deploy.report.decisive import Judged
from clip_deploy.report.rows import Row, best_throughput

MISSING = "-"


def table(head: list[str], body: list[list[str]], left: int = 2) -> list[str]:
    """Lines of a Markdown table; columns behind the first `left` are set flush right."""
    rule = [*("---" for _ in head[:left]), *("---:" for _ in head[left:])]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def number(value: float | None) -> str:
    """Three significant digits, never in scientific notation."""
    if value is None:
        return MISSING
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 2
    return f"{value:,.{max(decimals, 0)}f}"


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def stated(timing: Judged | None, key: str) -> str:
    """A number of a timing, with ~ in front where it decides nothing."""
    return _mark(timing.undecided) + number(getattr(timing, key)) if timing else MISSING


def stated_throughput(row: Row) -> str:
    """Images per second at the best batch size, with ~ where one of its timings decides nothing."""
    return _mark(row.is_undecided("vision")) + number(best_throughput(row, "vision"))


def _mark(is_undecided: bool) -> str:
    return "~ " if is_undecided else ""


def speedup_cell(timing: Judged | None) -> str:
    """A speed-up over torch-fp32 with its 95 % interval; ~ where it decides nothing."""
    if timing is None:
        return MISSING
    return f"{_mark(timing.unstable)}{timing.speedup:.2f}x [{timing.speedup_low:.2f}, {timing.speedup_high:.2f}]"


def _drop(found: ZeroShot | None) -> str:
    if found is None:
        return MISSING
    return f"{found.top1_drop:.2f} [{found.top1_drop_low:.2f}, {found.top1_drop_high:.2f}]"


def _percentiles(timing: Judged | None) -> str:
    if timing is None:
        return MISSING
    return _mark(timing.undecided) + " / ".join(map(number, (timing.p50_ms, timing.p90_ms, timing.p99_ms)))
