"""Requests of every kind from many clients at once, every answer held against the package's own.

The server's memory is read between rounds, in each of which the number of clients goes through all levels: what then
still grows is no queue.
"""

import asyncio
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice

import numpy as np
import orjson

from clip_deploy.core.served import Requests
from clip_deploy.web.connection import Answer, Connection
from clip_deploy.web.process import Server
from clip_deploy.web.questions import Question, WrongAnswerError

CLIENTS = (1, 2, 4, 8, 16, 32, 64)
LIMIT_S = 40.0
MAX_FAULTS = 100  # wrong or lost: no more is sent then
AGAIN_S = 0.2  # a client whom the server told to come again waits so long
TRIES = 50
REASONS = 10  # that are kept
WARM_UP = 1 / 3  # of the rounds, in which caches fill: memory is not judged there
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student's, of 1 to 10 degrees of freedom


@dataclass(frozen=True)
class Growth:
    """MB per 10,000 requests by which memory grew, with its 95 % interval, and the MB at the end."""

    slope: float
    low: float
    high: float
    last_mb: float


@dataclass
class Tally:
    """What came of all requests so far.

    Attributes:
        counts: by kind, of the words in Requests, `asked`, and besides `busy`: told to come again, and `retried`.
        cosines: the lowest one by kind.
        reasons: why requests were wrong or lost, or told to come again by more than 429.
    """

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    cosines: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, None] = field(default_factory=dict)

    def note(self, question: Question, outcome: str, said: str = "") -> None:
        self.counts[question.kind][outcome] += 1
        if said and len(self.reasons) < REASONS:
            self.reasons[f"{question.kind}: {outcome}: {said}"] = None

    @property
    def asked(self) -> int:
        return sum(counts["asked"] for counts in self.counts.values())

    @property
    def is_enough(self) -> bool:
        return sum(counts["wrong"] + counts["lost"] for counts in self.counts.values()) >= MAX_FAULTS

    def cosine(self, kind: str, cosine: float | None) -> None:
        if cosine is not None and cosine < self.cosines.get(kind, 2.0):
            self.cosines[kind] = cosine


@dataclass(frozen=True)
class Found:
    """What a load test found.

    Attributes:
        requests: a row a kind.
        reasons: why answers were wrong or lost, or 503: some of them.
        busy: how often a client was told to come again.
        retried: how often it asked again by itself, since a proxy had no answer of a server.
        seconds: that it took.
        client_share: of these, in which the client computed: below 1 it waited for the server.
        growth: None where memory cannot be read, or in fewer than four rounds behind the warm-up.
    """

    requests: list[Requests]
    reasons: list[str]
    busy: int
    retried: int
    seconds: float
    client_share: float
    growth: Growth | None

    def total(self, outcome: str) -> int:
        return sum(getattr(row, outcome) for row in self.requests)


def load_test(
    server: Server,
    questions: Iterable[Question],
    number: int,
    rounds: int = 1,
    clients: Sequence[int] = CLIENTS,
    retries: int = 0,
    limit_s: float = LIMIT_S,
) -> Found:
    """Send `number` questions in so many rounds, each through all numbers of clients; fewer after MAX_FAULTS.

    Args:
        retries: for servers behind a proxy, how often a request is sent again that a server took along when it died.
        limit_s: until an answer that did not come is lost.
    """
    tally = Tally()
    memory: list[tuple[int, float | None]] = []
    began, computed = time.perf_counter(), time.process_time()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        for turn in _shares(iter(questions), number, rounds):
            for level, share in zip(clients, _shares(iter(turn), len(turn), len(clients)), strict=True):
                runner.run(_level(server, share, level, tally, retries, limit_s))
            memory.append((tally.asked, server.memory_mb()))
    seconds = time.perf_counter() - began
    rows = [
        Requests(kind=kind, cosine_min=tally.cosines.get(kind), **{name: counts[name] for name in OUTCOMES})
        for kind, counts in sorted(tally.counts.items())
    ]
    busy, retried = (sum(counts[name] for counts in tally.counts.values()) for name in ("busy", "retried"))
    client_share = (time.process_time() - computed) / seconds
    return Found(rows, list(tally.reasons), busy, retried, seconds, client_share, growth(memory))


OUTCOMES = ("asked", "answered", "refused", "left", "wrong", "lost")


def growth(memory: Sequence[tuple[int, float | None]]) -> Growth | None:
    """Of MB after so many requests, by least squares over the rounds behind the warm-up."""
    known = [(number, mb) for number, mb in memory[math.ceil(len(memory) * WARM_UP) :] if mb is not None]
    if len(known) < 4:
        return None
    numbers, mb = np.array(known, dtype=float).T
    numbers = (numbers - numbers.mean()) / 10_000
    slope = float(numbers @ mb / (numbers @ numbers))
    degrees = len(known) - 2
    rest = mb - mb.mean() - slope * numbers
    error = math.sqrt(float(rest @ rest) / degrees / float(numbers @ numbers))
    wide = (T_95[degrees - 1] if degrees <= len(T_95) else 2.0) * error
    return Growth(slope, slope - wide, slope + wide, float(mb[-1]))


async def _level(
    server: Server, questions: Sequence[Question], clients: int, tally: Tally, retries: int, limit_s: float
) -> None:
    """All clients take from one list of questions."""
    left = iter(questions)
    await asyncio.gather(*(_client(server, left, tally, retries, limit_s) for _ in range(clients)))


async def _client(server: Server, questions: Iterator[Question], tally: Tally, retries: int, limit_s: float) -> None:
    connection = Connection(server.host, server.port)
    for question in questions:
        if tally.is_enough:
            break
        tally.counts[question.kind]["asked"] += 1
        try:
            async with asyncio.timeout(limit_s):
                if question.leaves:
                    await connection.leave(question.content)
                    tally.note(question, "left")
                else:
                    judge(question, await _retried(connection, question, tally, retries), tally)
                    if question.closes:
                        connection.close()
        except TimeoutError:
            connection.close()
            tally.note(question, "lost", f"no answer within {limit_s:.0f} s")
        except OSError as error:
            tally.note(question, "lost", str(error) or type(error).__name__)
    connection.close()


async def _retried(connection: Connection, question: Question, tally: Tally, retries: int) -> Answer:
    """The answer, where need be to the question asked again: a proxy answers without JSON, or ends the connection."""
    while True:
        try:
            answer = await _asked(connection, question, tally)
            if answer.status < 500 or answer.body.startswith(b"{") or not retries:
                return answer
        except ConnectionError:
            if not retries:
                raise
        retries -= 1
        tally.counts[question.kind]["retried"] += 1
        await asyncio.sleep(AGAIN_S)


async def _asked(connection: Connection, question: Question, tally: Tally) -> Answer:
    """The answer, after the client came again as often as the server asked for it."""
    for _ in range(TRIES):
        answer = await connection.ask(question.content)
        if answer.status not in question.again:
            break
        tally.note(question, "busy", "" if answer.status == 429 else f"status {answer.status}: {answer.body[:160]!r}")
        await asyncio.sleep(AGAIN_S)
    return answer


def judge(question: Question, answer: Answer, tally: Tally) -> None:
    """Note what an answer is: the package's own, a refusal that is deserved, wrong or lost."""
    try:
        body = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        tally.note(question, "lost", f"status {answer.status} with {answer.body[:60]!r}")
        return
    if answer.status == 200:
        _judge_answer(question, body, tally)
    elif question.is_refused(answer.status, body):
        tally.note(question, "refused")
    else:
        tally.note(question, "lost", f"status {answer.status}, and {question.status} was due: {answer.body[:160]!r}")


def _judge_answer(question: Question, body: object, tally: Tally) -> None:
    if question.check is None:
        tally.note(question, "wrong", f"answered, and a status of {question.status} was due")
        return
    try:
        tally.cosine(question.kind, question.check(body))
    except WrongAnswerError as error:
        tally.note(question, "wrong", str(error))
    except (KeyError, TypeError, ValueError) as error:
        tally.note(question, "wrong", f"the answer has another shape ({error!r})")
    else:
        tally.note(question, "answered")


def _shares(questions: Iterator[Question], number: int, parts: int) -> Iterator[list[Question]]:
    """`number` questions in so many lists."""
    for part in range(parts):
        share = number * (part + 1) // parts - number * part // parts
        yield list(islice(questions, share))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's where it is installed, as the server takes it."""
    if find_spec("uvloop") is None:
        return asyncio.new_event_loop
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
