"""GVPO of a Flax Linen network: add two digits below 6; 1 for the right sum, 0 for any other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from gvpo_jax import gvpo_loss

K = 8  # completions of a prompt, here of one token each
A, B = jnp.divmod(jnp.arange(36), 6)  # a prompt for every pair
PROMPTS = jax.nn.one_hot(jnp.stack([A, B], axis=-1), 6).reshape(36, 12)  # [g, d]
policy = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(11), nn.log_softmax])  # [g, d] -> [g, v]
optimizer = optax.adam(1e-2)
reference = policy.init(jax.random.key(0), PROMPTS)


def sequence_logps(params, sums):  # [g, k] -> [g, k]
    return jnp.take_along_axis(policy.apply(params, PROMPTS), sums, axis=-1)


@jax.jit
def step(params, opt_state, key):
    sums = jax.random.categorical(key, policy.apply(params, PROMPTS), shape=(K, 36)).T  # [g, k]
    rewards = sums == (A + B)[:, None]
    ref_logps = sequence_logps(reference, sums)
    grads = jax.grad(lambda p: gvpo_loss(sequence_logps(p, sums), ref_logps, rewards))(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state


params, opt_state = reference, optimizer.init(reference)
for key in jax.random.split(jax.random.key(1), 500):
    params, opt_state = step(params, opt_state, key)
before, after = (
    float(jnp.mean(jnp.exp(sequence_logps(p, (A + B)[:, None])))) for p in (reference, params)
)
print(f"Probability of the right sum: before {before:.3f}, after {after:.3f}")
assert after > 0.9 > 0.2 > before
