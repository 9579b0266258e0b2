import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gvpo_jax.logprobs import completion_mask, sequence_logprobs, token_logprobs

RNG = np.random.default_rng(0)
HIDDEN, HEAD = RNG.normal(size=(2, 3, 11, 8)), RNG.normal(size=(29, 8))
TARGETS = RNG.integers(0, 29, (2, 3, 11))
LOGITS = 29 * 4  # bytes of one position's


def numpy_logprobs(hidden, head, targets):
    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logps, targets[..., None], -1)[..., 0]


HEAD_2100 = RNG.normal(size=(2100, 8))
TARGETS_2100 = RNG.integers(0, 2100, (2, 3, 11))


@pytest.mark.parametrize("cap", [None, 2.5])
@pytest.mark.parametrize("rows", [1, 200, 256])  # blocks of 128 and 52, or of 256 and 52
def test_blocks_of_the_vocabulary_give_values_and_gradients_of_the_plain_formula(rows, cap):
    hidden, head = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(HEAD_2100, jnp.float32)
    cotangent = jnp.asarray(RNG.normal(size=TARGETS.shape), jnp.float32)
    limit = 2 * TARGETS.size * rows * 4

    def blocks(hidden, head):
        logps = token_logprobs(
            hidden, head, TARGETS_2100, chunk_bytes=limit, vocabulary_blocks=True, cap=cap
        )
        return jnp.sum(cotangent * logps), logps

    def plain(hidden, head):
        logits = jnp.einsum("gktd,vd->gktv", hidden, head, precision="highest")
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        logps = jax.nn.log_softmax(logits)
        return jnp.sum(cotangent * jnp.take_along_axis(logps, TARGETS_2100[..., None], -1)[..., 0])

    grad = jax.value_and_grad(blocks, (0, 1), has_aux=True)
    largest = max(
        (v.aval.size for e in _loops(jax.make_jaxpr(grad)(hidden, head)) for v in e.outvars),
    )
    assert largest <= max(2100 * 8, TARGETS.size * max(rows // 128 * 128, 128))
    (value, logps), ours = grad(hidden, head)
    if cap is None:
        exact = numpy_logprobs(HIDDEN, HEAD_2100, TARGETS_2100)
        np.testing.assert_allclose(logps, exact, atol=2e-6)
    expected_value, expected = jax.value_and_grad(plain, (0, 1))(hidden, head)
    np.testing.assert_allclose(value, expected_value, atol=2e-5)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def _loops(jaxpr):
    """All equations, those within loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        held = jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns"))
        for inner in held:
            if hasattr(inner, "eqns"):
                yield from _loops(inner)


def test_logits_far_apart_do_not_overflow_from_block_to_block():
    """The largest comes last, and is beyond what exp can take."""
    hidden = jnp.ones((1, 2, 1))
    head = jnp.linspace(-2000, 2000, 2100)[:, None]
    targets = jnp.array([[2099, 0]])
    logps = token_logprobs(hidden, head, targets, chunk_bytes=1, vocabulary_blocks=True)
    step = 4000 / 2099
    total = -np.log1p(np.exp(-step) / (1 - np.exp(-step)))
    np.testing.assert_allclose(logps, [[total, total - 4000]], rtol=1e-6, atol=1e-5)


def test_memory_of_blocks_does_not_grow_with_the_vocabulary():
    def temporaries(v):
        arrays = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((4, 256, 16), (v, 16))]
        targets = jax.ShapeDtypeStruct((4, 256), jnp.int32)
        logps = functools.partial(token_logprobs, chunk_bytes=2**21, vocabulary_blocks=True)
        grad = jax.grad(lambda h, w, y: logps(h, w, y).sum(), (0, 1))
        compiled = jax.jit(grad).lower(*arrays, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(32768) - temporaries(8192) < 2 * (32768 - 8192) * 16 * 4 + 2**20


@pytest.mark.parametrize("chunk_tokens", [1, 6, 24, 60, 1024])
def test_every_chunk_size_gives_the_exact_numbers(chunk_tokens):
    logps = token_logprobs(
        jnp.asarray(HIDDEN, jnp.float32),
        jnp.asarray(HEAD, jnp.float32),
        TARGETS,
        chunk_bytes=chunk_tokens * LOGITS,
    )
    assert logps.dtype == jnp.float32
    np.testing.assert_allclose(logps, numpy_logprobs(HIDDEN, HEAD, TARGETS), atol=2e-6)


@pytest.mark.parametrize("cap", [None, 2.5])
@pytest.mark.parametrize("chunk_tokens", [1024, 12])
def test_values_and_gradients_are_those_of_the_plain_formula(chunk_tokens, cap):
    hidden, head = jnp.asarray(HIDDEN, jnp.float32), jnp.asarray(HEAD, jnp.float32)
    cotangent = jnp.asarray(RNG.normal(size=TARGETS.shape), jnp.float32)

    def chunked(hidden, head):
        logps = token_logprobs(hidden, head, TARGETS, chunk_bytes=chunk_tokens * LOGITS, cap=cap)
        return jnp.sum(cotangent * logps)

    def plain(hidden, head):
        logits = jnp.einsum("gktd,vd->gktv", hidden, head, precision="highest")
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        logps = jax.nn.log_softmax(logits)
        return jnp.sum(cotangent * jnp.take_along_axis(logps, TARGETS[..., None], -1)[..., 0])

    (value, ours), (expected_value, expected) = (
        jax.value_and_grad(f, (0, 1))(hidden, head) for f in (chunked, plain)
    )
    # A sum of some hundred log-probs, each of which two orders of adding round differently.
    np.testing.assert_allclose(value, expected_value, rtol=2e-6, atol=1e-5)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("wanted", ["some", "none"])
def test_positions_that_nobody_asks_for_change_nothing_and_chunks_of_them_cost_nothing(wanted):
    """NaN in the hidden states of the empty chunks would show that they were computed."""
    where = np.zeros(TARGETS.shape, bool)
    where[..., :4] = wanted == "some"
    hidden = jnp.asarray(HIDDEN, jnp.float32).at[..., 6:, :].set(jnp.nan)
    head = jnp.asarray(HEAD, jnp.float32)

    def total(hidden, head):
        logps = token_logprobs(hidden, head, TARGETS, where=where, chunk_bytes=12 * LOGITS)
        return jnp.sum(jnp.where(where, logps, 0)), logps

    (_, logps), (d_hidden, d_head) = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head)
    expected = np.where(where, numpy_logprobs(HIDDEN, HEAD, TARGETS), 0)
    np.testing.assert_allclose(np.where(where, logps, 0), expected, atol=2e-6)
    assert np.isfinite(d_head).all()
    assert (np.abs(d_head).max() > 0) == (wanted == "some")
    np.testing.assert_array_equal(np.asarray(d_hidden)[~where], 0)


def test_bfloat16_states_get_float32_logits():
    hidden, head = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(HEAD, jnp.bfloat16)
    exact = numpy_logprobs(np.asarray(hidden, np.float64), np.asarray(head, np.float64), TARGETS)
    np.testing.assert_allclose(token_logprobs(hidden, head, TARGETS), exact, atol=1e-4)


def test_memory_does_not_grow_with_length_times_vocabulary():
    def temporaries(t, v=8192, **settings):
        hidden = jax.ShapeDtypeStruct((1, 4, t, 16), jnp.float32)
        head = jax.ShapeDtypeStruct((v, 16), jnp.float32)
        targets = jax.ShapeDtypeStruct((1, 4, t), jnp.int32)
        logps = functools.partial(token_logprobs, **{"chunk_bytes": 2**21} | settings)
        grad = jax.grad(lambda h, w, y: logps(h, w, y).sum(), (0, 1))
        compiled = jax.jit(grad).lower(hidden, head, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 8192 * 4  # bytes of one position's logits, all four rows
    assert temporaries(1024) - temporaries(128) < (1024 - 128) * logits / 20
    heads = 2 * (32768 - 8192) * 16 * 4  # the head's own gradient, and a chunk's share of it
    assert temporaries(128, v=32768) - temporaries(128) < 2**20 + heads
    one_chunk = temporaries(128, chunk_bytes=128 * logits)  # kept, and what becomes of it
    assert 1.9 < one_chunk / (128 * logits) < 2.2
    assert temporaries(128, kept_bytes=128 * logits) == one_chunk
    assert temporaries(128, kept_bytes=128 * logits - 1) == temporaries(128)


def test_sequence_sums_stop_at_the_length():
    logps = jnp.asarray(RNG.normal(size=(2, 3, 5)), jnp.float32)
    lengths = np.array([[0, 1, 5], [2, 3, 4]])
    expected = [[sum(np.asarray(logps)[i, j, : lengths[i, j]]) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(sequence_logprobs(logps, lengths), expected, atol=1e-6)
    np.testing.assert_array_equal(completion_mask(lengths, 5).sum(-1), lengths)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[\.\.\., T, D\]"):
        token_logprobs(jnp.zeros((2, 5, 8)), jnp.zeros((9, 8)), jnp.zeros((2, 4), int))
