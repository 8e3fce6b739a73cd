import json
from dataclasses import replace

import pytest
from support.records import checked, parity, retrieval, timing, zero_shot

from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.json_files import write_json
from clip_deploy.core.model import Finding
from clip_deploy.core.parsing import plain
from clip_deploy.core.records import CurvePoint, Diagnosis, Drop, EndToEnd, FeedTiming, FlowBatch, Limit, Photos, Search
from clip_deploy.report.contents import Report
from clip_deploy.report.markdown import markdown
from clip_deploy.report.recommend import Shipping
from clip_deploy.report.rows import metrics, plots, read_rows
from clip_deploy.report.sections import fastest, fastest_fact
from clip_deploy.report.tables import number

TIMING = plain(timing(speedup=1.5, speedup_low=1.4, speedup_high=1.6, reference_p50_ms=3.0))
CHECKED = checked(
    build={"opset": 18},
    parity=plain({"vision": parity(0.9999), "text": parity(0.9998)}),
    zero_shot=plain(zero_shot(top1_drop=0.5, top1_drop_low=-0.1, top1_drop_high=1.1)),
    retrieval=plain(retrieval(image_to_text_r1=40.0, text_to_image_r1=41.0)),
    flips=1.0,
)
UNAVAILABLE = {"status": "unavailable", "reasons": ["no GPU"], "precision": "fp16", "runtime": "ort", "device": "cpu"}
TIMED = {
    "status": "measured",
    "threads": 2,
    "towers": {"vision": {"1": TIMING, "8": {**TIMING, "throughput_per_s": 900.0}}, "text": {"1": TIMING}},
    "memory_mb": 60.0,
    "size_mb": 3.9,
}


ALONE = {**TIMING, "p50_ms": 3.0, "speedup": 1.0, "speedup_low": 0.99, "speedup_high": 1.01}  # against itself
REFERENCE = {
    **TIMED,
    "towers": {"vision": {"1": ALONE, "8": {**ALONE, "throughput_per_s": 900.0}}, "text": {"1": ALONE}},
}


@pytest.fixture
def rows(tmp_path):
    results = {
        "torch-fp32": (CHECKED, REFERENCE),
        "ort-int8": ({**CHECKED, "precision": "int8", "status": "fail", "reasons": ["2.0 % flipped > 1"]}, TIMED),
        "trt-fp16": (
            {**UNAVAILABLE, "build": {}, "trained": True},
            {"status": "unavailable", "reason": "no GPU"},
        ),
        "removed": (CHECKED, TIMED),
    }
    for name, (validated, timed) in results.items():
        write_json(tmp_path / "validate" / f"{name}.json", validated)
        write_json(tmp_path / "benchmark" / f"{name}.json", timed)
    return read_rows(["torch-fp32", "ort-int8", "trt-fp16"], tmp_path / "validate", tmp_path / "benchmark")


def test_what_int8_leaves_in_float_and_its_curve_are_in_the_report(rows):
    rows[1].search = Search(
        left_in_float=["vision: MatMul_7"],
        nodes=20,
        top1_drop=0.5,
        flips=1.0,
        cosine=0.9999,
        sensitivity={"vision: MatMul_7": 0.25, "text: Gather_0": 0.001},
        curve=[
            CurvePoint(share=0.0, top1_drop=0, flips=0, cosine=1.0),
            CurvePoint(share=1.0, top1_drop=9, flips=12.5, cosine=0.75),
        ],
    )
    text = markdown(Report("tiny on a CPU", rows))
    assert "| `ort-int8` | 1 of 20: vision: MatMul_7 | 0.50 points, 1.00 % | vision: MatMul_7 2.5e-01" in text
    assert "0 %: 0.00 points, 0.00 % (1.00000); 100 %: 9.00 points, 12.50 % (0.75000)" in text
    assert plots(rows)["sensitivity"] == [
        {"target": "ort-int8", "share_percent": 0, "top1_drop_points": 0, "flips_percent": 0, "cosine": 1.0},
        {
            "target": "ort-int8",
            "share_percent": 100,
            "top1_drop_points": 9,
            "flips_percent": 12.5,
            "cosine": 0.75,
        },
    ]


def test_what_was_fused_is_shown_beside_what_there_is_and_what_was_missed_in_bold(rows):
    rows[1].fusions = {
        "vision": {"attention": [4, 4], "layer_norm": [9, 10], "skip_layer_norm": [0, 7], "patch_embedding": [1, 1]},
        "text": {"attention": [2, 2], "layer_norm": [5, 5], "skip_layer_norm": [4, 4], "patch_embedding": [0, 0]},
    }
    lines = markdown(Report("title", rows)).splitlines()
    start = lines.index(
        "| Fused, of those in the model | attention | LayerNormalization | SkipLayerNormalization | patch embedding |"
    )
    assert lines[start + 2 : start + 4] == [
        "| `ort-int8` vision | 4/4 | **9/10** | **0/7** | 1/1 |",
        "| `ort-int8` text | 2/2 | 5/5 | 4/4 | - |",
    ]
    assert "`fusions: true` in conf/gates/" in lines[start + 5]


def test_what_was_fused_has_a_table_of_its_own_and_no_place_in_how_a_target_was_made(tmp_path):
    made = {"opset": 18, "fusions": {"vision": {"attention": [4, 4]}}}
    write_json(tmp_path / "validate" / "ort-fp32.json", {**CHECKED, "build": made})
    write_json(tmp_path / "benchmark" / "ort-fp32.json", TIMED)
    (row,) = read_rows(["ort-fp32"], tmp_path / "validate", tmp_path / "benchmark")
    assert (row.build, row.fusions) == ("opset 18", made["fusions"])


@pytest.mark.parametrize(
    ("value", "written"),
    [(1.0, "1.00"), (0.19, "0.190"), (59.62, "59.6"), (369.4, "369"), (2633.4, "2,633"), (0, "0.00")],
)
def test_numbers_have_three_digits(value, written):
    assert number(value) == written


def test_every_configured_target_has_a_row_in_order_and_no_other_has(rows):
    text = markdown(Report("title", rows))
    table = [line.split(" | ")[0:3] for line in text.splitlines() if line.startswith("| `")][:3]
    assert table == [
        ["| `torch-fp32`", "fp32", "pass"],
        ["| `ort-int8`", "int8", "**fail**"],
        ["| `trt-fp16`", "fp16", "**unavailable**"],
    ]
    assert "removed" not in text
    assert "- `ort-int8` fail: 2.0 % flipped > 1" in text
    assert "- `trt-fp16` unavailable: no GPU" in text


def test_the_gates_that_rows_were_held_to_are_below_the_table_with_where_they_are_set(rows):
    fp32 = {"min_cosine": Limit(0.9999, 1.0), "max_top1_drop": Limit(0.1, 0.0), "max_flips": Limit(0.2, 0.0)}
    no_classes = Limit(1.5, unchecked="the evaluation set has no classes")
    rows[0].limits = fp32
    rows[1].precision = "int8"
    rows[1].limits = {"min_cosine": Limit(0.9, 0.99), "max_top1_drop": no_classes, "max_flips": Limit(8.0, 1.0)}
    text = markdown(Report("title", rows))
    below = text[text.index("| `trt-fp16` ") :].split("\n## ")[0].splitlines()
    place = below.index("| Gate | Lowest cosine, at least | Top-1 drop, points, at most | Flips %, at most |")
    assert "conf/gates/, in the file that `gates` in params.yaml names" in below[place - 2]
    assert below[place + 2 : place + 5] == [
        "| `fp32` | 0.9999 | 0.1 | 0.2 |",
        "| `int8` | 0.9 | 1.5 (not applied: the evaluation set has no classes) | 8 |",
    ]


def test_rows_have_the_limits_that_validate_wrote(tmp_path):
    limits = {"max_flips": {"limit": 0.2, "value": 0.1}}
    (_, row) = written(tmp_path, {"ort-fp32": TIMED}, {**CHECKED, "limits": limits})
    assert row.limits == {"max_flips": Limit(0.2, 0.1)}


def test_what_the_references_own_speed_up_is_stands_below_the_table(rows):
    note = "\n- `torch-fp32`'s speed-up is over itself, the reference timed once more beside the reference: "
    assert note in markdown(Report("title", rows))
    assert "is over itself" not in markdown(Report("title", rows[1:]))


def test_metrics_hold_scalars_only_under_one_key_a_target(rows):
    record = metrics(rows)
    assert list(record) == ["torch-fp32", "ort-int8", "trt-fp16"]
    assert record["torch-fp32"]["images_per_s"] == 900.0
    assert record["torch-fp32"]["cosine_min"] == 0.9998
    assert record["trt-fp16"] == {"status": "unavailable"}
    assert all(not isinstance(value, list | dict) for target in record.values() for value in target.values())


def test_plots_are_flat_rows(rows):
    flat = plots(rows)
    assert {"target": "ort-int8", "batch_size": 8, "images_per_s": 900.0} in flat["throughput"]
    assert {row["target"] for row in flat["latency"]} == {"torch-fp32", "ort-int8"}


def written(folder, timed, checked=CHECKED):
    """The rows of targets by their benchmark's records, the reference among them."""
    for name, record in {"torch-fp32": REFERENCE, **timed}.items():
        write_json(folder / "validate" / f"{name}.json", checked)
        write_json(folder / "benchmark" / f"{name}.json", record)
    return read_rows(["torch-fp32", *timed], folder / "validate", folder / "benchmark")


def with_vision(**sizes):
    return {**TIMED, "towers": {"vision": sizes, "text": {"1": TIMING}}}


WIDE = {**TIMING, "p50_ms": 90.0, "speedup": 600.0, "speedup_low": 20.0, "speedup_high": 700.0}
DRIFTED = {**TIMING, "speedup": 3552.0, "speedup_low": 3551.0, "speedup_high": 3553.0, "reference_p50_ms": 321.0}


def test_speed_ups_of_a_busy_machine_are_marked_and_win_nothing(tmp_path):
    timed = {name: with_vision(**{"1": timing}) for name, timing in {"a": WIDE, "b": DRIFTED, "c": TIMING}.items()}
    rows = written(tmp_path, timed)
    text = markdown(Report("title", rows))
    assert fastest(rows, 1)["vision"].target == "c"
    assert "| `a` | fp32 | pass | ~ 90.0 | ~ 600.00x [20.00, 700.00] | 2.00 | 1.50x [1.40, 1.60] | ~ 500 |" in text
    assert "~ 3552.00x" in text
    assert (
        "- ~ marks timings that decide nothing (a, b): the machine was busy, so an interval is wide or the reference "
        "ran at another speed than beside other rows; reports/targets.json leaves them out. Time them again on a quiet "
        "machine: "
        "`dvc repro --force --single-item benchmark@torch-fp32 benchmark@a benchmark@b && dvc repro`"
    ) in text


def test_a_timing_that_decides_nothing_is_null_in_the_metrics_and_in_every_plot(tmp_path, kinds):
    """As an INT8 row came out beside other work: 3,552x, since the reference took 321 ms for its own row's 1.48."""
    timed = {"busy": with_vision(**{"1": DRIFTED, "8": {**TIMING, "throughput_per_s": 1280.0}}), "quiet": TIMED}
    rows = written(tmp_path, timed)
    found = metrics(rows)
    spoiled = {key: found["busy"][key] for key in ("timing", "vision_p50_ms", "vision_speedup", "images_per_s")}
    assert spoiled == {"timing": "undecided", "vision_p50_ms": None, "vision_speedup": None, "images_per_s": None}
    assert {key: found["busy"][key] for key in ("text_speedup", "memory_mb", "size_mb", "cosine_min")} == {
        "text_speedup": 1.5,
        "memory_mb": 60.0,
        "size_mb": 3.9,
        "cosine_min": 0.9998,
    }
    assert "timing" not in found["quiet"]
    drawn = plots(rows)
    assert {"target": "busy", "tower": "vision", "p50_ms": None} in drawn["latency"]
    assert {"target": "busy", "tower": "text", "p50_ms": 2.0} in drawn["latency"]
    assert {"target": "busy", "batch_size": 1, "images_per_s": None} in drawn["throughput"]
    assert {"target": "busy", "vision_p50_ms": None, "top1_percent": 90.0} in drawn["accuracy"]
    kinds(
        "21: a timing of a busy machine in targets.json, `dvc metrics diff` and the plots",
        before="ort-int8-static.vision_speedup 3,552 (the reference took 321 ms for 1.48), as if it were measured",
        now=json.dumps(spoiled),
    )


def test_the_best_of_all_batch_sizes_is_not_known_where_one_of_them_decides_nothing(tmp_path):
    rows = written(tmp_path, {"a": with_vision(**{"1": TIMING, "8": {**DRIFTED, "throughput_per_s": 3.0}})})
    found = metrics(rows)["a"]
    assert (found["vision_speedup"], found["images_per_s"], found["timing"]) == (1.5, None, "undecided")


@pytest.mark.parametrize("itself", [0.8, 1.25])
def test_intervals_hold_what_the_reference_differed_from_itself(itself, tmp_path):
    reference = {**REFERENCE, "towers": {"vision": {"1": {**ALONE, "speedup": itself}}, "text": {"1": ALONE}}}
    for name, timed in {"torch-fp32": reference, "ort-fp32": TIMED}.items():
        write_json(tmp_path / "validate" / f"{name}.json", CHECKED)
        write_json(tmp_path / "benchmark" / f"{name}.json", timed)
    row = read_rows(["torch-fp32", "ort-fp32"], tmp_path / "validate", tmp_path / "benchmark")[1]
    timing = row.timing("text", 1)
    assert (timing.speedup_low, timing.speedup_high) == pytest.approx((1.4 / 1.25, 1.6 * 1.25))
    assert timing.speedup == 1.5


def test_on_a_gpu_a_batch_is_judged_by_what_the_reference_did_there_or_at_a_larger_one(tmp_path):
    itself = {"1": 0.5, "8": 1.25, "256": 1.01}
    alone = {batch: {**ALONE, "speedup": speedup} for batch, speedup in itself.items()}
    timed = {batch: {**TIMING, "p50_low_ms": 1.9, "p50_high_ms": 2.1} for batch in itself}
    for name, towers in {"torch-fp32": alone, "ort-cuda-fp16": timed}.items():
        for each in towers.values():
            each |= {"p50_low_ms": 1.9, "p50_high_ms": 2.1}
        write_json(tmp_path / "validate" / f"{name}.json", {**CHECKED, "device": "cuda"})
        write_json(tmp_path / "benchmark" / f"{name}.json", {**TIMED, "towers": {"vision": towers, "text": {}}})
    rows = read_rows(["torch-fp32", "ort-cuda-fp16"], tmp_path / "validate", tmp_path / "benchmark")
    row = rows[1]
    for batch, spread in (("1", 2.0), ("8", 1.25), ("256", 1.01)):
        timing = row.timing("vision", int(batch))
        assert (timing.speedup_low, timing.speedup_high) == pytest.approx((1.4 / spread, 1.6 * spread))
        assert (timing.p50_low_ms, timing.p50_high_ms) == pytest.approx((1.9 / 1.03, 2.1 * 1.03), rel=1e-3)
    (marked,) = [line for line in markdown(Report("title", rows)).splitlines() if line.startswith("- ~")]
    assert "wait for Python" in marked
    assert "by p50" in marked
    assert "busy" not in marked
    found = metrics(rows)["ort-cuda-fp16"]
    assert (found["vision_p50_ms"], found["vision_speedup"], "timing" in found) == (2.0, None, False)


def test_on_a_gpu_a_row_whose_own_calls_differ_is_undecided_whatever_its_speed_up(tmp_path):
    steady = {**TIMING, "p50_low_ms": 1.9, "p50_high_ms": 2.1, "p90_ms": 2.9}
    waiting = {**steady, "p90_ms": 3.1}
    alone = {**ALONE, "p50_low_ms": 2.9, "p50_high_ms": 3.1}
    for name, each in {"torch-fp32": alone, "torch-fp16": waiting, "ort-cuda-fp16": steady}.items():
        towers = {"vision": {"1": each}, "text": {"1": each}}
        write_json(tmp_path / "validate" / f"{name}.json", {**CHECKED, "device": "cuda"})
        write_json(tmp_path / "benchmark" / f"{name}.json", {**TIMED, "towers": towers})
    rows = read_rows(["torch-fp32", "torch-fp16", "ort-cuda-fp16"], tmp_path / "validate", tmp_path / "benchmark")
    found = metrics(rows)
    assert (found["torch-fp16"]["vision_p50_ms"], found["torch-fp16"]["timing"]) == (None, "undecided")
    assert found["torch-fp16"]["vision_speedup"] == 1.5
    assert found["ort-cuda-fp16"]["vision_p50_ms"] == 2.0
    assert {tower: row.target for tower, row in fastest(rows, 1).items()} == dict.fromkeys(TOWERS, "ort-cuda-fp16")
    assert "- ~ marks timings that decide nothing (torch-fp16): their own calls differ" in markdown(
        Report("title", rows)
    )


SLOW = FlowBatch(300.0, 290.0, 310.0, 3.0, 1.5, 0.8)
BEST = FlowBatch(400.0, 390.0, 410.0, decode_ms=3.0, preprocess_ms=1.5, encode_ms=0.5)
FED = FeedTiming(
    "measured", None, 1.0, 0.5, 3.125, workers=2, through_host=False, best_batch=8, batches={1: SLOW, 8: BEST}
)
FLOW = EndToEnd(
    feeds={"pil": FED, "nvjpeg": FeedTiming("unavailable", "PyTorch sees no <GPU>")},
    photos=Photos(32, 480, 640, 90, 82.0),
    threads=2,
)


def test_the_way_from_jpeg_to_embedding_has_a_row_for_each_feed(rows):
    text = markdown(Report("title", rows, flows={"ort-fp32": FLOW}))
    assert "32 JPEGs of 480 x 640 pixels, quality 90, 82.0 kB each" in text
    assert (
        "| `ort-fp32`, pil | measured | 400 [390, 410] | 8 | 3.00 | 1.50 | 0.500 | decode | 1.0000 | 0.5 | 3.1 | 2 |"
        in text
    )
    assert "| `ort-fp32`, nvjpeg | **unavailable** | - | - | - | - | - | - | - | - | - | - |" in text
    assert "- `ort-fp32` nvjpeg unavailable: PyTorch sees no \\<GPU>" in text


def test_a_feed_with_wrong_embeddings_is_marked_beside_its_speed(rows):
    reason = "cosine 0.5000 < 0.99: other pixels"
    wrong = replace(FED, status="wrong", reason=reason, cosine_min=0.5, through_host=True)
    text = markdown(Report("title", rows, flows={"ort-fp32": replace(FLOW, feeds={"nvjpeg": wrong})}))
    assert "| `ort-fp32`, nvjpeg | **wrong** | 400 [390, 410] |" in text
    assert "- `ort-fp32` nvjpeg wrong: cosine 0.5000 < 0.99: other pixels" in text
    assert "- `ort-fp32` nvjpeg: the encoder takes no GPU tensors, so pixels go through the host" in text


def test_without_feeds_the_report_has_no_such_section(rows):
    assert "From JPEG" not in markdown(Report("title", rows, flows={}))


FINDING = Finding(
    code="eos-token",
    severity="error",
    found="text_config.eos_token_id is 585",
    expected="the tokenizer's 586",
    consequence="All texts would look the same",
    allowed=True,
)


def shipping(vision, text, batch=1, **losers):
    return Shipping(facts=[], losers=losers, front=[], ship={"vision": vision, "text": text}, batch=batch)


def test_the_fastest_row_that_is_not_shipped_has_the_word_why(tmp_path):
    rows = written(tmp_path, {"a": TIMED, "b": {**TIMED, "towers": {"vision": {"1": ALONE}, "text": {"1": TIMING}}}})
    found = "Fastest that passes its gate: a (vision, 1.50x [1.40, 1.60]), a (text, 1.50x [1.40, 1.60])"
    assert fastest_fact(rows, shipping("a", "a", b="slower")) == f"{found}."
    assert fastest_fact(rows, shipping("b", "b", a="over max_size_mb: 3.90 > 3.00")) == (
        f"{found}; a is not the one to ship: over max_size_mb: 3.90 > 3.00."
    )
    assert fastest_fact(rows, shipping("a", "b")).endswith(
        "; a is not the one to ship: it ships for the other tower alone."
    )


def test_without_a_row_that_passes_none_is_the_fastest(rows):
    for row in rows:
        row.status = "fail"
    assert fastest_fact(rows, shipping("", "")) == "Fastest that passes its gate: none."


def test_the_fastest_is_sought_at_the_batch_size_that_is_asked_for(tmp_path):
    quick = {**TIMING, "speedup": 9.0, "speedup_low": 8.9, "speedup_high": 9.1, "p50_ms": 0.33}
    slow = with_vision(**{"1": ALONE, "8": quick})
    rows = written(tmp_path, {"a": with_vision(**{"1": TIMING, "8": TIMING}), "b": slow})
    assert [fastest(rows, batch)["vision"].target for batch in (1, 8)] == ["a", "b"]


def test_what_was_found_in_the_checkpoint_and_allowed_is_in_the_report(rows):
    text = markdown(Report("title", rows, findings=[FINDING, replace(FINDING, severity="warning", allowed=False)]))
    row = "text_config.eos_token_id is 585 | the tokenizer's 586 | All texts would look the same |"
    assert f"| `eos-token` | **error**, allowed by `model.allow` | {row}" in text
    assert f"| `eos-token` | warning | {row}" in text


def test_without_findings_the_report_has_no_such_section(rows):
    assert "## Checkpoint" not in markdown(Report("title", rows))


def test_a_failed_target_has_its_layer_and_the_command_that_mends_it_below(rows):
    drop = Drop(
        tower="vision",
        layer="encoder.layers.2.self_attn",
        node="MatMul_42",
        cosine_before=0.9999998,
        cosine_after=0.9677,
        nodes=["vision: MatMul_39", "vision: MatMul_42"],
    )
    rows[1].diagnosis = Diagnosis("onnx-fp32", [drop], [])
    lines = markdown(Report("title", rows)).splitlines()
    place = lines.index("- `ort-int8` fail: 2.0 % flipped > 1")
    assert lines[place + 1 : place + 3] == [
        "  - vision: against onnx-fp32, cosine falls first in encoder.layers.2.self_attn (1.000000 to 0.967700, "
        "most behind MatMul_42); to keep in FP32: vision: MatMul_39, vision: MatMul_42",
        "  - `clip-deploy apply ort-int8` puts these nodes into params.yaml; then `dvc repro`",
    ]
