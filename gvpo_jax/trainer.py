"""The door for Python users: whole runs, or steps on text that they sampled and scored."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_jax.collect.collector import Collector, sampling_params, texts_of
from gvpo_jax.collect.feed import Feed, OnlineFeed, send_groups
from gvpo_jax.collect.metrics import reward_metrics
from gvpo_jax.collect.offline import OfflineFeed, OfflineGroups, read_groups
from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.data.groups import (
    UNKNOWN,
    Group,
    Source,
    cache_key,
    length_problem,
    make_batch,
    make_group,
    read_reward,
    token_lists,
)
from gvpo_jax.data.rows import EncodedPrompts, encode_prompts
from gvpo_jax.errors import UserError
from gvpo_jax.loop import Loop, resume
from gvpo_jax.models import LoadedModel, export_model
from gvpo_jax.rewards import batched
from gvpo_jax.rundir.log import as_numbers, check_finite
from gvpo_jax.training.checkpoint import Checkpoints
from gvpo_jax.training.policy import Policy

Row = dict[str, Any]
RewardFunc = Callable[..., Any]
RewardFuncs = RewardFunc | Sequence[RewardFunc]
Dataset = Sequence[Mapping[str, Any]]


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
        `run__dir="runs/mine"`; so given, it goes before its short name.

        Raises:
            UserError: as for the class, or for an unknown setting.
        """
        named = {
            "model__name": name,
            "loss__beta": beta,
            "optimizer__learning_rate": learning_rate,
            "data__max_prompt_length": max_prompt_length,
            "rollout__num_generations": num_generations,
            "rollout__max_completion_length": max_completion_length,
            "rollout__temperature": temperature,
            "rollout__top_p": top_p,
        }
        config = override(Config(), **named | settings)
        return cls(config)

    def train_step(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[str]],
        rewards: Sequence[Sequence[float | None]],
    ) -> dict[str, float]:
        """One update on given text: k completions, with rewards, of each prompt.

        Groups may differ in size; a reward of None or NaN leaves its completion out. The end token
        is added to every completion. With another `loss.name` than gvpo, the texts count as samples
        of the current policy.

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
        if not len(prompts) == len(completions) == len(rewards):
            raise UserError(
                f"got {len(completions)} groups of completions and {len(rewards)} of rewards for "
                f"{len(prompts)} prompts; give one of each per prompt"
            )
        encoded = self._encode_all(prompts)
        limit = self.config.rollout.max_completion_length
        groups = []
        for place, (ids, texts, values) in enumerate(
            zip(encoded.token_ids, completions, rewards, strict=True), start=1
        ):
            groups.append(self._group(f"group {place}", ids, texts, values, limit))
        batch = make_batch(groups, longest_completion=limit)
        if not (batch.valid.sum(axis=-1) >= 2).any():
            raise UserError(
                "no group has two completions with a reward; GVPO compares at least two"
            )
        if self.config.reference.name == "previous":
            self.policy.refresh_reference_if_due()
        batch = self.policy.with_reference(self.policy.pad(batch))
        metrics = as_numbers(self.policy.update(batch))
        check_finite(metrics, "the step")
        return metrics | reward_metrics(batch)

    def train(
        self, dataset: Dataset, reward_funcs: RewardFuncs, *, eval_dataset: Dataset = ()
    ) -> dict[str, Any]:
        """Train for `config.train.steps` updates in `config.run.dir`, going on where it stopped.

        Args:
            dataset: rows with `prompt` (text or chat messages) and any columns that the reward
                functions want.
            reward_funcs: one or several; called as `f(prompts=, completions=, completion_ids=,
                **columns)` on lists, see `gvpo_jax.rewards`, or, where a function's parameters are
                `(prompt, completion)`, on one sample at a time.
            eval_dataset: held-out rows.

        Returns:
            What summary.json holds; before the run's end without `eval/accuracy_after`.

        Raises:
            UserError: the run folder belongs to another config; and what data and reward functions
                raise.
        """
        c = self.config
        collector = Collector(self.policy, c, _as_list(reward_funcs))
        prompts = self._encode(dataset)
        feed = OnlineFeed(self.policy, c, collector, prompts)
        return self._run(feed, collector, prompts, eval_dataset, feed.notes)

    def train_offline(
        self,
        dataset: Dataset,
        *,
        reward_funcs: RewardFuncs = (),
        eval_dataset: Dataset = (),
    ) -> dict[str, Any]:
        """As `train`, on groups that were sampled and scored elsewhere.

        Args:
            dataset: rows with `prompt`, `completions`, `rewards`, see `gvpo_jax.collect.offline`.
            reward_funcs: what judges the held-out rows.
            eval_dataset: held-out rows.
        """
        c = self.config
        if c.loss.name not in ("gvpo", "dpo"):
            raise UserError(
                f"loss.name={c.loss.name} needs the probability with which each completion was "
                "sampled, which given groups do not have: use gvpo or dpo"
            )
        if eval_dataset and not reward_funcs:
            raise UserError("held-out rows need reward functions that judge them")
        prompts = self._encode(dataset)
        offline = self._read_groups(prompts)
        notes = [
            f"{count} {what} skipped: data.bad_samples=skip"
            for count, what in (
                (offline.skipped_completions, "completions"),
                (offline.skipped_groups, "groups"),
            )
            if count
        ]
        feed = OfflineFeed(self.policy, c, offline.groups)
        collector = Collector(self.policy, c, _as_list(reward_funcs))
        return self._run(feed, collector, prompts, eval_dataset, notes)

    def with_reference_logps(self, dataset: Dataset) -> list[Row]:
        """Rows of groups with `ref_logps` and `ref_fingerprint`, scored once and for all.

        Args:
            dataset: as for `train_offline`.
        """
        prompts = self._encode(dataset)
        groups = self._read_groups(prompts).groups
        if len(groups) != len(dataset):
            raise UserError("some groups can't be used; remove them first")
        if self.policy.reference_fingerprint == UNKNOWN:
            raise UserError("reference.name=ema changes with every update: nothing can be kept")
        size, rows = self.config.train.batch_size, []
        for start in range(0, len(groups), size):
            part = groups[start : start + size]
            _, scored = send_groups(self.policy, part, self.config, prompts.longest)()
            rows += [
                {
                    **row,
                    "completions": token_lists(group),
                    "rewards": [float(reward) for reward in group.rewards],
                    "ref_logps": [
                        values[:n].tolist()
                        for values, n in zip(group.ref_logps, group.lengths, strict=True)
                    ],
                    "ref_fingerprint": cache_key(group.reference, group),
                }
                for row, group in zip(prompts.rows[start : start + size], scored, strict=True)
            ]
        return rows

    def evaluate(
        self, dataset: Dataset, reward_funcs: RewardFuncs
    ) -> tuple[dict[str, float], list[Row]]:
        """The policy's accuracy on held-out rows, and every sampled completion with its reward.

        The same rows get the same random keys every time: two evaluations differ by the policy
        alone.
        """
        collector = Collector(self.policy, self.config, _as_list(reward_funcs))
        return collector.evaluate(self._encode(dataset))

    def generate(
        self, prompts: Sequence[Any], *, num_generations: int = 1, seed: int = 0
    ) -> list[list[str]]:
        """Texts sampled from the current policy: `num_generations` completions of each prompt."""
        encoded = self._encode_all(prompts)
        rollout = self.policy.generate(
            encoded.token_ids,
            range(len(prompts)),
            num_generations=num_generations,
            sampling=sampling_params(self.config),
            seed=seed,
        )
        return texts_of(self.tokenizer, token_lists(rollout), num_generations)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the current policy as a model folder that transformers loads."""
        export_model(folder, self.policy.model, self.policy.state.params)

    def restore(self, run_dir: Path | str) -> int:
        """Take over the policy of a run's last whole checkpoint; returns its step.

        Raises:
            UserError: there is none.
        """
        with Checkpoints(Path(run_dir) / "checkpoints") as checkpoints:
            step = resume(checkpoints, self.policy).step
        if step == 0:
            raise UserError(f"{run_dir} has no checkpoint yet")
        return step

    def _group(self, name: str, prompt_ids, texts, values, limit: int) -> Group:
        """A group handed over as text, checked."""
        if len(texts) != len(values):
            raise UserError(f"{name} has {len(texts)} completions but {len(values)} rewards")
        tokens, rewards = [], []
        for place, (text, value) in enumerate(zip(texts, values, strict=True), start=1):
            if not isinstance(text, str):
                raise UserError(f"{name}, completion {place}: must be a text, got {text!r}")
            tokens.append(self.policy.completion_ids(text))
            try:
                rewards.append(read_reward(value))
            except UserError as error:
                raise UserError(f"{name}, completion {place}: {error}") from None
            if problem := length_problem(tokens[-1], limit):
                raise UserError(f"{name}, completion {place}: {problem}")
        return make_group(prompt_ids, tokens, rewards, source=Source.FILE)

    def _run(
        self,
        feed: Feed,
        collector: Collector,
        prompts: EncodedPrompts,
        eval_dataset: Dataset,
        notes: Sequence[str] = (),
    ) -> dict[str, Any]:
        held_out = self._encode(eval_dataset) if eval_dataset else None
        names = (getattr(f, "__name__", type(f).__name__) for f in collector.reward_funcs)
        data = ".".join([*(d.fingerprint() for d in (prompts, held_out) if d), *names])
        if prompts.skipped:
            skipped = f"{prompts.skipped} prompts skipped: over data.max_prompt_length tokens"
            notes = [skipped, *notes]
        return Loop(self.config, self.policy, feed, collector, held_out, data, notes).run()

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

    def _read_groups(self, prompts: EncodedPrompts) -> OfflineGroups:
        return read_groups(
            prompts.rows,
            prompts.token_ids,
            self.policy.completion_ids,
            reference=self.policy.reference_fingerprint,
            vocab_size=self.policy.model.config.vocab_size,
            max_completion_length=self.config.rollout.max_completion_length,
            bad_samples=self.config.data.bad_samples,
        )

    def _encode_all(self, prompts: Sequence[Any]) -> EncodedPrompts:
        """Prompts given one by one, of which none may be skipped."""
        if isinstance(prompts, str):
            raise UserError("prompts must be a list: put brackets around a single text")
        encoded = self._encode([{"prompt": prompt} for prompt in prompts])
        if encoded.skipped:
            raise UserError(f"{encoded.skipped} prompts are over data.max_prompt_length tokens")
        return encoded


def _as_list(reward_funcs: RewardFuncs) -> list[RewardFunc]:
    funcs = [reward_funcs] if callable(reward_funcs) else reward_funcs
    return [batched(func) for func in funcs]
