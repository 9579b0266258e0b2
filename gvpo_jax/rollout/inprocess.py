"""Sampling in this process: one prefill per prompt, then one `while_loop` over decoding steps.

Completions are drawn in lanes: a lane is a place for one prompt's keys and values, and a few rows
that draw its completions. A row whose completion has ended takes the group's next one; a lane whose
group is done takes its next group. With as many lanes as groups and as many rows as completions,
all are drawn at once.
Axes: s lanes, m groups of a lane, r rows, n = m * k completions of a lane, t tokens, d width.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gvpo_jax.data.batch import pad_prompts
from gvpo_jax.data.groups import Groups, Source, check_logps, make_groups
from gvpo_jax.logprobs import completion_mask, soft_cap
from gvpo_jax.models.lora import join
from gvpo_jax.parallel.distributed import to_devices, to_host
from gvpo_jax.parallel.layout import constrain_batch, fill_up, group_shards, lanes, place_batch
from gvpo_jax.parallel.mesh import MeshConfig
from gvpo_jax.precision import einsum_f32
from gvpo_jax.rollout.draw import draw, penalize
from gvpo_jax.rollout.engine import Engine, SamplingParams
from gvpo_jax.rollout.routing import routing_metrics
from gvpo_jax.rollout.stop import StopStrings

_STEPS = 16  # decoded between two looks at the texts, where stop strings may end them


class DecodeState(NamedTuple):
    """What decoding carries from step to step; donated, so that the cache is updated in place."""

    cache: Any  # the rows' keys and values, a ring of t places that all rows write in step
    prefix: Any  # the prompts' that the lanes are at; None where each lane has but one
    hidden_srd: jax.Array  # predicts the rows' next tokens
    item_sr: jax.Array  # which of its lane's n completions a row draws; n: none
    drawn_sr: jax.Array  # how many tokens of it there are
    group_s: jax.Array  # which of its m groups a lane is at
    next_s: jax.Array  # the lane's first completion that no row has taken
    completions_snt: jax.Array  # what was drawn, as in the next two
    logps_snt: jax.Array
    lengths_sn: jax.Array
    at: jax.Array  # steps done


class Prompts(NamedTuple):
    """All prompts, run once: what predicts their first tokens, and their keys and values."""

    prompt_hidden: jax.Array  # [g, d]
    prefix: Any  # of the model; every array has the groups first
    prompts: jax.Array  # their tokens, [g, p]


@dataclass(frozen=True)
class SamplingModel:
    """What sampling needs of a model; it may cut the weights otherwise than training does."""

    functions: Any  # the decoder, not jitted, see `gvpo_jax.models.decoder.DecoderFns`
    # Where it runs; default: the first device.
    mesh: Mesh = field(default_factory=lambda: MeshConfig(fsdp=1).mesh(jax.local_devices()[:1]))
    # The policy's parameters and `frozen`, those beside them -> those to sample with; jitted.
    prepare: Callable[[Any, Any], Any] = lambda params, frozen: join(frozen, params)
    frozen: Any = None
    scoring: "SamplingModel | None" = None  # the model as it is trained, where experts may differ


@dataclass(eq=False, repr=False)
class InProcessEngine(Engine):
    """Rollout engine over a model given as functions.

    Prompts are padded to the next bucket (powers of two from 16, and halfway between), so a run of
    mixed lengths compiles a handful of programs.
    """

    model: SamplingModel
    stop_ids: Sequence[int]  # tokens that end a completion and belong to it
    # Completions drawn at a time, see `gvpo_jax.parallel.layout.lanes`; None: all.
    slots: int | None = None
    stop: StopStrings | None = None  # texts that end a completion; None: there are none

    def __post_init__(self) -> None:
        self._prefill, self._decode = compiled(
            self.model.functions, tuple(self.stop_ids), self.model.mesh
        )

    def generate(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        *,
        num_generations: int,
        max_completion_length: int,
        sampling: SamplingParams,
        seed: int,
        longest_prompt: int | None = None,
    ) -> Groups:
        """See `Engine.generate`."""
        given, k, processes = len(prompts), num_generations, jax.process_count()
        mesh = self.model.mesh
        wanted = fill_up(mesh, given, k) * processes
        size, wanted = lanes(wanted, k, self.slots, group_shards(mesh))
        filling = wanted // processes - given
        prompts_gp, lengths_g = pad_prompts([*prompts, *[prompts[0]] * filling], longest_prompt)
        ids = np.asarray([*prompt_ids, *[prompt_ids[0]] * filling], np.uint32)
        batch = {"prompts": prompts_gp, "prompt_lengths": lengths_g, "prompt_ids": ids}
        batch, params = place_batch(mesh, batch, k), self.model.prepare(params, self.model.frozen)
        lengths_g = batch["prompt_lengths"]
        state, computed = self._prefill(
            params, batch["prompts"], lengths_g, k=k, t=max_completion_length, size=size
        )
        given_to_all = params, lengths_g, batch["prompt_ids"], jax.random.key(seed), computed
        go_on = functools.partial(self._decode, *given_to_all, sampling=sampling)
        if self.stop is None:
            state = go_on(state=state)
            at_stop = np.zeros((given + filling, k), bool)
        else:
            end_at = functools.partial(end, computed, k=k, mesh=mesh)
            state, at_stop = _to_stop_strings(self.stop, state, go_on, end_at)
        drawn: Any = to_host((state.completions_snt, state.lengths_sn, state.logps_snt))
        check_logps(drawn[2], "the policy")
        completions, lengths, logps, at_stop = (
            np.reshape(x, (given + filling, k, *x.shape[2:]))[:given] for x in (*drawn, at_stop)
        )
        kept = np.arange(max_completion_length) < lengths[..., None]
        completions, logps = np.where(kept, completions, 0), np.where(kept, logps, 0)
        last = np.take_along_axis(completions, lengths[..., None] - 1, axis=2)[..., 0]
        stopped = np.isin(last, self.stop_ids) | at_stop
        return make_groups(
            prompts, completions, lengths, source=Source.POLICY, stopped=stopped, old_logps=logps
        )

    def routing_metrics(self, params: Any, groups: Groups) -> dict[str, float]:
        """See `Engine.routing_metrics`."""
        scoring = self.model.scoring
        alone = groups.completions.shape[2] == 1  # its token goes through no layer
        if scoring is None or scoring.functions.routed is None or alone:
            return {}
        return routing_metrics(self.model, scoring, params, groups)


def _to_stop_strings(stop: StopStrings, state: DecodeState, go_on, end_at):
    """Decodes a few tokens at a time, and ends the completions in whose text there is a stop.

    So a row draws a few tokens in vain, but no other one than without stop strings.

    Returns:
        The last state, and this process's completions that a stop string ended, `[s, n]`.
    """
    shape, unfinished = to_host(state.lengths_sn).shape, True
    seen, at_stop = np.zeros(shape, np.int32), np.zeros(shape, bool)
    while unfinished:
        state = go_on(state=state, steps=_STEPS)
        tokens, lengths = to_host((state.completions_snt, state.lengths_sn))
        ends = np.zeros_like(lengths)
        for place in map(tuple, np.argwhere(lengths > seen)):
            ends[place] = stop.end(tokens[place][: lengths[place]].tolist()) or 0
        seen, at_stop = np.where(ends, ends, lengths), at_stop | (ends > 0)
        state, more = end_at(to_devices(ends, state.lengths_sn.sharding), state=state)
        unfinished = bool(more)
    return state, at_stop


@functools.lru_cache(maxsize=8)
def compiled(model: Any, stop_ids: tuple[int, ...], mesh: Mesh):
    """`prefill` and `decode`, jitted."""
    first = functools.partial(prefill, model, mesh=mesh)
    then = functools.partial(decode, model, stop_ids=stop_ids, mesh=mesh)
    return (
        jax.jit(first, static_argnames=("k", "t", "size")),
        jax.jit(then, static_argnames=("sampling", "steps"), donate_argnames=("state",)),
    )


def prefill(model, params, prompts_gp, lengths_g, *, k, t, size, mesh):
    """Run every prompt once: the state before the first token, and the prompts' keys and values."""
    s, r = size
    m = prompts_gp.shape[0] // s
    hidden_gd, prefix = model.prefill(params, prompts_gp, lengths_g)
    zero_s = jnp.zeros(s, jnp.int32)
    state = DecodeState(
        cache=model.empty_cache(s, r, t),
        prefix=_of_lanes(prefix, zero_s) if m > 1 else None,
        hidden_srd=_first_hidden(hidden_gd, zero_s, r),
        item_sr=jnp.broadcast_to(jnp.arange(r)[None], (s, r)),
        drawn_sr=jnp.zeros((s, r), jnp.int32),
        group_s=zero_s,
        next_s=zero_s + r,
        completions_snt=jnp.zeros((s, m * k, t), jnp.int32),
        logps_snt=jnp.zeros((s, m * k, t), jnp.float32),
        lengths_sn=jnp.zeros((s, m * k), jnp.int32),
        at=jnp.zeros((), jnp.int32),
    )
    return constrain_batch(mesh, (state, Prompts(hidden_gd, prefix, prompts_gp)), s, r)


def decode(
    model, params, lengths_g, ids_g, key, prompts, *, state, sampling, stop_ids, mesh, steps=None
):
    """Draw tokens until every completion has stopped or is full, or for so many `steps`."""
    (s, n, t), r = state.completions_snt.shape, state.item_sr.shape[1]
    k = n * s // len(ids_g)
    head_vd, start = model.head(params), state.at

    def logits_of(hidden_bd):
        logits = einsum_f32("bd,vd->bv", hidden_bd, head_vd.astype(hidden_bd.dtype))
        return soft_cap(logits, model.logit_cap)

    def unfinished(state: DecodeState):
        drawing = jnp.any(state.item_sr < n)
        return drawing if steps is None else drawing & (state.at < start + steps)

    def step(state: DecodeState) -> DecodeState:
        lower = functools.partial(_penalized, state, prompts.prompts, lengths_g)
        tokens_sr, logps_sr = _draw_tokens(state, logits_of, key, ids_g, k, sampling, lower)
        booked = _book(state, tokens_sr, logps_sr)
        full_sr = booked.drawn_sr + 1 == t
        ends_sr = functools.reduce(jnp.logical_or, [tokens_sr == x for x in stop_ids], full_sr)
        state, goes_on_sr = _hand_out(booked, ends_sr, k)
        if state.prefix is not None:
            state = _load(state, prompts.prefix, state.group_s != booked.group_s)
        prefix = prompts.prefix if state.prefix is None else state.prefix
        lengths_s = _of_lanes(lengths_g, state.group_s)
        # The last tokens need no successors, so the model is not run on them.
        hidden, cache = jax.lax.cond(
            jnp.any(goes_on_sr),
            lambda cache: model.decode(
                params, tokens_sr, lengths_s, prefix, cache, booked.drawn_sr, booked.at % t
            ),
            lambda cache: (state.hidden_srd, cache),
            state.cache,
        )
        first = _first_hidden(prompts.prompt_hidden, state.group_s, r)
        hidden = jnp.where(goes_on_sr[..., None], hidden, first)
        return state._replace(hidden_srd=hidden, cache=cache, at=state.at + 1)

    state = jax.lax.while_loop(unfinished, step, constrain_batch(mesh, state, s, r))
    return constrain_batch(mesh, state, s, r)


@functools.partial(jax.jit, static_argnames=("k", "mesh"), donate_argnames=("state",))
def end(prompts, ends_sn, *, state, k, mesh):
    """End completions at these lengths (0: not), however long they are, and hand out others.

    Returns:
        The state, and whether there is a token left to draw.
    """
    n, r = state.lengths_sn.shape[1], state.item_sr.shape[1]
    ends_sr = jnp.take_along_axis(ends_sn > 0, jnp.minimum(state.item_sr, n - 1), axis=1)
    kept = state._replace(lengths_sn=jnp.where(ends_sn > 0, ends_sn, state.lengths_sn))
    handed, goes_on_sr = _hand_out(kept, ends_sr, k)
    takes_sr = ~goes_on_sr & (handed.item_sr < n)
    handed = handed._replace(drawn_sr=jnp.where(takes_sr, 0, state.drawn_sr))
    if state.prefix is not None:
        handed = _load(handed, prompts.prefix, handed.group_s != state.group_s)
    first = _first_hidden(prompts.prompt_hidden, handed.group_s, r)
    hidden = jnp.where(takes_sr[..., None], first, state.hidden_srd)
    handed = handed._replace(hidden_srd=hidden)
    return constrain_batch(mesh, handed, len(ends_sn), r), jnp.any(handed.item_sr < n)


def _draw_tokens(state: DecodeState, logits_of, key, ids_g, k, sampling, lower):
    """The rows' next tokens and their log-probs, `[s, r]`.

    The log-probs are the model's own, whatever `sampling` makes of its logits.
    """
    s, r, _ = state.hidden_srd.shape
    logits = logits_of(state.hidden_srd.reshape(s * r, -1))
    ids_sr = jnp.broadcast_to(_of_lanes(ids_g, state.group_s)[:, None], (s, r))

    def uniform(prompt_id, place_in_group, position):
        of_completion = jax.random.fold_in(jax.random.fold_in(key, prompt_id), place_in_group)
        return jax.random.uniform(jax.random.fold_in(of_completion, position))

    places = (ids_sr, state.item_sr % k, state.drawn_sr)
    uniforms = jax.vmap(uniform)(*(x.reshape(-1) for x in places))
    penalty = sampling.repetition_penalty
    tokens_b = draw(logits if penalty == 1 else lower(logits, penalty), uniforms, sampling)
    picked = jnp.take_along_axis(logits, tokens_b[:, None], axis=-1)[:, 0]
    logps_b = picked - jax.nn.logsumexp(logits, axis=-1)
    return tokens_b.reshape(s, r), logps_b.reshape(s, r)


def _penalized(state: DecodeState, prompts_gp, lengths_g, logits_bv, penalty):
    """The rows' logits, lower for the tokens of their prompts and of what they have drawn."""
    (s, r), (_, n, t), v = state.item_sr.shape, state.completions_snt.shape, logits_bv.shape[-1]
    prompts_sp = _of_lanes(prompts_gp, state.group_s)
    lengths_s = _of_lanes(lengths_g, state.group_s)
    prompts_sp = jnp.where(completion_mask(lengths_s, prompts_sp.shape[1]), prompts_sp, v)
    items_sr = jnp.minimum(state.item_sr, n - 1)
    drawn_srt = jnp.take_along_axis(state.completions_snt, items_sr[..., None], axis=1)
    drawn_srt = jnp.where(completion_mask(state.drawn_sr, t), drawn_srt, v)
    prompts_srp = jnp.broadcast_to(prompts_sp[:, None], (s, r, prompts_sp.shape[1]))
    ids = jnp.concatenate([prompts_srp, drawn_srt], axis=2)
    return penalize(logits_bv, ids.reshape(s * r, -1), penalty)


def _book(state: DecodeState, tokens_sr, logps_sr) -> DecodeState:
    """What was drawn, at its completions' next positions; of rows without one, nothing."""
    if state.item_sr.shape == state.lengths_sn.shape:  # all at once: all are at one position
        busy_sr = state.item_sr < state.lengths_sn.shape[1]
        write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=state.at, axis=2)
        return state._replace(
            completions_snt=write(state.completions_snt, jnp.where(busy_sr, tokens_sr, 0)),
            logps_snt=write(state.logps_snt, jnp.where(busy_sr, logps_sr, 0)),
            lengths_sn=state.lengths_sn + busy_sr,
        )

    @jax.vmap
    def write(lane, places, values):
        return lane.at[places].set(values, mode="drop")

    places = (state.item_sr, state.drawn_sr)
    return state._replace(
        completions_snt=write(state.completions_snt, places, tokens_sr),
        logps_snt=write(state.logps_snt, places, logps_sr),
        lengths_sn=write(state.lengths_sn, state.item_sr, state.drawn_sr + 1),
    )


def _hand_out(state: DecodeState, ends_sr, k):
    """Completions for the rows that have none left; and which rows go on with theirs."""
    n = state.lengths_sn.shape[1]
    goes_on_sr = (state.item_sr < n) & ~ends_sr
    if state.item_sr.shape[1] == n:  # each has a row of its own
        return state._replace(
            item_sr=jnp.where(goes_on_sr, state.item_sr, n), drawn_sr=state.drawn_sr + 1
        ), goes_on_sr
    free_sr = ~goes_on_sr
    group_done_s = jnp.all(free_sr, axis=1) & (state.next_s == (state.group_s + 1) * k)
    group_s = jnp.minimum(state.group_s + group_done_s, n // k - 1)
    candidate_sr = state.next_s[:, None] + jnp.cumsum(free_sr, axis=1) - 1
    takes_sr = free_sr & (candidate_sr < ((group_s + 1) * k)[:, None])
    state = state._replace(
        item_sr=jnp.where(goes_on_sr, state.item_sr, jnp.where(takes_sr, candidate_sr, n)),
        drawn_sr=jnp.where(goes_on_sr, state.drawn_sr + 1, 0),
        group_s=group_s,
        next_s=state.next_s + jnp.sum(takes_sr, axis=1),
    )
    return state, goes_on_sr


def _load(state: DecodeState, of_all, moved_s) -> DecodeState:
    """The prompts' keys and values of the groups that lanes have just moved on to."""

    def load(prefix):
        new = _of_lanes(of_all, state.group_s)
        return jax.tree.map(lambda new, old: jax.vmap(jnp.where)(moved_s, new, old), new, prefix)

    prefix = jax.lax.cond(jnp.any(moved_s), load, lambda prefix: prefix, state.prefix)
    return state._replace(prefix=prefix)


def _of_lanes(tree, group_s):
    """Of arrays over all groups, `[s * m, ...]`, what belongs to the lanes' groups, `[s, ...]`."""
    pick = jax.vmap(lambda of_lane, group: of_lane[group])
    return jax.tree.map(lambda x: pick(x.reshape(len(group_s), -1, *x.shape[1:]), group_s), tree)


def _first_hidden(hidden_gd, group_s, r):
    hidden_sd = _of_lanes(hidden_gd, group_s)
    return jnp.broadcast_to(hidden_sd[:, None], (len(hidden_sd), r, hidden_sd.shape[-1]))
