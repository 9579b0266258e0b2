"""Layers that are alike, stacked, so that a program has them once and scans over them.

XLA compiles a decoder layer by layer. Where the weights of equal layers lie in one array, it
compiles one of them and a loop. The parameters of a run stay as they are, layer by layer; an update
stacks them in a copy, in the dtype of the computation.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gvpo_jax.models.quantized import is_quantized
from gvpo_jax.models.shape import DecoderConfig, Params
from gvpo_jax.parallel.layout import STACKED

# The layers that share a place in the stack; a layer that is not stacked is alone in its place.
Places = tuple[tuple[int, ...], ...]


def places_of(c: DecoderConfig) -> Places:
    """A decoder's layers in their order, those that a scan goes through in places of several.

    The scan goes over whole periods of layers that are alike: with five layers with a window, one
    without, five with one ..., a period is six layers. What is before and after stays as it is.
    """
    kinds = [_kind(c, layer) for layer in range(c.num_layers - c.shared_layers)]
    most, first, period = 0, 0, 1
    for width in range(1, len(kinds) // 2 + 1):
        for start in range(len(kinds) - 2 * width + 1):
            count = _repeats(kinds[start:], width)
            if (count - 1) * width > most:
                most, first, period = (count - 1) * width, start, width
    end = first + most + period if most else first
    scanned = [tuple(range(first + i, end, period)) for i in range(period if most else 0)]
    alone = [(layer,) for layer in range(c.num_layers)]
    return (*alone[:first], *scanned, *alone[end:])


@dataclass(frozen=True)
class Stacking:
    """How a decoder's parameters, or a part of them, are stacked.

    Attributes:
        places: see `places_of`.
        in_float32: the last names of parameters that keep their dtype.
        dtype: of the computation, which other floats of the layers are cast to.
    """

    places: Places
    in_float32: tuple[str, ...]
    dtype: Any

    def stack(self, params: Params) -> Params:
        """Those of the layers in a place become one array, layers first: the others stay."""
        layers = params.get("layers", {})

        def of_place(place):
            some = [tree_cast(layers[layer]) for layer in place]
            return some[0] if len(some) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *some)

        def tree_cast(layer):
            return jax.tree.map_with_path(self._cast, layer, is_leaf=is_quantized)

        stacked = {i: of_place(p) for i, p in enumerate(self.places) if p[0] in layers}
        others = {name: x for name, x in params.items() if name != "layers"}
        return others | ({STACKED: stacked} if stacked else {})

    def unstack(self, params: Params) -> Params:
        """Layer by layer again; they keep the dtype that they have now."""
        layers = {
            layer: tree if len(self.places[i]) == 1 else jax.tree.map(lambda x, r=row: x[r], tree)
            for i, tree in params.get(STACKED, {}).items()
            for row, layer in enumerate(self.places[i])
        }
        others = {name: x for name, x in params.items() if name != STACKED}
        return others | ({"layers": dict(sorted(layers.items()))} if layers else {})

    def _cast(self, path: Any, x: Any) -> Any:
        keeps = is_quantized(x) or path[-1].key in self.in_float32
        return x if keeps else x.astype(self.dtype)


def stacking_of(c: DecoderConfig, dtype: Any) -> Stacking:
    """That of a decoder which computes in `dtype`."""
    return Stacking(places_of(c), in_float32(c), dtype)


def in_float32(c: DecoderConfig) -> tuple[str, ...]:
    """The last names of parameters that are used in float32 whatever the dtype."""
    return () if c.norm == "rounded" else ("scale",)


def _kind(c: DecoderConfig, layer: int) -> tuple[Any, ...]:
    """What tells a layer's computation from another's."""
    dense = c.experts is None or layer in c.experts.dense_layers
    return c.window(layer), layer in c.no_rope_layers, dense


def _repeats(kinds: list[Any], width: int) -> int:
    """How often the first so many of them come, one after another."""
    count = 1
    while kinds[count * width : (count + 1) * width] == kinds[:width]:
        count += 1
    return count
