"""95% intervals for scores of several samples per question."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_Z = 1.959963984540054  # the 97.5% point of the normal distribution


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval; `low` and `high` are NaN where one question cannot give any."""

    mean: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)


def mean_interval(scores_by_question: Iterable[Sequence[float]]) -> Interval:
    """Mean score with a 95% interval over questions, of which the given ones are a sample.

    Every question weighs the same. Samples of one question are alike, so counting them as
    independent would make the interval too narrow. Scores in [0, 1] with mean m get Wilson's
    interval at the effective number of samples, m (1 - m) / Var(m), held between the numbers of
    questions and of samples; with one sample per question this is Wilson's interval itself. Other
    scores get Student's interval over the questions' means.

    Raises:
        ValueError: there is no score.
    """
    scores = [list(group) for group in scores_by_question if len(group)]
    means = [sum(group) / len(group) for group in scores]
    if not scores or any(not 0 <= score <= 1 for group in scores for score in group):
        return _student(means)
    mean = sum(means) / len(means)
    return _wilson(mean, _effective_samples(mean, means, sum(map(len, scores))))


def difference_interval(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Mean of `after - before`, paired by question, with Student's 95% interval.

    before, after: the questions' mean scores in the same order.

    Raises:
        ValueError: there are more of one than of the other.
    """
    return _student([b - a for a, b in zip(before, after, strict=True)])


def _effective_samples(mean: float, means: list[float], samples: int) -> float:
    questions = len(means)
    spread = sum((m - mean) ** 2 for m in means) / questions
    if questions == 1 or mean * (1 - mean) == 0:
        return questions
    if spread == 0:
        return samples
    return min(max(questions * mean * (1 - mean) / spread, questions), samples)


def _wilson(mean: float, samples: float) -> Interval:
    shrink = 1 + _Z**2 / samples
    middle = (mean + _Z**2 / (2 * samples)) / shrink
    half = _Z / shrink * math.sqrt(mean * (1 - mean) / samples + _Z**2 / (4 * samples**2))
    return Interval(mean, max(0.0, middle - half), min(1.0, middle + half))


def _student(values: list[float]) -> Interval:
    from scipy import stats  # here, since it takes a second to load

    if not values:
        raise ValueError("an interval needs at least one score")
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)
