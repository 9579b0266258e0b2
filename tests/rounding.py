"""How far apart numbers may lie that are the same but for float32's rounding.

A processor adds the terms of a sum in its own order, as many at a time as its vectors hold, so the
last bits are not the same everywhere. How much becomes of them depends on the model: on its depth,
on the length of its sums, and on the size of what goes into a softmax.
"""

import jax
import numpy as np

EPS = float(np.finfo(np.float32).eps)  # the distance from 1 to the next number


def rounding(function, params, *, times=8, draws=4):
    """A tolerance for `function(params)`: `times` its farthest move when all weights are rounded.

    A sum in another order is the exact sum of slightly other weights. So every weight is moved by
    up to its last bit, at random, and the numbers of `function` (any tree) show what becomes of it.
    """
    numbers = jax.tree.leaves(function(params))
    farthest = 0.0
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        moved = jax.tree.leaves(function(jax.tree.map(lambda x, rng=rng: off(x, rng), params)))
        moves = [np.abs(np.subtract(a, b)).max() for a, b in zip(numbers, moved, strict=True)]
        farthest = max(farthest, *map(float, moves))
    return times * farthest


def off(x, rng):
    """Each number, wrong by up to its last bit."""
    x = np.asarray(x)
    return x * (1 + np.float32(EPS) * (2 * rng.random(x.shape, np.float32) - 1))


def last_bits(tree, *, bits=16):
    """A tolerance for what is added to or taken from numbers of this size: their last bits."""
    return bits * EPS * max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))
