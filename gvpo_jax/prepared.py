"""A trainer's model, ready on its mesh: loaded here, handed over loaded, or from elsewhere."""

import dataclasses
from copy import deepcopy
from operator import attrgetter
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from gvpo_jax.config import Config
from gvpo_jax.errors import UserError, one_line, tell
from gvpo_jax.memory import check_memory
from gvpo_jax.models.adapters import base_warning, check_start, start
from gvpo_jax.models.decoder import DecoderConfig, DecoderFns
from gvpo_jax.models.hf_config import check_length
from gvpo_jax.models.load import LoadedModel, load_model, stop_token_ids
from gvpo_jax.models.own import OwnModel
from gvpo_jax.models.quantized import is_quantized
from gvpo_jax.parallel.distributed import is_first
from gvpo_jax.parallel.layout import group_shards, path_name, place_params
from gvpo_jax.rollout.inprocess import SamplingModel
from gvpo_jax.rollout.make import check_layout, sampling_model
from gvpo_jax.training.checkpoint import fingerprint
from gvpo_jax.training.policy import copy


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model that can be trained."""

    model: LoadedModel | OwnModel  # without its parameters
    vocab_size: int
    stop_ids: tuple[int, ...]
    functions: DecoderFns  # what is trained computes
    sampling: SamplingModel  # what samples in this process
    params: Any  # that are trained
    frozen: Any = None  # those beside them


def prepare(
    config: Config,
    mesh: Mesh,
    model: LoadedModel | OwnModel | None,
    *,
    trains: bool,
    tokenizer: Any = None,
) -> Prepared:
    """The model of a config, or the one that is given, on the mesh.

    A model that is given keeps its own parameters; these are copies.

    Args:
        config: of the run.
        mesh: the devices.
        model: the model; None: `config.model.name` is loaded.
        trains: whether there will be updates, which need memory.
        tokenizer: in place of the model's; None: that.

    Raises:
        UserError: it can't be loaded, or does not fit the settings, the devices or their memory.
    """
    c = config
    own = {} if tokenizer is None else {"tokenizer": tokenizer}
    if isinstance(model, OwnModel):
        return _prepare_own(c, mesh, dataclasses.replace(model, **own))
    needed = c.data.max_prompt_length + c.rollout.max_completion_length

    def place(path: str, x: Any) -> Any:
        kept = c.model.kept(path, x)
        if is_quantized(kept):  # one after the other, by one device
            kept = jax.device_get(kept)
        return place_params(mesh, {path: kept})[path]

    def check(shape: DecoderConfig) -> None:
        """What can be told before weights are read."""
        check_start(c.model, shape)
        if c.loss.router_aux_coef and shape.experts is None:
            raise UserError(
                f"loss.router_aux_coef={c.loss.router_aux_coef} is for mixtures of experts, and "
                f"{c.model.name} is none; leave it out"
            )
        check_layout(c.rollout, shape, mesh)
        check_memory(c, shape, mesh, trains=trains)

    if (odd := base_warning(c.model)) and is_first():
        tell(f"gvpo-jax: warning: {one_line(odd)}", error=True)
    if model is None:
        model = load_model(
            c.model.name,
            place=place,
            length=needed,
            check=check,
        )
        params = model.params
    else:
        check_length(model.config.max_position_embeddings, needed, model.name)
        check(model.config)
        named = jax.tree.map_with_path(lambda path, x: place(path_name(path), x), model.params)
        params = copy(named)
    frozen, params = start(c.model, model.config, params, mesh, c.run.seed)
    functions = c.model.functions(model.config, mesh, c.rollout.cache_dtype)
    sampling = sampling_model(c.rollout, c.model, model.config, mesh, functions, frozen)
    scoring = SamplingModel(functions, mesh, frozen=frozen)
    sampling = dataclasses.replace(sampling, scoring=scoring)
    model = dataclasses.replace(model, **own)
    stop_ids = stop_token_ids(model, c.rollout.stop_token_ids)
    who = _without_params(model, c.data.template), model.config.vocab_size, stop_ids
    return Prepared(*who, functions, sampling, params, frozen)


def read_again(config: Config, name: str, frozen: Any) -> Any:
    """The parameters of a model that was quantised, as they were, on the host.

    Args:
        config: of the run.
        name: of the model.
        frozen: the parameters that it became.

    Raises:
        UserError: it can't be read, or would become others today.
    """
    leaves = flatten_dict(frozen)
    known = {"/".join(map(str, path)): leaf for path, leaf in leaves.items()}

    def check(path: str, x: Any) -> Any:
        if fingerprint(config.model.kept(path, x)) != fingerprint(known[path]):
            raise UserError(
                f"{name} is not the model that was quantised: its {path} differs; bring it back, "
                "or save the adapter alone"
            )
        return x

    return load_model(name, place=check).params


def _prepare_own(c: Config, mesh: Mesh, model: OwnModel) -> Prepared:
    defaults = Config()
    ours = (
        "model.dtype",
        "model.remat",
        "model.scan_layers",
        "model.attention",
        "model.adapter",
        "model.lora",
        "model.quantization",
        "servers.kind",
        "rollout.tensor",
        "rollout.cache_dtype",
        "loss.router_aux_coef",
    )
    changed = [key for key in ours if attrgetter(key)(c) != attrgetter(key)(defaults)]
    if changed:
        raise UserError(
            f"{', '.join(changed)}: that is for models which gvpo_jax loads, and {model.name} is "
            "one of your own; leave it out"
        )
    needed = c.data.max_prompt_length + c.rollout.max_completion_length
    check_length(model.max_length, needed, model.name)
    size, stop_ids = model.vocab_size, model.stop_ids(c.rollout.stop_token_ids)
    params = copy(place_params(mesh, model.params))
    functions = dataclasses.replace(model.functions, shards=group_shards(mesh))
    sampling = SamplingModel(functions, mesh)
    who = _without_params(model, c.data.template), size, stop_ids
    return Prepared(*who, functions, sampling, params)


def _without_params(model: Any, template: str | None) -> Any:
    """The model with the template that trains, which is then exported."""
    tokenizer = model.tokenizer
    if template is not None:
        tokenizer = deepcopy(tokenizer)
        tokenizer.chat_template = template
    return dataclasses.replace(model, params={}, tokenizer=tokenizer)
