"""Which target to ship: the fastest that passes its gate and keeps the limits, and why each other one lost.

Where speeds cannot be told apart, noise would choose, and another run otherwise. What does not vary chooses then: how
close a target is to the reference, and the size of its files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod

from clip_deploy.core.artifact import TOWERS
from clip_deploy.core.config import REFERENCE, RecommendConfig
from clip_deploy.core.parsing import plain
from clip_deploy.core.recommendation import Recommendation, TargetVerdict
from clip_deploy.core.records import Metrics, PairVerdict, Timing
from clip_deploy.report.decisive import Pace, again
from clip_deploy.report.decisive import pace as pace_of
from clip_deploy.report.rows import Row, doubts, metrics
from clip_deploy.report.tables import number

UNDECIDED = "its timing decides nothing (~), time it again"
SAME_COSINE = 1e-4  # two lowest cosines no further apart are alike
SAME_SIZE = 1.05  # so are sizes: the same weights in another format
TIE = (
    "Of targets that cannot be told apart from the fastest on both towers (where none is: on one), the closest to "
    f"{REFERENCE} ships (lowest cosine, alike within {SAME_COSINE:.4f}), then the smallest (alike within "
    f"{100 * (SAME_SIZE - 1):.0f} %), then the fastest; recommend.max_size_mb or max_memory_mb asks for small ones"
)
FRONT = (
    "Pareto front (no other that is fit is as good in each tower's time, lowest cosine, top-1 drop and size, and "
    "better in one; alike are times and drops whose intervals overlap, cosines within "
    f"{SAME_COSINE:.4f}, sizes within {100 * (SAME_SIZE - 1):.0f} %)"
)

Together = Callable[[Row, Row], Row]  # what tower_pair.pair_row says of an image tower with another target's text tower
Unpackable = Callable[[str], str | None]  # what lacks to package a target, by package.unpackable


def recommend(rows: list[Row], limits: RecommendConfig, together: Together, unpackable: Unpackable) -> Recommendation:
    """Judge all rows of the report by `limits`.

    `together` is asked where each tower gets a target of its own, `unpackable` of the winners.
    """
    refused = {row.target: reason for row in rows if (reason := refusal(row, limits))}
    kept = [row for row in rows if row.target not in refused]
    fit = steady(kept, limits.batch)
    refused |= {row.target: UNDECIDED for row in kept if row not in fit}
    by_name = {row.target: row for row in rows}
    pairs: dict[str, PairVerdict] = {}
    ship, shipped = _held(choose(kept, limits.batch), kept, limits, together, pairs)
    lacking = dict.fromkeys(reason for name in ship.values() if (reason := unpackable(name)))
    alike = {tower: _alike_to(by_name[winner], fit, tower, limits.batch) for tower, winner in ship.items()}
    lost = [row for row in rows if row.target not in ship.values()]
    return Recommendation(
        limits=limits,
        ship=ship,
        pairs=pairs,
        note=_note(ship, "; ".join(lacking)),
        doubts=doubts(rows),
        alike={tower: names for tower, names in alike.items() if names},
        front=[row.target for row in pareto(fit, limits.batch)],
        losers={
            row.target: refused.get(row.target) or _failed(row, pairs) + _slower(row, ship, fit, limits.batch)
            for row in lost
        },
        summary=summary(shipped, limits.batch),
        targets=_targets(rows),
    )


def refusal(row: Row, limits: RecommendConfig) -> str | None:
    """Why a target is not fit to ship, the first reason that holds, or None."""
    if row.status == "unavailable":
        return f"unavailable: {row.reasons[0]}"
    if row.status != "pass":
        return f"gate failed: {row.reasons[0]}"
    if limits.runtimes is not None and row.runtime not in limits.runtimes:
        return f"runs with {row.runtime}, recommend.runtimes is {', '.join(limits.runtimes)}"
    if limits.device is not None and row.device != limits.device.value:
        return f"runs on {row.device}, recommend.device is {limits.device.value}"
    drop = row.zero_shot.top1_drop if row.trained and row.zero_shot else None
    if limits.max_top1_drop is not None and drop is not None and drop > limits.max_top1_drop:
        return f"over max_top1_drop: {drop:.2f} > {limits.max_top1_drop} points"
    memory = row.gpu_memory_mb if row.device == "cuda" else row.memory_mb
    for name, most, value in (
        ("max_memory_mb", limits.max_memory_mb, memory),
        ("max_size_mb", limits.max_size_mb, row.size_mb),
    ):
        if most is not None and (value is None or value > most):
            return f"over {name}: {number(value)} > {number(most)}" if value is not None else f"{name}: not measured"
    return _too_slow(row, limits)


def _too_slow(row: Row, limits: RecommendConfig) -> str | None:
    for tower in TOWERS:
        timing = row.timing(tower, limits.batch)
        if not timing:
            lone = f"{tower} tower " if any(row.timing(each, limits.batch) for each in TOWERS) else ""
            return f"{lone}not timed at batch {limits.batch}"
        if limits.max_p95_ms is None:
            continue
        if timing.undecided:
            return f"max_p95_ms: {UNDECIDED}"
        if timing.p95_ms is None:
            return f"max_p95_ms: {timing.calls} calls of the {tower} tower support no p95 (100 do)"
        if timing.p95_ms > limits.max_p95_ms:
            return f"over max_p95_ms: {tower} {number(timing.p95_ms)} > {number(limits.max_p95_ms)}"
    return None


def steady(rows: list[Row], batch: int) -> list[Row]:
    """Those whose timings decide."""
    return [row for row in rows if not any(row.is_undecided(tower, batch) for tower in TOWERS)]


def choose(fit: list[Row], batch: int) -> dict[str, str]:
    """The best for each tower; one for both where its speed cannot be told apart from the fastest on either.

    A tie goes as `settle` says. Where no timing decides, it is the one with the smallest files.
    """
    timed = steady(fit, batch)
    if not timed:
        return dict.fromkeys(TOWERS, min(fit, key=lambda row: row.size_mb or inf).target) if fit else {}
    best = {tower: quickest(timed, (tower,), batch) for tower in TOWERS}
    if both := level(timed, best, batch):
        return dict.fromkeys(TOWERS, settle(both, TOWERS, batch)[0].target)
    tied = {tower: level(timed, {tower: best[tower]}, batch) for tower in TOWERS}
    return {tower: settle(rows, (tower,), batch)[0].target for tower, rows in tied.items()}


def level(timed: list[Row], best: dict[str, Row], batch: int) -> list[Row]:
    """Those whose speed cannot be told apart from that of a tower's best row, on each tower that is named."""
    return [row for row in timed if all(alike(row, each, tower, batch) for tower, each in best.items())]


def quickest(timed: list[Row], towers: Sequence[str], batch: int) -> Row:
    """By one figure for all `towers`: as much is gained by halving one as by halving another."""
    return min(timed, key=lambda row: prod(pace(row, tower, batch).middle for tower in towers))


def settle(tied: list[Row], towers: Sequence[str], batch: int) -> tuple[Row, dict[str, str]]:
    """Which of rows with one speed to ship, and why it is none of the others: TIE in its order."""
    closest = max(closeness(row, towers) for row in tied)
    close = [row for row in tied if closeness(row, towers) >= closest - SAME_COSINE]
    small = [row for row in close if _size(row) <= SAME_SIZE * min(_size(each) for each in close)]
    winner = quickest(small, towers, batch)
    why = dict.fromkeys((row.target for row in small if row is not winner), "as close, as small, and not faster")
    why |= {row.target: f"larger, {number(row.size_mb)} MB" for row in close if row not in small}
    far = {row.target: closeness(row, towers) for row in tied if row not in close}
    return winner, why | {name: f"further from {REFERENCE}, lowest cosine {cosine:.4f}" for name, cosine in far.items()}


def closeness(row: Row, towers: Sequence[str]) -> float:
    """The lowest cosine with the reference's embeddings, of the towers that a target is taken for."""
    return min((row.cosine_min.get(tower, 0.0) for tower in towers), default=0.0)


def _size(row: Row) -> float:
    return row.size_mb or inf


def _held(
    towers: dict[str, str],
    fit: list[Row],
    limits: RecommendConfig,
    together: Together,
    pairs: dict[str, PairVerdict],
) -> tuple[dict[str, str], Row | None]:
    """The towers, if a pair among them keeps its gate and the limits together, or else the best single target.

    The row is of what ships, None where that is nothing. What was found of a pair goes into `pairs`.
    """
    by_name = {row.target: row for row in fit}
    if len(set(towers.values())) < 2:
        return towers, by_name.get(towers.get("vision", ""))
    pair = together(by_name[towers["vision"]], by_name[towers["text"]])
    reason = refusal(pair, limits)
    reasons = pair.reasons or ([reason] if reason else [])
    pairs[f"{towers['vision']} with {towers['text']}"] = PairVerdict(
        towers, pair.precision, "fail" if reason else "pass", reasons
    )
    if not reason:
        return towers, pair
    single = _single(fit, limits.batch)
    return dict.fromkeys(TOWERS, single), by_name[single]


def summary(shipped: Row | None, batch: int) -> Metrics:
    """What ships and its numbers, the times of one call at that batch size; a time that decides nothing is None."""
    if shipped is None:
        return {"winner": "none"}
    timed = {tower: shipped.timing(tower, batch) for tower in TOWERS}
    p50_ms = {tower: timing.p50_ms if timing and not timing.undecided else None for tower, timing in timed.items()}
    found: Metrics = {
        "winner": shipped.target,
        "image_ms": p50_ms["vision"],
        "text_ms": p50_ms["text"],
        "cosine_min": min(shipped.cosine_min.values(), default=None),
        "size_mb": shipped.size_mb,
    }
    return found | ({"top1_percent": shipped.zero_shot.top1} if shipped.zero_shot else {})


def _single(fit: list[Row], batch: int) -> str:
    """The best target for both towers where none is as fast as the fastest on either."""
    timed = steady(fit, batch)
    best = dict.fromkeys(TOWERS, quickest(timed, TOWERS, batch))
    return settle(level(timed, best, batch), TOWERS, batch)[0].target


def pace(row: Row, tower: str, batch: int) -> Pace:
    """What decides between rows at a batch size: a share of the reference's time on a CPU, ms on a GPU."""
    timing = row.timing(tower, batch)
    assert timing is not None  # refusal refuses rows without it
    return pace_of(timing, row.device == "cuda")


def alike(row: Row, winner: Row, tower: str, batch: int) -> bool:
    """Whether the intervals overlap, so that the two cannot be told apart."""
    one, other = pace(row, tower, batch), pace(winner, tower, batch)
    return one.low <= other.high and other.low <= one.high


def _alike_to(winner: Row, fit: list[Row], tower: str, batch: int) -> list[str]:
    return [row.target for row in fit if row is not winner and alike(row, winner, tower, batch)]


def pareto(fit: list[Row], batch: int) -> list[Row]:
    """Rows that none other beats."""
    return [row for row in fit if not any(beats(other, row, batch) for other in fit)]


def beats(one: Row, other: Row, batch: int) -> bool:
    """Whether a row is nowhere worse than another, and somewhere better: FRONT says in what, and what is alike."""
    ahead = list(_ahead(one, other, batch))
    return min(ahead) == 0 and max(ahead) > 0


def _ahead(one: Row, other: Row, batch: int) -> Iterator[int]:
    """1 where `one` is better, -1 where it is worse, 0 where the two cannot be told apart."""
    for tower in TOWERS:
        mine, theirs = pace(one, tower, batch), pace(other, tower, batch)
        yield (mine.high < theirs.low) - (theirs.high < mine.low)
    closer = closeness(one, TOWERS) - closeness(other, TOWERS)
    yield (closer > SAME_COSINE) - (closer < -SAME_COSINE)
    if one.trained and one.zero_shot and other.zero_shot:
        own, its = one.zero_shot, other.zero_shot
        yield (own.top1_drop_high < its.top1_drop_low) - (its.top1_drop_high < own.top1_drop_low)
    yield (_size(one) * SAME_SIZE < _size(other)) - (_size(other) * SAME_SIZE < _size(one))


def _failed(row: Row, pairs: dict[str, PairVerdict]) -> str:
    """That a target was the best for a tower, and in which pair it failed."""
    failed = [name for name, pair in pairs.items() if pair.status == "fail" and row.target in pair.towers.values()]
    return "".join(f"{name} failed together; alone " for name in failed[:1])


def _slower(row: Row, ship: dict[str, str], fit: list[Row], batch: int) -> str:
    """How long a fit target takes beside each winner; where that is no difference, why the winner is another."""
    by_name, parts = {each.target: each for each in fit}, []
    for winner in dict.fromkeys(ship.values()):
        towers = [tower for tower in TOWERS if ship[tower] == winner]
        best = by_name[winner]
        first, *others = (
            (tower, f"{pace(row, tower, batch).middle / pace(best, tower, batch).middle:.2f}x") for tower in towers
        )
        said = ", ".join([f"{first[1]} as long as {winner} on {first[0]}", *(f"{x} on {tower}" for tower, x in others)])
        near = [tower for tower in towers if alike(row, best, tower, batch)]
        told = f" (not to be told apart on {' and '.join(near)}: the intervals overlap)" if near else ""
        tie = f"; {_tie(row, towers, fit, batch)}" if near == towers else ""
        parts.append(f"{said}{told}{tie}")
    return f"takes {'; '.join(parts)}"


def _tie(row: Row, towers: list[str], fit: list[Row], batch: int) -> str:
    """Why a target that cannot be told apart from the winner is not the winner."""
    best = {tower: quickest(fit, (tower,), batch) for tower in towers}
    if not level(fit, best, batch):
        best = dict.fromkeys(towers, quickest(fit, towers, batch))
    tied = level(fit, best, batch)
    if row in tied:
        return settle(tied, towers, batch)[1].get(row.target, "")
    behind: dict[str, list[str]] = {}
    for tower, one in best.items():
        if not alike(row, one, tower, batch):
            behind.setdefault(one.target, []).append(tower)
    named = (f"{name} on {' and '.join(lost)}" for name, lost in behind.items())
    return f"slower than the fastest, {', '.join(named)}"


def _note(ship: dict[str, str], lacking: str) -> str:
    if not ship:
        return (
            "no target passes its gate and keeps the limits of `recommend` in params.yaml; the report names each reason"
        )
    if lacking:
        return f"{_named(ship)} is recommended and cannot be packaged: {lacking}"
    return "the recommended target is packaged"


def _named(towers: dict[str, str]) -> str:
    if towers["vision"] == towers["text"]:
        return towers["vision"]
    return f"{towers['vision']} for images with {towers['text']} for texts"


def _targets(rows: list[Row]) -> dict[str, TargetVerdict]:
    measured = metrics(rows)
    return {
        row.target: TargetVerdict(
            status=row.status,
            reasons=row.reasons,
            runtime=row.runtime,
            precision=row.precision,
            device=row.device,
            files=row.files,
            metrics={key: value for key, value in measured[row.target].items() if key != "status"},
            batch_sizes={tower: batch_sizes(row.timings[tower]) for tower in TOWERS if row.timings.get(tower)},
        )
        for row in rows
    }


def batch_sizes(timed: Mapping[int, Timing]) -> list[int]:
    """Powers of two from the smallest batch that was timed to the one that gives most per second, and that one."""
    least, best = min(timed), max(timed, key=lambda batch: timed[batch].throughput_per_s)
    powers = (1 << power for power in range(best.bit_length()))
    return sorted({*(size for size in powers if least <= size), best})


@dataclass(frozen=True)
class Shipping:
    """What the report shows of a recommendation: `facts` are sentences, `losers` why each other target lost.

    `ship` is the winner for each tower, at the batch size `batch`.
    """

    facts: list[str]
    losers: dict[str, str]
    front: list[str]
    ship: dict[str, str]
    batch: int


def shown(advice: Recommendation, rows: Sequence[Row]) -> Shipping:
    """The recommendation as the report shows it."""
    return Shipping(facts(advice, rows), advice.losers, advice.front, advice.ship, advice.limits.batch)


def facts(advice: Recommendation, rows: Sequence[Row]) -> list[str]:
    """The answer in a few sentences."""
    asked = [f"{key} {value}" for key, value in plain(advice.limits).items() if key != "batch" and value is not None]
    alike_to = [
        f"On {tower}, {', '.join(names)} cannot be told apart from {advice.ship[tower]}: the intervals overlap."
        for tower, names in advice.alike.items()
    ]
    return [
        *(f"{doubt}." for doubt in advice.doubts),
        f"Ship {_named(advice.ship)}: {_costs(advice, rows)}." if advice.ship else f"Ship nothing: {advice.note}.",
        *(
            f"{_named(pair.towers)}, the best for each tower, failed together: {'; '.join(pair.reasons)}."
            for pair in advice.pairs.values()
            if pair.status == "fail"
        ),
        *_caveats(advice, rows),
        f"Fit is what passes its gate and keeps `recommend` in params.yaml: {', '.join(asked) or 'no limits'}.",
        *([f"Package: {advice.note}."] if advice.ship else []),
        *([*alike_to, f"{TIE}."] if alike_to else []),
        *([f"{FRONT}: {', '.join(advice.front)}.", *_off_the_front(advice, rows)] if advice.front else []),
    ]


def _off_the_front(advice: Recommendation, rows: Sequence[Row]) -> list[str]:
    """Of a target that ships for both towers and is beaten: differences that are none by themselves can add up."""
    batch, by_name = advice.limits.batch, {row.target: row for row in rows}
    name, *others = dict.fromkeys(advice.ship.values())
    beaters = [each for each in advice.front if not others and beats(by_name[each], by_name[name], batch)]
    return [f"{name} ships by the rule above, though {', '.join(beaters)} on the front beats it."] if beaters else []


def _costs(advice: Recommendation, rows: Sequence[Row]) -> str:
    by_name, batch = {row.target: row for row in rows}, advice.limits.batch
    chosen = {tower: by_name[advice.ship[tower]] for tower in TOWERS}
    if any(row.is_undecided(tower, batch) for tower, row in chosen.items()):
        return "no timing decides, so it is the one with the smallest files"
    image, text = (timing.p50_ms if (timing := row.timing(tower, batch)) else None for tower, row in chosen.items())
    return f"an image {number(image)} ms, a text {number(text)} ms (p50 of a call, batch {batch})"


def _caveats(advice: Recommendation, rows: Sequence[Row]) -> list[str]:
    """What the recommendation could not rest on."""
    passed, said = [row for row in rows if row.status == "pass"], []
    fit = steady(passed, advice.limits.batch)
    if shaky := [row.target for row in passed if row not in fit]:
        said.append(
            f"Provisional: {len(shaky)} of {len(passed)} timings decide nothing (~: {', '.join(shaky)}). "
            f"Time them again on a quiet machine: {again(shaky)}."
        )
    if not all(row.trained for row in rows):
        said.append("The weights are random: max_top1_drop was not applied, accuracy is the lowest cosine.")
    elif any(not row.zero_shot for row in passed):
        said.append("The evaluation set has no classes: max_top1_drop was not applied, accuracy is the lowest cosine.")
    else:
        said += _too_few_images(advice, passed)
    return said


def _too_few_images(advice: Recommendation, passed: Sequence[Row]) -> list[str]:
    """Of what ships: a top-1 drop whose interval reaches beyond the limit that it keeps."""
    limit, ships = advice.limits.max_top1_drop, set(advice.ship.values())
    found = {row.target: row.zero_shot for row in passed if row.target in ships and row.zero_shot}
    return [
        f"The evaluation set is too small to tell whether {name} keeps max_top1_drop {limit:g}: it drops "
        f"{drop.top1_drop:.2f} points [{drop.top1_drop_low:.2f}, {drop.top1_drop_high:.2f}]. More images narrow that."
        for name, drop in found.items()
        if limit is not None and drop.top1_drop_high > limit
    ]
