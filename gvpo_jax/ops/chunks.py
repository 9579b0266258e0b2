"""How logits are cut on each kind of device, where they are more than a device keeps."""

import functools
from typing import Any

import jax
from jax.sharding import Mesh

from gvpo_jax.logprobs import CHUNK_BYTES
from gvpo_jax.parallel.layout import shardings


def chunks_on(mesh: Mesh) -> dict[str, Any]:
    """The limits of logits that `DecoderFns` names, for arrays on this mesh.

    On a TPU the head is cut, which is faster by the compiler's clock (the figures are in
    experiments/tpu_compile/README.md); but not where it lies over `tensor`, and so is cut already.
    """
    platform = mesh.devices.flat[0].platform
    return {
        "chunk_bytes": CHUNK_BYTES // 4 if platform == "cpu" else CHUNK_BYTES,
        "vocabulary_blocks": platform == "tpu" and mesh.shape["tensor"] == 1,
        "head_layout": functools.partial(_as_the_embedding, mesh),
    }


def _as_the_embedding(mesh: Mesh, x: jax.Array) -> jax.Array:
    """Rows of a head's gradient, cut over the devices as an embedding's are."""
    lies = shardings(mesh, {"embed": {"embedding": x}})["embed"]["embedding"]
    return jax.lax.with_sharding_constraint(x, lies)
