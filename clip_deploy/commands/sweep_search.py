"""Points of a sweep that Optuna chooses, each from what was measured at those before.

The sampler is seeded, and is told what the experiments hold. So the same command asks for the same points after a stop,
and needs no database of its own. Source: https://optuna.readthedocs.io/en/stable/tutorial/20_recipes/009_ask_and_tell.html.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from clip_deploy.core.config import RecommendConfig
from clip_deploy.core.errors import ConfigError, UnavailableError
from clip_deploy.report.recommend import refusal
from clip_deploy.report.rows import Row
from clip_deploy.report.sweep import COSTS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

DIGITS = 3  # of what is drawn from a range
EXACT = 1e-6  # of a number of steps


@dataclass
class Search:
    """How points are chosen.

    Attributes:
        points: how many are asked for.
        objectives: names of COSTS, of which no point's are worse in all than another's on the front.
        startup: points that are drawn at random before the sampler (TPE) learns from them.
    """

    points: int = 20
    objectives: list[str] = field(default_factory=lambda: ["vision_p50_ms", "text_p50_ms", "top1_drop", "size_mb"])
    startup: int = 8

    def __post_init__(self) -> None:
        if self.points < 1 or self.startup < 1:
            raise ConfigError(f"search: points is {self.points}, startup {self.startup}: give 1 or more")
        if unknown := [name for name in self.objectives if name not in COSTS]:
            raise ConfigError(f"search.objectives holds {unknown[0]!r}: accepted are {', '.join(COSTS)}")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ConfigError("search.objectives: give one or more, each once")


@dataclass
class Range:
    """Values from `low` to `high`, both included: whole numbers where both are, apart from each other by `step`."""

    low: float | int = 0
    high: float | int = 0
    step: float | int | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError(f"low is {self.low} and high {self.high}: low must be below high")
        if self.log and (self.step is not None or self.low <= 0):
            raise ConfigError("log: true goes with low above 0, and without step")
        steps = (self.high - self.low) / self.step if self.step else 1
        if steps < 1 or abs(steps - round(steps)) > EXACT:
            raise ConfigError(f"step {self.step} does not lead from low {self.low} to high {self.high}")

    @property
    def ends(self) -> list[Any]:
        return [self.low, self.high]

    def distribution(self) -> "BaseDistribution":
        from optuna.distributions import FloatDistribution, IntDistribution

        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, step=int(self.step or 1), log=self.log)
        return FloatDistribution(self.low, self.high, step=self.step, log=self.log)


class Chooser:
    """Optuna's study of one sweep. Values that are listed are chosen by their place: they may be lists or groups."""

    def __init__(self, parameters: Mapping[str, list[Any] | Range], search: Search, limits: RecommendConfig) -> None:
        """Raises UnavailableError without optuna."""
        if find_spec("optuna") is None:
            raise UnavailableError("a search needs optuna: pip install 'clip-deploy[sweep]', or remove `search`")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.parameters, self.search, self.limits = parameters, search, limits
        self.space = {
            name: values.distribution()
            if isinstance(values, Range)
            else optuna.distributions.CategoricalDistribution(range(len(values)))
            for name, values in parameters.items()
        }
        sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=search.startup)
        self.study = optuna.create_study(directions=["minimize"] * len(search.objectives), sampler=sampler)
        self.failed = optuna.trial.TrialState.FAIL

    def ask(self) -> dict[str, Any]:
        """The next point's settings."""
        self.trial = self.study.ask(self.space)
        found = self.trial.params
        return {
            name: _rounded(found[name]) if isinstance(values, Range) else values[found[name]]
            for name, values in self.parameters.items()
        }

    def tell(self, row: Row | None) -> None:
        """What was found there; None where it failed. Those that may not be shipped count as such."""
        values = [COSTS[name](row) for name in self.search.objectives] if row else [None]
        if row is None or None in values:
            self.study.tell(self.trial, state=self.failed)
            return
        self.trial.set_constraint("fit to ship", 1.0 if refusal(row, self.limits) else 0.0)
        self.study.tell(self.trial, [float(value) for value in values if value is not None])


def _rounded(value: float | int) -> float | int:
    """As a person would write it into params.yaml."""
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")
