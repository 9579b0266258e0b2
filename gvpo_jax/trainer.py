"""The story of a run: sample groups, score them, update, again; from here every room is called."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gvpo_jax.batch import batch_of_groups
from gvpo_jax.checkpoint import Checkpoints, sweep
from gvpo_jax.config import Config, override
from gvpo_jax.data import EncodedPrompts, encode_prompts
from gvpo_jax.errors import UserError
from gvpo_jax.models import LoadedModel, export_model
from gvpo_jax.policy import Policy
from gvpo_jax.report import write_report
from gvpo_jax.runfiles import read_summary
from gvpo_jax.runfolder import (
    check_claim,
    check_not_lost,
    claim,
    lock,
    write_evaluation,
    write_summary,
)
from gvpo_jax.runlog import Counters, RunLog, crossed, reward_metrics
from gvpo_jax.sampler import Sampler, completion_texts, training_sampling

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
        encoded = self._encode_all(prompts)
        groups = [[self._completion_ids(text) for text in group] for group in completions]
        limit = self.config.rollout.max_completion_length
        batch = batch_of_groups(encoded.token_ids, groups, rewards, max_completion_length=limit)
        if self.config.reference.name == "previous":
            self.policy.refresh_reference_if_due()
        batch = self.policy.with_reference(self.policy.pad(batch))
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
        c = self.config
        sampler = Sampler(self.policy, c, _as_list(reward_funcs))
        prompts = self._encode(dataset)
        held_out = self._encode(eval_dataset) if eval_dataset else None
        names = (getattr(f, "__name__", type(f).__name__) for f in sampler.reward_funcs)
        data = ".".join([*(d.fingerprint() for d in (prompts, held_out) if d), *names])
        folder = check_claim(c)
        with (
            lock(c) as run_dir,
            Checkpoints(folder / "checkpoints", keep=c.checkpoint.keep) as saved,
        ):
            sweep(run_dir / "checkpoints")
            counters = self._resume(saved, data)
            if counters.step == 0:
                check_not_lost(run_dir, c)
            claim(c)
            with RunLog(run_dir, counters, c) as log:
                if counters.step >= c.train.steps and (summary := read_summary(run_dir)):
                    log.note(f"{run_dir} has done its {counters.step} steps already: nothing to do")
                    return summary
                for note in self._notes(counters, prompts):
                    log.note(note)
                if counters.step == 0 and held_out:
                    counters.accuracy_before = self._evaluate_into(log, "before", sampler, held_out)
                while counters.step < min(c.train.steps, c.train.stop_at or c.train.steps):
                    last = counters.step
                    self._round(log, sampler, prompts)
                    ended = counters.step >= c.train.steps
                    if held_out and crossed(last, counters.step, c.eval.every) and not ended:
                        self._evaluate_into(log, f"step_{counters.step:06d}", sampler, held_out)
                    if crossed(last, counters.step, c.checkpoint.every):
                        self._save(saved, log, data)
                self._save(saved, log, data)
                if counters.step >= c.train.steps and held_out and counters.accuracy_after is None:
                    counters.accuracy_after = self._evaluate_into(log, "after", sampler, held_out)
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
        sampler = Sampler(self.policy, self.config, _as_list(reward_funcs))
        return sampler.evaluate(self._encode(dataset))

    def generate(
        self, prompts: Sequence[Any], *, num_generations: int = 1, seed: int = 0
    ) -> list[list[str]]:
        """Texts sampled from the current policy: `num_generations` completions of each prompt."""
        encoded = self._encode_all(prompts)
        rollout = self.policy.generate(
            encoded.token_ids,
            range(len(prompts)),
            num_generations=num_generations,
            sampling=training_sampling(self.config),
            seed=seed,
        )
        return completion_texts(self.tokenizer, rollout)

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

    def _round(self, log: RunLog, sampler: Sampler, prompts: EncodedPrompts) -> None:
        """One rollout and its updates."""
        c, counters = self.config, log.counters
        if c.reference.name == "previous":
            self.policy.refresh_reference_if_due()
        first = counters.rollouts * c.train.steps_per_generation
        counters.rollouts += 1
        batches = []
        for number in range(first, first + c.train.steps_per_generation):
            batch, metrics, records = sampler.batch(number, prompts)
            batches.append((self.policy.with_reference(batch), metrics))
            log.completions(counters.step + len(batches), records)
        for batch, metrics in batches * c.train.num_iterations:
            if counters.step < c.train.steps:
                log.step(self.policy.update(batch), metrics)

    def _evaluate_into(
        self, log: RunLog, name: str, sampler: Sampler, held_out: EncodedPrompts
    ) -> float:
        metrics, records = sampler.evaluate(held_out)
        write_evaluation(log.run_dir, name, records)
        log.evaluation(name, metrics)
        return metrics["eval/accuracy"]

    def _resume(self, checkpoints: Checkpoints, data: str | None = None) -> Counters:
        restored = checkpoints.restore(self.policy.checkpoint_like())
        if restored is None:
            return Counters()
        if restored.extra["start_fingerprint"] != self.policy.start_fingerprint:
            raise UserError(
                f"{self.policy.model.name} is not the model that this run started from; "
                "bring it back, or choose another run.dir"
            )
        if data not in (None, restored.extra["data_fingerprint"]):
            raise UserError(
                "training rows, held-out rows or reward functions are not those of this run; "
                "bring them back, or choose another run.dir"
            )
        self.policy.load_checkpoint(restored.state, restored.extra["refreshed_at"])
        return Counters(**restored.extra["counters"])

    def _notes(self, counters: Counters, prompts: EncodedPrompts) -> list[str]:
        start = f"going on from step {counters.step}" if counters.step else "starting"
        notes = [f"{start}; what runs for the first time is compiled, which takes a while"]
        if prompts.skipped:
            notes.append(f"{prompts.skipped} prompts skipped: over data.max_prompt_length tokens")
        if training_sampling(self.config).cuts_support:
            notes.append(
                "top_k, top_p and min_p keep some tokens from ever being sampled: GVPO's optimum "
                "is then not reached, because the samples do not cover the reference"
            )
        return notes

    def _save(self, checkpoints: Checkpoints, log: RunLog, data: str) -> None:
        log.flush()
        extra = {
            "counters": log.counters.as_dict(),
            "refreshed_at": self.policy.refreshed_at,
            "start_fingerprint": self.policy.start_fingerprint,
            "data_fingerprint": data,
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

    def _encode_all(self, prompts: Sequence[Any]) -> EncodedPrompts:
        """Prompts given one by one, of which none may be skipped."""
        if isinstance(prompts, str):
            raise UserError("prompts must be a list: put brackets around a single text")
        encoded = self._encode([{"prompt": prompt} for prompt in prompts])
        if encoded.skipped:
            raise UserError(f"{encoded.skipped} prompts are over data.max_prompt_length tokens")
        return encoded

    def _completion_ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        end = self.tokenizer.eos_token_id  # a model may name several; this one ends its texts
        return [*ids, *([end] if isinstance(end, int) else self.policy.stop_ids[:1])]


def _as_list(reward_funcs: RewardFuncs) -> list[RewardFunc]:
    return [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
