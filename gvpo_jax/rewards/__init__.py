"""Reward functions: called as TRL does (see `gvpo_jax.rewards.call`), and found by name."""

from gvpo_jax.rewards.attempt import describe
from gvpo_jax.rewards.call import RewardError, Scores, compute_rewards
from gvpo_jax.rewards.functions import RewardFunc, batched, completion_text, per_sample
from gvpo_jax.rewards.load import RewardConfig, load_reward_func

__all__ = [
    "RewardConfig",
    "RewardError",
    "RewardFunc",
    "Scores",
    "batched",
    "completion_text",
    "compute_rewards",
    "describe",
    "load_reward_func",
    "per_sample",
]


def __dir__() -> list[str]:
    """Tab completion offers what is for others to use."""
    return __all__
