"""What samples in this process: the decoder that is trained, or one cut otherwise."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gvpo_jax.errors import UserError
from gvpo_jax.models.config import ModelConfig
from gvpo_jax.models.decoder import DecoderConfig, DecoderFns, param_shapes
from gvpo_jax.parallel.layout import shardings
from gvpo_jax.parallel.mesh import check_hosts
from gvpo_jax.rollout.engine import RolloutConfig
from gvpo_jax.rollout.inprocess import SamplingModel


def sampling_model(
    options: RolloutConfig,
    model: ModelConfig,
    shape: DecoderConfig,
    mesh: Mesh,
    trained: DecoderFns,
) -> SamplingModel:
    """What samples in this process: the decoder that is trained, or one cut otherwise.

    Raises:
        UserError: `rollout.tensor` does not divide the devices, or a host's.
    """
    if options.tensor is None:
        return SamplingModel(trained, mesh)
    if mesh.size % options.tensor:
        raise UserError(f"rollout.tensor={options.tensor} does not divide {mesh.size} devices")
    # Neighbours along the last axes, in the same order: XLA takes no other beside the training's.
    grid = mesh.devices.reshape(mesh.size // options.tensor, 1, options.tensor)
    own = Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
    check_hosts(own, "rollout.tensor")
    dtype, layout = jnp.dtype(model.dtype), shardings(own, param_shapes(shape))
    prepare = jax.jit(functools.partial(copy_in, dtype), out_shardings=layout)
    return SamplingModel(model.functions(shape, own, options.cache_dtype), own, prepare)


def copy_in(dtype, params):
    """Parameters in another dtype, in memory of their own."""
    return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params)
