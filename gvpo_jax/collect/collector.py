"""Groups drawn from the policy and scored: everything between token ids and rewards."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from gvpo_jax.collect.evaluate import evaluate
from gvpo_jax.collect.metrics import rollout_metrics
from gvpo_jax.config import Config
from gvpo_jax.data.groups import Group, Source, join, length_problem, make_group, token_lists
from gvpo_jax.data.rows import EncodedPrompts, batch_indices, repeat_columns
from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import gather, my_items, my_slice, raise_together
from gvpo_jax.rewards import Scores, compute_rewards
from gvpo_jax.rollout import Rollout, SamplingParams
from gvpo_jax.training.policy import Policy

Row = dict[str, Any]
SOLUTION = "solution"  # the column with demonstrations
_EVAL_SEED = 2**31  # above any run.seed: keeps the keys of evaluation apart from those of training


class Collected(NamedTuple):
    """New groups with their rewards, what there is to tell about them, and their texts."""

    groups: list[Group]
    metrics: dict[str, float]
    records: list[Row]


class Collector:
    """Groups for training, and evaluations, from prompts, policy and reward functions."""

    def __init__(self, policy: Policy, config: Config, reward_funcs: Sequence[Callable[..., Any]]):
        self._policy, self._config, self.reward_funcs = policy, config, reward_funcs
        self._one_at_a_time = threading.Lock()  # rounds drawn ahead, and evaluations

    def collect(
        self,
        numbers: Sequence[int],
        prompts: EncodedPrompts,
        demonstrations: Sequence[Group] | None,
        params: Any,
        version: int,
    ) -> list["Collected"]:
        """The new groups of these batches, sampled together by `params` after `version` updates.

        Each group has the samples that the config asks for, then its row's demonstrations.
        """
        c = self._config
        new = c.train.batch_size - c.replay.groups
        here = my_slice(new)
        rows, visits = [], []
        for number in numbers:
            rows.append(batch_indices(len(prompts.rows), new, number, c.run.seed)[here])
            first = number * c.train.batch_size  # visits, not rows: a row's next has fresh keys
            visits += range(first, first + new)[here]
        indices = np.concatenate(rows)
        ids = [prompts.token_ids[i] for i in indices]
        rollout = self._policy.generate(
            ids,
            visits,
            num_generations=c.rollout.num_generations
            - c.rollout.demonstrations
            - c.replay.completions,
            sampling=sampling_params(c),
            seed=c.run.seed,
            longest_prompt=prompts.longest,
            params=params,
        )
        groups = _groups(indices, ids, rollout, version)
        if demonstrations is not None:
            groups = [join(group, demonstrations[group.row]) for group in groups]
        size = len(rows[0])
        parts = [slice(start, start + size) for start in range(0, len(groups), size)]
        return [
            self._judge(number, prompts, groups[part], Rollout(*(x[part] for x in rollout)))
            for number, part in zip(numbers, parts, strict=True)
        ]

    def _judge(
        self, number: int, prompts: EncodedPrompts, groups: list[Group], rollout: Rollout
    ) -> "Collected":
        """The groups of batch `number` with their rewards."""
        rows = [prompts.rows[group.row] for group in groups]
        texts, scores = raise_together(lambda: self._compute_rewards(rows, groups))
        if gather(np.array([scores.failed == len(scores.rewards)])).all():
            raise UserError(f"batch {number}: every reward failed; rewards.on_error=raise says how")
        if number == 0 and gather(np.array([np.isnan(scores.rewards).all()])).all():
            raise UserError(
                "no completion of the first batch has a reward: every reward function gave None "
                "for all of them; is a return missing?"
            )
        rewards = scores.rewards.reshape(len(rows), -1).astype(np.float32)
        groups = [
            group._replace(rewards=np.where(group.lengths > 0, values, np.nan))
            for group, values in zip(groups, rewards, strict=True)
        ]
        k = rollout.lengths.shape[1]
        metrics = rollout_metrics(rollout, scores, k) | self._policy.sync_metrics()
        return Collected(groups, metrics, _records(rows, texts, groups))

    def evaluate(self, held_out: EncodedPrompts) -> tuple[dict[str, float], list[Row]]:
        """Accuracy on held-out prompts and what was sampled, with the same keys every time."""
        e = self._config.eval

        def sample_and_score(indices: Sequence[int]) -> tuple[np.ndarray, list[list[str]]]:
            here = my_items(indices)
            ids = [held_out.token_ids[i] for i in here]
            rollout = self._policy.generate(
                ids,
                here,
                num_generations=e.num_generations,
                sampling=SamplingParams(temperature=e.temperature),
                seed=_EVAL_SEED,
                longest_prompt=held_out.longest,
            )
            groups = _groups(here, ids, rollout, self._policy.updates)
            _, scores = raise_together(
                lambda: self._compute_rewards([held_out.rows[i] for i in here], groups)
            )
            rewards = scores.rewards.reshape(rollout.lengths.shape)
            rollout, rewards = gather((rollout, rewards))
            texts = texts_of(self._policy.model.tokenizer, token_lists(rollout), e.num_generations)
            return rewards[: len(indices)], texts[: len(indices)]

        return evaluate(
            held_out.rows,
            sample_and_score,
            batch_size=e.batch_size,
            success_reward=e.success_reward,
        )

    def demonstrations(self, prompts: EncodedPrompts) -> list[Group]:
        """Every row's solutions as completions without a reward; one that can't be used is empty.

        Raises:
            UserError: a row has too few, or one is too long and `data.bad_samples` is `error`.
        """
        c = self._config
        count, groups = c.rollout.demonstrations, []
        for place, (row, prompt) in enumerate(zip(prompts.rows, prompts.token_ids, strict=True)):
            texts = row.get(SOLUTION)
            texts = [texts] if isinstance(texts, str) else texts
            if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
                texts = []
            if len(texts) < count:
                raise UserError(
                    f"row {place + 1}: rollout.demonstrations={count} needs as many texts in the "
                    f"column '{SOLUTION}', here are {len(texts)}"
                )
            ids = [self._policy.completion_ids(text) for text in texts[:count]]
            for number, tokens in enumerate(ids):
                problem = length_problem(tokens, c.rollout.max_completion_length)
                if problem and c.data.bad_samples == "error":
                    raise UserError(f"row {place + 1}, {SOLUTION}: {problem}")
                ids[number] = [] if problem else tokens
            nothing = [None] * count
            groups.append(make_group(prompt, ids, nothing, source=Source.DEMONSTRATION, row=place))
        return groups

    def _compute_rewards(
        self, rows: Sequence[Row], groups: Sequence[Group]
    ) -> tuple[list[list[str]], Scores]:
        """The completions' texts and, through TRL's call, the rewards of all n = G * k."""
        k = len(groups[0].lengths)
        token_ids = [ids for group in groups for ids in token_lists(group)]
        texts = texts_of(self._policy.model.tokenizer, token_ids, k)
        all_rows = [row for row in rows for _ in range(k)]
        completions = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(all_rows, (text for group in texts for text in group), strict=True)
        ]
        there = [place for place, ids in enumerate(token_ids) if ids]  # not a skipped demonstration
        with self._one_at_a_time:
            scores = compute_rewards(
                self.reward_funcs,
                self._config.rewards.weights or None,
                prompts=[all_rows[i]["prompt"] for i in there],
                completions=[completions[i] for i in there],
                completion_ids=[token_ids[i] for i in there],
                columns=repeat_columns([all_rows[i] for i in there], 1),
                on_error=self._config.rewards.on_error,
            )
        rewards = np.full(len(token_ids), np.nan)
        rewards[there] = scores.rewards
        by_func = {name: np.full(len(token_ids), np.nan) for name in scores.by_func}
        for name, values in scores.by_func.items():
            by_func[name][there] = values
        scores = dataclasses.replace(scores, rewards=rewards, by_func=by_func)
        return texts, scores


def sampling_params(config: Config) -> SamplingParams:
    """How training samples, from the config."""
    r = config.rollout
    return SamplingParams(temperature=r.temperature, top_k=r.top_k, top_p=r.top_p, min_p=r.min_p)


def texts_of(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[list[int]], k: int
) -> list[list[str]]:
    """Completions as text, lists of k, without special tokens."""
    texts = tokenizer.batch_decode(token_ids, skip_special_tokens=True)
    return [texts[i : i + k] for i in range(0, len(texts), k)]


def _groups(indices, prompts: Sequence[Sequence[int]], rollout: Rollout, version: int):
    """One record per prompt of what the policy sampled."""
    k = rollout.lengths.shape[1]
    return [
        Group(
            row=int(row),
            prompt=np.asarray(prompt, np.int32),
            completions=rollout.completions[g],
            lengths=rollout.lengths[g],
            rewards=np.full(k, np.nan, np.float32),
            source=np.full(k, Source.POLICY, np.int32),
            version=np.full(k, version, np.int32),
            old_logps=rollout.logps[g],
            ref_logps=np.zeros_like(rollout.logps[g]),
        )
        for g, (row, prompt) in enumerate(zip(indices, prompts, strict=True))
    ]


def _records(rows: Sequence[Row], texts, groups: Sequence[Group]) -> list[Row]:
    """One record per completion; `group` tells groups apart where a prompt comes twice."""
    return [
        {
            **row,
            "group": number,
            "completion": text,
            "reward": None if np.isnan(reward) else float(reward),
            "source": Source(source).name.lower(),
            "version": int(version),
        }
        for number, (row, in_group, group) in enumerate(zip(rows, texts, groups, strict=True))
        for text, reward, source, version in zip(
            in_group, group.rewards, group.source, group.version, strict=True
        )
    ]
