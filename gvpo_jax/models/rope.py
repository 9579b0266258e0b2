"""Rotary positions: the angles of each layer, plain or stretched for longer contexts."""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3's stretching of the slow rotary frequencies, for contexts beyond the trained one."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LinearScaling:
    """All frequencies slower by one factor."""

    factor: float


@dataclass(frozen=True)
class ProportionalScaling:
    """A fast share of the frequencies, slower by one factor; the slow ones do not turn at all."""

    factor: float
    partial_rotary_factor: float


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): slow frequencies stretched, fast ones kept, a ramp between them.

    Attributes:
        beta_fast, beta_slow: turns within the trained context where the ramp begins and ends.
        attention_factor: what cos and sin are multiplied by.
        truncate: whether the ramp begins and ends at whole dimensions.
        llama_4_scaling_beta: how much queries grow with the contexts of the trained length that lie
            before them; None: not.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    llama_4_scaling_beta: float | None = None


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): a factor for each frequency, others beyond the trained context.

    in_use: which of both; one for a whole run, because a sequence must not change them midway.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float
    in_use: Literal["short", "long"] = "short"

    def of_length(self, length: int) -> "LongRopeScaling":
        """With the factors for sequences of up to so many tokens."""
        long = length > self.original_max_position_embeddings
        return replace(self, in_use="long" if long else "short")


Scaling = RopeScaling | LinearScaling | ProportionalScaling | YarnScaling | LongRopeScaling


class Rope(NamedTuple):
    """Of every token, in float32: cos and sin of the angles `[g, k, t, 1, dims/2]`.

    growth: `[g, k, t, 1, 1]`, what its queries are multiplied by; None: 1.
    """

    cos: jax.Array
    sin: jax.Array
    growth: jax.Array | None = None


def rotations(positions_gkt, theta: float, scaling: Scaling | None, dims: int) -> Rope:
    """The angles of each position."""
    half, freqs = dims // 2, frequencies(theta, dims)
    if isinstance(scaling, RopeScaling):
        freqs = stretched(freqs, scaling)
    elif isinstance(scaling, LinearScaling):
        freqs = freqs / scaling.factor
    elif isinstance(scaling, ProportionalScaling):
        turning = int(scaling.partial_rotary_factor * dims // 2)
        freqs = jnp.where(jnp.arange(half) < turning, freqs / scaling.factor, 0)
    elif isinstance(scaling, YarnScaling):
        freqs = freqs * _yarn(theta, scaling, dims)
    elif isinstance(scaling, LongRopeScaling):
        long = scaling.in_use == "long"
        factors = scaling.long_factor if long else scaling.short_factor
        freqs = freqs / np.asarray(factors, np.float32)
    angles = positions_gkt[..., None, None].astype(jnp.float32) * freqs[None, None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if isinstance(scaling, YarnScaling | LongRopeScaling) and scaling.attention_factor != 1:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    if not isinstance(scaling, YarnScaling) or scaling.llama_4_scaling_beta is None:
        return Rope(cos, sin)
    contexts = positions_gkt[..., None, None] // scaling.original_max_position_embeddings
    growth = 1 + scaling.llama_4_scaling_beta * jnp.log1p(contexts.astype(jnp.float32))
    return Rope(cos, sin, growth)


def frequencies(theta: float, dims: int) -> jax.Array:
    """In radians a token, unscaled, `[dims/2]`."""
    half = dims // 2
    return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)


def rotate(x_gkthd, rope: Rope):
    """The first `dims` of each head turned by the angles, the others as they are."""
    cos, sin = (a.astype(x_gkthd.dtype) for a in rope[:2])
    return jax.lax.platform_dependent(
        x_gkthd, cos, sin, tpu=_rotate_by_product, default=_rotate_by_halves
    )


def _rotate_by_halves(x_gkthd, cos, sin):
    dims = 2 * cos.shape[-1]
    a, b = jnp.split(x_gkthd[..., :dims], 2, axis=-1)
    turned = [a * cos - b * sin, b * cos + a * sin]
    if dims < x_gkthd.shape[-1]:
        turned.append(x_gkthd[..., dims:])
    return jnp.concatenate(turned, axis=-1)


def _rotate_by_product(x_gkthd, cos, sin):
    """The same numbers, exactly: a permutation swaps the halves, where lanes are slow to move."""
    dims, width = 2 * cos.shape[-1], x_gkthd.shape[-1]
    rest = [(0, 0)] * (cos.ndim - 1) + [(0, width - dims)]
    swap = np.zeros((width, width), np.float32)
    swap[np.arange(dims), np.roll(np.arange(dims), dims // 2)] = 1
    highest = jax.lax.Precision.HIGHEST if x_gkthd.dtype == jnp.float32 else None
    swapped = jnp.matmul(x_gkthd, jnp.asarray(swap, x_gkthd.dtype), precision=highest)
    both = jnp.pad(jnp.concatenate([cos, cos], axis=-1), rest, constant_values=1)
    return x_gkthd * both + swapped * jnp.pad(jnp.concatenate([-sin, sin], axis=-1), rest)


def stretched(freqs, scaling: RopeScaling):
    """Llama-3 scaling: long waves slowed by `factor`, short ones kept, a linear blend between."""
    wavelengths = 2 * jnp.pi / freqs
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / wavelengths
    blend = jnp.clip((turns - low) / (high - low), 0, 1)
    return freqs * (blend + (1 - blend) / scaling.factor)


def _yarn(theta: float, scaling: YarnScaling, dims: int):
    """What each frequency is multiplied by, `[dims/2]`."""

    def dimension(turns: float) -> float:
        """The one whose wave makes so many turns within the trained context."""
        waves = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return dims * math.log(waves) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    width = high - low or 0.001
    slow = np.clip((np.arange(dims // 2, dtype=np.float32) - low) / width, 0, 1)
    return (slow / scaling.factor + 1 - slow).astype(np.float32)
