import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvpo_jax.logprobs import completion_mask, sequence_logprobs, token_logprobs

RNG = np.random.default_rng(0)
HIDDEN, HEAD = RNG.normal(size=(2, 3, 11, 8)), RNG.normal(size=(29, 8))
TARGETS = RNG.integers(0, 29, (2, 3, 11))


def numpy_logprobs(hidden, head, targets):
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logps, targets[..., None], -1)[..., 0]


@pytest.mark.parametrize("chunk_tokens", [1, 6, 24, 60, 1024])
def test_every_chunk_size_gives_the_exact_numbers(chunk_tokens):
    logps = token_logprobs(
        jnp.asarray(HIDDEN, jnp.float32),
        jnp.asarray(HEAD, jnp.float32),
        TARGETS,
        chunk_tokens=chunk_tokens,
    )
    assert logps.dtype == jnp.float32
    np.testing.assert_allclose(logps, numpy_logprobs(HIDDEN, HEAD, TARGETS), atol=2e-6)


def test_gradients_do_not_depend_on_the_chunk_size():
    hidden, head = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(HEAD, jnp.float32)
    cotangent = jnp.asarray(RNG.normal(size=TARGETS.shape), jnp.float32)

    def value(hidden, head, chunk_tokens):
        return jnp.sum(cotangent * token_logprobs(hidden, head, TARGETS, chunk_tokens=chunk_tokens))

    whole = jax.grad(value, (0, 1))(hidden, head, 1024)
    chunked = jax.grad(value, (0, 1))(hidden, head, 12)
    for a, b in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_states_get_float32_logits():
    hidden, head = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(HEAD, jnp.bfloat16)
    exact = numpy_logprobs(np.asarray(hidden, np.float64), np.asarray(head, np.float64), TARGETS)
    np.testing.assert_allclose(token_logprobs(hidden, head, TARGETS), exact, atol=1e-4)


def test_memory_does_not_grow_with_length_times_vocabulary():
    def temporaries(t):
        hidden = jax.ShapeDtypeStruct((1, 4, t, 16), jnp.float32)
        head = jax.ShapeDtypeStruct((8192, 16), jnp.float32)
        targets = jax.ShapeDtypeStruct((1, 4, t), jnp.int32)
        grad = jax.grad(lambda h, w, y: token_logprobs(h, w, y, chunk_tokens=64).sum(), (0, 1))
        return (
            jax.jit(grad)
            .lower(hidden, head, targets)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    logits = 4 * 8192 * 4  # bytes of one position's logits, all four rows
    assert temporaries(1024) - temporaries(128) < (1024 - 128) * logits / 20


def test_sequence_sums_stop_at_the_length():
    logps = jnp.asarray(RNG.normal(size=(2, 3, 5)), jnp.float32)
    lengths = np.array([[0, 1, 5], [2, 3, 4]])
    expected = [[sum(np.asarray(logps)[i, j, : lengths[i, j]]) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(sequence_logprobs(logps, lengths), expected, atol=1e-6)
    np.testing.assert_array_equal(completion_mask(lengths, 5).sum(-1), lengths)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[\.\.\., T, D\]"):
        token_logprobs(jnp.zeros((2, 5, 8)), jnp.zeros((9, 8)), jnp.zeros((2, 4), int))
