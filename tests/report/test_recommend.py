from dataclasses import replace

import pytest
from support.records import judged, zero_shot

from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.config import Device, RecommendConfig
from clip_deploy.core.errors import ConfigError
from clip_deploy.core.records import PairVerdict
from clip_deploy.report import recommend as module
from clip_deploy.report.contents import Report
from clip_deploy.report.markdown import markdown
from clip_deploy.report.recommend import shown
from clip_deploy.report.rows import Row


def timing(speedup, spread=0.02, **other):
    sound = {
        "p50_ms": 10 / speedup,
        "p50_low_ms": 9.9 / speedup,
        "p50_high_ms": 10.1 / speedup,
        "calls": 200,
        "throughput_per_s": 100 * speedup,
        "speedup": speedup,
        "speedup_low": speedup * (1 - spread),
        "speedup_high": speedup * (1 + spread),
        "reference_p50_ms": 10.0,
    }
    return judged(**{**sound, **other})


def row(target, vision, text, **other):
    towers = {"vision": {1: timing(vision)}, "text": {1: timing(text)}}
    common = {
        "runtime": "ort",
        "files": {"vision.onnx": "0"},
        "precision": "fp32",
        "timings": towers,
        "memory_mb": 50.0,
        "size_mb": 300.0,
        "zero_shot": zero_shot(),
        "cosine_min": {"vision": 0.999, "text": 0.998},
    }
    return Row(target, "pass", **{**common, **other})


def drop(points):
    return zero_shot(top1=90 - points, top1_drop=points, top1_drop_high=2.0)


def recommend(rows, limits, together=None, unpackable=None):
    """Pairs pass their gate together, and cost as much as both targets, unless `together` says what they do.

    All can be packaged, unless `unpackable` says what cannot.
    """

    def alike(vision, text):
        assert vision is not text
        return replace(vision, target=f"{vision.target} with {text.target}")

    return module.recommend(rows, limits, together or alike, unpackable or (lambda name: None))


REFERENCE = row("torch-fp32", 1.0, 1.0, runtime="eager")


def test_the_fastest_that_passes_its_gate_wins_and_every_other_gets_its_reason():
    rows = [
        REFERENCE,
        row("ort-fp32", 2.0, 2.0),
        row("ort-int8", 3.0, 4.0, precision="int8"),
        Row("trt-fp16", "unavailable", ["no GPU"]),
        replace(row("ort-fp16", 9.0, 9.0), status="fail", reasons=["top-1 drop 7.00 points", "more"]),
    ]
    advice = recommend(rows, RecommendConfig())
    assert advice.ship == {"vision": "ort-int8", "text": "ort-int8"}
    assert advice.losers == {
        "torch-fp32": "takes 3.00x as long as ort-int8 on vision, 4.00x on text",
        "ort-fp32": "takes 1.50x as long as ort-int8 on vision, 2.00x on text",
        "trt-fp16": "unavailable: no GPU",
        "ort-fp16": "gate failed: top-1 drop 7.00 points",
    }
    assert advice.note == "the recommended target is packaged"
    assert advice.targets["ort-int8"].files == {"vision.onnx": "0"}


@pytest.mark.parametrize(
    ("limits", "change", "reason"),
    [
        ({"max_size_mb": 300}, {"size_mb": 605.0}, "over max_size_mb: 605 > 300"),
        ({"max_memory_mb": 50}, {"memory_mb": 72.0}, "over max_memory_mb: 72.0 > 50.0"),
        ({"max_memory_mb": 50}, {"memory_mb": None}, "max_memory_mb: not measured"),
        ({"max_memory_mb": 50}, {"device": "cuda", "gpu_memory_mb": 900.0}, "over max_memory_mb: 900 > 50.0"),
        ({"max_top1_drop": 1.0}, {"zero_shot": drop(1.5)}, "over max_top1_drop: 1.50 > 1.0 points"),
        ({"device": Device.cpu}, {"device": "cuda"}, "runs on cuda, recommend.device is cpu"),
        ({"batch": 8}, {}, "not timed at batch 8"),
        ({"max_p95_ms": 1.0}, {}, "max_p95_ms: 200 calls of the vision tower support no p95 (100 do)"),
    ],
)
def test_a_limit_that_is_broken_is_the_reason(limits, change, reason):
    fast = replace(row("ort-int8", 3.0, 4.0), **change)
    advice = recommend([REFERENCE, fast], RecommendConfig(**limits))
    assert advice.losers["ort-int8"] == reason


def test_a_p95_is_held_against_its_limit_for_each_tower():
    timings = {"vision": {1: timing(3.0, p95_ms=0.9)}, "text": {1: timing(4.0, p95_ms=1.25)}}
    advice = recommend([replace(row("ort-int8", 1, 1), timings=timings)], RecommendConfig(max_p95_ms=1.0))
    assert advice.losers == {"ort-int8": "over max_p95_ms: text 1.25 > 1.00"}
    assert advice.ship == {}
    assert shown(advice, []).facts[0].startswith("Ship nothing: no target passes its gate and keeps the limits")


def test_a_tower_that_was_not_timed_is_named():
    half = row("ort-fp32", 2.0, 2.0)
    del half.timings["text"]
    assert recommend([half], RecommendConfig()).losers == {"ort-fp32": "text tower not timed at batch 1"}


def test_the_summary_is_of_what_ships():
    rows = [REFERENCE, row("ort-int8", 4.0, 5.0, zero_shot=drop(0.5))]
    assert recommend(rows, RecommendConfig()).summary == {
        "winner": "ort-int8",
        "image_ms": 2.5,
        "text_ms": 2.0,
        "cosine_min": 0.998,
        "size_mb": 300.0,
        "top1_percent": 89.5,
    }
    undecided = replace(rows[1], timings={"vision": {1: timing(4.0, undecided=True)}, "text": {1: timing(5.0)}})
    only = recommend([undecided], RecommendConfig()).summary
    assert (only["winner"], only["image_ms"], only["text_ms"]) == ("ort-int8", None, 2.0)
    assert recommend([Row("trt-fp16", "unavailable", ["no GPU"])], RecommendConfig()).summary == {"winner": "none"}


def test_the_summary_of_a_pair_is_that_of_both_together():
    def together(vision, text):
        return replace(
            vision,
            target=f"{vision.target} with {text.target}",
            timings={"vision": vision.timings["vision"], "text": text.timings["text"]},
            size_mb=200.0,
        )

    rows = [REFERENCE, row("a", 5.0, 2.0), row("b", 2.0, 4.0)]
    found = recommend(rows, RecommendConfig(), together).summary
    assert (found["winner"], found["image_ms"], found["text_ms"], found["size_mb"]) == ("a with b", 2.0, 2.5, 200.0)
    failed = recommend(rows, RecommendConfig(), lambda *each: replace(together(*each), status="fail", reasons=["no"]))
    assert failed.ship == {"vision": "a", "text": "a"}
    assert (failed.summary["winner"], failed.summary["size_mb"]) == ("a", 300.0)


def test_each_tower_gets_its_own_where_that_is_better():
    advice = recommend([REFERENCE, row("a", 3.0, 1.5), row("b", 2.0, 4.0)], RecommendConfig())
    assert advice.ship == {"vision": "a", "text": "b"}
    assert advice.pairs == {
        "a with b": PairVerdict(advice.ship, precision="fp32", status="pass", reasons=[])  # judged once
    }
    assert set(advice.shipment().targets) == {"a", "b"}
    assert advice.losers["torch-fp32"] == "takes 3.00x as long as a on vision; 4.00x as long as b on text"


PAIR_FAILED = "a for images with b for texts, the best for each tower, failed together: "


@pytest.mark.parametrize(
    ("change", "limits", "reason"),
    [
        ({"zero_shot": drop(1.5)}, {}, "over max_top1_drop: 1.50 > 1.0 points"),
        ({"memory_mb": 110.0}, {"max_memory_mb": 100}, "over max_memory_mb: 110 > 100"),
        ({"size_mb": 605.0}, {"max_size_mb": 500}, "over max_size_mb: 605 > 500"),
        ({"status": "fail", "reasons": ["flips 9.00 % > 0.5 (gates.fp32.max_flips)"]}, {}, "flips 9.00 % > 0.5 (gates"),
    ],
)
def test_a_pair_that_fails_together_gives_way_to_the_best_single_target_and_the_report_says_so(change, limits, reason):
    rows = [REFERENCE, row("a", 3.0, 1.5), row("b", 2.0, 4.0)]
    advice = recommend(rows, RecommendConfig(**limits), lambda vision, text: replace(vision, target="pair", **change))
    assert advice.ship == {"vision": "b", "text": "b"}
    assert advice.pairs["a with b"].status == "fail"
    assert reason in advice.pairs["a with b"].reasons[0]
    assert advice.losers["a"] == "a with b failed together; alone takes 0.67x as long as b on vision, 2.67x on text"
    assert advice.alike == {}
    report = markdown(Report("title", rows, shipping=shown(advice, rows)))
    assert "\n- Ship b: an image 5.00 ms, a text 2.50 ms" in report
    assert f"\n- {PAIR_FAILED}{reason}" in report


def test_one_target_serves_both_towers_where_the_others_winner_cannot_be_told_apart_from_it():
    advice = recommend([row("a", 3.0, 3.98), row("b", 2.0, 4.0)], RecommendConfig())
    assert advice.ship == {"vision": "a", "text": "a"}
    assert advice.alike == {"text": ["b"]}
    assert "(not to be told apart on text: the intervals overlap)" in advice.losers["b"]


def near(cosine):
    return {"cosine_min": {"vision": cosine, "text": 1.0}}


def test_where_speeds_cannot_be_told_apart_the_closest_to_the_reference_ships_and_the_report_says_why():
    rows = [
        row("slower-fp32", 2.0, 2.0, **near(1.0)),
        row("ort-fp32", 2.96, 3.0, **near(0.99995)),
        row("ort-fp16", 2.95, 3.0, **near(0.9999), size_mb=150.0),
        row("larger-fp32", 3.01, 3.01, **near(1.0), size_mb=310.0),
        row("ort-int8", 3.02, 3.02, **near(0.9992), size_mb=75.0),
    ]
    for given in (rows, rows[::-1]):
        advice = recommend(given, RecommendConfig())
        assert advice.ship == {"vision": "ort-fp16", "text": "ort-fp16"}
        assert advice.losers == {
            "slower-fp32": "takes 1.48x as long as ort-fp16 on vision, 1.50x on text",
            "ort-fp32": "takes 1.00x as long as ort-fp16 on vision, 1.00x on text (not to be told apart on vision and "
            "text: the intervals overlap); larger, 300 MB",
            "larger-fp32": "takes 0.98x as long as ort-fp16 on vision, 1.00x on text (not to be told apart on vision "
            "and text: the intervals overlap); larger, 310 MB",
            "ort-int8": "takes 0.98x as long as ort-fp16 on vision, 0.99x on text (not to be told apart on vision and "
            "text: the intervals overlap); further from torch-fp32, lowest cosine 0.9992",
        }
        facts = shown(advice, given).facts
        (rule,) = [fact for fact in facts if fact.startswith("Of targets that cannot be told apart ")]
        assert facts.index(rule) == 1 + max(at for at, fact in enumerate(facts) if "the intervals overlap" in fact)
    small = recommend(rows, RecommendConfig(max_size_mb=100))
    assert small.ship == {"vision": "ort-int8", "text": "ort-int8"}
    assert not any(fact.startswith("Where speeds") for fact in shown(small, rows).facts)


def test_a_drop_that_may_lie_beyond_its_limit_is_said_of_what_ships():
    wide = {"zero_shot": zero_shot(top1_drop=0.0, top1_drop_low=-5.56, top1_drop_high=5.56)}
    rows = [row("ort-fp32", 3.0, 3.0, **wide), row("onnx-fp32", 1.0, 1.0, **wide)]
    advice = recommend(rows, RecommendConfig(max_top1_drop=0.5))
    assert [fact for fact in shown(advice, rows).facts if "too small" in fact] == [
        "The evaluation set is too small to tell whether ort-fp32 keeps max_top1_drop 0.5: it drops 0.00 points "
        "[-5.56, 5.56]. More images narrow that."
    ]
    sure = [row("ort-fp32", 3.0, 3.0)]
    assert not any(
        "too small" in fact for fact in shown(recommend(sure, RecommendConfig(max_top1_drop=0.5)), sure).facts
    )


def test_of_targets_that_are_alike_in_all_the_faster_ships():
    rows = [row("onnx-fp32", 2.99, 3.0, size_mb=300.0), row("ort-fp32", 3.01, 3.0, size_mb=303.0)]
    advice = recommend(rows, RecommendConfig())
    assert set(advice.ship.values()) == {"ort-fp32"}
    assert advice.losers["onnx-fp32"].endswith("the intervals overlap); as close, as small, and not faster")


def test_a_target_that_is_level_with_the_winner_and_not_with_the_fastest_is_called_slower():
    rows = [
        row("lossy", 3.10, 3.10, **near(0.99)),
        row("exact", 3.00, 3.00, **near(1.0)),
        row("small", 2.92, 2.92, **near(1.0), size_mb=10.0),
    ]
    advice = recommend(rows, RecommendConfig())
    assert set(advice.ship.values()) == {"exact"}
    assert advice.losers["small"] == (
        "takes 1.03x as long as exact on vision, 1.03x on text (not to be told apart on vision and text: the intervals "
        "overlap); slower than the fastest, lossy on vision and text"
    )


def test_each_tower_of_a_pair_and_the_target_in_its_place_are_settled_alike():
    rows = [
        row("a-int8", 3.0, 1.5, cosine_min={"vision": 0.99, "text": 1.0}),
        row("a-fp32", 2.98, 1.5, cosine_min={"vision": 1.0, "text": 0.99}),
        row("b-int8", 2.0, 4.0, **near(0.99)),
        row("b-fp32", 1.99, 3.98, **near(1.0)),
    ]
    assert recommend(rows, RecommendConfig()).ship == {"vision": "a-fp32", "text": "b-int8"}
    advice = recommend(rows, RecommendConfig(), lambda vision, text: replace(vision, zero_shot=drop(2.0)))
    assert advice.ship == {"vision": "b-fp32", "text": "b-fp32"}
    assert "; further from torch-fp32, lowest cosine 0.9900" in advice.losers["b-int8"]


def test_whatever_runtime_wins_is_packaged_unless_the_limits_name_others():
    rows = [REFERENCE, row("openvino-int8", 5.0, 5.0, runtime="openvino"), row("ort-int8", 3.0, 4.0)]
    advice = recommend(rows, RecommendConfig())
    assert advice.ship == {"vision": "openvino-int8", "text": "openvino-int8"}
    assert list(advice.shipment().targets) == ["openvino-int8"]
    assert advice.note == "the recommended target is packaged"
    limited = recommend(rows, RecommendConfig(runtimes=["ort", "eager"]))
    assert limited.ship == {"vision": "ort-int8", "text": "ort-int8"}
    assert limited.losers["openvino-int8"] == "runs with openvino, recommend.runtimes is ort, eager"


def test_an_unknown_runtime_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"recommend\.runtimes holds onnx: accepted are eager, .*, tensorrt, or"):
        RecommendConfig(runtimes=["ort", "onnx"])
    with pytest.raises(ConfigError, match=r"recommend\.runtimes is empty: name at least one, or null for any"):
        RecommendConfig(runtimes=[])


@pytest.mark.parametrize(
    ("rates", "sizes"),
    [
        ({1: 100, 8: 300, 32: 900, 64: 800}, [1, 2, 4, 8, 16, 32]),
        ({1: 100, 48: 900}, [1, 2, 4, 8, 16, 32, 48]),
        ({2: 100, 8: 300}, [2, 4, 8]),
        ({1: 300, 8: 200}, [1]),
    ],
)
def test_batches_are_powers_of_two_up_to_the_one_that_gives_most_per_second(rates, sizes):
    timed = {batch: timing(1.0, throughput_per_s=float(rate)) for batch, rate in rates.items()}
    assert module.batch_sizes(timed) == sizes


def shaky(target, speedup, **other):
    found = row(target, speedup, speedup, **other)
    found.timings["text"][1] = replace(found.timings["text"][1], unstable=True, undecided=True)
    return found


def test_a_timing_that_a_busy_machine_spoilt_wins_nothing():
    rows = [REFERENCE, shaky("ort-int8", 3552.0), row("ort-fp32", 2.0, 2.0)]
    advice = recommend(rows, RecommendConfig())
    assert advice.ship["vision"] == "ort-fp32"
    assert advice.front == ["ort-fp32"]
    assert advice.losers["ort-int8"] == "its timing decides nothing (~), time it again"
    assert (
        "Provisional: 1 of 3 timings decide nothing (~: ort-int8). Time them again on a quiet machine: "
        "`dvc repro --force --single-item benchmark@torch-fp32 benchmark@ort-int8 && dvc repro`."
    ) in shown(advice, rows).facts


def test_where_no_timing_decides_the_smallest_is_named_and_not_the_one_that_seemed_fastest():
    rows = [shaky("ort-fp32", 775.0, size_mb=300.0), shaky("ort-int8", 2.0, size_mb=80.0)]
    advice = recommend(rows, RecommendConfig())
    assert advice.ship == {"vision": "ort-int8", "text": "ort-int8"}
    assert (advice.front, advice.alike) == ([], {})
    assert advice.losers == {"ort-fp32": "its timing decides nothing (~), time it again"}
    assert shown(advice, rows).facts[0] == (
        "Ship ort-int8: no timing decides, so it is the one with the smallest files."
    )


def test_a_p95_that_decides_nothing_keeps_no_limit():
    timings = {tower: {1: timing(3.0, p95_ms=0.5, undecided=tower == "text")} for tower in TOWERS}
    advice = recommend([replace(row("ort-int8", 1, 1), timings=timings)], RecommendConfig(max_p95_ms=1.0))
    assert advice.losers == {"ort-int8": "max_p95_ms: its timing decides nothing (~), time it again"}


NO_TOKENIZER = "SiglipTokenizer has no fast tokenizer: save the checkpoint with one (tokenizer.json)"


def test_what_cannot_be_packaged_is_said_by_the_advice_and_not_found_out_by_the_package(kinds):
    rows = [REFERENCE, row("ort-fp32", 2.0, 2.0)]
    advice = recommend(rows, RecommendConfig(), unpackable=lambda name: NO_TOKENIZER)
    note = f"ort-fp32 is recommended and cannot be packaged: {NO_TOKENIZER}"
    assert (advice.ship["vision"], advice.note) == ("ort-fp32", note)
    assert f"Package: {note}." in shown(advice, rows).facts
    kinds(
        "28: a checkpoint whose tokenizer cannot be packaged",
        before='the report said "the recommended target is packaged"; the package\'s manifest said `unavailable`',
        now=note,
    )


DOUBT = "torch-fp32 itself answers no better than chance: 20 of 960 images right"


def test_a_doubt_about_the_reference_comes_before_all_advice():
    rows = [replace(REFERENCE, doubts=[DOUBT]), replace(row("ort-fp32", 2.0, 2.0), doubts=[DOUBT])]
    advice = recommend(rows, RecommendConfig())
    assert advice.doubts == [DOUBT]
    shipping = shown(advice, rows)
    assert shipping.facts[:2] == [
        f"{DOUBT}.",
        "Ship ort-fp32: an image 5.00 ms, a text 5.00 ms (p50 of a call, batch 1).",
    ]
    lines = markdown(Report("title", rows, shipping=shipping)).splitlines()
    assert lines[:4] == ["# title", "", f"**{DOUBT}.**", ""]
    assert lines[lines.index("## Which one to ship") + 2] == f"- {DOUBT}."


def test_random_weights_are_held_to_no_top1():
    wild = replace(row("ort-int8", 3.0, 3.0), zero_shot=drop(40.0), trained=False)
    advice = recommend([wild], RecommendConfig())
    assert advice.ship["vision"] == "ort-int8"
    assert any("weights are random" in fact for fact in shown(advice, [wild]).facts)


def close(cosine):
    return {"vision": cosine, "text": 1.0}


def test_the_front_holds_what_no_other_beats_in_time_accuracy_and_size():
    rows = [
        row("small", 2.0, 2.0, size_mb=100.0, cosine_min=close(0.995)),
        row("exact", 1.5, 1.5, size_mb=400.0),
        row("fast", 3.0, 3.0, size_mb=200.0, cosine_min=close(0.991)),
        row("beaten", 1.9, 1.9, size_mb=150.0, cosine_min=close(0.994)),
    ]
    assert recommend(rows, RecommendConfig()).front == ["small", "exact", "fast"]


def test_times_that_cannot_be_told_apart_put_nothing_on_the_front():
    rows = [
        row("exact", 3.00, 3.00),
        row("lossy", 3.02, 3.02, cosine_min=close(0.995)),
        row("small", 3.02, 3.02, cosine_min=close(0.995), size_mb=100.0),
        row("fast on texts", 3.00, 4.00, cosine_min=close(0.993)),
        row("fast", 4.00, 4.00, cosine_min=close(0.991)),
    ]
    assert recommend(rows, RecommendConfig()).front == ["exact", "small", "fast on texts", "fast"]


def dropped(low, middle, high):
    return zero_shot(top1=90 - middle, top1_drop=middle, top1_drop_low=low, top1_drop_high=high)


@pytest.mark.parametrize(
    ("other", "front"),
    [
        ({"zero_shot": dropped(-0.31, -0.10, 0.0), "size_mb": 320.0}, ["winner"]),  # an image more, of 960
        ({"cosine_min": {"vision": 0.99905, "text": 0.99805}, "size_mb": 320.0}, ["winner"]),
        ({"size_mb": 290.0, "cosine_min": close(0.9)}, ["winner"]),
        ({"zero_shot": dropped(-0.9, -0.6, -0.4), "size_mb": 320.0}, ["winner", "other"]),
        ({"cosine_min": close(0.9999), "size_mb": 320.0}, ["winner", "other"]),
    ],
)
def test_what_is_no_difference_puts_nothing_on_the_front(other, front):
    winner = row("winner", 3.0, 3.0, zero_shot=dropped(-0.3, 0.0, 0.3))
    slower = row("other", 2.0, 2.0, **{"zero_shot": winner.zero_shot, **other})
    assert recommend([winner, slower], RecommendConfig()).front == front


def test_random_weights_put_nothing_on_the_front_by_their_top1():
    winner = row("winner", 3.0, 3.0, trained=False, zero_shot=dropped(-0.3, 0.0, 0.3))
    other = row("other", 2.0, 2.0, trained=False, zero_shot=dropped(-9.0, -8.0, -7.0))
    assert recommend([winner, other], RecommendConfig()).front == ["winner"]


def test_a_target_that_ships_and_is_beaten_has_the_word_by_which():
    close_by, small = {"vision": 0.9990, "text": 1.0}, {"vision": 0.99893, "text": 1.0}
    rows = [
        row("closest", 3.0, 3.0, cosine_min={"vision": 0.99905, "text": 1.0}, size_mb=400.0),
        row("ships", 3.0, 3.0, cosine_min=close_by, size_mb=300.0),
        row("small", 3.0, 3.0, cosine_min=small, size_mb=200.0),
    ]
    advice = recommend(rows, RecommendConfig())
    assert (advice.ship["vision"], advice.front) == ("ships", ["small"])
    assert "ships ships by the rule above, though small on the front beats it." in shown(advice, rows).facts


def test_on_a_gpu_latency_decides_and_not_the_speedup_over_a_reference_that_was_slow_then():
    a, b = (replace(row(name, 2.0, 2.0), device="cuda") for name in "ab")
    a.timings["vision"][1] = timing(4.0, p50_ms=2.0, p50_low_ms=1.95, p50_high_ms=2.05)
    b.timings["vision"][1] = timing(3.0, 0.9, p50_ms=1.0, p50_low_ms=0.95, p50_high_ms=1.05)
    assert recommend([a, b], RecommendConfig()).ship["vision"] == "b"
    assert list(recommend([a, b], RecommendConfig()).alike) == ["text"]
    near = replace(b, target="near", timings={**b.timings, "vision": {1: timing(3.0, p50_ms=1.06, p50_low_ms=1.04)}})
    assert recommend([b, near], RecommendConfig()).alike["vision"] == ["near"]


def test_the_report_and_its_page_say_which_one_to_ship():
    rows = [REFERENCE, row("ort-int8", 3.0, 4.0)]
    shipping = shown(recommend(rows, RecommendConfig()), rows)
    text = markdown(Report("title", rows, shipping=shipping))
    assert "## Which one to ship\n\n- Ship ort-int8: an image 3.33 ms, a text 2.50 ms (p50 of a call, batch 1)." in text
    assert "| `torch-fp32` | takes 3.00x as long as ort-int8 on vision, 4.00x on text |" in text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch": 0}, r"recommend.batch is 0: give one of benchmark.batch_sizes"),
        ({"max_size_mb": -1.0}, r"recommend.max_size_mb is -1.0: give more than 0, or null"),
        ({"max_top1_drop": 101.0}, r"recommend.max_top1_drop is 101.0: accepted are 0 to 100, and null"),
    ],
)
def test_limits_out_of_range_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        RecommendConfig(**settings)


def test_on_a_gpu_a_row_is_shaky_by_its_own_calls_and_not_by_the_references():
    noisy = {"device": "cuda", "timings": {name: {1: timing(9.0, unstable=True, p90_ms=1.2)} for name in TOWERS}}
    spread = {"device": "cuda", "timings": {name: {1: timing(9.5, p90_ms=9.0, undecided=True)} for name in TOWERS}}
    reference = replace(REFERENCE, device="cuda")
    rows = [reference, row("torch-fused-fp16", 1, 1, **noisy), row("ort-cuda-fp16", 1, 1, **spread)]
    advice = recommend(rows, RecommendConfig())
    assert set(advice.ship.values()) == {"torch-fused-fp16"}
    assert "its timing decides nothing" in advice.losers["ort-cuda-fp16"]
