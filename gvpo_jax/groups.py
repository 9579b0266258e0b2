"""Between flat rows and groups: k completions of a prompt stand side by side on the group axis."""

import jax


def group(x: jax.Array, k: int) -> jax.Array:
    """Fold flat rows into groups: `[G*k, ...] -> [G, k, ...]`; a prompt's rows are neighbours.

    Raises:
        ValueError: k < 1, or the number of rows is not a multiple of k.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if x.ndim == 0 or x.shape[0] % k:
        raise ValueError(f"rows of shape {x.shape} do not divide into groups of k={k}")
    return x.reshape(x.shape[0] // k, k, *x.shape[1:])


def ungroup(x: jax.Array) -> jax.Array:
    """Unfold groups into flat rows: `[G, k, ...] -> [G*k, ...]`, the inverse of `group`.

    Raises:
        ValueError: x has fewer than two axes.
    """
    if x.ndim < 2:
        raise ValueError(f"expected [G, k, ...], got shape {x.shape}")
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
