"""Points of sweeps, and the experiments that are there of them."""

from support.records import judged, zero_shot

from clip_deploy.report.rows import Row
from clip_deploy.report.sweep import Point


def point(name, image, size=4.0, drop=0.0, **other):
    timed = judged(speedup=image, speedup_low=image, speedup_high=image, p50_ms=2.0, p50_low_ms=1.9, p50_high_ms=2.1)
    timings = {tower: {1: timed} for tower in ("vision", "text")}
    row = Row("ort-fp32", "pass", timings=timings, size_mb=size, zero_shot=zero_shot(top1=90.0 - drop, top1_drop=drop),
              cosine_min={"vision": 0.999, "text": 0.9999}, flips=0.5, memory_mb=40.0)  # fmt: skip
    return Point(name, {"onnx.opset": 18, "quantize.a.calibration": "minmax", **other}, row)


def measured(project):
    found = project.run("git", "for-each-ref", "--format=%(objectname) %(refname)", "refs/exps/").stdout.splitlines()
    return [line for line in found if "/mine-" in line]
