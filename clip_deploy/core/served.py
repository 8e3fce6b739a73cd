"""What came of holding a running server against the package, for the report.

reports/triton.json is of a Triton server, reports/serving.json of `clip-deploy serve`.
"""

from dataclasses import dataclass, field

from clip_deploy.core.parsing import FLAT
from clip_deploy.core.records import Parity


@dataclass(frozen=True)
class VersionStep:
    """One change of versions while clients went on asking.

    Attributes:
        ready: versions that answer; `answers` is the one that does where none is named.
        refused: what the server said where it refused the change; empty where it did not.
        as_expected: whether these are the versions that should answer.
        right: whether each answers by its own weights.
        sent, failed: requests meanwhile; `error` is the last failure's.
    """

    step: str
    ready: list[str]
    answers: str
    refused: str
    as_expected: bool
    right: bool
    sent: int
    failed: int
    error: str


@dataclass(frozen=True)
class Fault:
    """What came of a request that no server should have to meet.

    Attributes:
        refused: whether a client's mistake was refused as one; None where it is none.
        survived: whether the server then is ready and answers as before.
    """

    fault: str
    answer: str
    refused: bool | None
    survived: bool


@dataclass(frozen=True, kw_only=True)
class Load:
    """One model under the load of so many clients at once.

    Attributes:
        protocol: "http" or "grpc"; `note` says what is asked.
        p50_ms: of a request; a percentile is None where too few calls lie beyond it.
        queue_ms: in the server's queue.
        mean_batch: what the server's batcher put together.
        windows_per_s: requests per second in each window, of which requests_per_s is the mean.
    """

    model: str
    protocol: str
    note: str
    clients: int
    requests_per_s: float
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    queue_ms: float | None = None
    mean_batch: float | None = None
    windows_per_s: list[float]


@dataclass(frozen=True)
class Agreement:
    """The ensemble's probabilities beside the package's own."""

    files: int
    same_answer_percent: float
    max_abs_diff: float


@dataclass(frozen=True)
class Drift:
    """Live embeddings held against the golden set's.

    Attributes:
        mmd2: squared discrepancy, unbiased: about 0 without drift, below 0 by chance.
        threshold: what the discrepancy of undrifted samples stays below, but for drift.LEVEL of them.
        p_value: share of shuffles with a discrepancy as large.
        mean_cosine: cosine between both means, to see how far the whole cloud has moved.
        rows: live and golden.
        drifted: whether p_value is at most drift.LEVEL.
    """

    mmd2: float
    threshold: float
    p_value: float
    mean_cosine: float
    rows: tuple[int, int]
    drifted: bool


@dataclass(frozen=True)
class Asked:
    """What the client's program found; `health` is the HTTP status of each endpoint that a probe asks."""

    versions: list[VersionStep]
    faults: list[Fault]
    health: dict[str, int]


@dataclass(frozen=True)
class Answers:
    """What a server answered.

    Attributes:
        server: versions of what decides how it answers.
        threads: of each tower.
        metrics: names that it exposes.
        parity: with the package's own graphs, by what was asked.
        drift: of undisturbed and of darkened images.
    """

    server: dict[str, str]
    backend: str
    threads: int
    asked: Asked = field(metadata=FLAT)
    load: list[Load]
    metrics: list[str]
    parity: dict[str, Parity | Agreement]
    drift: dict[str, Drift]


@dataclass(frozen=True)
class Served:
    """reports/triton.json: status is "pass", "fail" or "unavailable", `answers` None where no server came so far."""

    status: str
    reasons: list[str]
    answers: Answers | None = field(default=None, metadata=FLAT)


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What came of the requests of one kind that were sent to `clip-deploy serve`.

    Attributes:
        answered: with the package's own answer; refused: with the status that the request deserves; left: the client
            hung up by intent. Of each request that is `asked`, one of these, wrong or lost.
        wrong: an answer that is not the package's, or to what should have been refused.
        lost: neither answered nor refused as it deserves.
        cosine_min: of the vectors that came with the package's own; None where none did.
    """

    kind: str
    asked: int
    answered: int
    refused: int
    left: int
    wrong: int
    lost: int
    cosine_min: float | None = None


@dataclass(frozen=True)
class HttpAnswers:
    """What `clip-deploy serve` answered.

    Attributes:
        clients: at once, one number after the other.
        min_cosine: below it a vector counts as wrong.
    """

    clients: list[int]
    min_cosine: float
    requests: list[Requests]


@dataclass(frozen=True)
class HttpServed:
    """reports/serving.json: status is "pass", "fail" or "unavailable", `answers` None where no server came so far."""

    status: str
    reasons: list[str]
    answers: HttpAnswers | None = field(default=None, metadata=FLAT)
