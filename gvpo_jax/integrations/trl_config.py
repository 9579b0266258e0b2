"""TRL's arguments as settings: `GVPOConfig` in place of `trl.GRPOConfig`."""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax

from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.errors import UserError
from gvpo_jax.integrations.trl_arguments import DEFAULTS, REFUSED, WITHOUT_EFFECT
from gvpo_jax.rundir.trackers import PACKAGES
from gvpo_jax.training.step import TrainConfig

_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_torch_xla": "adamw",
    "adamw_hf": "adamw", "adafactor": "adafactor", "sgd": "sgd",
}  # fmt: skip
_SCHEDULES = {
    "constant": "constant", "constant_with_warmup": "constant", "linear": "linear",
    "cosine": "cosine",
}  # fmt: skip


class GVPOConfig:
    """The arguments of TRL's GRPOConfig, by TRL's names and in its units, with its defaults.

    What has no equal here is refused by `GVPOTrainer`, and what has no effect is said once; see
    docs/trl.md. Settings that TRL does not have are given as `section__key`, as `mesh__fsdp=8`.

    Args:
        output_dir: the run's folder; None: trainer_output.
        **arguments: see `gvpo_jax.integrations.trl_arguments`. `beta` is GVPO's, above 0; by
            default 0.1. With another `loss_type` it is the coefficient of the KL penalty.

    Raises:
        UserError: there is no such argument.
    """

    def __init__(self, output_dir: str | None = None, **arguments: Any):
        self.settings = {name: value for name, value in arguments.items() if "__" in name}
        given = {name: value for name, value in arguments.items() if "__" not in name}
        for name in given:
            if name not in DEFAULTS:
                near = difflib.get_close_matches(name, DEFAULTS, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(f"TRL's GRPOConfig has no argument {name}{hint}")
        vars(self).update(DEFAULTS | {"output_dir": output_dir} | given)
        best = self.metric_for_best_model
        if best is not None and self.greater_is_better is None:  # as transformers does
            self.greater_is_better = not best.endswith("loss")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"GVPOConfig has no argument {name}")

    def notes(self) -> list[str]:
        """What has no effect though it is given, a line for each reason.

        Raises:
            UserError: an argument is given that has no equal here.
        """
        for name, (default, why) in REFUSED.items():
            if getattr(self, name) != default:
                raise UserError(f"{name}={getattr(self, name)!r} has no equal here: {why}")
        reasons: dict[str, list[str]] = {}
        for name, (default, why) in WITHOUT_EFFECT.items():
            if getattr(self, name) != default:
                reasons.setdefault(why, []).append(name)
        if self.loss_type == "gvpo":
            clips = ("epsilon", "epsilon_high", "importance_sampling_level")
            if given := [name for name in clips if getattr(self, name) != DEFAULTS[name]]:
                reasons["GVPO clips nothing, and has no importance weights"] = given
        if self.push_to_hub:
            reasons["checkpoints stay here; trainer.push_to_hub() sends the model"] = [
                "push_to_hub"
            ]
        if "all" in self._trackers():
            reasons["name the trackers"] = ["report_to='all'"]
        return [f"{', '.join(names)}: without effect; {why}" for why, names in reasons.items()]

    def evaluates(self) -> bool:
        """Whether held-out rows are answered while it trains."""
        return _text(self.eval_strategy) != "no"

    def config(
        self, rows: int, *, devices: int | None = None, more: Mapping[str, Any] = {}
    ) -> Config:
        """The settings that say the same.

        Args:
            rows: of the training data.
            devices: that train; None: all there are.
            more: settings as `section__key`, on top, below those of the user.

        Raises:
            UserError: an argument has no equal, or its value none.
        """
        devices = devices or jax.device_count()
        settings = self._batches(devices)
        prompts, k = settings["train__batch_size"], self.num_generations
        train = TrainConfig(
            steps=self.max_steps if self.max_steps > 0 else None,
            epochs=None if self.max_steps > 0 else self.num_train_epochs,
            batch_size=prompts,
            steps_per_generation=settings["train__steps_per_generation"],
            num_iterations=self.num_iterations,
        )
        total = train.settled(rows, prompts).updates
        epoch = TrainConfig(
            epochs=1.0,
            steps_per_generation=train.steps_per_generation,
            num_iterations=train.num_iterations,
        )
        epoch = epoch.settled(rows, prompts).updates
        settings |= {
            "run__dir": self.output_dir or "trainer_output",
            "run__seed": self.seed,
            "train__steps": train.steps,
            "train__epochs": train.epochs,
            "train__num_iterations": self.num_iterations,
            "data__shuffle": self.shuffle_dataset,
            "data__too_long": "skip",
            "data__max_prompt_length": self.max_prompt_length,
            "data__template_arguments": self.chat_template_kwargs or {},
            "rewards__weights": list(self.reward_weights or []),
        }
        settings |= self._model() | self._optimizer(total) | self._sampling() | self._loss()
        settings |= self._written(total, epoch)
        every_eval = max(self.per_device_eval_batch_size * devices // (self._eval_k() or k), 1)
        settings["eval__batch_size"] = every_eval
        return override(Config(), **settings | dict(more) | self.settings)

    def _batches(self, devices: int) -> dict[str, Any]:
        """TRL counts completions, on each device; here prompts are counted, on all of them."""
        k, parts = self.num_generations, self.gradient_accumulation_steps
        at_once = self.per_device_train_batch_size * devices
        completions = at_once * parts
        if completions % k:
            raise UserError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} x {devices} "
                f"devices x gradient_accumulation_steps={parts} are {completions} completions for "
                f"each update: give a multiple of num_generations={k}, as an update takes whole "
                "groups"
            )
        if self.generation_batch_size and self.steps_per_generation:
            raise UserError("give generation_batch_size or steps_per_generation, not both")
        generated = self.generation_batch_size or at_once * (self.steps_per_generation or parts)
        if generated % completions:
            raise UserError(
                f"{generated} completions are generated at a time, by generation_batch_size or "
                f"steps_per_generation: give a multiple of the {completions} of an update"
            )
        prompts = completions // k
        largest = max(at_once // k, 1)  # groups at once
        groups = max(n for n in range(1, largest + 1) if prompts % n == 0)
        mesh = {}
        if groups % devices and not any(name.startswith("mesh__") for name in self.settings):
            # Completions of a group are cut over the devices that its groups leave.
            shared = math.gcd(groups, devices)
            mesh = {"mesh__data": shared, "mesh__fsdp": devices // shared}
        return mesh | {
            "train__batch_size": prompts,
            "train__micro_batches": prompts // groups,
            "train__completion_parts": k // at_once if at_once < k and k % at_once == 0 else 1,
            "train__steps_per_generation": generated // completions,
            "rollout__num_generations": k,
        }

    def _model(self) -> dict[str, Any]:
        given = dict(self.model_init_kwargs or {})
        dtype = given.pop("dtype", given.pop("torch_dtype", None))
        given.pop("attn_implementation", None)  # see model.attention
        if given:
            raise UserError(f"model_init_kwargs: {', '.join(given)} has no equal here")
        if self.fp16:
            raise UserError("fp16=True has no equal here: give bf16=True, or leave both out")
        half = jax.default_backend() != "cpu" if self.bf16 is None else self.bf16
        if dtype is not None and self.bf16 is None:
            half = str(dtype).rpartition(".")[2] == "bfloat16"
        aux = self.router_aux_loss_coef
        return {
            "model__dtype": "bfloat16" if half else "float32",
            "model__remat": "layer" if self.gradient_checkpointing else "none",
            **({"loss__router_aux_coef": aux} if aux else {}),
        }

    def _optimizer(self, total: int) -> dict[str, Any]:
        schedule = _text(self.lr_scheduler_type)
        warm = schedule != "constant"
        return {
            "optimizer__name": _one_of("optim", _text(self.optim), _OPTIMIZERS),
            "optimizer__schedule": _one_of("lr_scheduler_type", schedule, _SCHEDULES),
            "optimizer__learning_rate": self.learning_rate,
            "optimizer__warmup_steps": _updates(self.warmup_steps, total) if warm else 0,
            "optimizer__weight_decay": self.weight_decay,
            "optimizer__b1": self.adam_beta1,
            "optimizer__b2": self.adam_beta2,
            "optimizer__eps": self.adam_epsilon,
            "optimizer__max_grad_norm": self.max_grad_norm or None,
        }

    def _sampling(self) -> dict[str, Any]:
        given = dict(self.generation_kwargs or {})
        stop = given.pop("stop", given.pop("stop_strings", None)) or []
        if given:
            raise UserError(f"generation_kwargs: {', '.join(given)} has no equal here")
        settings = {
            "rollout__max_completion_length": self.max_completion_length,
            "rollout__temperature": self.temperature,
            "rollout__top_p": self.top_p,
            "rollout__top_k": self.top_k or 0,
            "rollout__min_p": self.min_p or 0.0,
            "rollout__repetition_penalty": self.repetition_penalty,
            "rollout__stop": [stop] if isinstance(stop, str) else list(stop),
        }
        if self.use_vllm:
            if self.vllm_mode != "server":
                raise UserError(
                    "vllm_mode='colocate' has no equal here: leave use_vllm out, the trainer "
                    "samples by itself; or give vllm_mode='server' and its address"
                )
            host = self.vllm_server_host.replace("0.0.0.0", "127.0.0.1")
            url = self.vllm_server_base_url or f"http://{host}:{self.vllm_server_port}"
            settings |= {
                "servers__kind": "vllm",
                "servers__urls": [url],
                "servers__timeout": self.vllm_server_timeout,
            }
        return settings

    def _loss(self) -> dict[str, Any]:
        name, level = self.loss_type, self.importance_sampling_level
        if name == "gvpo":
            if self.beta == 0:
                raise UserError("beta=0: GVPO needs a beta above 0; the paper takes 0.01 to 0.5")
            beta = 0.1 if self.beta is None else self.beta
            return {"loss__name": name, "loss__beta": beta} | self._reference()
        if level == "sequence" and name == "grpo":
            name = "gspo"
        elif level != "token":
            raise UserError(
                f"importance_sampling_level={level!r} with loss_type={name!r} has no equal here"
            )
        scaled = {"none": False, "False": False, "group": True, "True": True}
        scales = scaled.get(str(self.scale_rewards))
        if scales is not (name not in ("dr_grpo", "rloo", "rebel", "dpo")) and (
            scales is None or self.scale_rewards != DEFAULTS["scale_rewards"]
        ):
            raise UserError(
                f"scale_rewards={self.scale_rewards!r} with loss_type={self.loss_type!r} has no "
                "equal here: grpo, dapo and gspo scale by group, dr_grpo and rloo do not"
            )
        settings: dict[str, Any] = {"loss__name": name}
        if name not in ("rebel", "dpo"):
            high = self.epsilon if self.epsilon_high is None else self.epsilon_high
            settings |= {"loss__epsilon": self.epsilon, "loss__epsilon_high": high}
            settings["loss__kl_coef"] = self.beta or 0.0
        elif self.beta:
            settings["loss__beta"] = self.beta
        return settings | self._reference()

    def _reference(self) -> dict[str, Any]:
        if not self.sync_ref_model:
            return {}
        share, every = self.ref_model_mixup_alpha, self.ref_model_sync_steps
        if share == 1:
            return {"reference__name": "previous", "reference__refresh_every": every}
        if every == 1:
            return {"reference__name": "ema", "reference__decay": 1 - share}
        raise UserError(
            f"sync_ref_model with ref_model_mixup_alpha={share} and ref_model_sync_steps={every} "
            "has no equal here: give ref_model_mixup_alpha=1 (a copy), or ref_model_sync_steps=1 "
            "(an average)"
        )

    def _eval_k(self) -> int:
        return self.num_generations_eval or self.num_generations

    def _trackers(self) -> list[str]:
        return [self.report_to] if isinstance(self.report_to, str) else list(self.report_to or [])

    def _written(self, total: int, epoch: int) -> dict[str, Any]:
        evaluates, saves = _text(self.eval_strategy), _text(self.save_strategy)
        eval_every = {
            "no": 0,
            "epoch": epoch,
            "steps": _updates(self.eval_steps or self.logging_steps, total),
        }
        save_every = {
            "no": total,  # the last state is always saved
            "epoch": epoch,
            "steps": _updates(self.save_steps, total),
            "best": eval_every.get(evaluates, 0) or total,
        }
        trackers = [kind for kind in self._trackers() if kind not in ("none", "all")]
        if unknown := [kind for kind in trackers if kind not in PACKAGES]:
            known = ", ".join(PACKAGES)
            raise UserError(f"report_to={unknown[0]!r} has no equal here: there are {known}")
        limit = self.save_total_limit or total  # all stay
        return {
            "eval__every": _one_of("eval_strategy", evaluates, eval_every),
            "eval__num_generations": self._eval_k(),
            "eval__temperature": self.temperature,
            "checkpoint__every": _one_of("save_strategy", saves, save_every),
            "checkpoint__keep": 1 if saves == "best" else limit,
            "checkpoint__keep_best": 1 if saves == "best" else 0,
            "log__completions_every": _updates(self.logging_steps, total),
            "log__samples": (self.num_completions_to_print or 3) if self.log_completions else 0,
            "log__trackers": trackers,
            **({} if self.project == DEFAULTS["project"] else {"log__project": self.project}),
        }


def _text(value: Any) -> str:
    """Of a text, or of one of transformers' enumerations."""
    return str(getattr(value, "value", value))


def _one_of(name: str, value: str, known: Mapping[str, Any]) -> Any:
    if value not in known:
        raise UserError(f"{name}={value!r} has no equal here; there are {', '.join(known)}")
    return known[value]


def _updates(value: float, total: int) -> int:
    """A number of updates; below 1 it is a share of all of them."""
    return math.ceil(value * total) if 0 < value < 1 else int(value)
