"""The story of a run: sample groups, score them, update, again; from here every room is called."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gvpo_jax.batch import Batch, make_batch, pad_completions
from gvpo_jax.checkpoint import Checkpoints
from gvpo_jax.config import Config, override
from gvpo_jax.data import EncodedPrompts, batch_indices, encode_prompts, repeat_columns
from gvpo_jax.errors import UserError
from gvpo_jax.evaluate import evaluate
from gvpo_jax.models import LoadedModel, export_model
from gvpo_jax.policy import Policy
from gvpo_jax.report import write_report
from gvpo_jax.rewards import Scores, score
from gvpo_jax.rollout import FINISH_LENGTH, Rollout, Sampling
from gvpo_jax.runfolder import claim, write_evaluation, write_summary
from gvpo_jax.runfiles import read_summary
from gvpo_jax.runlog import Counters, RunLog, reward_metrics

Row = dict[str, Any]
RewardFunc = Callable[..., Any]
RewardFuncs = RewardFunc | Sequence[RewardFunc]
Dataset = Sequence[Mapping[str, Any]]
_EVAL_SEED = 2**31  # above any run.seed: keeps the keys of evaluation apart from those of training


class Trainer:
    """GVPO training of one model: whole runs (`train`), or steps on given text (`train_step`).

    Args:
        config: the settings.
        model: a model already loaded; default: `config.model.name` is loaded.

    Raises:
        UserError: the model can't be loaded, or does not fit the settings or the devices.
    """

    def __init__(self, config: Config, model: LoadedModel | None = None):
        self.config = config
        self.policy = Policy(config, model)
        self.tokenizer = self.policy.model.tokenizer

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        beta: float = 0.1,
        num_generations: int = 4,
        learning_rate: float = 1e-6,
        max_prompt_length: int = 512,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        **settings: Any,
    ) -> "Trainer":
        """A trainer of a hub model, a folder of safetensors or a .gguf file.

        Any other setting of the config is given as `section__key`, e.g. `train__steps=200` or
        `run__dir="runs/mine"`.

        Raises:
            UserError: as for the class, or for an unknown setting.
        """
        config = override(
            Config(),
            model__name=name,
            loss__beta=beta,
            optimizer__learning_rate=learning_rate,
            data__max_prompt_length=max_prompt_length,
            rollout__num_generations=num_generations,
            rollout__max_completion_length=max_completion_length,
            rollout__temperature=temperature,
            rollout__top_p=top_p,
            **settings,
        )
        return cls(config)

    def train_step(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[str]],
        rewards: Sequence[Sequence[float | None]],
    ) -> dict[str, float]:
        """One update on given text: k completions, with rewards, of each prompt.

        Groups may differ in size; a reward of None or NaN leaves its completion out. The end token
        is added to every completion.

        Args:
            prompts: G texts, or lists of chat messages.
            completions: G lists of texts.
            rewards: G lists of numbers, one per completion.

        Returns:
            Metrics of the policy before the update.

        Raises:
            UserError: lists that do not fit together, no group with two rewards, or too long a
                text.
        """
        encoded = self._encode([{"prompt": prompt} for prompt in prompts])
        if self.config.reference.name == "previous":
            self.policy.refresh_reference_if_due()
        batch = self.policy.with_reference(
            self.policy.pad(self._text_batch(encoded, completions, rewards))
        )
        metrics = self.policy.update(batch)
        return {name: float(value) for name, value in metrics.items()} | reward_metrics(batch)

    def train(
        self, dataset: Dataset, reward_funcs: RewardFuncs, *, eval_dataset: Dataset = ()
    ) -> dict[str, Any]:
        """Train for `config.train.steps` updates in `config.run.dir`, going on where it stopped.

        Args:
            dataset: rows with `prompt` (text or chat messages) and any columns that the reward
                functions want.
            reward_funcs: called as `f(prompts=, completions=, completion_ids=, **columns)`, see
                `gvpo_jax.rewards`.
            eval_dataset: held-out rows.

        Returns:
            What summary.json holds; before the run's end without `eval/accuracy_after`.

        Raises:
            UserError: the run folder belongs to another config; and what data and reward functions
                raise.
        """
        c, funcs = self.config, _as_list(reward_funcs)
        prompts = self._encode(dataset)
        held_out = self._encode(eval_dataset) if eval_dataset else None
        run_dir = claim(c)
        with Checkpoints(run_dir / "checkpoints", keep=c.checkpoint.keep) as checkpoints:
            counters = self._resume(checkpoints)
            if counters.step >= c.train.steps and (summary := read_summary(run_dir)):
                return summary
            with RunLog(run_dir, counters, c) as log:
                if counters.step == 0 and held_out:
                    counters.accuracy_before = self._evaluate_into(log, "before", held_out, funcs)
                while counters.step < min(c.train.steps, c.train.stop_at or c.train.steps):
                    last = counters.step
                    self._round(log, counters, prompts, funcs)
                    ended = counters.step >= c.train.steps
                    if held_out and _crossed(last, counters.step, c.eval.every) and not ended:
                        self._evaluate_into(log, f"step_{counters.step:06d}", held_out, funcs)
                    if _crossed(last, counters.step, c.checkpoint.every):
                        self._save(checkpoints, log)
                self._save(checkpoints, log)
                if counters.step >= c.train.steps and held_out and counters.accuracy_after is None:
                    counters.accuracy_after = self._evaluate_into(log, "after", held_out, funcs)
        summary = counters.summary(self.policy.model.name)
        if counters.step >= c.train.steps:
            write_summary(run_dir, summary)
        write_report(run_dir)
        return summary

    def evaluate(
        self, dataset: Dataset, reward_funcs: RewardFuncs
    ) -> tuple[dict[str, float], list[Row]]:
        """The policy's accuracy on held-out rows, and every sampled completion with its reward.

        The same rows get the same random keys every time: two evaluations differ by the policy
        alone.
        """
        return self._evaluate(self._encode(dataset), _as_list(reward_funcs))

    def generate(
        self, prompts: Sequence[Any], *, num_generations: int = 1, seed: int = 0
    ) -> list[list[str]]:
        """Texts sampled from the current policy: `num_generations` completions of each prompt."""
        encoded = self._encode([{"prompt": prompt} for prompt in prompts])
        rollout = self.policy.generate(
            encoded.token_ids,
            range(len(prompts)),
            num_generations=num_generations,
            sampling=self._sampling(),
            seed=seed,
        )
        return self._texts(rollout)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the current policy as a model folder that transformers loads."""
        export_model(folder, self.policy.model, self.policy.state.params)

    def restore(self, run_dir: Path | str) -> int:
        """Take over the policy of a run's last whole checkpoint; returns its step.

        Raises:
            UserError: there is none.
        """
        with Checkpoints(Path(run_dir) / "checkpoints") as checkpoints:
            step = self._resume(checkpoints).step
        if step == 0:
            raise UserError(f"{run_dir} has no checkpoint yet")
        return step

    def _round(self, log: RunLog, counters: Counters, prompts: EncodedPrompts, funcs) -> None:
        """One rollout and its updates."""
        c = self.config
        if c.reference.name == "previous":
            self.policy.refresh_reference_if_due()
        first = counters.rollouts * c.train.steps_per_generation
        counters.rollouts += 1
        batches = []
        for number in range(first, first + c.train.steps_per_generation):
            batch, metrics, records = self._sample(number, prompts, funcs)
            batches.append((self.policy.with_reference(batch), metrics))
            log.completions(records)
        for batch, metrics in batches * c.train.num_iterations:
            if counters.step < c.train.steps:
                rate = self.policy.learning_rate()
                log.step(self.policy.update(batch), metrics | {"learning_rate": rate})

    def _sample(self, number: int, prompts: EncodedPrompts, funcs):
        """Batch `number` of the run: sampled, scored, without reference log-probs yet."""
        c = self.config
        indices = batch_indices(len(prompts.rows), c.train.batch_size, number, c.run.seed)
        rows = [prompts.rows[i] for i in indices]
        ids = [prompts.token_ids[i] for i in indices]
        first = number * c.train.batch_size  # visits, not rows: a row's next one gets fresh keys
        rollout = self.policy.generate(
            ids,
            range(first, first + len(ids)),
            num_generations=c.rollout.num_generations,
            sampling=self._sampling(),
            seed=c.run.seed,
            longest_prompt=prompts.longest,
        )
        texts = self._texts(rollout)
        scores = self._score(rows, rollout, texts, funcs)
        rewards = scores.rewards.reshape(rollout.lengths.shape)
        batch = make_batch(ids, rollout.completions, rollout.lengths, rewards, prompts.longest)
        return batch, _rollout_metrics(batch, rollout, scores), _records(rows, texts, rewards)

    def _score(self, rows: Sequence[Row], rollout: Rollout, texts, funcs) -> Scores:
        """Rewards of n = G * k completions, through TRL's call."""
        k = rollout.lengths.shape[1]
        completions = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, group in zip(rows, texts, strict=True)
            for text in group
        ]
        return score(
            funcs,
            self.config.rewards.weights or None,
            prompts=[row["prompt"] for row in rows for _ in range(k)],
            completions=completions,
            completion_ids=_token_ids(rollout),
            columns=repeat_columns(rows, k),
            on_error=self.config.rewards.on_error,
        )

    def _evaluate(self, held_out: EncodedPrompts, funcs) -> tuple[dict[str, float], list[Row]]:
        e = self.config.eval

        def sample_and_score(indices):
            rollout = self.policy.generate(
                [held_out.token_ids[i] for i in indices],
                indices,
                num_generations=e.num_generations,
                sampling=Sampling(temperature=e.temperature),
                seed=_EVAL_SEED,
                longest_prompt=held_out.longest,
            )
            texts = self._texts(rollout)
            scores = self._score([held_out.rows[i] for i in indices], rollout, texts, funcs)
            return scores.rewards.reshape(rollout.lengths.shape), texts

        return evaluate(
            held_out.rows,
            sample_and_score,
            batch_size=e.batch_size,
            success_reward=e.success_reward,
        )

    def _evaluate_into(self, log: RunLog, name: str, held_out: EncodedPrompts, funcs) -> float:
        metrics, records = self._evaluate(held_out, funcs)
        write_evaluation(log.run_dir, name, records)
        log.evaluation(name, metrics)
        return metrics["eval/accuracy"]

    def _resume(self, checkpoints: Checkpoints) -> Counters:
        restored = checkpoints.restore(self.policy.checkpoint_like())
        if restored is None:
            return Counters()
        if restored.extra["start_fingerprint"] != self.policy.start_fingerprint:
            raise UserError(
                f"{self.policy.model.name} is not the model that this run started from; "
                "bring it back, or choose another run.dir"
            )
        self.policy.load_checkpoint(restored.state, restored.extra["refreshed_at"])
        return Counters(**restored.extra["counters"])

    def _save(self, checkpoints: Checkpoints, log: RunLog) -> None:
        log.flush()
        extra = {
            "counters": log.counters.as_dict(),
            "refreshed_at": self.policy.refreshed_at,
            "start_fingerprint": self.policy.start_fingerprint,
        }
        checkpoints.save(log.counters.step, self.policy.checkpoint(), extra)

    def _encode(self, dataset: Dataset) -> EncodedPrompts:
        d = self.config.data
        return encode_prompts(
            [dict(row) for row in dataset],
            self.tokenizer,
            max_prompt_length=d.max_prompt_length,
            chat_template=d.chat_template,
            template=d.template,
            system_prompt=d.system_prompt,
            too_long=d.too_long,
        )

    def _sampling(self) -> Sampling:
        r = self.config.rollout
        return Sampling(temperature=r.temperature, top_k=r.top_k, top_p=r.top_p, min_p=r.min_p)

    def _texts(self, rollout: Rollout) -> list[list[str]]:
        """The completions as text, g lists of k, without special tokens."""
        g, k = rollout.lengths.shape
        texts = self.tokenizer.batch_decode(_token_ids(rollout), skip_special_tokens=True)
        return [texts[i * k : (i + 1) * k] for i in range(g)]

    def _text_batch(self, encoded: EncodedPrompts, completions, rewards) -> Batch:
        """Tokenised groups of given texts, the end token added, ragged groups filled up."""
        if encoded.skipped or not len(encoded.rows) == len(completions) == len(rewards):
            raise UserError(
                f"got {len(completions)} groups of completions and {len(rewards)} of rewards for "
                f"{len(encoded.rows)} prompts that fit; give one of each per prompt"
            )
        limit = self.config.rollout.max_completion_length
        groups = []
        for number, (texts, values) in enumerate(zip(completions, rewards, strict=True), start=1):
            if len(texts) != len(values):
                raise UserError(
                    f"group {number} has {len(texts)} completions but {len(values)} rewards"
                )
            ids = [self._completion_ids(text) for text in texts]
            if max(map(len, ids), default=0) > limit:
                raise UserError(
                    f"group {number} has a completion of {max(map(len, ids))} tokens; "
                    f"raise max_completion_length, now {limit}"
                )
            groups.append(ids)
        tokens, lengths = pad_completions(groups)
        table = np.full(lengths.shape, np.nan)
        for row, values in zip(table, rewards, strict=True):
            row[: len(values)] = [np.nan if v is None else v for v in values]
        if np.isinf(table).any():
            raise UserError(
                "a reward is infinite; give finite numbers, or None to leave a completion out"
            )
        batch = make_batch(encoded.token_ids, tokens, lengths, table)
        if not (batch.valid.sum(axis=-1) >= 2).any():
            raise UserError(
                "no group has two completions with a reward; GVPO compares at least two"
            )
        return batch

    def _completion_ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return [*ids, *self.policy.stop_ids[:1]]


def _crossed(last: int, step: int, every: int) -> bool:
    """Whether a multiple of `every` was reached since step `last`; 0: never."""
    return bool(every) and step // every > last // every


def _as_list(reward_funcs: RewardFuncs) -> list[RewardFunc]:
    return [reward_funcs] if callable(reward_funcs) else list(reward_funcs)


def _token_ids(rollout: Rollout) -> list[list[int]]:
    pairs = zip(rollout.completions, rollout.lengths, strict=True)
    return [row[:n].tolist() for group, ns in pairs for row, n in zip(group, ns, strict=True)]


def _rollout_metrics(batch: Batch, rollout: Rollout, scores: Scores) -> dict[str, float]:
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
    return [
        {**row, "completion": text, "reward": None if np.isnan(reward) else float(reward)}
        for row, group, values in zip(rows, texts, rewards, strict=True)
        for text, reward in zip(group, values, strict=True)
    ]
