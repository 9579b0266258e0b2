"""`attention.causal` as each kind of hardware computes it best.

Attention on TPU is splash, on GPU cuDNN's. Neither knows of a prefix that several completions
share, so each completion is given the prompt's keys and values in front of its own; these are
computed once all the same. Scores are never whole in memory, but cuDNN is given a mask for each
pair of positions. What a CPU does is in `gvpo_jax.ops.cpu`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh

from gvpo_jax.errors import UserError
from gvpo_jax.ops.attention import Prefix, causal, on_each_device
from gvpo_jax.ops.cpu import on_cpu

Attention = Callable[..., jax.Array]
Name = Literal["auto", "xla", "splash", "cudnn"]
_BLOCK, _LANES = 512, 128  # positions that splash works on at once, at most and at least


def attention_on(mesh: Mesh, name: Name, dtype: Any, head_dim: int) -> Attention:
    """`attention.causal`, or a kernel in its place, for arrays on this mesh.

    Args:
        mesh: where the arrays lie.
        name: "auto" takes splash on TPU, but for short sequences, and cuDNN on GPU for bfloat16,
            and else XLA: the kernels multiply float32 arrays as bfloat16 or not at all.
        dtype: of the computation.
        head_dim: of the model.

    Raises:
        UserError: the kernel does not run on these devices, or not in this dtype.
    """
    platform = mesh.devices.flat[0].platform
    low = jnp.dtype(dtype) == jnp.bfloat16
    if low and platform == "tpu" and name in ("auto", "splash"):
        splash_here = functools.partial(on_tpu, mesh)
        return functools.partial(_by_size, splash_here) if name == "auto" else splash_here
    if low and _has_cudnn(mesh, head_dim) and name in ("auto", "cudnn"):
        return functools.partial(on_gpu, mesh)
    if name in ("auto", "xla"):
        return functools.partial(on_cpu, mesh) if platform == "cpu" else causal
    home = "a TPU" if name == "splash" else "an NVIDIA GPU from Ampere on, heads up to 128"
    raise UserError(
        f"model.attention={name} needs {home}, and model.dtype=bfloat16; here are "
        f"{platform.upper()} devices and {jnp.dtype(dtype).name}; auto chooses by itself"
    )


def _by_size(splash_here, queries_gkthd, keys_gknsd, values_gknsd, prefix, **options):
    """See `attention.causal`: XLA's where the scores of a head fill at most half a tile of splash.

    By the compiler's clock that is where it is faster (experiments/tpu_compile/README.md).
    """
    seen = keys_gknsd.shape[3] + (0 if prefix is None else prefix.keys.shape[2])
    short = queries_gkthd.shape[2] * seen <= _LANES**2 // 2
    attention = causal if short else splash_here
    return attention(queries_gkthd, keys_gknsd, values_gknsd, prefix, **options)


def _has_cudnn(mesh: Mesh, head_dim: int) -> bool:
    """Whether its attention runs here, also the backward pass."""
    device = mesh.devices.flat[0]
    version = getattr(device.client, "platform_version", "") if device.platform == "gpu" else ""
    if "cuda" not in version.lower():
        return False
    return float(device.compute_capability) >= 8 and head_dim <= 128 and head_dim % 8 == 0


@on_each_device
def on_gpu(
    queries_gkthd,
    keys_gknsd,
    values_gknsd,
    prefix,
    *,
    window: int | None = None,
    cap: float | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
):
    """See `attention.causal`: cuDNN's attention; it knows no cap, so where one is, XLA's.

    implementation: "xla" computes the same without a GPU, to test it.
    """
    if cap is not None:
        return causal(queries_gkthd, keys_gknsd, values_gknsd, prefix, window=window, cap=cap)
    g, k, t, h, d = queries_gkthd.shape
    keys, values, seen_gs = _whole(keys_gknsd, values_gknsd, prefix, window)
    s = keys.shape[3]
    even_t, even_s = t + t % 2, s + s % 2  # as cuDNN's backward pass wants them
    place_t = np.arange(even_t)[:, None] + s - t
    mask_ts = np.arange(s) <= place_t
    if window is not None:
        mask_ts &= np.arange(s) > place_t - window
    mask = jnp.asarray(mask_ts)[None] & seen_gs[:, None]
    mask = jnp.repeat(_filled(mask, 2, even_s), k, axis=0)[:, None]
    queries = _filled(queries_gkthd.reshape(g * k, t, h, d), 1, even_t)

    def ready(x_gknsd):
        return _filled(jnp.swapaxes(x_gknsd.reshape(g * k, -1, s, d), 1, 2), 1, even_s)

    out = jax.nn.dot_product_attention(
        queries, ready(keys), ready(values), mask=mask, implementation=implementation
    )
    return out[:, :t].reshape(g, k, t, h, d)


@on_each_device
def on_tpu(
    queries_gkthd,
    keys_gknsd,
    values_gknsd,
    prefix,
    *,
    window: int | None = None,
    cap: float | None = None,
    interpret: bool = False,
):
    """See `attention.causal`: splash attention.

    interpret: run it without a TPU, slowly, to test it.
    """
    *_, t, h, d = queries_gkthd.shape
    keys, values, seen_gs = _whole(keys_gknsd, values_gknsd, prefix, window)
    s = keys.shape[3]
    (rows, q), (columns, kv) = _blocks(t), _blocks(s)
    mask = splash.CausalMask((rows, columns), offset=s - t)
    if window is not None:
        mask = splash.LocalMask((rows, columns), (window - 1, 0), offset=s - t)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * h),
        block_sizes=splash.BlockSizes(
            block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    queries = _filled(jnp.swapaxes(queries_gkthd * d**-0.5, 2, 3), 3, rows)  # [g, k, h, t, d]
    keys, values = _filled(keys, 3, columns), _filled(values, 3, columns)
    segments = splash.SegmentIds(
        q=jnp.ones((queries.shape[0], rows), jnp.int32),
        kv=_filled(seen_gs, 1, columns).astype(jnp.int32),
    )
    of_group = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    out: Any = jax.vmap(of_group)(queries, keys, values, segments)
    return jnp.swapaxes(out, 2, 3)[:, :, :t]


def _whole(keys_gknsd, values_gknsd, prefix: Prefix | None, window: int | None):
    """Keys and values with the prompt's in front of each completion's, and which ones count."""
    g, k, n, s, d = keys_gknsd.shape
    seen = jnp.ones((g, s), bool)
    if prefix is None:
        return keys_gknsd, values_gknsd, seen
    if window is not None:  # distances are right where no padding lies between
        prefix = _padded_in_front(prefix)

    def in_front(shared_gnpd, own):
        shared = jnp.broadcast_to(shared_gnpd[:, None], (g, k, n, shared_gnpd.shape[2], d))
        return jnp.concatenate([shared, own], axis=3)

    seen = jnp.concatenate([prefix.mask, seen], axis=1)
    return in_front(prefix.keys, keys_gknsd), in_front(prefix.values, values_gknsd), seen


def _padded_in_front(prefix: Prefix) -> Prefix:
    """The prompts moved to the end of their places."""
    p = prefix.mask.shape[1]
    padding_g1 = p - jnp.sum(prefix.mask, axis=1, keepdims=True)
    source_gp = jnp.maximum(jnp.arange(p)[None] - padding_g1, 0)

    def move(x_gnpd):
        return jnp.take_along_axis(x_gnpd, source_gp[:, None, :, None], axis=2)

    counted = jnp.arange(p)[None] >= padding_g1
    return Prefix(move(prefix.keys), move(prefix.values), counted)


def _blocks(length: int) -> tuple[int, int]:
    """The length rounded up to whole lanes, and the largest block that divides it."""
    whole = -(-length // _LANES) * _LANES
    return whole, next(size for size in range(_BLOCK, 0, -_LANES) if whole % size == 0)


def _filled(x, axis: int, size: int):
    """The array filled up with zeros along an axis."""
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])
