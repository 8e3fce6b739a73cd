"""Sphinx's settings. `make docs` builds the site into build/site, without a network."""

import re
from pathlib import Path

from sphinx.application import Sphinx

from tools.docs import reports, results

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

project = "clip-deploy"
author = "the authors of clip-deploy"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns: list[str] = []
html_theme = "furo"
html_title = "clip-deploy"
html_show_copyright = False
html_extra_path = ["../llms.txt"]
html_copy_source = True  # the Markdown of each page, under _sources/, for agents
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"
copybutton_here_doc_delimiter = "END"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
# Reports repeat headings and skip levels; DVC's console and our templates have no lexer of their own.
suppress_warnings = ["myst.header", "misc.highlighting_failure"]


def _write_results(_: Sphinx) -> None:
    for name, text in results().items():
        (HERE / "results" / name).write_text(text, encoding="utf-8")


def _lead_to_results(_: Sphinx, docname: str, source: list[str]) -> None:
    """A report that has a page here is linked as that page; on the source host the same link leads to the report."""
    up = "../" * docname.count("/")
    for name, report in reports().items():
        source[0] = re.sub(rf"\]\((?:\.\./)+{re.escape(report)}", f"]({up}results/{name}.md", source[0])


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", _write_results)
    app.connect("source-read", _lead_to_results)
