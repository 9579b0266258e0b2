"""Groups drawn from the policy, with their rewards: everything between token ids and rewards."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from gvpo_jax.collect.metrics import rollout_metrics
from gvpo_jax.data.groups import (
    Groups,
    Source,
    join,
    length_problem,
    make_group,
    stack,
    take,
    token_lists,
)
from gvpo_jax.data.rows import EncodedPrompts, batch_indices, columns_of, completion_ids
from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import gather, my_slice, raise_together
from gvpo_jax.rewards import RewardConfig, Scores, compute_rewards
from gvpo_jax.rollout import Engine
from gvpo_jax.rollout.engine import RolloutConfig

Row = dict[str, Any]
SOLUTION = "solution"  # the column with demonstrations


class Collected(NamedTuple):
    """New groups with their rewards, what there is to tell about them, and their texts."""

    groups: Groups
    metrics: dict[str, float]
    records: list[Row]


class Judge:
    """Gives completions their rewards.

    Args:
        reward_funcs: called as TRL does.
        options: their weights, and what becomes of failures.
        tokenizer: makes texts of token ids.
    """

    def __init__(
        self,
        reward_funcs: Sequence[Callable[..., Any]],
        options: RewardConfig,
        tokenizer: PreTrainedTokenizerBase,
    ):
        self.reward_funcs, self.tokenizer = reward_funcs, tokenizer
        self._options = options
        self._one_at_a_time = threading.Lock()  # rounds drawn ahead, and evaluations

    def judge(self, rows: Sequence[Row], groups: Groups) -> tuple[list[list[str]], Scores]:
        """The completions' texts `[g][k]`, and their rewards `[g, k]`.

        rows: those of the groups, in their order.

        Raises:
            UserError: a reward function failed, on whichever process.
        """
        return raise_together(lambda: self._judge(rows, groups))

    def _judge(self, rows: Sequence[Row], groups: Groups) -> tuple[list[list[str]], Scores]:
        shape = groups.lengths.shape
        token_ids = token_lists(groups.completions, groups.lengths)
        texts = texts_of(self.tokenizer, groups.completions, groups.lengths)
        all_rows = [row for row in rows for _ in range(shape[1])]
        completions = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(all_rows, (text for group in texts for text in group), strict=True)
        ]
        there = [place for place, ids in enumerate(token_ids) if ids]  # not a skipped demonstration
        with self._one_at_a_time:
            scores = compute_rewards(
                self.reward_funcs,
                self._options.weights or None,
                prompts=[all_rows[i]["prompt"] for i in there],
                completions=[completions[i] for i in there],
                completion_ids=[token_ids[i] for i in there],
                columns=columns_of([all_rows[i] for i in there]),
                on_error=self._options.on_error,
            )

        def in_place(values: np.ndarray) -> np.ndarray:
            everywhere = np.full(len(token_ids), np.nan)
            everywhere[there] = values
            return everywhere.reshape(shape)

        by_func = {name: in_place(values) for name, values in scores.by_func.items()}
        return texts, dataclasses.replace(scores, rewards=in_place(scores.rewards), by_func=by_func)


@dataclasses.dataclass(frozen=True)
class Collector:
    """Samples and judges the new groups of a run.

    Attributes:
        engine: samples.
        judge: gives rewards.
        prompts: of the training rows.
        options: what is sampled.
        demonstrations: see `read_demonstrations`; None: there are none.
        new: groups of an update that are sampled.
        batch_size: groups of an update, older ones included.
        samples: completions of a group that are sampled.
        seed: of the data's order and of sampling.
    """

    engine: Engine
    judge: Judge
    prompts: EncodedPrompts
    options: RolloutConfig
    demonstrations: Sequence[Groups] | None
    new: int
    batch_size: int
    samples: int
    seed: int

    def collect(self, numbers: Sequence[int], params: Any, version: int) -> list[Collected]:
        """The new groups of these batches, sampled together by `params` after `version` updates.

        Each group has the samples that the config asks for, then its row's demonstrations.

        Raises:
            UserError: every reward of a batch failed, or none of the first batch was given.
        """
        here = my_slice(self.new)
        rows, visits = [], []
        for number in numbers:
            rows.append(batch_indices(len(self.prompts.rows), self.new, number, self.seed)[here])
            first = number * self.batch_size  # visits, not rows: a row's next has fresh keys
            visits += range(first, first + self.new)[here]
        indices, size = np.concatenate(rows), len(rows[0])
        sampled = self.engine.generate(
            params,
            [self.prompts.token_ids[i] for i in indices],
            visits,
            num_generations=self.samples,
            max_completion_length=self.options.max_completion_length,
            sampling=self.options.params(),
            seed=self.seed,
            longest_prompt=self.prompts.longest,
        )
        groups = sampled._replace(row=indices, version=np.full_like(sampled.version, version))
        if self.demonstrations is not None:
            groups = join(groups, stack([self.demonstrations[i] for i in indices]))
        return [
            self._with_rewards(number, take(groups, slice(place * size, (place + 1) * size)))
            for place, number in enumerate(numbers)
        ]

    def _with_rewards(self, number: int, groups: Groups) -> Collected:
        """The groups of batch `number` with their rewards."""
        rows = [self.prompts.rows[row] for row in groups.row]
        texts, scores = self.judge.judge(rows, groups)
        nothing = np.isnan(scores.rewards).all()
        if gather(np.array([scores.failed == scores.rewards.size])).all():
            raise UserError(f"batch {number}: every reward failed; rewards.on_error=raise says how")
        if number == 0 and gather(np.array([nothing])).all():
            raise UserError(
                "no completion of the first batch has a reward: every reward function gave None "
                "for all of them; is a return missing?"
            )
        rewards = np.where(groups.lengths > 0, scores.rewards, np.nan).astype(np.float32)
        groups = groups._replace(rewards=rewards)
        metrics = rollout_metrics(groups, scores, self.samples) | self.engine.metrics()
        return Collected(groups, metrics, _records(rows, texts, groups))


def read_demonstrations(
    prompts: EncodedPrompts,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    *,
    count: int,
    max_completion_length: int,
    bad_samples: Literal["error", "skip"],
) -> list[Groups]:
    """Every row's solutions as completions without a reward; one that can't be used is empty.

    Args:
        prompts: of the rows, whose column `solution` is a text or a list of texts.
        tokenizer: makes token ids of the texts.
        stop_ids: see `completion_ids`.
        count: demonstrations of each row.
        max_completion_length: tokens.
        bad_samples: what becomes of one that is too long.

    Raises:
        UserError: a row has too few, or one is too long and `bad_samples` is `error`.
    """
    groups = []
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
        ids = [completion_ids(text, tokenizer, stop_ids) for text in texts[:count]]
        for number, tokens in enumerate(ids):
            problem = length_problem(tokens, max_completion_length)
            if problem and bad_samples == "error":
                raise UserError(f"row {place + 1}, {SOLUTION}: {problem}")
            ids[number] = [] if problem else tokens
        nothing = [None] * count
        groups.append(make_group(prompt, ids, nothing, source=Source.DEMONSTRATION, row=place))
    return groups


def texts_of(
    tokenizer: PreTrainedTokenizerBase, completions: np.ndarray, lengths: np.ndarray
) -> list[list[str]]:
    """Completions `[g, k, t]` as text, a list for each group, without special tokens."""
    texts = tokenizer.batch_decode(token_lists(completions, lengths), skip_special_tokens=True)
    k = lengths.shape[1]
    return [texts[i : i + k] for i in range(0, len(texts), k)]


def _records(rows: Sequence[Row], texts: list[list[str]], groups: Groups) -> list[Row]:
    """One record per completion; `group` tells groups apart where a prompt comes twice."""
    return [
        {
            **row,
            "group": g,
            "completion": text,
            "reward": None if np.isnan(groups.rewards[g, i]) else float(groups.rewards[g, i]),
            "source": Source(groups.source[g, i]).name.lower(),
            "version": int(groups.version[g, i]),
        }
        for g, (row, in_group) in enumerate(zip(rows, texts, strict=True))
        for i, text in enumerate(in_group)
    ]
