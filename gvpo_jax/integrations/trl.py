"""TRL's constructor and argument names on gvpo-jax's trainer.

    from gvpo_jax.integrations.trl import GVPOConfig, GVPOTrainer

A script for TRL's GRPOTrainer runs with these two names in place of GRPOConfig and GRPOTrainer.
docs/trl.md says what every argument becomes. Neither TRL nor PyTorch is imported.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from gvpo_jax.callbacks import Callback
from gvpo_jax.data.rows import as_rows
from gvpo_jax.errors import UserError, tell
from gvpo_jax.integrations.trl_config import GVPOConfig as GVPOConfig
from gvpo_jax.models.adapters import NOT_COMPUTED
from gvpo_jax.models.load import LoadedModel
from gvpo_jax.models.own import OwnModel
from gvpo_jax.parallel.distributed import is_first
from gvpo_jax.rewards.functions import function_name, is_async
from gvpo_jax.rewards.model import RewardModel, RewardModelConfig
from gvpo_jax.trainer import Trainer

_GIVEN = ("trainer_state", "log_extra", "log_metric")  # what TRL hands to reward functions
_EVENTS = ("on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_train_end")


class TrainOutput(NamedTuple):
    """What `GVPOTrainer.train` returns, as transformers' TrainOutput."""

    global_step: int
    training_loss: float
    metrics: dict[str, Any]


@dataclasses.dataclass
class TrainerState:
    """What callbacks and reward functions may read, by transformers' names."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    log_history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best_metric: float | None = None  # of args.metric_for_best_model, where that is given
    best_global_step: int | None = None
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True


@dataclasses.dataclass
class TrainerControl:
    """What callbacks may ask for: to stop. The others are there to be set, and are not heard."""

    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False


class GVPOTrainer:
    """GVPO with the constructor of TRL 1.16's GRPOTrainer.

    Args:
        model: a hub name, a folder, or a model that gvpo-jax loaded; not a PyTorch module.
        reward_funcs: functions with TRL's signature; async ones too. A text is the hub name or
            the folder of a reward model.
        args: a `GVPOConfig`.
        train_dataset: rows with `prompt`: a `datasets.Dataset`, a list of dicts or a DataFrame.
        eval_dataset: held-out rows, or a dict of several sets, each of which gets its own scores.
        processing_class: a tokenizer; None: the model's.
        callbacks: with transformers' methods `on_train_begin`, `on_step_end`, `on_log`,
            `on_evaluate`, `on_save`, `on_train_end`; classes or objects.
        optimizers: an Optax transformation and None.
        peft_config: PEFT's LoraConfig, or anything with its attributes.
        quantization_config: with `load_in_4bit` or `load_in_8bit`; needs `peft_config`.
        **others: the rest of TRL's; they are refused unless they are None.

    Attributes:
        trainer: the `gvpo_jax.trainer.Trainer` beneath.
        state: see `TrainerState`.

    Raises:
        UserError: something that has no equal here; and what `Trainer` raises.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GVPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        **others: Any,
    ):
        self.args = args = GVPOConfig() if args is None else args
        if not isinstance(args, GVPOConfig):
            raise UserError(
                f"args is a {type(args).__name__}: give a gvpo_jax.integrations.trl.GVPOConfig "
                "with the same arguments"
            )
        others["reward_processing_classes"] = reward_processing_classes
        for name, value in others.items():
            if value is not None:
                raise UserError(f"{name} has no equal here; leave it out")
        notes = args.notes()
        self._rows, self._held_out = _training_rows(train_dataset), _held_out_rows(eval_dataset)
        optimizer, schedule = optimizers
        if schedule is not None:
            raise UserError("optimizers: put the schedule into the Optax optimizer")
        settings = _adapter(peft_config, notes) | _quantization(quantization_config)
        given = isinstance(model, LoadedModel | OwnModel)
        if isinstance(model, str | Path):
            settings["model__name"] = str(model)
        elif not given:
            raise UserError(
                f"model is a {type(model).__name__}: give its name, or the folder that "
                "save_pretrained wrote"
            )
        self.state, self.control = TrainerState(), TrainerControl()
        self.state.is_world_process_zero = self.state.is_local_process_zero = is_first()
        self._logged: dict[str, list[float]] = {}
        config = args.config(len(self._rows), more=settings)
        how = config.rewards.model
        self._funcs = [self._reward(func, how) for func in _listed(reward_funcs)]
        heard = _Heard(self, callbacks or ())
        self.trainer = Trainer(
            config,
            model if given else None,
            tokenizer=getattr(processing_class, "tokenizer", processing_class),
            optimizer=optimizer,
            callbacks=[heard],
        )
        self._heard, self._lora = heard, config.model.lora.rank is not None
        for note in [*notes, *heard.notes()] if is_first() else []:
            tell(f"gvpo-jax: {note}")

    @property
    def processing_class(self) -> Any:
        """The tokenizer."""
        return self.trainer.tokenizer

    def add_callback(self, callback: Any) -> None:
        """One more, see the class."""
        self._heard.add(callback)

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Train to the end, going on with the run in `output_dir` if there is one.

        resume_from_checkpoint: True or None; another folder is refused.
        """
        where, given = self.trainer.config.run.dir, resume_from_checkpoint
        if given is not None and not isinstance(given, bool):
            asked = Path(given).absolute()
            if Path(where).absolute() not in (asked, *asked.parents):
                raise UserError(f"resume_from_checkpoint: a run goes on in its output_dir, {where}")
        rows = self._held_out if self.args.evaluates() else []
        c = self.trainer.config.train
        settled = c.settled(len(self._rows), c.batch_size)
        self.state.max_steps = settled.updates
        self.control.should_training_stop = False
        if is_first():
            self._heard.tell("on_train_begin")
        summary = self.trainer.train(self._rows, self._funcs, eval_dataset=rows)
        self._note_progress()
        if is_first():
            self._heard.tell("on_train_end")
        losses = [row["loss"] for row in self.trainer.history if "loss" in row]
        loss = fmean(losses) if losses else float("nan")
        return TrainOutput(self.state.global_step, loss, summary)

    @property
    def train_dataset(self) -> list[dict[str, Any]]:
        """Its rows."""
        return self._rows

    @property
    def eval_dataset(self) -> list[dict[str, Any]]:
        """Its rows; of several sets each with its set's name in the column `task`."""
        return self._held_out

    def is_world_process_zero(self) -> bool:
        """Whether this is the first process, which alone writes files."""
        return is_first()

    def evaluate(
        self, eval_dataset: Any = None, *, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Rewards of the held-out rows, as `eval_reward` and so on."""
        rows = self._held_out if eval_dataset is None else _held_out_rows(eval_dataset)
        if not rows:
            raise UserError("evaluate: there are no held-out rows, give eval_dataset")
        metrics, _ = self.trainer.evaluate(rows, self._funcs)
        return _named(metrics, metric_key_prefix)

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the adapter, where one is trained, or the model, as transformers and PEFT load it.

        output_dir: by default `output_dir`/export.
        """
        run = self.trainer.config.run.dir
        folder = output_dir or f"{run}/export"
        if Path(folder).absolute() == Path(run).absolute():  # as TRL's scripts do
            folder = f"{run}/export"
            if is_first():
                tell(f"gvpo-jax: the model goes to {folder}, as {run} is the run's own")
        (self.trainer.save_adapter if self._lora else self.trainer.save_pretrained)(folder)

    def push_to_hub(self, *_: Any, **__: Any) -> str:
        """Send the adapter, where one is trained, or the model, to the hub; gives its address.

        The repository is `hub_model_id`, or has the name of `output_dir`. What TRL's card would be
        told is left out: ours tells method, settings, curves and scores.
        """
        name = self.args.hub_model_id or Path(self.trainer.config.run.dir).name
        private = self.args.hub_private_repo
        return self.trainer.push_to_hub(name, adapter=self._lora, private=private)

    def _reward(self, func: Any, how: RewardModelConfig) -> Callable[..., Any]:
        if isinstance(func, str | Path):
            return RewardModel(str(func), how)
        if not callable(func) or hasattr(func, "forward"):
            raise UserError(
                f"reward_funcs: {type(func).__name__} is a PyTorch model: give its name, or the "
                "folder that save_pretrained wrote"
            )
        return _with_state(func, self._give)

    def _note_progress(self) -> None:
        """Have the state say how far the run is: in every process, and after a resume."""
        state, c = self.state, self.trainer.config.train
        state.global_step = self.trainer.policy.updates
        visited = state.global_step * c.batch_size / c.num_iterations
        state.epoch = visited / max(len(self._rows), 1)

    def _give(self) -> dict[str, Any]:
        self._note_progress()

        def log_metric(name: str, value: float) -> None:
            self._logged.setdefault(name, []).append(float(value))

        return {
            "trainer_state": self.state,
            "log_extra": lambda name, values: None,  # see `_Heard.notes`
            "log_metric": log_metric,
        }


class _Heard(Callback):
    """Transformers' callbacks, told by gvpo-jax's."""

    def __init__(self, owner: GVPOTrainer, callbacks: Sequence[Any]):
        self._owner, self._callbacks = owner, [_object(callback) for callback in callbacks]
        self._filled = False

    def add(self, callback: Any) -> None:
        self._callbacks.append(_object(callback))

    def notes(self) -> list[str]:
        """Which of their methods are never called."""
        found = []
        for callback in self._callbacks:
            own = {
                name
                for kind in type(callback).__mro__
                if not kind.__module__.startswith("transformers.")
                for name in vars(kind)
            }
            if deaf := sorted(n for n in own if n.startswith("on_") and n not in _EVENTS):
                found.append(f"{type(callback).__name__}: {', '.join(deaf)} is never called")
        return found

    def tell(self, event: str, **more: Any) -> bool:
        owner = self._owner
        more["processing_class"] = owner.processing_class
        for callback in self._callbacks:
            if method := getattr(callback, event, None):
                try:
                    changed = method(owner.args, owner.state, owner.control, **more)
                except Exception as error:
                    what = " ".join(f"{type(error).__name__}: {error}".split())
                    name = f"{type(callback).__name__}.{event}"
                    step = owner.state.global_step
                    raise UserError(f"{name} failed at step {step}: {what}") from error
                owner.control = owner.control if changed is None else changed
        return owner.control.should_training_stop

    def on_step_end(self, step: int, metrics: Mapping[str, float]) -> bool:
        self._owner._note_progress()
        state = self._owner.state
        self._fill()
        logs = dict(metrics) | {name: fmean(x) for name, x in self._owner._logged.items()}
        self._owner._logged.clear()
        state.log_history.append({"epoch": state.epoch} | logs)
        ending = self.tell("on_step_end")
        if step % max(self._owner.trainer.config.log.completions_every, 1) == 0:
            ending |= self.tell("on_log", logs=logs)
        return ending

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> bool:
        state, named = self._owner.state, _named(metrics)
        self._fill()
        state.log_history.append({"step": step, "epoch": state.epoch} | named)
        ending = self.tell("on_evaluate", metrics=named)
        self._note_best(step, named)  # behind, as in transformers
        return ending

    def _fill(self) -> None:
        """Once: what earlier sessions logged."""
        if not self._filled:
            earlier = self._owner.trainer.history[:-1]
            self._owner.state.log_history[:0] = [_named(row) for row in earlier]
        self._filled = True

    def _note_best(self, step: int, metrics: Mapping[str, float]) -> None:
        state, args = self._owner.state, self._owner.args
        if not args.metric_for_best_model:
            return
        value = metrics.get(f"eval_{args.metric_for_best_model.removeprefix('eval_')}")
        sign = -1 if args.greater_is_better is False else 1
        if value is not None:
            best = state.best_metric
            if best is None or sign * value > sign * best:
                state.best_metric, state.best_global_step = value, step

    def on_save(self, step: int) -> None:
        self.tell("on_save")


def _object(callback: Any) -> Any:
    return callback() if isinstance(callback, type) else callback


def _named(metrics: Mapping[str, float], prefix: str = "eval") -> dict[str, float]:
    """Metrics of an evaluation by transformers' names: eval_reward for eval/reward."""
    return {name.replace("eval/", f"{prefix}_", 1): value for name, value in metrics.items()}


def _listed(reward_funcs: Any) -> list[Any]:
    if reward_funcs is None:
        raise UserError("reward_funcs: give one reward function, or a list of them")
    return list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]


def _training_rows(dataset: Any) -> list[dict[str, Any]]:
    if dataset is None:
        raise UserError("train_dataset: give rows with a column prompt")
    return as_rows(dataset)


def _held_out_rows(dataset: Any) -> list[dict[str, Any]]:
    """Of several sets each row has its set's name in the column `task`."""
    if dataset is None:
        return []
    if isinstance(dataset, Mapping):
        return [row | {"task": name} for name, rows in dataset.items() for row in as_rows(rows)]
    return as_rows(dataset)


def _adapter(peft: Any, notes: list[str]) -> dict[str, Any]:
    """PEFT's LoraConfig as settings."""
    if peft is None:
        return {}
    kind = getattr(peft, "peft_type", "LORA")
    if str(getattr(kind, "value", kind)) != "LORA":
        raise UserError(f"peft_config: {type(peft).__name__} has no equal here, only LoraConfig")
    for name in NOT_COMPUTED + _NOT_TAKEN:
        if value := getattr(peft, name, None):
            raise UserError(f"peft_config: {name}={value!r} has no equal here")
    for name, plain in _PLAIN_LORA.items():
        if getattr(peft, name, plain[0]) not in plain:
            raise UserError(f"peft_config: {name}={getattr(peft, name)!r} has no equal here")
    if getattr(peft, "lora_dropout", 0):
        notes.append("lora_dropout: without effect; there is no dropout")
    targets = getattr(peft, "target_modules", None)
    if isinstance(targets, str) and targets != "all-linear":
        raise UserError(
            f"peft_config: target_modules={targets!r} is a pattern; give a list of layers, such as "
            "['q_proj', 'v_proj']"
        )
    settings = {"model__lora__rank": peft.r, "model__lora__alpha": float(peft.lora_alpha)}
    if not isinstance(targets, str):  # without any PEFT takes these two, of most models
        settings["model__lora__targets"] = sorted(targets or ["q_proj", "v_proj"])
    return settings


_NOT_TAKEN = ("use_rslora", "exclude_modules", "layers_to_transform", "layers_pattern")
_PLAIN_LORA = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}


def _quantization(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    for name, kind in (("load_in_4bit", "nf4"), ("load_in_8bit", "int8")):
        if getattr(given, name, False):
            return {"model__quantization": kind}
    raise UserError("quantization_config has no equal here, but for load_in_4bit and load_in_8bit")


def _with_state(func: Callable[..., Any], give: Callable[[], dict[str, Any]]) -> Any:
    """The function with what TRL hands to it besides the columns."""
    try:
        parameters = list(inspect.signature(func).parameters.values())
    except (TypeError, ValueError):  # of some functions written in C
        return func
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    wanted = [name for name in _GIVEN if takes_all or name in {p.name for p in parameters}]

    def more() -> dict[str, Any]:
        given = give()
        return {name: given[name] for name in wanted}

    def call(*arguments: Any, **columns: Any) -> Any:
        return func(*arguments, **columns, **more())

    async def call_async(*arguments: Any, **columns: Any) -> Any:
        return await func(*arguments, **columns, **more())

    made: Any = functools.wraps(func)(call_async if is_async(func) else call)
    made.__name__ = function_name(func)
    made.__signature__ = inspect.Signature([p for p in parameters if p.name not in _GIVEN])
    return made
