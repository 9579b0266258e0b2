"""GVPO of an Equinox network: multiply two digits below 4; the reward is minus the distance."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from gvpo_jax import gvpo_loss

K = 8  # completions of a prompt, here of one token each
A, B = jnp.divmod(jnp.arange(16), 4)  # a prompt for every pair
PROMPTS = jax.nn.one_hot(jnp.stack([A, B], axis=-1), 4).reshape(16, 8)  # [g, d]
RIGHT = (A * B)[:, None]  # [g, 1]
optimizer = optax.adam(1e-2)


def sequence_logps(policy, answers):  # [g, k] -> [g, k]
    logps = jax.nn.log_softmax(jax.vmap(policy)(PROMPTS))
    return jnp.take_along_axis(logps, answers, axis=-1)


@eqx.filter_jit
def step(policy, reference, opt_state, key):
    answers = jax.random.categorical(key, jax.vmap(policy)(PROMPTS), shape=(K, 16)).T  # [g, k]
    rewards, ref_logps = -abs(answers - RIGHT), sequence_logps(reference, answers)
    gradient = eqx.filter_grad(lambda p: gvpo_loss(sequence_logps(p, answers), ref_logps, rewards))
    updates, opt_state = optimizer.update(gradient(policy), opt_state)
    return eqx.apply_updates(policy, updates), opt_state, jnp.mean(rewards)


policy = reference = eqx.nn.MLP(8, 10, width_size=64, depth=1, key=jax.random.key(0))
opt_state, history = optimizer.init(eqx.filter(policy, eqx.is_array)), []
for key in jax.random.split(jax.random.key(1), 500):
    policy, opt_state, reward = step(policy, reference, opt_state, key)
    history.append(float(reward))
print(f"Mean reward: before {history[0]:.2f}, after {history[-1]:.2f}")
assert history[-1] > -0.5 > -2 > history[0]
