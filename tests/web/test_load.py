"""Every answer under load is the package's own, and a server of which that does not hold is found."""

import asyncio
from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import orjson
import pytest
from support.reliability import Load

from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.web.connection import Answer, Connection
from clip_deploy.web.load_test import CLIENTS, LIMIT_S, Tally, _client, growth, judge, load_test
from clip_deploy.web.process import Server, running
from clip_deploy.web.questions import (
    EMBEDDINGS,
    Pool,
    Question,
    SameScores,
    SameVectors,
    WrongAnswerError,
    made_up_texts,
    post,
)

WORDS = [*scenes.COLOURS, *scenes.SHAPES, *scenes.SIZES, "a", "an", "above", "image", "left", "of", "photo", "right"]
pytestmark = pytest.mark.filterwarnings("ignore:a text is longer than")  # whichever test makes the pool first
OTHERS = ["Ein rotes Quadrat", "红色圆圈", "🟥", "red " * 200]  # other scripts, and more than the context
# Per 10,000 requests: a row that is kept has 256 bytes, a request several kB. The allocator's own growth ends, and is
# not small yet beside few requests.
MAX_GROWTH_MB, MAX_GROWTH_MB_OF_FEW = 1.0, 5.0


@pytest.fixture(scope="module")
def pool(package, pytestconfig):
    """Of more texts than the server's cache holds, where `make reliability` asks often enough."""
    classifier = ZeroShotClassifier.open(package, threads=2)
    texts = made_up_texts(WORDS, 30_000 if pytestconfig.getoption("--reliability") else 2_000)
    pictures = [scenes.render("load", row, row % len(scenes.CLASSES))[0] for row in range(24)]
    return Pool(classifier, pictures, [*texts, *OTHERS])


@pytest.mark.no_cover  # traced, the client would take the server's cores
def test_every_answer_under_load_is_the_packages_own(package, pool, pytestconfig, outcomes):
    is_long = pytestconfig.getoption("--reliability")
    number, rounds = (1_000_000, 100) if is_long else (20_000, 20)
    with running(package) as server:
        found = load_test(server, chain(pool.each(), pool.draw(number)), number, rounds)
    outcomes.load(Load.of(found, CLIENTS))
    assert (found.total("wrong"), found.total("lost"), found.reasons) == (0, 0, [])
    assert found.total("asked") == number
    assert sum(found.total(name) for name in ("answered", "refused", "left")) == number
    assert {row.kind for row in found.requests} == set(pool.kinds)
    assert found.client_share < 0.7  # it waited for the server, and not the server for it
    assert found.growth is None or found.growth.low < (MAX_GROWTH_MB if is_long else MAX_GROWTH_MB_OF_FEW)


@pytest.mark.parametrize(("fault", "outcome"), [("swap", "wrong"), ("one for all", "wrong"), ("drop", "lost")])
def test_a_broken_server_is_found(package, pool, fault, outcome):
    program = ("-m", "tests.support.broken_server", fault)
    with running(package, "--timeout-s", "1", program=program) as server:
        found = load_test(server, pool.draw(1_000), 1_000, clients=(16,))
    assert found.total(outcome) > 0, found
    assert any(f": {outcome}: " in reason for reason in found.reasons)


def test_a_server_that_is_gone_has_lost_what_it_was_asked(package, pool):
    with running(package) as server:
        pass
    found = load_test(server, pool.draw(20), 20, clients=(1,))
    assert found.total("lost") == 20


def test_a_full_queue_is_no_fault_and_the_client_comes_again(package, pool):
    with running(package, "--max-queue", "8") as server:
        found = load_test(server, pool.draw(500), 500, clients=(32,))
    assert (found.total("wrong"), found.total("lost"), found.reasons) == (0, 0, [])
    assert found.busy > 0


def rows(*vectors, indices=None):
    numbers = range(len(vectors)) if indices is None else indices
    return {"data": [{"index": row, "embedding": list(vector)} for row, vector in zip(numbers, vectors, strict=True)]}


ONE, TWO = (1.0, 0.0), (0.0, 1.0)


@pytest.mark.parametrize(
    "body",
    [rows(TWO, ONE), rows(ONE, ONE), rows(ONE), rows(ONE, TWO, ONE), rows(ONE, TWO, indices=[1, 0]),
     rows(ONE, (0.0, float("nan"))), rows(ONE, (0.02, 1.0)), rows((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)), rows(ONE, (0, 0))],
)  # fmt: skip
def test_vectors_that_are_not_the_packages_are_wrong(body):
    check = SameVectors(np.array([ONE, TWO]), 0.9999)
    assert check(rows(ONE, (0.001, 2.0))) == pytest.approx(1, abs=1e-6)
    with pytest.raises(WrongAnswerError):
        check(body)


@pytest.mark.parametrize("scores", [{"a": 0.7, "b": 0.3}, {"b": 0.2, "a": 0.8}, {"a": 0.8}, {"a": 0.8, "c": 0.2}])
def test_scores_that_are_not_the_packages_are_wrong(scores):
    check = SameScores({"a": 0.8, "b": 0.2}, "labels", "label", "probability", 0.01)
    body = {"labels": [{"label": label, "probability": score} for label, score in scores.items()]}
    with pytest.raises(WrongAnswerError):
        check(body)


def judged(status, body, question):
    tally = Tally()
    judge(question, Answer(status, orjson.dumps(body)), tally)
    return dict(tally.counts[question.kind])


ERROR = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": "bad_request"}}
RIGHT = Question("texts", b"", check=SameVectors(np.array([ONE]), 0.9999))
MISTAKE = Question("mistake", b"", 400)


@pytest.mark.parametrize(
    ("status", "body", "question", "outcome"),
    [
        (200, rows(ONE), RIGHT, "answered"),
        (200, rows(TWO), RIGHT, "wrong"),
        (200, {"other": 1}, RIGHT, "wrong"),
        (200, [], RIGHT, "wrong"),
        (503, ERROR, RIGHT, "lost"),
        (400, ERROR, RIGHT, "lost"),
        (400, ERROR, MISTAKE, "refused"),
        (400, {"detail": "no"}, MISTAKE, "lost"),
        (500, ERROR, MISTAKE, "lost"),
        (200, rows(ONE), MISTAKE, "wrong"),
    ],
)
def test_each_answer_is_what_it_is(status, body, question, outcome):
    assert judged(status, body, question) == {outcome: 1}


def answer(status, body):
    return f"HTTP/1.1 {status} \r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


PROXYS, NOTHING, OWN = answer(500, b"Internal Server Error"), b"", answer(200, orjson.dumps(rows(ONE)))


@pytest.mark.parametrize(
    ("sent", "retries", "outcome", "retried"),
    [
        ([PROXYS, OWN], 2, "answered", 1),
        ([NOTHING, PROXYS, OWN], 2, "answered", 2),
        ([PROXYS, answer(200, orjson.dumps(rows(TWO)))], 2, "wrong", 1),
        ([PROXYS, PROXYS, PROXYS, OWN], 2, "lost", 2),
        ([NOTHING, OWN], 0, "lost", 0),
        ([PROXYS, OWN], 0, "lost", 0),
        ([answer(500, orjson.dumps(ERROR)), OWN], 2, "lost", 0),
    ],
)
def test_a_client_asks_again_where_a_proxy_has_no_answer_of_a_server(sent, retries, outcome, retried):
    left, tally = iter(sent), Tally()

    async def serve(reader, writer):
        await reader.read(1)
        writer.write(next(left))
        writer.close()
        await writer.wait_closed()

    async def ask():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            question = replace(RIGHT, content=post(EMBEDDINGS, {}))
            await _client(Server(host, port, None, None), iter([question]), tally, retries, LIMIT_S)

    asyncio.run(ask())
    assert tally.counts["texts"] == Counter({"asked": 1, outcome: 1, "retried": retried})


def test_growth_is_a_slope_with_its_interval():
    random = np.random.default_rng(0)
    samples = [(10_000 * row, 200 + (0 if row >= 10 else -50) + random.normal(0, 0.1)) for row in range(30)]
    flat = growth(samples)
    assert flat.low < 0 < flat.high
    leak = growth([(number, mb + number / 10_000) for number, mb in samples])
    assert leak.low > 0.9
    assert leak.high < 1.1
    assert growth(samples[:4]) is None
    assert growth([(1, None)] * 30) is None


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([ANSWER], Answer(200, b"ok")),
        ([ANSWER[:9], ANSWER[9:30], ANSWER[30:]], Answer(200, b"ok")),
        ([ANSWER[:-1]], "the server closed the connection"),
        ([], "the server closed the connection"),
        ([b"HTTP/1.1 200 OK\r\n\r\n"], "no HTTP/1.1 answer with a length"),
        ([ANSWER + ANSWER], "more came than was asked for"),
    ],
)
def test_a_connection_gives_whole_answers_alone(sent, expected):
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for part in sent:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()
        await writer.wait_closed()

    async def ask():
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            connection = Connection(*server.sockets[0].getsockname())
            try:
                return await connection.ask(post(EMBEDDINGS, {}))
            finally:
                connection.close()
                await asyncio.sleep(0.05)

    if isinstance(expected, Answer):
        assert asyncio.run(ask()) == expected
    else:
        with pytest.raises(ConnectionError, match=expected):
            asyncio.run(ask())


def test_the_pool_has_every_kind_and_no_two_texts_that_are_alike(pool):
    drawn = Counter(question.kind for question in pool.draw(20_000))
    assert set(drawn) == set(pool.kinds)
    cosines = pool.text_vectors[:1500] @ pool.text_vectors[:1500].T
    assert (cosines[~np.eye(len(cosines), dtype=bool)] < pool.min_cosine).all()
    assert pool.min_cosine == 0.9999
