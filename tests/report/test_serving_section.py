from clip_deploy.core.json_files import write_json
from clip_deploy.core.parsing import plain, read_record
from clip_deploy.core.served import HttpAnswers, HttpServed, Requests
from clip_deploy.report.contents import Report
from clip_deploy.report.markdown import markdown

RIGHT = Requests(kind="a text", asked=9, answered=8, refused=0, left=1, wrong=0, lost=0, cosine_min=0.99999991)
MISTAKES = Requests(kind="mistake", asked=5, answered=0, refused=5, left=0, wrong=0, lost=0)
WRONG = Requests(kind="rank", asked=5, answered=2, refused=0, left=0, wrong=1, lost=2)


def written(record, folder):
    """The section's lines, of the record as it comes back from its file."""
    write_json(folder / "serving.json", plain(record))
    text = markdown(Report("title", [], serving=read_record(HttpServed, folder / "serving.json")))
    return text.split("## Served over HTTP\n\n")[1].split("\n\n## ")[0].splitlines()


def test_each_kind_of_request_is_a_row(tmp_path):
    lines = written(HttpServed("pass", [], HttpAnswers([1, 4], 0.9999, [RIGHT, MISTAKES])), tmp_path)
    assert lines[0].startswith("**pass**: every answer is the package's own, and every mistake was refused. ")
    assert "asked by 1, 4 clients at once" in lines[0]
    assert "| a text | 9 | 8 | 0 | 1 | 0 | 0 | 1.000000 |" in lines
    assert "| mistake | 5 | 0 | 5 | 0 | 0 | 0 | - |" in lines


def test_what_is_wrong_or_lost_stands_out(tmp_path):
    reason = "rank: wrong: a relevance_score is 0.200 off the package's own"
    lines = written(HttpServed("fail", [reason], HttpAnswers([1], 0.9999, [WRONG])), tmp_path)
    assert lines[0].startswith(f"**fail**: {reason}. ")
    assert "| rank | 5 | 2 | 0 | 0 | **1** | **2** | - |" in lines


def test_without_a_server_the_reason_stands_there(tmp_path):
    reason = "serve needs uvicorn: pip install 'clip-deploy[serve]'"
    assert written(HttpServed("unavailable", [reason]), tmp_path) == [f"`unavailable`: {reason}"]
