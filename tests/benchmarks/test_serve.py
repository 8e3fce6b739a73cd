import json

import numpy as np
import pytest

from benchmarks import serve
from benchmarks.serve import Contestant, Level, goals, jpegs, measure, ours, triton_request
from clip_deploy.core.errors import DeployError
from clip_deploy.core.images import decode
from clip_deploy.web.process import running
from clip_deploy.web.questions import EMBEDDINGS, post


def test_a_server_is_asked_by_every_client_for_images_of_the_models_own_size(package):
    files = jpegs(package)
    assert {decode(file, "a file").size for file in files} == {(48, 48)}
    with running(package) as server:
        found = {name: Level() for name in ("embeddings", "zero-shot")}
        for name, contestant in ours(server, files).items():
            measure(contestant, 4, found[name], 0.3)
        refused = Contestant(server.host, server.port, [post(EMBEDDINGS, {})])
        with pytest.raises(DeployError, match="status 400"):
            measure(refused, 1, Level(), 0.3)
    for level in found.values():
        assert level.per_s[0] > 0
        assert 0 < level.p50_ms[0] <= level.p99_ms[0]
        assert level.client_ms[0] > 0
        assert level.server_ms[0] > 0


def test_triton_is_asked_in_its_binary_form():
    inputs = {"encoded": np.array([[b"abc"]], dtype=object), "texts": np.array([[b"red"], [b"a"]], dtype=object)}
    head, _, body = triton_request("clip_zero_shot", inputs).partition(b"\r\n\r\n")
    fields = dict(line.split(": ") for line in head.decode().splitlines()[1:])
    assert head.startswith(b"POST /v2/models/clip_zero_shot/infer HTTP/1.1\r\n")
    assert int(fields["Content-Length"]) == len(body)
    length = int(fields["Inference-Header-Content-Length"])
    described = json.loads(body[:length])
    assert [(given["shape"], given["datatype"]) for given in described["inputs"]] == [
        ([1, 1], "BYTES"),
        ([2, 1], "BYTES"),
    ]
    assert body[length:] == b"\x03\0\0\0abc\x03\0\0\0red\x01\0\0\0a"


def test_goals_are_ratios_round_by_round(monkeypatch):
    monkeypatch.setattr(serve, "cores", lambda: 2)
    embeddings = {
        1: Level([90.0, 110.0], [5.0, 4.0], [6.0, 6.0], [0.1, 0.1], [4.0, 4.0]),
        32: Level([400.0, 300.0], [60.0, 60.0], [90.0, 90.0], [0.5, 0.5], [3.5, 3.5]),
    }
    triton = {1: Level([45.0, 100.0]), 32: Level([200.0, 300.0])}
    tower = {"batches_per_s": [800.0, 800.0], "one_p50_ms": [3.0, 3.5]}
    found = goals({"embeddings": embeddings, "zero-shot": embeddings, "Triton zero-shot": triton}, tower)
    assert found["over Triton zero-shot at 1"] == [1.55, 1.1, 2.0]
    assert found["over Triton zero-shot at 32"] == [1.5, 1.0, 2.0]
    assert found["of the tower's rate at 32"] == [0.438, 0.375, 0.5]
    assert found["shared_per_s"] == [500.0, 500.0, 500.0]
    assert found["of what sharing allows at 32"] == [0.7, 0.6, 0.8]
    assert found["p50 of one beyond the tower's, ms"] == [1.25, 0.5, 2.0]
