"""What one comment on a pull request says: the gate, what ships, what moved, and which plots are others."""

from collections.abc import Iterator, Sequence

from clip_deploy.core.config import CiConfig
from clip_deploy.report.ci_gate import (
    Reports,
    Result,
    each_timing,
    hardware_of,
    judged_timings,
    p50_interval,
    read_result,
    speedup_interval,
)
from clip_deploy.report.decisive import JudgedTimings, pace
from clip_deploy.report.rows import PLOTS
from clip_deploy.report.tables import MISSING, bullets, number, table
from clip_deploy.report.why import changed

MARK = "<!-- clip-deploy gate -->"  # for scripts that look for this comment


def comment(
    said: str,
    is_open: bool,
    reports: Reports,
    former: Reports,
    revision: str,
    limits: CiConfig,
    notes: Sequence[str] = (),
    page: str | None = None,
    otherwise: Sequence[str] = (),
) -> str:
    """Markdown.

    Args:
        said: the gate's table.
        former, revision: what it is held against, and how that is called.
        notes: what could not be compared, and whether the model is another.
        page: the address of report.html.
        otherwise: what the gate asked otherwise at that revision.
    """
    rows, plots = moved(reports, former, limits), redrawn(reports, former)
    table_of = table(["Target", "Quantity", revision, "now"], rows) if rows else ["Nothing."]
    link = f" [The report]({page})." if page else ""
    drawn = f"Others than at {revision}: {', '.join(plots)}" if plots else f"The same as at {revision}"
    parts = [
        MARK,
        f"## clip-deploy: the gate is {'open' if is_open else '**shut**'}",
        said,
        *([f"### The gate asks otherwise than at {revision}\n\n{bullets(otherwise)}"] if otherwise else []),
        *([_folded(notes)] if notes else []),
        f"### What ships\n\n{_shipped(reports, former, revision)}{link}",
        f"### Beyond its interval since {revision}\n\n" + "\n".join(table_of),
        f"### Plots\n\n{drawn}. `dvc plots diff {revision}` shows both.",
    ]
    return "\n\n".join(parts) + "\n"


def _folded(notes: Sequence[str]) -> str:
    return f"<details><summary>To know ({len(notes)})</summary>\n\n{bullets(notes)}\n\n</details>"


def _shipped(reports: Reports, former: Reports, revision: str) -> str:
    now, then = (advice.summary if (advice := each.advice()) else {} for each in (reports, former))
    winner, was = now.get("winner", "nothing"), then.get("winner", "nothing")
    return f"`{winner}`, as at {revision}." if winner == was else f"`{winner}`; at {revision} it was `{was}`."


def moved(reports: Reports, former: Reports, limits: CiConfig) -> list[list[str]]:
    """What differs from `former`, for better or worse, beyond its interval or, of what has none, its limit.

    A row of a table for each: target, quantity, then and now. Timings are compared on the same machine alone.
    """
    names = [name for name in reports.metrics() if name in former.metrics()]
    pairs = {name: (read_result(name, reports), read_result(name, former)) for name in names}
    same_machine = not list(changed(hardware_of(former), hardware_of(reports), "reports/environment.json"))
    present, before = (judged_timings(names, each) if same_machine else {} for each in (reports, former))
    found = []
    for name, (now, then) in pairs.items():
        rows = [*_moved(now, then, limits)]
        if same_machine and now.threads == then.threads:
            rows += _moved_timings(present[name], before[name], now.on_gpu)
        found += [[f"`{name}`", *row] for row in rows]
    return found


def _moved(now: Result, then: Result, limits: CiConfig) -> Iterator[list[str]]:
    """What was checked of a target."""
    status, former = (result.checked.status if result.checked else MISSING for result in (now, then))
    if status != former:
        yield ["gate", former, status]
    size, was = now.size_mb, then.size_mb
    if size and was and not 1 / (1 + limits.max_size_growth / 100) <= size / was <= 1 + limits.max_size_growth / 100:
        yield ["size, MB", number(was), number(size)]
    if not now.measured or not then.measured:
        return
    for tower, parity in then.measured.parity.items():
        found = now.measured.parity.get(tower)
        if found and abs(found.cosine_min - parity.cosine_min) > limits.max_cosine_drop:
            yield [f"{tower}: lowest cosine", f"{parity.cosine_min:.6f}", f"{found.cosine_min:.6f}"]
    present, before = now.measured.zero_shot, then.measured.zero_shot
    if present and before and now.evaluation == then.evaluation:
        apart = present.top1_drop_low > before.top1_drop_high or before.top1_drop_low > present.top1_drop_high
        if apart or abs(present.top1 - before.top1) > limits.max_top1_drop:
            yield ["top-1, %", f"{before.top1:.2f}", f"{present.top1:.2f}"]


def _moved_timings(now: JudgedTimings, then: JudgedTimings, on_gpu: bool) -> Iterator[list[str]]:
    name, show = ("p50 ms", p50_interval) if on_gpu else ("speed-up", speedup_interval)
    present = dict(each_timing(now))
    for where, former in each_timing(then):
        timing = present.get(where)
        if timing is None or timing.undecided or former.undecided:
            continue
        one, other = pace(timing, on_gpu), pace(former, on_gpu)
        if one.low > other.high or other.low > one.high:
            yield [f"{where}: {name}", show(former), show(timing)]


def redrawn(reports: Reports, former: Reports) -> list[str]:
    """The plots whose numbers are others than at `former`."""
    return [name for name in PLOTS if reports.content(f"plots/{name}.json") != former.content(f"plots/{name}.json")]
