"""TRL's constructor and arguments on our trainer, against the real TRL where it can say."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, VeraConfig
from small_run import one_layer
from transformers import EarlyStoppingCallback, TrainerCallback

from gvpo_jax.errors import UserError
from gvpo_jax.integrations.trl import GVPOConfig, GVPOTrainer
from gvpo_jax.integrations.trl_arguments import DEFAULTS, REFUSED, TAKEN, WITHOUT_EFFECT, table
from gvpo_jax.parallel.layout import check_batch
from gvpo_jax.rundir.files import read_metrics
from gvpo_jax.trainer import Trainer

ROWS = [{"prompt": f"abc {i}", "number": i} for i in range(8)]
SMALL = {
    "per_device_train_batch_size": 1, "num_generations": 4, "max_completion_length": 6,
    "max_prompt_length": 16, "max_steps": 3, "learning_rate": 3e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    from trl import GRPOConfig

    return GRPOConfig


def share(completions, **_):
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]


def port(folder, reward_funcs=share, model=None, callbacks=(), rows=ROWS, given=(), **arguments):
    args = GVPOConfig(str(folder), **SMALL | arguments)
    model = one_layer() if model is None else model
    return GVPOTrainer(model, reward_funcs, args, rows, callbacks=callbacks, **dict(given))


def test_every_argument_of_trl_is_there_with_its_default(theirs):
    """A new version of TRL that has more makes this fail."""
    known = {}
    for field in dataclasses.fields(theirs):
        made = field.default_factory
        known[field.name] = field.default if made is dataclasses.MISSING else made()
    ours = DEFAULTS | {"beta": 0.0, "loss_type": "dapo"}
    assert ours.pop("max_prompt_length") == 512
    assert ours == known
    assert len(TAKEN) + len(WITHOUT_EFFECT) + len(REFUSED) == len(DEFAULTS)


def test_the_page_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "trl.md").read_text()
    assert page.partition("<!-- table -->\n")[2].partition("<!-- /table -->")[0] == table()


@pytest.mark.parametrize(
    ("per_device", "parts", "k", "devices", "generated"),
    [
        (8, 1, 8, 1, None),
        (8, 4, 8, 8, None),
        (2, 8, 4, 1, None),
        (4, 2, 8, 4, 64),
        (16, 1, 4, 2, None),
        (1, 1, 4, 8, None),
        (1, 6, 8, 4, None),
        (3, 8, 8, 8, None),
    ],
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # TRL's own
def test_batches_are_those_of_trl(theirs, tmp_path, per_device, parts, k, devices, generated):
    """TRL's own sums, on one process of its, give the completions of an update and a rollout."""
    batches = {
        "num_generations": k, "gradient_accumulation_steps": parts,
        "generation_batch_size": generated,
    }  # fmt: skip
    alone = theirs(
        str(tmp_path),
        per_device_train_batch_size=per_device * devices,
        bf16=False,
        use_cpu=True,
        **batches,
    )
    ours = GVPOConfig(per_device_train_batch_size=per_device, **batches)
    train = ours.config(100, devices=devices).train
    assert train.batch_size * k == alone.per_device_train_batch_size * parts
    assert train.batch_size * k * train.steps_per_generation == alone.generation_batch_size
    largest = per_device * devices  # completions that TRL computes at once
    at_once = train.batch_size // train.micro_batches * k // train.completion_parts
    assert at_once <= largest or train.batch_size == train.micro_batches
    c = ours.config(100, devices=devices)
    if devices <= jax.device_count():
        mesh = c.mesh.mesh(jax.devices()[:devices])
        check_batch(mesh, train.batch_size // train.micro_batches, k, "the batch")


def test_settings_say_what_the_arguments_say():
    args = GVPOConfig(
        "out",
        learning_rate=2e-5, lr_scheduler_type="cosine", warmup_steps=0.1, max_steps=200,
        optim="adafactor", weight_decay=0.1, adam_beta2=0.99, max_grad_norm=0, bf16=True,
        gradient_checkpointing=False, temperature=0.7, top_p=0.9, top_k=None, beta=0.2,
        sync_ref_model=True, ref_model_mixup_alpha=0.1, ref_model_sync_steps=1, seed=7,
        eval_strategy="epoch", save_strategy="best", log_completions=True, logging_steps=5,
        report_to=["tensorboard"], generation_kwargs={"stop_strings": "\n"}, use_vllm=True,
        vllm_mode="server", chat_template_kwargs={"enable_thinking": False}, num_iterations=2,
        mesh__fsdp=1,
    )  # fmt: skip
    c = args.config(40, devices=1)
    assert (c.run.dir, c.run.seed, c.train.steps, c.train.num_iterations) == ("out", 7, 200, 2)
    o = c.optimizer
    assert (o.name, o.schedule, o.learning_rate, o.warmup_steps) == (
        "adafactor",
        "cosine",
        2e-5,
        20,
    )
    assert (o.b2, o.weight_decay, o.max_grad_norm) == (0.99, 0.1, None)
    assert (c.model.dtype, c.model.remat, c.mesh.fsdp) == ("bfloat16", "none", 1)
    assert (c.loss.name, c.loss.beta) == ("gvpo", 0.2)
    assert (c.reference.name, c.reference.decay) == ("ema", 0.9)
    assert (c.rollout.temperature, c.rollout.top_p, c.rollout.top_k) == (0.7, 0.9, 0)
    assert (c.rollout.stop, c.log.samples, c.log.trackers) == (["\n"], 3, ["tensorboard"])
    assert (c.servers.kind, c.servers.urls) == ("vllm", ["http://127.0.0.1:8000"])
    assert c.data.template_arguments == {"enable_thinking": False}
    assert (c.eval.every, c.checkpoint.every, c.checkpoint.keep_best) == (80, 80, 1)
    assert c.eval.num_generations == 8
    grpo = GVPOConfig(loss_type="grpo", beta=0.04, epsilon=0.1, epsilon_high=0.3)
    loss = grpo.config(40, devices=1).loss
    assert (loss.name, loss.kl_coef, loss.epsilon, loss.epsilon_high) == ("grpo", 0.04, 0.1, 0.3)
    plain = GVPOConfig(loss_type="dapo").config(40, devices=1)
    assert (plain.loss.epsilon, plain.loss.epsilon_high) == (0.2, 0.2)  # TRL's None
    assert plain.data.too_long == "skip"
    GVPOConfig(loss_type="dr_grpo", scale_rewards="none").config(40, devices=1)
    sequence = GVPOConfig(loss_type="grpo", importance_sampling_level="sequence")
    assert sequence.config(40, devices=1).loss.name == "gspo"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"learning_rat": 1}, "no argument learning_rat; did you mean learning_rate?"),
        ({"beta": 0.0}, "GVPO needs a beta above 0"),
        ({"fp16": True}, "give bf16=True"),
        ({"optim": "lion_8bit"}, "optim='lion_8bit' has no equal here; there are adamw_torch"),
        ({"lr_scheduler_type": "polynomial"}, "there are constant"),
        ({"per_device_train_batch_size": 3}, "are 3 completions for each update: give a multip"),
        ({"use_vllm": True}, "vllm_mode='colocate' has no equal"),
        ({"report_to": "mlflow"}, "report_to='mlflow' has no equal"),
        ({"generation_kwargs": {"penalty_alpha": 1}}, "penalty_alpha has no equal"),
        ({"sync_ref_model": True}, "give ref_model_mixup_alpha=1"),
        ({"mask_truncated_completions": True}, "GVPO's optimum needs all samples"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "a multiple of the 16"),
        ({"generation_batch_size": 8, "steps_per_generation": 1}, "not both"),
        ({"loss_type": "vespo"}, "loss.name"),
        ({"loss_type": "grpo", "scale_rewards": "none"}, "scale_rewards='none' with loss_type"),
        ({"loss_type": "dapo", "scale_rewards": "batch"}, "scale_rewards='batch' with loss_type"),
        ({"loss_type": "dapo", "importance_sampling_level": "sequence"}, "has no equal here"),
        ({"mesh__fsdb": 1}, "did you mean 'fsdp'"),
    ],
)  # fmt: skip
def test_what_has_no_equal_is_refused(arguments, told):
    def read():
        args = GVPOConfig(**arguments)
        args.notes()
        args.config(8, devices=1)

    with pytest.raises(UserError, match=told):
        read()


def test_what_has_no_effect_is_said_once_for_each_reason():
    args = GVPOConfig(ddp_timeout=3, tf32=True, dataloader_num_workers=2)
    assert args.notes() == [
        "tf32, ddp_timeout: without effect; it is about PyTorch",
        "dataloader_num_workers: without effect; rows are in memory, and are tokenised before the "
        "first update",
    ]
    assert GVPOConfig().notes() == []
    (clip,) = GVPOConfig(epsilon=0.1).notes()
    assert clip.startswith("epsilon: without effect; GVPO clips nothing")
    assert GVPOConfig(report_to="all").notes() == [
        "report_to='all': without effect; name the trackers"
    ]


class Heard(TrainerCallback):
    def __init__(self, stop_at=None):
        self.events, self.stop_at = [], stop_at

    def on_train_begin(self, args, state, control, **_):
        self.events.append(("begin", state.max_steps, args.learning_rate))

    def on_step_end(self, args, state, control, **_):
        self.events.append(("step", state.global_step, state.epoch))
        if state.global_step == self.stop_at:
            control.should_training_stop = True

    def on_log(self, args, state, control, logs, **_):
        self.events.append(("log", state.global_step, logs["reward"]))

    def on_evaluate(self, args, state, control, metrics, **_):
        self.events.append(("evaluate", state.global_step, metrics["eval_reward"]))

    def on_save(self, args, state, control, **_):
        self.events.append(("save", state.global_step))

    def on_train_end(self, args, state, control, **_):
        self.events.append(("end", state.global_step))


def test_it_trains_as_the_trainer_beneath_does(tmp_path):
    ported = port(tmp_path / "ported", rows=Dataset.from_list(ROWS))
    result = ported.train()
    assert result.global_step == 3
    assert result.metrics["steps"] == 3
    ours = Trainer(GVPOConfig(str(tmp_path / "ours"), **SMALL).config(8), one_layer())
    ours.train(ROWS, share)
    for a, b in zip(
        *(jax.tree.leaves(t.policy.params) for t in (ported.trainer, ours)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert result.training_loss == np.mean([row["loss"] for row in ours.history])


def test_callbacks_of_transformers_are_called(tmp_path, capfd):
    heard = Heard()
    more = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "logging_steps": 2}
    ported = port(
        tmp_path, callbacks=[heard, Deaf], given={"eval_dataset": ROWS[:2]}, **more, max_steps=4
    )
    assert "Deaf: on_epoch_end is never called" in capfd.readouterr().out
    ported.train()
    assert [event[:2] for event in heard.events] == [
        ("begin", 4), ("evaluate", 0), ("step", 1), ("step", 2), ("log", 2), ("evaluate", 2),
        ("save", 2), ("step", 3), ("step", 4), ("log", 4), ("save", 4), ("evaluate", 4), ("end", 4),
    ]  # fmt: skip
    rewards = [row["reward"] for row in read_metrics(tmp_path) if "reward" in row]
    assert [event[2] for event in heard.events if event[0] == "log"] == rewards[1::2]
    assert heard.events[2][2] == 2 / 8  # of an epoch: an update takes 2 of 8 prompts


class Deaf(TrainerCallback):
    def on_epoch_end(self, args, state, control, **_):
        raise AssertionError


def test_a_callback_stops_the_training(tmp_path):
    ported = port(tmp_path, callbacks=[Heard(stop_at=2)])
    assert ported.train().global_step == 2
    assert port(tmp_path).train().global_step == 3


def test_a_trainer_that_was_stopped_goes_on_when_asked_again(tmp_path):
    ported = port(tmp_path, callbacks=[Heard(stop_at=2)])
    assert ported.train().global_step == 2
    assert ported.train().global_step == 3


def test_the_state_after_a_resume_is_that_of_the_run(tmp_path):
    """Reward functions and callbacks see how far it is, and what was logged before."""
    seen = []

    def reward(completions, trainer_state, **_):
        seen.append((trainer_state.global_step, trainer_state.epoch))
        return share(completions)

    port(tmp_path, reward, callbacks=[Heard(stop_at=2)]).train()
    port_again = port(tmp_path, reward)
    port_again.train()
    assert seen == [(0, 0.0), (1, 0.25), (2, 0.5)]  # an update takes 2 of 8 prompts
    assert [row["step"] for row in port_again.state.log_history] == [1, 2, 3]


def test_early_stopping_knows_that_a_reward_should_rise(tmp_path):
    """transformers' own default: greater is better, unless the metric is a loss."""
    calls = []

    def rising(completions, **_):
        calls.append(len(calls))
        return [float(len(calls))] * len(completions)

    more = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 6}
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    given = {"eval_dataset": ROWS[:2]}
    ported = port(
        tmp_path, rising, callbacks=[stop], given=given, metric_for_best_model="reward", **more
    )
    assert ported.train().global_step == 6
    assert ported.state.best_global_step == 6
    assert not GVPOConfig(metric_for_best_model="eval_loss").greater_is_better


def test_early_stopping_of_transformers_itself(tmp_path):
    """Reward 0 for all: no evaluation is better than the first."""
    more = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 8}
    best = {"metric_for_best_model": "reward", "greater_is_better": True}
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    ported = port(
        tmp_path, zero, callbacks=[stop], given={"eval_dataset": ROWS[:2]}, **more, **best
    )
    assert 1 < ported.train().global_step < 8


def zero(completions, **_):
    return [0.0] * len(completions)


def test_rewards_get_what_trl_gives_them(tmp_path):
    seen = []

    async def judged(prompts, completions, number, trainer_state, log_metric, completion_ids):
        seen.append((trainer_state.global_step, sorted(set(number))))
        log_metric("longest", max(map(len, completions)))
        log_metric("longest", max(map(len, completions)))
        return share(completions)

    def plain(completions, log_extra=None, **columns):
        log_extra("copy", completions)
        assert {"number", "trainer_state", "log_metric"} <= columns.keys()
        return [1.0] * len(completions)

    ported = port(tmp_path, [judged, plain], reward_weights=[1.0, 0.5])
    ported.train()
    assert [step for step, _ in seen] == [0, 1, 2]
    history = ported.state.log_history
    assert all(0 < row["longest"] <= 6 * 4 for row in history)
    assert ported.trainer.config.rewards.weights == [1.0, 0.5]


def test_lora_quantisation_optimizer_and_tokenizer(tmp_path):
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    tokenizer = one_layer().tokenizer
    given = {
        "peft_config": lora, "optimizers": (optax.sgd(0.1), None), "processing_class": tokenizer
    }  # fmt: skip
    ported = port(tmp_path / "run", given=given)
    c = ported.trainer.config.model.lora
    assert (c.rank, c.alpha, c.names()) == (2, 8.0, ("q", "v"))
    assert ported.processing_class is tokenizer
    ported.train()
    ported.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    ported.save_model(str(tmp_path / "run"))  # the run's own folder
    assert (tmp_path / "run" / "export" / "adapter_model.safetensors").is_file()
    plain = port(tmp_path / "plain", given={"peft_config": LoraConfig(r=2)})
    assert plain.trainer.config.model.lora.names() == ("q", "v")  # PEFT's own for such models


def test_several_evaluation_sets(tmp_path):
    ported = port(tmp_path, given={"eval_dataset": {"a": ROWS[:2], "b": ROWS[2:5]}})
    scores = ported.evaluate()
    assert {"eval_reward", "eval_reward/a", "eval_reward/b"} <= scores.keys()
    both = 2 * scores["eval_reward/a"] + 3 * scores["eval_reward/b"]
    np.testing.assert_allclose(5 * scores["eval_reward"], both, rtol=1e-6)
    assert ported.evaluate(ROWS[:2])["eval_reward"] == scores["eval_reward/a"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model": object()}, "model is a object: give its name"),
        ({"reward_funcs": None}, "give one reward function"),
        ({"reward_funcs": "./judge"}, "judge is neither a model folder"),
        ({"reward_funcs": torch.nn.Linear(1, 1)}, "Linear is a PyTorch model: give its name"),
        ({"args": {"beta": 1}}, "args is a dict: give a gvpo_jax.integrations.trl.GVPOConfig"),
        ({"train_dataset": None}, "train_dataset: give rows"),
        ({"tools": [print]}, "tools has no equal here"),
        ({"optimizers": (optax.sgd(1.0), print)}, "put the schedule into the Optax"),
        ({"peft_config": LoraConfig(use_dora=True)}, "use_dora=True has no equal"),
        ({"peft_config": LoraConfig(exclude_modules=["v_proj"])}, "exclude_modules="),
        ({"peft_config": LoraConfig(init_lora_weights="pissa")}, "init_lora_weights='pissa'"),
        ({"peft_config": VeraConfig()}, "VeraConfig has no equal"),
        ({"peft_config": LoraConfig(target_modules=".*proj")}, "is a pattern; give a list"),
        ({"quantization_config": object()}, "quantization_config has no equal"),
    ],
)  # fmt: skip
def test_what_the_trainer_can_not_take_is_refused(tmp_path, given, told):
    arguments = {
        "model": one_layer(), "reward_funcs": share, "args": GVPOConfig(str(tmp_path), **SMALL),
        "train_dataset": ROWS,
    }  # fmt: skip
    with pytest.raises(UserError, match=told):
        GVPOTrainer(**arguments | given)


def test_the_model_is_sent_to_the_hub_under_the_name_that_is_given(tmp_path, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(
        "gvpo_jax.trainer.upload", lambda *about, **more: sent.append((about, more))
    )
    hub = {"push_to_hub": True, "hub_model_id": "me/model", "hub_private_repo": True}
    ported = port(tmp_path / "run", **hub)
    assert "push_to_hub: without effect; checkpoints stay here" in capsys.readouterr().out
    ported.push_to_hub(dataset_name="some/rows")
    port(tmp_path / "other").push_to_hub()
    (folder, name), more = sent[0]
    assert (folder, name, more) == (tmp_path / "run" / "export", "me/model", {"private": True})
    assert (folder / "model.safetensors").is_file()
    assert sent[1][0][1] == "other"


def test_a_callback_of_transformers_that_fails_is_named(tmp_path):
    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            raise ValueError("too late")

    told = "^Broken.on_step_end failed at step 1: ValueError: too late; the 1 updates before"
    with pytest.raises(UserError, match=told):
        port(tmp_path, callbacks=[Broken]).train()


def test_what_scripts_ask_of_a_trainer(tmp_path):
    ported = port(tmp_path, given={"eval_dataset": ROWS[:2]})
    assert (ported.train_dataset, ported.eval_dataset) == (ROWS, ROWS[:2])
    assert ported.is_world_process_zero()
    assert "test_reward" in ported.evaluate(metric_key_prefix="test")
