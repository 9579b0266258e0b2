import numpy as np
import pytest

from gvpo_jax.data.groups import (
    UNKNOWN,
    Source,
    cache_key,
    join,
    make_group,
    pick,
    read_reward,
    stack,
    take,
    to_batch,
    trim,
    with_reference,
)
from gvpo_jax.errors import UserError


def group(completions, rewards, *, version=7, **settings):
    settings = {"source": Source.POLICY} | settings
    made = make_group([1, 2, 3], completions, rewards, **settings)
    rng = np.random.default_rng(len(completions))
    return made._replace(
        version=np.full_like(made.version, version),
        old_logps=rng.normal(size=made.old_logps.shape).astype(np.float32),
        ref_logps=rng.normal(size=made.ref_logps.shape).astype(np.float32),
    )


def assert_same(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)
        assert np.asarray(x).dtype == np.asarray(y).dtype, name


def test_groups_of_all_sizes_make_one_batch():
    a = group([[4, 5], [6]], [1.0, None])
    b = group([[7, 8, 9], [3], [2]], [0.5, 0.0, -1.0], source=Source.FILE, version=UNKNOWN)
    batch = to_batch(stack([a, b]))
    assert batch.completions.shape == (2, 3, 16)
    assert batch.valid.tolist() == [[True, False, False], [True, True, True]]
    assert batch.lengths.tolist() == [[2, 1, 0], [3, 1, 1]]
    assert batch.completions[1, 0, :3].tolist() == [7, 8, 9]
    assert batch.source[1].tolist() == [Source.FILE] * 3
    assert batch.version[0, :2].tolist() == [7, 7]
    assert batch.rewards[1].tolist() == [0.5, 0.0, -1.0]
    np.testing.assert_array_equal(batch.old_logps[0, :2, :2], a.old_logps[0])
    assert to_batch(a, longest_completion=6, k=5).completions.shape == (1, 5, 6)
    assert to_batch(b, longest_completion=2).completions.shape == (1, 3, 3)


def test_joined_groups_keep_every_completions_own():
    a, b = group([[4, 5], [6]], [1.0, 0.0]), group([[7, 8, 9]], [2.0], version=3)
    both = join(a, b)
    assert both.completions[0].tolist() == [[4, 5, 0], [6, 0, 0], [7, 8, 9]]
    assert both.lengths[0].tolist() == [2, 1, 3]
    assert both.rewards[0].tolist() == [1, 0, 2]
    assert both.version[0].tolist() == [7, 7, 3]
    np.testing.assert_array_equal(both.ref_logps[0, 2], b.ref_logps[0, 0])
    assert_same(pick(both, [2]), b)
    five = np.array([5])
    assert join(a._replace(reference=five), b._replace(reference=five)).reference == 5
    assert join(a._replace(reference=five), b).reference == UNKNOWN


def test_stacked_groups_come_back_one_by_one():
    groups = [
        group([[4, 5], [6]], [1.0, None], row=3)._replace(reference=np.array([12])),
        group([[1]], [0.0]),
        group([[], []], [0.0, 0.0])._replace(prompts=np.array([[8, 9, 4, 2]], np.int32)),
    ]
    groups[2] = groups[2]._replace(prompt_lengths=np.array([4], np.int32))
    back = [trim(take(stack(groups), [i])) for i in range(3)]
    for a, b in zip(groups, back, strict=True):
        k = a.lengths.shape[1]
        assert_same(a, pick(b, range(k)))
        assert not b.lengths[:, k:].any()
    np.testing.assert_array_equal(take(stack(groups), slice(1, 2)).row, groups[1].row)


def test_reference_scores_go_back_into_the_groups():
    a, b = group([[4, 5], [6]], [1.0, 0.0]), group([[7, 8, 9], [3], [2]], [1.0, 0.0, 0.0])
    both = stack([a, b])
    ref_logps = np.arange(2 * 3 * 16, dtype=np.float32).reshape(2, 3, 16)
    scored = with_reference(both, ref_logps, reference=9)
    np.testing.assert_array_equal(scored.ref_logps, ref_logps[:, :, :3])
    assert scored.reference.tolist() == [9, 9]


@pytest.mark.parametrize(
    ("value", "read"),
    [(1, 1.0), (True, 1.0), (np.float32(0.5), 0.5), (None, None), (float("nan"), None)],
)
def test_rewards_are_numbers_or_missing(value, read):
    assert read_reward(value) == read


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e39, 10**400])
def test_rewards_that_float32_can_not_hold_are_refused(value):
    with pytest.raises(UserError, match="infinite"):
        read_reward(value)


@pytest.mark.parametrize("value", ["", "abc", [1.0]])
def test_what_is_no_number_is_no_reward(value):
    with pytest.raises(UserError, match="a reward is a number, got"):
        read_reward(value)


def test_a_text_of_a_number_is_a_reward_as_files_have_them():
    assert (read_reward("1"), read_reward("-0.5"), read_reward(True)) == (1.0, -0.5, 1.0)


def test_a_cache_key_is_of_these_tokens_and_this_reference():
    one, other = group([[4, 5], [6]], [1.0, 0.0]), group([[4, 5], [7]], [1.0, 0.0])
    assert cache_key(1, one) == cache_key(1, one._replace(rewards=other.rewards))
    keys = [cache_key(1, one), cache_key(2, one), cache_key(1, other)]
    keys.append(cache_key(1, one._replace(prompt_lengths=np.array([2], np.int32))))
    assert len(set(keys)) == 4
    assert cache_key(UNKNOWN, one) == UNKNOWN
