"""The report's face for a terminal, a pull request or a README."""

import re
from collections.abc import Sequence

from clip_deploy.report.contents import Block, Figure, Report, Section, Table
from clip_deploy.report.rows import doubts
from clip_deploy.report.sections import sections
from clip_deploy.report.tables import table

TAG = re.compile(r"(`[^`\n]*`)|<(?=[A-Za-z/!?])")  # code, in which nothing is HTML; or what else would begin a tag


def markdown(report: Report) -> str:
    """All sections, without their plots."""
    return as_markdown(report.title, doubts(report.rows), sections(report))


def as_markdown(title: str, warnings: Sequence[str], parts: Sequence[Section]) -> str:
    """Sections below a title and what speaks against them."""
    blocks = [f"# {title}", *(f"**{warning}.**" for warning in warnings)]
    for section in parts:
        blocks += _blocks(section)
    return TAG.sub(lambda found: found[1] or "\\<", "\n\n".join(blocks)) + "\n"


def _blocks(section: Section) -> list[str]:
    return [f"## {section.title}", *(_block(block) for block in section.blocks if not isinstance(block, Figure))]


def _block(block: Block) -> str:
    if not isinstance(block, Table):
        return str(block)
    lines = table(block.head, [[_cell(text) for text in row] for row in block.body], block.left)
    return "\n".join([*lines, *(["", *(f"- {line}" for line in block.folded_as)] if block.folded_as else [])])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
