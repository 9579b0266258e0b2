"""What arithmetic takes place in: float32 or wider, whatever comes in, and clean where masked."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike


def einsum_f32(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` with a float32 result: the hardware's own bfloat16 product, float32 on a CPU.

    XLA's CPU backend refuses some products of bfloat16 arrays with a float32 result, so there the
    arrays are widened first. The choice falls when a program is lowered for its platform.
    """

    def product(a, b):
        # Without HIGHEST, float32 arrays are multiplied as bfloat16 on a TPU, as TF32 on a GPU.
        highest = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, precision=highest)

    if a.dtype == b.dtype == jnp.float32:
        return product(a, b)
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: product(a.astype(jnp.float32), b.astype(jnp.float32)),
        default=product,
    )


def float_type(*arrays: jax.Array) -> jnp.dtype:
    """float32, or float64 where an array is; also for a caller who forbids dtypes to be mixed."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*arrays, jnp.float32)


def valid(x: ArrayLike, where: ArrayLike | None) -> jax.Array:
    """Zeros in place of what does not count: a NaN there reaches neither value nor gradient.

    NumPy's arrays are cleaned by NumPy: `jax_debug_nans` looks at all that goes to a device.
    """
    if where is None:
        return jnp.asarray(x)
    if isinstance(x, jax.Array) or isinstance(where, Tracer):
        x = jnp.asarray(x)
        return jnp.where(jnp.asarray(where).astype(bool), x, jnp.zeros_like(x))
    return jnp.asarray(np.where(np.asarray(where).astype(bool), x, 0))
