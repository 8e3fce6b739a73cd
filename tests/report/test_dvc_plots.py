"""`dvc plots` with our templates: each target by its name, and nothing from the network."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from support.browser import Browser, needs_chromium
from support.project import ROOT

PLOTS = yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"]


@pytest.fixture
def project(tmp_path):
    """The committed plots at a revision, and slower ones in the workspace."""
    folder = tmp_path / "project"
    for name in (".dvc/plots", "reports/plots"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc")
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"plots": PLOTS}))
    who = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "Before"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    path = folder / "reports/plots/latency.json"
    rows = [row | {"p50_ms": 2 * (row["p50_ms"] or 1)} for row in json.loads(path.read_text())]
    path.write_text(json.dumps(rows))
    return folder


@pytest.fixture
def chromium(tmp_path):
    browser = Browser(tmp_path / "browser")
    yield browser
    browser.close()


def drawn(project, chromium, *words):
    """The page that `dvc plots` made, once all of its plots are there."""
    subprocess.run([sys.executable, "-m", "dvc", "plots", *words], cwd=project, check=True, capture_output=True)
    chromium.open(f"file://{project}/dvc_plots/index.html")
    chromium.wait(f"document.querySelectorAll('.vega-embed :is(canvas, svg).marks').length === {len(PLOTS)}")
    return chromium


@needs_chromium
@pytest.mark.parametrize("words", [("show",), ("diff", "HEAD")], ids=["show", "diff"])
def test_all_plots_are_drawn_and_nothing_is_asked_of_the_network(project, chromium, words):
    page = drawn(project, chromium, *words)
    assert page.console == []
    assert {request["url"].split(":")[0] for request in page.requests.values()} == {"file"}


@needs_chromium
def test_without_vega_beside_it_the_page_says_so(project, chromium):
    (project / ".dvc/plots/vega.js").unlink()
    subprocess.run([sys.executable, "-m", "dvc", "plots", "show"], cwd=project, check=True, capture_output=True)
    chromium.open(f"file://{project}/dvc_plots/index.html")
    assert "vega.js beside this page, which draws its plots" in chromium.wait("document.body.innerText")


def specs(name):
    return json.loads((ROOT / ".dvc/plots" / f"{name}.json").read_text())


@pytest.mark.parametrize("plot", [next(iter(plot.items())) for plot in PLOTS], ids=lambda plot: plot[0])
def test_a_plot_has_a_template_of_ours_which_tells_targets_and_revisions_apart(plot):
    path, settings = plot
    encoding = specs(settings["template"])["encoding"]
    assert encoding["color"]["field"] == "target"
    assert "rev" in {
        entry.get("field") for name, entry in encoding.items() if name in ("strokeDash", "shape", "opacity")
    }
    rows = json.loads((ROOT / path).read_text())
    shown = {
        settings["x"],
        settings["y"],
        *(entry["field"] for entry in encoding.values() if "<" not in entry["field"]),
    }
    assert shown - {"rev"} <= set(rows[0])
