import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from gvpo_jax.ops.attention import Int8, Prefix, attend, causal, stored

RNG = np.random.default_rng(0)
G, K, T, P, N, R, D = 2, 3, 4, 5, 2, 3, 6


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def plain_attention(queries, keys, values, mask, cap=None):
    """One query of one head against a list of keys, in float64."""
    scores = keys.astype(np.float64) @ queries / np.sqrt(D)
    scores = np.where(mask, cap * np.tanh(scores / cap) if cap else scores, -np.inf)
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ values.astype(np.float64)


def test_prefix_and_suffix_share_one_softmax():
    queries = normal(G, K, T, N * R, D) * 3
    keys, values = normal(G, K, N, T, D) * 3, normal(G, K, N, T, D)
    prefix_keys, prefix_values = normal(G, N, P, D) * 3, normal(G, N, P, D)
    prefix_mask = np.arange(P) < np.array([[5], [2]])
    causal = np.tril(np.ones((T, T), bool))
    prefix = Prefix(jnp.asarray(prefix_keys), jnp.asarray(prefix_values), jnp.asarray(prefix_mask))
    own = (jnp.asarray(x) for x in (queries, keys, values, causal[None, None]))
    out = attend(*own, prefix)
    for g, k, t, h in np.ndindex(G, K, T, N * R):
        n = h // R
        expected = plain_attention(
            queries[g, k, t, h],
            np.concatenate([prefix_keys[g, n], keys[g, k, n]]),
            np.concatenate([prefix_values[g, n], values[g, k, n]]),
            np.concatenate([prefix_mask[g], causal[t]]),
        )
        np.testing.assert_allclose(out[g, k, t, h], expected, atol=1e-5)


@pytest.mark.parametrize(("t", "window", "cap"), [(9, 3, None), (9, 8, 2.0), (150, 70, None)])
def test_windows_and_caps_are_those_of_a_plain_loop(t, window, cap):
    """Windows that end in the completion and in the prompt, also where queries come in blocks."""
    queries = normal(G, K, t, N * R, D) * 3
    keys, values = normal(G, K, N, t, D) * 3, normal(G, K, N, t, D)
    prefix_keys, prefix_values = normal(G, N, P, D) * 3, normal(G, N, P, D)
    lengths = np.array([5, 2])
    counted = jnp.asarray(np.arange(P) < lengths[:, None])
    prefix = Prefix(jnp.asarray(prefix_keys), jnp.asarray(prefix_values), counted)
    own = (jnp.asarray(x) for x in (queries, keys, values))
    out = causal(*own, prefix, window=window, cap=cap)
    for g, i, h in itertools.product(range(G), range(t), range(N * R)):
        whole_keys, whole_values = (
            np.concatenate([shared[g, h // R, : lengths[g]], own[g, 1, h // R, : i + 1]])
            for shared, own in ((prefix_keys, keys), (prefix_values, values))
        )
        seen = np.arange(len(whole_keys)) >= len(whole_keys) - window
        expected = plain_attention(queries[g, 1, i, h], whole_keys, whole_values, seen, cap)
        np.testing.assert_allclose(out[g, 1, i, h], expected, atol=1e-5)


def test_int8_is_within_half_a_step_of_every_entry():
    x = normal(G, N, P, D) * 10
    kept = stored(jnp.asarray(x), jnp.int8)
    assert isinstance(kept, Int8)
    assert kept.whole.dtype == jnp.int8
    np.testing.assert_array_equal(jnp.max(jnp.abs(kept.whole), axis=-1), 127)
    error = np.abs(np.asarray(kept.whole) * np.asarray(kept.scale)[..., None] - x)
    assert (error <= 0.5001 * np.abs(x).max(-1, keepdims=True) / 127).all()
    nothing = stored(jnp.zeros((2, D)), jnp.int8)
    np.testing.assert_array_equal(nothing.whole, 0)


def test_large_scores_do_not_overflow_and_masked_keys_do_not_leak():
    queries, keys = np.full((1, 1, 1, 1, D), 100.0), np.full((1, 1, 1, 2, D), 100.0)
    values = np.array([[1.0] * D, [np.inf] * D])[None, None, None]
    mask = np.array([True, False])[None, None, None]
    values = np.where(np.isinf(values), 1e30, values)
    out = attend(*(jnp.asarray(x, jnp.float32) for x in (queries, keys, values)), jnp.asarray(mask))
    np.testing.assert_allclose(out, 1.0)
