from dataclasses import replace

from support.records import judged

from clip_deploy.core.records import Placement, Power
from clip_deploy.report.contents import Report
from clip_deploy.report.gpu_sections import gpu_duels, gpu_tutorial, gpu_usage
from clip_deploy.report.markdown import markdown
from clip_deploy.report.rows import Row
from clip_deploy.report.sections import fastest

TIMING = judged(
    p50_ms=0.5,
    p50_low_ms=0.49,
    p50_high_ms=0.51,
    throughput_per_s=2000.0,
    speedup=2.0,
    speedup_low=1.9,
    speedup_high=2.1,
)


def written(rows):
    return markdown(Report("title", rows)).splitlines()


def row(target, **facts):
    timings = {tower: {1: TIMING} for tower in ("vision", "text")}
    return Row(target=target, status="pass", device="cuda", timings=timings, size_mb=300.0, **facts)


def test_nodes_on_the_cpu_are_marked_and_power_is_stated():
    placed = {
        "vision": Placement({"CUDAExecutionProvider": 131}, graph=True),
        "text": Placement({"CUDAExecutionProvider": 543, "CPUExecutionProvider": 1}, graph=False),
    }
    power = Power(batch=256, mean_w=512.25, j_per_1000_images=14.0, clock_mhz=[345, 1980])
    lines = written([row("ort-cuda-fp16", placement=placed, power=power, gpu_memory_mb=812.0)])
    assert (
        "| `ort-cuda-fp16` | vision 131 CUDA; text 543 CUDA, **1 CPU** | vision yes, text no | 812 | 512 (256) | 14.0 "
        "| 345 / 1,980 |"
    ) in lines


def test_the_tutorials_table_says_what_was_not_measured():
    lines = written([row("torch-fp32", gpu_memory_mb=1500.0)])
    assert "| PyTorch FP32 | `torch-fp32` | 0.500 | 0.500 | 2,000 | 1.50 | 300 | 20 | 2.5 |" in lines
    assert "| ONNX and TensorRT | `trt-fp16` (not measured here) | - | - | - | - | - | 8 | 1.5 |" in lines


def timed(target, latency, status="pass", **facts):
    timings = {tower: {256: replace(TIMING, p50_ms=latency, gflop=2250.0)} for tower in ("vision", "text")}
    return Row(target=target, status=status, device="cuda", timings=timings, **facts)


def test_our_fastest_row_stands_beside_the_compilers():
    rows = [
        timed("torch-fp16", 1.0),
        timed("aoti-fp16", 6.0, matrix_tflops=740.0),
        timed("ort-cuda-fp16", 7.0, matrix_tflops=760.0),
        timed("torch-compile-fp16", 8.0),
        timed("trt-fp16", 9.0),
        timed("ort-trt-fp16", 5.0, status="fail"),
    ]
    lines = written(rows)
    assert "| vision | 256 | `aoti-fp16` | 6.00 | `torch-compile-fp16` | 8.00 | 0.75 | 51 % |" in lines
    assert any("ran at 750 TFLOP/s here (median of the rows)" in line for line in lines)


def test_fp8_is_set_neither_against_fp16_nor_against_its_rate():
    ours = timed("torch-fused-fp16", 6.0, precision="fp16", matrix_tflops=750.0)
    eight = timed("torch-fused-fp8", 3.0, precision="fp8", matrix_tflops=750.0)
    lines = written([ours, eight, timed("trt-fp16", 9.0, precision="fp16")])
    assert "| vision | 256 | `torch-fused-fp16` | 6.00 | `trt-fp16` | 9.00 | 0.67 | 50 % |" in lines
    assert any("Rows in FP8 are left out: no compiler's row has it." in line for line in lines)
    assert not any("are left out" in line for line in written([ours, timed("trt-fp16", 9.0, precision="fp16")]))


def test_one_side_alone_has_no_ratio():
    lines = written([timed("trt-fp16", 9.0)])
    assert "| text | 256 | - | - | `trt-fp16` | 9.00 | - | - |" in lines


def test_on_a_gpu_the_fastest_row_has_the_lowest_latency():
    slow, fast = timed("torch-fp32", 8.0), timed("aoti-fp16", 6.0)
    for sizes in slow.timings.values():
        sizes[256] = replace(sizes[256], speedup=9.0)
    assert {tower: row.target for tower, row in fastest([slow, fast], 256).items()} == {
        "vision": "aoti-fp16",
        "text": "aoti-fp16",
    }


def test_without_a_row_on_a_gpu_there_is_no_section():
    for row in (Row(target="torch-fp32", status="pass"), Row(target="torch-fp16", status="unavailable", device="cuda")):
        assert [build(Report("title", [row])) for build in (gpu_usage, gpu_duels, gpu_tutorial)] == [None] * 3


def test_a_call_with_a_wait_stands_beside_calls_without_one():
    queued = {tower: {1: replace(TIMING, queued_ms=0.25)} for tower in ("vision", "text")}
    lines = written([replace(row("torch-fused-fp16"), timings=queued), row("torch-fp16")])
    assert "| Target | vision @1 | text @1 |" in lines
    assert "| `torch-fused-fp16` | 0.500 / 0.250 | 0.500 / 0.250 |" in lines
    assert not any("@1 |" in line for line in written([row("torch-fp16")]))
