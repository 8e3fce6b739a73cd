"""The report's face for a browser: one page that stands alone."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import vl_convert
from markdown_it import MarkdownIt

from clip_deploy.core.json_files import rounded
from clip_deploy.report.contents import Block, Figure, Key, Report, Section, Table
from clip_deploy.report.rows import Row, doubts
from clip_deploy.report.sections import sections

PAGE = Path(__file__).with_name("report.html")
VEGA_LITE = "6.1"  # of those in vl-convert: another one draws other bytes
LONG = 30  # letters: such a cell is given room, and such a name breaks
INTERVAL = re.compile(r"(?<=[\dx]) (\[-?[\d.,]+, -?[\d.,]+\])")  # behind its number
MARKDOWN = MarkdownIt("commonmark", {"html": False})


def page(report: Report) -> str:
    """All sections as one HTML page: no request leaves it. Its rows stand in it once more as JSON, for programs."""
    return as_page(report.title, doubts(report.rows), sections(report), report.rows)


def as_page(title: str, warnings: Sequence[str], parts: Sequence[Section], rows: Sequence[Row]) -> str:
    """Sections as one HTML page, below a title and what speaks against them."""
    filled = {
        "TITLE": escape(title),
        "DOUBTS": "".join(f'<p class="doubt">{MARKDOWN.renderInline(warning)}.</p>\n' for warning in warnings),
        "SECTIONS": "\n".join(_section(section) for section in parts),
        "CONTENT": json.dumps(rounded({"rows": [asdict(row) for row in rows]})).replace("<", "\\u003c"),
    }
    return re.sub("__([A-Z]+)__", lambda found: filled[found[1]], PAGE.read_text(encoding="utf-8"))


def _section(section: Section) -> str:
    name = re.sub("[^a-z0-9]+", "-", section.title.lower()).strip("-")
    figures = [_figure(block) for block in section.blocks if isinstance(block, Figure)]
    plots = ['<div class="plots">', *figures, "</div>"] if figures else []
    blocks = [_block(block) for block in section.blocks if not isinstance(block, Figure)]
    return "\n".join([f'<section id="{name}">', f"<h2>{escape(section.title)}</h2>", *blocks, *plots, "</section>"])


def _block(block: Block) -> str:
    return _table(block) if isinstance(block, Table) else MARKDOWN.render(str(block)).rstrip()


def _table(table: Table) -> str:
    """The rows that are there; those that are not are folded away, in a table of their own."""
    places = [place for place in range(len(table.body)) if place not in table.folded]
    shown = _rows(table, places) if places or not table.folded else ""
    if not table.folded:
        return shown
    why = MARKDOWN.renderInline("; ".join(table.folded_as))
    return f"{shown}\n<details><summary>{why}</summary>\n{_rows(table, table.folded)}\n</details>"


def _rows(table: Table, places: list[int]) -> str:
    heads = "".join(
        f'<th scope="col"{_side(table, column)}>{_head(table, text)}</th>' for column, text in enumerate(table.head)
    )
    lines = [
        "<tr>" + "".join(_cell(table, place, column) for column in range(len(table.head))) + "</tr>" for place in places
    ]
    kind = ' class="sortable"' if table.keys else ""
    body = "\n".join(lines)
    return f'<div class="scroll"><table{kind}><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _head(table: Table, text: str) -> str:
    kept = re.sub(r"(?<=batch) (?=\d)| (?=%\])", "&nbsp;", escape(text))
    return f"<button>{kept}</button>" if table.keys else kept


def _cell(table: Table, place: int, column: int) -> str:
    text = MARKDOWN.renderInline(table.body[place][column])
    text = INTERVAL.sub(r" <small>\1</small>", text)
    for written, shown in (
        ("~ ", "~&nbsp;"),
        (" /", "&nbsp;/"),
        ("> *", ">&nbsp;*"),
    ):
        text = text.replace(written, shown)
    kind = "long" if column else "name"
    is_long = f' class="{kind}"' if len(table.body[place][column]) > LONG else ""
    key = _key(table.keys[place][column]) if table.keys else ""
    return f"<td{_side(table, column) or is_long}{key}>{text}</td>"


def _side(table: Table, column: int) -> str:
    return ' class="number"' if column >= table.left else ""


def _key(key: Key) -> str:
    return "" if key is None else f' data-key="{escape(str(key))}"'


def _figure(figure: Figure) -> str:
    spec = {**figure.spec, "description": figure.description}
    svg = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    return f"<figure><figcaption>{escape(figure.caption)}</figcaption>{svg}</figure>"
