"""What looks wrong in a run, and what to change: the box at the top of the report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gvpo_jax.report.scores import Rows, finite
from gvpo_jax.rundir.formats import compact, percent

_LEAST = 10  # updates, before which a run's curves say little


@dataclass(frozen=True)
class Advice:
    """One thing that looks wrong; change: what would mend it."""

    title: str
    seen: str
    change: str


@dataclass(frozen=True)
class _Run:
    """Means of a metric over the first and the last fifth of a run's updates."""

    rows: Rows
    settings: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """A setting, as section.key."""
        section, _, key = name.partition(".")
        of_section = self.settings.get(section)
        return of_section.get(key, default) if isinstance(of_section, Mapping) else default

    def first(self, name: str) -> float | None:
        return self._mean(name, slice(None, self._part))

    def last(self, name: str) -> float | None:
        return self._mean(name, slice(-self._part, None))

    @property
    def updates(self) -> Rows:
        return [row for row in self.rows if "reward" in row]

    @property
    def _part(self) -> int:
        return max(len(self.updates) // 5, 1)

    def _mean(self, name: str, part: slice) -> float | None:
        values = [finite(row.get(name)) for row in self.updates[part]]
        known = [value for value in values if value is not None]
        return fmean(known) if known else None


def advice(rows: Rows, settings: Mapping[str, Any]) -> list[Advice]:
    """What a run's metrics and settings show, the most harmful first.

    Nothing where it is too young to tell: before 10 updates only its settings are looked at.
    """
    run = _Run(rows, settings)
    young = len(run.updates) < _LEAST
    checks = _OF_SETTINGS if young else (*_OF_CURVES, *_OF_SETTINGS)
    return [found for check in checks if (found := check(run)) is not None]


def _hacked(run: _Run) -> Advice | None:
    scores = {row["step"]: score for row in run.rows if (score := _held_out(row)) is not None}
    first, last = run.first("reward"), run.last("reward")
    if len(scores) < 2 or first is None or last is None:
        return None
    best, best_half = max(scores.values())
    now, half = scores[max(scores)]
    # Of many scores the best is partly luck, so both intervals count.
    if not (best - now > max(0.05, best_half + half) and last > first):
        return None
    return Advice(
        "The reward rises while held-out answers get worse",
        f"Training reward {compact(first)} → {compact(last)}; held-out accuracy was "
        f"{percent(best)} at best and is {percent(now)}.",
        "Read completions with a high reward: they may please the reward alone. Mend it, raise "
        "loss.beta, or take the best checkpoint (checkpoint.keep_best, --step best).",
    )


def _held_out(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """An evaluation's accuracy, and half its interval; 0 where that is not known."""
    value, low = finite(row.get("eval/accuracy")), finite(row.get("eval/accuracy_low"))
    if value is None:
        return None
    return value, 0.0 if low is None else value - low


def _log_ratios_rule(run: _Run) -> Advice | None:
    if run.get("loss.name", "gvpo") != "gvpo":
        return None
    mse, spread = run.last("gvpo_mse"), run.last("reward_std")
    if mse is None or spread is None:
        return None
    variance = spread**2 / (_contrast(run.last) or 1)  # a mean of squares, not of the deviations
    # Where a task is nearly solved rewards hardly differ, and what is left is small: no harm.
    if mse <= max(2 * variance, run.first("gvpo_mse") or 0.0, 1e-12):
        return None
    return Advice(
        "Weights follow the log-ratios, not the rewards",
        f"gvpo_mse is {compact(mse)}, and half the variance of the rewards in a group is about "
        f"{compact(variance / 2)}: most of a weight is beta x log-ratio.",
        "Lower optimizer.learning_rate or loss.beta, or limit single completions with "
        "loss.huber_delta.",
    )


def _contrast(mean: Callable[[str], float | None]) -> float:
    """The share of groups in which rewards differ; 1 where it is not known."""
    return 1 - (mean("frac_reward_zero_std") or 0.0)


def _collapsed(run: _Run) -> Advice | None:
    first, last = run.first("entropy_sampled"), run.last("entropy_sampled")
    if first is None or last is None or last > 0.1 * first or last > 0.05:
        return None
    return Advice(
        "The policy says nearly always the same",
        f"A sampled token's surprise fell from {compact(first)} to {compact(last)} nats.",
        "Raise loss.beta, or lower optimizer.learning_rate. Groups of equal answers teach nothing.",
    )


def _no_contrast(run: _Run) -> Advice | None:
    share = run.last("frac_reward_zero_std")
    if share is None or share < 0.7:
        return None
    reward, high = run.last("reward"), finite(run.get("eval.success_reward")) or 1.0
    easy = reward is not None and reward > 0.5 * high
    tasks = "harder" if easy else "easier"
    return Advice(
        "Most groups have no contrast",
        f"In {percent(share)} of the groups all rewards are equal: nothing tells better from "
        "worse there.",
        f"Take {tasks} tasks (data.filter), a larger rollout.num_generations, or a reward with "
        "more grades.",
    )


def _cut(run: _Run) -> Advice | None:
    share = run.last("completions/clipped_ratio")
    if share is None or share < 0.3:
        return None
    return Advice(
        "Completions are cut off",
        f"{percent(share)} reach rollout.max_completion_length="
        f"{run.get('rollout.max_completion_length', 'the limit')}; their ends are never rewarded.",
        "Raise it, name stop strings (rollout.stop), or reward short answers.",
    )


def _failing(run: _Run) -> Advice | None:
    failed = sum(finite(row.get("rewards/failed")) or 0 for row in run.updates)
    if not failed:
        return None
    return Advice(
        "Reward functions fail",
        f"{failed:.0f} completions were left out because a function failed on them.",
        "Mend the function; rewards.on_error=raise tells where it fails.",
    )


def _scale(run: _Run) -> Advice | None:
    beta, spread = finite(run.get("loss.beta", 0.1)), run.first("reward_std")
    contrast = _contrast(run.first)
    if run.get("loss.name", "gvpo") != "gvpo" or not beta or not spread or not contrast:
        return None
    spread /= contrast  # groups of equal rewards say nothing of the scale
    nats = spread / beta
    if 0.2 <= nats <= 200:
        return None
    seen = (
        f"Rewards in groups with contrast differ by {compact(spread)} (standard deviation), and "
        f"loss.beta is {compact(beta)}: a typical difference is worth {compact(nats)} nats."
    )
    if nats > 200:
        return Advice(
            "Rewards are large against beta",
            seen,
            "The optimum is out of reach, and the reference hardly counts. Make rewards smaller "
            "(rewards.weights), or raise loss.beta by the same factor.",
        )
    return Advice(
        "Rewards are small against beta",
        seen,
        "The policy stays at the reference. Make rewards larger (rewards.weights), or lower "
        "loss.beta by the same factor.",
    )


def _support(run: _Run) -> Advice | None:
    cut = {"rollout.top_k": 0, "rollout.top_p": 1.0, "rollout.min_p": 0.0}
    given = [f"{name}={run.get(name)}" for name, off in cut.items() if run.get(name, off) != off]
    if run.get("loss.name", "gvpo") != "gvpo" or not given:
        return None
    return Advice(
        "Some tokens can never be sampled",
        f"{', '.join(given)} keeps part of what the reference may write out of the samples.",
        "The optimum is not reached so. Leave it out, and use rollout.temperature.",
    )


_Check = Callable[[_Run], Advice | None]
_OF_CURVES: Sequence[_Check] = (
    _hacked,
    _collapsed,
    _log_ratios_rule,
    _no_contrast,
    _cut,
    _failing,
    _scale,
)
_OF_SETTINGS: Sequence[_Check] = (_support,)
