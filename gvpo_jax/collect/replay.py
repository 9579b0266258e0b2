"""A memory of sampled groups, to be trained on again: GVPO needs no importance weights for it."""

import functools
from dataclasses import dataclass

import numpy as np

from gvpo_jax.data.groups import Groups, Source, join, pick, stack, take, trim
from gvpo_jax.data.rows import shuffled
from gvpo_jax.settings import setting

_TAG = 7  # keeps the draws apart from the order of the data


@dataclass(frozen=True)
class ReplayConfig:
    """What the policy sampled earlier, trained on again."""

    completions: int = setting(
        0, "How many of the k are older ones of the same prompt, once there are some.", least=0
    )
    groups: int = setting(0, "How many of an update's groups are whole older ones.", least=0)
    capacity: int = setting(1024, "Groups remembered.", least=1)


class ReplayBuffer:
    """The last `capacity` groups that the policy sampled; draws depend on seed and key alone."""

    def __init__(self, capacity: int, seed: int):
        self._capacity, self._seed = capacity, seed
        self._groups: list[Groups] = []

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, groups: Groups) -> None:
        """Keep the policy's own completions of these groups that have a reward."""
        own = (groups.source == Source.POLICY) & ~np.isnan(groups.rewards) & (groups.lengths > 0)
        for number in np.flatnonzero(own.sum(axis=1) >= 2):
            group = pick(take(groups, [number]), np.flatnonzero(own[number]))
            self._groups.append(trim(group))
        del self._groups[: -self._capacity]

    def groups(self, count: int, key: int) -> list[Groups]:
        """At most `count` different whole groups, uniformly."""
        order = shuffled(len(self._groups), _TAG, self._seed, key, 0)
        return [_as_replay(self._groups[i]) for i in order[:count]]

    def completions(self, row: int, count: int, key: int) -> Groups | None:
        """At most `count` different completions of one row's prompt, uniformly; None: none yet."""
        past = [group for group in self._groups if group.row[0] == row]
        if not past:
            return None
        places = [(group, i) for group in past for i in range(group.lengths.shape[1])]
        order = shuffled(len(places), _TAG, self._seed, key, row + 1)
        drawn = (places[i] for i in order[:count])
        return _as_replay(functools.reduce(join, (pick(group, [i]) for group, i in drawn)))

    def state(self) -> dict[str, np.ndarray]:
        """Everything, as a few arrays."""
        return stack(self._groups)._asdict() if self._groups else {}

    def load(self, groups: Groups | None) -> None:
        """Take over groups that `state` gave."""
        self._groups = []
        if groups:
            self.add(groups)


def _as_replay(group: Groups) -> Groups:
    return group._replace(source=np.full_like(group.source, Source.REPLAY))
