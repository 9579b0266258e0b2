"""A model without cache and groups gives what the decoder does, which has both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rounding import rounding

from gvpo_jax.data.batch import pad_prompts
from gvpo_jax.models import decoder
from gvpo_jax.models.decoder import DecoderConfig, DecoderOptions, decoder_fns, init_params
from gvpo_jax.models.plain import plain_functions
from gvpo_jax.rollout import InProcessEngine, SamplingModel, SamplingParams
from gvpo_jax.training.step import token_logps

CONFIG = DecoderConfig("qwen3", 43, 16, 24, 2, 4, 2, 4, tie_embeddings=True, qk_norm=True)
PARAMS = jax.tree.map(lambda x: 2 * x, init_params(CONFIG, 0))  # far from uniform
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(7, 43, n).tolist() for n in (9, 2, 5, 1)]
STOPS = (5, 6)


def hidden(params, tokens_bs):
    """The decoder as somebody else's model: whole texts in, hidden states out."""
    model = nnx.merge(decoder._graph(CONFIG, DecoderOptions()), params)
    positions = jax.lax.broadcasted_iota(jnp.int32, tokens_bs[:, None].shape, 2)
    return model(tokens_bs[:, None], positions)[0][:, 0]


PLAIN = plain_functions(hidden, lambda params: params["embed"]["embedding"])
OURS = decoder_fns(CONFIG)


def test_log_probs_and_gradients_are_the_decoders():
    completions = RNG.integers(7, 43, (4, 3, 6))
    batch = (*pad_prompts(PROMPTS), completions)
    weights = RNG.normal(size=completions.shape).astype(np.float32)

    def total(functions):
        return lambda params: (weights * token_logps(functions, params, *batch)).sum()

    atol = rounding(lambda params: token_logps(OURS, params, *batch), PARAMS)
    np.testing.assert_allclose(
        token_logps(PLAIN, PARAMS, *batch), token_logps(OURS, PARAMS, *batch), atol=atol
    )
    ours, theirs = (jax.jit(jax.grad(total(functions)))(PARAMS) for functions in (OURS, PLAIN))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize("slots", [None, 3])
def test_samples_are_the_decoders(slots):
    """With slots a completion begins anywhere in the ring."""

    def generate(functions):
        return InProcessEngine(SamplingModel(functions), STOPS, slots=slots).generate(
            PARAMS, PROMPTS, range(4), num_generations=3, max_completion_length=12,
            sampling=SamplingParams(), seed=1,
        )  # fmt: skip

    ours, theirs = generate(OURS), generate(PLAIN)
    np.testing.assert_array_equal(ours.completions, theirs.completions)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    assert len(set(ours.lengths.ravel().tolist())) > 2
    np.testing.assert_allclose(ours.old_logps, theirs.old_logps, atol=1e-3)
