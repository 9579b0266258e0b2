"""Two thousand updates in one process: does anything grow?

    python experiments/soak/run.py                            # results, picture and README
    python experiments/soak/run.py --small --out FILE         # as in CI

The debug model trains with everything on that could pile up: rollouts drawn ahead, replay,
evaluations, checkpoints, completions on disk, a reward with a deadline in a thread. After each
evaluation the process is looked at. A line is fitted to the second half of what was seen; its slope
stands with its 95% interval, per 1,000 updates.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import jax
from scipy import stats

from gvpo_jax import loop
from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.rewards.debug import letter_share
from gvpo_jax.rundir.files import read_metrics
from gvpo_jax.trainer import Trainer

HERE = Path(__file__).resolve().parent
sys.path.append(str(Path(__file__).parents[1]))
from pictures import GREEN, panels, save  # noqa: E402

SEEN = {
    "memory": ("MiB", "memory of the process"),
    "live": ("MiB", "arrays that JAX holds"),
    "files": ("", "open files"),
    "threads": ("", "threads"),
    "programs": ("", "programs compiled so far"),
    "ms": ("ms", "time of an update (median)"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--small", action="store_true", help="40 updates")
    options = parser.parse_args()
    if options.small:
        options.updates = 40
    with tempfile.TemporaryDirectory(prefix="gvpo-jax-soak-") as folder:
        rows = soak(options.updates, Path(folder))
    results = {"updates": options.updates, "rows": rows, "slopes": slopes(rows)}
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    draw(rows, options.out.with_suffix(".svg"))
    table = as_table(results)
    print(table)
    if options.out.resolve().parent == HERE:
        page = HERE / "README.md"
        head, _, rest = page.read_text().partition("<!-- table -->")
        rest = rest[rest.index("<!-- /table -->") :]
        page.write_text(f"{head}<!-- table -->\n{table}\n{rest}")


def soak(updates: int, folder: Path) -> list[dict[str, float]]:
    """What the process was like after each evaluation."""
    every = max(updates // 40, 2) // 2 * 2
    config = override(
        Config(),
        run__dir=str(folder),
        rollout__num_generations=4,
        rollout__max_completion_length=8,
        rollout__lookahead=1,
        replay__completions=1,
        replay__groups=1,
        data__max_prompt_length=32,
        rewards__deadline=30.0,
        train__steps=updates,
        train__batch_size=4,
        train__steps_per_generation=2,
        train__packing=False,
        eval__every=every,
        eval__success_reward=0.5,
        checkpoint__every=every,
        checkpoint__keep_best=1,
        optimizer__learning_rate=1e-4,
        log__samples=0,
        mesh__fsdp=1,
    )
    seen: list[dict[str, float]] = []
    compiled = [0]

    def count(event: str, duration_secs: float, **_: Any) -> None:
        compiled[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    evaluate = loop.evaluate

    def look(*arguments: Any, **more: Any) -> Any:
        result = evaluate(*arguments, **more)
        gc.collect()
        times = [row["step_time"] for row in read_metrics(folder) if "step_time" in row]
        seen.append(
            {
                "update": len(times),
                "memory": resident(),
                "live": sum(x.nbytes for x in jax.live_arrays()) / 2**20,
                "files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
                "programs": compiled[0],
                "ms": 1e3 * statistics.median(times[-every:] or [0]),
            }
        )
        return result

    loop.evaluate = look
    words = ["ash", "birch", "cedar", "elm", "fir", "oak", "pine", "yew"]
    rows = [{"prompt": f"Spell {word}: "} for word in words]
    try:
        Trainer(config).train(rows, letter_share, eval_dataset=rows[:4])
    finally:
        loop.evaluate = evaluate
        jax.monitoring.unregister_event_duration_listener(count)
    return seen


def resident() -> float:
    """MiB of memory that the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def slopes(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Of each thing in the second half: per 1,000 updates, and the ends of its 95% interval."""
    half = [row for row in rows if row["update"] >= rows[-1]["update"] / 2]
    found = {}
    for name in SEEN:
        values = [row[name] for row in half]
        if len(set(values)) == 1:
            found[name] = [0.0, 0.0, 0.0]
            continue
        fit = stats.linregress([row["update"] for row in half], values)
        off = fit.stderr * stats.t.ppf(0.975, max(len(half) - 2, 1))
        found[name] = [1e3 * x for x in (fit.slope, fit.slope - off, fit.slope + off)]
    return found


def as_table(results: dict[str, Any]) -> str:
    lines = [
        "| what | half-way | at the end | slope per 1,000 updates, 95% interval |",
        "|---|---|---|---|",
    ]
    rows = results["rows"]
    middle = next(row for row in rows if row["update"] >= rows[-1]["update"] / 2)
    for name, (unit, what) in SEEN.items():
        slope, low, high = results["slopes"][name]
        value = f"{slope:+.2f} ({low:+.2f} to {high:+.2f}) {unit}".strip()
        lines.append(
            f"| {what} | {middle[name]:.4g} {unit} | {rows[-1][name]:.4g} {unit} | {value} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, float]], file: Path) -> None:
    figure, axes = panels(2, 3)
    for axis, (name, (unit, what)) in zip(axes, SEEN.items(), strict=True):
        axis.plot([row["update"] for row in rows], [row[name] for row in rows], color=GREEN)
        axis.set_title(f"{what}{f', {unit}' if unit else ''}")
        axis.set_xlabel("updates")
        axis.set_ylim(bottom=0)
    save(figure, file, "What a long run holds, and how long an update takes")


if __name__ == "__main__":
    main()
