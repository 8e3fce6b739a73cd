"""How far p50 on a GPU differs between two runs of the same models: what "Which one to ship" must allow for there.

    python -m benchmarks.between_runs 4d759ec reports/hardware/nvidia-h200   # writes between_runs.md there

Compares the reports in that folder with those of a revision, model by model. Left out are the rows that wait for Python
rather than for the GPU: eager PyTorch, TorchScript, and the unfused graph, whose texts replay no CUDA graph.
"""

import json
import sys
from pathlib import Path
from statistics import median, quantiles

from clip_deploy.core.config import REFERENCE
from clip_deploy.core.files import write_text
from clip_deploy.report.revisions import git
from clip_deploy.report.tables import number, table

WAITING = {REFERENCE, "torch-fp16", "torch-bf16", "torchscript-fp16", "onnx-fp32"}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m benchmarks.between_runs REVISION FOLDER      (FOLDER holds a folder for each model)")
    revision, folder = sys.argv[1], Path(sys.argv[2])
    body: list[list[str]] = []
    everything: list[float] = []
    for page in sorted(folder.glob("*/report.html")):
        former = git("show", f"{revision}:./{page.as_posix()}")
        before, now = p50s(former) if former else {}, p50s(page.read_text())
        found = {key: max(now[key] / before[key], before[key] / now[key]) for key in now.keys() & before.keys()}
        if len(found) < 2 or before == now:  # another model, or the same run
            continue
        furthest = max(found, key=lambda key: found[key])
        body.append([page.parent.name, *cells(list(found.values())), " ".join(furthest)])
        everything += found.values()
    if not body:
        sys.exit(f"error: {revision} holds no other run of a model in {folder}")
    body.append(["all", *cells(everything), ""])
    lines = [
        "# p50 of two runs",
        "",
        f"`python -m benchmarks.between_runs {revision} {folder}`: the larger over the smaller p50 of a row at one "
        "batch size, of rows that replay CUDA graphs; machines, builds and versions of this program may differ.",
        "",
        *table(["Model", "Timings", "Median", "95 % within", "Furthest", "Which"], body),
        "",
    ]
    write_text(folder / "between_runs.md", "\n".join(lines))
    print("\n".join(lines))


def p50s(page: str) -> dict[tuple[str, str, str], float]:
    """The p50 in milliseconds of a report's page, by target, tower and batch size."""
    content = json.loads(page.split('id="content">')[1].split("</script>")[0])
    return {
        (row["target"], tower, batch): timing["p50_ms"]
        for row in content["rows"]
        if row["target"] not in WAITING
        for tower, sizes in row["timings"].items()
        for batch, timing in sizes.items()
    }


def cells(ratios: list[float]) -> list[str]:
    return [str(len(ratios)), number(median(ratios)), number(quantiles(ratios, n=20)[-1]), number(max(ratios))]


if __name__ == "__main__":
    main()
