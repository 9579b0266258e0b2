"""A language of 15 texts: every probability can be written down, and so can GVPO's optimum.

A text is 0 to 3 letters of {a, b}. After each letter a third token may end it; after three letters
it ends by itself, so 1 + 2 + 4 + 8 = 15 texts. A policy is a table of logits [p, s, v]: for each
prompt and each of the 1 + 2 + 4 beginnings that can go on, one per token (a, b, end). It is
autoregressive like a language model, and can take on every distribution over the texts.

Shapes: p prompts, r texts, s beginnings, t tokens of a text (at most 3), v tokens.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LETTERS, LONGEST, PROMPTS, BETA = 2, 3, 4, 0.5
END = LETTERS
TEXTS = [text for n in range(LONGEST + 1) for text in itertools.product(range(LETTERS), repeat=n)]
BEGINNINGS = [text for text in TEXTS if len(text) < LONGEST]


def _token_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each text its tokens, the beginning before each of them, and which count: [r, t]."""
    tokens, before, mask = np.zeros((3, len(TEXTS), LONGEST), int)
    for r, text in enumerate(TEXTS):
        for t, token in enumerate((*text, END)[:LONGEST]):
            tokens[r, t], before[r, t], mask[r, t] = token, BEGINNINGS.index(text[:t]), 1
    return tokens, before, mask.astype(bool)


TOKENS, BEFORE, MASK = _token_tables()


class Problem(NamedTuple):
    """Reference policy [p, s, v] and rewards [p, r]."""

    reference: jax.Array
    rewards: jax.Array


def random_problem(key: jax.Array, *, width: float) -> Problem:
    """Reference logits normal with standard deviation `width`, rewards uniform in [0, 1]."""
    keys = jax.random.split(key)
    return Problem(
        width * jax.random.normal(keys[0], (PROMPTS, len(BEGINNINGS), LETTERS + 1)),
        jax.random.uniform(keys[1], (PROMPTS, len(TEXTS)), minval=-1, maxval=1),
    )


def token_logps(logits: jax.Array) -> jax.Array:
    """Log-prob of each token of each text, 0 behind its last one: [p, r, t]."""
    return jnp.where(MASK, jax.nn.log_softmax(logits)[:, BEFORE, TOKENS], 0)


def text_logps(logits: jax.Array) -> jax.Array:
    """Log-prob of each text: [p, r]."""
    return token_logps(logits).sum(-1)


def optimum(problem: Problem, *, rounds: int = 1) -> jax.Array:
    """log of pi_ref exp(rounds * R / beta) / Z: [p, r]."""
    return jax.nn.log_softmax(text_logps(problem.reference) + rounds / BETA * problem.rewards)


def divergence(target: jax.Array, logps: jax.Array) -> jax.Array:
    """KL(target || policy) in nats, averaged over the prompts; both [p, r].

    With d = log policy - log target it is E[exp(d) - d - 1] under the target: no term is
    negative, so nothing cancels and it can be read far below the rounding error of E[-d].
    """
    d = logps - target
    return jnp.mean(jnp.sum(jnp.exp(target) * (jnp.expm1(d) - d), -1))


def uniform() -> jax.Array:
    """The policy under which all texts are equally likely: [p, s, v]."""
    below = {text: sum(other[: len(text)] == text for other in TEXTS) for text in TEXTS}
    counts = [[below[(*text, a)] for a in range(LETTERS)] + [1] for text in BEGINNINGS]
    return jnp.broadcast_to(jnp.log(jnp.asarray(counts, float)), (PROMPTS, *np.shape(counts)))


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Top-p sampling: at each token only the likeliest ones that make up `top_p`."""
    probs = jax.nn.softmax(logits)
    likelier = jnp.sum(
        jnp.where(probs[..., None, :] > probs[..., None], probs[..., None, :], 0), -1
    )
    return jnp.where(likelier < top_p, logits, -jnp.inf)


def best_texts(rewards: jax.Array, count: int) -> jax.Array:
    """The demonstrations: the texts of highest reward, [p, count]."""
    return jax.lax.top_k(rewards, count)[1]


def k3_optimum(problem: Problem) -> jax.Array:
    """Where policy gradients with a k3 penalty lead that is differentiated as a loss: [p, r].

    On the policy's own samples the gradient of k3 is that of KL(reference || policy) at each token,
    not of KL(policy || reference). With Q(s, a) the reward expected after token a, the gradient is
    zero where pi(a|s) (Q(s, a) - V(s)) = beta (pi(a|s) - ref(a|s)), V(s) = sum_a pi(a|s) Q(s, a):
    pi(a|s) = beta ref(a|s) / (beta + V(s) - Q(s, a)), from the last token back to the first.
    """
    reference = jax.nn.softmax(problem.reference)
    values = {text: problem.rewards[:, r] for r, text in enumerate(TEXTS)}  # of a finished text
    logits = [jnp.empty(0)] * len(BEGINNINGS)
    worth = {text: values[text] for text in TEXTS if len(text) == LONGEST}
    for s in reversed(range(len(BEGINNINGS))):
        text = BEGINNINGS[s]
        q = jnp.stack([*(worth[(*text, a)] for a in range(LETTERS)), values[text]], -1)
        level = _normaliser(q, BETA * reference[:, s])
        worth[text] = level[:, 0] - BETA
        logits[s] = jnp.log(BETA * reference[:, s] / (level - q))
    return text_logps(jnp.stack(logits, 1))


def _normaliser(q: jax.Array, weights: jax.Array) -> jax.Array:
    """The level [p, 1] above every q at which sum(weights / (level - q)) = 1, by bisection."""

    def halve(_, bounds):
        middle = (bounds[0] + bounds[1]) / 2
        too_low = jnp.sum(weights / (middle - q), -1, keepdims=True) > 1
        return jnp.where(too_low, middle, bounds[0]), jnp.where(too_low, bounds[1], middle)

    low = jnp.max(q + weights, -1, keepdims=True)
    high = jnp.max(q, -1, keepdims=True) + jnp.sum(weights, -1, keepdims=True)
    return jax.lax.fori_loop(0, 60, halve, (low, high))[1]
