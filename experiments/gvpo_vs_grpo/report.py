"""Tables and figures of the runs in raw/: writes results.json, sweep.svg and README.md's tables.

    python experiments/gvpo_vs_grpo/report.py

Accuracies are on 256 held-out questions, 4 samples each. Intervals are 95%: over seeds where there
are several (Student's), else over questions (Wilson's, by the effective number of samples).
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

import run as sweep

from gvpo_jax.report.intervals import Interval, difference_interval, mean_interval

sys.path.append(str(Path(__file__).parents[1]))
import pictures

HERE = Path(__file__).parent
TITLES = {"gvpo": "GVPO", "grpo": "GRPO", "dr_grpo": "Dr. GRPO", "rloo": "RLOO"}
SAMPLES_PER_QUESTION = 4
LAST = 5  # updates over which the end of a run is averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raw", type=Path, default=HERE / "raw")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    runs = {path.stem: summary(sweep.read(path)) for path in sorted(options.raw.glob("*.jsonl"))}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(runs, indent=1) + "\n")
    text = "\n\n".join(part for table in TABLES if (part := table(runs)))
    readme = options.out / "README.md"
    if readme.exists():
        readme.write_text(between_marks(readme.read_text(), text))
    draw(runs, options.raw, options.out / "sweep.svg")
    print(text)


def summary(lines: list[dict]) -> dict:
    """What the tables need of a run."""
    head, *steps, end = lines
    held = mean_interval([correct(int(digit)) for digit in end["right"]])
    last = steps[-LAST:]
    return {
        "settings": head["settings"],
        "accuracy": end["accuracy"],
        "low": held.low,
        "high": held.high,
        "reward": fmean(step["reward"] for step in last) if last else None,
        "log_ratio": fmean(step["log_ratio"] for step in last) if last else None,
        "seconds": end["seconds"],
        "device": f"{head['device']}, {head['host']}",
    }


def correct(count: int) -> list[float]:
    return [1.0] * count + [0.0] * (SAMPLES_PER_QUESTION - count)


def grid_table(runs: dict) -> str:
    rows = []
    for method in sweep.METHODS:
        cells = [runs.get(f"grid_{method}_{rate:g}") for rate in sweep.RATES]
        if any(cells):
            rows.append([TITLES[method], *(share(cell) for cell in cells)])
    titles = [f"{rate:g}" for rate in sweep.RATES]
    return table("Learning rates", ["held-out accuracy at learning rate", *titles], rows)


def final_table(runs: dict) -> str:
    by_method = finals(runs)
    rows = []
    for method, found in by_method.items():
        scores = {seed: run["accuracy"] for seed, run in found.items()}
        paired = [seed for seed in scores if seed in by_method.get("gvpo", {})]
        difference = (
            difference_interval(
                [scores[seed] for seed in paired],
                [by_method["gvpo"][seed]["accuracy"] for seed in paired],
            )
            if method != "gvpo" and len(paired) > 1
            else None
        )
        rows.append(
            [
                TITLES[method],
                rate_of(next(iter(found.values()))),
                points(over_seeds(list(scores.values()))),
                ", ".join(f"{scores[seed]:.1%}" for seed in sorted(scores)),
                f"{fmean(run['log_ratio'] for run in found.values()):.2f}",
                points(difference, sign=True) if difference else "",
            ]
        )
    titles = [
        "method", "learning rate", "accuracy, mean of seeds", "each seed",
        "log-ratio, nats", "GVPO minus it, paired",
    ]  # fmt: skip
    return table("The methods, each at its own best learning rate", titles, rows)


def beta_table(runs: dict) -> str:
    rows = []
    for beta in (0.01, 0.03, 0.1, 0.2, 0.5):
        name = "final_gvpo_seed{}" if beta == 0.1 else f"beta_{beta:g}_seed{{}}"
        found = [runs[name.format(seed)] for seed in (0, 1) if name.format(seed) in runs]
        if found:
            accuracies = ", ".join(share(run) for run in found)
            ratios = ", ".join(f"{run['log_ratio']:.2f}" for run in found)
            rows.append([f"{beta:g}", accuracies, ratios])
    return table("GVPO over beta", ["beta", "accuracy, seeds 0 and 1", "log-ratio, nats"], rows)


def penalty_table(runs: dict) -> str:
    names = {"0": "final_grpo_seed0", "0.04": "penalty_0.04", "0.3": "penalty_0.3"}
    rows = [
        [coef, spread(runs[name]), f"{runs[name]['log_ratio']:.2f}"]
        for coef, name in names.items()
        if name in runs
    ]
    return table("GRPO with a KL penalty", ["kl_coef", "accuracy", "log-ratio, nats"], rows)


def size_table(runs: dict) -> str:
    rows = []
    for k in (2, 4, 8, 16, 32):
        names = [f"final_{m}_seed0" if k == 8 else f"k_{k}_{m}" for m in ("gvpo", "grpo")]
        if any(name in runs for name in names):
            rows.append([f"{k}", *(spread(runs.get(name)) for name in names)])
    return table("Over k, 64 completions an update", ["k", "GVPO", "GRPO"], rows)


def mix_table(runs: dict) -> str:
    rows = [
        [f"{8 - n}:{n}", spread(runs[name]), f"{runs[name]['log_ratio']:.2f}"]
        for n in range(5)
        if (name := f"mix_{8 - n}_{n}") in runs
    ]
    titles = ["fresh : replayed", "accuracy", "log-ratio, nats"]
    return table("GVPO with replayed completions, 48 training questions", titles, rows)


TABLES = (grid_table, final_table, beta_table, penalty_table, size_table, mix_table)


def finals(runs: dict) -> dict[str, dict[int, dict]]:
    """Method -> seed -> run."""
    found = {
        method: {
            seed: runs[name]
            for seed in sweep.SEEDS
            if (name := f"final_{method}_seed{seed}") in runs
        }
        for method in sweep.METHODS
    }
    return {method: by_seed for method, by_seed in found.items() if by_seed}


def over_seeds(values: list[float]) -> Interval:
    """Mean with Student's interval over the seeds."""
    return difference_interval([0.0] * len(values), values)


def rate_of(run: dict) -> str:
    return next(s.partition("=")[2] for s in run["settings"] if s.startswith("optimizer.learning"))


def share(run: dict | None) -> str:
    return f"{run['accuracy']:.1%}" if run else ""


def spread(run: dict | None) -> str:
    return f"{run['accuracy']:.1%} ({run['low']:.1%} to {run['high']:.1%})" if run else ""


def points(interval: Interval, sign: bool = False) -> str:
    form = "{:+.1%}" if sign else "{:.1%}"
    low, high = form.format(interval.low), form.format(interval.high)
    return f"{form.format(interval.mean)} ({low} to {high})"


def table(title: str, titles: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [titles, ["---"] * len(titles), *rows]
    return f"### {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def between_marks(readme: str, text: str) -> str:
    start, end = "<!-- tables -->", "<!-- end of tables -->"
    before, _, rest = readme.partition(start)
    return f"{before}{start}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def draw(runs: dict, raw: Path, path: Path) -> None:
    """Five panels: reward over updates, frontier, beta, k, fresh : replayed."""
    figure, panels = pictures.panels(1, 5, width=3.4, height=3.3)
    draw_rewards(panels[0], raw)
    draw_frontier(panels[1], runs)
    one = {f"{b:g}": [f"beta_{b:g}_seed{s}" for s in (0, 1)] for b in (0.01, 0.03, 0.2, 0.5)}
    one["0.1"] = ["final_gvpo_seed0", "final_gvpo_seed1"]
    draw_line(panels[2], runs, dict(sorted(one.items(), key=lambda item: float(item[0]))), "GVPO")
    panels[2].set(title="beta, fixed reference", xlabel="beta")
    for method in ("gvpo", "grpo"):
        names = {
            f"{k}": [f"final_{method}_seed0" if k == 8 else f"k_{k}_{method}"]
            for k in (2, 4, 8, 16, 32)
        }
        draw_line(panels[3], runs, names, TITLES[method])
    panels[3].set(title="k, 64 completions an update", xlabel="k")
    panels[3].legend()
    draw_line(panels[4], runs, {f"{8 - n}:{n}": [f"mix_{8 - n}_{n}"] for n in range(5)}, "GVPO")
    panels[4].set(title="fresh : replayed", xlabel="of 8 completions")
    pictures.save(figure, path, "Rewards, distance, beta, k, replay")


def draw_rewards(panel, raw: Path) -> None:
    for method in sweep.METHODS:
        files = sorted(raw.glob(f"final_{method}_seed*.jsonl"))
        curves = [[line["reward"] for line in sweep.read(f)[1:-1]] for f in files]
        if curves:
            mean = [fmean(values) for values in zip(*curves, strict=True)]
            panel.plot(range(1, len(mean) + 1), mean, label=TITLES[method])
    panel.set(title="reward in training, mean of seeds", xlabel="update")
    panel.legend()


def draw_frontier(panel, runs: dict) -> None:
    kinds = {
        "GVPO": ("final_gvpo", "beta_"),
        "GRPO": ("final_grpo", "penalty_"),
        "Dr. GRPO": ("final_dr_grpo",),
        "RLOO": ("final_rloo",),
    }
    for label, starts in kinds.items():
        found = [run for name, run in runs.items() if name.startswith(starts)]
        if found:
            panel.plot(
                [run["log_ratio"] for run in found],
                [run["accuracy"] for run in found],
                "o",
                markersize=4,
                label=label,
            )
    panel.set(title="accuracy and distance", xlabel="log-ratio to the start, nats")


def draw_line(panel, runs: dict, names: dict[str, list[str]], label: str) -> None:
    """Mean accuracy per place; whiskers over the held-out questions of a place's first run."""
    found = {x: [runs[n] for n in ns if n in runs] for x, ns in names.items()}
    found = {x: group for x, group in found.items() if group}
    means = [fmean(run["accuracy"] for run in group) for group in found.values()]
    first = [group[0] for group in found.values()]
    errors = [
        [run["accuracy"] - run["low"] for run in first],
        [run["high"] - run["accuracy"] for run in first],
    ]
    panel.errorbar(list(found), means, yerr=errors if first else None, marker="o", label=label)


if __name__ == "__main__":
    main()
