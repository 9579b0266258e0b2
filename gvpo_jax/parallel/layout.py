"""How arrays lie on the mesh: tables by path, and what a batch must be filled up to."""

import math
import re
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import to_devices
from gvpo_jax.parallel.mesh import AXES

Axes = tuple[tuple[str, ...], tuple[str, ...]]
STACKED = "stacked_layers"  # see `gvpo_jax.models.stacking`: arrays below it may have an axis more

# Parameters, and what has their paths and shapes, such as moments. First match wins; a leaf of
# another rank (optimizer counters, factored moments) is replicated. A quantised kernel is cut as
# the kernel is, and its scales with it.
LAYOUT: tuple[tuple[str, P], ...] = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"head/kernel$", P("fsdp", "tensor")),
    (r"experts/(gate|up)/kernel$", P("tensor", "fsdp", None)),  # [e, d, f]
    (r"experts/down/kernel$", P("tensor", None, "fsdp")),
    (r"router/kernel$", P("fsdp", None)),
    (r"(q|k|v|gate|up)/kernel(/qvalue|/scale)?$", P("fsdp", "tensor")),
    (r"(o|down)/kernel(/qvalue|/scale)?$", P("tensor", "fsdp")),
    (r"(q|k|v|gate|up)/lora_a$", P("fsdp", None)),
    (r"(q|k|v|gate|up)/lora_b$", P(None, "tensor")),
    (r"(o|down)/lora_a$", P("tensor", None)),
    (r"(o|down)/lora_b$", P(None, "fsdp")),
    (r"(q|k|v|gate|up)/bias$", P("tensor")),
    (r"(o|down)/bias$", P(None)),
    (r"(scale|scalar)$", P(None)),
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


def shardings(mesh: Mesh, tree: Any) -> Any:
    """A `NamedSharding` for every leaf of a tree of parameters or optimizer state, from `LAYOUT`.

    Raises:
        UserError: an array's axis does not divide over the devices along its mesh axis.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(mesh, path_name(path), np.shape(leaf))), tree
    )


def batch_shardings(mesh: Mesh, tree: Any, groups: int, k: int) -> Any:
    """A `NamedSharding` for every array of a batch of [groups, k], from `BATCH_LAYOUT`.

    Raises:
        UserError: the groups do not divide over the mesh, see `check_batch`.
    """
    over_groups, over_k = batch_axes(mesh, groups, k) or _refuse(mesh, groups, k)
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


def batch_axes(mesh: Mesh, groups: int, k: int) -> Axes | None:
    """The mesh axes that a batch's groups are cut over, and those for the completions in a group.

    Whole groups stay together where they can: the first of groups over `data` and `fsdp`, groups
    over `data` and completions over `fsdp`, completions over both, that divides; None: none does.
    """
    for over_groups, over_k in ((("data", "fsdp"), ()), (("data",), ("fsdp",)), ((), AXES[:2])):
        if groups % _size(mesh, over_groups) == 0 and k % _size(mesh, over_k) == 0:
            return over_groups, over_k
    return None


def fill_up(mesh: Mesh, groups: int, k: int) -> int:
    """The number that this process must fill its groups up to, so that all divide."""
    processes = jax.process_count()
    axes = batch_axes(mesh, groups * processes, k)
    if axes and _rows_are_own(mesh, axes[0], groups * processes):
        return groups
    unit = -(-group_shards(mesh) // processes)
    return -(-groups // unit) * unit


def check_batch(mesh: Mesh, groups: int, k: int, name: str) -> None:
    """Raise UserError where a batch of all processes does not divide, and say what would.

    name: what the message begins with.
    """
    over_groups, _ = batch_axes(mesh, groups, k) or _refuse(mesh, groups, k, f"{name}: ")
    if not _rows_are_own(mesh, over_groups, groups):
        raise UserError(
            f"{name}: {groups} groups do not lie on {jax.process_count()} processes in equal "
            "parts: keep mesh.tensor within the devices of one process, and the groups of an "
            "update (and of each micro-batch) a multiple of the devices along data x fsdp"
        )


def lanes(groups: int, k: int, slots: int | None, shards: int = 1) -> tuple[tuple[int, int], int]:
    """Lanes and rows in each that sampling draws in, and the groups that these are filled up to.

    At most `slots` completions are drawn at a time, but for a lane in every shard. A lane's rows
    share the reading of its prompt; but they wait for each other where the lane moves on to its
    next group: of equally many slots, two rows a lane are preferred. Where the groups are not cut
    over the shards, because they don't divide, all completions are drawn at once.
    """
    if slots is None or slots >= groups * k or groups % shards:
        return (groups, k), groups

    def filled(count: int) -> int:
        return -(-groups // count) * count

    def used(size: tuple[int, int]) -> tuple[float, int]:
        """Rows that do useful work; the waiting was simulated with lognormal lengths."""
        n, r = size
        waiting = 6 / (4 + r) if r > 2 and n < groups else 1
        return n * r * waiting * groups / filled(n), -abs(r - 2)

    sizes = [(n, min(slots // n, k)) for n in range(shards, groups + 1, shards) if n <= slots]
    size = max(sizes, key=used, default=(shards, 1))
    return size, filled(size[0])


def place_params(mesh: Mesh, tree: Any) -> Any:
    """Arrays of parameters, on the host or on devices, laid out on the mesh."""

    def place(x, sharding):
        if isinstance(x, jax.Array):
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings(mesh, tree))


def shapes_on(mesh: Mesh, tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of parameters or optimizer state."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings(mesh, tree),
    )


def place_batch(mesh: Mesh, arrays: dict[str, Any], k: int) -> dict[str, Any]:
    """This process's rows of a batch's arrays, among them "prompts", on devices."""
    groups = len(arrays["prompts"]) * jax.process_count()
    return to_devices(arrays, batch_shardings(mesh, arrays, groups, k))


def constrain_batch(mesh: Mesh, tree: Any, groups: int, k: int) -> Any:
    """Lays out arrays of a batch while tracing."""
    layout = batch_shardings(mesh, tree, groups, k)
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, layout)


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


def activation_axes(mesh: Mesh, groups: int, k: int) -> Axes:
    """As `batch_axes`; where nothing divides, as with few prompts, what does or nothing is cut."""
    alone = (("data",) if groups % mesh.shape["data"] == 0 else ()), ()
    return batch_axes(mesh, groups, k) or alone


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def group_shards(mesh: Mesh) -> int:
    """The parts a batch is cut into where its groups stay whole."""
    return _size(mesh, ("data", "fsdp"))


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/0/attn/q/kernel` for a key path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _size(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    spec = next((spec for pattern, spec in LAYOUT if re.search(pattern, name)), P())
    if STACKED in name.split("/") and len(spec) == len(shape) - 1:
        spec = P(None, *spec)
    if len(spec) != len(shape):
        return P()
    # A kernel has fewer scales than rows: they need not divide.
    few = name.endswith("kernel/scale")
    spec = P(
        *(
            None if size == 1 or (few and axis is not None and size % mesh.shape[axis]) else axis
            for size, axis in zip(shape, spec, strict=True)
        )
    )
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise UserError(
                f"{name} of shape {shape} does not divide over mesh axis "
                f"{axis}={mesh.shape[axis]}; choose a size that divides {size}"
            )
    return spec


def _refuse(mesh: Mesh, groups: int, k: int, name: str = "") -> NoReturn:
    raise UserError(
        f"{name}{groups} groups of {k} completions do not divide over data x fsdp = "
        f"{mesh.shape['data']} x {mesh.shape['fsdp']} devices; use a multiple of "
        f"{group_shards(mesh)} groups"
    )


def _rows_are_own(mesh: Mesh, over_groups: tuple[str, ...], groups: int) -> bool:
    """Whether every process's devices hold a part of the groups of their own, without a gap."""
    if jax.process_count() == 1:
        return True
    sharding = NamedSharding(mesh, P(over_groups or None))
    rows = {
        row
        for index in sharding.addressable_devices_indices_map((groups,)).values()
        if index is not None
        for row in range(groups)[index[0]]
    }
    return len(rows) * jax.process_count() == groups and max(rows) - min(rows) + 1 == len(rows)
