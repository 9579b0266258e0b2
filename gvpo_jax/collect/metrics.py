"""What a rollout's samples and an update's rewards are summed up to."""

import numpy as np

from gvpo_jax.data.batch import Batch
from gvpo_jax.data.groups import Groups, Source
from gvpo_jax.parallel.distributed import gather
from gvpo_jax.rewards import Scores


def rollout_metrics(groups: Groups, scores: Scores, k: int) -> dict[str, float]:
    """Of all processes' samples: of each group the first k, without demonstrations."""
    own = {name: values[:, :k] for name, values in scores.by_func.items()}
    why = np.array([[scores.abstained, scores.failed]])
    here = (groups.lengths[:, :k], groups.stopped[:, :k], own, why)
    lengths, stopped, by_func, why = gather(here)
    abstained, failed = why.sum(axis=0)
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/clipped_ratio": float((~stopped).mean()),
        "rewards/abstained": float(abstained),
        "rewards/failed": float(failed),
        **{f"rewards/{name}": _mean(values) for name, values in by_func.items()},
    }


def _mean(values: np.ndarray) -> float:
    given = values[~np.isnan(values)]
    return float(given.mean()) if given.size else float("nan")


def reward_metrics(batch: Batch) -> dict[str, float]:
    """Rewards of all processes' valid completions, under TRL's names, and `tokens` trained on.

    Of the policy's new samples where there are some, else of all: older samples and demonstrations
    say nothing on how good the policy is. `reward_std` is the mean over groups of the standard
    deviation inside (with k - 1), `frac_reward_zero_std` the share of groups where all rewards are
    equal, `skipped_groups` the number of those without two completions to compare.
    """
    rewards, valid, lengths, prompt_lengths, source = gather(
        (batch.rewards, batch.valid, batch.lengths, batch.prompt_lengths, batch.source)
    )
    rewards = np.asarray(rewards, np.float64)
    tokens = np.where(valid, lengths, 0).sum() + prompt_lengths[valid.any(axis=-1)].sum()
    new = valid & (source == Source.POLICY)
    shown = new if new.any() else valid
    pairs = zip(rewards, shown, strict=True)
    stds = np.array([of_group[v].std(ddof=1) for of_group, v in pairs if v.sum() >= 2])
    return {
        "reward": _mean(rewards[shown]),
        "reward_std": _mean(stds),
        "frac_reward_zero_std": _mean(stds == 0),
        "skipped_groups": float((lengths.any(axis=-1) & (valid.sum(axis=-1) < 2)).sum()),
        "tokens": float(tokens),
    }
