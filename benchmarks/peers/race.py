"""Time all contestants call by call in turn on the same cores, and hold their embeddings against the reference's.

One round gives every contestant a turn of about 20 ms, in an order drawn anew, while all others are stopped. So drift
of the machine hits all alike, and a ratio of medians over the same rounds is free of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from tqdm import tqdm

from clip_deploy.core.errors import UnavailableError
from clip_deploy.core.records import WIDE
from clip_deploy.core.similarity import similarity
from clip_deploy.timing.latency import MIN_ROUNDS, LatencyWorker, calls_per_turn, speedup_interval

WARMUP = 3  # calls before the first turn
LOWEST_COSINE = {"fp32": 0.9999, "bf16": 0.99, "int8": 0.99}  # ours win nothing below it; any peer is raced against


@dataclass
class Contestant:
    """Who takes part: a folder and the program that serves it, or the reason why it cannot."""

    name: str
    folder: Path
    program: Sequence[str] = ()
    size_mb: float | None = None
    precision: str = ""  # fp32, bf16 or int8
    ours: bool = False
    unavailable: str | None = None
    request: dict[str, Any] = field(default_factory=dict)  # what it is asked otherwise than the others


@dataclass
class Case:
    """What all contestants are asked at one tower, batch size and text length; names to what was found."""

    request: dict[str, Any]
    rounds: int = 0
    turns: dict[str, list[list[float]]] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)


def race(
    contestants: list[Contestant], requests: list[dict[str, Any]], threads: int, seconds: float, rounds: int
) -> list[Case]:
    """Run every request. A contestant that fails is marked unavailable, and the others go on without it.

    Args:
        seconds: time limit of the rounds of one request, all contestants together; at least 8 rounds are run.
        rounds: of one request, at most.
    """
    workers: dict[str, LatencyWorker] = {}
    try:
        for one in contestants:
            if not one.unavailable:
                workers[one.name] = LatencyWorker(one.folder, threads, one.program)
                _attempt(one, workers, workers[one.name].wait)
        entered = [one for one in contestants if one.name in workers]
        return [_run(request, entered, workers, seconds, rounds) for request in tqdm(requests, disable=None)]
    finally:
        for worker in workers.values():
            worker.close()


def _ask(workers: dict[str, LatencyWorker], name: str, request: dict[str, Any]) -> dict[str, Any]:
    return workers[name].ask(request)


def _attempt(one: Contestant, workers: dict[str, LatencyWorker], action: Callable[[], Any]) -> Any:
    """What `action` returns; None where the contestant failed, now or before."""
    if one.unavailable:
        return None
    try:
        return action()
    except UnavailableError as error:
        one.unavailable = str(error)
        workers.pop(one.name).close()
        return None


def _run(
    request: dict[str, Any],
    contestants: list[Contestant],
    workers: dict[str, LatencyWorker],
    seconds: float,
    rounds: int,
) -> Case:
    case = Case(request)
    calls = {one.name: _attempt(one, workers, partial(_prepare, case, one, workers)) for one in contestants}
    rng, started = np.random.default_rng(0), monotonic()
    while case.rounds < MIN_ROUNDS or (case.rounds < rounds and monotonic() - started < seconds):
        for index in rng.permutation(len(contestants)):
            name = contestants[index].name
            ask = {"calls": calls[name]}
            answer = _attempt(contestants[index], workers, partial(_ask, workers, name, ask))
            if answer:
                times = answer["ms"]
                case.turns.setdefault(name, []).append(times[1:] if len(times) > 1 else times)
        case.rounds += 1
    return case


def _prepare(case: Case, one: Contestant, workers: dict[str, LatencyWorker]) -> int:
    """Give the inputs, keep the embeddings, and find how many calls fill a turn."""
    worker = workers[one.name]
    worker.ask({**case.request, **one.request})
    case.embeddings[one.name] = np.array(worker.ask({"rows": True})["rows"], dtype=np.float32)
    return calls_per_turn(worker, WARMUP)


def result(case: Case, one: Contestant, basis: str, truth: str) -> dict[str, Any]:
    """One row: the contestant at one tower, batch size and text length.

    Args:
        basis: whose median latency the ratio is over: above 1 is slower than it.
        truth: against whose embeddings the lowest cosine is.
    """
    row = {**{key: case.request[key] for key in ("tower", "batch", "tokens")}, "contestant": one.name}
    turns, reference = (case.turns.get(name, []) for name in (one.name, basis))
    if len(turns) < case.rounds:
        return {**row, "unavailable": one.unavailable}
    row |= {"p50_ms": float(np.median(np.concatenate(turns))), "rounds": case.rounds, "size_mb": one.size_mb}
    if len(reference) == case.rounds:
        row |= latency_ratio(turns, reference)
    return {**row, "cosine_min": _cosine(case, one.name, truth)}


def latency_ratio(turns: list[list[float]], reference: list[list[float]]) -> dict[str, Any]:
    """Median ratio of the same rounds, above 1 where `turns` is slower, with its 95 % interval."""
    ratio, low, high = speedup_interval(reference, turns)
    return {"ratio": ratio, "ratio_low": low, "ratio_high": high, "unstable": high > WIDE * low}


def duels(case: Case, contestants: list[Contestant], truth: str) -> list[dict[str, Any]]:
    """For each precision, our fastest that stays close to `truth` against the fastest of the peers', however close."""
    found = []
    for precision in LOWEST_COSINE:
        mine, peer = (_fastest(case, contestants, precision, truth, ours) for ours in (True, False))
        if mine and peer:
            row = {key: case.request[key] for key in ("tower", "batch", "tokens")}
            cosines = {"ours_cosine_min": _cosine(case, mine, truth), "peer_cosine_min": _cosine(case, peer, truth)}
            ratio = latency_ratio(case.turns[mine], case.turns[peer])
            found.append({**row, "precision": precision, "ours": mine, "peer": peer, **ratio, **cosines})
    return found


def _fastest(case: Case, contestants: list[Contestant], precision: str, truth: str, ours: bool) -> str | None:
    """The lowest median of those that lasted to the end."""
    medians = {
        one.name: float(np.median(np.concatenate(case.turns[one.name])))
        for one in contestants
        if one.precision == precision
        and one.ours is ours
        and len(case.turns.get(one.name, [])) == case.rounds
        and not (ours and _cosine(case, one.name, truth) < LOWEST_COSINE[precision])
    }
    return min(medians, key=lambda name: medians[name]) if medians else None


def _cosine(case: Case, name: str, truth: str) -> float:
    """The lowest cosine of any row; NaN where `truth` failed."""
    if truth not in case.embeddings:
        return float("nan")
    return float(similarity(case.embeddings[name], case.embeddings[truth]).cosine_min)


def lanes(one: Contestant, requests: list[dict[str, Any]]) -> list[Contestant]:
    """The same contestant twice, to race short texts against the same texts padded: see padding."""
    names = ("short", "padded")
    return [replace(one, name=name, request=request) for name, request in zip(names, requests, strict=True)]


def padding(case: Case) -> dict[str, Any]:
    """Latency of short texts over that of the same texts padded to `padded_to` tokens, and that both say the same."""
    row = {key: case.request[key] for key in ("batch", "tokens")}
    if len(case.turns.get("short", [])) < case.rounds or len(case.turns.get("padded", [])) < case.rounds:
        return row
    ratio = latency_ratio(case.turns["short"], case.turns["padded"])
    return {**row, **ratio, "cosine_min": _cosine(case, "short", "padded")}
