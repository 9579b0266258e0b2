import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from rounding import rounding

from gvpo_jax.data.batch import pad_prompts
from gvpo_jax.logprobs import completion_mask
from gvpo_jax.models.debug import debug_tokenizer
from gvpo_jax.models.decoder import (
    DecoderConfig,
    DecoderFns,
    DecoderOptions,
    decoder_fns,
    full_logits,
    init_params,
)
from gvpo_jax.parallel.layout import lanes
from gvpo_jax.rollout import InProcessEngine, SamplingModel, SamplingParams
from gvpo_jax.rollout.draw import draw, penalize
from gvpo_jax.rollout.stop import StopStrings, before_stop
from gvpo_jax.training.step import token_logps

CONFIG = DecoderConfig("llama", 43, 16, 24, 2, 4, 2, 4, tie_embeddings=True)
PARAMS = jax.tree.map(lambda x: 2 * x, init_params(CONFIG, 0))  # far from uniform
APPLY = decoder_fns(CONFIG)
STOPS = (5, 6)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(7, 43, n).tolist() for n in (9, 2, 5)]
MORE_PROMPTS = [*PROMPTS, *(RNG.integers(7, 43, n).tolist() for n in (3, 1, 7))]
SCORE = jax.jit(functools.partial(token_logps, APPLY))
DRAW = jax.jit(draw, static_argnums=2)


def generate(
    prompts, ids, *, k=4, t=24, seed=1, sampling=None, stops=STOPS, slots=None, stop=None, fns=APPLY
):
    return InProcessEngine(SamplingModel(fns), stops, slots=slots, stop=stop).generate(
        PARAMS, prompts, ids, num_generations=k, max_completion_length=t,
        sampling=sampling or SamplingParams(), seed=seed,
    )  # fmt: skip


def scored(prompts, rollout, params=PARAMS):
    """The log-probs of what was sampled, in one forward pass; 0 past the end."""
    logps = SCORE(params, *pad_prompts(prompts), rollout.completions)
    mask = completion_mask(rollout.lengths, rollout.completions.shape[-1])
    return np.where(mask, logps, 0)


def tolerance(prompts, rollout):
    return rounding(lambda params: scored(prompts, rollout, params), PARAMS)


def test_stop_token_belongs_to_the_completion_and_full_ones_are_called_so():
    rollout = generate(PROMPTS, [0, 1, 2])
    assert {True, False} == set(rollout.stopped.ravel().tolist())
    for g, i in np.ndindex(3, 4):
        tokens = rollout.completions[g, i, : rollout.lengths[g, i]]
        assert not set(tokens[:-1]) & set(STOPS)
        if rollout.stopped[g, i]:
            assert tokens[-1] in STOPS
        else:
            assert len(tokens) == 24
            assert tokens[-1] not in STOPS


def test_log_probs_are_those_of_scoring_whatever_the_temperature():
    rollout = generate(PROMPTS, [0, 1, 2], sampling=SamplingParams(temperature=0.7, top_p=0.9))
    atol = tolerance(PROMPTS, rollout)
    assert atol < 5e-3  # a wrong position or mask is off by tenths
    np.testing.assert_allclose(rollout.old_logps, scored(PROMPTS, rollout), atol=atol)


def test_greedy_equals_argmax_of_the_plain_forward_pass():
    rollout = generate(
        PROMPTS, [0, 1, 2], k=2, t=8, sampling=SamplingParams(temperature=0), stops=()
    )
    forward = jax.jit(lambda tokens: full_logits(CONFIG, PARAMS, tokens))
    for prompt, completions in zip(PROMPTS, rollout.completions, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            padded = np.array([tokens + [0] * (20 - len(tokens))])
            tokens.append(int(forward(padded)[0, len(tokens) - 1].argmax()))
        assert completions.tolist() == [tokens[len(prompt) :]] * 2


def test_a_repetition_penalty_is_that_of_transformers():
    logits = 3 * RNG.standard_normal((4, 43)).astype(np.float32)
    ids = RNG.integers(0, 43, (4, 9))
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.4)(
        torch.tensor(ids), torch.tensor(logits)
    )
    np.testing.assert_allclose(penalize(jnp.array(logits), jnp.array(ids), 1.4), theirs, rtol=1e-6)
    nothing = penalize(jnp.array(logits), jnp.full((4, 2), 43), 1.4)
    np.testing.assert_array_equal(nothing, logits)


@pytest.mark.parametrize("slots", [None, 1, 2, 3])
def test_tokens_that_are_there_are_penalized_in_prompt_and_completion(slots):
    """Greedy, by the plain forward pass; rows of fewer slots than completions are used again."""
    sampling, ids = SamplingParams(temperature=0, repetition_penalty=1.5), range(len(MORE_PROMPTS))
    rollout = generate(MORE_PROMPTS, ids, k=2, t=8, sampling=sampling, slots=slots)
    forward = jax.jit(lambda tokens: full_logits(CONFIG, PARAMS, tokens))
    plain = generate(MORE_PROMPTS, ids, k=2, t=8, sampling=SamplingParams(temperature=0))
    assert (rollout.completions != plain.completions).any()
    for g, prompt in enumerate(MORE_PROMPTS):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 8 and (tokens == prompt or tokens[-1] not in STOPS):
            padded = np.array([tokens + [0] * (20 - len(tokens))])
            logits = np.array(forward(padded)[0, len(tokens) - 1])
            for token in set(tokens):
                logits[token] *= 1.5 if logits[token] < 0 else 1 / 1.5
            tokens.append(int(logits.argmax()))
        for completion, length in zip(rollout.completions[g], rollout.lengths[g], strict=True):
            assert completion[:length].tolist() == tokens[len(prompt) :]


def test_log_probs_are_the_policys_own_whatever_the_penalty():
    rollout = generate(PROMPTS, [0, 1, 2], sampling=SamplingParams(repetition_penalty=2.0))
    atol = tolerance(PROMPTS, rollout)
    np.testing.assert_allclose(rollout.old_logps, scored(PROMPTS, rollout), atol=atol)


def test_a_window_wider_than_prompt_and_cache_changes_nothing():
    wide = decoder_fns(dataclasses.replace(CONFIG, windows=(64, 33)))
    expected, rollout = generate(PROMPTS, [0, 1, 2]), generate(PROMPTS, [0, 1, 2], fns=wide)
    np.testing.assert_array_equal(rollout.completions, expected.completions)
    atol = tolerance(PROMPTS, expected)
    np.testing.assert_allclose(rollout.old_logps, expected.old_logps, atol=atol)


def test_a_sample_does_not_depend_on_the_batch_around_it():
    together = generate(PROMPTS, [10, 11, 12])
    alone = generate([PROMPTS[2], PROMPTS[0]], [12, 10], k=2)
    for here, there in ((0, 2), (1, 0)):
        for i in range(2):
            length = together.lengths[there, i]
            assert alone.lengths[here, i] == length
            np.testing.assert_array_equal(
                alone.completions[here, i, :length], together.completions[there, i, :length]
            )


@pytest.mark.parametrize("slots", [1, 5, 12, 23])  # lanes x rows: 1 x 1, 2 x 2, 6 x 2, 6 x 3
def test_samples_do_not_depend_on_the_slots(slots):
    """Rows that take the next completion, and lanes that take the next prompt, of other length."""
    at_once = all_at_once()
    few = generate(MORE_PROMPTS, range(6), slots=slots)
    assert len(set(at_once.lengths.ravel().tolist())) > 4
    np.testing.assert_array_equal(few.lengths, at_once.lengths)
    np.testing.assert_array_equal(few.completions, at_once.completions)
    np.testing.assert_array_equal(few.stopped, at_once.stopped)
    atol = tolerance(MORE_PROMPTS, at_once)
    assert atol < 5e-3
    np.testing.assert_allclose(few.old_logps, at_once.old_logps, atol=atol)


class Words:
    """A tokenizer whose tokens are two letters, or none."""

    rng = np.random.default_rng(3)
    words = ("", *("".join(letters) for letters in rng.choice(list("abc"), (42, 2))))

    def decode(self, tokens, **options):
        assert options == {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return "".join(self.words[token] for token in tokens)


TEXTS = ("abc", "ccba")


@pytest.mark.parametrize(("slots", "steps"), [(None, 16), (1, 7), (5, 1)])
def test_stop_strings_end_what_is_sampled_as_a_plain_loop_does(monkeypatch, slots, steps):
    """Over texts sampled without them; one spans two tokens at least, and may end inside one."""
    free, lengths = all_at_once(), all_at_once().lengths.copy()
    for place in np.ndindex(lengths.shape):
        text = ""
        for n, token in enumerate(free.completions[place][: lengths[place]], start=1):
            text += Words.words[token]
            if any(stop in text for stop in TEXTS):
                lengths[place] = n
                break
    assert 3 <= (lengths < free.lengths).sum() <= lengths.size - 3
    monkeypatch.setattr("gvpo_jax.rollout.inprocess._STEPS", steps)
    ended = generate(MORE_PROMPTS, range(6), slots=slots, stop=StopStrings(TEXTS, Words()))
    kept = np.arange(24) < lengths[..., None]
    np.testing.assert_array_equal(ended.lengths, lengths)
    np.testing.assert_array_equal(ended.completions, np.where(kept, free.completions, 0))
    np.testing.assert_array_equal(ended.stopped, free.stopped | (lengths < free.lengths))
    atol = tolerance(MORE_PROMPTS, free)
    np.testing.assert_allclose(ended.old_logps, np.where(kept, free.old_logps, 0), atol=atol)


def test_stop_strings_save_steps():
    """Of 24 tokens the first ends every text; the next look is after 16, not 24."""
    engine = InProcessEngine(SamplingModel(APPLY), (), stop=StopStrings(("",), Words()))
    drawn = []
    decode = engine._decode

    def counted(*arrays, **options):
        state = decode(*arrays, **options)
        drawn.append(int(state.at))
        return state

    engine._decode = counted
    rollout = engine.generate(
        PARAMS, PROMPTS, range(3), num_generations=4, max_completion_length=24,
        sampling=SamplingParams(), seed=1,
    )  # fmt: skip
    assert drawn == [16]
    assert rollout.lengths.tolist() == [[1] * 4] * 3
    assert rollout.stopped.all()


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("a = 4\n\nQ: 5", ["Q:", "\n\n"], "a = 4"),
        ("a = 4", ["Q:"], "a = 4"),
        ("a = 4", [], "a = 4"),
        ("Q:", ["Q:"], ""),
    ],
)
def test_a_text_ends_before_the_first_stop_string(text, stops, expected):
    assert before_stop(text, stops) == expected


def test_a_special_token_may_be_a_stop_string():
    tokenizer = debug_tokenizer()
    tokens = [*b"so<|im_end", tokenizer.convert_tokens_to_ids("<|im_end|>"), *b"more"]
    assert StopStrings(("<|im_end|>",), tokenizer).end(tokens) == len(b"so<|im_end") + 1
    euro = [*"2 €, 3".encode()]  # three tokens, of which the last completes the sign
    assert StopStrings(("€",), tokenizer).end(euro) == 5
    assert StopStrings(("€, 4",), tokenizer).end(euro) is None


@functools.cache
def all_at_once():
    return generate(MORE_PROMPTS, range(6))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_a_small_cache_costs_little_accuracy(dtype):
    """Nats a token, of a model whose logits are far apart; lanes write and read it as any other."""
    apply = decoder_fns(CONFIG, DecoderOptions(cache_dtype=dtype))
    draws = [
        InProcessEngine(SamplingModel(apply), STOPS, slots=slots).generate(
            PARAMS, PROMPTS, [0, 1, 2], num_generations=4, max_completion_length=24,
            sampling=SamplingParams(), seed=1,
        )
        for slots in (None, 2)
    ]  # fmt: skip
    np.testing.assert_array_equal(draws[0].completions, draws[1].completions)
    rollout = draws[0]
    off = np.abs(rollout.old_logps - scored(PROMPTS, rollout))[completion_mask(rollout.lengths, 24)]
    assert 1e-5 < off.mean() < 0.05
    size = sum(x.nbytes for x in jax.tree.leaves(apply.empty_cache(1, 2, 8)))
    full = sum(x.nbytes for x in jax.tree.leaves(APPLY.empty_cache(1, 2, 8)))
    assert size == full * (1 / 2 if dtype == jnp.bfloat16 else 1 / 4 + 1 / CONFIG.head_dim)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ((64, 8, None), ((64, 8), 64)),
        ((64, 8, 512), ((64, 8), 64)),
        ((64, 8, 256), ((64, 4), 64)),
        ((64, 8, 64), ((32, 2), 64)),
        ((64, 8, 96), ((32, 3), 64)),
        ((64, 8, 1), ((1, 1), 64)),
        ((61, 1, 32), ((31, 1), 62)),  # filled up
        ((53, 8, 36), ((18, 2), 54)),
        ((64, 8, 64, 8), ((32, 2), 64)),
        ((64, 8, 4, 8), ((8, 1), 64)),  # every shard needs a lane
        ((6, 8, 4, 4), ((6, 8), 6)),  # completions are cut over devices, not groups
    ],
)
def test_lanes_and_rows(given, size):
    assert lanes(*given) == size


LENGTHS = np.clip(np.random.default_rng(5).lognormal(np.log(15), 1, 512), 2, 128).astype(int)


def of_known_lengths() -> DecoderFns:
    """Not a network: the first token, uniform over 512, says how long the completion gets.

    After it come ones and then the stop token 0. Hidden states are logits.
    """
    table = jnp.asarray(LENGTHS)

    def decode(params, tokens_sr, lengths_s, prefix, cache, before_sr, place):
        lengths_sr = jnp.where(before_sr == 0, table[tokens_sr], cache)
        token_sr = jnp.where(before_sr + 2 >= lengths_sr, 0, 1)
        return 50 * jax.nn.one_hot(token_sr, 512), lengths_sr

    return DecoderFns(
        prefill=lambda params, prompts_gp, lengths_g: (jnp.zeros((len(lengths_g), 512)), ()),
        empty_cache=lambda groups, k, length: jnp.zeros((groups, k), jnp.int32),
        decode=decode,
        completion_hidden=lambda *_: jnp.zeros(()),
        head=lambda params: jnp.eye(512),
    )


def steps_of(slots, ids, t=128):
    """Lengths that were drawn, and decoding steps that it took."""
    engine, taken = InProcessEngine(SamplingModel(of_known_lengths()), (0,), slots=slots), []
    decode = engine._decode

    def counted(*arrays, **options):
        state = decode(*arrays, **options)
        taken.append(int(state.at))
        return state

    engine._decode = counted
    rollout = engine.generate(
        {}, [[1]] * len(ids), ids, num_generations=8, max_completion_length=t,
        sampling=SamplingParams(), seed=0,
    )  # fmt: skip
    return rollout, taken[0]


def test_slots_are_refilled_as_samples_end():
    """64 prompts, 8 completions each, 64 at a time; lognormal lengths, cut at 128."""
    ids = list(range(64))
    batches = [steps_of(None, ids[i : i + 8]) for i in range(0, 64, 8)]
    fixed = sum(steps for _, steps in batches)
    refilled, steps = steps_of(64, ids)
    lengths = np.concatenate([rollout.lengths for rollout, _ in batches])
    np.testing.assert_array_equal(refilled.lengths, lengths)
    first = refilled.completions[..., 0]
    assert ((LENGTHS[first] == refilled.lengths) | (first == 0) | (refilled.lengths == 128)).all()
    # Lanes of 2 rows and 2 groups, by hand: a row takes the group's next completion at once, a
    # group begins when the one before it is done.
    ends = []
    for lane in lengths.reshape(32, 2, 8):
        rows = [0, 0]
        for group in lane:
            rows = [max(rows)] * 2
            for length in group:
                rows[rows.index(min(rows))] += length
        ends.append(max(rows))
    assert steps == max(ends)
    assert fixed > 2.5 * steps


def test_seed_prompt_id_and_place_in_the_group_all_change_the_sample():
    base = generate(PROMPTS[:1] * 2, [0, 1], t=24, stops=())
    rows = base.completions.reshape(8, 24).tolist()
    assert len({tuple(row) for row in rows}) == 8
    again, other = (
        generate(PROMPTS[:1] * 2, [0, 1], t=24, stops=(), seed=seed).completions for seed in (1, 2)
    )
    np.testing.assert_array_equal(again, base.completions)
    assert (other != base.completions).any(axis=-1).all()


def test_decoding_ends_when_all_have_stopped():
    everything = tuple(range(43))
    rollout = generate(PROMPTS, [0, 1, 2], t=10_000, stops=everything)
    assert (rollout.lengths == 1).all()


def test_sampled_tokens_follow_the_models_distribution():
    k, id_count = 64, 64
    rollout = generate([PROMPTS[0]] * id_count, range(id_count), k=k, t=1, stops=())
    logits = jax.jit(functools.partial(full_logits, CONFIG))(PARAMS, np.array([PROMPTS[0]]))
    probs = np.asarray(jax.nn.softmax(logits[0, -1]))
    assert chi_squared(rollout.completions.ravel(), probs) < 2


def chi_squared(tokens, probs):
    """Chi-squared per degree of freedom, rare tokens pooled."""
    n, counts = len(tokens), np.bincount(tokens, minlength=len(probs))
    common = n * probs >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = n * np.append(probs[common], probs[~common].sum())
    used = expected > 0
    return float(((observed - expected)[used] ** 2 / expected[used]).sum() / max(used.sum() - 1, 1))


@pytest.mark.parametrize(("vocab", "temperature"), [(7, 2.0), (256, 1.0), (1000, 0.5)])
def test_one_uniform_per_row_draws_from_the_softmax(vocab, temperature):
    n, logits = 50_000, RNG.normal(0, 2, vocab).astype(np.float32)
    uniforms = jax.random.uniform(jax.random.key(vocab), (n,))
    rows = jnp.broadcast_to(jnp.asarray(logits)[None], (n, vocab))
    tokens = np.asarray(DRAW(rows, uniforms, SamplingParams(temperature=temperature)))
    probs = np.exp(logits.astype(np.float64) / temperature)
    assert chi_squared(tokens, probs / probs.sum()) < 1.5


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_never_draw_a_token_of_probability_zero(u):
    logits = jnp.asarray(RNG.normal(0, 5, (64, 700)), jnp.float32).at[:, ::3].set(-jnp.inf)
    tokens = DRAW(logits, jnp.full(64, u), SamplingParams())
    assert np.isfinite(np.asarray(logits)[np.arange(64), tokens]).all()


def allowed(logits, sampling):
    """The tokens that truncation leaves, by the definitions, on sorted probabilities."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled)
    if sampling.top_k:
        order = order[: sampling.top_k]
    probs = np.exp(scaled[order] - scaled[order].max())
    probs /= probs.sum()
    if sampling.top_p < 1:
        keep = int(np.searchsorted(np.cumsum(probs), sampling.top_p)) + 1
        order, probs = order[:keep], probs[:keep]
    return set(order[probs >= sampling.min_p * probs.max()].tolist())


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.7),
        SamplingParams(min_p=0.2),
        SamplingParams(0.8, 20, 0.9, 0.05),
    ],
)
def test_truncation_leaves_exactly_the_tokens_of_the_definition(sampling):
    logits = RNG.normal(0, 1.5, 60).astype(np.float32)
    n = 20_000
    uniforms = jax.random.uniform(jax.random.key(3), (n,))
    tokens = DRAW(jnp.broadcast_to(jnp.asarray(logits)[None], (n, 60)), uniforms, sampling)
    assert set(np.asarray(tokens).tolist()) == allowed(logits, sampling)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"top_k": -1},
        {"repetition_penalty": 0},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


def test_only_plain_sampling_keeps_the_support():
    assert not SamplingParams(temperature=1.5).cuts_support
    for cut in (
        SamplingParams(temperature=0),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.9),
        SamplingParams(min_p=0.1),
    ):
        assert cut.cuts_support
