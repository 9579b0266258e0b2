"""Hugging Face tensor names <-> parameters, strict both ways, by the family's table of names.

A parameter's path is spelled as `parallel.mesh.path_name` does: `layers/0/attn/q/kernel`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import DecoderConfig, param_shapes
from gvpo_jax.models.family import all_families
from gvpo_jax.parallel.layout import path_name

Place = Callable[[str, np.ndarray], Any]

_ENDINGS = {
    "kernel": ".weight",
    "bias": ".bias",
    "scale": ".weight",
    "embedding": ".weight",
    "scalar": "",
}
# A language model's tensors in a multimodal checkpoint, of transformers before 5 and since, and
# what is not of the language model.
_TEXT_HALF = re.compile(r"language_model\.(model\.|lm_head\.)|model\.language_model\.")
_OTHER_HALF = re.compile(
    r"(model\.)?(vision_tower|multi_modal_projector|audio_tower|embed_vision|embed_audio)\."
)


@dataclass(frozen=True)
class TensorSpec:
    """Where one Hugging Face tensor lives in the parameters, and its shape in the file.

    Attributes:
        paths: of the parameters that share it, one below the other in the file.
        rows: of the file's tensor that each of them has.
        shape: of the file's tensor.
        transposed: the file has `[out, in]`, the parameters `[in, out]`.
        expert: which one along the parameter's first axis; None: there is no such axis.
    """

    paths: tuple[str, ...]
    rows: tuple[int, ...]
    shape: tuple[int, ...]
    transposed: bool = False
    expert: int | None = None

    @property
    def path(self) -> str:
        """Of the parameter, or the first of several."""
        return self.paths[0]


@dataclass(frozen=True)
class TensorSource:
    """Tensors by Hugging Face name; `read` gives one in the file's own layout."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def tensor_specs(config: DecoderConfig) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint of this decoder, by Hugging Face name."""
    leaves = jax.tree.leaves_with_path(param_shapes(config))
    shapes = {path_name(path): leaf.shape for path, leaf in leaves}
    specs: dict[str, TensorSpec] = {}
    for path, name in _modules(config):
        for kind, ending in _ENDINGS.items():
            if (shape := shapes.pop(f"{path}/{kind}", None)) is not None:
                _add_specs(specs, f"{name}{ending}", f"{path}/{kind}", shape)
    if shapes:
        raise ValueError(f"the family {config.family} names no tensor for {_listed(shapes)}")
    return specs


def _modules(config: DecoderConfig) -> Iterator[tuple[str, str]]:
    """Paths and names of what parameters belong to, in a fixed order."""
    yield "embed", "model.embed_tokens"
    for i in range(config.num_layers):
        for path, name in all_families()[config.family].names.items():
            yield f"layers/{i}/{path}", f"model.layers.{i}.{name}"
    yield from all_families()[config.family].outer_names.items()
    yield "final_norm", "model.norm"
    yield "head", "lm_head"


def _add_specs(specs: dict[str, TensorSpec], name: str, path: str, shape: tuple[int, ...]) -> None:
    transposed = path.endswith("/kernel")
    experts = [None]
    if "{expert}" in name:
        experts, shape = range(shape[0]), shape[1:]
    shape = shape[::-1] if transposed else shape
    for expert in experts:
        of_expert = name.format(expert=expert)
        paths, rows, whole = (path,), (shape[0],), shape
        if (above := specs.get(of_expert)) is not None:
            paths, rows = above.paths + paths, above.rows + rows
            whole = (sum(rows), *shape[1:])
        specs[of_expert] = TensorSpec(paths, rows, whole, transposed, expert)


def read_params(config: DecoderConfig, source: TensorSource, *, place: Place) -> dict[str, Any]:
    """Parameters of a checkpoint, tensor by tensor through `place(path, array)`.

    All names and shapes are checked before the first tensor is read.

    Raises:
        UserError: a tensor is missing, unexpected or mis-shaped, or holds NaN or infinite numbers.
    """
    specs, derived = tensor_specs(config), "rotary_emb.inv_freq"  # in old Llama checkpoints
    shapes = {name: shape for name, shape in source.shapes.items() if not name.endswith(derived)}
    for name in all_families()[config.family].unread(config):
        shapes.pop(name, None)
    tied_copy = shapes.pop("lm_head.weight", None) if config.tie_embeddings else None
    _check_tensors(config.family, specs, shapes, source.name)
    if tied_copy is not None:
        _check_tied_copy(source)
    flat: dict[str, Any] = {}
    experts: dict[str, list[np.ndarray]] = {}
    counts = Counter(path for spec in specs.values() for path in spec.paths)
    for name, spec in specs.items():
        array = source.read(name)
        check_finite(array, f"{source.name}: tensor {name}")
        ends = np.cumsum(spec.rows)[:-1]
        for path, part in zip(spec.paths, np.split(array, ends), strict=True):
            part = np.ascontiguousarray(part.T if spec.transposed else part)
            if spec.expert is None:
                flat[path] = place(path, part)
            else:
                experts.setdefault(path, []).append(part)
                if len(experts[path]) == counts[path]:
                    flat[path] = place(path, np.stack(experts.pop(path)))
    params = unflatten_dict(flat, sep="/")
    return params | {"layers": {int(i): layer for i, layer in params["layers"].items()}}


def named_tensors(config: DecoderConfig, params: Mapping[str, Any]) -> TensorSource:
    """Parameters under their Hugging Face names; each is fetched and transposed when it is read.

    Raises:
        UserError: a parameter is missing, unexpected or mis-shaped; names it.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    shapes = jax.tree.leaves_with_path(param_shapes(config))
    expected = {path_name(path): tuple(leaf.shape) for path, leaf in shapes}
    specs = tensor_specs(config)
    for name, spec in specs.items():
        for path in spec.paths:
            if path not in leaves:
                raise UserError(f"the parameters lack {path} (exported as {name})")
            shape = tuple(leaves[path].shape)
            if shape != expected[path]:
                raise UserError(
                    f"parameter {path} has shape {shape}, the config asks for {expected[path]}"
                )
    if extra := leaves.keys() - expected.keys():
        raise UserError(
            f"the parameters hold {_listed(sorted(extra))}, which the config does not know"
        )

    def read(name: str) -> np.ndarray:
        spec = specs[name]
        parts = [leaves[path] for path in spec.paths]
        parts = [part if spec.expert is None else part[spec.expert] for part in parts]
        arrays = [np.asarray(part).T if spec.transposed else np.asarray(part) for part in parts]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    return TensorSource("the parameters", {name: s.shape for name, s in specs.items()}, read)


def text_tensors(source: TensorSource) -> TensorSource:
    """Of a multimodal checkpoint the language model's tensors, under the names of one alone.

    Raises:
        UserError: two tensors come by one name.
    """
    names: dict[str, str] = {}
    for name in source.shapes:
        if _OTHER_HALF.match(name):
            continue
        alone = _TEXT_HALF.sub(lambda found: found[1] or "model.", name)
        if alone in names:
            raise UserError(f"{source.name} holds both {names[alone]} and {name}")
        names[alone] = name
    shapes = {alone: source.shapes[name] for alone, name in names.items()}
    return TensorSource(source.name, shapes, lambda alone: source.read(names[alone]))


def check_finite(array: np.ndarray, what: str) -> None:
    """Raises UserError where an array holds NaN or infinite numbers; `what` says which it is."""
    with np.errstate(all="ignore"):
        total = array.sum()  # quick, and NaN or infinite where any number is
    if not np.isfinite(total) and not np.isfinite(array).all():
        bad = "NaN" if np.isnan(array).any() else "infinite"
        raise UserError(f"{what} holds {bad} numbers: these weights are broken, get others")


def _check_tensors(family: str, specs: dict, shapes: dict, source: str) -> None:
    if missing := [name for name in specs if name not in shapes]:
        raise UserError(f"{source} lacks tensor {_listed(missing)}, which its config asks for")
    if extra := [name for name in shapes if name not in specs]:
        raise UserError(
            f"{source} holds tensor {_listed(extra)}, which a {family} of its config does not have"
        )
    for name, spec in specs.items():
        if tuple(shapes[name]) != spec.shape:
            raise UserError(
                f"{source}: tensor {name} has shape {tuple(shapes[name])}, "
                f"its config asks for {spec.shape}"
            )


def _check_tied_copy(source: TensorSource) -> None:
    if not np.array_equal(source.read("lm_head.weight"), source.read("model.embed_tokens.weight")):
        raise UserError(
            f"{source.name}: lm_head.weight differs from the embedding it should be tied to; "
            "set tie_word_embeddings to false in config.json"
        )


def _listed(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} (and {len(others)} more)" if others else first
