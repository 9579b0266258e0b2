"""LoRA: low-rank matrices beside a layer's frozen kernel, `x W + (x A) B * scale`.

The parameters are then two trees: `frozen`, the model that training starts from, and the adapter,
which is all that is trained: `lora_a` and `lora_b` at the paths of the kernels that they belong to.
"""

import math
import re
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from gvpo_jax.errors import UserError
from gvpo_jax.models.lora_targets import TARGETS
from gvpo_jax.models.quantized import is_quantized, widen
from gvpo_jax.precision import float_type

Params = dict[str, Any]
A, B, KERNEL = "lora_a", "lora_b", "kernel"


@dataclass(frozen=True)
class Lora:
    """An adapter's form: `targets` are the names of the layers that have one, such as `q`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What the product of its matrices is multiplied by."""
        return self.alpha / self.rank


class AdaptedLinear(nnx.Linear):
    """A linear layer with low-rank matrices beside its kernel: `[..., d] -> [..., f]`."""

    def __init__(self, like: nnx.Linear, lora: Lora, rngs: nnx.Rngs):
        super().__init__(
            like.in_features,
            like.out_features,
            use_bias=like.use_bias,
            dtype=like.dtype,
            dot_general=like.dot_general,
            promote_dtype=like.promote_dtype,
            rngs=rngs,
        )
        self.lora_a = nnx.Param(jnp.zeros((like.in_features, lora.rank)))
        self.lora_b = nnx.Param(jnp.zeros((lora.rank, like.out_features)))
        self.scale = lora.scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """As the layer with its merged kernel, which is nowhere in memory."""
        last = (((x.ndim - 1,), (0,)), ((), ()))
        low = self.dot_general(x, self.lora_a[...].astype(x.dtype), last) * self.scale
        return super().__call__(x) + self.dot_general(low, self.lora_b[...].astype(x.dtype), last)


def adapt(layers: nnx.Module, lora: Lora, rngs: nnx.Rngs) -> None:
    """Put an `AdaptedLinear` in the place of each linear layer that `lora` names."""
    for _, part in list(nnx.iter_modules(layers)):
        for name in lora.targets:
            if type(linear := getattr(part, name, None)) is nnx.Linear:
                setattr(part, name, AdaptedLinear(linear, lora, rngs))


def adapter_shapes(base: Params, lora: Lora) -> Params:
    """The adapter of a model whose parameters are `base`, or their shapes; float32.

    Where `lora` names all kinds of layers, which is the default, those that the model has get one.

    Raises:
        UserError: a target is no layer of the model, or the rank is more than a layer's width.
    """
    shapes, found = {}, set()
    targets = re.compile(rf"layers/.*/({'|'.join(lora.targets)})/{KERNEL}")
    for path, leaf in _flat(base).items():
        match = targets.fullmatch("/".join(map(str, path)))
        if match is None or leaf.ndim != 2:
            continue
        (d_in, d_out), name = leaf.shape, match[1]
        if lora.rank > min(d_in, d_out):
            raise UserError(
                f"model.lora.rank={lora.rank} is more than the width of layer {name}, which is "
                f"{d_in} x {d_out}: a rank up to {min(d_in, d_out)} makes sense there"
            )
        shapes[*path[:-1], A] = jax.ShapeDtypeStruct((d_in, lora.rank), jnp.float32)
        shapes[*path[:-1], B] = jax.ShapeDtypeStruct((lora.rank, d_out), jnp.float32)
        found.add(name)
    missing = [name for name in lora.targets if name not in found]
    if missing and (len(lora.targets) < len(TARGETS) or not found):
        there = [name for name in lora.targets if name in found]
        raise UserError(
            f"model.lora.targets: the model has no layer {', '.join(missing)} that can have an "
            f"adapter (experts can't); of those named it has {', '.join(there) or 'none'}"
        )
    return unflatten_dict(shapes)


def init_adapter(shapes: Params, seed: int) -> Params:
    """A new adapter, which changes nothing yet: A as PEFT draws it, and B zero.

    A is uniform up to the inverse root of the layer's width; it depends on its path alone.
    """

    def init(path, leaf):
        if path[-1] == B:
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = zlib.crc32("/".join(map(str, path)).encode())
        key = jax.random.fold_in(jax.random.key(seed), name)
        bound = 1 / math.sqrt(leaf.shape[0])
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)

    return unflatten_dict({path: init(path, x) for path, x in _flat(shapes).items()})


def adds_nothing(adapter: Params) -> bool:
    """Whether all of its B are zero, so that the model with it is the frozen one."""
    leaves = _flat(adapter).items()
    return not any(bool(jnp.any(leaf)) for path, leaf in leaves if path[-1] == B)


def join(frozen: Any, params: Any) -> Any:
    """One tree of two; at a path that both have, it is the leaf of the second."""
    if not (isinstance(frozen, dict) and isinstance(params, dict)):
        return params
    both = frozen.keys() & params.keys()
    return frozen | params | {name: join(frozen[name], params[name]) for name in both}


def merge(frozen: Params, adapter: Params, scale: float, dtype: Any) -> Params:
    """The kernels that have an adapter, with its product added: `W + A B * scale`, in float32.

    Args:
        frozen: the model; NumPy or JAX arrays, quantised kernels too.
        adapter: its adapter, of the same kind.
        scale: see `Lora.scale`.
        dtype: of what is returned.

    Returns:
        Those kernels alone, at their paths; `join(frozen, ...)` is the merged model.
    """
    kernels, leaves, merged = _flat(frozen), _flat(adapter), {}
    for *path, last in leaves:
        if last == A:
            a, b, kernel = leaves[*path, A], leaves[*path, B], kernels[*path, KERNEL]
            with jax.default_matmul_precision("highest"):
                added = (a @ b) * scale
            if is_quantized(kernel):
                kernel = widen(kernel, jnp.float32)
            merged[*path, KERNEL] = (kernel.astype(float_type(kernel, a)) + added).astype(dtype)
    return unflatten_dict(merged)


def _flat(tree: Params) -> dict[tuple[Any, ...], Any]:
    return flatten_dict(tree)  # pyright: ignore[reportReturnType]
