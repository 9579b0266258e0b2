"""GVPO with Optax and a dict of arrays: count down from the prompt's digit, and end."""

import jax
import jax.numpy as jnp
import optax

from gvpo_jax import gvpo_loss

K, END = 16, 0  # completions of a prompt, the token that ends one
RIGHT = jnp.maximum(jnp.arange(1, 6)[:, None, None] - jnp.arange(6), END)  # [g, 1, t]: 3 2 1 0 0 0
REFERENCE = {"next": jnp.zeros((6, 6))}  # logits of the token that follows each token
optimizer = optax.adam(0.05)


def sequence_logps(params, text):  # prompt and completion [g, k, t] -> [g, k]
    previous, tokens = text[..., :-1], text[..., 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(params["next"][previous], tokens)
    return -jnp.sum(losses, axis=-1, where=previous != END)  # the first END counts, the rest not


@jax.jit
def step(params, opt_state, key):
    text = [jnp.repeat(RIGHT[..., 0], K, axis=1)]  # the prompt: one token
    for k in jax.random.split(key, 5):
        text.append((text[-1] != END) * jax.random.categorical(k, params["next"][text[-1]]))
    text = jnp.stack(text, axis=-1)
    rewards = jnp.all(text == RIGHT, axis=-1)
    ref_logps = sequence_logps(REFERENCE, text)
    grads = jax.grad(lambda p: gvpo_loss(sequence_logps(p, text), ref_logps, rewards))(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state


params, opt_state = REFERENCE, optimizer.init(REFERENCE)
for key in jax.random.split(jax.random.key(0), 300):
    params, opt_state = step(params, opt_state, key)
before, after = (float(jnp.mean(jnp.exp(sequence_logps(p, RIGHT)))) for p in (REFERENCE, params))
print(f"Probability of the right completion: before {before:.3f}, after {after:.3f}")
assert after > 0.9 > before
