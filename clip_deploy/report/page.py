"""The report as one page that stands alone."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from clip_deploy.core.json_files import rounded
from clip_deploy.report.markdown import _flow_facts, diagnosis_lines, timing_notes
from clip_deploy.report.rows import Row, best_throughput, doubts

PAGE = Path(__file__).with_name("report.html")


def page(
    title: str,
    rows: list[Row],
    facts: dict[str, str],
    flows: Sequence[dict[str, Any]] = (),
    shipping: dict[str, Any] | None = None,
    findings: Sequence[dict[str, Any]] = (),
    sections: Sequence[str] = (),
) -> str:
    """The report as one self-contained HTML page: no request leaves it; `sections` are lines of Markdown."""
    content = {
        "title": title,
        "doubts": doubts(rows),
        "facts": facts,
        "rows": [
            rounded({**asdict(row), "images_per_s": best_throughput(row, "vision"), "diagnosis": diagnosis_lines(row)})
            for row in rows
        ],
        "notes": timing_notes(rows),
        "flows": rounded(flows),
        "flow_facts": "".join(_flow_facts(flows)),
        "shipping": shipping or {"facts": [], "losers": {}, "front": []},
        "findings": list(findings),
    }
    data = json.dumps(content).replace("<", "\\u003c")  # no row may close the script
    return PAGE.read_text(encoding="utf-8").replace("__SECTIONS__", _rendered(sections)).replace("__CONTENT__", data)


def _rendered(sections: Sequence[str]) -> str:
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render("\n".join(sections))
    return html.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
