import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rounding import last_bits

from gvpo_jax.data.batch import Batch, bucket, pad_groups, pad_prompts
from gvpo_jax.data.groups import UNKNOWN, Source, make_group, stack, to_batch
from gvpo_jax.models.decoder import DecoderConfig, decoder_fns, full_logits, init_params
from gvpo_jax.training.objectives import gvpo
from gvpo_jax.training.step import init_state, token_logps, train_step

CONFIG = DecoderConfig("qwen2", 37, 16, 24, 1, 4, 2, 4, qkv_bias=True, tie_embeddings=True)
WIDE = DecoderConfig("qwen2", 37, 16, 512, 1, 4, 2, 4, qkv_bias=True, tie_embeddings=True)
APPLY, PARAMS = decoder_fns(CONFIG), init_params(CONFIG, 0)
REFERENCE = init_params(CONFIG, 1)
LAST_BITS = last_bits(PARAMS)  # gradients are read off as differences of parameters
BETA = 0.2


def batch_of(prompts, tokens, lengths, rewards):
    return to_batch(
        stack(
            [
                make_group(
                    prompt,
                    [ids[:n] for ids, n in zip(*group, strict=True)],
                    values,
                    source=Source.POLICY,
                )
                for prompt, *group, values in zip(prompts, tokens, lengths, rewards, strict=True)
            ]
        ),
        longest_completion=tokens.shape[-1],
    )


def random_batch(groups=4, k=3, *, missing=()):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 37, rng.integers(2, 9)).tolist() for _ in range(groups)]
    lengths = rng.integers(1, 7, (groups, k))
    rewards = rng.normal(size=(groups, k))
    for place in missing:
        rewards[place] = np.nan
    tokens = rng.integers(0, 37, (groups, k, 6))
    batch = batch_of(prompts, tokens, lengths, rewards)
    refs = jax.jit(functools.partial(token_logps, APPLY))(
        REFERENCE, batch.prompts, batch.prompt_lengths, batch.completions
    )
    return batch._replace(ref_logps=np.asarray(refs))


def gradient(batch, micro_batches=1, completion_parts=1):
    """The gradient that a step took, read off a step of plain descent with rate 1."""
    step = descent(micro_batches, completion_parts)
    state, metrics = step(init_state(PARAMS, optax.sgd(1.0)), batch)
    return jax.tree.map(jnp.subtract, PARAMS, state.params), metrics


@functools.cache
def descent(micro_batches, completion_parts, config=CONFIG):
    step = functools.partial(
        train_step,
        model=decoder_fns(config),
        optimizer=optax.sgd(1.0),
        objective=gvpo(beta=BETA),
        beta=BETA,
        micro_batches=micro_batches,
        completion_parts=completion_parts,
    )
    return jax.jit(step)


def plain_loss(params, batch: Batch):
    """1/2 sum of squared residuals / (k - 1), over repeated prompts, group by group."""
    policy, reference = (sequence_logprobs(p, batch) for p in (params, REFERENCE))
    losses = []
    for g in range(len(batch.prompts)):
        members = np.flatnonzero(batch.valid[g])
        if len(members) < 2:
            continue
        log_ratios = jnp.stack([policy[g, i] - reference[g, i] for i in members])
        residuals = BETA * log_ratios - batch.rewards[g, members]
        losses.append(0.5 * jnp.sum((residuals - residuals.mean()) ** 2) / (len(members) - 1))
    return sum(losses) / len(losses)


def sequence_logprobs(params, batch: Batch):
    """Of each completion behind its prompt, by group and place."""
    rows = {}
    for place in np.ndindex(batch.lengths.shape):
        prompt = batch.prompts[place[0], : batch.prompt_lengths[place[0]]]
        rows[place] = prompt, batch.completions[place][: batch.lengths[place]]
    tokens = np.zeros((len(rows), 24), np.int32)
    for row, (prompt, completion) in zip(tokens, rows.values(), strict=True):
        row[: len(prompt) + len(completion)] = [*prompt, *completion]
    logps = jax.nn.log_softmax(full_logits(CONFIG, params, tokens))
    return {
        place: logps[row, np.arange(len(completion)) + len(prompt) - 1, completion].sum()
        for row, (place, (prompt, completion)) in enumerate(rows.items())
    }


def assert_trees_close(a, b, atol):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=atol, err_msg=jax.tree_util.keystr(path))


MISSING = [(0, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize("missing", [[], MISSING], ids=["whole", "ragged"])
def test_gradient_is_that_of_the_regression_over_repeated_prompts(missing):
    batch = random_batch(missing=missing)
    grads, metrics = gradient(batch)
    value, expected = expected_value_and_grad(batch)
    assert_trees_close(grads, expected, 1e-5)
    np.testing.assert_allclose(metrics["gvpo_mse"], value, atol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)


def expected_value_and_grad(batch):
    return jax.jit(jax.value_and_grad(lambda p: plain_loss(p, batch)))(PARAMS)


# Of 4 groups of 3 completions: 3 micro-batches leave an uneven last one, 2 parts an uneven group.
SPLITS = [(2, 1), (3, 1), (1, 2), (1, 3), (3, 2)]


@pytest.mark.parametrize(("micro_batches", "completion_parts"), SPLITS)
def test_any_split_gives_the_whole_batchs_gradient_and_metrics(micro_batches, completion_parts):
    batch = random_batch(missing=MISSING)
    whole, metrics = whole_gradient()
    split, split_metrics = gradient(batch, micro_batches, completion_parts)
    assert_trees_close(split, whole, LAST_BITS)
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, atol=1e-5, err_msg=name)


@functools.cache
def whole_gradient():
    return gradient(random_batch(missing=MISSING))


def test_memory_falls_with_every_split():
    batch = random_batch(groups=4, k=8)
    shapes = jax.eval_shape(lambda: init_state(init_params(WIDE, 0), optax.sgd(1.0)))

    def temporaries(*parts):
        compiled = descent(*parts, WIDE).lower(shapes, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, groups, parts = temporaries(1, 1), temporaries(4, 1), temporaries(4, 4)
    assert groups < 0.5 * whole
    assert parts < 0.7 * groups


def test_groups_filled_up_count_for_nothing():
    batch = random_batch(groups=3)
    whole, metrics = gradient(batch)
    filled, filled_metrics = gradient(pad_groups(batch, 4))
    assert_trees_close(filled, whole, LAST_BITS)
    for name, value in metrics.items():
        np.testing.assert_allclose(filled_metrics[name], value, atol=1e-5, err_msg=name)


def test_what_lies_past_a_length_does_not_matter():
    batch = random_batch(missing=MISSING)
    grads, metrics = gradient(batch)
    rng = np.random.default_rng(9)
    past_t = np.arange(6) >= batch.lengths[..., None]
    past_p = np.arange(batch.prompts.shape[1]) >= batch.prompt_lengths[:, None]
    noisy = batch._replace(
        completions=np.where(past_t, rng.integers(0, 37, past_t.shape), batch.completions),
        prompts=np.where(past_p, rng.integers(0, 37, past_p.shape), batch.prompts),
        ref_logps=np.where(past_t, np.nan, batch.ref_logps),
        rewards=np.where(batch.valid, batch.rewards, np.nan),
    )
    noisy_grads, noisy_metrics = gradient(noisy)
    assert_trees_close(noisy_grads, grads, LAST_BITS)
    np.testing.assert_allclose(noisy_metrics["kl"], metrics["kl"], atol=1e-6)


def test_metrics_equal_numpy():
    batch = random_batch(missing=MISSING)
    _, metrics = gradient(batch)
    logps = np.asarray(
        jax.jit(functools.partial(token_logps, APPLY))(
            PARAMS, batch.prompts, batch.prompt_lengths, batch.completions
        )
    )
    diffs = [
        (logps - batch.ref_logps)[g, i, : batch.lengths[g, i]]
        for g, i in zip(*np.nonzero(batch.valid), strict=True)
    ]
    tokens = np.concatenate(diffs)
    np.testing.assert_allclose(metrics["kl"], np.mean(np.exp(-tokens) + tokens - 1), rtol=1e-4)
    np.testing.assert_allclose(metrics["log_ratio"], np.mean([d.sum() for d in diffs]), rtol=1e-4)


def test_the_age_is_that_of_the_completions_that_bear_a_date():
    batch, version = random_batch(), np.full((4, 3), UNKNOWN)
    version[0] = 0, UNKNOWN, -4
    batch = batch._replace(source=np.full((4, 3), Source.FILE), version=version)
    _, metrics = gradient(batch)  # at step 0
    assert metrics["source/file/staleness"] == 2
    assert metrics["source/policy/staleness"] == -1


def test_a_batch_without_any_group_to_compare_moves_nothing():
    alone = np.zeros((4, 3), bool)
    alone[0, 0] = True
    batch = random_batch()._replace(valid=alone)
    grads, metrics = gradient(batch)
    assert optax.tree.norm(grads) == 0
    assert all(np.isfinite(v) for v in metrics.values())


def test_training_pulls_the_policy_to_the_optimum():
    """Two completions of a token: the log-ratios' difference becomes the rewards' over beta."""
    completions = np.array([[[3], [8], [11]]])
    rewards = np.array([[0.5, 0.0, -0.2]])
    batch = batch_of([[1, 2]], completions, np.ones((1, 3), int), rewards)
    scores = jax.jit(functools.partial(token_logps, APPLY))
    args = batch.prompts, batch.prompt_lengths, batch.completions
    refs = np.asarray(scores(REFERENCE, *args))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 300))
    step = functools.partial(train_step, objective=gvpo(beta=BETA), beta=BETA)
    step = jax.jit(functools.partial(step, model=APPLY, optimizer=optimizer))
    state = init_state(REFERENCE, optimizer)
    for _ in range(300):
        state, metrics = step(state, batch._replace(ref_logps=refs))
    log_ratio = (np.asarray(scores(state.params, *args)) - refs)[0, :, 0]
    target = rewards[0] / BETA
    np.testing.assert_allclose(log_ratio - log_ratio.mean(), target - target.mean(), atol=1e-3)
    assert metrics["gvpo_mse"] < 1e-6


def test_arrays_of_the_wrong_shape_are_refused():
    batch = random_batch()
    with pytest.raises(AssertionError, match="shape"):
        gradient(batch._replace(ref_logps=batch.ref_logps[..., :-1]))
    with pytest.raises(AssertionError, match="shape"):
        gradient(batch._replace(rewards=batch.rewards[:, :-1]))


def test_padding_of_prompts_and_completions():
    prompts, lengths = pad_prompts([[1, 2, 3], [4]])
    assert prompts.shape == (2, 16)
    assert lengths.tolist() == [3, 1]
    assert prompts[0, :3].tolist() == [1, 2, 3]
    assert [bucket(n) for n in (1, 16, 17, 25, 33, 50)] == [16, 16, 24, 32, 48, 64]
    widths = {pad_prompts([[1] * n], longest=37)[0].shape[1] for n in range(1, 38)}
    assert widths == {16, 24, 40}
    with pytest.raises(ValueError, match="at least one token"):
        pad_prompts([[1], []])


def test_ragged_groups_are_filled_up_with_nothing():
    groups, rewards = [[[1, 2], [3]], [[4, 5, 6], [], [7]]], [[0.5, None], [1.0, 2.0, 3.0]]
    batch = to_batch(
        stack(
            [
                make_group([1], g, r, source=Source.FILE)
                for g, r in zip(groups, rewards, strict=True)
            ]
        )
    )
    assert batch.lengths.tolist() == [[2, 1, 0], [3, 0, 1]]
    assert batch.valid.tolist() == [[True, False, False], [True, False, True]]
    assert batch.completions[1, 0, :3].tolist() == [4, 5, 6]
    assert batch.rewards[1].tolist() == [1.0, 0.0, 3.0]
