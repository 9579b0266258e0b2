"""The device mesh, and the tables that say how arrays lie on it."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gvpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Parameters, and what has their paths and shapes, such as moments. First match wins; a leaf of
# another rank (optimizer counters, factored moments) is replicated.
LAYOUT: tuple[tuple[str, P], ...] = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"head/kernel$", P("fsdp", "tensor")),
    (r"(q|k|v|gate|up)/kernel$", P("fsdp", "tensor")),
    (r"(o|down)/kernel$", P("tensor", "fsdp")),
    (r"(q|k|v|gate|up)/bias$", P("tensor")),
    (r"(o|down)/bias$", P(None)),
    (r"scale$", P(None)),
)

# Batches, and what decoding keeps. "groups" and "completions" stand for the axes that `batch_axes`
# finds; heads that do not divide over `tensor` stay whole.
BATCH_LAYOUT: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(^|/)(prompts|prompt_lengths|prompt_ids|prompt_hidden)$", ("groups",)),
    (r"prefix/.*(keys|values)(/(whole|scale))?$", ("groups", "tensor")),  # [g, n, p, d]
    (r"prefix/", ("groups",)),
    (r"cache/", ("groups", "completions", "tensor")),  # [g, k, n, t, d]
    (r"", ("groups", "completions")),
)

# What the decoder computes on the way, by `models.decoder.DecoderOptions`'s names.
ACTIVATION_LAYOUT: dict[str, tuple[str | None, ...]] = {
    # [g, k, t, d], cut as the embedding is, so that looking up moves tokens and not the table
    "embedded": ("groups", "completions", None, "fsdp"),
    "residual": ("groups", "completions"),  # [g, k, t, d]
    "heads": ("groups", "completions", None, "tensor"),  # [g, k, t, h, d]
    "mlp": ("groups", "completions", None, "tensor"),  # [g, k, t, f]
    "table": ("tensor", None),  # [v, d], the head: whole along fsdp while it is in use
}


def make_mesh(
    *,
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    dcn: tuple[int, int, int] = (-1, 1, 1),
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `tensor`.

    Args:
        data, fsdp, tensor: devices along each axis inside a slice, where the fast network is; one
            may be -1: what is left.
        dcn: slices along each axis; one may be -1: what is left. An axis is as long as the product.
        devices: default: all.

    Raises:
        UserError: the sizes do not multiply to a number of devices or slices that is there.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    outer = _fill(dict(zip((f"dcn_{axis}" for axis in AXES), dcn, strict=True)), slices, "slices")
    inner = _fill(
        dict(zip(AXES, (data, fsdp, tensor), strict=True)), len(devices) // slices, "devices"
    )
    if (math.prod(inner) * slices != len(devices) and slices > 1) or math.prod(outer) != slices:
        raise UserError(f"a mesh over {slices} slices must use all {len(devices)} devices")
    if len({device.process_index for device in devices}) == 1:
        devices = devices[: math.prod(inner)]
        return jax.make_mesh(inner, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    # A host's chips side by side, so that it holds whole rows of a batch, one after the other.
    # JAX's own order follows the torus alone, in which hosts are blocks.
    ordered = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id))[
        : math.prod(inner) * slices
    ]
    grid = np.array(ordered).reshape(*outer, *inner).transpose(0, 3, 1, 4, 2, 5)
    sizes = [o * i for o, i in zip(outer, inner, strict=True)]
    return Mesh(grid.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def check_hosts(mesh: Mesh, setting: str) -> None:
    """That no row of a batch lies on several hosts: each host builds its own rows.

    Raises:
        UserError: it does; names the setting.
    """
    for row in mesh.devices.reshape(-1, mesh.shape["tensor"]):
        hosts = {device.process_index for device in row}
        if len(hosts) > 1:
            raise UserError(
                f"{setting}={mesh.shape['tensor']} is more than the chips of one host have in "
                f"common: it must divide their number; here a row lies on {len(hosts)} hosts"
            )


def shardings(mesh: Mesh, tree: Any) -> Any:
    """A `NamedSharding` for every leaf of a tree of parameters or optimizer state, from `LAYOUT`.

    Raises:
        UserError: an axis of an array does not divide over the devices along its mesh axis.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, path_name(path), np.shape(leaf))), tree
    )


def batch_shardings(mesh: Mesh, tree: Any, groups: int, k: int) -> Any:
    """A `NamedSharding` for every array of a batch of [groups, k], from `BATCH_LAYOUT`.

    Raises:
        UserError: as for `batch_axes`.
    """
    over_groups, over_k = batch_axes(mesh, groups, k)
    stands_for = {"groups": over_groups or None, "completions": over_k or None, "tensor": "tensor"}

    def sharding(path, leaf):
        name, shape = path_name(path), np.shape(leaf)
        axes = next(axes for pattern, axes in BATCH_LAYOUT if re.search(pattern, name))
        spec = [stands_for[axis] for axis in axes[: len(shape)]]
        for place, axis in enumerate(spec):
            if axis == "tensor" and shape[place] % mesh.shape["tensor"]:
                spec[place] = None
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map_with_path(sharding, tree)


def batch_axes(mesh: Mesh, groups: int, k: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that a batch's groups are cut over, and those for the completions in a group.

    Whole groups stay together where they can: the first of groups over `data` and `fsdp`, groups
    over `data` and completions over `fsdp`, completions over both, that divides.

    Raises:
        UserError: none does.
    """
    for over_groups, over_k in ((("data", "fsdp"), ()), (("data",), ("fsdp",)), ((), AXES[:2])):
        if groups % _size(mesh, over_groups) == 0 and k % _size(mesh, over_k) == 0:
            return over_groups, over_k
    shards = group_shards(mesh)
    raise UserError(
        f"{groups} groups of {k} completions do not divide over data x fsdp = "
        f"{mesh.shape['data']} x {mesh.shape['fsdp']} devices; use a multiple of {shards} groups"
    )


def constrain_activation(mesh: Mesh, name: str, x: jax.Array) -> jax.Array:
    """Lays out an activation while tracing, from `ACTIVATION_LAYOUT`.

    Without it XLA may cut the hidden axis as the parameters are, and hold every group everywhere.
    """
    over_groups, over_k = activation_axes(mesh, *x.shape[:2])
    layout = ACTIVATION_LAYOUT[name]
    spec: list[Any] = []
    for size, axis in zip(x.shape, layout, strict=False):
        if axis in ("groups", "completions"):
            axes = over_groups if axis == "groups" else over_k
            spec.append(tuple(a for a in axes if a not in layout))
        else:
            spec.append(None if axis is None or size % mesh.shape[axis] else axis)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


def activation_axes(mesh: Mesh, groups: int, k: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """As `batch_axes`; where nothing divides, as with few prompts, what does or nothing is cut."""
    try:
        return batch_axes(mesh, groups, k)
    except UserError:
        return (("data",) if groups % mesh.shape["data"] == 0 else ()), ()


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def group_shards(mesh: Mesh) -> int:
    """The parts a batch is cut into where its groups stay whole."""
    return _size(mesh, ("data", "fsdp"))


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/0/attn/q/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _fill(asked: dict[str, int], available: int, what: str) -> tuple[int, ...]:
    """The sizes, what is left in place of -1."""
    sizes = list(asked.values())
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh sizes are positive, with one -1 at most, got {asked}")
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = available // given
    if math.prod(sizes) == 0 or given > available or (-1 in asked.values() and available % given):
        raise UserError(f"mesh {asked} does not fit {available} {what}")
    return tuple(sizes)


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


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
