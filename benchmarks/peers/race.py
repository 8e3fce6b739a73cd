"""Time all contestants call by call in turn on the same cores, and hold their embeddings against the reference's.

One round gives every contestant a turn of about 20 ms, in an order drawn anew, while all others are stopped. So drift
of the machine hits all alike, and a ratio of medians over the same rounds is free of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from tqdm import tqdm

from clip_deploy.errors import UnavailableError
from clip_deploy.parity import compare
from clip_deploy.timing import LEAST_ROUNDS, Worker, calls_per_turn, speedup_interval

WARMUP = 3  # calls before the first turn


@dataclass
class Contestant:
    """Who takes part: a folder and the program that serves it, or the reason why it cannot."""

    name: str
    folder: Path
    program: Sequence[str] = ()
    size_mb: float | None = None
    precision: str = ""  # fp32, int8, or auto where the runtime chooses
    ours: bool = False
    unavailable: str | None = None


@dataclass
class Case:
    """What all contestants are asked at one tower, batch size and text length; names to what was found."""

    request: dict[str, Any]
    rounds: int = 0
    turns: dict[str, list[list[float]]] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)


def race(contestants: list[Contestant], requests: list[dict], threads: int, seconds: float, rounds: int) -> list[Case]:
    """Run every request. A contestant that fails is marked unavailable, and the others go on without it.

    Args:
        seconds: time limit of the rounds of one request, all contestants together; at least 5 rounds are run.
        rounds: of one request, at most.
    """
    workers: dict[str, Worker] = {}
    try:
        for one in contestants:
            if not one.unavailable:
                workers[one.name] = Worker(one.folder, threads, one.program)
                _attempt(one, workers, workers[one.name].wait)
        entered = [one for one in contestants if one.name in workers]
        return [_run(request, entered, workers, seconds, rounds) for request in tqdm(requests, disable=None)]
    finally:
        for worker in workers.values():
            worker.close()


def _attempt(one: Contestant, workers: dict[str, Worker], action) -> Any:
    """What `action` returns; None where the contestant failed, now or before."""
    if one.unavailable:
        return None
    try:
        return action()
    except UnavailableError as error:
        one.unavailable = str(error)
        workers.pop(one.name).close()
        return None


def _run(request: dict, contestants: list[Contestant], workers: dict[str, Worker], seconds: float, rounds: int) -> Case:
    case = Case(request)
    calls = {one.name: _attempt(one, workers, lambda one=one: _prepare(case, workers[one.name])) for one in contestants}
    rng, started = np.random.default_rng(0), monotonic()
    while case.rounds < LEAST_ROUNDS or (case.rounds < rounds and monotonic() - started < seconds):
        for index in rng.permutation(len(contestants)):
            name = contestants[index].name
            ask = {"calls": calls[name]}
            answer = _attempt(contestants[index], workers, lambda name=name, ask=ask: workers[name].ask(ask))
            if answer:
                times = answer["ms"]
                case.turns.setdefault(name, []).append(times[1:] if len(times) > 1 else times)
        case.rounds += 1
    return case


def _prepare(case: Case, worker: Worker) -> int:
    """Give the inputs, keep the embeddings, and find how many calls fill a turn."""
    worker.ask(case.request)
    case.embeddings[worker.name] = np.array(worker.ask({"rows": True})["rows"], dtype=np.float32)
    return calls_per_turn(worker, WARMUP)


def result(case: Case, one: Contestant, basis: str, truth: str, seed: int = 0) -> dict[str, Any]:
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
        row |= latency_ratio(turns, reference, seed)
    if truth in case.embeddings:
        row |= {"cosine_min": compare(case.embeddings[one.name], case.embeddings[truth])["cosine_min"]}
    return row


def latency_ratio(turns: list[list[float]], reference: list[list[float]], seed: int = 0) -> dict[str, float]:
    """Ratio of the medians over the same rounds, above 1 where `turns` is slower, with its 95 % interval."""
    ours, theirs = ([np.median(times) for times in rounds] for rounds in (turns, reference))
    low, high = speedup_interval(reference, turns, seed)
    return {"ratio": float(np.median(ours) / np.median(theirs)), "ratio_low": low, "ratio_high": high}


def duels(case: Case, contestants: list[Contestant]) -> list[dict[str, Any]]:
    """For each precision, our fastest contestant against the fastest of the peers'."""
    found = []
    for precision in ("fp32", "int8"):
        mine, peer = (_fastest(case, contestants, precision, ours) for ours in (True, False))
        if mine and peer:
            row = {key: case.request[key] for key in ("tower", "batch", "tokens")}
            ratio = latency_ratio(case.turns[mine], case.turns[peer])
            found.append({**row, "precision": precision, "ours": mine, "peer": peer, **ratio})
    return found


def _fastest(case: Case, contestants: list[Contestant], precision: str, ours: bool) -> str | None:
    """The lowest median of those that lasted to the end."""
    medians = {
        one.name: float(np.median(np.concatenate(case.turns[one.name])))
        for one in contestants
        if one.precision == precision and one.ours is ours and len(case.turns.get(one.name, [])) == case.rounds
    }
    return min(medians, key=lambda name: medians[name]) if medians else None
