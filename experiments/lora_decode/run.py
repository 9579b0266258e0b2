"""What merging an adapter costs and saves a rollout, with random weights in SmolLM2-135M's shape.

    python experiments/lora_decode/run.py              # batch 32 = 4 prompts x 8 completions
    python experiments/lora_decode/run.py --small      # a tiny model: what CI runs

"merged" samples as a run with `model.lora` does; "apart" computes `x W + (x A) B * scale` in every
layer and at every step. They are timed in turns, in milliseconds of processor time over all cores,
which other work on the machine disturbs least. A step is the difference between a long and a short
generation, divided by the difference in tokens. "merge" is what comes once per rollout.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from gvpo_jax.models.config import LoraConfig, ModelConfig
from gvpo_jax.models.decoder import DecoderConfig, init_params
from gvpo_jax.models.known import model_shape
from gvpo_jax.models.lora import adapter_shapes, init_adapter, join
from gvpo_jax.parallel.mesh import MeshConfig
from gvpo_jax.rollout import InProcessEngine, SamplingModel, SamplingParams
from gvpo_jax.rollout.engine import RolloutConfig
from gvpo_jax.rollout.make import sampling_model

SMOLLM2 = model_shape("HuggingFaceTB/SmolLM2-135M")
TINY = DecoderConfig("llama", 512, 48, 96, 2, 3, 1, 16, tie_embeddings=True)
SHORT, LONG = 8, 40
G, K, P = 4, 8, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to save the results as JSON")
    options = parser.parse_args()
    config, results = TINY if options.small else SMOLLM2, {}
    for rank in options.ranks:
        results[rank] = measured(config, rank, options.rounds)
        for name, row in results[rank].items():
            print(f"rank {rank}, {name}: {row['median']:.1f} ms (rounds: {row['rounds']})")
    if options.out:
        machine = platform.processor() or platform.machine()
        about = {"machine": machine, "jax": jax.__version__, "batch": G * K}
        options.out.write_text(json.dumps(about | {"ms": results}, indent=2) + "\n")


def measured(config: DecoderConfig, rank: int, rounds: int) -> dict:
    """Medians and rounds of a step in both ways, and of merging, in milliseconds."""
    engines, adapter = both_ways(config, rank)
    prompts = np.random.default_rng(0).integers(1, config.vocab_size, (G, P)).tolist()
    generate = {
        name: functools.partial(draw, engine, adapter, prompts) for name, engine in engines.items()
    }
    merging = functools.partial(merge_once, engines["merged"], adapter)
    merging()  # here and below: what is compiled is not timed
    for tokens in (SHORT, LONG):
        for way in generate.values():
            way(tokens)
    times = {"merged": [], "apart": [], "merge": []}
    for _ in range(rounds):
        for name, way in generate.items():
            longer, shorter = seconds(way, LONG), seconds(way, SHORT)
            times[name].append(1000 * (longer - shorter) / (LONG - SHORT))
        times["merge"].append(1000 * seconds(merging))
    return {
        name: {"median": statistics.median(x), "rounds": [round(ms, 1) for ms in x]}
        for name, x in times.items()
    }


def both_ways(config: DecoderConfig, rank: int):
    """Engines that sample with the same adapter, and the adapter."""
    mesh = MeshConfig(fsdp=1).mesh(jax.local_devices()[:1])
    model = ModelConfig(lora=LoraConfig(rank=rank))
    lora = model.lora.form()
    assert lora is not None
    functions = model.functions(config, mesh, "model")
    frozen = jax.jit(lambda: init_params(config, 0))()
    shapes = adapter_shapes(frozen, lora)
    adapter = jax.jit(functools.partial(init_adapter, shapes, 0))()
    adapter = jax.tree.map(lambda x: x + 0.01, adapter)
    merged = sampling_model(RolloutConfig(), model, config, mesh, functions, frozen)
    apart = SamplingModel(functions, mesh, lambda params, frozen: join(frozen, params), frozen)
    engines = {"merged": merged, "apart": apart}
    return {name: InProcessEngine(way, stop_ids=()) for name, way in engines.items()}, adapter


def draw(engine: InProcessEngine, adapter, prompts, tokens: int) -> None:
    engine.generate(
        adapter, prompts, range(G), num_generations=K, max_completion_length=tokens,
        sampling=SamplingParams(), seed=0,
    )  # fmt: skip


def merge_once(engine: InProcessEngine, adapter) -> None:
    jax.block_until_ready(engine.model.prepare(adapter, engine.model.frozen))


def seconds(work, *arguments) -> float:
    start = time.process_time()
    work(*arguments)
    return time.process_time() - start


if __name__ == "__main__":
    main()
