"""Milliseconds per decode step of the in-process engine, random weights in SmolLM2-135M's shape.

    python experiments/decode_step/run.py              # batch 32 = 4 prompts x 8 completions
    python experiments/decode_step/run.py --small      # a tiny model: what CI runs

A step is the difference between a long and a short generation of the same prompts, divided by the
difference in tokens: what prefill and the host cost cancels. Beside it the same for plain PyTorch,
by transformers' generate, where torch is there.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from gvpo_jax.models.decoder import DecoderConfig, decoder_fns, init_params
from gvpo_jax.rollout import InProcessEngine, SamplingModel, SamplingParams

SMOLLM2 = DecoderConfig(
    "llama", 49152, 576, 1536, 30, 9, 3, 64, rope_theta=1e5, tie_embeddings=True
)
TINY = DecoderConfig("llama", 512, 48, 96, 2, 3, 1, 16, tie_embeddings=True)
SHORT, LONG = 8, 40
G, K, P = 4, 8, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to save the results as JSON")
    options = parser.parse_args()
    config = TINY if options.small else SMOLLM2
    prompts = np.random.default_rng(0).integers(1, config.vocab_size, (G, P)).tolist()
    results = {
        "gvpo-jax": step_ms(ours(config, prompts), options.rounds),
        "transformers": step_ms(theirs(config, prompts), options.rounds),
    }
    for name, row in results.items():
        print(f"{name}: {row['median']:.1f} ms a step (rounds: {row['rounds']})")
    if options.out:
        machine = platform.processor() or platform.machine()
        report = {"machine": machine, "jax": jax.__version__, "batch": G * K, "ms": results}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def ours(config: DecoderConfig, prompts: list[list[int]]):
    params = jax.jit(lambda: init_params(config, 0))()
    engine = InProcessEngine(SamplingModel(decoder_fns(config)), stop_ids=())

    def generate(tokens: int) -> None:
        engine.generate(
            params, prompts, range(G), num_generations=K, max_completion_length=tokens,
            sampling=SamplingParams(), seed=0,
        )  # fmt: skip

    return generate


def theirs(config: DecoderConfig, prompts: list[list[int]]):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            tie_word_embeddings=True,
            eos_token_id=None,
        )
    ).eval()
    tokens_bp = torch.tensor(prompts).repeat_interleave(K, dim=0)

    def generate(tokens: int) -> None:
        with torch.inference_mode():
            model.generate(
                tokens_bp, attention_mask=torch.ones_like(tokens_bp), do_sample=True, top_k=0,
                min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip

    return generate


def step_ms(generate, rounds: int) -> dict:
    for tokens in (SHORT, LONG):
        generate(tokens)  # warm
    steps = []
    for _ in range(rounds):
        seconds = {}
        for tokens in (SHORT, LONG):
            start = time.perf_counter()
            generate(tokens)
            seconds[tokens] = time.perf_counter() - start
        steps.append(1000 * (seconds[LONG] - seconds[SHORT]) / (LONG - SHORT))
    return {"median": statistics.median(steps), "rounds": [round(s, 1) for s in steps]}


if __name__ == "__main__":
    main()
