"""A frozen base in 8 or 4 bits: the kernels of its linear layers as `qwix.QArray`s.

A kernel is widened where a layer multiplies by it, and again in the backward pass: XLA makes that a
part of the product, so the wide kernel is nowhere in memory. Activations are not quantised.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gvpo_jax.errors import UserError

Quantization = Literal["none", "int8", "nf4"]
TILE = 64  # rows of an nf4 kernel that share a scale
_KERNEL = re.compile(r"layers/.*/(?!router)\w+/kernel")
# Appendix E of the QLoRA paper, https://arxiv.org/abs/2305.14314
_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def is_quantized(x: Any) -> bool:
    """Whether it is a `qwix.QArray`, of arrays or of their shapes."""
    return hasattr(x, "qvalue")


def is_kernel(path: str, x: Any) -> bool:
    """Whether a parameter is a kernel that is quantised: of a linear layer, but the router's.

    Raises:
        UserError: it holds the experts of a mixture.
    """
    if x.ndim == 3 and path.endswith("/kernel"):
        raise UserError(
            "model.quantization: the experts of a mixture can't be quantised; leave it out, or "
            "choose a model without experts"
        )
    return _KERNEL.fullmatch(path) is not None


def tile_of(width: int) -> int:
    """Rows that share a scale: the largest part of the width from 32 to 64; if none, the width."""
    return next((rows for rows in range(TILE, TILE // 2 - 1, -1) if width % rows == 0), width)


@functools.partial(jax.jit, static_argnums=1)
def quantize(kernel: jax.Array, kind: str) -> Any:
    """A kernel `[d, f]` as a `qwix.QArray`; its scales are float32.

    int8 has a scale for each of the f columns, nf4 one for each tile of a column.

    Raises:
        UserError: qwix is not installed.
    """
    try:
        import qwix
    except ImportError:
        raise UserError(
            f'model.quantization={kind} needs qwix: pip install "gvpo-jax[qlora]"'
        ) from None
    kernel = kernel.astype(jnp.float32)
    if kind == "int8":
        return qwix.quantize(kernel, jnp.int8, channelwise_axes=(1,))
    tiles = {0: tile_of(len(kernel))}
    return qwix.quantize(kernel, kind, channelwise_axes=(1,), tiled_axes=tiles)


def widen(kernel: Any, dtype: Any) -> jax.Array:
    """The kernel `[d, f]` that a `qwix.QArray` stands for: in float32, then rounded to `dtype`.

    As `qwix.dequantize`, which looks levels up in a table. That takes a TPU longer than the product
    does, and it keeps the result (experiments/quantized_base).
    """
    levels = _levels(kernel.qvalue) if kernel.qtype == "nf4" else kernel.qvalue.astype(jnp.float32)
    tiles = levels.reshape(len(kernel.scale), -1, levels.shape[1]) * kernel.scale[:, None]
    return tiles.reshape(levels.shape).astype(dtype)


def with_quantized(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A `jax.lax.dot_general` of activations and a layer's weights that takes quantised ones too.

    Forward and backward pass widen the weights anew.
    """

    def of_either(x: jax.Array, weights: Any, *args: Any, **options: Any) -> jax.Array:
        if not is_quantized(weights):
            return product(x, weights, *args, **options)
        widened = jax.checkpoint(lambda x, w: product(x, widen(w, x.dtype), *args, **options))
        return widened(x, weights)

    return of_either


def promote(arrays: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """What a layer computes with, in the dtype of the computation; but for quantised kernels."""
    return tuple(x if x is None or is_quantized(x) else x.astype(dtype) for x in arrays)


def _levels(codes: jax.Array) -> jax.Array:
    """The levels that 4-bit codes stand for, chosen bit by bit: by no table, see `widen`."""
    codes, levels = codes.astype(jnp.int32), [jnp.float32(level) for level in _LEVELS]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        levels = [jnp.where(is_set, *pair) for pair in zip(levels[1::2], levels[::2], strict=True)]
    return levels[0]
