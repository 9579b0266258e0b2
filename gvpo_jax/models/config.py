"""The config section `model`: what is loaded, and how it is computed."""

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gvpo_jax.errors import UserError
from gvpo_jax.models.lora_targets import TARGETS
from gvpo_jax.settings import setting

if TYPE_CHECKING:  # a misspelt config should not wait for Flax
    from jax.sharding import Mesh

    from gvpo_jax.models.decoder import DecoderConfig, DecoderFns
    from gvpo_jax.models.lora import Lora, Params


@dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter that is trained in place of the model."""

    rank: int | None = setting(
        None,
        "Of the adapter's matrices; null: the whole model is trained. With an adapter, "
        "optimizer.learning_rate is about ten times that of training the whole model: 3e-4 for the "
        "quickstart's 135M, 1e-5 to 1e-4 for models of billions.",
        least=1,
    )
    alpha: float = setting(32.0, "The adapter's product is multiplied by alpha / rank.", above=0)
    targets: list[str] = setting(
        list(TARGETS),
        "Layers that have one: q, k, v, o, gate, up, down, also as q_proj and so on; by default "
        "those of them that the model has. Experts have none.",
    )

    def names(self) -> tuple[str, ...]:
        """The targets, each once, by our names.

        Raises:
            UserError: there is none, or one by an unknown name.
        """
        ours = {theirs: name for name, theirs in TARGETS.items()}
        named = [ours.get(name, name) for name in self.targets]
        if unknown := [name for name in named if name not in TARGETS]:
            raise UserError(
                f"model.lora.targets: {unknown[0]!r} is no layer that can have an adapter; those "
                f"are {', '.join(TARGETS)}"
            )
        if not named:
            raise UserError(
                f"model.lora.targets is empty: name layers, of {', '.join(TARGETS)}; or train the "
                "whole model, with model.lora.rank=null"
            )
        return tuple(name for name in TARGETS if name in named)

    def given(self) -> list[str]:
        """Its settings that are not left at their defaults, by their full names."""
        default = LoraConfig()
        changed = {
            "model.lora.alpha": self.alpha != default.alpha,
            "model.lora.targets": self.names() != default.names(),
        }
        return [name for name, differs in changed.items() if differs]

    def form(self) -> "Lora | None":
        """The adapter's form; None: there is none."""
        from gvpo_jax.models.lora import Lora

        return None if self.rank is None else Lora(self.rank, self.alpha, self.names())


@dataclass(frozen=True)
class ModelConfig:
    """The model, and how it is computed."""

    name: str = setting(
        "debug",
        "A hub name, a folder of safetensors, a .gguf file, package://PACKAGE/FILE.gguf, or debug.",
        path="model",
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "Of the computation; parameters stay float32."
    )
    remat: Literal["none", "dots", "layer"] = setting(
        "none",
        "What the backward pass computes again to save memory: nothing, all but products with "
        "weights, or whole layers.",
        free=True,
    )
    attention: Literal["auto", "xla", "splash", "cudnn"] = setting(
        "auto",
        "Of prompts, scoring and training. auto: in bfloat16 splash on TPU, but for short "
        "sequences, and cuDNN on GPU, else XLA. Splash computes sliding windows and soft caps "
        "itself; cuDNN windows, XLA its caps.",
        free=True,
    )
    scan_layers: bool = setting(
        False,
        "Updates and scoring compile layers that are alike once, and scan over them. They compile "
        "faster, but run more slowly where remat is not layer or micro-batches are small.",
        free=True,
    )
    adapter: str | None = setting(
        None,
        "A folder or hub name of a PEFT adapter that training starts from; needs model.lora.",
        path="model",
    )
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantization: Literal["none", "int8", "nf4"] = setting(
        "none",
        "Of the frozen weights beside an adapter (QLoRA): the kernels of linear layers in 8 or 4 "
        "bits. Embedding, head and norms stay as they are. Needs model.lora.rank.",
    )

    def check(self) -> None:
        """That the settings go together.

        Raises:
            UserError: they don't.
        """
        self.lora.names()
        if self.lora.rank is None and self.adapter is not None:
            raise UserError(
                f"model.adapter={self.adapter} is trained on with LoRA: give model.lora.rank, that "
                "of the adapter"
            )
        if self.lora.rank is None and (given := self.lora.given()):
            raise UserError(
                f"{', '.join(given)}: without model.lora.rank the whole model is trained, and has "
                "no adapter; give model.lora.rank, or leave it out"
            )
        if self.lora.rank is None and self.quantization != "none":
            raise UserError(
                f"model.quantization={self.quantization} is for weights that are not trained: give "
                "model.lora.rank, or leave it out"
            )

    def param_shapes(self, shape: "DecoderConfig") -> "tuple[Params, Params]":
        """What stays as it is and what is trained, each a tree of `jax.ShapeDtypeStruct`s.

        Without an adapter everything is trained, in float32. With one, the model stays as it is,
        in the dtype of the computation or quantised.

        Raises:
            UserError: the adapter does not fit the model, or it can't be quantised.
        """
        import jax

        from gvpo_jax.models.decoder import param_shapes
        from gvpo_jax.models.lora import adapter_shapes
        from gvpo_jax.parallel.layout import path_name

        whole, lora = param_shapes(shape), self.lora.form()
        if lora is None:
            return {}, whole

        def kept(path, x):
            return jax.eval_shape(functools.partial(self.kept, path_name(path)), x)

        return jax.tree.map_with_path(kept, whole), adapter_shapes(whole, lora)

    def kept(self, path: str, x: Any) -> Any:
        """A loaded array of this path as it stays: in its dtype, or quantised.

        Raises:
            UserError: it can't be quantised.
        """
        from gvpo_jax.models.quantized import is_kernel, quantize

        if self.quantization != "none" and is_kernel(path, x):
            return quantize(x, self.quantization)
        return x if self.lora.rank is None else x.astype(self.dtype)

    def functions(self, shape: "DecoderConfig", mesh: "Mesh", cache_dtype: str) -> "DecoderFns":
        """The decoder of this shape as functions for arrays on this mesh.

        cache_dtype: of the keys and values that decoding keeps; "model": as computed.
        """
        how = self.dtype, self.remat, self.attention, cache_dtype, self.lora.form()
        return _functions(shape, mesh, *how, self.scan_layers)


@functools.lru_cache(maxsize=8)  # the same functions are compiled once
def _functions(
    shape: "DecoderConfig",
    mesh: "Mesh",
    dtype: str,
    remat: Any,
    attention: Any,
    cache_dtype: str,
    lora: "Lora | None",
    scan_layers: bool,
) -> "DecoderFns":
    import jax
    import jax.numpy as jnp

    from gvpo_jax.models.decoder import DecoderOptions, decoder_fns
    from gvpo_jax.models.quantized import with_quantized
    from gvpo_jax.ops.chunks import chunks_on
    from gvpo_jax.ops.cpu import product_on
    from gvpo_jax.ops.experts import experts_on
    from gvpo_jax.ops.kernels import attention_on
    from gvpo_jax.parallel.layout import constrain_activation, group_shards, shardings

    computed = jnp.dtype(dtype)
    options = DecoderOptions(
        dtype=computed,
        remat=remat,
        cache_dtype=None if cache_dtype == "model" else jnp.dtype(cache_dtype),
        constrain=functools.partial(constrain_activation, mesh),
        params=lambda tree: jax.lax.with_sharding_constraint(tree, shardings(mesh, tree)),
        attention=attention_on(
            mesh, attention, computed, max(shape.head_dim, shape.full_head_dim or 0)
        ),
        experts=experts_on(mesh),
        product=with_quantized(product_on(mesh)),
        **chunks_on(mesh),
        shards=group_shards(mesh),
        lora=lora,
        scan_layers=scan_layers,
    )
    return decoder_fns(shape, options)
