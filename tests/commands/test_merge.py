"""Two branches are merged: what a stage recorded and wrote stays whole, and of one side."""

import json
import subprocess

import pytest
import yaml

from clip_deploy.__main__ import main
from clip_deploy.commands.merge import merged_lock, stages_of_sides

STAGES = ("a", "b", "report")


def git(*words):
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout


def results(run):
    """Of a stage, in lines of which git merges those that lie apart."""
    return json.dumps({"run": run, **{f"line{number}": number for number in range(20)}, "of": run}, indent=2) + "\n"


def record(here, **runs):
    """As `dvc repro` leaves it: for each stage its entry in dvc.lock, and its file in reports/, of one run."""
    lock = yaml.safe_load((here / "dvc.lock").read_text())
    for stage, run in runs.items():
        entry = {"cmd": "true", "deps": [{"path": "x", "md5": run}], "outs": [{"path": f"reports/{stage}.json"}]}
        lock["stages"][stage] = {**entry, "params": {"params.yaml": {stage: run}}}
        (here / "reports" / f"{stage}.json").write_text(results(run))
    (here / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))


def commit(message):
    git("add", "-A")
    git("commit", "-q", "-m", message)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A project with three stages that ran, and a branch `there` that begins at it."""
    monkeypatch.chdir(tmp_path)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "test")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "test@example.com")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    (tmp_path / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (tmp_path / "reports").mkdir()
    stages = {
        name: {"cmd": "true", "params": [name], "outs": [{f"reports/{name}.json": {"cache": False}}]} for name in STAGES
    }
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    (tmp_path / "params.yaml").write_text("a: first\nb: first\nreport: 1\n")
    (tmp_path / "reports" / "by_hand.md").write_text("first\n")
    record(tmp_path, a="first", b="first", report="first")
    git("init", "-q", "-b", "main")
    commit("Start")
    git("branch", "there")
    return tmp_path


def on_both_sides(here, there, ours):
    """Commit one change on the branch `there` and another one on main."""
    git("checkout", "-q", "there")
    there()
    commit("There")
    git("checkout", "-q", "main")
    ours()
    commit("Here")


def recorded(here):
    """Stage by stage the run of its entry and that of its file."""
    lock = yaml.safe_load((here / "dvc.lock").read_text())["stages"]
    return {
        name: (entry["params"]["params.yaml"][name], json.loads((here / f"reports/{name}.json").read_text()))
        for name, entry in lock.items()
    }


def test_each_stages_record_is_whole_and_of_the_side_that_changed_it(here, capfd):
    on_both_sides(
        here,
        lambda: record(here, a="there", report="there"),
        lambda: record(here, b="here", report="here"),
    )
    assert main(["merge", "there"]) == 0
    for name, run in {"a": "there", "b": "here", "report": "here"}.items():
        entry, file = recorded(here)[name]
        assert (entry, file["run"], file["of"]) == (run, run, run)
    assert git("status", "--porcelain") == ""
    assert git("log", "-1", "--format=%B").strip() == "Merge there"
    assert len(git("log", "-1", "--format=%P").split()) == 2
    said = capfd.readouterr().out
    assert "merged there: 1 stages as recorded there, and as recorded here 1 that ran on both sides\n" in said
    assert "next: `dvc repro` runs what does not fit" in said


def test_lines_that_git_would_put_together_stay_apart(here):
    """git merges these without a conflict, into a file that no run wrote."""

    def first_line():
        (here / "reports/report.json").write_text(results("first").replace('"run": "first"', '"run": "there"'))

    def last_line():
        (here / "reports/report.json").write_text(results("first").replace('"of": "first"', '"of": "here"'))

    on_both_sides(here, first_line, last_line)
    assert main(["merge", "there"]) == 0
    file = recorded(here)["report"][1]
    assert (file["run"], file["of"]) == ("first", "here")


def test_files_come_and_go_with_the_side_that_changed_them(here):
    def there():
        git("rm", "-q", "reports/a.json")
        record(here, b="there")
        (here / "reports" / "new.md").write_text("there\n")

    def ours():
        git("rm", "-q", "reports/b.json")
        (here / "reports" / "by_hand.md").write_text("here\n")

    on_both_sides(here, there, ours)
    assert main(["merge", "there"]) == 0
    assert sorted(path.name for path in (here / "reports").iterdir()) == ["by_hand.md", "new.md", "report.json"]
    assert (here / "reports" / "by_hand.md").read_text() == "here\n"
    assert git("status", "--porcelain") == ""


def test_a_conflict_elsewhere_is_left_to_git_without_marks_in_what_stages_write(here, capfd):
    def side(name):
        record(here, a=name, report=name)
        (here / "params.yaml").write_text(f"a: {name}\nb: first\nreport: 1\n")

    on_both_sides(here, lambda: side("there"), lambda: side("here"))
    assert main(["merge", "there"]) == 1
    assert (
        "error: merged dvc.lock and reports/, but git cannot merge params.yaml: mend that and `git commit`, then "
        "`dvc checkout` and `dvc repro`; or `git merge --abort` takes all back" in capfd.readouterr().err
    )
    assert git("diff", "--name-only", "--diff-filter=U") == "params.yaml\n"
    assert [entry for entry, _ in recorded(here).values()] == ["here", "first", "here"]
    assert main(["merge", "there"]) == 1
    assert "a merge has begun here: `git commit` ends it" in capfd.readouterr().err
    git("merge", "--abort")
    assert git("status", "--porcelain") == ""


def test_what_git_refuses_changes_nothing(here, capfd):
    on_both_sides(here, lambda: (here / "mine.txt").write_text("there"), lambda: record(here, a="here"))
    (here / "mine.txt").write_text("here")
    assert main(["merge", "there"]) == 1
    said = capfd.readouterr().err
    assert said.startswith("error: git cannot merge there: error: The following untracked")
    assert "mine.txt" in said
    assert git("status", "--porcelain") == "?? mine.txt\n"


def test_a_commit_that_a_hook_refuses_is_left_to_be_made(here, capfd):
    on_both_sides(here, lambda: record(here, a="there"), lambda: record(here, b="here"))
    hook = here / ".git" / "hooks" / "pre-commit"
    hook.write_text("#!/bin/sh\necho not today >&2\nexit 1\n")
    hook.chmod(0o755)
    assert main(["merge", "there"]) == 1
    assert "all is merged, but `git commit` failed: not today; mend that and `git commit`" in capfd.readouterr().err
    hook.unlink()
    git("commit", "-q", "--no-edit")
    assert [entry for entry, _ in recorded(here).values()] == ["there", "here", "first"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("nowhere", "git knows no revision 'nowhere' here, and DVC no experiment of that name"),
        ("alone", "alone and HEAD have no commit in common: give a branch of this project"),
        ("marks", "unable to read: 'dvc.lock at "),
    ],
)
def test_what_cannot_be_merged_is_named(here, words, said, capfd):
    git("checkout", "-q", "-b", "marks")
    (here / "dvc.lock").write_text("<<<<<<< HEAD\nschema: '2.0'\n=======\n")
    commit("Marks")
    git("checkout", "-q", "--orphan", "alone")
    commit("Alone")
    git("checkout", "-q", "main")
    record(here, a="here")
    commit("Here")
    assert main(["merge", words]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert git("status", "--porcelain") == ""


def test_what_is_not_committed_is_named(here, capfd):
    (here / "params.yaml").write_text("a: mine\n")
    assert main(["merge", "there"]) == 1
    assert "error: params.yaml is not committed: `git commit -am MESSAGE`, or `git stash`" in capfd.readouterr().err
    (here / "dvc.lock").write_text("stages: {}\n")
    assert main(["merge", "there"]) == 1
    assert "and 1 files more are not committed" in capfd.readouterr().err


def test_what_is_there_already_is_said_and_what_went_on_from_here_is_taken(here, capfd):
    assert main(["merge", "there"]) == 0
    assert capfd.readouterr().out == "nothing to merge: all of there is in HEAD\n"
    git("checkout", "-q", "there")
    record(here, a="there")
    commit("There")
    git("checkout", "-q", "main")
    assert main(["merge", "there"]) == 0
    assert git("rev-parse", "HEAD") == git("rev-parse", "there")
    assert "nothing was committed here since" in capfd.readouterr().out


@pytest.mark.filterwarnings("default:`dvc pull` failed")
def test_artifacts_that_do_not_come_are_a_warning(here, capfd):
    (here / ".dvc" / "config").write_text("[core]\n    remote = none\n")
    (here / "dvc.yaml").write_text((here / "dvc.yaml").read_text() + "  d: {cmd: 'true', outs: [artifact]}\n")
    lock = yaml.safe_load((here / "dvc.lock").read_text())
    lock["stages"]["d"] = {"cmd": "true", "outs": [{"path": "artifact", "hash": "md5", "md5": "0" * 32, "size": 1}]}
    (here / "dvc.lock").write_text(yaml.safe_dump(lock))
    commit("A remote that is not there")
    on_both_sides(here, lambda: record(here, a="there"), lambda: record(here, b="here"))
    assert main(["merge", "there"]) == 0
    assert "warning: `dvc pull` failed: the next run builds what it did not bring" in capfd.readouterr().err


def test_stages_that_came_or_went_on_one_side():
    base, ours = {"gone": 1, "kept": 1, "fewer": 1}, {"kept": 1, "mine": 1, "both": 1, "fewer": 1}
    theirs = {"gone": 2, "kept": 1, "new": 1, "both": 2}
    assert stages_of_sides(base, ours, theirs) == ({"new", "fewer"}, {"gone", "both"})
    lock = merged_lock({"schema": "2.0", "stages": ours}, {"stages": theirs}, {"new", "fewer"})
    assert lock == {"schema": "2.0", "stages": {"kept": 1, "mine": 1, "both": 1, "new": 1}}
    assert merged_lock({}, {}, set()) == {}
