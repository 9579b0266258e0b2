"""GVPO of a Flax NNX network with a LoRA by qwix: add two digits; the base is the reference."""

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx

from gvpo_jax import gvpo_loss

K = 8  # completions of a prompt, here of one token each
A, B = jnp.divmod(jnp.arange(36), 6)  # a prompt for every pair
PROMPTS = jax.nn.one_hot(jnp.stack([A, B], axis=-1), 6).reshape(36, 12)  # [g, d]
rngs = nnx.Rngs(0)
base = nnx.Sequential(nnx.Linear(12, 256, rngs=rngs), nnx.relu, nnx.Linear(256, 11, rngs=rngs))
lora = qwix.LoraProvider(module_path=".*", rank=8, alpha=8)
policy = qwix.apply_lora_to_model(nnx.clone(base), lora, PROMPTS, rngs=rngs)
optimizer = nnx.Optimizer(policy, optax.adam(1e-2), wrt=nnx.LoRAParam)


def sequence_logps(model, sums):  # [g, k] -> [g, k]
    return jnp.take_along_axis(jax.nn.log_softmax(model(PROMPTS)), sums, axis=-1)


@nnx.jit
def step(policy, optimizer, key):
    sums = jax.random.categorical(key, policy(PROMPTS), shape=(K, 36)).T  # [g, k]
    rewards, ref_logps = sums == (A + B)[:, None], sequence_logps(base, sums)
    of_adapter = nnx.DiffState(0, nnx.LoRAParam)
    loss = lambda model: gvpo_loss(sequence_logps(model, sums), ref_logps, rewards)  # noqa: E731
    optimizer.update(policy, nnx.grad(loss, argnums=of_adapter)(policy))


for key in jax.random.split(jax.random.key(1), 500):
    step(policy, optimizer, key)
right = (A + B)[:, None]
before, after = (float(jnp.mean(jnp.exp(sequence_logps(m, right)))) for m in (base, policy))
print(f"Probability of the right sum: before {before:.3f}, after {after:.3f}")
assert after > 0.9 > 0.2 > before
