"""How logits are cut on each kind of device, where they are more than a device keeps."""

from typing import Any

from jax.sharding import Mesh

from gvpo_jax.logprobs import CHUNK_BYTES


def chunks_on(mesh: Mesh) -> dict[str, Any]:
    """The limits of logits that `DecoderFns` names, for arrays on this mesh.

    On a TPU the head is cut, which is faster by the compiler's clock (the figures are in
    experiments/tpu_compile/README.md); but not where it lies over `tensor`, and so is cut already.
    """
    platform = mesh.devices.flat[0].platform
    return {
        "chunk_bytes": CHUNK_BYTES // 4 if platform == "cpu" else CHUNK_BYTES,
        "vocabulary_blocks": platform == "tpu" and mesh.shape["tensor"] == 1,
    }
