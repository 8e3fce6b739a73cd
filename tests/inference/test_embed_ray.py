import json
import os
import pickle
import subprocess
import sys
import time

import pytest
from pyarrow import parquet
from support.project import ROOT

from clip_deploy.__main__ import main
from clip_deploy.core.errors import DeployError
from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.embed import PART, EmbedJob, EmbedSettings, embed
from clip_deploy.inference.embed_ray import TRIES, Attempts, EmbedActor, Shipped, connect
from clip_deploy.inference.storage import open_source

IMAGES, PART_SIZE = 240, 8
# In every process of the cluster: a decoder that crashes on an image that ends so.
CRASH = """
import os, signal
from PIL import Image
whole = Image.open

def opened(file, *more, **named):
    content = file.getvalue() if hasattr(file, "getvalue") else b""
    return os.kill(os.getpid(), signal.SIGKILL) if content.endswith(b"crash") else whole(file, *more, **named)

Image.open = opened
"""
RAY = ROOT / "build" / "ray"  # `make test` puts ray there


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """240 pictures, large enough to take a while, of which two cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(IMAGES):
        image, _ = scenes.render("ray", index, index % len(scenes.CLASSES))
        image.resize((1000, 1000)).save(folder / f"{index:03}.jpg")
    (folder / "007.jpg").write_bytes(b"")
    (folder / "200.jpg").write_text("<html>")
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head that only conducts, and two workers of one CPU each, on this machine."""
    (tmp_path_factory.getbasetemp() / "sitecustomize.py").write_text(CRASH)
    before = dict(os.environ)
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    sys.path.append(str(RAY))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [os.environ.get("PYTHONPATH"), str(RAY), str(tmp_path_factory.getbasetemp())])
    )
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'clip-deploy[ray]'")
    from ray.cluster_utils import Cluster

    limits = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **limits})
    cluster.workers = [cluster.add_node(num_cpus=1, **limits) for _ in range(2)]
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    cluster.idle_cpus = lambda: ray.available_resources().get("CPU", 0)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    os.environ.clear()  # no other test's processes take the decoder that crashes
    os.environ |= before


def words(package, images, output, *more):
    settings = ["--package", str(package), "--threads", "1", "--part-size", str(PART_SIZE), "--batch-size", "4"]
    return [sys.executable, "-m", "clip_deploy", "embed", str(images), str(output), *settings, *more]


def parts(output):
    return len(list(output.glob("part-*")))


def contents(output):
    return {path.name: path.read_bytes() for path in output.iterdir()}


@pytest.mark.slow
def test_an_image_that_ends_its_process_is_named_and_not_tried_for_ever(cluster, package, few, tmp_path):
    content = (few / "2.png").rename(few / "crash.png").read_bytes()
    (few / "crash.png").write_bytes(content + b"crash")
    process = subprocess.run(
        words(package, few, tmp_path / "out", "--ray", cluster.address, "--part-size", "3"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert process.returncode == 1, process.stderr
    said = process.stderr.splitlines()[-1]
    assert said.startswith(f"error: part-00002.parquet is given up: the process that made it died {TRIES} times")
    assert "as it read crash.png; remove or replace" in said


@pytest.mark.slow
def test_a_worker_that_dies_half_way_loses_nothing_and_doubles_nothing(cluster, package, images, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    alone = subprocess.run(words(package, images, here), cwd=ROOT, capture_output=True, text=True, check=False)
    assert alone.returncode == 3, alone.stderr
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            words(package, images, there, "--ray", cluster.address), cwd=ROOT, stdout=said, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 120
        while (cluster.idle_cpus() or not parts(there)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)  # both workers are there: let both begin
        busy = not cluster.idle_cpus()
        cluster.remove_node(cluster.workers[1], allow_graceful=False)
        left = IMAGES // PART_SIZE - parts(there)
        code = process.wait(timeout=240)
        said.seek(0)
        printed = said.read()
    assert busy, f"the worker that died had nothing to do:\n{printed}"
    assert left > 0, "the run was over before the worker died"
    assert code == 3, printed
    assert f"{there}: 240 images, 0 embedded before, 238 now" in printed
    assert printed.rstrip().endswith(", 2 unreadable")
    assert sorted(contents(there)) == [PART.format(number) for number in range(30)]
    paths = [path for name in sorted(contents(there)) for path in parquet.read_table(there / name)["path"].to_pylist()]
    assert paths == [f"{index:03}.jpg" for index in range(IMAGES) if index not in (7, 200)]
    assert contents(there) == contents(here)


@pytest.fixture
def few(tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    for index in range(7):
        scenes.render("few", index, index)[0].save(folder / f"{index}.png")
    return folder


def test_a_part_that_is_tried_again_is_kept_as_it_is_and_told_again(package, few, tmp_path):
    classifier = ZeroShotClassifier.open(package, threads=1)
    rows = []

    def make(job, missing, advance):
        worker = EmbedActor(None, job, Attempts())
        worker.classifier = classifier
        for number, part in missing.items():
            rows.append(worker({"number": number, "part": pickle.dumps(part)}))
            rows.append(worker({"number": number, "part": pickle.dumps(part)}))  # tried again
            yield json.loads(rows[-1]["header"])

    source = open_source(str(few), 5, shared=True)
    done = embed(classifier, source, str(tmp_path / "out"), EmbedSettings(4, 5), make)
    assert (done.images, done.embedded_now, done.unreadable) == (7, 7, [])
    assert rows[0] == rows[1]
    assert [json.loads(row["header"])["rows"] for row in rows] == [5, 5, 2, 2]


def test_an_image_that_a_worker_does_not_see_stops_the_run_and_is_not_left_out(package, few, tmp_path):
    source = open_source(str(few), 10, shared=True)
    (few / "3.png").unlink()

    def make(job, missing, advance):
        worker = EmbedActor(None, job, Attempts())
        worker.classifier = classifier
        row = worker({"number": 0, "part": pickle.dumps(missing[0])})
        assert row["header"] == ""
        raise DeployError(row["error"])

    classifier = ZeroShotClassifier.open(package, threads=1)
    with pytest.raises(DeployError, match=r"3.png cannot be read or written here .* \(on "):
        embed(classifier, source, str(tmp_path / "out"), EmbedSettings(4, 10), make)
    assert not (tmp_path / "out").exists()


def test_a_run_whose_parts_are_not_all_there_does_not_end_well(package, few, tmp_path):
    classifier = ZeroShotClassifier.open(package, threads=1)
    with pytest.raises(DeployError, match="out lacks 2 parts that were written"):
        embed(classifier, open_source(str(few), 5), str(tmp_path / "out"), EmbedSettings(4, 5), lambda *_: [])


def test_a_worker_has_the_package_that_was_sent(package):
    sent = Shipped.read(package, "cpu", None)
    assert sent.open().fingerprint == sent.fingerprint == ZeroShotClassifier.open(package).fingerprint
    sent.files["onnx-fp32/vision.onnx"] = sent.files["onnx-fp32/vision.onnx"][:-1]
    with pytest.raises(DeployError, match=r"vision.onnx is not the file that was packaged"):
        sent.open()
    other = Shipped.read(package, "cpu", None)
    other.fingerprint = "another"
    with pytest.raises(DeployError, match="and another was sent"):
        other.open()


def test_a_cluster_that_is_not_there_is_named_at_once(monkeypatch):
    monkeypatch.setattr("clip_deploy.inference.embed_ray.load_ray", lambda: None)
    with pytest.raises(DeployError, match=r"no Ray cluster at 127.0.0.1:1 \(.*refused\): give auto, local or"):
        connect("127.0.0.1:1")


def test_without_ray_the_way_to_it_is_named(package, few, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = ["embed", str(few), str(tmp_path / "out"), "--package", str(package), "--ray", "auto"]
    assert main(words) == 1
    assert capsys.readouterr().err == "error: Ray is not installed: pip install 'clip-deploy[ray]'\n"


class DeathError(BaseException):
    """Ends what it is raised in, as a signal would."""


def test_what_ended_every_process_that_tried_it_is_named_with_what_was_done_last(package, few, tmp_path, monkeypatch):
    source, attempts = open_source(str(few), 10, shared=True), Attempts()
    job = EmbedJob(str(tmp_path / "out"), {}, 64, EmbedSettings(4, 10))

    def tried():
        worker = EmbedActor(None, job, attempts)
        worker.classifier = ZeroShotClassifier.open(package, threads=1)
        return worker({"number": 0, "part": pickle.dumps(source.parts[0])})["error"]

    def die(*_):
        raise DeathError

    with monkeypatch.context() as patch:
        patch.setattr("clip_deploy.inference.embed_ray.make_part", die)
        for _ in range(TRIES):
            with pytest.raises(DeathError):
                tried()
    assert "died 3 times, the last time as it embedded 7 images, 0.png to 6.png; remove or replace" in tried()
    attempts.begun.clear()
    (few / "3.png").write_text("<html>")
    source = open_source(str(few), 10, shared=True)
    monkeypatch.setattr(
        "clip_deploy.core.images.decode", lambda content, name, *_: die() if name.endswith("5.png") else content
    )
    attempts.begun[0] = 1
    for _ in range(TRIES - 1):
        with pytest.raises(DeathError):
            tried()
    assert "the last time as it read 5.png; remove" in tried()
