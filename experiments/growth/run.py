"""How the cost of an update grows with k, T, P, V and depth, and that of a prompt with k.

    python experiments/growth/run.py --out experiments/growth            # minutes on 2 cores
    python experiments/growth/run.py --small --out FOLDER                # seconds: what CI runs

One size grows at a time, the others stay. FLOPs and temporary memory are XLA's own count of the
compiled program, times the median of warm rounds. Writes results.json and growth.svg, and prints
tables.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax

from gvpo_jax.data.batch import Batch
from gvpo_jax.models.decoder import DecoderConfig, DecoderOptions, decoder_fns, init_params
from gvpo_jax.ops.chunks import chunks_on
from gvpo_jax.ops.cpu import product_on
from gvpo_jax.ops.kernels import attention_on
from gvpo_jax.parallel.mesh import MeshConfig
from gvpo_jax.training.objectives import gvpo
from gvpo_jax.training.step import init_state, train_step

sys.path.append(str(Path(__file__).parents[1]))
from pictures import panels, save

BASE = {"k": 8, "t": 64, "p": 64, "v": 8192, "layers": 4}
SIZES = {
    "k": [2, 4, 8, 16, 32],
    "t": [32, 64, 128, 256, 512],
    "p": [32, 64, 128, 256, 512, 1024],
    "v": [2048, 8192, 32_768, 131_072, 262_144],
    "layers": [2, 4, 8, 16],
}
SMALL = {"k": [2, 8]}, BASE | {"layers": 2}
GROUPS, WIDTH, LONG_PROMPT = 2, 256, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args()
    rounds = 1 if options.small else options.rounds
    sizes, base = SMALL if options.small else (SIZES, BASE)
    updates = {
        axis: [{"size": size} | update(rounds, **base | {axis: size}) for size in values]
        for axis, values in sizes.items()
    }
    # Completions of two tokens: what is left is the prompt's.
    prompts = [
        {"size": k} | update(rounds, **base | {"k": k, "p": LONG_PROMPT, "t": 2})
        for k in sizes["k"]
    ]
    report = {"machine": machine(), "jax": jax.__version__, "base": base, "groups": GROUPS}
    report |= {"rounds": rounds, "updates": updates, "prompts": prompts}
    print(as_text(report))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, options.out / "growth.svg")


def update(rounds: int, *, k: int, t: int, p: int, v: int, layers: int) -> dict:
    """What one update costs: float operations, seconds, MiB of temporaries."""
    config = DecoderConfig(
        "llama", v, WIDTH, 4 * WIDTH, layers, 8, 4, WIDTH // 8, tie_embeddings=True
    )
    optimizer, mesh = optax.adamw(1e-6), MeshConfig(fsdp=1).mesh()
    options = DecoderOptions(  # as a `Policy` computes it on this machine
        attention=attention_on(mesh, "auto", "float32", config.head_dim),
        product=product_on(mesh),
        **chunks_on(mesh),
    )
    step = functools.partial(
        train_step,
        model=decoder_fns(config, options),
        optimizer=optimizer,
        objective=gvpo(beta=0.1),
        beta=0.1,
    )
    state = init_state(init_params(config, 0), optimizer)
    batch = random_batch(v, k, p, t)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        seconds.append(time.perf_counter() - start)
    return {
        "gflops": compiled.cost_analysis()["flops"] / 1e9,
        "seconds": statistics.median(seconds[1:]),
        "fastest": min(seconds[1:]),
        "slowest": max(seconds[1:]),
        "temporaries_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "logits_mib": GROUPS * k * t * v * 4 / 2**20,
        "table_mib": v * WIDTH * 4 / 2**20,
    }


def random_batch(v: int, k: int, p: int, t: int) -> Batch:
    rng = np.random.default_rng(0)
    gk, gkt = (GROUPS, k), (GROUPS, k, t)
    return Batch(
        prompts=rng.integers(0, v, (GROUPS, p)).astype(np.int32),
        prompt_lengths=np.full(GROUPS, p, np.int32),
        completions=rng.integers(0, v, gkt).astype(np.int32),
        lengths=np.full(gk, t, np.int32),
        rewards=rng.normal(size=gk).astype(np.float32),
        valid=np.ones(gk, bool),
        ref_logps=np.full(gkt, -np.log(v), np.float32),
        old_logps=np.full(gkt, np.nan, np.float32),
        source=np.zeros(gk, np.int32),
        version=np.zeros(gk, np.int32),
    )


def machine() -> str:
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return models[0].split(":")[1].strip() if models else platform.machine()


def as_text(report: dict) -> str:
    lines = []
    tables = report["updates"] | {f"k, prompts of {LONG_PROMPT}, t = 2": report["prompts"]}
    for axis, rows in tables.items():
        more = [("logits_mib", "all logits, MiB"), ("table_mib", "the table, MiB")] * (axis == "v")
        titles = [axis, "GFLOP", "seconds", "temporaries, MiB", *(title for _, title in more)]
        lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for row in rows:
            seconds = "{seconds:.3f} ({fastest:.3f} to {slowest:.3f})".format(**row)
            mib = [f"{row[name]:.0f}" for name in ("temporaries_mib", *(name for name, _ in more))]
            cells = [str(row["size"]), f"{row['gflops']:.1f}", seconds, *mib]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


TITLES = {"k": "completions of a prompt", "t": "tokens of a completion", "p": "tokens of a prompt"}
TITLES |= {"v": "vocabulary", "layers": "layers"}


def draw(report: dict, path: Path) -> None:
    """Seconds of an update over each size, and over k for the prompts alone, in six panels."""
    tables = {TITLES[axis]: rows for axis, rows in report["updates"].items()}
    tables[f"completions of 2 tokens, prompt of {LONG_PROMPT}"] = report["prompts"]
    figure, places = panels(-(-len(tables) // 3), 3, width=3, height=2)
    for panel in places[len(tables) :]:
        panel.set_visible(False)
    for panel, (title, rows) in zip(places, tables.items(), strict=False):
        sizes, seconds = [row["size"] for row in rows], [row["seconds"] for row in rows]
        below = [row["seconds"] - row["fastest"] for row in rows]
        above = [row["slowest"] - row["seconds"] for row in rows]
        panel.errorbar(sizes, seconds, yerr=[below, above], marker="o", markersize=4)
        panel.set(xlabel=title, ylabel="seconds", ylim=(0, None))
        panel.locator_params(axis="x", nbins=4)
    save(figure, path, "Seconds of an update over each size")


if __name__ == "__main__":
    main()
