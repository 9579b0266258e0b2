"""Groups drawn from the policy, with their rewards: everything between token ids and rewards."""

import dataclasses
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from gvpo_jax.collect.early_signs import CHAT_HINT
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
from gvpo_jax.data.prompts import EncodedPrompts
from gvpo_jax.data.rows import Row, batch_indices, columns_of
from gvpo_jax.data.stream import StreamedPrompts
from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import gather, my_slice, raise_together
from gvpo_jax.parallel.preemption import abandoned_on_signal
from gvpo_jax.rewards import RewardConfig, RewardError, Scores, compute_rewards
from gvpo_jax.rewards.call import check_weights
from gvpo_jax.rewards.functions import check_columns
from gvpo_jax.rollout.engine import Engine, RolloutConfig
from gvpo_jax.rollout.stop import before_stop
from gvpo_jax.rundir.files import to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SOLUTION = "solution"  # the column with demonstrations


class Collected(NamedTuple):
    """New groups with their rewards, what there is to tell about them, and their texts."""

    groups: Groups
    metrics: dict[str, float]
    records: list[Row]


@dataclasses.dataclass(frozen=True)
class Judge:
    """Gives completions their rewards."""

    reward_funcs: Sequence[Callable[..., Any]]  # called as TRL does
    options: RewardConfig  # their weights, and what becomes of failures
    tokenizer: "PreTrainedTokenizerBase"  # makes texts of token ids
    stop: Sequence[str] = ()  # texts before which a completion's own text ends
    kind: str = "reward"  # what messages call the functions
    # Rounds drawn ahead, and evaluations, go one at a time.
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    def texts(self, completions: np.ndarray, lengths: np.ndarray) -> list[list[str]]:
        """Completions `[g, k, t]` as the reward functions and records get them."""
        skip = self.options.skip_special_tokens
        return texts_of(self.tokenizer, completions, lengths, self.stop, skip_special_tokens=skip)

    def check(self, prompts: EncodedPrompts | StreamedPrompts, what: str) -> None:
        """See that functions, weights and columns fit each other, before anything is sampled.

        Raises:
            UserError: they do not. `what` stands for the rows in its message.
        """
        check_weights(self.options.weights or None, self.reward_funcs)
        check_columns(self.reward_funcs, prompts.columns, what, kind=self.kind)

    def judge(
        self,
        prompts: EncodedPrompts | StreamedPrompts,
        places: Sequence[int] | np.ndarray,
        groups: Groups,
    ) -> tuple[list[list[str]], Scores]:
        """The completions' texts `[g][k]`, and their rewards `[g, k]`.

        Args:
            prompts: all rows there are.
            places: of the groups' rows, in their order.
            groups: what is judged.

        Raises:
            UserError: a reward function failed, on whichever process.
        """
        rows = [prompts.rows[place] for place in places]
        texts = self.texts(groups.completions, groups.lengths)
        there = groups.lengths > 0  # not a skipped demonstration
        given, completions = [], []
        for g, i in np.argwhere(there):
            given.append(rows[g])
            chat = [{"role": "assistant", "content": texts[g][i]}]
            completions.append(texts[g][i] if isinstance(rows[g]["prompt"], str) else chat)

        def compute() -> Scores:
            try:
                scores = compute_rewards(
                    self.reward_funcs,
                    self.options.weights or None,
                    prompts=[row["prompt"] for row in given],
                    completions=completions,
                    completion_ids=token_lists(groups.completions[there], groups.lengths[there]),
                    columns=columns_of(given, prompts.columns),
                    on_error=self.options.on_error,
                    deadline=self.options.deadline,
                    places=[getattr(row, "place", "a row") for row in given],
                    kind=self.kind,
                )
            except RewardError as error:
                raise RewardError(_with_hint(str(error), completions)) from error
            return scores._replace(problem=_with_hint(scores.problem, completions))

        with self.lock, abandoned_on_signal():
            scores = raise_together(compute)

        def in_place(values: np.ndarray) -> np.ndarray:
            everywhere = np.full(there.shape, np.nan)
            everywhere[there] = values
            return everywhere

        by_func = {name: in_place(values) for name, values in scores.by_func.items()}
        return texts, scores._replace(rewards=in_place(scores.rewards), by_func=by_func)


@dataclasses.dataclass(frozen=True)
class Collector:
    """Samples and judges the new groups of a run."""

    engine: Engine
    judge: Judge
    prompts: EncodedPrompts | StreamedPrompts  # of the training rows
    options: RolloutConfig  # what is sampled
    demonstrations: Sequence[Groups] | None  # see `read_demonstrations`; None: there are none
    new: int  # groups of an update that are sampled
    batch_size: int  # groups of an update, older ones included
    samples: int  # completions of a group that are sampled
    seed: int  # of the data's order and of sampling
    shuffle: bool = True  # the rows, in every epoch

    def collect(self, numbers: Sequence[int], params: Any, version: int) -> list[Collected]:
        """The new groups of these batches, sampled together by `params` after `version` updates.

        Each group has the samples that the config asks for, then its row's demonstrations.

        Raises:
            UserError: every reward of a batch failed, or none of the first batch was given.
        """
        here = my_slice(self.new)
        rows, visits = [], []
        batches, left_out = self._visit(numbers)
        for number, every in zip(numbers, batches, strict=True):
            rows.append(every[here])
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
        routing = self.engine.routing_metrics(params, sampled)
        groups = sampled._replace(row=indices, version=np.full_like(sampled.version, version))
        if self.demonstrations is not None:
            groups = join(groups, stack([self.demonstrations[i] for i in indices]))
        told = [routing | ({"skipped_rows": float(n)} if n else {}) for n in left_out]
        return [
            self._with_rewards(
                number, take(groups, slice(place * size, (place + 1) * size)), told[place]
            )
            for place, number in enumerate(numbers)
        ]

    def _visit(self, numbers: Sequence[int]) -> tuple[list[np.ndarray], list[int]]:
        """The row numbers of these batches, and how many rows of a stream were left out."""
        if isinstance(self.prompts, StreamedPrompts):
            return self.prompts.visit(numbers, self.new)
        count = len(self.prompts.rows)
        options = {"shuffle": self.shuffle}
        batches = [batch_indices(count, self.new, n, self.seed, **options) for n in numbers]
        return batches, [0] * len(batches)

    def _with_rewards(self, number: int, groups: Groups, told: dict[str, float]) -> Collected:
        """The groups of batch `number` with their rewards; their metrics hold what is `told`."""
        rows = [self.prompts.rows[row] for row in groups.row]
        texts, scores = self.judge.judge(self.prompts, groups.row, groups)
        if gather(np.array([scores.failed == (groups.lengths > 0).sum()])).all():
            raise UserError(f"batch {number}: every reward failed, first: {scores.problem}")
        if number == 0 and gather(np.isnan(scores.rewards)).all():
            raise UserError(
                "no completion of the first batch has a reward: every reward function gave None "
                "for all of them; is a return missing?"
            )
        rewards = np.where(groups.lengths > 0, scores.rewards, np.nan).astype(np.float32)
        groups = groups._replace(rewards=rewards)
        metrics = rollout_metrics(groups, scores, self.samples) | self.engine.metrics() | told
        records = sample_records(rows, texts, rewards, scores.by_func)
        for record, source, version in zip(
            records, groups.source.flat, groups.version.flat, strict=True
        ):
            record |= {"source": Source(source).name.lower(), "version": int(version)}
        # Rows of data may hold what JSON does not know.
        return Collected(groups, metrics, json.loads(to_json(records)))


def _with_hint(problem: str, completions: Sequence[Any]) -> str:
    """What failed, and why where a function seems to have expected texts."""
    chats = any(isinstance(completion, list) for completion in completions)
    of_types = any(name in problem for name in ("'list'", "TypeError", "AttributeError"))
    return f"{problem}; {CHAT_HINT}" if chats and of_types else problem


def read_demonstrations(
    prompts: EncodedPrompts,
    encode: Callable[[str], list[int]],
    options: RolloutConfig,
    *,
    bad_samples: Literal["error", "skip"],
) -> list[Groups]:
    """Every row's solutions as completions without a reward; one that can't be used is empty.

    The column `solution` is a text or a list of texts. `options` says how many a row must have, and
    how long they may be. `encode` makes token ids of a text, end token included.

    Raises:
        UserError: a row has too few, or one that `encode` refuses, or one is too long and
            `bad_samples` is `error`.
    """
    groups, count = [], options.demonstrations
    for place, (row, prompt) in enumerate(zip(prompts.rows, prompts.token_ids, strict=True)):
        name, texts = getattr(row, "place", f"row {place + 1}"), row.get(SOLUTION)
        texts = [texts] if isinstance(texts, str) else texts
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            texts = []
        if len(texts) < count:
            raise UserError(
                f"{name}: rollout.demonstrations={count} needs as many texts in the "
                f"column '{SOLUTION}', here are {len(texts)}"
            )
        try:
            ids = [encode(text) for text in texts[:count]]
        except UserError as error:
            raise UserError(f"{name}, {SOLUTION}: {error}") from None
        for number, tokens in enumerate(ids):
            problem = length_problem(tokens, options.max_completion_length)
            if problem and bad_samples == "error":
                raise UserError(f"{name}, {SOLUTION}: {problem}")
            ids[number] = [] if problem else tokens
        nothing = [None] * count
        groups.append(make_group(prompt, ids, nothing, source=Source.DEMONSTRATION, row=place))
    return groups


def texts_of(
    tokenizer: "PreTrainedTokenizerBase",
    completions: np.ndarray,
    lengths: np.ndarray,
    stop: Sequence[str] = (),
    *,
    skip_special_tokens: bool = True,
) -> list[list[str]]:
    """Completions `[g, k, t]` as text, a list for each group, each up to the first stop string."""
    # Some versions of transformers take out spaces where they are not told to leave them.
    texts = tokenizer.batch_decode(
        token_lists(completions, lengths),
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )
    texts, k = [before_stop(text, stop) for text in texts], lengths.shape[1]
    return [texts[i : i + k] for i in range(0, len(texts), k)]


def sample_records(
    rows: Sequence[Row],
    texts: Sequence[Sequence[str]],
    rewards: np.ndarray,
    by_func: Mapping[str, np.ndarray],
    first: int = 0,
) -> list[Row]:
    """One record per completion; `group`, from `first` on, tells apart groups of one prompt.

    `reward` is the weighted sum, and `rewards` holds each function's own.
    """
    groups = zip(rows, texts, rewards, strict=False)  # what was gathered is filled up at its end

    def number(value: float) -> float | None:
        return None if np.isnan(value) else float(value)

    return [
        {
            **row,
            "group": first + g,
            "completion": text,
            "reward": number(reward),
            "rewards": {name: number(values[g, i]) for name, values in by_func.items()},
        }
        for g, (row, *completions) in enumerate(groups)
        for i, (text, reward) in enumerate(zip(*completions, strict=True))
    ]
