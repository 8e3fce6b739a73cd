import pytest

from benchmarks.profile import Settings, gathered, markdown, table
from clip_deploy.core.errors import ConfigError


def test_every_node_of_both_towers_is_counted_by_its_operator(onnx_target):
    text = markdown(Settings(folders=str(onnx_target), batch=2, tokens=16, calls=5))
    assert f"## vision, `{onnx_target.name}`" in text
    assert f"## text, `{onnx_target.name}`" in text
    assert "| MatMul |" in text
    assert str(onnx_target.parent) not in text  # paths of the machine stay out of reports


def test_the_first_calls_do_not_count():
    warm_up = [("MatMul", "a", 100.0)] * 3
    found = gathered([*warm_up, ("MatMul", "a", 1.0), ("MatMul", "a", 3.0), ("MatMul", "a", 2.0), ("Add", "b", 1.0)])
    assert found == {"MatMul": [2.0], "Add": [1.0]}


def test_the_smaller_operators_share_a_row():
    rows = table({f"Op{index}": [float(index), float(index)] for index in range(1, 11)})
    assert rows[2] == "| Op10 | 2 | 20.00 | 18.2 |"
    assert rows[-2:] == ["| 2 others | 4 | 6.00 | 5.5 |", "| all | 20 | 110.00 | 100.0 |"]


def test_a_text_longer_than_the_context_is_refused(onnx_target):
    with pytest.raises(ConfigError, match=r"the text tower does not run at batch=1 tokens=77 \("):
        markdown(Settings(folders=str(onnx_target), calls=1))


def test_a_folder_without_graphs_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"holds neither vision\.onnx nor vision\.xml; accepted are built"):
        markdown(Settings(folders=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"folders is empty: name those to profile"):
        markdown(Settings())
