"""GVPO with nothing but JAX: a table of logits, descent by hand, and the optimum it must reach."""

import jax
import jax.numpy as jnp

from gvpo_jax import gvpo_loss

G, K, V, BETA, RATE = 4, 8, 6, 0.5, 4.0  # prompts, completions of each, possible completions
REWARDS, REFERENCE = jax.random.normal(jax.random.key(0), (2, G, V))  # rewards, logits
OPTIMUM = jax.nn.softmax(REFERENCE + REWARDS / BETA)  # pi_ref * exp(R / beta), normalised


def of_completions(table, completions):  # [g, v], [g, k] -> [g, k]
    return jnp.take_along_axis(table, completions, axis=-1)


def loss(logits, completions):
    logps = of_completions(jax.nn.log_softmax(logits), completions)
    ref_logps = of_completions(jax.nn.log_softmax(REFERENCE), completions)
    return gvpo_loss(logps, ref_logps, of_completions(REWARDS, completions), beta=BETA)


@jax.jit
def step(logits, key):
    completions = jax.random.categorical(key, logits, shape=(K, G)).T  # fresh ones: [g, k]
    return logits - RATE * jax.grad(loss)(logits, completions)


def distance(logits):  # KL(optimum || policy) in nats, mean over the prompts
    return float(jnp.mean(jnp.sum(OPTIMUM * (jnp.log(OPTIMUM) - jax.nn.log_softmax(logits)), -1)))


logits, before = REFERENCE, distance(REFERENCE)
for key in jax.random.split(jax.random.key(1), 2000):
    logits = step(logits, key)
print(f"KL from the optimum: before {before:.3f}, after {distance(logits):.6f}")
assert distance(logits) < before / 1000
