"""The door for Python users: whole runs, or steps on text that they sampled and scored."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import optax

from gvpo_jax.buckets import as_path
from gvpo_jax.callbacks import Callback, Callbacks
from gvpo_jax.collect.collector import Collector, Judge, read_demonstrations, texts_of
from gvpo_jax.collect.early_signs import data_signs
from gvpo_jax.collect.evaluate import evaluate
from gvpo_jax.collect.feed import Feed, OnlineFeed
from gvpo_jax.collect.metrics import reward_metrics
from gvpo_jax.collect.offline import (
    OfflineFeed,
    OfflineGroups,
    content,
    read_groups,
    rows_with_reference,
)
from gvpo_jax.collect.sft import read_solutions
from gvpo_jax.config import Config
from gvpo_jax.config_file import override, with_run_date
from gvpo_jax.data.encoding import Encoder
from gvpo_jax.data.groups import Source, length_problem, make_group, read_reward, stack, to_batch
from gvpo_jax.data.prompts import EncodedPrompts, completion_ids
from gvpo_jax.data.rows import as_rows
from gvpo_jax.data.stream import Order, StreamedPrompts, as_stream
from gvpo_jax.errors import UserError
from gvpo_jax.loop import Loop
from gvpo_jax.models.adapters import as_peft, export_adapter
from gvpo_jax.models.export import export_model
from gvpo_jax.models.load import LoadedModel
from gvpo_jax.models.own import OwnModel
from gvpo_jax.models.upload import check_repository, upload
from gvpo_jax.parallel.distributed import (
    from_first_host,
    is_first,
    my_slice,
    raise_together,
    to_first_host,
)
from gvpo_jax.parallel.layout import check_batch, group_shards
from gvpo_jax.prepared import prepare, read_again
from gvpo_jax.publish import card_of
from gvpo_jax.rewards import batched, load_reward_func
from gvpo_jax.rewards.functions import changed_code, code_fingerprint, function_names
from gvpo_jax.rewards.load import load_function
from gvpo_jax.rollout import Engine, InProcessEngine
from gvpo_jax.rollout.servers.engine import http_engine
from gvpo_jax.rollout.servers.weight_sync import sequence_logps
from gvpo_jax.rollout.stop import StopStrings
from gvpo_jax.rundir.bucket import pull
from gvpo_jax.rundir.files import read_scores
from gvpo_jax.rundir.log import as_numbers, check_finite
from gvpo_jax.rundir.trackers import check_installed
from gvpo_jax.tpu_compile.roofline import peak_of
from gvpo_jax.training.checkpoint import Checkpoints
from gvpo_jax.training.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gvpo_jax.notebook import Shown

Row = dict[str, Any]
RewardFunc = Callable[..., Any]
RewardFuncs = RewardFunc | str | Sequence[RewardFunc | str]
Dataset = Any  # what `as_rows` takes


class Trainer:
    """GVPO training of one model: whole runs (`train`), or steps on given text (`train_step`).

    Args:
        config: the settings.
        model: a model already loaded, or an `OwnModel` from elsewhere; default: `config.model.name`
            is loaded.
        trains: False where there will be no update: then no room for the optimizer is asked for.
        tokenizer: one of your own, in place of the model's.
        optimizer: an Optax transformation of your own, in place of what the section `optimizer`
            describes. A run that goes on needs the same one.
        callbacks: whom `train` and `train_offline` tell of updates, evaluations and checkpoints.

    Attributes:
        tokenizer: the model's, with `config.data.template` where that is given.
        history: metrics of the run so far, a dict with `step` for each update and evaluation, those
            of earlier sessions first; grows while `train` goes on.

    Raises:
        UserError: the model can't be loaded, or does not fit the settings, the devices or their
            memory.
    """

    def __init__(
        self,
        config: Config,
        model: LoadedModel | OwnModel | None = None,
        *,
        trains: bool = True,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        optimizer: optax.GradientTransformation | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        if not isinstance(config, Config):
            raise UserError(
                f"config is a {type(config).__name__}, not a gvpo_jax.config.Config; for the name "
                "of a model there is Trainer.from_pretrained(name, ...)"
            )
        c = self.config = config
        if trains:
            check_installed(c.log.all_trackers())
        c.run.keep_compiled()
        mesh = c.mesh.mesh()
        groups = c.train.batch_size // c.train.micro_batches
        name = f"train.batch_size / train.micro_batches = {groups}"
        check_batch(mesh, groups, 1 if c.loss.name == "sft" else c.rollout.num_generations, name)
        my_slice(c.train.batch_size - c.replay.groups)  # raises where new groups do not divide
        fleet = None if c.servers.kind == "none" else raise_together(c.servers.connect)
        self._callbacks = tuple(callbacks)
        Callbacks(callbacks)  # raises where one is none
        if optimizer is not None and not hasattr(optimizer, "update"):
            raise UserError(f"optimizer: {optimizer!r} is no transformation of Optax")
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            raise UserError(
                f"tokenizer: {tokenizer!r} is none; give what AutoTokenizer.from_pretrained gives"
            )
        ready = prepare(c, mesh, model, trains=trains, tokenizer=tokenizer)
        self.history: list[dict[str, Any]] = []
        self._reward_code: Mapping[str, str] = {}  # of the run that was restored
        # The run whose result the weights are, and its step; None: that of the last update.
        self._of_run: tuple[Path | str, int | None] | None = None
        self.model, self.tokenizer = ready.model, ready.model.tokenizer
        self.stop_ids, self._vocab_size = ready.stop_ids, ready.vocab_size
        self._peak = None
        if isinstance(self.model, LoadedModel):
            adapter = c.model.lora.rank is not None
            self._peak = peak_of(mesh.local_devices, self.model.config, frozen=adapter)
        shapes = jax.eval_shape(lambda: ready.params)
        functions = ready.functions  # alone: what is held here lives as long as the trainer
        self._programs_of = lambda config: config.programs(functions, shapes, mesh, optimizer)
        self.policy = Policy(
            ready.params,
            self._programs_of(c),
            train=c.train,
            reference=c.reference,
            frozen=ready.frozen,
            lora=c.model.lora.form(),
            quantization=c.model.quantization,
        )
        stop = StopStrings(tuple(c.rollout.stop), self.tokenizer) if c.rollout.stop else None
        self.engine: Engine
        if fleet is None:
            self.engine = InProcessEngine(ready.sampling, self.stop_ids, c.rollout.slots, stop)
        else:
            assert isinstance(self.model, LoadedModel)
            logps = sequence_logps(self.policy.logps_of_all, multiple=group_shards(mesh))
            where = c.run.dir, stop, self.policy.whole
            lora = as_peft(self.model.config, c.model.lora.form())
            self.engine = http_engine(
                c.servers, fleet, self.model, self.stop_ids, logps, *where, lora=lora
            )

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
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        optimizer: optax.GradientTransformation | None = None,
        callbacks: Sequence[Callback] = (),
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
        own: dict[str, Any] = {"tokenizer": tokenizer, "optimizer": optimizer}
        return cls(override(Config(), **named | settings), callbacks=callbacks, **own)

    def train_step(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[str]],
        rewards: Sequence[Sequence[float | None]],
    ) -> dict[str, float]:
        """One update on given text: k completions, with rewards, of each prompt.

        Groups may differ in size; a reward of None or NaN leaves its completion out. The end token
        is added to every completion that does not end in one. With another `loss.name` than gvpo,
        the texts count as samples of the current policy.

        Args:
            prompts: G texts, or lists of chat messages.
            completions: G lists of texts, or of lists with one message of the assistant.
            rewards: G lists of numbers, one per completion.

        Returns:
            Metrics of the policy before the update.

        Raises:
            UserError: lists that do not fit together, no group with two rewards, too long a text,
                a token that the embedding has no row for, or NaN in weights or logits.
        """
        if not len(prompts) == len(completions) == len(rewards):
            raise UserError(
                f"got {len(completions)} groups of completions and {len(rewards)} of rewards for "
                f"{len(prompts)} prompts; give one of each per prompt"
            )
        token_ids = self._encode_all(prompts).token_ids
        given = enumerate(zip(token_ids, completions, rewards, strict=True), start=1)
        groups = stack([self._group(f"group {place}", *group) for place, group in given])
        batch = to_batch(groups, longest_completion=self.config.rollout.max_completion_length)
        if not (batch.valid.sum(axis=-1) >= 2).any():
            raise UserError(
                "no group has two completions with a reward; GVPO compares at least two"
            )
        self._of_run = None  # the weights are no run's any more
        self.policy.refresh_reference_if_due()
        batch = self.policy.with_reference(self.policy.pad(batch))
        metrics = as_numbers(self.policy.update(batch))
        told = metrics | reward_metrics(batch)
        check_finite(told, "the step", told["reward"])
        return told

    def train(
        self, dataset: Dataset, reward_funcs: RewardFuncs, *, eval_dataset: Dataset = ()
    ) -> dict[str, Any]:
        """Train for `train.steps` or `train.epochs` in `run.dir`, going on where it stopped.

        Args:
            dataset: rows with `prompt` (text or chat messages) and any columns that the reward
                functions want: a list of dicts, a `datasets.Dataset` or a DataFrame. With
                `data.streaming` an `IterableDataset`, or a function that makes a generator.
            reward_funcs: one or several, or names as in `rewards.funcs`; called as `f(prompts=,
                completions=, completion_ids=, **columns)` on lists, see `gvpo_jax.rewards`, or,
                where a function's parameters are `(prompt, completion)`, on one sample at a time.
            eval_dataset: held-out rows.

        Returns:
            What summary.json holds; before the run's end without the evaluation after it.

        Raises:
            UserError: the run folder belongs to another config; and what data and reward functions
                raise.
        """
        if self.config.loss.name == "sft":
            raise UserError("loss.name=sft samples nothing: call train_offline")
        self._keep_date()
        judge, streaming = self._judge(reward_funcs), self.config.data.streaming
        prompts = self._encode_stream(dataset) if streaming else self._encode(dataset)
        judge.check(prompts, "the training data")
        c = self._settled(
            len(prompts.rows), self.config.train.batch_size - self.config.replay.groups
        )
        demonstrations, lost = None, 0
        if c.rollout.demonstrations and isinstance(prompts, EncodedPrompts):
            demonstrations = read_demonstrations(
                prompts, self._completion_ids, c.rollout, bad_samples=c.data.bad_samples
            )
            lost = sum(int((group.lengths == 0).sum()) for group in demonstrations)
        collector = Collector(
            self.engine,
            judge,
            prompts,
            c.rollout,
            demonstrations,
            new=c.train.batch_size - c.replay.groups,
            batch_size=c.train.batch_size,
            samples=c.rollout.num_generations - c.rollout.demonstrations - c.replay.completions,
            seed=c.run.seed,
            shuffle=c.data.shuffle,
        )
        feed = OnlineFeed(self.policy, collector, c.train, c.replay)
        bad = {"demonstrations": lost} if c.rollout.demonstrations else {}
        return self._loop(c, feed, judge, prompts, eval_dataset, bad).run()

    def train_offline(
        self, dataset: Dataset, *, reward_funcs: RewardFuncs = (), eval_dataset: Dataset = ()
    ) -> dict[str, Any]:
        """As `train`, on groups that were sampled and scored elsewhere.

        With `loss.name=sft` on the rows' own texts, see `sft.column`.

        Args:
            dataset: rows with `prompt`, `completions`, `rewards`, see `gvpo_jax.collect.offline`.
            reward_funcs: what judges the held-out rows.
            eval_dataset: held-out rows.
        """
        self._keep_date()
        c = self.config
        if c.loss.name not in ("gvpo", "dpo", "sft"):
            raise UserError(
                f"loss.name={c.loss.name} needs the probability with which each completion was "
                "sampled, which given groups do not have: use gvpo or dpo"
            )
        prompts = self._encode(dataset)
        offline = self._read_groups(prompts)
        c = self._settled(len(offline.groups), c.train.batch_size)
        feed = OfflineFeed(
            self.policy,
            offline.groups,
            c.train,
            longest_completion=c.rollout.max_completion_length,
            seed=c.run.seed,
            shuffle=c.data.shuffle,
            ahead=c.reference.name == "initial",
        )
        bad = {
            "given_completions": offline.skipped_completions,
            "given_groups": offline.skipped_groups,
        }
        return self._loop(c, feed, self._judge(reward_funcs), prompts, eval_dataset, bad).run()

    def with_reference_logps(self, dataset: Dataset) -> list[Row]:
        """Rows of groups with `ref_logps` and `ref_fingerprint`, scored once and for all.

        Args:
            dataset: as for `train_offline`.

        Raises:
            UserError: a group can't be used, or the reference changes with every update.
        """
        c = self.config
        rows = as_rows(dataset)
        prompts = self._encode(rows)
        groups = self._read_groups(prompts).groups
        if len(groups) != len(rows):
            raise UserError("some groups can't be used; remove them first")
        longest = c.rollout.max_completion_length
        return rows_with_reference(self.policy, prompts, groups, c.train.batch_size, longest)

    def plot(self) -> "Shown":
        """The curves of the run so far, which a notebook shows. Raises UserError without any."""
        from gvpo_jax.notebook import plot

        return plot(self.history, self.config.run.folder)

    def samples(self) -> "Shown":
        """The run's newest completions with their rewards, which a notebook shows.

        Raises UserError where none are written yet, see `log.completions_every`.
        """
        from gvpo_jax.notebook import samples

        return samples(self.config.run.folder)

    def report(self) -> "Shown":
        """The run's report, which a notebook shows. Raises UserError before a run."""
        from gvpo_jax.notebook import report

        return report(self.config.run.folder)

    def evaluate(
        self, dataset: Dataset, reward_funcs: RewardFuncs
    ) -> tuple[dict[str, float], list[Row]]:
        """The policy's scores on held-out rows, and every sampled completion with its reward.

        The same rows get the same random keys every time: two evaluations differ by the policy
        alone.
        """
        held_out, judge = self._encode(dataset), self._judge(reward_funcs)
        judge.check(held_out, "the held-out data")
        checker = self._checker(held_out)
        code = self._reward_code
        if code and (changed := changed_code(judge.reward_funcs, code)) and is_first():
            print(
                f"gvpo-jax: warning: the code of reward {', '.join(changed)} is not that of the "
                "run: its scores compare with no earlier ones",
                file=sys.stderr,
            )
        return evaluate(
            held_out,
            self.engine,
            self.policy.params,
            judge,
            self.config.eval,
            max_completion_length=self.config.rollout.max_completion_length,
            checker=checker,
        )

    def generate(
        self, prompts: Sequence[Any], *, num_generations: int = 1, seed: int = 0
    ) -> list[list[str]]:
        """Texts sampled from the current policy: `num_generations` completions of each prompt."""
        if num_generations < 1:
            raise UserError(f"num_generations must be at least 1, got {num_generations}")
        groups = self.engine.generate(
            self.policy.params,
            self._encode_all(prompts).token_ids,
            range(len(prompts)),
            num_generations=num_generations,
            max_completion_length=self.config.rollout.max_completion_length,
            sampling=self.config.rollout.params(),
            seed=seed,
        )
        stop = self.config.rollout.stop
        return texts_of(self.tokenizer, groups.completions, groups.lengths, stop)

    def save_pretrained(self, folder: Path | str, *, hub_name: str | None = None) -> None:
        """Write the current policy as a model folder that transformers loads, with its card.

        An adapter is merged into the weights; where those are quantised, into the model's own, read
        again. The tokenizer has the chat template that trained;
        gvpo_jax_export.json says what the template was given.

        Of several processes all call it, and the first writes.

        Args:
            folder: where it is written; an earlier export there is replaced.
            hub_name: what the card calls it, the name that it will have on the hub.

        Raises:
            UserError: the folder holds something else, or can't be written, or the model that was
                quantised is there no more.
        """
        model, about = self._loaded(), self._about_template()
        quantized = self.config.model.quantization != "none"
        base = read_again(self.config, model.name, self.policy.frozen) if quantized else None
        params = self.policy.whole(self.policy.params, base)

        def write() -> None:
            export_model(folder, model, params, about=about, texts=self._card(hub_name))

        from_first_host(write)

    def save_adapter(self, folder: Path | str, *, hub_name: str | None = None) -> None:
        """Write the current policy's adapter alone, as a folder that PEFT loads, with its card.

        Of several processes all call it, and the first writes. The arguments are those of
        `save_pretrained`.

        Raises:
            UserError: there is no adapter, or as for `save_pretrained`.
        """
        lora = self.config.model.lora.form()
        if lora is None:
            raise UserError("there is no adapter: without model.lora.rank the model is trained")
        model, about = self._loaded(), self._about_template()
        adapter = to_first_host(self.policy.params)

        def write() -> None:
            texts = self._card(hub_name, adapter=True)
            export_adapter(folder, model, adapter, lora, about=about, texts=texts)

        from_first_host(write)

    def push_to_hub(
        self,
        name: str,
        folder: Path | str | None = None,
        *,
        adapter: bool = False,
        private: bool | None = None,
    ) -> str:
        """Write the current policy, send it to the Hugging Face hub, and give its address there.

        The token is that of `hf auth login` or HF_TOKEN. What the repository has of an earlier
        export is replaced. Of several processes all call it, and the first writes and sends.

        Args:
            name: of the repository, [OWNER/]NAME; made where there is none.
            folder: where it is written, and stays; default: `export` in the run's folder.
            adapter: the adapter alone, as `save_adapter`; else as `save_pretrained`.
            private: True: nobody else may see it; None: as the owner's settings on the hub say.

        Raises:
            UserError: as for those two, or it can't be sent; what was written stays.
        """
        check_repository(name)
        where = Path(folder or self.config.run.folder / "export")
        (self.save_adapter if adapter else self.save_pretrained)(where, hub_name=name)
        return from_first_host(lambda: upload(where, name, private=private))

    def restore(self, run_dir: Path | str, *, step: int | Literal["best"] | None = None) -> int:
        """Take over the policy of a run's checkpoint; returns its step.

        step: which; "best": that with the best held-out score, see `checkpoint.keep_best`. Default:
            the last that is whole.

        Where the chat template writes the date, it writes that of the run from now on.
        Its optimizer state is not read: an update after this begins with a fresh one. Raises
        UserError where there is no checkpoint, or none of that step.
        """
        folder, restored = as_path(run_dir) / "checkpoints", None
        if folder.is_dir():
            with Checkpoints(folder, read_only=True) as checkpoints:
                scores = from_first_host(lambda: read_scores(pull(run_dir)))
                found = None if step is None else checkpoints.find(step, scores)
                restored = self.policy.load(checkpoints, params_only=True, step=found)
        if restored is None:
            raise UserError(f"{run_dir} has no checkpoint yet")
        self._reward_code = restored.extra.get("reward_code", {})
        self._of_run = run_dir, restored.step
        if self.config.data.template_writes_date(self.tokenizer):
            self.config = from_first_host(lambda: with_run_date(self.config, run_dir))
        return restored.step

    def _loaded(self) -> LoadedModel:
        if not isinstance(self.model, LoadedModel):
            raise UserError(
                f"{self.model.name} is a model of your own: save trainer.policy.params as you save "
                "its parameters"
            )
        return self.model

    def _card(self, hub_name: str | None, *, adapter: bool = False) -> dict[str, str]:
        run_dir, step = self._of_run or (None, None)
        step = self.policy.updates if step is None else step
        where = {"run_dir": run_dir, "step": step, "hub_name": hub_name}
        return card_of(self.config, self.model.name, adapter=adapter, **where)

    def _about_template(self) -> dict[str, Any]:
        """What an export says of the chat template that trained."""
        names = ("template_arguments", "template_date", "system_prompt")
        return {name: getattr(self.config.data, name) for name in names}

    def _group(self, name: str, prompt_ids, texts, values):
        """A group handed over as text, checked."""
        limit = self.config.rollout.max_completion_length
        for given in (texts, values):
            if (
                isinstance(given, str)
                or not hasattr(given, "__len__")
                or getattr(given, "ndim", 1) == 0
            ):
                raise UserError(
                    f"{name}: give a list of texts and one of rewards, not just {given!r}"
                )
        if len(texts) != len(values):
            raise UserError(f"{name} has {len(texts)} completions but {len(values)} rewards")
        tokens, rewards = [], []
        for place, (given, value) in enumerate(zip(texts, values, strict=True), start=1):
            text = content(given)
            if not isinstance(text, str):
                raise UserError(f"{name}, completion {place}: must be a text, got {text!r}")
            try:
                tokens.append(self._completion_ids(text))
                rewards.append(read_reward(value))
            except UserError as error:
                raise UserError(f"{name}, completion {place}: {error}") from None
            if problem := length_problem(tokens[-1], limit):
                raise UserError(f"{name}, completion {place}: {problem}")
        return make_group(prompt_ids, tokens, rewards, source=Source.FILE)

    def _settled(self, rows: int, per_update: int) -> Config:
        """The config with `train.steps` for `train.epochs` over rows, so many of them an update."""
        c = self.config
        train = c.train.settled(rows, per_update)
        settled = dataclasses.replace(c, train=train)
        if c.train.epochs and c.optimizer.schedule != "constant":  # it ends with the run
            self.policy.take_programs(self._programs_of(settled))
        return settled

    def _loop(
        self,
        config: Config,
        feed: Feed,
        judge: Judge,
        prompts: EncodedPrompts | StreamedPrompts,
        eval_dataset: Dataset,
        bad: Mapping[str, int],
    ) -> Loop:
        rows = [] if eval_dataset is None else as_rows(eval_dataset)
        held_out = self._encode(rows) if rows else None
        if held_out and not judge.reward_funcs:
            raise UserError("held-out rows need reward functions that judge them")
        if held_out:
            judge.check(held_out, "the held-out data")
        names = (getattr(f, "__name__", type(f).__name__) for f in judge.reward_funcs)
        # A partial function is named by its type there, as in older checkpoints, but not in `code`.
        self._of_run = config.run.dir, None
        code = zip(function_names(judge.reward_funcs), judge.reward_funcs, strict=True)
        code = {name: code_fingerprint(func) for name, func in code}
        fingerprint = ".".join([*(d.fingerprint() for d in (prompts, held_out) if d), *names])
        streamed = isinstance(prompts, StreamedPrompts)
        left_out = {"training_rows": 0 if streamed else prompts.skipped, **bad}
        left_out |= {"held_out_rows": held_out.skipped} if held_out else {}
        batch, evaluates = config.train.batch_size - config.replay.groups, bool(config.eval.every)
        batch = 0 if streamed else batch  # how many rows there are is not known
        signs = data_signs(prompts.head, held_out, batch=batch, evaluates=evaluates)
        who = config, self.model.name, self.policy, self.engine
        about = feed, judge, held_out, fingerprint, code, left_out, signs
        more: dict[str, Any] = {"history": self.history, "callbacks": Callbacks(self._callbacks)}
        more |= {"peak": self._peak, "checker": self._checker(held_out)}
        return Loop(*who, *about, **more)

    def _judge(self, reward_funcs: RewardFuncs) -> Judge:
        one = callable(reward_funcs) or isinstance(reward_funcs, str)
        given: Any = [reward_funcs] if one else reward_funcs
        how = self.config.rewards.model

        def load() -> list[Any]:
            return [load_reward_func(f, how) if isinstance(f, str) else f for f in given or ()]

        funcs = raise_together(load)  # a host may lack a file
        for func in funcs:
            if not callable(func):
                raise UserError(f"a reward function is something to call, got {func!r}")
        c = self.config
        return Judge([batched(f) for f in funcs], c.rewards, self.tokenizer, c.rollout.stop)

    def _checker(self, held_out: EncodedPrompts | None) -> Judge | None:
        """What `eval.checker` names, which takes the columns of these rows."""
        c = self.config
        if c.eval.checker is None or held_out is None:
            return None
        func = batched(load_function(c.eval.checker, "eval.checker"))
        options = dataclasses.replace(c.rewards, funcs=[], weights=[])
        checker = Judge([func], options, self.tokenizer, c.rollout.stop, kind="checker")
        checker.check(held_out, "the held-out data")
        return checker

    def _read_groups(self, prompts: EncodedPrompts) -> OfflineGroups:
        if self.config.loss.name == "sft":
            return read_solutions(
                prompts,
                self._completion_ids,
                self.config.sft.column,
                self.config.rollout.max_completion_length,
                reference=self.policy.reference_fingerprint,
                bad_samples=self.config.data.bad_samples,
            )
        return read_groups(
            prompts,
            self._completion_ids,
            reference=self.policy.reference_fingerprint,
            vocab_size=self._vocab_size,
            max_completion_length=self.config.rollout.max_completion_length,
            bad_samples=self.config.data.bad_samples,
        )

    def _keep_date(self) -> None:
        """Where the chat template writes the date: the one that the run began with."""
        if self.config.data.template_writes_date(self.tokenizer):
            run_dir = self.config.run.dir
            self.config = from_first_host(lambda: with_run_date(self.config, run_dir))

    def _encode_stream(self, dataset: Dataset) -> StreamedPrompts:
        c, who = self.config.data, (self.tokenizer, self._vocab_size)
        stream = as_stream(dataset)
        head = c.encode(stream.head(), *who)
        order = Order(self.config.run.seed, c.shuffle_buffer if c.shuffle else 0)
        return StreamedPrompts(stream, Encoder(c, *who), head, order, c.max_prompt_length)

    def _encode(self, rows: Dataset) -> EncodedPrompts:
        return self.config.data.encode(rows, self.tokenizer, self._vocab_size)

    def _completion_ids(self, text: str) -> list[int]:
        rows = self._vocab_size
        return completion_ids(text, self.tokenizer, self.stop_ids, rows)

    def _encode_all(self, prompts: Sequence[Any]) -> EncodedPrompts:
        """Prompts given one by one, of which none may be skipped."""
        if isinstance(prompts, str):
            raise UserError("prompts must be a list: put brackets around a single text")
        rows = [{"prompt": prompt} for prompt in prompts]
        encoded = self._encode(rows)
        if encoded.skipped:
            raise UserError(f"{encoded.skipped} prompts are over data.max_prompt_length tokens")
        return encoded
