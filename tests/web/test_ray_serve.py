"""Replicas of Ray Serve answer as the package does, also when one of them is killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.machinery import PathFinder
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.project import ROOT

from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.serving.server import free_ports
from clip_deploy.web.load_test import load_test
from clip_deploy.web.process import Server, _is_ready
from clip_deploy.web.questions import EMBEDDINGS, Pool, Question, SameVectors, encoded, made_up_texts, post

RAY = ROOT / "build" / "ray"  # `make test` puts ray[serve] there
NEEDED = ("ray", "fastapi", "grpc", "watchfiles")
COMMAND = [sys.executable, "-m", "ray.serve.scripts", "run"]
APP = "clip_deploy.web.ray_serve:app"
NUMBER, CLIENTS = 2_400, 16
HELD = 12  # requests that take long, of which both replicas have some when one is killed
RETRIES = 2  # as many as OpenAI's client makes
WAIT_S = 120

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(PathFinder.find_spec(name, [*sys.path, str(RAY)]) for name in NEEDED),
        reason="ray[serve] is not installed: pip install 'clip-deploy[ray]'",
    ),
]


@pytest.fixture(scope="module")
def environment():
    """Of processes that find ray, and begin a cluster of their own."""
    paths = os.pathsep.join(filter(None, [str(ROOT), str(RAY), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "PYTHONPATH": paths,
        "RAY_ADDRESS": "local",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture
def server(package, environment, tmp_path):
    """The two replicas of deploy/ray-serve.yaml."""
    config, (port,) = yaml.safe_load((ROOT / "deploy" / "ray-serve.yaml").read_text()), free_ports(1)
    config["http_options"]["port"] = port
    config["applications"][0]["args"]["packages"] = [str(package)]
    file, log = tmp_path / "ray-serve.yaml", tmp_path / "said"
    file.write_text(yaml.safe_dump(config))
    with log.open("w") as said:
        process = subprocess.Popen(
            [*COMMAND, str(file)], cwd=tmp_path, env=environment, stdout=said, stderr=said, preexec_fn=heed_interrupts
        )
    server = Server("127.0.0.1", port, process, log)
    try:
        wait_for(lambda: len(replicas(process.pid)) == 2 and _is_ready(server), server)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(WAIT_S)


def heed_interrupts():
    """What a shell starts in the background, as tests may be, ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, server):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert server.process.poll() is None, server.log.read_text()
        assert time.monotonic() < end, server.log.read_text()
        time.sleep(0.1)


def replicas(process):
    """Processes below this one that Ray calls replicas."""
    try:
        is_replica = Path(f"/proc/{process}/cmdline").read_bytes().startswith(b"ray::ServeReplica:")
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it ended meanwhile
        return []
    return [process] * is_replica + [each for child in children for each in replicas(int(child))]


@pytest.fixture(scope="module")
def pool(package):
    classifier = ZeroShotClassifier.open(package, threads=1)
    pictures = [scenes.render("load", row, row % len(scenes.CLASSES))[0] for row in range(24)]
    return Pool(classifier, pictures, made_up_texts([*scenes.COLOURS, *scenes.SHAPES, *scenes.SIZES], 1_000))


def drawn(pool, number):
    """Questions of all kinds but headers that are too long: Ray's proxy has no bound for them."""
    return islice((each for each in chain(pool.each(), pool.draw(2 * number)) if each.status != 431), number)


def held(pool):
    """A question for which many images are decoded."""
    content, vectors = pool.files["large"][0], pool.vectors["large"][:1]
    body = {"input": [{"image": encoded(content)}] * 8}
    return Question("held", post(EMBEDDINGS, body), check=SameVectors(np.repeat(vectors, 8, axis=0), pool.min_cosine))


def test_a_replica_that_is_killed_makes_no_answer_wrong_and_loses_none(server, pool):
    killed = []

    def checked(body):
        killed.append(replicas(server.process.pid)[0])
        os.kill(killed[0], signal.SIGKILL)
        return question.check(body)

    questions = list(drawn(pool, NUMBER))
    half = next(row for row in range(NUMBER // 2, NUMBER) if questions[row].kind == "a text")
    question = questions[half]
    questions[half : half + 1] = [held(pool)] * HELD + [replace(question, check=checked)]
    found = load_test(server, questions, len(questions), clients=(CLIENTS,), retries=RETRIES)
    assert (found.total("wrong"), found.total("lost"), found.reasons) == (0, 0, [])
    assert sum(found.total(name) for name in ("answered", "refused", "left")) == found.total("asked") == NUMBER + HELD
    assert {row.kind for row in found.requests} == {*pool.kinds, "held"}
    assert len(killed) == 1
    assert found.retried > 0

    wait_for(lambda: len(replicas(server.process.pid)) == 2, server)
    assert not {*killed} & {*replicas(server.process.pid)}
    found = load_test(server, drawn(pool, 300), 300, clients=(CLIENTS,))
    assert (found.total("wrong"), found.total("lost"), found.reasons) == (0, 0, [])


REPLACED = """
import sys
from pathlib import Path
from clip_deploy.core.errors import DeployError
from clip_deploy.web import ray_serve

folder = Path(sys.argv[1])
settings = ray_serve._settings({"packages": sys.argv[1]})
keys, packages = ray_serve.Keys(None), [ray_serve._package(sys.argv[1])]
print(ray_serve._opened(settings, keys, packages).state.api.models.served[0].id)
manifest = folder / "manifest.json"
manifest.write_text(manifest.read_text().replace('"note": "', '"note": "written anew '))
try:
    ray_serve._opened(settings, keys, packages)
except DeployError as error:
    print(error)
"""


def test_a_replica_opens_what_was_deployed_or_nothing(package, environment, tmp_path):
    copy = shutil.copytree(package, tmp_path / "package")
    done = subprocess.run(
        [sys.executable, "-c", REPLACED, str(copy)], env=environment, capture_output=True, text=True, check=False
    )
    name, said = done.stdout.splitlines()
    assert said.startswith(f"{name}: its folder holds another package than when it was deployed"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["packages=none"], "none is not a package (it does not exist): give the folder that `dvc repro` or"),
        (["package=none"], "package is not an argument: accepted are packages, device, threads, "),
        (["threads=two"], "threads is 'two': Input should be a valid integer"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(arguments, said, environment, tmp_path):
    process = subprocess.run(
        [*COMMAND, APP, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 1, process.stderr
    error = process.stderr.splitlines()[-1]
    assert error.startswith("Error: ")
    assert said in error
    assert "Traceback" not in process.stderr
