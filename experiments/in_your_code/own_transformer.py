"""A transformer of your own in plain JAX, trained by the whole loop: it learns to write letters."""

import tempfile

import jax
import jax.numpy as jnp

from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.models.debug import debug_tokenizer
from gvpo_jax.models.own import OwnModel, plain_functions
from gvpo_jax.trainer import Trainer

VOCAB, D, HEADS, LAYERS, LONGEST = 260, 64, 4, 2, 40


def init(key):
    keys = iter(jax.random.split(key, 2 + 4 * LAYERS))

    def matrix(n_in, n_out):
        return jax.random.normal(next(keys), (n_in, n_out)) / n_in**0.5

    sizes = {"qkv": (D, 3 * D), "out": (D, D), "up": (D, 4 * D), "down": (4 * D, D)}
    layers = [{name: matrix(*size) for name, size in sizes.items()} for _ in range(LAYERS)]
    return {"tokens": matrix(VOCAB, D), "places": matrix(LONGEST, D), "layers": layers}


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def attend(layer, x_bsd):
    b, s, _ = x_bsd.shape
    q, k, v = jnp.split(norm(x_bsd) @ layer["qkv"], 3, axis=-1)
    q, k, v = (y.reshape(b, s, HEADS, -1) for y in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(b, s, D) @ layer["out"]


def hidden(params, tokens_bs):
    x = params["tokens"][tokens_bs] + params["places"][None, : tokens_bs.shape[1]]
    for layer in params["layers"]:
        x = x + attend(layer, x)
        x = x + jax.nn.silu(norm(x) @ layer["up"]) @ layer["down"]
    return norm(x)


def letters(prompt, completion):
    return sum(letter.islower() for letter in completion) / max(len(completion), 1)


model = OwnModel(
    plain_functions(hidden, head=lambda params: params["tokens"]),
    params=init(jax.random.key(0)),
    tokenizer=debug_tokenizer(),
    max_length=LONGEST,
)
with tempfile.TemporaryDirectory() as folder:
    config = override(
        Config(), run__dir=f"{folder}/run", train__steps=30, optimizer__learning_rate=3e-3,
        rollout__num_generations=8, rollout__max_completion_length=8, data__max_prompt_length=16,
        loss__beta=0.05, eval__success_reward=None,
    )  # fmt: skip
    rows = [{"prompt": f"Word {number}: "} for number in range(16)]
    summary = Trainer(config, model).train(rows, letters, eval_dataset=rows[:4])
before, after = summary["eval/reward_before"], summary["eval/reward_after"]
print(f"Share of lowercase letters: before {before:.3f}, after {after:.3f}")
assert after > before + 0.3
