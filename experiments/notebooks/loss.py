# %% [markdown]
# # The loss of GVPO in five minutes
#
# GVPO trains a language model from rewards. For a prompt it takes k completions, and gives each a weight:
# its reward above the group's mean, less `beta` times its log-ratio above the group's mean.
# The log-ratio is `log pi - log pi_ref`: how much likelier the policy finds the completion than the reference does.
#
# Here the "language" has six completions for each prompt. So the optimum can be computed, and you can watch the loss reach it.
# It needs nothing but JAX, and runs on a CPU.

# %% tags=["install"]
# %pip install -q "gvpo-jax @ git+https://github.com/gvpo-jax/gvpo-jax"

# %% tags=["parameters"]
BETA = 0.5  # how strongly the reference pulls
K = 8  # completions of each prompt
STEPS = 1000

# %% [markdown]
# ## A world small enough to know the answer
#
# Four prompts, six possible completions, a reward for each, and a reference policy.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from gvpo_jax import gvpo_loss

PROMPTS, COMPLETIONS = 4, 6
rewards, reference = jax.random.normal(jax.random.key(0), (2, PROMPTS, COMPLETIONS))
optimum = jax.nn.softmax(reference + rewards / BETA)  # pi_ref * exp(R / beta), made to sum to 1

# %% [markdown]
# ## One step
#
# The loss takes three arrays `[prompts, k]`: log-probs under the policy, log-probs under the reference, rewards.
# The last axis is the group.


# %%
def of(table, chosen):
    return jnp.take_along_axis(table, chosen, axis=-1)


def loss(logits, chosen):
    logps = of(jax.nn.log_softmax(logits), chosen)
    ref_logps = of(jax.nn.log_softmax(reference), chosen)
    return gvpo_loss(logps, ref_logps, of(rewards, chosen), beta=BETA)


@jax.jit
def step(logits, chosen):
    return logits - 4.0 * jax.grad(loss)(logits, chosen)


def distance(logits):
    """KL from the optimum to the policy, in nats, a mean over the prompts."""
    gap = jnp.log(optimum) - jax.nn.log_softmax(logits)
    return float(jnp.mean(jnp.sum(optimum * gap, axis=-1)))


# %% [markdown]
# ## Train
#
# Once from the policy's own samples. And once from samples of somebody who throws dice: GVPO needs no importance weights for that.
# Dice even do better here. They draw each completion equally often, where the policy soon draws the unlikely ones seldom.


# %%
def train(own_samples):
    logits, distances = reference, []
    for key in jax.random.split(jax.random.key(1), STEPS):
        sampler = logits if own_samples else jnp.zeros_like(logits)
        chosen = jax.random.categorical(key, sampler, shape=(K, PROMPTS)).T
        logits = step(logits, chosen)
        distances.append(distance(logits))
    return logits, distances


policy, own = train(own_samples=True)
_, foreign = train(own_samples=False)
print(f"KL from the optimum: {distance(reference):.3f} before, {own[-1]:.5f} after")
print(f"the same from foreign samples: {abs(foreign[-1]):.5f}")  # in float32 it may be -0

# %%
plt.semilogy(own, label="its own samples")
plt.semilogy(foreign, label="foreign samples")
plt.xlabel("update")
plt.ylabel("KL from the optimum, nats")
plt.legend()
plt.show()

# %% [markdown]
# ## Where to go next
#
# - In your own loop: [the loss](https://github.com/gvpo-jax/gvpo-jax/blob/main/docs/loss.md), with examples in Optax, Flax and Equinox.
# - A real model, your data and your reward: [own_reward.ipynb](https://github.com/gvpo-jax/gvpo-jax/blob/main/experiments/notebooks/own_reward.ipynb).
