"""Training on the listed language: where each completion of a group comes from, and which loss.

One training run is one `lax.scan`; seeds are a `vmap` over it. Each step takes one group of each
prompt. Shapes: p prompts, k completions, t tokens, s beginnings, v tokens, r texts.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import language
import optax
from language import MASK, PROMPTS, Problem, text_logps, token_logps

K, LEARNING_RATE = 8, 0.05
STALE, REPLAY, DEMONSTRATIONS, HOT, TOP_P = 200, 512, 3, 1.5, 0.8


class Batch(NamedTuple):
    """One group of each prompt: token log-probs and mask [p, k, t], rewards and noise [p, k]."""

    logps: jax.Array
    ref_logps: jax.Array
    sampler_logps: jax.Array
    mask: jax.Array
    rewards: jax.Array
    gumbel: jax.Array


class State(NamedTuple):
    logits: jax.Array
    optimizer: optax.OptState
    past_logits: jax.Array  # [STALE, p, s, v], a ring
    past_texts: jax.Array  # [REPLAY, p, fresh], a ring of what the policy itself wrote


Loss = Callable[[Batch], jax.Array]
Sources = tuple[tuple[str, int], ...]  # where a group's completions come from, and how many


def draw_chance(key: jax.Array, *, steps: int, points: int) -> jax.Array:
    """All the chance in a training: uniform numbers for the texts and for a judge's noise.

    Drawn before the loop, which then compiles and runs several times faster. [points, n, 2, p, k].
    """
    return jax.random.uniform(key, (points, steps // points, 2, PROMPTS, K))


def train(problem: Problem, chance: jax.Array, loss: Loss, sources: Sources) -> jax.Array:
    """Adam from the reference on, at a rate of 0.05 decayed to 0 by a cosine.

    The policy's own samples come first in `sources`, where replay looks for them. Returns
    the logits after each of the `points` stretches of updates: [points, p, s, v].
    """
    points, n, *_ = chance.shape
    steps = points * n
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    fresh = dict(sources).get("policy", 0)
    reference_logps = token_logps(problem.reference)

    def step(state: State, now: tuple[jax.Array, jax.Array]) -> tuple[State, None]:
        n, (choice, noise) = now
        drawn, sampler_logps = _draw_group(choice, state, problem, sources, n)
        rest = (
            _pick(reference_logps, drawn),
            sampler_logps,
            jnp.asarray(MASK)[drawn],
            _pick(problem.rewards, drawn),
            -jnp.log(-jnp.log(noise)),
        )

        def objective(logits):
            return loss(Batch(_pick(token_logps(logits), drawn), *rest))

        gradient = jax.grad(objective)(state.logits)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer)
        return State(
            optax.apply_updates(state.logits, updates),
            optimizer_state,
            _remember(state.past_logits, state.logits, n),
            _remember(state.past_texts, drawn[:, :fresh], n),
        ), None

    def stretch(state: State, now) -> tuple[State, jax.Array]:
        state, _ = jax.lax.scan(step, state, now)
        return state, state.logits

    now = jnp.arange(steps).reshape(points, n), chance
    return jax.lax.scan(stretch, _first_state(problem, optimizer, dict(sources)), now)[1]


def _first_state(problem: Problem, optimizer, sources: dict[str, int]) -> State:
    """At the reference, with its texts as the past; rings that nobody reads have one place."""
    places = STALE if "stale" in sources else 1
    past_logits = jnp.broadcast_to(problem.reference, (places, *problem.reference.shape))
    shape = (REPLAY if "replay" in sources else 1, PROMPTS, sources.get("policy", 0))
    spread = (jnp.arange(math.prod(shape)).reshape(shape) + 0.5) / math.prod(shape)
    past_texts = _choose(text_logps(problem.reference), spread)
    state = optimizer.init(problem.reference)
    return State(problem.reference, state, past_logits, past_texts)


def _remember(ring: jax.Array, value: jax.Array, n: jax.Array) -> jax.Array:
    return ring.at[n % ring.shape[0]].set(value.astype(ring.dtype))


def _draw_group(chance, state: State, problem: Problem, sources: Sources, n: jax.Array):
    """Texts [p, k] and the token log-probs [p, k, t] under what wrote them."""
    ends = itertools.accumulate(count for _, count in sources)
    parts = [
        _draw(source, chance[:, end - count : end], state, problem, n)
        for (source, count), end in zip(sources, ends, strict=True)
    ]
    drawn, logps = zip(*parts, strict=True)
    return jnp.concatenate(drawn, 1), jnp.concatenate(logps, 1)


def _draw(source: str, chance: jax.Array, state: State, problem: Problem, n: jax.Array):
    if source not in ("replay", "demonstrations"):
        sampler = _sampler(source, state, problem, n)
        drawn = _choose(text_logps(sampler), chance)
        return drawn, _pick(token_logps(sampler), drawn)
    if source == "replay":
        rows = state.past_texts.transpose(1, 0, 2).reshape(PROMPTS, -1)
    else:
        rows = language.best_texts(problem.rewards, DEMONSTRATIONS)
    drawn = jnp.take_along_axis(rows, (chance * rows.shape[1]).astype(int), 1)
    # Nobody knows how likely a demonstration is under what wrote it: the policy stands in.
    return drawn, _pick(token_logps(state.logits), drawn)


def _choose(logps: jax.Array, chance: jax.Array) -> jax.Array:
    """The text where the cumulated probability [p, r] passes `chance` [..., p, k]."""
    reached = jnp.cumsum(jnp.exp(logps), -1)[:, None, :-1]
    return jnp.sum(chance[..., None] >= reached, -1)


def _sampler(source: str, state: State, problem: Problem, n: jax.Array) -> jax.Array:
    match source:
        case "policy":
            return state.logits
        case "stale":  # the oldest in the ring, about to be overwritten
            return state.past_logits[n % STALE]
        case "hot":
            return state.logits / HOT
        case "top-p":
            return language.nucleus(state.logits, TOP_P)
        case "reference":
            return problem.reference
        case "uniform":
            return language.uniform()
    raise ValueError(f"unknown source {source!r}")


def _pick(values_r: jax.Array, drawn: jax.Array) -> jax.Array:
    """values [p, r, ...] of the drawn texts [p, k]: [p, k, ...]."""
    return values_r[jnp.arange(PROMPTS)[:, None], drawn]
