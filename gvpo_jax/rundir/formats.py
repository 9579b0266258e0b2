"""Numbers and durations as people read them."""

import math
from collections.abc import Collection, Mapping, Sequence

_LEFT_OUT = {
    "training_rows": "prompts skipped: over data.max_prompt_length tokens",
    "held_out_rows": "held-out prompts skipped: over data.max_prompt_length tokens",
    "demonstrations": "demonstrations skipped: data.bad_samples=skip",
    "given_completions": "completions skipped: data.bad_samples=skip",
    "given_groups": "groups skipped: data.bad_samples=skip",
    "rewards_failed": "completions whose reward failed",
    "rewards_abstained": "completions that no function gave a reward",
    "groups": "groups with fewer than two rewards",
}


def compact(value: float) -> str:
    """Three significant digits: 0.0213, 41.8, 12.3k, 4.56M; "n/a" when not finite."""
    if not math.isfinite(value):
        return "n/a"
    size = abs(value)
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if size >= limit * 0.9995:
            return f"{value / (1e3 if suffix == 'k' else limit):.3g}{suffix}"
    if size >= 999.5:
        return f"{value:.0f}"
    if size and size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share as a percentage with one decimal: 0.418 -> 41.8%."""
    return f"{100 * value:.1f}%" if math.isfinite(value) else "n/a"


def percent_tick(value: float) -> str:
    """A share as an axis label: 0.4 -> 40%."""
    return f"{100 * value:.3g}%"


def points(value: float) -> str:
    """A difference of shares in percentage points with its sign: 0.184 -> +18.4."""
    return f"{100 * value:+.1f}".replace("-", "\u2212")


def duration(seconds: float) -> str:
    """Seconds as 0.84 s, 21.8 s, 12 min, 3 h 05 min or 2 d 4 h; "n/a" when not finite."""
    if not math.isfinite(seconds):
        return "n/a"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


def left_out_text(counts: Mapping[str, float]) -> str:
    """What a run left out, in words; empty where that is nothing."""
    parts = (f"{counts[name]:.0f} {what}" for name, what in _LEFT_OUT.items() if counts.get(name))
    return ", ".join(parts)


def score_names(
    evaluations: Collection[Mapping[str, float]], *, of_sets: bool = False
) -> list[str]:
    """By which metrics evaluations are compared; accuracy where all have it, or else reward first.

    of_sets: those of single evaluation sets instead, and their mean.
    """
    first = "accuracy" if all("eval/accuracy" in metrics for metrics in evaluations) else "reward"
    starts = ("eval/pass@", "eval/maj@")
    names = list(dict.fromkeys(name for metrics in evaluations for name in metrics))
    several = [x for x in names if x.startswith(starts) and not x.endswith(("_low", "_high"))]
    if not of_sets:
        return [f"eval/{first}", *(name for name in several if name.count("/") == 1)]
    if "eval/mean_of_sets" not in names:
        return []
    single = [name for name in names if name.startswith(f"eval/{first}/")]
    return ["eval/mean_of_sets", *single, *(name for name in several if name.count("/") > 1)]


def scores_text(evaluations: Sequence[Mapping[str, float]]) -> str:
    """One evaluation after the other: accuracy or reward, with intervals, pass@k and maj@k."""
    main, *more = score_names(evaluations)

    def one(metrics: Mapping[str, float], name: str) -> str:
        show = compact if name == "eval/reward" else percent
        ends = [metrics[end] for end in (f"{name}_low", f"{name}_high") if end in metrics]
        return show(metrics[name]) + (f" [{', '.join(map(show, ends))}]" if ends else "")

    def line(name: str) -> str:
        shown = " -> ".join(one(metrics, name) for metrics in evaluations if name in metrics)
        return f"{name.removeprefix('eval/')} {shown}"

    return "; ".join(map(line, [main, *more]))
