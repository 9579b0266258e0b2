"""Groups drawn from the policy and scored: everything between token ids and rewards."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from gvpo_jax.batch import Batch, make_batch
from gvpo_jax.config import Config
from gvpo_jax.data import EncodedPrompts, batch_indices, repeat_columns
from gvpo_jax.errors import UserError
from gvpo_jax.evaluate import evaluate
from gvpo_jax.policy import Policy
from gvpo_jax.rewards import Scores, score
from gvpo_jax.rollout import FINISH_LENGTH, Rollout, Sampling
from gvpo_jax.runlog import reward_metrics

Row = dict[str, Any]
_EVAL_SEED = 2**31  # above any run.seed: keeps the keys of evaluation apart from those of training


class Sampler:
    """Batches for training, and evaluations, from prompts, policy and reward functions."""

    def __init__(self, policy: Policy, config: Config, reward_funcs: Sequence[Callable[..., Any]]):
        self._policy, self._config, self.reward_funcs = policy, config, reward_funcs

    def batch(
        self, number: int, prompts: EncodedPrompts
    ) -> tuple[Batch, dict[str, float], list[Row]]:
        """Batch `number` of the run, without reference log-probs; its metrics; its texts."""
        c = self._config
        indices = batch_indices(len(prompts.rows), c.train.batch_size, number, c.run.seed)
        rows = [prompts.rows[i] for i in indices]
        ids = [prompts.token_ids[i] for i in indices]
        first = number * c.train.batch_size  # visits, not rows: a row's next one gets fresh keys
        rollout = self._policy.generate(
            ids,
            range(first, first + len(ids)),
            num_generations=c.rollout.num_generations,
            sampling=training_sampling(c),
            seed=c.run.seed,
            longest_prompt=prompts.longest,
        )
        texts, scores = self._score(rows, rollout)
        if scores.failed == len(scores.rewards):
            raise UserError(f"batch {number}: every reward failed; rewards.on_error=raise says how")
        rewards = scores.rewards.reshape(rollout.lengths.shape)
        batch = make_batch(ids, rollout.completions, rollout.lengths, rewards, prompts.longest)
        return batch, _metrics(batch, rollout, scores), _records(rows, texts, rewards)

    def evaluate(self, held_out: EncodedPrompts) -> tuple[dict[str, float], list[Row]]:
        """Accuracy on held-out prompts and what was sampled, with the same keys every time."""
        e = self._config.eval

        def sample_and_score(indices: Sequence[int]) -> tuple[np.ndarray, list[list[str]]]:
            rollout = self._policy.generate(
                [held_out.token_ids[i] for i in indices],
                indices,
                num_generations=e.num_generations,
                sampling=Sampling(temperature=e.temperature),
                seed=_EVAL_SEED,
                longest_prompt=held_out.longest,
            )
            texts, scores = self._score([held_out.rows[i] for i in indices], rollout)
            return scores.rewards.reshape(rollout.lengths.shape), texts

        return evaluate(
            held_out.rows,
            sample_and_score,
            batch_size=e.batch_size,
            success_reward=e.success_reward,
        )

    def _score(self, rows: Sequence[Row], rollout: Rollout) -> tuple[list[list[str]], Scores]:
        """The completions' texts and, through TRL's call, the rewards of all n = G * k."""
        k = rollout.lengths.shape[1]
        texts = completion_texts(self._policy.model.tokenizer, rollout)
        completions = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, group in zip(rows, texts, strict=True)
            for text in group
        ]
        scores = score(
            self.reward_funcs,
            self._config.rewards.weights or None,
            prompts=[row["prompt"] for row in rows for _ in range(k)],
            completions=completions,
            completion_ids=_token_ids(rollout),
            columns=repeat_columns(rows, k),
            on_error=self._config.rewards.on_error,
        )
        return texts, scores


def training_sampling(config: Config) -> Sampling:
    """How training samples, from the config."""
    r = config.rollout
    return Sampling(temperature=r.temperature, top_k=r.top_k, top_p=r.top_p, min_p=r.min_p)


def completion_texts(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[list[str]]:
    """The completions as text, g lists of k, without special tokens."""
    g, k = rollout.lengths.shape
    texts = tokenizer.batch_decode(_token_ids(rollout), skip_special_tokens=True)
    return [texts[i * k : (i + 1) * k] for i in range(g)]


def _token_ids(rollout: Rollout) -> list[list[int]]:
    pairs = zip(rollout.completions, rollout.lengths, strict=True)
    return [row[:n].tolist() for group, ns in pairs for row, n in zip(group, ns, strict=True)]


def _metrics(batch: Batch, rollout: Rollout, scores: Scores) -> dict[str, float]:
    return reward_metrics(batch) | {
        "completions/mean_length": float(rollout.lengths.mean()),
        "completions/clipped_ratio": float((rollout.finish == FINISH_LENGTH).mean()),
        "rewards/abstained": float(scores.abstained),
        "rewards/failed": float(scores.failed),
        **{f"rewards/{name}": _mean(values) for name, values in scores.by_func.items()},
    }


def _mean(values: np.ndarray) -> float:
    given = values[~np.isnan(values)]
    return float(given.mean()) if given.size else float("nan")


def _records(rows: Sequence[Row], texts, rewards: np.ndarray) -> list[Row]:
    """One record per completion; `group` tells groups apart where a prompt comes twice."""
    return [
        {
            **row,
            "group": number,
            "completion": text,
            "reward": None if np.isnan(reward) else float(reward),
        }
        for number, (row, group, values) in enumerate(zip(rows, texts, rewards, strict=True))
        for text, reward in zip(group, values, strict=True)
    ]
