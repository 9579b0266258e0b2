"""Batches computed without their padding: the same numbers, fewer tokens, few programs."""

import jax
import numpy as np
import pytest

from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.data.groups import Source, make_group, stack, to_batch
from gvpo_jax.data.packing_plan import deal, make_plan, packed_size
from gvpo_jax.models.load import load_model
from gvpo_jax.trainer import Trainer
from gvpo_jax.training.programs import make_programs

LONGEST_PROMPT, LONGEST = 32, 64


def lognormal_batch(rng, groups, k):
    """Random tokens; lengths lognormal, cut at the longest."""
    prompts = np.clip(np.exp(rng.normal(np.log(12), 0.4, groups)), 1, LONGEST_PROMPT).astype(int)
    lengths = np.clip(np.exp(rng.normal(np.log(12), 0.9, (groups, k))), 1, LONGEST).astype(int)
    return to_batch(
        stack(
            [
                make_group(
                    rng.integers(65, 91, p),
                    [rng.integers(65, 91, n).tolist() for n in of_group],
                    rng.normal(size=k).tolist(),
                    source=Source.POLICY,
                )
                for p, of_group in zip(prompts, lengths, strict=True)
            ]
        ),
        longest_prompt=LONGEST_PROMPT,
        longest_completion=LONGEST,
    )


def policy(k=4, **settings):
    base = {
        "rollout__num_generations": k,
        "rollout__max_completion_length": LONGEST,
        "data__max_prompt_length": LONGEST_PROMPT,
        "optimizer__learning_rate": 1e-2,
        "optimizer__name": "sgd",
        "mesh__fsdp": 1,
    }
    return Trainer(override(Config(), **base | settings), load_model("debug")).policy


def three_updates(one):
    rng = np.random.default_rng(3)
    metrics = []
    for _ in range(3):
        batch = one.with_reference(lognormal_batch(rng, 8, 4))
        metrics.append(jax.device_get(one.update(batch)))
    return metrics, jax.device_get(one.state.params)


@pytest.fixture(scope="module")
def padded():
    return three_updates(policy(train__packing=False))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train__micro_batches": 4},
        {"train__micro_batches": 2, "train__completion_parts": 3},
        {"mesh__fsdp": 4, "train__micro_batches": 2},
        {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
    ],
)
def test_a_packed_run_is_the_padded_one(padded, settings):
    packed = three_updates(policy(**settings))
    for ours, theirs in zip(packed[0], padded[0], strict=True):
        assert ours["padding"] < theirs["padding"] - 0.1
        for name in theirs.keys() - {"padding"}:
            np.testing.assert_allclose(ours[name], theirs[name], atol=2e-5, rtol=1e-5, err_msg=name)
    for a, b in zip(*(jax.tree.leaves(run[1]) for run in (packed, padded)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_run_of_mixed_lengths_compiles_three_programs_and_pads_a_tenth():
    make_programs.cache_clear()  # those of other tests do not count
    one, rng, padding = policy(k=8), np.random.default_rng(0), []
    for _ in range(12):
        batch = one.with_reference(lognormal_batch(rng, 16, 8))
        padding.append(one.update(batch)["padding"])
    assert one._programs.step._cache_size() <= 3
    assert one._programs.token_logps._cache_size() <= 3
    assert np.mean(padding) < 0.1


def test_groups_that_are_there_already_are_not_scored_again():
    one, batch = policy(), lognormal_batch(np.random.default_rng(1), 8, 4)
    whole = one.with_reference(batch)
    known = np.arange(8) % 3 == 0
    marked = batch._replace(ref_logps=np.full_like(batch.ref_logps, 7.0))
    some = one.with_reference(marked, known)
    counts = np.arange(batch.completions.shape[2]) < batch.lengths[..., None]
    np.testing.assert_array_equal(some.ref_logps[known], 7.0)
    np.testing.assert_allclose(
        some.ref_logps[~known][counts[~known]], whole.ref_logps[~known][counts[~known]], atol=1e-5
    )


def test_one_program_scores_however_many_groups_are_missing():
    make_programs.cache_clear()
    one, batch = policy(), lognormal_batch(np.random.default_rng(1), 8, 4)
    for missing in range(1, 9):
        one.with_reference(batch, np.arange(8) >= missing)
    assert one._programs.token_logps._cache_size() == 1


def test_completions_of_one_token_are_trained_on():
    settings = {"rollout__max_completion_length": 1}
    packed, padded = policy(**settings), policy(**settings, train__packing=False)
    groups = [
        make_group([65, 66 + i], [[70], [71], [72], [73]], [0, 1, 0, 1], source=Source.POLICY)
        for i in range(4)
    ]
    batch = to_batch(stack(groups), longest_prompt=LONGEST_PROMPT, longest_completion=1)
    ours, theirs = (one.update(one.with_reference(batch)) for one in (packed, padded))
    np.testing.assert_allclose(ours["grad_norm"], theirs["grad_norm"], rtol=1e-5)
    assert float(ours["grad_norm"]) > 0


def test_parts_get_about_as_many_tokens():
    tokens = np.random.default_rng(0).lognormal(5, 1, 64)
    dealt = deal(tokens, 8)
    assert dealt.shape == (8, 8)
    assert sorted(dealt.ravel()) == list(range(64))
    in_order = tokens.reshape(8, 8).sum(axis=1)
    assert np.ptp(tokens[dealt].sum(axis=1)) < 0.25 * np.ptp(in_order)


def test_a_plan_counts_every_token_that_is_fed():
    batch = lognormal_batch(np.random.default_rng(0), 32, 5)
    plan = make_plan(batch, parts=2, completion_parts=2, shards=2)
    assert sorted(plan.rows.ravel()) == list(range(32))
    fed, most = 0, 0
    for rows in plan.rows:
        for shard in np.split(rows, 2):
            for part in (slice(0, None, 2), slice(1, None, 2)):
                here = 0
                for g in shard:
                    here += batch.prompt_lengths[g]
                    here += sum(n - 1 for n in batch.lengths[g][part])
                fed, most = fed + here, max(most, here)
    assert plan.packed_size is not None
    assert most <= plan.packed_size < 1.2 * most + 8
    assert plan.padding == pytest.approx(1 - fed / (8 * plan.packed_size))
    assert make_plan(batch, parts=2, shards=0).packed_size is None  # completions of a group are cut


@pytest.mark.parametrize("full", [40, 1000, 65_536])
def test_sizes_of_streams_are_few_and_near(full):
    sizes = {tokens: packed_size(tokens, full) or full for tokens in range(1, full + 1)}
    assert all(size >= tokens for tokens, size in sizes.items())
    assert all(size <= 1.2 * tokens + 16 for tokens, size in sizes.items() if size > 512)
    assert all(size <= 2 * tokens + 16 for tokens, size in sizes.items())
    assert len({size for size in sizes.values() if size <= 512}) <= 7
    assert len(set(sizes.values())) <= 4 * np.log2(full)
    assert packed_size(full, full) is None
