"""The baselines against TRL's own code: values, and gradients by token log-prob.

TRL's trainers are run unbound, on a stand-in for the trainer that answers what they ask for: what
was sampled, which rewards it got, and the log-probs under three policies. Everything between, from
the rewards to the loss, is theirs.
"""

import collections
import inspect
from dataclasses import fields
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer, ModelConfig, RLOOTrainer, ScriptArguments

from gvpo_jax import baselines
from gvpo_jax.config_trl import TRL_NAMES

pytestmark = pytest.mark.usefixtures("x64")

G, K, T = 3, 4, 6
MAX_COMPLETION_LENGTH = 8
EPSILON, EPSILON_HIGH, KL_COEF = 0.1, 0.25, 0.3

# our objective -> TRL's loss_type and importance_sampling_level
SAME = {
    "grpo": ("grpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "dapo as bnpo": ("bnpo", "token"),
    "gspo": ("grpo", "sequence"),
}


@pytest.fixture
def batch():
    rng = np.random.default_rng(3)
    logps = rng.normal(-2, 1, (G, K, T))
    lengths = rng.integers(1, T + 1, (G, K))
    lengths[0, 0] = T
    return {
        "logps": logps,
        "old_logps": logps - rng.normal(0, 0.2, (G, K, T)),
        "ref_logps": logps - rng.normal(0, 0.3, (G, K, T)),
        "rewards": rng.normal(0, 2, (G, K)),
        "mask": np.arange(T) < lengths[..., None],
    }


class ListByName(collections.defaultdict):
    def __init__(self):
        super().__init__(list)


def stand_in(batch, **settings):
    """What the trainers read of `self`, on one process, with every extra of theirs turned off."""
    completions = [[1] * int(n) for n in batch["mask"].sum(-1).ravel()]
    prompts = [[1]] * len(completions)
    policies = {
        name: torch.tensor(batch[name].reshape(-1, T), requires_grad=name == "logps")
        for name in ("logps", "old_logps", "ref_logps")
    }
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            per_device_train_batch_size=len(prompts),
            gradient_checkpointing_kwargs=None,
            gradient_accumulation_steps=1,
            steps_per_generation=1,
            use_bias_correction_kl=False,
            delta=None,
            report_to=[],
        ),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            process_index=0,
            num_processes=1,
            sync_gradients=True,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False, policy="old_logps"),
        ref_model=SimpleNamespace(policy="ref_logps"),
        policies=policies,
        _generate=lambda prompts_: (prompts, completions, None, completions, None, {}, None, None),
        _calculate_rewards=lambda *_: torch.tensor(batch["rewards"].reshape(-1, 1)),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _metrics={"train": ListByName()},
        _logs=collections.defaultdict(list, rewards=ListByName(), extra=ListByName()),
        _pending_extra_logs=ListByName(),
        _pending_metrics=ListByName(),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        environment_factories=None,
        environments=None,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON_HIGH,
        importance_sampling_level="token",
        log_multimodal=False,
        loss_type="grpo",
        mask_truncated_completions=False,
        max_completion_length=MAX_COMPLETION_LENGTH,
        multi_objective_aggregation="sum_then_normalize",
        normalize_advantages=False,
        num_generations=K,
        num_iterations=2,  # so that the samples' own log-probs are kept
        off_policy_mask_threshold=None,
        pad_to_multiple_of=None,
        reward_clip_range=None,
        reward_func_names=["reward"],
        reward_funcs=[None],
        reward_weights=torch.ones(1, dtype=torch.float64),
        scale_rewards="group",
        tools=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    vars(trainer).update(settings)

    def log_probs(model, *_args, **_kwargs):
        logps = trainer.policies[model.policy]
        return logps, torch.zeros_like(logps), None

    trainer._get_per_token_logps_and_entropies = log_probs
    return trainer


def trl_value_and_grad(trainer_class, trainer):
    examples = [{"prompt": "?"}] * (G * K)
    inputs = trainer_class._generate_and_score_completions(trainer, examples)
    trainer.model.policy = "logps"
    loss = trainer_class._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    return loss.item(), trainer.policies["logps"].grad.numpy().reshape(G, K, T)


def our_value_and_grad(objective, batch, where=None):
    def loss(logps):
        others = (batch["old_logps"], batch["ref_logps"], batch["rewards"])
        return baselines.objective_loss(objective, logps, *others, mask=batch["mask"], where=where)

    return jax.value_and_grad(loss)(jnp.asarray(batch["logps"]))


def assert_same(ours, theirs, scale=1.0):
    np.testing.assert_allclose(ours[1] * scale, theirs[1], atol=1e-9)
    if scale == 1:
        np.testing.assert_allclose(ours[0], theirs[0], atol=1e-9)
    assert np.sum(np.abs(theirs[1])) > 0.1


def our_objective(name, **options):
    name = name.split()[0]
    if name == "dr_grpo":
        options["max_completion_length"] = MAX_COMPLETION_LENGTH
    return getattr(baselines, name)(epsilon=EPSILON, epsilon_high=EPSILON_HIGH, **options)


def grpo_trainer(batch, name, **settings):
    loss_type, level = SAME[name]
    scale = "none" if name == "dr_grpo" else "group"
    return stand_in(
        batch,
        loss_type=loss_type,
        importance_sampling_level=level,
        scale_rewards=scale,
        **settings,
    )


@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF])
@pytest.mark.parametrize("name", SAME)
def test_policy_gradients_are_those_of_trl(name, kl_coef, batch):
    theirs = trl_value_and_grad(GRPOTrainer, grpo_trainer(batch, name, beta=kl_coef))
    assert_same(our_value_and_grad(our_objective(name, kl_coef=kl_coef), batch), theirs)


@pytest.mark.parametrize("name", SAME)
def test_on_policy_too(name, batch):
    trainer = grpo_trainer(batch, name, num_iterations=1)  # TRL then keeps no old log-probs
    theirs = trl_value_and_grad(GRPOTrainer, trainer)
    ours = our_value_and_grad(our_objective(name), batch | {"old_logps": None})
    assert_same(ours, theirs)


def rloo_trainer(batch, **settings):
    trainer = stand_in(batch, **settings)
    generated = trainer._generate(None)
    trainer._generate = lambda prompts: (generated[0], generated[1], generated[3])
    return trainer


def test_rloo_is_that_of_trl(batch):
    theirs = trl_value_and_grad(RLOOTrainer, rloo_trainer(batch))
    assert_same(our_value_and_grad(our_objective("rloo"), batch), theirs)


def test_rloo_with_trl_s_penalty_is_rloo_on_rewards_less_the_penalty(batch):
    theirs = trl_value_and_grad(RLOOTrainer, rloo_trainer(batch, beta=KL_COEF))
    ratio = np.where(batch["mask"], batch["old_logps"] - batch["ref_logps"], 0).sum(-1)
    penalised = batch | {"rewards": batch["rewards"] - KL_COEF * ratio}
    assert_same(our_value_and_grad(our_objective("rloo"), penalised), theirs)


@pytest.mark.parametrize("name", [*SAME, "rloo"])
def test_completions_without_a_reward_are_left_out_as_in_trl(name, batch):
    """TRL gives them no advantage but counts them; here they don't count: a factor between."""
    where = np.ones((G, K), bool)
    where[0, 1] = where[1, 0] = where[1, 3] = where[2, 0] = where[2, 1] = where[2, 2] = False
    batch["rewards"] = np.where(where, batch["rewards"], np.nan)
    if name == "rloo":
        theirs = trl_value_and_grad(RLOOTrainer, rloo_trainer(batch))
    else:
        theirs = trl_value_and_grad(GRPOTrainer, grpo_trainer(batch, name))
    counted = where & (where.sum(-1) >= 2)[:, None]
    weights = batch["mask"].sum(-1) if name.startswith("dapo") else np.ones((G, K))
    scale = np.sum(weights * counted) / np.sum(weights)
    assert_same(our_value_and_grad(our_objective(name), batch, where), theirs, scale)


def test_the_names_that_are_answered_are_those_of_trl():
    """Today's, and those of earlier versions and of transformers that scripts still hold."""
    theirs = {f.name for kind in (GRPOConfig, ModelConfig, ScriptArguments) for f in fields(kind)}
    theirs |= set(inspect.signature(GRPOTrainer).parameters)
    assert set(TRL_NAMES) - theirs == {
        "max_prompt_length", "max_seq_length", "max_length", "max_new_tokens", "torch_dtype",
        "warmup_ratio", "logging_dir", "overwrite_output_dir", "chat_template_path",
    }  # fmt: skip
