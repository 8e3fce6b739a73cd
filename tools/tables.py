"""The rows of tables in README and docs/ that repeat reports/ or conf/: each stands behind `<!-- rows: NAME -->`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
H200 = "reports/hardware/nvidia-h200/vit-b-32-untrained/report.md"
EMBED_GPU = "reports/hardware/nvidia-h200/embed_gpu.json"
EMBED_GPUS = "reports/hardware/nvidia-h200/embed_gpu-two-gpus.json"
L14 = "reports/hardware/nvidia-h200/vit-l-14-untrained-fp8/report.md"
TENSORRT = "reports/hardware/nvidia-h200/vit-l-14-untrained-trt/report.md"
FP8 = {  # models whose FP8 was timed beside FP16
    "B/32": "reports/hardware/nvidia-h200/vit-b-32-untrained-fp8/report.md",
    "L/14": L14,
}
TINY_FP8 = {"tiny-shapes": "reports/hardware/nvidia-h200/tiny-shapes-fp8/report.md"}
BESIDE = ("ort-trt-fp16", "torch-compile-fp16", "torch-fused-fp16")
MARKED = re.compile(r"(<!-- rows: (.+?) -->\n+\|.*\n\|[ :|-]+\|\n)((?:\|.*\n)*)")
EDGES = ("images, batch 1", "images, batch 8", "texts of 77 tokens, batch 1", "texts of 77 tokens, batch 8")
CHINESE_EDGES = ("图像，批大小 1", "图像，批大小 8", "77 个 token 的文本，批大小 1", "77 个 token 的文本，批大小 8")


def with_rows(text: str) -> str:
    """A page with the rows of its marked tables as reports/ has them now."""
    return MARKED.sub(lambda found: found[1] + "".join(f"| {' | '.join(row)} |\n" for row in ROWS[found[2]]()), text)


def targets() -> list[list[str]]:
    """Of the table of targets in reports/report.md, the columns that fit a page; in bold what ships."""
    columns = (
        *("Target", "Gate", "Vision speed-up [95 %]", "Text speed-up [95 %]", "Images/s, best batch", "Size MB"),
        *("Lowest cosine, vision / text", "Top-1 %"),
    )
    head, *rows = _table(_read("reports/report.md"), "## Targets")
    ships = {f"`{name}`" for name in _json("reports/recommendation.json")["ship"].values()}
    cells = [[row[head.index(column)] for column in columns] for row in rows]
    return [[f"**{name}**" if name in ships else name, *others] for name, *others in cells]


def embed() -> list[list[str]]:
    """Rates of `embed` and of what it is made of, in images per second."""
    parts = _json("reports/embed.json")["parts"]
    rows = []
    for name, size in (("pictures", "96 x 96 pixels"), ("photos", "640 x 480 pixels")):
        for feed in ("exact", "fast"):
            made = parts[name][feed]
            rates = (parts[name]["tower_per_s"], made["feed_per_s"], made["embed_per_s"])
            rows.append([size, f"`{feed}`", *(f"{rate:,}" for rate in rates), f"{made['of_shared']:.2f}"])
    return rows


def serve() -> list[list[str]]:
    """The HTTP server's embeddings and labels, Triton's labels, and its bare tower's embeddings, by clients."""
    found = _json("reports/serve.json")
    rows = []
    for clients in ("1", "8", "32", "64"):
        row = [clients]
        for name in ("embeddings", "zero-shot", "Triton zero-shot"):
            level = found["levels"][name][clients]
            row += [f"{level['per_s'][0]:,.0f}", f"{level['p50_ms'][0]:.1f} / {level['p99_ms'][0]:.1f}"]
        row.append(f"{found['levels']['Triton pixels'][clients]['per_s'][0]:,.0f}")
        middle, low, high = found["goals"][f"over Triton zero-shot at {clients}"]
        rows.append([*row, f"{middle:.2f}x [{low:.2f}, {high:.2f}]"])
    return rows


def peers(edges: tuple[str, ...] = EDGES) -> list[list[str]]:
    """Our fastest over the peers' fastest, and our fastest INT8 over ort-fp32, of images and of whole texts."""
    text = _read("reports/peers.md")
    _, *won = _table(text, "## Our fastest against the peers' fastest")
    rows = []
    for label, (tower, batch) in zip(edges, ((t, b) for t in ("vision", "text, 77 tokens") for b in "18"), strict=True):
        mine = {row[2]: row for row in won if row[:2] == [tower, batch]}
        head, *all_ = _table(text, f"## {tower.capitalize()}")
        own = next(row for row in all_ if row[0] == mine["int8"][3])
        rows.append(
            [
                label,
                *(mine[p][7] for p in ("fp32", "bf16", "int8")),
                own[head.index(f"Ratio to ort-fp32, batch {batch}")],
            ]
        )
    return rows


def gates() -> list[list[str]]:
    """The limits of conf/gates/standard.yaml."""
    limits = yaml.safe_load(_read("conf/gates/standard.yaml"))
    keys = ("min_cosine", "max_top1_drop", "max_flips")
    return [
        [f"`{name}`", *(f"{limits[name][key]:g}" for key in keys)] for name in ("fp32", "fp16", "bf16", "fp8", "int8")
    ]


def h200() -> list[list[str]]:
    """p50 in ms of both towers at every batch size, and the ratio of our fastest to the others' fastest."""
    text = _read(H200)
    rows: dict[str, list[str]] = {}
    for tower in ("### Vision", "### Text"):
        for row in _table(text, tower)[1:]:
            if row[1].startswith("p50"):
                rows.setdefault(row[0], [row[0]]).extend(cell.partition(" / ")[0] for cell in row[2:])
    ratios = [row[6] for row in _table(text, "## Our graphs, torch.compile and TensorRT")[1:]]
    return [*rows.values(), ["fastest of ours / of torch.compile and TensorRT", *ratios]]


def fp8() -> list[list[str]]:
    """Milliseconds in FP16 and FP8, single calls / back to back, and how many times as fast FP8 is."""
    found = []
    for model, path in FP8.items():
        head, *rows = _table(_read(path), "## Single calls and back to back")
        cells = {row[0]: row for row in rows}
        for column in range(1, len(head)):
            half, eight = (cells[f"`torch-fused-{precision}`"][column] for precision in ("fp16", "fp8"))
            pairs = zip(half.split(" / "), eight.split(" / "), strict=True)
            times = " / ".join(f"{float(slow) / float(fast):.2f}" for slow, fast in pairs)
            found.append([f"{model}, {head[column]}", half, eight, times])
    return found


def fp8_accuracy() -> list[list[str]]:
    """What FP8 costs on the GPU; of models with random weights the lowest cosine alone says anything."""
    columns = ("Lowest cosine, vision / text", "Drop, points [95 %]", "Flips %")
    found = []
    for model, path in (TINY_FP8 | FP8).items():
        head, *rows = _table(_read(path), "## Targets")
        row = next(row for row in rows if row[0] == "`torch-fused-fp8`")
        cells = [row[head.index(column)] for column in columns]
        found.append([model, *(cells if model in TINY_FP8 else [cells[0], "-", "-"])])
    return found


def tensorrt() -> list[list[str]]:
    """p50 in ms of L/14 by TensorRT, from a run of its own, beside torch.compile and our kernels."""
    found = []
    for tower in ("vision", "text"):
        times: dict[str, list[str]] = {}
        for path in (TENSORRT, L14):
            head, *rows = _table(_read(path), f"### {tower.capitalize()}")
            times |= {
                row[0]: [cell.partition(" / ")[0] for cell in row[2:]] for row in rows if row[1].startswith("p50")
            }
        columns = zip(*(times[f"`{name}`"] for name in BESIDE), strict=True)
        found += [
            [f"{tower} @{batch.removeprefix('batch ')}", *cells] for batch, cells in zip(head[2:], columns, strict=True)
        ]
    return found


def embed_gpu() -> list[list[str]]:
    """Images per second of `embed` and of what it is made of, on a GPU."""
    found = _json(EMBED_GPU)["sizes"]["640x480"]
    return [[name, f"{rate:,}"] for name, rate in found["per_s"].items()] + on_gpus(EMBED_GPU)


def on_gpus(path: str) -> list[list[str]]:
    """Images per second of `embed --gpus`, by the number of GPUs."""
    found = _json(path)["sizes"]["640x480"]
    return [
        [f"`--gpus`, {count}, {name}", f"{rate:,.0f}"]
        for kind, name in (("embed_on_disk", "from the first call on"), ("embed_on_disk_steady", "steady"))
        for count, rate in found[f"{kind}_per_s"].items()
    ]


ROWS: dict[str, Callable[[], list[list[str]]]] = {
    "reports/report.md": targets,
    "reports/embed.json": embed,
    "reports/serve.json": serve,
    "reports/peers.md": peers,
    "reports/peers.md zh": lambda: peers(CHINESE_EDGES),
    "conf/gates/standard.yaml": gates,
    H200: h200,
    "FP8": fp8,
    "FP8 accuracy": fp8_accuracy,
    EMBED_GPU: embed_gpu,
    EMBED_GPUS: lambda: on_gpus(EMBED_GPUS),
    TENSORRT: tensorrt,
}


def _table(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, its head first and its rule left out."""
    below = text[text.index(f"\n{heading}\n") :]
    lines = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)
    if lines is None:
        raise ValueError(f"no table below {heading}")
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split(" |")] for line in lines[0].splitlines())
    return [head, *rows]


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _json(path: str) -> Any:
    return json.loads(_read(path))
