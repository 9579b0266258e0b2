import numpy as np
import pytest

from gvpo_jax.errors import UserError
from gvpo_jax.samples import (
    UNKNOWN,
    Source,
    check_group,
    cut,
    join,
    make_batch,
    make_group,
    pack,
    take,
    unpack,
)


def group(completions, rewards, **settings):
    settings = {"source": Source.POLICY, "version": 7} | settings
    made = make_group([1, 2, 3], completions, rewards, **settings)
    rng = np.random.default_rng(len(completions))
    return made._replace(
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
    batch = make_batch([a, b])
    assert batch.completions.shape == (2, 3, 16)
    assert batch.valid.tolist() == [[True, False, False], [True, True, True]]
    assert batch.lengths.tolist() == [[2, 1, 0], [3, 1, 1]]
    assert batch.completions[1, 0, :3].tolist() == [7, 8, 9]
    assert batch.source[1].tolist() == [Source.FILE] * 3
    assert batch.version[0, :2].tolist() == [7, 7]
    assert batch.rewards[1].tolist() == [0.5, 0.0, -1.0]
    np.testing.assert_array_equal(batch.old_logps[0, :2, :2], a.old_logps)
    assert make_batch([a], longest_completion=6, k=5).completions.shape == (1, 5, 6)
    assert make_batch([b], longest_completion=2).completions.shape == (1, 3, 3)


def test_joined_groups_keep_every_completions_own():
    a, b = group([[4, 5], [6]], [1.0, 0.0]), group([[7, 8, 9]], [2.0], version=3)
    both = join(a, b)
    assert both.completions.tolist() == [[4, 5, 0], [6, 0, 0], [7, 8, 9]]
    assert both.lengths.tolist() == [2, 1, 3]
    assert both.rewards.tolist() == [1, 0, 2]
    assert both.version.tolist() == [7, 7, 3]
    np.testing.assert_array_equal(both.ref_logps[2], b.ref_logps[0])
    assert_same(take(both, [2]), b)
    assert join(a._replace(reference=5), b._replace(reference=5)).reference == 5
    assert join(a._replace(reference=5), b).reference == UNKNOWN


def test_packed_groups_come_back():
    groups = [
        group([[4, 5], [6]], [1.0, None], row=3)._replace(reference=12),
        group([[1]], [0.0]),
        group([[], []], [0.0, 0.0]),
    ]
    for a, b in zip(groups, unpack(pack(groups)), strict=True):
        assert_same(a, b)
    assert unpack(pack([])) == []


def test_reference_scores_go_back_into_the_group():
    a, b = group([[4, 5], [6]], [1.0, 0.0]), group([[7, 8, 9], [3], [2]], [1.0, 0.0, 0.0])
    batch = make_batch([a, b])
    batch = batch._replace(ref_logps=np.arange(batch.ref_logps.size).reshape(2, 3, 16) * 1.0)
    scored = cut(batch, 1, b, reference=9)
    np.testing.assert_array_equal(scored.ref_logps, batch.ref_logps[1, :, :3])
    assert scored.reference == 9


@pytest.mark.parametrize(
    ("completions", "rewards", "message"),
    [
        ([[1], [2]], [1.0], "2 completions but 1 rewards"),
        ([[1], []], [1.0, 0.0], "completion 2: it has no token"),
        ([[1] * 9, [2]], [1.0, 0.0], "completion 1: 9 tokens; raise"),
        ([[1], [2]], [1.0, float("-inf")], "completion 2: its reward is infinite"),
    ],
)
def test_bad_completions_are_named(completions, rewards, message):
    with pytest.raises(UserError, match=f"group 3.* {message}|group 3 has {message}"):
        check_group("group 3", completions, rewards, max_completion_length=8)


def test_completions_without_a_reward_are_no_mistake():
    check_group("group 3", [[1], [2], [3]], [None, float("nan"), 0.0], max_completion_length=8)
