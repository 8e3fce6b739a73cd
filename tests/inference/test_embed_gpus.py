import os
import signal
from dataclasses import replace

import pytest

from clip_deploy.__main__ import main
from clip_deploy.core.errors import DataError, DeployError, UnavailableError
from clip_deploy.data import scenes
from clip_deploy.inference import embed_gpus
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.embed import EmbedSettings, embed, embed_folder
from clip_deploy.inference.embed_gpus import Opening, choose_gpus, make_on_gpus
from clip_deploy.inference.storage import open_source

SETTINGS = EmbedSettings(batch_size=4, part_size=6)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """20 pictures and a file that is none."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(20):
        scenes.render("gpus", index, index)[0].save(folder / f"{index:02}.png")
    (folder / "20.png").write_bytes(b"no image")
    return folder


def contents(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def on_two(package, images, output, opening=None, kill=None):
    """With two processes in the place of two GPUs, on this CPU."""
    opening, done = opening or Opening.read(package, "cpu", 1), []

    def advance(count):
        done.append(count)
        if kill and len(done) == 1:
            kill()

    def make(job, missing, _):
        return make_on_gpus(opening, ["0", "1"], job, missing, advance)

    return embed(opening, open_source(str(images), 6), str(output), SETTINGS, make), done


def test_two_processes_make_the_same_bytes_as_one(package, images, tmp_path):
    alone = embed_folder(ZeroShotClassifier.open(package, threads=1), images, tmp_path / "one", SETTINGS)
    summary, done = on_two(package, images, tmp_path / "two")
    assert (summary.images, summary.embedded_now, len(summary.unreadable)) == (21, 20, 1) == (alone.images, 20, 1)
    assert sorted(done) == [3, 6, 6, 6]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_process_that_is_killed_is_named_and_the_next_run_goes_on(package, images, tmp_path):
    def kill():
        for child in embed_gpus.multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(DeployError, match=r"the process of GPU [01] crashed with SIGKILL.* while it made part-0000\d"):
        on_two(package, images, tmp_path / "out", kill=kill)
    assert not embed_gpus.multiprocessing.active_children()
    kept = len(contents(tmp_path / "out"))
    summary, done = on_two(package, images, tmp_path / "out")
    assert (summary.images, len(done)) == (21, 4 - kept)


def test_what_a_process_cannot_open_is_said_once(package, images, tmp_path):
    with pytest.raises(DeployError, match=r"is not a package"):
        on_two(package, images, tmp_path / "out", replace(Opening.read(package, "cpu", 1), folder=tmp_path))


def test_gpus_are_chosen_among_those_that_are_visible(monkeypatch):
    monkeypatch.setattr(embed_gpus, "gpus", lambda: ["H200", "H200", "H200"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert (choose_gpus("all"), choose_gpus("0,2")) == (["0", "1", "2"], ["0", "2"])
    with pytest.raises(UnavailableError, match=r"names GPU 3, but this process has 3 \(numbered from 0\)"):
        choose_gpus("1,3")
    for wrong in ("", "0,0", "one", "0;1"):
        with pytest.raises(DataError, match=r"--gpus is .*: give all, or numbers with commas"):
            choose_gpus(wrong)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert (choose_gpus("all"), choose_gpus("1")) == (["5", "7"], ["7"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(embed_gpus, "gpus", list)
    with pytest.raises(UnavailableError, match="nvidia-smi finds no GPU here"):
        choose_gpus("all")


def test_gpus_and_ray_exclude_each_other(package, images, tmp_path, capsys):
    words = [str(images), str(tmp_path / "out"), "--package", str(package)]
    assert main(["embed", *words, "--gpus", "all", "--ray", "auto"]) == 1
    assert capsys.readouterr().err.startswith("error: --gpus and --ray are both given")


def test_a_process_reads_ahead_over_parts_that_are_shorter_than_its_lead(package, images, tmp_path):
    settings = EmbedSettings(batch_size=8, part_size=2)  # a batch a part, and two batches are begun ahead
    opening = Opening.read(package, "cpu", 1)

    def make(job, missing, advance):
        return make_on_gpus(opening, ["0"], job, missing, advance)

    summary = embed(opening, open_source(str(images), 2), str(tmp_path / "out"), settings, make)
    alone = embed_folder(ZeroShotClassifier.open(package, threads=1), images, tmp_path / "one", settings)
    assert (summary.images, summary.embedded_now) == (alone.images, alone.embedded_now) == (21, 20)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
