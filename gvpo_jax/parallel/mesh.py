"""The device mesh, from the config section `mesh`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from gvpo_jax.errors import Page, UserError
from gvpo_jax.settings import setting

AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, inside a slice and over slices (dcn); -1 takes what is left."""

    data: int = setting(1, "Copies of everything.", free=True)
    fsdp: int = setting(-1, "Parameters, moments and batches are cut.", free=True)
    tensor: int = setting(1, "Layers are cut.", free=True)
    dcn_data: int = setting(-1, "As data, over slices.", free=True)
    dcn_fsdp: int = setting(1, "As fsdp, over slices.", free=True)
    dcn_tensor: int = setting(1, "As tensor, over slices.", free=True)

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """A mesh with axes `data`, `fsdp`, `tensor`, each as long as its two sizes multiply to.

        Args:
            devices: default: all.

        Raises:
            UserError: the sizes do not multiply to a number of devices or slices that is there.
        """
        devices = all_devices() if devices is None else devices
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        outer = self._sizes("dcn_", slices, "slices")
        inner = self._sizes("", len(devices) // slices, "devices")
        if (math.prod(inner) * slices != len(devices) and slices > 1) or math.prod(outer) != slices:
            raise UserError(f"a mesh over {slices} slices must use all {len(devices)} devices")
        if len({device.process_index for device in devices}) == 1:
            devices = devices[: math.prod(inner)]
            return jax.make_mesh(inner, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
        # A host's chips side by side, so that it holds whole rows of a batch, one after the other.
        # JAX's own order follows the torus alone, in which hosts are blocks.
        ordered = sorted(
            devices, key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id)
        )[: math.prod(inner) * slices]
        grid = np.array(ordered).reshape(*outer, *inner).transpose(0, 3, 1, 4, 2, 5)
        return Mesh(grid.reshape(np.multiply(outer, inner)), AXES, axis_types=(AxisType.Auto,) * 3)

    def _sizes(self, prefix: str, available: int, what: str) -> tuple[int, ...]:
        """Of the axes, what is left in place of -1."""
        asked = {f"{prefix}{axis}": getattr(self, f"{prefix}{axis}") for axis in AXES}
        sizes = list(asked.values())
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise UserError(f"mesh sizes are positive, with one -1 at most, got {asked}")
        given = math.prod(size for size in sizes if size != -1)
        if -1 in sizes:
            sizes[sizes.index(-1)] = available // given
        left_over = -1 in asked.values() and available % given
        if math.prod(sizes) == 0 or given > available or left_over:
            raise UserError(f"mesh {asked} does not fit {available} {what}")
        return tuple(sizes)


def all_devices() -> Sequence[Any]:
    """JAX's devices.

    Raises:
        UserError: JAX can't start on what JAX_PLATFORMS names; says what would help.
    """
    try:
        return jax.devices()
    except Exception as error:  # RuntimeError; a plugin that is missing fails an assertion
        asked = jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]
        reason = " ".join(str(error).partition(" (set JAX_PLATFORMS")[0].split())
        extras = [extra for platform, extra in _EXTRAS.items() if platform in asked.split(",")]
        install = f"install its plugin (pip install 'jax[{extras[0]}]'), " if extras else ""
        raise UserError(
            f"JAX can't start on JAX_PLATFORMS={asked}: {reason or 'its plugin is missing'}; "
            f"{install}or use this machine's processor: JAX_PLATFORMS=cpu",
            page=Page.DEVICES,
        ) from None


_EXTRAS = {"tpu": "tpu", "cuda": "cuda13", "gpu": "cuda13"}


def check_hosts(mesh: Mesh, setting: str) -> None:
    """Raise UserError, naming the setting, where a row of a batch lies on several hosts.

    Each host builds its own rows.
    """
    for row in mesh.devices.reshape(-1, mesh.shape["tensor"]):
        hosts = {device.process_index for device in row}
        if len(hosts) > 1:
            raise UserError(
                f"{setting}={mesh.shape['tensor']} is more than the chips of one host have in "
                f"common: it must divide their number; here a row lies on {len(hosts)} hosts"
            )
