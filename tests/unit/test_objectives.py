"""Every objective through the train step, with a model of one table, which compiles at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounding import last_bits
from test_train_step import MISSING, assert_trees_close, random_batch

from gvpo_jax.baselines import objective_loss
from gvpo_jax.logprobs import completion_mask
from gvpo_jax.loss import gvpo_loss
from gvpo_jax.models.decoder import DecoderFns
from gvpo_jax.training.objectives import LossConfig
from gvpo_jax.training.step import init_state, token_logps, train_step

PARAMS = {
    "table": jnp.asarray(np.random.default_rng(1).normal(size=(37, 8)), jnp.float32),
    "head": jnp.asarray(np.random.default_rng(2).normal(size=(37, 8)), jnp.float32),
}


def completion_hidden(params, prompts, prompt_lengths, completions):
    """A bigram model: a token is predicted from the one before it."""
    last = jnp.take_along_axis(prompts, prompt_lengths[:, None] - 1, axis=1)
    first = jnp.broadcast_to(last[:, None], (*completions.shape[:2], 1))
    return params["table"][jnp.concatenate([first, completions[..., :-1]], axis=-1)]


def not_asked(*_):
    raise AssertionError("a training step does not sample")


BIGRAM = DecoderFns(
    prefill=not_asked,
    empty_cache=not_asked,
    decode=not_asked,
    completion_hidden=completion_hidden,
    head=lambda params: params["head"],
)
NAMES = ("gvpo", "grpo", "dr_grpo", "rloo", "dapo", "gspo", "reinforce_pp", "rebel", "dpo")


def objective(name, **settings):
    return LossConfig(name, **{"beta": 0.2} | settings).objective(max_completion_length=6)


@functools.cache
def off_policy_batch():
    """Samples of a policy that was a little different; of two completions nobody knows whose."""
    batch = random_batch(missing=MISSING)
    here = scores(PARAMS, batch)
    noise = np.random.default_rng(3).normal(0, 0.1, here.shape)
    old = np.where(np.arange(3)[:, None] == 2, np.nan, here + noise)
    return batch._replace(old_logps=old.astype(np.float32))


def scores(params, batch):
    return np.asarray(_score(params, batch.prompts, batch.prompt_lengths, batch.completions))


_score = jax.jit(functools.partial(token_logps, BIGRAM))


@functools.cache
def first_step(name, micro_batches=1, **settings):
    """That on the batch of all tests."""
    return step(name, off_policy_batch(), micro_batches, **settings)


def step(name, batch, micro_batches=1, **settings):
    optimizer = optax.sgd(1.0)
    update = functools.partial(
        train_step,
        model=BIGRAM,
        optimizer=optimizer,
        objective=objective(name, **settings),
        beta=0.2,
        micro_batches=micro_batches,
    )
    state, metrics = jax.jit(update)(init_state(PARAMS, optimizer), batch)
    return jax.tree.map(jnp.subtract, PARAMS, state.params), metrics


def penalty(name):
    return {} if name in ("gvpo", "rebel", "dpo") else {"kl_coef": 0.1}


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_micro_batches_gives_the_whole_batchs_gradient(name):
    whole, metrics = first_step(name, **penalty(name))
    split, split_metrics = first_step(name, 4, **penalty(name))
    assert optax.tree.norm(whole) > 1e-4
    assert_trees_close(split, whole, last_bits(PARAMS))
    np.testing.assert_allclose(split_metrics["loss"], metrics["loss"], atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_shown_is_that_of_the_public_function(name):
    batch = off_policy_batch()
    here = scores(PARAMS, batch)
    mask = completion_mask(batch.lengths, 6) & batch.valid[..., None]
    if name == "gvpo":
        sums = (np.where(mask, x, 0).sum(-1) for x in (here, batch.ref_logps))
        expected = gvpo_loss(*sums, batch.rewards, beta=0.2, where=batch.valid)
    else:
        old = np.where(np.isnan(batch.old_logps), here, batch.old_logps)
        method, arrays = objective(name, **penalty(name)), (here, old, batch.ref_logps)
        public = jax.jit(functools.partial(objective_loss, method))
        expected = public(*arrays, batch.rewards, mask=mask, where=batch.valid)
    shown = first_step(name, **penalty(name))[1]["loss"]
    np.testing.assert_allclose(shown, expected, atol=1e-5)


def test_gvpo_does_not_care_who_sampled():
    batch = off_policy_batch()
    a, _ = first_step("gvpo")
    b, _ = step("gvpo", batch._replace(old_logps=batch.old_logps * 3))
    assert_trees_close(a, b, 0)


def test_clipped_residuals_change_the_step_and_wide_ones_do_not():
    plain, _ = first_step("gvpo")
    wide, _ = first_step("gvpo", huber_delta=100.0)
    narrow, _ = first_step("gvpo", huber_delta=0.1)
    assert_trees_close(wide, plain, last_bits(PARAMS))
    assert optax.tree.norm(narrow) < 0.5 * optax.tree.norm(plain)


def test_a_clipping_range_that_is_not_given_is_the_methods_own():
    for name, own in (("grpo", 0.2), ("gspo", 3e-4)):
        default = first_step(name, **penalty(name))[1]["loss"]
        same = first_step(name, epsilon=own, **penalty(name))[1]["loss"]
        other = first_step(name, epsilon=1e-6, epsilon_high=1e-6, **penalty(name))[1]["loss"]
        assert same == default != other


def test_metrics_by_source_add_up():
    batch = off_policy_batch()
    source = np.array([[0, 0, 1]] * 4, np.int32)
    version = np.array([[0, 0, -4]] * 4, np.int32)
    _, metrics = step("gvpo", batch._replace(source=source, version=version))
    valid = batch.valid
    shares = {name: metrics[f"source/{name}/share"] for name in ("policy", "replay", "file")}
    assert shares["file"] == 0
    np.testing.assert_allclose(shares["replay"], valid[:, 2].sum() / valid.sum(), rtol=1e-6)
    np.testing.assert_allclose(shares["policy"] + shares["replay"], 1, rtol=1e-6)
    assert metrics["source/replay/staleness"] == 4
    balance = sum(metrics[f"source/{n}/residual"] * shares[n] for n in ("policy", "replay"))
    np.testing.assert_allclose(balance, 0, atol=1e-6)  # residuals are centred in every group


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="there is no objective 'ppo'"):
        objective("ppo")
