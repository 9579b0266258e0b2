"""Sampling in this process: one prefill per prompt, then one `while_loop` over token positions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gvpo_jax.batch import pad_prompts
from gvpo_jax.precision import einsum_f32
from gvpo_jax.rollout.engine import FINISH_LENGTH, FINISH_STOP, Rollout, Sampling
from gvpo_jax.rollout.sampling import draw


class DecodeState(NamedTuple):
    """What decoding carries from token to token; donated, so that the cache is updated in place."""

    cache: Any
    hidden_gkd: jax.Array  # predicts the next token
    completions_gkt: jax.Array
    logps_gkt: jax.Array
    lengths_gk: jax.Array
    stopped_gk: jax.Array
    at: jax.Array


class InProcessEngine:
    """Rollout engine over a model given as functions, see `gvpo_jax.models.decoder.Apply`.

    Prompts are padded to the next bucket (powers of two from 16, and halfway between), so a run of
    mixed lengths compiles a handful of programs.

    Args:
        model: the model's functions.
        stop_ids: tokens that end a completion and belong to it.
        place: `(tree, k) -> tree` puts a batch's arrays on devices, e.g. sharded over the groups;
            default: as they are.
        constrain: lays out, while tracing, what stays on devices: a tree {"state": DecodeState,
            "prefix": the model's} or one of the two.
        fetch: brings arrays back to the host.
        agree: a padded width -> the one that all processes take.
        prepare: the parameters -> those to sample with, e.g. otherwise laid out.
    """

    def __init__(
        self,
        model: Any,
        stop_ids: Sequence[int],
        *,
        place: Callable[[Any, int], Any] = lambda tree, k: tree,
        constrain: Callable[[Any], Any] = lambda tree: tree,
        fetch: Callable[[Any], Any] = jax.device_get,
        agree: Callable[[int], int] = int,
        prepare: Callable[[Any], Any] = lambda params: params,
    ):
        self._stop_ids, self._prepare = tuple(stop_ids), prepare
        self._place, self._fetch, self._agree = place, fetch, agree
        self._prefill, self._decode = compiled(model, self._stop_ids, constrain)

    def generate(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        *,
        num_generations: int,
        max_completion_length: int,
        sampling: Sampling,
        seed: int,
        longest_prompt: int | None = None,
    ) -> Rollout:
        """See `Engine.generate`."""
        prompts_gp, lengths_g = pad_prompts(prompts, longest_prompt, self._agree)
        batch = {
            "prompts": prompts_gp,
            "prompt_lengths": lengths_g,
            "prompt_ids": np.asarray(prompt_ids, np.uint32),
        }
        batch, params = self._place(batch, num_generations), self._prepare(params)
        state, prefix = self._prefill(
            params,
            batch["prompts"],
            batch["prompt_lengths"],
            k=num_generations,
            max_completion_length=max_completion_length,
        )
        key, ids = jax.random.key(seed), batch["prompt_ids"]
        lengths_g = batch["prompt_lengths"]
        state = self._decode(params, lengths_g, ids, key, prefix, state=state, sampling=sampling)
        fetched = (state.completions_gkt, state.lengths_gk, state.stopped_gk, state.logps_gkt)
        completions, lengths, stopped, logps = (np.asarray(x) for x in self._fetch(fetched))
        finish = np.where(stopped, FINISH_STOP, FINISH_LENGTH).astype(np.int32)
        return Rollout(completions, lengths, finish, logps)


def compiled(model: Any, stop_ids: Sequence[int], constrain: Callable[[Any], Any]):
    """`prefill` and `decode`, jitted."""
    return (
        jax.jit(
            functools.partial(prefill, model, constrain=constrain),
            static_argnames=("k", "max_completion_length"),
        ),
        jax.jit(
            functools.partial(decode, model, stop_ids=tuple(stop_ids), constrain=constrain),
            static_argnames=("sampling",),
            donate_argnames=("state",),
        ),
    )


def prefill(model, params, prompts_gp, lengths_g, *, k, max_completion_length, constrain):
    """Run every prompt once: the state before the first token, and the prompts' keys and values."""
    g = prompts_gp.shape[0]
    hidden_gd, prefix = model.prefill(params, prompts_gp, lengths_g)
    state = DecodeState(
        cache=model.empty_cache(g, k, max_completion_length),
        hidden_gkd=jnp.broadcast_to(hidden_gd[:, None], (g, k, hidden_gd.shape[-1])),
        completions_gkt=jnp.zeros((g, k, max_completion_length), jnp.int32),
        logps_gkt=jnp.zeros((g, k, max_completion_length), jnp.float32),
        lengths_gk=jnp.zeros((g, k), jnp.int32),
        stopped_gk=jnp.zeros((g, k), bool),
        at=jnp.zeros((), jnp.int32),
    )
    laid_out = constrain({"state": state, "prefix": prefix})
    return laid_out["state"], laid_out["prefix"]


def decode(model, params, lengths_g, ids_g, key, prefix, *, state, sampling, stop_ids, constrain):
    """Draw tokens until every completion has stopped or is full."""
    _, k, t = state.completions_gkt.shape
    row_keys = _row_keys(key, ids_g, k)
    head_vd = model.head(params)

    def unfinished(s: DecodeState):
        return (s.at < t) & ~jnp.all(s.stopped_gk)

    def step(s: DecodeState) -> DecodeState:
        s, tokens_gk = _draw_token(s, head_vd, row_keys, sampling, stop_ids)
        # The last token needs no successor, so the model is not run on it.
        hidden, cache = jax.lax.cond(
            unfinished(s),
            lambda cache: model.decode(params, tokens_gk, lengths_g, prefix, cache, s.at - 1),
            lambda cache: (s.hidden_gkd, cache),
            s.cache,
        )
        return s._replace(hidden_gkd=hidden, cache=cache)

    state = constrain({"state": state})["state"]
    return constrain({"state": jax.lax.while_loop(unfinished, step, state)})["state"]


def _draw_token(s: DecodeState, head_vd, row_keys, sampling, stop_ids):
    """Draw position `at` of every completion from the hidden states, and book it."""
    g, k, _ = s.completions_gkt.shape
    hidden_bd = s.hidden_gkd.reshape(g * k, -1)
    logits = einsum_f32("bd,vd->bv", hidden_bd, head_vd.astype(hidden_bd.dtype))
    uniforms = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, s.at)))(row_keys)
    tokens_b = draw(logits, uniforms, sampling)
    picked = jnp.take_along_axis(logits, tokens_b[:, None], axis=-1)[:, 0]
    logps_gk = (picked - jax.nn.logsumexp(logits, axis=-1)).reshape(g, k)
    tokens_gk = tokens_b.reshape(g, k)
    stops = jnp.zeros((g, k), bool)
    for stop_id in stop_ids:
        stops |= tokens_gk == stop_id
    write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=s.at, axis=2)
    s = s._replace(
        completions_gkt=write(s.completions_gkt, jnp.where(s.stopped_gk, 0, tokens_gk)),
        logps_gkt=write(s.logps_gkt, jnp.where(s.stopped_gk, 0, logps_gk)),
        lengths_gk=s.lengths_gk + ~s.stopped_gk,
        stopped_gk=s.stopped_gk | stops,
        at=s.at + 1,
    )
    return s, tokens_gk


def _row_keys(key, ids_g, k):
    """A key per completion from the prompt's id and the place in the group: `[g * k]`."""

    def of_prompt(prompt_id):
        prompt_key = jax.random.fold_in(key, prompt_id)
        return jax.vmap(lambda i: jax.random.fold_in(prompt_key, i))(jnp.arange(k))

    return jax.vmap(of_prompt)(ids_g).reshape(-1)
