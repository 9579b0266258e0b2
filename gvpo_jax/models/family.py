"""What a family of models declares: its config.json and tensor names in terms of one decoder.

Each file in `families/` holds one declaration, `FAMILY`. `hf_config` and `hf_tensors` read it.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gvpo_jax.errors import UserError
from gvpo_jax.models import families
from gvpo_jax.models.shape import DecoderConfig

Values = Mapping[str, Any]  # of a config.json
FULL, SLIDING = "full_attention", "sliding_attention"

# A layer's parameters, and the tensors under model.layers.N. in the file. Parameters that share a
# tensor lie in it one below the other; {expert} stands for the numbers along a parameter's axis 0.
NAMES = {
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "mlp/router": "mlp.gate",
    "mlp/experts/gate": "mlp.experts.{expert}.gate_proj",
    "mlp/experts/up": "mlp.experts.{expert}.up_proj",
    "mlp/experts/down": "mlp.experts.{expert}.down_proj",
}


@dataclass(frozen=True)
class Family:
    """One family; what it leaves out is as in Llama.

    Attributes:
        model_type, architecture: as config.json names them.
        models: whose table row this is in the README.
        constants: options of `DecoderConfig` that all its models have.
        silent: what transformers takes where config.json lacks a key.
        numbers, flags: option of `DecoderConfig` -> the key that it is read from as it stands.
        options: further options, from config.json.
        back: the keys of config.json that `options` read, from the decoder.
        layer_types: which layers have a window where config.json lists none; None: no layer can.
        names: see `NAMES`.
        outer_names: the same for what is in no layer, beside embedding, last norm and head.
        unread: names of tensors that its files may hold and that mean nothing.
        gguf: its architecture's name in GGUF files; None: it is not read from them.
        stop_tokens: end a completion where its vocabulary has them.
    """

    model_type: str
    architecture: str
    models: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    silent: Values = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    options: Callable[[Values], dict[str, Any]] = lambda values: {}
    back: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}
    layer_types: Callable[[Values], Sequence[str]] | None = None
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)
    outer_names: Mapping[str, str] = field(default_factory=dict)
    unread: Callable[[DecoderConfig], Sequence[str]] = lambda config: ()
    gguf: str | None = None
    stop_tokens: tuple[str, ...] = ()

    @property
    def activation_key(self) -> str:
        """Where config.json names the activation."""
        return "hidden_activation" if "hidden_activation" in self.silent else "hidden_act"


@functools.cache
def all_families() -> dict[str, Family]:
    """Every declaration in `families/`, by model type."""
    modules = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    every = (importlib.import_module(f"{families.__name__}.{name}").FAMILY for name in modules)
    return {family.model_type: family for family in every}


def families_table() -> str:
    """The README's table; families that name the same models share a row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, family in all_families().items():
        files = "safetensors, GGUF" if family.gguf else "safetensors"
        rows.setdefault((family.models, files), []).append(f"`{name}`")
    lines = ["| models | `model_type` | read from |", "|---|---|---|"]
    lines += [
        f"| {models} | {', '.join(names)} | {files} |" for (models, files), names in rows.items()
    ]
    return "\n".join(lines) + "\n"


def alternating(every: int) -> Callable[[Values], Sequence[str]]:
    """`layer_types` where the last of so many layers sees everything, the others have a window."""

    def layer_types(values: Values) -> Sequence[str]:
        layers = range(values["num_hidden_layers"])
        return [SLIDING if (i + 1) % every else FULL for i in layers]

    return layer_types


def all_sliding(values: Values) -> Sequence[str]:
    """`layer_types` where all layers have a window, or none if config.json has none."""
    kind = FULL if values.get("sliding_window") is None else SLIDING
    return [kind] * values["num_hidden_layers"]


def above_max_window_layers(values: Values) -> Sequence[str]:
    """`layer_types` of Qwen: where windows are used, from layer `max_window_layers` on."""
    used = values.get("use_sliding_window") and values.get("sliding_window") is not None
    first = values.get("max_window_layers", 28)
    layers = range(values["num_hidden_layers"])
    return [SLIDING if used and i >= first else FULL for i in layers]


def bad(message: str) -> UserError:
    """A mistake in config.json; the reader puts the folder in front."""
    return UserError(f"config.json: {message}")
