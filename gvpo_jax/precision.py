"""Products of low-precision arrays, summed and returned in float32 on every backend."""

import jax
import jax.numpy as jnp


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
