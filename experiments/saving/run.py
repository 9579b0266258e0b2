"""What a checkpoint costs: how long training waits for it, and what is slower while it is written.

    python experiments/saving/run.py                     # results and README; 10 minutes, 14 GB
    python experiments/saving/run.py --small --out FILE  # as in CI

A state of random arrays, in the shapes of a model and its optimizer, is saved as a run saves its
own: with checksums, by Orbax, in the background. Meanwhile the devices compute on. Each number is
the median of several saves, with the least and the greatest.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gvpo_jax.models.decoder import param_shapes
from gvpo_jax.models.hf_config import decoder_config
from gvpo_jax.models.known import KNOWN
from gvpo_jax.training.checkpoint import Checkpoints

HERE = Path(__file__).resolve().parent
# name -> model, its layers or None for all, copies of the weights that the optimizer holds, saves
STATES: dict[str, tuple[str, int | None, int, int]] = {
    "SmolLM2-135M, AdamW": ("HuggingFaceTB/SmolLM2-135M", None, 2, 5),
    "Qwen2.5-1.5B, SGD without momentum": ("Qwen/Qwen2.5-Math-1.5B", None, 0, 3),
}
SMALL = {"one layer of SmolLM2-135M, AdamW": ("HuggingFaceTB/SmolLM2-135M", 1, 2, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one layer")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    options = parser.parse_args()
    results = {}
    for name, (model, layers, copies, saves) in (SMALL if options.small else STATES).items():
        trees = state(model, layers, copies)
        with tempfile.TemporaryDirectory(prefix="gvpo-jax-saving-") as folder:
            results[name] = measure(trees, Path(folder), saves)
        del trees
        print(name, json.dumps(results[name]), flush=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    if options.out.parent == HERE:
        page = HERE / "README.md"
        marks = r"(<!-- table -->\n).*?(<!-- /table -->)"
        drawn = table(results)
        page.write_text(
            re.sub(marks, lambda m: m[1] + drawn + m[2], page.read_text(), flags=re.DOTALL)
        )


def state(model: str, layers: int | None, copies: int) -> dict[str, Any]:
    """Parameters, and as many trees of their shapes as the optimizer has."""
    config = KNOWN[model] | ({"num_hidden_layers": layers} if layers else {})
    shapes = param_shapes(decoder_config(config))
    numbers = np.random.default_rng(0)

    def tree() -> Any:
        return jax.tree.map(
            lambda x: jnp.asarray(numbers.standard_normal(x.shape, np.float32)), shapes
        )

    moments = {f"moment {i}": tree() for i in range(copies)}
    return {"params": tree(), "state": {"step": jnp.int32(0), **moments}}


def measure(trees: dict[str, Any], folder: Path, saves: int) -> dict[str, Any]:
    """Seconds of each save, and of computing beside it, as multiples of computing alone."""
    jax.block_until_ready(trees)
    work, size = computing(), sum(x.nbytes for x in jax.tree.leaves(trees))
    alone = statistics.median(work() for _ in range(5))
    found: dict[str, list[float]] = {"waits": [], "whole after": [], "beside it": []}
    with Checkpoints(folder, keep=1) as checkpoints:
        for step in range(saves + 1):  # the first compiles the checksums
            start = time.perf_counter()
            checkpoints.save(step, trees, {})
            waited = time.perf_counter() - start
            first = work()  # Orbax writes meanwhile
            checkpoints.wait()
            whole = time.perf_counter() - start
            if step:
                for name, value in zip(found, (waited, whole, first / alone), strict=True):
                    found[name].append(value)
    return {"GiB": size / 2**30, "saves": saves} | {
        name: [statistics.median(values), min(values), max(values)]
        for name, values in found.items()
    }


def computing() -> Callable[[], float]:
    """A function that keeps all cores busy for about a second, and gives the seconds it took."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1024, 1024), np.float32))
    product = jax.jit(lambda x: x @ x / 32)

    def chain(times: int) -> float:
        start, y = time.perf_counter(), x
        for _ in range(times):
            y = product(y)
        y.block_until_ready()
        return time.perf_counter() - start

    chain(1)
    times = max(int(1 / (chain(10) / 10)), 1)
    return lambda: chain(times)


def table(results: dict[str, Any]) -> str:
    lines = [
        "| state | GiB | training waits, s | whole after, s | MiB a second | computing beside it |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in results.items():

        def cell(key: str, row: dict = row) -> str:
            middle, least, most = row[key]
            return f"{middle:.2f} ({least:.2f} to {most:.2f})"

        speed = 1024 * row["GiB"] / row["whole after"][0]
        cells = [name, f"{row['GiB']:.2f}", cell("waits"), cell("whole after"), f"{speed:.0f}"]
        lines.append(f"| {' | '.join([*cells, cell('beside it')])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
