"""Ways to compute the same update on a GPU: measured, and beside what XLA counts of each.

    python experiments/bench/variants.py                                   # on a GPU
    python experiments/bench/variants.py --workload small --rounds 1 --out FILE    # on any device

The time is of the update alone, from the call to its loss on the host: the median of the rounds,
after two that are not counted. Beside it stand the FLOP and bytes that XLA counts of the compiled
program (`cost_analysis`), which includes `optimal_seconds`, its own estimate. The first row of all
is a rollout by the engine. The file is written after each row.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import ours
from workloads import WORKLOADS, Workload, workload, write_model

from gvpo_jax.data.batch import Batch
from gvpo_jax.models.config import ModelConfig
from gvpo_jax.parallel.layout import place_batch

HERE = Path(__file__).resolve().parent
COUNTED = ("flops", "bytes accessed", "optimal_seconds")
# What `DecoderFns` says of logits, which is no setting of a run.
LIMITS = ("chunk_bytes", "vocabulary_blocks")
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "attention by XLA": {"model__attention": "xla"},
    "no packing": {"train__packing": False},
    "logits all kept": {"chunk_bytes": 2**40},
    "logits in chunks of 2 GiB": {"chunk_bytes": 2**31},
    "logits in blocks of the vocabulary": {"vocabulary_blocks": True},
    "remat=dots": {"model__remat": "dots"},
    "remat=layer": {"model__remat": "layer"},
    "layers scanned": {"model__scan_layers": True},
    "layers scanned, remat=layer": {"model__scan_layers": True, "model__remat": "layer"},
    "two micro-batches": {"train__micro_batches": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", default="qwen2.5-0.5b", choices=list(WORKLOADS))
    parser.add_argument("--only", action="append", choices=["rollout", *VARIANTS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "variants.json")
    options = parser.parse_args()
    said = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "workload": options.workload,
        "rounds": options.rounds,
    }
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gvpo-jax-bench-") as folder:
        write_model(WORKLOADS[options.workload], Path(folder))
        for name in options.only or ["rollout", *VARIANTS]:
            rows[name] = row(name, options, Path(folder))
            print(f"{name}: {json.dumps(rows[name])}", flush=True)
            options.out.write_text(json.dumps(said | {"rows": rows}, indent=2) + "\n")


def row(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What was measured of one way; where it does not fit the device, what was said."""
    try:
        if name == "rollout":
            generate, _ = ours.rollout(workload(options.workload, "rollout"), folder, "gpu")
            return times(generate, options.rounds)
        return update(workload(options.workload, "train"), folder, VARIANTS[name], options.rounds)
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[0][:200]}


def update(w: Workload, folder: Path, settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """One way's times, its temporaries, and what XLA counts of it."""
    limits = {name: settings[name] for name in LIMITS if name in settings}
    settings = {name: value for name, value in settings.items() if name not in LIMITS}
    functions = ModelConfig.functions

    def limited(self, *arguments):
        return dataclasses.replace(functions(self, *arguments), **limits)

    with mock.patch.object(ModelConfig, "functions", limited):
        policy = ours.trainer(w, folder, **settings).policy
    given = ours.trained_on(w)
    compiled = program(policy, given)
    counted = compiled.cost_analysis()
    return times(lambda: float(policy.update(given)["loss"]), rounds) | {
        "temporaries_gib": compiled.memory_analysis().temp_size_in_bytes / 2**30,
        "counted": {name: counted[name] for name in COUNTED if name in counted},
    }


def program(policy, given: Batch):
    """The compiled update of this batch, to ask it what it does."""
    programs = policy._programs
    placed = Batch(**place_batch(programs.mesh, given._asdict(), given.rewards.shape[1]))
    packed_size = policy.plan(given).packed_size
    lowered = programs.step.lower(
        policy.state, placed, frozen=policy.frozen, packed_size=packed_size
    )
    return lowered.compile()


def times(once: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Milliseconds: the median, the fastest and the slowest of the rounds."""
    ms = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        once()
        ms.append((time.perf_counter() - start) * 1e3)
    counted = ms[2:]
    return {"ms": statistics.median(counted), "fastest": min(counted), "slowest": max(counted)}


if __name__ == "__main__":
    main()
