"""The load test in other servers' protocols, without those servers: one on loopback gives prepared answers."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain

import numpy as np
import pytest
from support.project import ROOT

from benchmarks.load_others import __main__ as program
from benchmarks.load_others import reference, servers
from benchmarks.load_others.questions import (
    MISTAKE,
    Close,
    Infinity,
    Rows,
    Tokens,
    Vllm,
    embedding_kinds,
    triton_kinds,
)
from benchmarks.load_others.reference import Embed, Reference
from benchmarks.load_others.report import report
from benchmarks.load_others.servers import Target
from clip_deploy.core.parsing import plain
from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.web.load_test import load_test
from clip_deploy.web.process import Server
from clip_deploy.web.questions import FILES, OWN, Pool, SameVectors, WrongAnswerError, saved

TEXTS = [f"text {row}" for row in range(24)]
PICTURES = 2


def body(content):
    return json.loads(content.partition(b"\r\n\r\n")[2])


def files():
    pictures = [scenes.render("load", row, row)[0] for row in range(PICTURES)]
    return {kind: [saved(picture, "JPEG") for picture in pictures] for kind in (*FILES, OWN)}


@pytest.fixture(scope="module")
def known():
    """Texts and files with vectors that stand at right angles."""
    vectors = np.eye(len(TEXTS), dtype=np.float32)
    return Reference(TEXTS, vectors, [5] * 20 + [30] * 4, files(), {kind: vectors[:2] for kind in (*FILES, OWN)})


@pytest.fixture(scope="module")
def pool(package):
    classifier = ZeroShotClassifier.open(package, threads=2)
    return Pool(classifier, reference.pictures()[:4], reference.texts(40))


def test_infinity_is_asked_in_its_own_shape():
    server = Infinity()
    assert server.texts(["a", "b"], "base64").startswith(b"POST /embeddings HTTP/1.1\r\n")
    assert body(server.texts(["a", "b"], "base64")) == {"input": ["a", "b"], "encoding_format": "base64"}
    asked = body(server.images([b"abc", b"d"]))
    assert asked == {
        "input": ["data:image/png;base64,YWJj", "data:image/png;base64,ZA=="],
        "modality": "image",
        "encoding_format": "float",
    }


def test_vllm_is_asked_for_an_image_in_a_message():
    server = Vllm()
    assert server.texts(["a"]).startswith(b"POST /v1/embeddings HTTP/1.1\r\n")
    assert body(server.texts(["a"]))["input"] == ["a"]
    (message,) = body(server.images([b"abc"]))["messages"]
    assert message["content"] == [{"type": "image_url", "image_url": {"url": "data:image/png;base64,YWJj"}}]


def test_each_model_of_triton_is_asked_for_what_the_package_takes(pool):
    kinds = triton_kinds(pool)
    for kind, names in {
        "clip_text": {"input_ids", "attention_mask"},
        "clip_vision": {"pixel_values"},
        "clip_tokenize": {"texts"},
        "clip_preprocess": {"encoded"},
        "clip_zero_shot, PNG": {"encoded", "texts"},
    }.items():
        head, _, content = kinds[kind].questions[0].content.partition(b"\r\n\r\n")
        assert head.startswith(f"POST /v2/models/{kind.split(',')[0]}/infer ".encode())
        length = int(head.partition(b"Inference-Header-Content-Length: ")[2].split()[0])
        asked = json.loads(content[:length])
        assert {given["name"] for given in asked["inputs"]} <= names
        assert asked["parameters"] == {"binary_data_output": False}


def test_texts_that_the_server_cuts_are_a_kind_of_their_own(known):
    kinds = embedding_kinds(Infinity(), known, cut=20)
    assert len(kinds["a text"].questions) == 20
    assert len(kinds["a text of more than 20 tokens"].questions) == 4
    assert not any("more than" in kind for kind in embedding_kinds(Vllm(), known, cut=30))
    assert "images" not in embedding_kinds(Vllm(), known, cut=30)  # one image a request


def answer(question):
    """The right one."""
    check = question.check
    if isinstance(check, SameVectors):
        data = [{"index": row, "embedding": vector.tolist()} for row, vector in enumerate(check.expected)]
        return 200, {"data": data}
    if isinstance(check, Rows):
        return 200, tensors({check.name: check.check.expected})
    if isinstance(check, Close):
        return 200, tensors({check.name: check.expected})
    if isinstance(check, Tokens):
        longest = max(map(len, check.texts))
        ids = np.array([[*row, *[0] * (longest - len(row))] for row in check.texts])
        mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in check.texts])
        return 200, tensors({"input_ids": ids, "attention_mask": mask})
    return 422, {"detail": "no"}


def tensors(arrays):
    return {
        "outputs": [
            {"name": name, "shape": list(array.shape), "data": array.reshape(-1).tolist()}
            for name, array in arrays.items()
        ]
    }


@contextmanager
def answering(say):
    """A server on loopback; `say` gives status and body for a request's body, or None for silence."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.send_response(204)
            self.end_headers()

        def do_POST(self):
            said = say(self.rfile.read(int(self.headers["content-length"])))
            while said is None and not ended.wait(0.05):
                pass
            if said:
                content = json.dumps(said[1]).encode()
                self.send_response(said[0])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    class Quiet(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, *_):  # clients leave in the middle
            pass

    ended = threading.Event()
    with Quiet(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield NoProcess(*server.server_address, None, None)
        finally:
            ended.set()
            server.shutdown()


class NoProcess(Server):
    def memory_mb(self):
        return None


def prepared(kinds):
    """Right answers by the body of the request."""
    questions = chain.from_iterable(kind.questions for name, kind in kinds.items() if name != "aborted")
    return {question.content.partition(b"\r\n\r\n")[2]: answer(question) for question in questions}


@pytest.fixture(params=["infinity", "vllm", "triton"])
def kinds(request, known, pool):
    if request.param == "triton":
        return triton_kinds(pool)
    return embedding_kinds({"infinity": Infinity(), "vllm": Vllm()}[request.param], known, cut=20)


def asked(kinds, say, clients=(4,)):
    questions = [question for kind in kinds.values() for question in kind.questions[:6]]
    with answering(say) as server:
        return load_test(server, questions, len(questions), clients=clients, limit_s=2.0)


def test_right_answers_are_answered_and_mistakes_refused(kinds):
    found = asked(kinds, prepared(kinds).get)
    assert (found.total("wrong"), found.total("lost"), found.reasons) == (0, 0, [])
    assert found.total("refused") == sum(kind.startswith(MISTAKE) for kind in kinds)
    assert found.total("left") == 6


def test_one_answer_for_all_is_wrong(kinds):
    """Status 200, and of each kind the first answer for all of its questions."""
    first = {
        question.content.partition(b"\r\n\r\n")[2]: answer(kind.questions[0])
        for kind in kinds.values()
        for question in kind.questions
    }
    found = asked(kinds, first.get)
    wrong = {row.kind for row in found.requests if row.wrong}
    assert wrong >= {"a text", "texts", "image, PNG"} or wrong >= {"clip_text", "clip_tokenize", "clip_preprocess"}


def test_an_answer_to_a_mistake_is_wrong_and_an_error_of_the_servers_own_is_lost(kinds):
    mistakes = {kind: asked for kind, asked in kinds.items() if kind.startswith(MISTAKE)}
    assert asked(mistakes, lambda _: (200, {"data": []})).total("wrong") == len(mistakes)
    assert asked(mistakes, lambda _: (500, {"error": "my fault"})).total("lost") == len(mistakes)


def test_a_right_request_that_is_refused_is_lost_but_where_servers_have_bounds(known):
    kinds = embedding_kinds(Vllm(), known, cut=30)
    tiny, png = ({kind: kinds[kind]} for kind in ("image, tiny", "image, PNG"))
    assert asked(tiny, lambda _: (400, {"error": "too small"})).total("refused") == PICTURES
    assert asked(png, lambda _: (400, {"error": "no"})).total("lost") == PICTURES


def test_503_is_asked_again_and_said(known, monkeypatch):
    monkeypatch.setattr("clip_deploy.web.load_test.AGAIN_S", 0.01)
    kinds = {"a text": embedding_kinds(Vllm(), known, cut=30)["a text"]}
    right, seen = prepared(kinds), set()

    def say(content):
        if content in seen:
            return right[content]
        seen.add(content)
        return 503, {"error": "cache miss"}

    found = asked(kinds, say)
    assert (found.total("answered"), found.total("lost"), found.busy) == (6, 0, 6)
    assert "status 503" in found.reasons[0]


@pytest.mark.parametrize(
    "outputs",
    [
        {"x": np.array([[2.0, 0.0], [1.0, 0.0]])},
        {"x": np.array([[2.0, 0.0]])},
        {"x": np.array([[2.0, 0.0], [0.0, np.nan]])},
    ],
)
def test_vectors_and_numbers_that_are_not_due_are_wrong(outputs):
    due = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    assert Rows("x", due, 0.9999)(tensors({"x": 2 * due})) == pytest.approx(1)
    assert Close("x", due, 0.01)(tensors({"x": due + 0.001})) is None
    for check in (Rows("x", due, 0.9999), Close("x", due, 0.01)):
        with pytest.raises(WrongAnswerError):
            check(tensors(outputs))


def test_what_ends_a_server_is_named_and_left_out_of_the_load(known, monkeypatch):
    monkeypatch.setattr(program, "LIMIT_S", 0.5)
    monkeypatch.setattr(program, "REQUESTS", 700)
    monkeypatch.setattr(program, "ROUNDS", 1)
    every = embedding_kinds(Infinity(), known, cut=20)
    kinds = {kind: every[kind] for kind in ("a text", "image, PNG", MISTAKE + "a JPEG cut off", MISTAKE + "no image")}
    right = prepared(kinds)
    deadly = kinds[MISTAKE + "a JPEG cut off"].questions[0].content.partition(b"\r\n\r\n")[2]
    starts = []

    @contextmanager
    def start():
        dead = threading.Event()
        starts.append(dead)

        def say(content):
            if content == deadly:
                dead.set()
            return None if dead.is_set() else right[content]

        with answering(say) as server:
            yield server

    target = Target("1.0", start, kinds, "a text", "/health", "made-up vectors")
    with program.Restarted(target) as server:
        found = program.ask("stub", target, server)
    assert found.ends == {MISTAKE + "a JPEG cut off": 204}
    assert found.left_out == [MISTAKE + "a JPEG cut off"]
    assert len(starts) == 2
    assert {row.kind for row in found.under_load} == set(kinds) - set(found.left_out)
    assert sum(row.asked for row in found.under_load) == 700
    record = {
        "servers": {"stub": plain(found), "other": {"unavailable": "not installed"}},
        "requests": 700,
        "clients": [1, 2],
        "machine": {"cpu": "a processor"},
    }
    page = report(record)
    assert "| stub | 1.0 | 700 |" in page
    assert "| other | not installed | - |" in page
    assert "| stub | mistake, a JPEG cut off | 2 | 0 | 2 | lost: no answer within 0 s | no answer to a right" in page
    assert "204 from its health" in page


def test_a_server_that_is_not_installed_keeps_its_row(monkeypatch, tmp_path):
    monkeypatch.setattr(servers, "ROOT", tmp_path)
    for name in ("infinity", "vLLM"):
        assert "not installed" in program.asked_of(name)["unavailable"]


def test_a_widened_checkpoint_embeds_as_before(tmp_path):
    checkpoint = ROOT / "assets" / "tiny-shapes"
    plain_one, wide = (
        Embed(folder, reference.dropped) for folder in (checkpoint, reference.widened(checkpoint, tmp_path / "wide"))
    )
    for before, after in (
        (plain_one.text("a red circle"), wide.text("a red circle")),
        (plain_one.image(files()[OWN][0]), wide.image(files()[OWN][0])),
    ):
        np.testing.assert_allclose(after[: len(before)], before, atol=1e-6)
        assert len(after) == 96
        assert not after[len(before) :].any()
