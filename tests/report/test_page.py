"""The two faces of a report that holds everything, and the page in a browser."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt
from support import records
from support.browser import PLACES, look, needs_chromium
from support.project import ROOT

from clip_deploy.core.json_files import write_json
from clip_deploy.core.model import Finding
from clip_deploy.core.parsing import plain
from clip_deploy.core.records import (
    CurvePoint,
    EndToEnd,
    FeedTiming,
    FlowBatch,
    Photos,
    Recall,
    StoredVectors,
    VectorCost,
)
from clip_deploy.core.served import Fault, HttpAnswers, HttpServed, Requests, VersionStep
from clip_deploy.report.contents import Figure, Report, Table
from clip_deploy.report.markdown import markdown
from clip_deploy.report.page import page
from clip_deploy.report.recommend import Shipping
from clip_deploy.report.rows import metrics, read_rows
from clip_deploy.report.sections import SECTIONS, sections
from clip_deploy.report.tables import number

MISSING = "no GPU: install one | or two"
DOUBT = "torch-fp32 itself answers no better than chance"
GRAPH = {
    "opsets": {"ai.onnx": 18},
    "nodes": 72,
    "fusion": {"attention": 4, "attention_expected": 4},
    "inputs": {"pixel_values": ["batch", 3, 48, 48]},
    "outputs": {"image_embeds": ["batch", 64]},
    "ir_version": 10,
    "producer": "pytorch",
}
FUSED = {"opset": 18, "fusions": {"vision": {"attention": [4, 4], "layer_norm": [9, 10]}}}
SEARCH = {
    "left_in_float": ["vision: MatMul_7"],
    "nodes": 20,
    "top1_drop": 0.5,
    "flips": 1.0,
    "cosine": 0.99,
    "sensitivity": {"vision: MatMul_7": 0.25},
    "curve": [
        {"share": 0.0, "top1_drop": 0, "flips": 0, "cosine": 1.0},
        {"share": 0.95, "top1_drop": 0.5, "flips": 1.5, "cosine": 0.99},
        {"share": 1.0, "top1_drop": 9, "flips": 12.5, "cosine": 0.75},
    ],
}
DROP = {"tower": "vision", "layer": "layers.2", "node": "MatMul_42", "nodes": ["vision: MatMul_42"]}
DIAGNOSIS = {"reference": "onnx-fp32", "drops": [DROP | {"cosine_before": 1.0, "cosine_after": 0.9}], "notes": []}
BEST = FlowBatch(400.0, 390.0, 410.0, decode_ms=3.0, preprocess_ms=1.5, encode_ms=0.5)
FLOW = EndToEnd(
    feeds={
        "pil": FeedTiming(
            "wrong", "cosine 0.5 < 0.99", 0.5, workers=2, through_host=True, best_batch=8, batches={8: BEST}
        ),
        "nvjpeg": FeedTiming("unavailable", "PyTorch sees no GPU"),
    },
    photos=Photos(32, 480, 640, 90, 82.0),
    threads=2,
)
FINDING = Finding(
    code="eos-token",
    severity="error",
    found="eos_token_id is 585",
    expected="586",
    consequence="All texts would look the same",
    allowed=True,
)
SHIPPING = Shipping(
    facts=["Ship ort-fp32: an image 2.00 ms, a text 1.00 ms (p50 of a call, batch 1)."],
    losers={
        "torch-fp32": "takes 3.00x as long as ort-fp32 on vision, 3.00x on text",
        "trt-fp32": "unavailable: no GPU",
        "trt-fp16": "unavailable: no GPU",
    },
    front=["ort-fp32"],
    ship={"vision": "ort-fp32", "text": "ort-fp32"},
    batch=1,
)
SERVED = records.served(
    versions=[VersionStep("two", ["1", "2"], "2", "", as_expected=True, right=True, sent=40, failed=0, error="")],
    faults=[Fault("noise", "400: a|b", refused=True, survived=True)],
)
SERVING = HttpServed(
    "pass",
    [],
    HttpAnswers([1, 4], 0.9999, [Requests(kind="a text", asked=9, answered=9, refused=0, left=0, wrong=0, lost=0)]),
)
VECTORS = StoredVectors(
    queries=1684,
    of="captions",
    images=960,
    dimension=12,
    costs=[
        VectorCost(12, "float32", 48, {1: Recall(100.0, 100.0, 100.0), 5: Recall(100.0, 100.0, 100.0)}),
        VectorCost(6, "int8", 6, {1: Recall(97.25, 96.0, 98.5), 5: Recall(98.04, 97.1, 98.96)}),
    ],
    left_out=["1/8 of 12 dimensions is not a whole number"],
)


def timing(p50_ms, speedup):
    return plain(
        records.timing(
            p50_ms=p50_ms,
            p50_low_ms=p50_ms * 0.99,
            p50_high_ms=p50_ms * 1.01,
            throughput_per_s=1500 / p50_ms,
            speedup=speedup,
            speedup_low=speedup * 0.95,
            speedup_high=speedup * 1.05,
            reference_p50_ms=p50_ms * speedup,
            gflop=0.1,
            queued_ms=p50_ms * 0.9,
        )
    )


def timed(p50_ms, memory_mb):
    sizes = {batch: timing(p50_ms * int(batch), 6.0 / p50_ms) for batch in ("1", "8")}
    towers = {"vision": sizes, "text": {"1": timing(p50_ms / 2, 6.0 / p50_ms)}}
    return {"status": "measured", "threads": 2, "towers": towers, "memory_mb": memory_mb, "size_mb": 3.9}


def checked(top1, **facts):
    answers = records.zero_shot(top1=top1, top1_drop=0.5, top1_drop_low=-0.1, top1_drop_high=1.1)
    found = records.measured(
        parity={"vision": records.parity(0.9999), "text": records.parity(0.9998)},
        zero_shot=answers,
        retrieval=records.retrieval(image_to_text_r1=40.0, text_to_image_r1=41.0),
        flips=1.0,
    )
    return records.checked(**{"build": {"opset": 18}, **plain(found), **facts})


ABSENT = {"status": "unavailable", "reasons": [MISSING], "precision": "fp16", "runtime": "tensorrt", "device": "cpu"}
ABSENT |= {"build": {}, "trained": True}
LOST = {"status": "fail", "reasons": ["2.0 % flipped > 1"], "diagnosis": DIAGNOSIS}
ON_CPU = {
    "torch-fp32": (checked(92.2, doubts=[DOUBT], limits={"max_flips": {"limit": 0.2, "value": 0}}), timed(6.0, 370)),
    "ort-fp32": (checked(92.2, graphs={"vision": GRAPH}, build=FUSED), timed(2.0, 62.1)),
    "ort-fp16": (checked(92.2), timed(2.04, 1062.0)),
    "ort-int8-dynamic": (checked(92.1, search=SEARCH, **LOST), timed(2.02, 59.3)),
    "torchscript-fp32": (checked(92.15), timed(3.4, 253)),
    "trt-fp32": (ABSENT, {"status": "unavailable", "reason": MISSING}),
    "trt-fp16": (ABSENT, {"status": "unavailable", "reason": MISSING}),
}
POWER = {"batch": 8, "mean_w": 500, "j_per_1000_images": 0.5, "clock_mhz": [345, 1980]}
PIXELS = {"max_diff": 1.0, "mean_diff": 0.1, "differing_percent": 0.5}
ON_GPU = {
    "ort-cuda-fp16": (
        checked(
            92.2,
            device="cuda",
            pixels=PIXELS,
            classifier={"agreement_percent": 99.0, "labels": 48},
            placement={"vision": {"nodes": {"CUDAExecutionProvider": 131}, "graph": True}},
        ),
        timed(0.1, 734) | {"gpu_memory_mb": 707, "power": POWER},
    ),
}


def report_of(targets, folder):
    for name, (check, time) in targets.items():
        write_json(folder / "validate" / f"{name}.json", check)
        write_json(folder / "benchmark" / f"{name}.json", time)
    return Report(
        title="tiny on a CPU",
        rows=read_rows(list(targets), folder / "validate", folder / "benchmark"),
        about={"Model": "tiny", "Data": "shapes"},
        run={"Machine": "EPYC", "Versions": "python 3.11"},
        flows={"ort-fp32": FLOW},
        shipping=SHIPPING,
        findings=[FINDING],
        served=SERVED,
        serving=SERVING,
        vectors=VECTORS,
    )


@pytest.fixture
def cpu(tmp_path):
    return report_of(ON_CPU, tmp_path)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Of a run that has something for every section."""
    return report_of(ON_CPU | ON_GPU, tmp_path_factory.mktemp("everything"))


@pytest.fixture(scope="module")
def faces(everything):
    return markdown(everything), page(everything)


def words_of(html):
    """The words of HTML, whatever breaks them."""
    text = re.sub("<[^>]*>", "", html)
    for name, letter in (
        ("&nbsp;", " "),
        ("&quot;", '"'),
        ("&#x27;", "'"),
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&amp;", "&"),
    ):
        text = text.replace(name, letter)
    return " ".join(text.split())


def words(lines):
    return words_of(MarkdownIt("commonmark").enable("table").render(lines))


@pytest.mark.parametrize("build", SECTIONS, ids=lambda build: build.__name__)
def test_every_section_is_on_both_faces(build, everything, faces):
    section, (text, html) = build(everything), faces
    shown = html.split(f"<h2>{section.title.replace(chr(39), '&#x27;')}</h2>")[1].split("</section>")[0]
    written = text.split(f"## {section.title}\n")[1].split("\n## ")[0]
    assert section.blocks
    for block in section.blocks:
        if isinstance(block, Figure):
            assert f"<figcaption>{block.caption}</figcaption><svg" in shown
            continue
        parts = [block]
        if isinstance(block, Table):
            parts = [*block.head, *(cell for row in block.body for cell in row), *block.folded_as]
        for part in parts:
            assert words(part) in words(written)
            assert words(part) in words_of(shown)


def test_the_table_of_shorter_vectors_says_what_each_costs_and_what_is_left_out(faces):
    section = faces[0].split("## Shorter vectors\n")[1].split("\n## ")[0]
    assert "| Dimensions | Type | Bytes of a vector | Recall@1 % [95 %] | Recall@5 % [95 %] |" in section
    assert "| 6 | int8 | 6 | 97.2 [96.0, 98.5] | 98.0 [97.1, 99.0] |" in section
    assert "- Left out: 1/8 of 12 dimensions is not a whole number.\n" in section
    assert "1,684 captions of different words search the 960 images" in section


def test_vectors_of_random_weights_are_not_taken_for_a_models(everything, faces):
    said = "The weights are random**: a trained model's vectors lie otherwise"
    assert said not in faces[0]
    everything = replace(everything, rows=[replace(row, trained=False) for row in everything.rows])
    assert said in markdown(everything).split("## Shorter vectors")[1].split("\n## ")[0]


def test_both_faces_have_the_same_sections_in_the_same_order(everything, faces):
    titles = [section.title for section in sections(everything)]
    assert len(titles) == len(SECTIONS)
    assert re.findall("^## (.*)$", faces[0], re.MULTILINE) == titles
    assert [words_of(title) for title in re.findall("<h2>(.*?)</h2>", faces[1])] == titles
    assert titles[:2] == ["Which one to ship", "Targets"]
    assert titles[-1] == "Machine and versions"


def test_what_is_not_there_takes_one_line_and_its_rows_are_folded(cpu):
    html, text = page(cpu), markdown(cpu)
    said = "`trt-fp32`, `trt-fp16` unavailable: no GPU: install one | or two"
    assert f"\n- {said}\n" in text
    assert text.count("**unavailable**") == 3  # two targets and a feed
    folded = html.split(f"<details><summary>{MarkdownIt().renderInline(said)}</summary>")[1].split("</details>")[0]
    assert folded.count("<strong>unavailable</strong>") == 2
    assert "unavailable" not in html.split('<table class="sortable">')[1].split("</table>")[0]


def test_the_page_stands_alone_and_no_text_becomes_html(cpu):
    cpu.rows[1].reasons = ["</script><script>alert(1)</script>"]
    cpu.about["Model"] = "<b>"
    html = page(cpu)
    assert "<script>alert" not in html
    assert "<b>" not in html
    assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/)\w+\.", html)


CUT = """
  const scrolls = [...document.querySelectorAll(".scroll")];
  return scrolls.filter(one => one.firstChild.scrollWidth > one.clientWidth + 1).map(one => one.innerText.slice(0, 40));
"""


@needs_chromium
def test_on_paper_no_table_is_cut_off(faces, tmp_path):
    """A4 across, less its margins, is 1047 pixels wide."""
    paper = re.sub(r"@page {.*?}", "", faces[1]).replace("@media print", "@media all")
    assert look(paper, tmp_path, 1047, CUT)[0] == []


@needs_chromium
def test_a_long_name_leaves_room_for_plots_and_for_the_cells_beside_it(tmp_path):
    name = "ort-cuda-fp16-with-a-name-that-says-all-of-its-settings-one-after-the-other"
    html = page(report_of({"torch-fp32": ON_CPU["torch-fp32"], name: ON_CPU["ort-fp16"]}, tmp_path))
    script = """return [
      Math.max(...[...document.querySelectorAll("td.name")].map(cell => cell.getBoundingClientRect().width)),
      [...document.querySelectorAll("svg")].map(svg => svg.viewBox.baseVal.width)];"""
    (widest, plots), _ = look(html, tmp_path, 400, script)
    assert widest < 220
    bars = plots[1]
    assert bars > 100 + 6 * len(name)


def test_no_text_becomes_html_in_markdown_and_code_stays_as_it_is(cpu):
    cpu.rows[3].reasons = ["<class 'list'> is no `<array>`: 0.5 < 0.9"]
    assert r"`ort-int8-dynamic` fail: \<class 'list'> is no `<array>`: 0.5 < 0.9" in markdown(cpu)


def test_intervals_are_set_small_and_other_brackets_are_not(faces, cpu):
    assert re.search(r"\dx <small>\[[\d.]+, [\d.]+\]</small>", faces[1])
    answer = "expected [-1,3,48,48], got [1, 2]"
    served = records.served(faults=[Fault("another shape", answer, refused=True, survived=True)])
    assert f">{answer}</td>" in page(replace(cpu, served=served))


def test_the_plot_tells_by_shape_and_in_words_what_ships_and_what_is_on_the_front(cpu):
    shipping = replace(SHIPPING, front=["ort-fp32", "ort-fp16"])
    svg = (
        page(replace(cpu, shipping=shipping))
        .split("<figcaption>Top-1 in % against latency</figcaption>")[1]
        .split("</svg>")[0]
    )
    dots = dict(re.findall(r'aria-label="(\S+): [^"]*, ([^",]+)" [^>]*d="', svg))
    assert dots["ort-fp32"] == "ships"
    assert dots["ort-fp16"] == "on the Pareto front"
    assert dots["torchscript-fp32"] == "passes its gate"
    assert dots["ort-int8-dynamic"] == "misses its gate"


def test_the_same_report_is_the_same_page_to_the_byte(cpu, tmp_path):
    (tmp_path / "report.pickle").write_bytes(pickle.dumps(cpu))
    again = "import pickle, sys; from clip_deploy.report.page import page; "
    again += "sys.stdout.buffer.write(page(pickle.load(open(sys.argv[1], 'rb'))).encode())"
    command = [sys.executable, "-c", again, str(tmp_path / "report.pickle")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout == page(cpu).encode()


def marks(html, caption):
    """Of the vertical axis of a plot."""
    svg = html.split(f"<figcaption>{caption}")[1].split("</svg>")[0]
    return re.findall(r'text-anchor="end"[^>]*>([\d.,]+)<', svg.split("Y-axis")[1])


@pytest.mark.parametrize("last", [0.75, 0.9998678, 0.99999])
def test_no_two_marks_of_an_axis_are_the_same(cpu, last):
    curve = [CurvePoint(share, 0.0, 0.0, cosine) for share, cosine in ((0.0, 1.0), (1.0, last))]
    cpu.rows[3].search = replace(cpu.rows[3].search, curve=curve)
    found = marks(page(cpu), "Mean cosine")
    assert len(set(found)) == len(found) >= 3


def test_a_timing_that_decides_nothing_is_in_no_plot(cpu):
    for sizes in cpu.rows[2].timings.values():
        for batch, timing in sizes.items():
            sizes[batch] = replace(timing, undecided=True, unstable=True)
    dots, bars = (html.split("</svg>")[0] for html in page(cpu).split("<svg")[1:3])
    assert 'aria-label="ort-fp32: 2.00 ms' in dots
    assert "ort-fp16" not in dots
    assert 'aria-label="ort-fp32 vision 3.00 [' in bars
    assert ">~</text>" in bars
    assert 'aria-label="ort-fp16' not in bars


LOOK = (
    PLACES
    + """
  const table = document.querySelector("table.sortable"), text = cell => cell.innerText.replace(/\\s+/g, " ");
  const rows = () => [...table.tBodies[0].rows].map(row => [...row.cells].map(text));
  const first = rows(), heads = [...table.tHead.rows[0].cells];
  const click = name => heads.find(head => text(head).startsWith(name)).querySelector("button").click();
  const sorted = ["Memory", "Memory", "Target", "Vision p50"].map(name => (click(name), rows().map(row => row[0])));
  return {first, sorted, heads: heads.map(text), ...places};
"""
)


@needs_chromium
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_of_the_page_is_cut_off_or_covered(faces, width, tmp_path):
    found, console = look(faces[1], tmp_path, width, LOOK)
    assert console == []
    assert found["inner"] == width
    assert found["wide"] <= width
    assert found["texts"] > 50
    assert (found["cut"], found["covered"]) == ([], [])


@needs_chromium
def test_what_the_page_writes_to_its_console_is_seen(cpu, tmp_path):
    _, console = look(page(cpu).replace('"use strict";', '"use strict"; console.error("ouch");'), tmp_path, 400, LOOK)
    assert "ouch" in console[0]


@needs_chromium
def test_the_tables_numbers_are_the_metrics(cpu, tmp_path):
    found, _ = look(page(cpu), tmp_path, 1280, LOOK)
    expected = metrics(cpu.rows)
    heads = {
        "Vision p50 ms, batch 1": "vision_p50_ms",
        "Text p50 ms, batch 1": "text_p50_ms",
        "Images/s, best batch": "images_per_s",
        "Memory MB": "memory_mb",
        "Size MB": "size_mb",
    }
    assert [row[0] for row in found["first"]] == list(expected)[:5]
    for cells in found["first"]:
        row = dict(zip(found["heads"], cells, strict=True))
        assert {head: row[head] for head in heads} == {
            head: number(expected[cells[0]][key]) for head, key in heads.items()
        }
        assert row["Vision speed-up [95 %]"].startswith(f"{expected[cells[0]]['vision_speedup']:.2f}x [")
        assert row["Gate"] == expected[cells[0]]["status"]


@needs_chromium
def test_a_click_on_a_columns_head_sorts(cpu, tmp_path):
    sizes = cpu.rows[2].timings["vision"]
    sizes[1] = replace(sizes[1], undecided=True)  # it is not sorted among what decides
    up, down, by_name, by_p50 = look(page(cpu), tmp_path, 1280, LOOK)[0]["sorted"]
    assert up == [
        "ort-int8-dynamic",
        "ort-fp32",
        "torchscript-fp32",
        "torch-fp32",
        "ort-fp16",
    ]  # 1,062 is more than 370
    assert down == up[::-1]
    assert by_name == sorted(up)
    assert by_p50 == ["ort-fp32", "ort-int8-dynamic", "torchscript-fp32", "torch-fp32", "ort-fp16"]


def test_programs_find_the_rows_in_the_page(cpu):
    data = json.loads(page(cpu).split('id="content">')[1].split("</script>")[0])
    assert data["rows"][1]["timings"]["vision"]["8"]["p50_ms"] == 16.0


def test_a_report_of_nothing_that_is_there_has_both_faces_without_plots(tmp_path):
    report = report_of({name: ON_CPU[name] for name in ("trt-fp32", "trt-fp16")}, tmp_path)
    assert "<svg" not in page(report)
    assert "<details><summary><code>trt-fp32</code>, <code>trt-fp16</code> unavailable" in page(report)
    assert "| `trt-fp32` | fp16 | **unavailable** | - |" in markdown(report)
    assert "## Batch sizes\n\nNo target was timed.\n" in markdown(report)


def test_one_target_alone_is_drawn(tmp_path):
    dots = page(report_of({"torch-fp32": ON_CPU["torch-fp32"]}, tmp_path)).split("<svg")[1].split("</svg>")[0]
    assert 'aria-label="torch-fp32: 6.00 ms, top-1 in % 92.2, passes its gate"' in dots
    assert ">torch-fp32</text>" in dots
