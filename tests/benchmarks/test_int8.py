import json

import pytest

from benchmarks import int8
from clip_deploy.core.config import QuantizeConfig

pytestmark = pytest.mark.slow


def test_ways_to_int8_are_judged_beside_onnx_runtimes_own(built, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "ARTIFACTS", built.path / "artifacts")
    monkeypatch.setattr(int8, "REPORTS", tmp_path)
    monkeypatch.setattr(int8, "OURS", {"dynamic": QuantizeConfig()})
    (tmp_path / "environment.json").write_bytes((built.path / "reports/environment.json").read_bytes())
    int8.main()
    record = json.loads((tmp_path / "int8.json").read_text())
    assert record["environment"]["software"]["onnxruntime"]
    rows = {row["way"]: row for row in record["rows"]}
    assert list(rows) == ["ONNX Runtime's defaults, static", "ONNX Runtime's defaults, dynamic", "dynamic"]
    lowest = {way: min(row["cosine_min"].values()) for way, row in rows.items()}
    assert lowest["ONNX Runtime's defaults, static"] < 0.9 < lowest["dynamic"]
    page = (tmp_path / "int8.md").read_text()
    assert f"| dynamic | 0 | {rows['dynamic']['top1']:.2f} |" in page
