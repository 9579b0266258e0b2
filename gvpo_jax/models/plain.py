"""Any causal model as the functions that training and sampling call: simple, and slow to sample.

The model needs no cache and knows of no groups: a prompt is computed anew for each of its
completions, and a completion for each of its tokens. A model that has a cache offers its own
`DecoderFns`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gvpo_jax.models.decoder import DecoderFns

Hidden = Callable[[Any, jax.Array], jax.Array]


def plain_functions(hidden: Hidden, head: Callable[[Any], jax.Array]) -> DecoderFns:
    """What `Trainer` needs of a model, from two functions of its parameters.

    Args:
        hidden: `(params, tokens [b, s]) -> [b, s, d]`, the hidden states before the head. Each may
            depend on the tokens up to its own place alone; what lies behind a text is padding.
        head: `params -> [v, d]`, the output embedding: logits are `hidden @ head.T`.
    """

    def prefill(params, prompts_gp, lengths_g):
        prefix = {"prompts": prompts_gp, "lengths": lengths_g}
        return _at(hidden(params, prompts_gp), lengths_g - 1), prefix

    def empty_cache(groups: int, k: int, max_completion_length: int):
        return jnp.zeros((groups, k, max_completion_length), jnp.int32)  # the tokens so far

    def decode(params, tokens_gk, lengths_g, prefix, cache, before_gk, place):
        cache = jax.lax.dynamic_update_slice_in_dim(cache, tokens_gk[..., None], place, axis=2)
        size = cache.shape[2]  # of a ring, in which a completion may begin anywhere
        order = (place - before_gk[..., None] + jnp.arange(size)[None, None]) % size
        completions = jnp.take_along_axis(cache, order, axis=2)
        texts, lengths = _joined(prefix["prompts"], lengths_g, completions)
        last = _at(hidden(params, texts), lengths + before_gk.reshape(-1))
        return last.reshape(*tokens_gk.shape, -1), cache

    def completion_hidden(params, prompts_gp, lengths_g, completions_gkt):
        g, k, t = completions_gkt.shape
        texts, lengths = _joined(prompts_gp, lengths_g, completions_gkt[..., :-1])
        before = lengths[:, None] - 1 + jnp.arange(t)[None]
        states = jnp.take_along_axis(hidden(params, texts), before[..., None], axis=1)
        return states.reshape(g, k, t, -1)

    return DecoderFns(prefill, empty_cache, decode, completion_hidden, head)


def _joined(prompts_gp, lengths_g, completions_gkt):
    """Texts `[g * k, p + t]`, each a prompt without its padding and a completion; `[g * k]`."""
    (g, p), (_, k, t) = prompts_gp.shape, completions_gkt.shape
    prompts, lengths = (jnp.repeat(x, k, axis=0) for x in (prompts_gp, lengths_g))
    both = jnp.concatenate([prompts, completions_gkt.reshape(g * k, t)], axis=1)
    place = jnp.broadcast_to(jnp.arange(p + t)[None], (g * k, p + t))
    source = jnp.where(place < lengths[:, None], place, place + p - lengths[:, None])
    return jnp.take_along_axis(both, jnp.minimum(source, p + t - 1), axis=1), lengths


def _at(states_bsd, place_b):
    """The hidden state `[b, d]` at one place of each row."""
    return jnp.take_along_axis(states_bsd, place_b[:, None, None], axis=1)[:, 0]
