import numpy as np

from gvpo_jax.collect.replay import ReplayBuffer
from gvpo_jax.data.groups import Groups, Source, join, make_group, stack


def group(row, first, k=3, source=Source.POLICY, reward=0.0):
    """k completions of one token each: first, first + 1, ..."""
    made = make_group([1], [[first + i] for i in range(k)], [reward] * k, source=source, row=row)
    return made._replace(version=np.full_like(made.version, first))


def tokens(groups):
    return [g.completions[0, :, 0].tolist() for g in groups]


def test_the_oldest_groups_leave_first():
    buffer = ReplayBuffer(capacity=2, seed=0)
    for first in (10, 20, 30):
        buffer.add(group(0, first))
    assert len(buffer) == 2
    assert sorted(tokens(buffer.groups(5, key=0))) == [[20, 21, 22], [30, 31, 32]]


def test_draws_are_different_groups_marked_as_replayed_and_follow_the_key():
    buffer = ReplayBuffer(capacity=50, seed=0)
    buffer.add(stack([group(row, 10 * row) for row in range(20)]))
    drawn = buffer.groups(8, key=3)
    assert len({int(g.row[0]) for g in drawn}) == 8
    assert all((g.source == Source.REPLAY).all() for g in drawn)
    assert all((g.version == 10 * g.row).all() for g in drawn)
    assert tokens(buffer.groups(8, key=3)) == tokens(drawn)
    assert tokens(buffer.groups(8, key=4)) != tokens(drawn)
    counts = np.zeros(20)
    for key in range(500):
        counts[[g.row[0] for g in buffer.groups(5, key=key)]] += 1
    assert counts.min() > 85  # 125 expected, standard deviation 10
    assert counts.max() < 165


def test_older_completions_are_those_of_the_same_prompt():
    buffer = ReplayBuffer(capacity=50, seed=0)
    assert buffer.completions(1, 2, key=0) is None
    buffer.add(stack([group(1, 10), group(2, 20), group(1, 30)]))
    drawn = buffer.completions(1, 4, key=0)
    assert len(set(drawn.completions[0, :, 0].tolist())) == 4
    assert set(drawn.completions[0, :, 0].tolist()) <= {10, 11, 12, 30, 31, 32}
    assert buffer.completions(1, 99, key=0).lengths.shape == (1, 6)
    assert buffer.completions(3, 2, key=0) is None


def test_only_the_policys_own_scored_completions_are_remembered():
    buffer = ReplayBuffer(capacity=50, seed=0)
    buffer.add(group(0, 10, source=Source.REPLAY))
    buffer.add(group(0, 20, source=Source.DEMONSTRATION))
    buffer.add(stack([group(0, 30, reward=None), group(0, 40, k=1)]))
    assert len(buffer) == 0
    buffer.add(join(group(0, 50), group(0, 60, source=Source.REPLAY)))
    assert tokens(buffer.groups(9, key=0)) == [[50, 51, 52]]


def test_a_buffer_that_was_saved_draws_on_as_before():
    buffer, other = ReplayBuffer(capacity=4, seed=1), ReplayBuffer(capacity=4, seed=1)
    buffer.add(stack([group(row, 10 * row, k=2 + row) for row in range(6)]))
    other.load(Groups(**buffer.state()))
    assert tokens(other.groups(3, key=5)) == tokens(buffer.groups(3, key=5))
    assert ReplayBuffer(capacity=4, seed=1).state() == {}
    other.load(None)
    assert len(other) == 0
