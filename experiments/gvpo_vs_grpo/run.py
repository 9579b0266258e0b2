"""GVPO against GRPO, Dr. GRPO and RLOO on a real model; over beta, over k, over fresh : replayed.

    python experiments/gvpo_vs_grpo/run.py                     # about four hours on two cores
    python experiments/gvpo_vs_grpo/run.py --only k_           # the runs whose names contain this
    python experiments/gvpo_vs_grpo/run.py --small --raw /tmp/raw --runs /tmp/runs       # CI

Each run is a process of its own and leaves raw/NAME.jsonl: its settings, a line per update, and
the held-out answers. A run whose file is there is skipped, one that was cut off goes on from its
last checkpoint. `report.py` makes tables and figures of the files.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
BASE = "base"
METHODS = ("gvpo", "grpo", "dr_grpo", "rloo")
RATES = (3e-6, 1e-5, 3e-5, 1e-4)
SEEDS = (0, 1, 2, 3, 4)
GRID_SEED = 100  # the grid has its own seed and its own held-out questions
SAMPLES = 64  # completions an update, whatever k is
METRICS = (
    "reward", "reward_std", "frac_reward_zero_std", "kl", "log_ratio", "gvpo_mse",
    "entropy_sampled", "grad_norm", "completions/mean_length", "source/replay/share",
    "source/replay/staleness", "step_time",
)  # fmt: skip


Runs = Iterator[tuple[str, list[str]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="runs whose names contain this")
    parser.add_argument("--raw", type=Path, default=HERE / "raw")
    parser.add_argument("--runs", type=Path, default=Path("runs/gvpo_vs_grpo"))
    parser.add_argument("--small", action="store_true", help="two updates of the debug model")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, *settings = options.one
        return run_one(name, settings, options)
    stages = [base, grid, finals, betas, penalties, sizes, mixes]
    for stage in stages if options.small else [*stages, betas_again]:
        for name, changes in first(stage(options.raw)) if options.small else stage(options.raw):
            if options.only in name and not (options.raw / f"{name}.jsonl").exists():
                print(f"{time.strftime('%H:%M:%S')} {name}: {' '.join(changes)}", flush=True)
                if options.small:
                    run_one(name, changes, options)
                    continue
                command = [sys.executable, __file__, "--one", name, *changes]
                command += ["--raw", str(options.raw), "--runs", str(options.runs)]
                subprocess.run(command, check=True)


def first(runs: Runs) -> Runs:
    """What a small sweep does: a run of each kind, and of the grid one for each method in them."""
    for name, changes in runs:
        if name.startswith("grid"):
            if name.endswith("_3e-05") and ("_gvpo_" in name or "_grpo_" in name):
                yield name, changes
        else:
            yield name, changes
            return


def base(raw: Path) -> Runs:
    """The model as it comes."""
    yield BASE, []


def grid(raw: Path) -> Runs:
    """Every method at every learning rate, on a seed that the finals don't use."""
    held_out = ["data.eval_seed=1"]
    for method in METHODS:
        for rate in RATES:
            yield f"grid_{method}_{rate:g}", settings(method, rate, GRID_SEED) + held_out


def finals(raw: Path) -> Runs:
    """Every method at its own best learning rate."""
    for seed in SEEDS:
        for method in METHODS:
            yield f"final_{method}_seed{seed}", settings(method, best_rate(raw, method), seed)


def betas(raw: Path, seed: int = SEEDS[0]) -> Runs:
    """GVPO over beta, with the fixed reference; 0.1 is among the finals."""
    for beta in (0.01, 0.03, 0.2, 0.5):
        changes = [*settings("gvpo", best_rate(raw, "gvpo"), seed), f"loss.beta={beta}"]
        yield f"beta_{beta:g}_seed{seed}", changes


def betas_again(raw: Path) -> Runs:
    """A second seed of them, last of all."""
    yield from betas(raw, SEEDS[1])


def penalties(raw: Path) -> Runs:
    """GRPO with a KL penalty, for the frontier; 0 is among the finals."""
    for kl_coef in (0.04, 0.3):
        rate = best_rate(raw, "grpo")
        yield f"penalty_{kl_coef:g}", [*settings("grpo", rate, 0), f"loss.kl_coef={kl_coef}"]


def sizes(raw: Path) -> Runs:
    """GVPO and GRPO over k at the same number of samples; 8 is among the finals."""
    for k in (2, 4, 16, 32):
        for method in ("gvpo", "grpo"):
            rate = best_rate(raw, method)
            changes = [f"rollout.num_generations={k}", f"train.batch_size={SAMPLES // k}"]
            yield f"k_{k}_{method}", settings(method, rate, 0) + changes


def mixes(raw: Path) -> Runs:
    """GVPO with some of the 8 from earlier visits; few prompts, so that they come again."""
    for replayed in (0, 1, 2, 3, 4):
        changes = [f"replay.completions={replayed}", "data.train_size=48"]
        rate = best_rate(raw, "gvpo")
        yield f"mix_{8 - replayed}_{replayed}", settings("gvpo", rate, 0) + changes


def settings(method: str, rate: float, seed: int) -> list[str]:
    return [f"loss.name={method}", f"optimizer.learning_rate={rate:g}", f"run.seed={seed}"]


def best_rate(raw: Path, method: str) -> float:
    """The learning rate with the best held-out accuracy in the grid."""
    files = {rate: raw / f"grid_{method}_{rate:g}.jsonl" for rate in RATES}
    scores = {rate: read(file)[-1]["accuracy"] for rate, file in files.items() if file.exists()}
    return max(scores, key=lambda rate: scores[rate])


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_one(name: str, changes: list[str], options: argparse.Namespace) -> None:
    """Train, evaluate, leave the raw file, and remove the run's folder."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(options.runs.absolute() / "compiled"))
    import jax

    from gvpo_jax.config_file import load_config
    from gvpo_jax.rundir.files import read_metrics
    from gvpo_jax.trainer import Trainer

    folder = options.runs / name
    size = ["train.steps=25", "data.eval_size=256", "eval.batch_size=32", "checkpoint.every=10"]
    if options.small:
        size = ["train.steps=2", "data.eval_size=4", "data.train_size=8", "train.packing=false"]
    config = load_config(
        "debug" if options.small else "configs/quickstart.yaml",
        ["rollout.num_generations=8", *size, *changes, f"run.dir={folder}"],
    )
    start = time.perf_counter()
    rows, held_out = config.data.load(config.run.seed)
    reward_funcs = config.rewards.functions()
    trainer = Trainer(config)
    if name != BASE:
        trainer.train(rows, reward_funcs)
    metrics, records = trainer.evaluate(held_out, reward_funcs)
    lines = [
        {
            "name": name,
            "settings": changes,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "host": f"{os.cpu_count()} cores, {platform.machine()}",
        },
        *({"step": row["step"]} | shown(row) for row in read_metrics(folder) if name != BASE),
        {
            "accuracy": metrics["eval/accuracy"],
            "right": right_answers(records),
            "seconds": round(time.perf_counter() - start),
        },
    ]
    for place in (options.raw, options.runs):
        place.mkdir(parents=True, exist_ok=True)
    whole = options.runs / f"{name}.jsonl"
    whole.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.move(whole, options.raw / f"{name}.jsonl")
    shutil.rmtree(folder, ignore_errors=True)


def shown(row: dict) -> dict:
    """The metrics that are kept, to five digits."""
    return {name: float(f"{row[name]:.5g}") for name in METRICS if name in row}


def right_answers(records: list[dict]) -> str:
    """One digit per held-out question: how many of its samples were right."""
    counts: dict[int, int] = {}
    for record in records:
        counts[record["group"]] = counts.get(record["group"], 0) + bool(record["correct"])
    return "".join(str(counts[group]) for group in sorted(counts))


if __name__ == "__main__":
    main()
