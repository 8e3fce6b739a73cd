import os
from dataclasses import replace

import pytest
from support.records import judged as judged_timing
from support.records import zero_shot

from clip_deploy.core.config import GateLimits, GatesConfig, RecommendConfig
from clip_deploy.core.errors import DeployError
from clip_deploy.core.files import sha256
from clip_deploy.report import tower_pair
from clip_deploy.report.recommend import recommend, refusal
from clip_deploy.report.rows import Row
from clip_deploy.report.tower_pair import pair_row

EASY = GatesConfig(fp32=GateLimits(min_cosine=0.999, max_top1_drop=5, max_flips=5))


def timing(speedup):
    return {1: judged_timing(**dict.fromkeys(("speedup", "speedup_low", "speedup_high"), speedup))}


@pytest.fixture
def built(fused):
    """Two targets: as exported, which is faster on texts, and fused."""
    return fused.parent


@pytest.fixture
def rows(built):
    return [
        Row(
            name,
            "pass",
            runtime="ort",
            precision="fp32",
            timings={"vision": timing(vision), "text": timing(text)},
            memory_mb=60.0,
            size_mb=4.0,
            zero_shot=zero_shot(),
            files={file: sha256(built / name / file) for file in ("vision.onnx", "text.onnx")},
        )
        for name, vision, text in (("ort-fp32", 4.0, 1.0), ("onnx-fp32", 1.0, 5.0))
    ]


@pytest.fixture
def judged(built, sets):
    return lambda vision, text, gates=EASY: pair_row(vision, text, built, sets / "evaluation", gates)


def test_two_targets_that_agree_pass_together_with_each_towers_own_time_and_size(rows, judged, built):
    both = judged(*rows)
    assert (both.target, both.status, both.reasons) == ("ort-fp32 with onnx-fp32", "pass", [])
    assert (both.timing("vision").speedup, both.timing("text").speedup) == (4.0, 5.0)
    sizes = [(built / file).stat().st_size for file in ("ort-fp32/vision.onnx", "onnx-fp32/text.onnx")]
    assert both.size_mb == pytest.approx(sum(sizes) / 1e6)
    assert both.memory_mb == 120.0
    assert both.zero_shot.top1_drop == pytest.approx(0, abs=2)


def test_a_pair_is_held_to_the_coarser_gate_and_to_the_limits(rows, judged):
    advice = recommend(rows, RecommendConfig(max_memory_mb=100), judged, lambda name: None)
    assert advice.ship == {"vision": "onnx-fp32", "text": "onnx-fp32"}
    assert advice.pairs["ort-fp32 with onnx-fp32"].reasons == ["over max_memory_mb: 120 > 100"]
    coarser = replace(rows[1], precision="int8")
    failed = judged(rows[0], coarser, GatesConfig(int8=GateLimits(min_cosine=1.0)))
    assert (failed.status, failed.precision) == ("fail", "int8")
    assert "< 1.0 (gates.int8.min_cosine)" in failed.reasons[0]


def test_what_only_the_pair_gets_wrong_costs_it_the_recommendation(rows, judged, monkeypatch):
    """Its own top-1 counts, and not that of its targets, which both have a drop of 0."""

    def wrong(folders, evaluation):
        found = measure(folders, evaluation)
        return replace(found, zero_shot=replace(found.zero_shot, top1_drop=3.0))

    measure = tower_pair.measure_pair
    monkeypatch.setattr(tower_pair, "measure_pair", wrong)
    found = judged(*rows)
    assert found.status == "pass"  # its gate lets 5 points pass
    assert refusal(found, RecommendConfig(max_top1_drop=1.0)) == "over max_top1_drop: 3.00 > 1.0 points"


def test_a_pair_whose_process_dies_fails_and_the_stage_goes_on(rows, judged, monkeypatch):
    monkeypatch.setattr("clip_deploy.evaluate.tower_pair.measure", lambda *_, **__: os._exit(9))
    both = judged(*rows)
    assert (both.status, both.reasons) == ("fail", ["the process ended with exit code 9"])


def test_whatever_a_library_raises_fails_the_pair_and_the_stage_goes_on(rows, judged, monkeypatch):
    def wrong(*_, **__):
        raise KeyError("of a library")

    monkeypatch.setattr("clip_deploy.evaluate.tower_pair.measure", wrong)
    both = judged(*rows)
    assert both.status == "fail"
    assert both.reasons[0].startswith("KeyError: 'of a library' (its traceback is in the terminal)")


def test_targets_that_were_changed_are_not_judged(rows, judged, built):
    path = built / "ort-fp32" / "text.onnx"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    try:
        with pytest.raises(DeployError, match="is not the file that was built"):
            judged(*rows)
    finally:
        path.write_bytes(content)
