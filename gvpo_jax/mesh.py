"""The device mesh and the one table that says how arrays lie on it."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gvpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
GROUPS = P(("data", "fsdp"))  # batches are cut over their groups

# First match wins; a leaf of another rank (optimizer counters, factored moments) is replicated.
LAYOUT: tuple[tuple[str, P], ...] = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"head/kernel$", P("fsdp", "tensor")),
    (r"(q|k|v|gate|up)/kernel$", P("fsdp", "tensor")),
    (r"(o|down)/kernel$", P("tensor", "fsdp")),
    (r"(q|k|v|gate|up)/bias$", P("tensor")),
    (r"(o|down)/bias$", P(None)),
    (r"scale$", P(None)),
)


def make_mesh(*, data: int = 1, fsdp: int = -1, tensor: int = 1) -> Mesh:
    """A mesh of all devices with axes `data`, `fsdp`, `tensor`; one size may be -1: what is left.

    Raises:
        UserError: the sizes do not multiply to a number of devices that is there.
    """
    sizes, available = [data, fsdp, tensor], len(jax.devices())
    asked = dict(zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh sizes are positive, with one -1 at most, got {asked}")
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = available // given
    uneven = -1 in asked.values() and available % given
    if math.prod(sizes) == 0 or given > available or uneven:
        raise UserError(f"mesh {asked} does not fit {available} devices")
    devices = jax.devices()[: math.prod(sizes)]
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """A `NamedSharding` for every leaf of a tree of parameters or optimizer state, from `LAYOUT`.

    Raises:
        UserError: an axis of an array does not divide over the devices along its mesh axis.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, path_name(path), np.shape(leaf))), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Groups cut over `data` and `fsdp`; everything inside a group stays together."""
    return NamedSharding(mesh, GROUPS)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def group_shards(mesh: Mesh) -> int:
    """The number of parts a batch is cut into: its groups must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/0/attn/q/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    spec = next((spec for pattern, spec in LAYOUT if re.search(pattern, name)), P())
    if len(spec) != len(shape):
        return P()
    spec = P(*(None if size == 1 else axis for size, axis in zip(shape, spec, strict=True)))
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name} of shape {shape} does not divide over mesh axis "
                f"{axis}={mesh.shape[axis]}; choose a size that divides {size}"
            )
    return spec
