"""reports/recommendation.json: which targets to ship, for the report, the stage `package` and the gate."""

from dataclasses import dataclass

from clip_deploy.core.config import RecommendConfig
from clip_deploy.core.records import Metrics, PairVerdict


@dataclass(frozen=True)
class TargetVerdict:
    """What the gate said of a target.

    Attributes:
        files: the SHA-256 of each that was judged.
        batch_sizes: by tower, from the smallest batch that was timed to the one that gives most per second
            (recommend.batch_sizes).
    """

    status: str
    reasons: list[str]
    runtime: str
    precision: str
    device: str
    files: dict[str, str]
    metrics: Metrics
    batch_sizes: dict[str, list[int]]


@dataclass(frozen=True)
class Shipment:
    """What the package depends on: reports/shipped.json. A loser that is timed anew changes nothing here.

    Attributes:
        ship: the winner for each tower, which is what the stage `package` takes; empty where nothing is fit.
        pairs: by its name, each pair that is the fastest tower by tower: which it is, whether it passed its gate and
            keeps the limits together, and why not. Where it failed, `ship` is the best single target.
        note: what is packaged and, where it is not the winner or nothing, why.
        doubts: what speaks against the reference itself, and so against all of this.
        targets: what the gate said of each in `ship`, or of all, its files' hashes and its metrics.
    """

    ship: dict[str, str]
    pairs: dict[str, PairVerdict]
    note: str
    doubts: list[str]
    targets: dict[str, TargetVerdict]


@dataclass(frozen=True)
class Recommendation(Shipment):
    """What to ship and why.

    Attributes:
        limits: what was asked for.
        alike: for each tower, targets whose speed cannot be told apart from the winner's.
        front: targets than which no other fit one is as fast for each tower, as accurate and as small.
        losers: for each other target, why it lost.
        summary: the winner, or the pair of them, and its numbers: what `dvc metrics diff` and `dvc exp show` show.
    """

    limits: RecommendConfig
    alike: dict[str, list[str]]
    front: list[str]
    losers: dict[str, str]
    summary: Metrics

    def shipment(self) -> Shipment:
        shipped = {name: self.targets[name] for name in self.ship.values()}
        return Shipment(self.ship, self.pairs, self.note, self.doubts, shipped)
