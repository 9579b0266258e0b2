"""Training step with the prompt computed once per group, beside the step that repeats it k times.

    python experiments/shared_prefix/run.py            # the full size, some minutes on 2 cores
    python experiments/shared_prefix/run.py --small    # seconds: what CI runs

Both compute value and gradient of the GVPO loss of the same random model on the same batch, in one
process, warm, in turns. The gradients are compared; then times (median of the rounds) and XLA's
temporary memory are printed and saved.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gvpo_jax import gvpo_loss
from gvpo_jax.logprobs import sequence_logprobs, token_logprobs
from gvpo_jax.models.decoder import DecoderConfig, decoder_fns, init_params

SHAPES = {
    "long prompt": {"g": 2, "k": 8, "p": 1024, "t": 128},
    "short prompt": {"g": 4, "k": 8, "p": 32, "t": 8},
    "long completion": {"g": 2, "k": 8, "p": 64, "t": 256},
}
SMALL = {"small": {"g": 2, "k": 4, "p": 96, "t": 16}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to save the results as JSON")
    options = parser.parse_args()
    layers, width, vocab = (1, 32, 256) if options.small else (4, 256, 8192)
    config = DecoderConfig(
        "llama", vocab, width, 4 * width, layers, 8, 4, width // 8, tie_embeddings=True
    )
    shapes = SMALL if options.small else SHAPES
    rows = [measure(config, name, rounds=options.rounds, **shape) for name, shape in shapes.items()]
    for row in rows:
        print(
            f"{row['name']}: {row['speedup']:.2f} times faster (ideal {row['ideal']:.2f}), "
            f"{row['memory_ratio']:.2f} times less memory, "
            f"gradients differ by {row['gradient_difference']:.1e}"
        )
    if options.out:
        machine = {"machine": platform.processor() or platform.machine(), "jax": jax.__version__}
        machine |= {"backend": jax.default_backend(), "rows": rows}
        options.out.write_text(json.dumps(machine, indent=2) + "\n")


def measure(
    config: DecoderConfig, name: str, *, g: int, k: int, p: int, t: int, rounds: int
) -> dict:
    params = init_params(config, 0)
    batch = random_batch(config.vocab_size, g, k, p, t)
    steps, memory = {}, {}
    for route in (shared, repeated):
        step = jax.jit(jax.value_and_grad(functools.partial(route, config)))
        compiled = step.lower(params, batch).compile()
        analysis = compiled.memory_analysis()
        memory[route.__name__] = analysis.temp_size_in_bytes / 2**20
        steps[route.__name__] = compiled
    gradients = {
        route: jax.block_until_ready(step(params, batch))[1] for route, step in steps.items()
    }
    times: dict[str, list[float]] = {route: [] for route in steps}
    for _ in range(rounds):
        for route, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(params, batch))
            times[route].append(time.perf_counter() - start)
    medians = {route: statistics.median(values) for route, values in times.items()}
    return {
        "name": name,
        **{"g": g, "k": k, "p": p, "t": t},
        "seconds": medians,
        "all_seconds": times,
        "temporaries_mib": memory,
        "speedup": medians["repeated"] / medians["shared"],
        "memory_ratio": memory["repeated"] / memory["shared"],
        "ideal": k * (p + t) / (p + k * t),
        "gradient_difference": largest_difference(gradients["shared"], gradients["repeated"]),
    }


def shared(config, params, batch):
    """k completions against one prompt."""
    prompts, lengths, completions, refs, rewards = batch
    return loss(config, params, prompts, lengths, completions, refs, rewards)


def repeated(config, params, batch):
    """The prompt in front of every completion: groups of one."""
    prompts, lengths, completions, refs, rewards = batch
    g, k, t = completions.shape
    rows = jnp.repeat(prompts, k, axis=0), jnp.repeat(lengths, k), completions.reshape(g * k, 1, t)
    return loss(config, params, *rows, refs, rewards)


def loss(config, params, prompts, lengths, completions, refs, rewards):
    apply = decoder_fns(config)
    hidden = apply.completion_hidden(params, prompts, lengths, completions)
    logps = token_logprobs(hidden, apply.head(params), completions)
    sums = sequence_logprobs(logps, jnp.full(completions.shape[:2], completions.shape[2]))
    return gvpo_loss(sums.reshape(refs.shape), refs, rewards)


def random_batch(vocab: int, g: int, k: int, p: int, t: int):
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.integers(0, vocab, (g, p)), jnp.int32),
        jnp.full(g, p, jnp.int32),
        jnp.asarray(rng.integers(0, vocab, (g, k, t)), jnp.int32),
        jnp.asarray(rng.normal(-t, 1, (g, k)), jnp.float32),
        jnp.asarray(rng.normal(size=(g, k)), jnp.float32),
    )


def largest_difference(a, b) -> float:
    """Over all parameters, relative to the gradient's largest entry."""
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(a))
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs) / scale


if __name__ == "__main__":
    main()
