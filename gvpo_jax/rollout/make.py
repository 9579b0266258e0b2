"""What samples in this process: the decoder that is trained, or one cut otherwise."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gvpo_jax.errors import UserError
from gvpo_jax.models.config import LoraConfig, ModelConfig
from gvpo_jax.models.decoder import DecoderConfig, DecoderFns, param_shapes
from gvpo_jax.models.lora import Params, join, merge
from gvpo_jax.models.quantized import is_quantized
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
    frozen: Params | None = None,
) -> SamplingModel:
    """What samples in this process: the decoder that is trained, or one cut otherwise.

    An adapter is merged into the weights, once for all that is sampled with them, or is not.

    Args:
        options: how to sample.
        model: how the model is computed.
        shape: its shape.
        mesh: where it is trained.
        trained: the decoder that is trained.
        frozen: parameters beside those that are trained.

    Raises:
        UserError: `rollout.tensor` does not divide the devices, or a host's.
    """
    own = mesh if options.tensor is None else _mesh_of(options.tensor, mesh)
    lora, dtype, shapes = model.lora.form(), jnp.dtype(model.dtype), model.param_shapes(shape)
    merges = lora is not None and options.adapter == "merged"
    if own is mesh and not merges:
        return SamplingModel(trained, mesh, frozen=frozen)

    def added(params, frozen):
        if lora is None or not merges:
            return params
        kernels = merge(frozen, params, lora.scale, dtype)
        return jax.lax.with_sharding_constraint(kernels, shardings(own, kernels))

    if merges:
        model = dataclasses.replace(model, lora=LoraConfig(), adapter=None)
    functions = model.functions(shape, own, options.cache_dtype)
    if own is mesh:  # all but the merged kernels lies there already
        added = jax.jit(added)
        return SamplingModel(
            functions, own, lambda params, frozen: join(frozen, added(params, frozen)), frozen
        )

    def whole(params, frozen=None):
        return copy_in(dtype, join(frozen, added(params, frozen)))

    layout = shardings(own, jax.eval_shape(whole, *reversed(shapes)))
    return SamplingModel(functions, own, jax.jit(whole, out_shardings=layout), frozen)


def check_layout(options: RolloutConfig, shape: DecoderConfig, mesh: Mesh) -> None:
    """That a model of this shape can be cut as `options` say; cheap, for before it is loaded.

    Raises:
        UserError: `rollout.tensor` does not divide the devices, or an axis of the model's weights.
    """
    if options.tensor is not None:
        shardings(_mesh_of(options.tensor, mesh), param_shapes(shape))


def _mesh_of(tensor: int, mesh: Mesh) -> Mesh:
    """The devices with so many of them along `tensor`."""
    if mesh.size % tensor:
        raise UserError(f"rollout.tensor={tensor} does not divide {mesh.size} devices")
    # Neighbours along the last axes, in the same order: XLA takes no other beside the training's.
    grid = mesh.devices.reshape(mesh.size // tensor, 1, tensor)
    own = Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
    check_hosts(own, "rollout.tensor")
    return own


def copy_in(dtype, params):
    """Parameters in another dtype, in memory of their own; quantised ones as they are."""

    def copied(x):
        return jax.tree.map(jnp.copy, x) if is_quantized(x) else jnp.array(x, dtype, copy=True)

    return jax.tree.map(copied, params, is_leaf=is_quantized)
