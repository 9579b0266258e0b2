"""`attention.causal`, and products with weights, as each kind of hardware computes them best.

Attention on TPU is splash, on GPU cuDNN's. Neither knows of a prefix that several completions
share, so each completion is given the prompt's keys and values in front of its own; these are
computed once all the same. Scores are never whole in memory, but cuDNN is given a mask for each
pair of positions. On a CPU it is `causal` itself, on one key-value head of one group after the
other. The figures behind what is done on a CPU are in experiments/bench/README.md.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gvpo_jax.errors import UserError
from gvpo_jax.ops.attention import Prefix, causal
from gvpo_jax.ops.cpu import AT_ONCE, attend_in_parts
from gvpo_jax.parallel.layout import activation_axes

Attention = Callable[..., jax.Array]
Name = Literal["auto", "xla", "splash", "cudnn"]
_BLOCK, _LANES = 512, 128  # positions that splash works on at once, at most and at least


def attention_on(mesh: Mesh, name: Name, dtype: Any, head_dim: int) -> Attention:
    """`attention.causal`, or a kernel in its place, for arrays on this mesh.

    Args:
        mesh: where the arrays lie.
        name: "auto" takes splash on TPU and cuDNN on GPU for bfloat16, and else XLA: the kernels
            multiply float32 arrays as bfloat16 or not at all.
        dtype: of the computation.
        head_dim: of the model.

    Raises:
        UserError: the kernel does not run on these devices, or not in this dtype.
    """
    platform = mesh.devices.flat[0].platform
    low = jnp.dtype(dtype) == jnp.bfloat16
    if low and platform == "tpu" and name in ("auto", "splash"):
        return functools.partial(on_tpu, mesh)
    if low and _has_cudnn(mesh, head_dim) and name in ("auto", "cudnn"):
        return functools.partial(on_gpu, mesh)
    if name in ("auto", "xla"):
        return functools.partial(on_cpu, mesh) if platform == "cpu" else causal
    home = "a TPU" if name == "splash" else "an NVIDIA GPU from Ampere on, heads up to 128"
    raise UserError(
        f"model.attention={name} needs {home}, and model.dtype=bfloat16; here are "
        f"{platform.upper()} devices and {jnp.dtype(dtype).name}; auto chooses by itself"
    )


def _has_cudnn(mesh: Mesh, head_dim: int) -> bool:
    """Whether its attention runs here, also the backward pass."""
    device = mesh.devices.flat[0]
    version = getattr(device.client, "platform_version", "") if device.platform == "gpu" else ""
    if "cuda" not in version.lower():
        return False
    return float(device.compute_capability) >= 8 and head_dim <= 128 and head_dim % 8 == 0


def on_tpu(
    mesh: Mesh,
    queries_gkthd: jax.Array,
    keys_gknsd: jax.Array,
    values_gknsd: jax.Array,
    prefix: Prefix | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """See `attention.causal`: every device runs splash attention on its groups and heads.

    interpret: run it without a TPU, slowly, to test it.
    """
    kernel = functools.partial(_splash, interpret=interpret)
    return _on_each_device(kernel, mesh, queries_gkthd, keys_gknsd, values_gknsd, prefix)


def on_gpu(
    mesh: Mesh,
    queries_gkthd: jax.Array,
    keys_gknsd: jax.Array,
    values_gknsd: jax.Array,
    prefix: Prefix | None = None,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """See `attention.causal`: every device runs cuDNN's attention on its groups and heads.

    implementation: "xla" computes the same without a GPU, to test it.
    """
    kernel = functools.partial(_cudnn, implementation=implementation)
    return _on_each_device(kernel, mesh, queries_gkthd, keys_gknsd, values_gknsd, prefix)


def on_cpu(
    mesh: Mesh,
    queries_gkthd: jax.Array,
    keys_gknsd: jax.Array,
    values_gknsd: jax.Array,
    prefix: Prefix | None = None,
    *,
    at_once: int = AT_ONCE,
) -> jax.Array:
    """See `attention.causal`: in parts that stay in a processor's cache, if it is much.

    Scores are computed again in the backward pass, and memory is that of one part: new pages cost a
    CPU about as much as computing what goes into them.

    at_once: bytes of scores up to which there is only one part.
    """
    kernel = functools.partial(attend_in_parts, at_once=at_once)
    return _on_each_device(kernel, mesh, queries_gkthd, keys_gknsd, values_gknsd, prefix)


def _on_each_device(kernel, mesh: Mesh, queries_gkthd, keys_gknsd, values_gknsd, prefix):
    g, k, _, heads, _ = queries_gkthd.shape
    over_groups, over_k = activation_axes(mesh, g, k)
    tensor = mesh.shape["tensor"]
    over_heads = "tensor" if keys_gknsd.shape[2] % tensor == heads % tensor == 0 else None
    own, shared = P(over_groups, over_k, over_heads), P(over_groups, over_heads)
    queries = P(over_groups, over_k, None, over_heads)
    prompt = None if prefix is None else (shared, shared, P(over_groups))
    run = jax.shard_map(
        kernel,
        mesh=mesh,
        in_specs=(queries, own, own, prompt),
        out_specs=queries,
        check_vma=False,
    )
    return run(queries_gkthd, keys_gknsd, values_gknsd, prefix and tuple(prefix))


def _cudnn(queries_gkthd, keys_gknsd, values_gknsd, prefix, *, implementation):
    g, k, t, h, d = queries_gkthd.shape
    keys, values, seen_gs = _whole(keys_gknsd, values_gknsd, prefix and Prefix(*prefix))
    s = keys.shape[3]
    more = t % 2, s % 2  # cuDNN's backward pass wants even lengths
    mask_ts = np.arange(s) <= np.arange(t + more[0])[:, None] + s - t
    mask = jnp.asarray(mask_ts)[None] & seen_gs[:, None]
    mask = jnp.repeat(jnp.pad(mask, ((0, 0), (0, 0), (0, more[1]))), k, axis=0)[:, None]
    queries = jnp.pad(queries_gkthd.reshape(g * k, t, h, d), ((0, 0), (0, more[0]), (0, 0), (0, 0)))

    def ready(x_gknsd):
        x = jnp.swapaxes(x_gknsd.reshape(g * k, -1, s, d), 1, 2)
        return jnp.pad(x, ((0, 0), (0, more[1]), (0, 0), (0, 0)))

    out = jax.nn.dot_product_attention(
        queries, ready(keys), ready(values), mask=mask, implementation=implementation
    )
    return out[:, :t].reshape(g, k, t, h, d)


def _splash(queries_gkthd, keys_gknsd, values_gknsd, prefix, *, interpret):
    *_, t, h, d = queries_gkthd.shape
    keys, values, seen_gs = _whole(keys_gknsd, values_gknsd, prefix and Prefix(*prefix))
    s = keys.shape[3]
    rows, columns = _blocks(t), _blocks(s)
    kernel = _kernel(h, rows, columns, s - t, interpret)
    queries = jnp.swapaxes(queries_gkthd * d**-0.5, 2, 3)  # [g, k, h, t, d]
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, rows[0] - t), (0, 0)))
    more = ((0, 0), (0, 0), (0, 0), (0, columns[0] - s), (0, 0))
    keys, values = jnp.pad(keys, more), jnp.pad(values, more)
    segments = splash.SegmentIds(
        q=jnp.ones((queries.shape[0], rows[0]), jnp.int32),
        kv=jnp.pad(seen_gs, ((0, 0), (0, columns[0] - s))).astype(jnp.int32),
    )
    of_group = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out: Any = jax.vmap(of_group)(queries, keys, values, segments)
    return jnp.swapaxes(out, 2, 3)[:, :, :t]


def _whole(keys_gknsd, values_gknsd, prefix: Prefix | None):
    """Keys and values with the prompt's in front of each completion's, and which ones count."""
    g, k, n, s, d = keys_gknsd.shape
    seen = jnp.ones((g, s), bool)
    if prefix is None:
        return keys_gknsd, values_gknsd, seen

    def in_front(shared_gnpd, own):
        shared = jnp.broadcast_to(shared_gnpd[:, None], (g, k, n, shared_gnpd.shape[2], d))
        return jnp.concatenate([shared, own], axis=3)

    seen = jnp.concatenate([prefix.mask, seen], axis=1)
    return in_front(prefix.keys, keys_gknsd), in_front(prefix.values, values_gknsd), seen


def _blocks(length: int) -> tuple[int, int]:
    """The length rounded up to whole lanes, and the largest block that divides it."""
    whole = -(-length // _LANES) * _LANES
    return whole, next(size for size in range(_BLOCK, 0, -_LANES) if whole % size == 0)


def _kernel(heads: int, rows: tuple[int, int], columns: tuple[int, int], offset: int, interpret):
    (length, block_q), (width, block_kv) = rows, columns
    mask = splash.CausalMask((length, width), offset=offset)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
