"""The config section `model`: what is loaded, and how it is computed."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gvpo_jax.settings import setting

if TYPE_CHECKING:  # a misspelt config should not wait for Flax
    from jax.sharding import Mesh

    from gvpo_jax.models.decoder import DecoderConfig, DecoderFns


@dataclass(frozen=True)
class ModelConfig:
    """The model, and how it is computed."""

    name: str = setting(
        "debug",
        "A hub name, a folder of safetensors, a .gguf file, package://PACKAGE/FILE.gguf, or debug.",
        path="model",
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "Of the computation; parameters stay float32."
    )
    remat: Literal["none", "dots", "layer"] = setting(
        "none",
        "What the backward pass computes again to save memory: nothing, all but products with "
        "weights, or whole layers.",
        free=True,
    )
    attention: Literal["auto", "xla", "splash", "cudnn"] = setting(
        "auto",
        "Of prompts, scoring and training. auto: in bfloat16 splash on TPU and cuDNN on GPU, else "
        "XLA. Splash computes sliding windows and soft caps itself; cuDNN windows, XLA its caps.",
        free=True,
    )

    def functions(self, shape: "DecoderConfig", mesh: "Mesh", cache_dtype: str) -> "DecoderFns":
        """The decoder of this shape as functions for arrays on this mesh.

        cache_dtype: of the keys and values that decoding keeps; "model": as computed.
        """
        import jax
        import jax.numpy as jnp

        from gvpo_jax.models.decoder import DecoderOptions, decoder_fns
        from gvpo_jax.ops.cpu import chunk_bytes_on, product_on
        from gvpo_jax.ops.experts import experts_on
        from gvpo_jax.ops.kernels import attention_on
        from gvpo_jax.parallel.layout import constrain_activation, group_shards, shardings

        dtype = jnp.dtype(self.dtype)
        options = DecoderOptions(
            dtype=dtype,
            remat=self.remat,
            cache_dtype=None if cache_dtype == "model" else jnp.dtype(cache_dtype),
            constrain=functools.partial(constrain_activation, mesh),
            params=lambda tree: jax.lax.with_sharding_constraint(tree, shardings(mesh, tree)),
            attention=attention_on(mesh, self.attention, dtype, shape.head_dim),
            experts=experts_on(mesh),
            product=product_on(mesh),
            chunk_bytes=chunk_bytes_on(mesh),
            shards=group_shards(mesh),
        )
        return decoder_fns(shape, options)
