"""The quickstart on several seeds: what it gains, what it takes, and the picture in the README.

    python experiments/quickstart/run.py --out experiments/quickstart
    python experiments/quickstart/run.py --runs runs/quickstart_lora \
        --out experiments/quickstart/lora model.lora.rank=16 optimizer.learning_rate=3e-4
    python experiments/quickstart/run.py --config debug --seeds 0 --out /tmp/q --small    # CI

Each seed is one `gvpo-jax train`, which resumes where it stopped; a finished run is not run again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from pictures import curves, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart_seeds"))
    parser.add_argument("--out", type=Path, required=True, help="folder for results and figure")
    parser.add_argument("settings", nargs="*", help="of the run, as `gvpo-jax train` takes them")
    parser.add_argument("--small", action="store_true", help="two updates")
    options = parser.parse_args()
    runs = [options.runs / f"seed{seed}" for seed in options.seeds]
    for seed, run in zip(options.seeds, runs, strict=True):
        if not (run / "summary.json").exists():
            settings = [f"run.seed={seed}", f"run.dir={run}", *options.settings]
            settings += ["train.steps=2"] if options.small else []
            command = [sys.executable, "-m", "gvpo_jax", "train", options.config, *settings]
            subprocess.run(command, check=True)
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    report = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "settings": options.settings,
        "seeds": dict(zip(map(str, options.seeds), summaries, strict=True)),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    save(curves(runs), options.out / "curves.svg", "Reward in training and held-out accuracy")
    for seed, s in report["seeds"].items():
        print(
            f"seed {seed}: {s['eval/accuracy_before']:.1%} -> {s['eval/accuracy_after']:.1%}, "
            f"{s['train_seconds']:.0f} s of training, {s['peak_memory_gib']:.1f} GiB"
        )


if __name__ == "__main__":
    main()
