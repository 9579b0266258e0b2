"""A memory of sampled groups, to be trained on again: GVPO needs no importance weights for it."""

from collections.abc import Sequence

import numpy as np

from gvpo_jax.data.groups import Group, Source, join, pack, take, unpack

_TAG = 7  # keeps the draws apart from the order of the data


class ReplayBuffer:
    """The last `capacity` groups that the policy sampled; what it draws depends on its key alone.

    Args:
        capacity: groups; the oldest leave first.
        seed: of the draws.
    """

    def __init__(self, capacity: int, seed: int):
        self._capacity, self._seed = capacity, seed
        self._groups: list[Group] = []

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, groups: Sequence[Group]) -> None:
        """Keep the policy's own completions of these groups that have a reward."""
        for group in groups:
            own = (group.source == Source.POLICY) & ~np.isnan(group.rewards) & (group.lengths > 0)
            if own.sum() >= 2:
                self._groups.append(_trim(take(group, np.flatnonzero(own))))
        del self._groups[: -self._capacity]

    def groups(self, count: int, key: int) -> list[Group]:
        """At most `count` different whole groups, uniformly."""
        order = self._order(len(self._groups), key, 0)
        return [_as_replay(self._groups[i]) for i in order[:count]]

    def completions(self, row: int, count: int, key: int) -> Group | None:
        """At most `count` different completions of one row's prompt, uniformly; None: none yet."""
        past = [group for group in self._groups if group.row == row]
        if not past:
            return None
        places = [(group, i) for group in past for i in range(len(group.lengths))]
        drawn = [places[i] for i in self._order(len(places), key, row + 1)[:count]]
        pool, *rest = (take(group, [i]) for group, i in drawn)
        for one in rest:
            pool = join(pool, one)
        return _as_replay(pool)

    def state(self) -> dict[str, np.ndarray]:
        """Everything, as a few arrays."""
        return pack(self._groups)

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Take over what `state` gave."""
        self._groups = unpack(state)[-self._capacity :]

    def _order(self, n: int, *key: int) -> np.ndarray:
        # Raw bits keep their values across NumPy versions; permutations need not.
        sequence = np.random.SeedSequence([_TAG, self._seed, *key])
        bits = np.random.PCG64(sequence).random_raw(n)
        return np.argsort(bits, kind="stable")


def _trim(group: Group) -> Group:
    """Without the padding that no completion needs."""
    t = int(group.lengths.max())
    names = ("completions", "old_logps", "ref_logps")
    return group._replace(**{name: getattr(group, name)[:, :t].copy() for name in names})


def _as_replay(group: Group) -> Group:
    return group._replace(source=np.full_like(group.source, Source.REPLAY))
