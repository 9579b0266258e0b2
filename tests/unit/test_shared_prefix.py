"""The shared-prefix routes, padded and packed, against the plain one with the prompt k times."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import rounding

from gvpo_jax.logprobs import completion_mask, token_logprobs
from gvpo_jax.models.decoder import (
    DecoderConfig,
    DecoderOptions,
    decoder_fns,
    full_logits,
    init_params,
)
from gvpo_jax.models.rope import RopeScaling
from gvpo_jax.training.step import token_logps

G, K, P, T = 3, 4, 7, 6
SHAPE = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_layers": 2}
CONFIGS = {
    "llama": DecoderConfig(
        "llama",
        **SHAPE,
        num_heads=6,
        num_kv_heads=2,
        head_dim=4,
        tie_embeddings=True,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16),
    ),
    "qwen2": DecoderConfig(
        "qwen2", **SHAPE, num_heads=3, num_kv_heads=1, head_dim=8, qkv_bias=True
    ),
    "qwen3": DecoderConfig(
        "qwen3", **SHAPE, num_heads=4, num_kv_heads=4, head_dim=10, qk_norm=True
    ),
    # windows that end in the prompt and in the completion, caps, two rotary bases
    "gemma3": DecoderConfig(
        "gemma3_text",
        **SHAPE,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        norm="one_plus",
        norms="both",
        windows=(3, None),
        local_rope_theta=100.0,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    config = CONFIGS[request.param]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0, 0.05, x.shape), x.dtype), init_params(config, 0)
    )
    prompt_lengths = np.array([7, 1, 4])
    lengths = np.array([[6, 1, 3, 2], [1, 1, 6, 4], [5, 6, 2, 6]])
    # What lies past a length is noise: it must not matter.
    prompts, completions = rng.integers(0, 61, (G, P)), rng.integers(0, 61, (G, K, T))
    return config, params, prompts, prompt_lengths, completions, lengths


@pytest.fixture(scope="module")
def plain(case):
    """The log-probs of repeated prompts, and how far others may be from them."""
    config, params, *rest = case
    score = jax.jit(lambda p: repeated_logprobs(config, p, *rest))
    atol = rounding(score, params)
    assert atol < 1e-4
    return score(params), atol


def repeated_logprobs(config, params, prompts, prompt_lengths, completions, lengths):
    """The prompt repeated k times, every sequence on its own row, padded behind its end."""
    rows = np.zeros((G, K, P + T), np.int32)
    places = np.zeros((G, K, T), np.int32)
    for g, i in np.ndindex(G, K):
        p, t = prompt_lengths[g], lengths[g, i]
        rows[g, i, :p], rows[g, i, p : p + t] = prompts[g, :p], completions[g, i, :t]
        places[g, i] = np.minimum(np.arange(T) + p - 1, P + T - 1)
    logits = full_logits(config, params, rows.reshape(G * K, -1)).reshape(G, K, P + T, -1)
    logps = jax.nn.log_softmax(jnp.take_along_axis(logits, places[..., None], axis=2))
    picked = jnp.take_along_axis(logps, completions[..., None], axis=-1)[..., 0]
    return jnp.where(np.arange(T)[None, None] < lengths[..., None], picked, 0)


def shared_logprobs(config, params, prompts, prompt_lengths, completions, lengths, **options):
    apply = decoder_fns(config, DecoderOptions(**options))
    hidden = apply.completion_hidden(params, prompts, prompt_lengths, completions)
    limits = {"chunk_bytes": 24 * 61 * 4, "cap": config.final_logit_softcapping}
    logps = token_logprobs(hidden, apply.head(params), completions, **limits)
    return jnp.where(completion_mask(lengths, T), logps, 0)


def packed_logprobs(config, params, *arrays, shards=1, spare=0, **options):
    apply = decoder_fns(config, DecoderOptions(shards=shards, **options))
    prompt_lengths, lengths = arrays[1], arrays[3]
    fed = (prompt_lengths + (lengths - 1).sum(axis=1)).reshape(shards, -1).sum(axis=1).max()
    logps = token_logps(apply, params, *arrays, packed_size=int(fed) + spare)
    return jnp.where(completion_mask(lengths, T), logps, 0)


@pytest.mark.parametrize(
    "route",
    [
        shared_logprobs,
        packed_logprobs,
        functools.partial(packed_logprobs, shards=3, spare=2),
    ],
)
def test_log_probs_equal_those_of_repeated_prompts(case, plain, route):
    config, params, *rest = case
    shared = jax.jit(lambda p: route(config, p, *rest))
    expected, atol = plain
    np.testing.assert_allclose(shared(params), expected, atol=atol)


def test_a_stream_too_short_gives_no_wrong_number(case):
    config, params, *rest = case
    logps = jax.jit(lambda p: packed_logprobs(config, p, *rest, spare=-1))(params)
    lengths = rest[-1]
    assert np.isnan(np.asarray(logps)[np.arange(T) < lengths[..., None]]).all()


def test_gradients_equal_those_of_repeated_prompts(case):
    config, params, *rest = case
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(G, K, T)), jnp.float32) / T

    def gradient(route, **options):
        value = lambda p: jnp.sum(cotangent * route(config, p, *rest, **options))  # noqa: E731
        return jax.jit(jax.grad(value))

    of_params = gradient(repeated_logprobs)
    plain, atol = of_params(params), rounding(of_params, params)
    assert atol < 1e-4
    for route, options in (
        (shared_logprobs, {}),
        (packed_logprobs, {"spare": 3, "remat": "dots"}),
        (packed_logprobs, {"shards": 3, "remat": "layer"}),
    ):
        shared = gradient(route, **options)(params)
        for (path, a), b in zip(
            jax.tree.leaves_with_path(plain), jax.tree.leaves(shared), strict=True
        ):
            np.testing.assert_allclose(b, a, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_bfloat16_stays_near_float32(case, plain):
    config, params, *rest = case
    coarse = jax.jit(lambda p: shared_logprobs(config, p, *rest, dtype=jnp.bfloat16))(params)
    assert coarse.dtype == jnp.float32
    error = np.abs(np.asarray(coarse - plain[0]))
    assert 1e-3 < error.max() < 0.1


def test_decoding_gives_the_hidden_states_of_scoring(case):
    config, params, prompts, prompt_lengths, completions, _ = case
    apply = decoder_fns(config)
    score = jax.jit(lambda p: apply.completion_hidden(p, prompts, prompt_lengths, completions))
    last, prefix = jax.jit(apply.prefill)(params, prompts, prompt_lengths)
    decode = jax.jit(apply.decode)
    cache = apply.empty_cache(G, K, T)
    hidden = [jnp.broadcast_to(last[:, None], (G, K, last.shape[-1]))]
    for at in range(T - 1):
        before = jnp.full((G, K), at)
        state, cache = decode(
            params, completions[:, :, at], prompt_lengths, prefix, cache, before, at
        )
        hidden.append(state)
    atol = rounding(score, params)
    assert atol < 1e-4
    np.testing.assert_allclose(jnp.stack(hidden, axis=2), score(params), atol=atol)


def test_a_prompt_costs_the_same_for_any_k():
    """FLOPs of a long prompt with one-token completions, as XLA counts them."""
    config = CONFIGS["qwen2"]
    apply, params = decoder_fns(config), init_params(config, 0)

    def flops(k):
        shapes = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((2, 128), (2,), (2, k, 2))]
        compiled = jax.jit(apply.completion_hidden).lower(params, *shapes).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(8) < 1.25 * flops(1)
