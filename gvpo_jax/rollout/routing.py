"""Whether tokens go to the same experts while they are sampled and while they are scored.

Rounding may send a token elsewhere, and then its log-probs differ more than rounding does. Routing
is not noted while sampling, where it would take much memory. Instead the first tokens of a few
sampled completions go through the decoding path once more, with the same weights and cache.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gvpo_jax.data.groups import Groups
from gvpo_jax.models.decoder import DecoderFns
from gvpo_jax.ops.experts import Routing
from gvpo_jax.parallel.distributed import gather, to_host
from gvpo_jax.parallel.layout import constrain_batch, fill_up, place_batch

TOKENS = 32  # of each completion


def routing_metrics(sampling: Any, scoring: Any, params: Any, groups: Groups) -> dict[str, float]:
    """`router/disagreement`, of a group for each part that the devices cut a batch into.

    Args:
        sampling: the model as it samples, see `gvpo_jax.rollout.inprocess.SamplingModel`.
        scoring: the model as it is trained.
        params: the policy's that sampled.
        groups: this process's samples.
    """
    found, k = [], groups.lengths.shape[1]
    for model, chosen in ((sampling, chosen_in_decoding), (scoring, chosen_in_scoring)):
        some = np.arange(fill_up(model.mesh, 1, k)) % len(groups.row)
        batch = {name: getattr(groups, name)[some] for name in ("prompts", "prompt_lengths")}
        batch["completions"] = groups.completions[some, :, : TOKENS + 1]
        run = _jitted(chosen, model.functions, model.mesh)
        weights = model.prepare(params, model.frozen)
        found.append(to_host(run(weights, place_batch(model.mesh, batch, k))))
    few = min(map(len, found))
    lengths = groups.lengths[np.arange(few) % len(groups.row)]
    decoded, scored = (chosen[:few] for chosen in found)
    differ, count = disagreement(decoded, scored, lengths)
    differ, count = gather(np.array([[differ, count]])).sum(axis=0)
    return {"router/disagreement": float(differ / max(count, 1))}


def disagreement(a: np.ndarray, b: np.ndarray, lengths: np.ndarray) -> tuple[int, int]:
    """At how many of how many (token, layer) the sets of experts differ.

    Args:
        a: experts of each completion token in each layer, `[g, k, t, l, c]` in any order.
        b: the same.
        lengths: tokens of each completion, `[g, k]`; its last one goes through no layer.
    """
    counted = np.arange(a.shape[2]) < lengths[..., None] - 1
    differ = (np.sort(a, axis=-1) != np.sort(b, axis=-1)).any(axis=-1)
    return int(differ[counted].sum()), int(counted.sum() * a.shape[3])


def chosen_in_scoring(model: DecoderFns, params, prompts, prompt_lengths, completions):
    """Experts of all completion tokens but the last, `[g, k, t - 1, l, c]`, as in training."""
    assert model.routed is not None
    if model.stacking is not None:
        params = model.stacking.stack(params)
    arrays = prompts, prompt_lengths, completions
    _, (_, routings) = model.routed("completion_hidden", params, *arrays)
    return _stacked(routings)


def chosen_in_decoding(model: DecoderFns, params, prompts, prompt_lengths, completions):
    """The same, token by token, as in sampling."""
    assert model.routed is not None
    routed: Any = model.routed
    g, k, t = completions.shape
    _, prefix = model.prefill(params, prompts, prompt_lengths)

    def step(cache, place):
        before = jnp.full((g, k), place, jnp.int32)
        tokens = jnp.take(completions, place, axis=2)
        arrays = tokens, prompt_lengths, prefix, cache, before, place
        (_, cache), routings = routed("decode", params, *arrays)
        return cache, _stacked(routings)[:, :, 0]

    _, chosen = jax.lax.scan(step, model.empty_cache(g, k, t), jnp.arange(t - 1))
    return jnp.moveaxis(chosen, 0, 2)


def _stacked(routings: list[Routing]) -> jax.Array:
    return jnp.stack([routing.chosen for routing in routings], axis=-2)


@functools.lru_cache(maxsize=4)
def _jitted(chosen, model, mesh):
    def run(params, batch):
        out = chosen(model, params, **batch)
        return constrain_batch(mesh, {"chosen": out}, *out.shape[:2])["chosen"]

    return jax.jit(run)
