"""Prompts and completions of many lengths as packed tokens without padding, and back.

What a decoder computes token by token, it computes on the packed tokens `[s, n]`: a row for each
part that the groups are cut into over devices, n places each. Only attention, which looks at
positions, is given prompts `[g, p]` and completions `[g, k, t]` again. Both ways are gathers,
forward and backward.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from gvpo_jax.logprobs import completion_mask
from gvpo_jax.ops.attention import Prefix


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedTokens:
    """Which token of a padded batch lies where.

    Attributes:
        source: `[s, n]` int32: for each place its token's number among the m = g/s * (k*t + p)
            padded tokens of the row, all completions before all prompts; m where none lies.
        place: `[s, m]` int32: the other way, n where a token is padding.
        prompt_lengths: `[g]`.
        fits: boolean: every token has a place.
        shape: (g, k, p, t).
    """

    source: jax.Array
    place: jax.Array
    prompt_lengths: jax.Array
    fits: jax.Array
    shape: tuple[int, int, int, int] = field(metadata={"static": True})

    @property
    def of_completions(self) -> jax.Array:
        """`[s, n]` booleans: the places where a completion's token lies, before all others."""
        g, k, _, t = self.shape
        return self.source < g // len(self.place) * k * t

    def pack(self, prompts: jax.Array, completions: jax.Array) -> jax.Array:
        """`[g, 1, p, ...]`, `[g, k, t, ...]` -> `[s, 1, n, ...]`, zeros where nothing lies."""
        s, rest = len(self.place), prompts.shape[3:]
        padded = [x.reshape(s, -1, *rest) for x in (completions, prompts)]
        return _move(jnp.concatenate(padded, axis=1), self.source, self.place)[:, None]

    def unpack(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The inverse of `pack`, zeros where padding is."""
        (g, k, p, t), s = self.shape, len(self.place)
        padded, rest = _move(x[:, 0], self.place, self.source), x.shape[3:]
        completions, prompts = jnp.split(padded, [g // s * k * t], axis=1)
        return prompts.reshape(g, 1, p, *rest), completions.reshape(g, k, t, *rest)

    def last_of_prompts(self, x: jax.Array) -> jax.Array:
        """`[s, 1, n, ...] -> [g, ...]`, what lies where each prompt ends."""
        g, k, p, t = self.shape
        s = len(self.place)
        start = g // s * k * t + jnp.arange(g // s) * p
        end = start[None] + self.prompt_lengths.reshape(s, g // s) - 1
        last = _take(x[:, 0], jnp.take_along_axis(self.place, end, axis=1))
        return last.reshape(g, *x.shape[3:])


def pack_tokens(
    prompt_lengths: jax.Array, lengths: jax.Array, p: int, t: int, *, shards: int, size: int
) -> PackedTokens:
    """Lays out the prompts' tokens and the first `lengths` tokens of the completions.

    Args:
        prompt_lengths: `[g]` int32.
        lengths: `[g, k]` int32.
        p: padded length of prompts.
        t: padded length of completions.
        shards: s, divides g; groups are cut in order.
        size: n. What has no place is left out.
    """
    g, k = lengths.shape
    counts = completion_mask(lengths, t), completion_mask(prompt_lengths, p)
    counts_sm = jnp.concatenate([x.reshape(shards, -1) for x in counts], axis=1)
    m = counts_sm.shape[1]
    before = jnp.cumsum(counts_sm, axis=1, dtype=jnp.int32) - 1
    place = jnp.where(counts_sm & (before < size), before, size)
    first = jax.vmap(lambda row: jnp.nonzero(row, size=size, fill_value=m)[0])(counts_sm)
    fits = jnp.max(before) < size
    return PackedTokens(first.astype(jnp.int32), place, prompt_lengths, fits, (g, k, p, t))


def attend_unpacked(
    attention: Callable[..., jax.Array],
    constrain: Callable[[str, jax.Array], jax.Array],
    packed: PackedTokens,
    *heads: jax.Array,
) -> jax.Array:
    """Attention of prompts to themselves, and of completions to their prompt and themselves.

    Args:
        attention: see `gvpo_jax.ops.attention.causal`.
        constrain: lays out "heads" while tracing.
        packed: how the tokens lie.
        heads: queries, keys and values, `[s, 1, n, h, d]`.
    """
    parts = [tuple(constrain("heads", x) for x in packed.unpack(x)) for x in heads]
    (prompts, own), *others = parts
    keys, values = (tuple(jnp.swapaxes(x, 2, 3) for x in pair) for pair in others)
    p = prompts.shape[2]
    mask = completion_mask(packed.prompt_lengths, p)
    shared = Prefix(keys[0][:, 0], values[0][:, 0], mask)
    out = attention(prompts, keys[0], values[0]), attention(own, keys[1], values[1], shared)
    return packed.pack(*(constrain("heads", x) for x in out))


@jax.custom_vjp
def _move(x, source, place):
    """`[s, a, ...] -> [s, b, ...]`: y[i] = x[source[i]]; `place` is the inverse of `source`."""
    del place
    return _take(x, source)


def _take(x, numbers):
    row = partial(jnp.take, axis=0, mode="fill", fill_value=0)
    return jax.vmap(row)(x, numbers)


def _move_forward(x, source, place):
    return _take(x, source), place


def _move_backward(place, g):
    return _take(g, place), None, None


_move.defvjp(_move_forward, _move_backward)
