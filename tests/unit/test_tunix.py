"""GVPO in google-tunix: its real learner, sampler and trainer with our loss, on a tiny Llama.

What Tunix's trainer did to the parameters is compared with the gradient of `gvpo_loss`, from
log-probs that this file computes itself.
"""

import dataclasses
import functools
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rounding import last_bits

from gvpo_jax import gvpo_loss, gvpo_mse
from gvpo_jax.errors import UserError
from gvpo_jax.integrations.tunix import (
    NAME,
    centred_rewards,
    gvpo_config,
    gvpo_learner,
    gvpo_policy_loss,
    register_gvpo,
)

# All of Tunix 0.1.7 and of what it calls; none of ours.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")
    for message in (
        "'sharding' is deprecated, use 'out_sharding'",
        ".with mesh.. context manager has been deprecated",
        "Using deprecated _init_cache in Tunix sampler",
        "jax.interpreters.pxla.thread_resources is deprecated",
        "'.value' access is now deprecated",
        "optax.global_norm is deprecated",
    )
]

PAD, START, END = 0, 1, 2
K, LIMIT, BETA, RATE, TEMPERATURE = 4, 8, 0.3, 0.5, 1.25
BATCHES = [["abc", "xy"], ["q", "rs"], ["ab", "b"]]


class Letters:
    """A tokenizer: a letter is one of 13 tokens."""

    def encode(self, text, **_):
        return [3 + ord(letter) % 13 for letter in text]

    def decode(self, ids, **_):
        return "".join(chr(ord("a") + int(token)) for token in ids)

    def bos_id(self):
        return START

    def eos_id(self):
        return END

    def pad_id(self):
        return PAD


def reward(prompts, completions, **_):
    """Some number of the text, not the same in every group."""
    return [0.3 * text.count("e") - 0.1 * len(text) for text in completions]


def modules(*names: str) -> SimpleNamespace:
    found = {name.split(".")[-1]: importlib.import_module(f"tunix.{name}") for name in names}
    return SimpleNamespace(**found)


@pytest.fixture(scope="module")
def tunix():
    """Tunix, imported here because the import changes a setting of Flax, which is put back."""
    before = flax.config.flax_always_shard_variable
    strict = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "allow")  # Tunix's sampler runs in a thread
    found = modules(
        "rl.rl_cluster",
        "rl.common",
        "rl.utils",
        "rl.function_registry",
        "rl.grpo.grpo_learner",
        "rl.rollout.base_rollout",
        "models.llama3.model",
    )
    flax.config.update("flax_always_shard_variable", False)  # the import does so only once
    yield found
    jax.config.update("jax_numpy_rank_promotion", strict)
    flax.config.update("flax_always_shard_variable", before)


def tiny_llama(tunix, seed: int, mesh) -> nnx.Module:
    """One layer of random weights on a mesh; it never samples padding."""

    class Tiny(tunix.model.Llama3):
        def __call__(self, input_tokens, positions, cache, attention_mask):
            logits, cache = super().__call__(input_tokens, positions, cache, attention_mask)
            return logits.at[..., PAD].set(-1e9), cache

    shape = {"embed_dim": 16, "hidden_dim": 32, "num_heads": 2, "head_dim": 8, "num_kv_heads": 1}
    config = tunix.model.ModelConfig(
        num_layers=1, vocab_size=16, rope_theta=10_000, norm_eps=1e-5, **shape
    )
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: Tiny(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    generator = np.random.default_rng(seed)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def weights(x):
        values = np.ones(x.shape) if len(x.shape) == 1 else 0.4 * generator.normal(size=x.shape)
        return jax.device_put(jnp.asarray(values, jnp.float32), everywhere)

    return nnx.merge(graph, jax.tree.map(weights, state))


def make_cluster(tunix, *, reference=True, sampling=None, **training):
    axes = {"axis_types": (AxisType.Auto,) * 2, "devices": jax.devices()[:2]}
    mesh = jax.make_mesh((2, 1), ("fsdp", "tp"), **axes)
    lib, role = tunix.rl_cluster, tunix.rl_cluster.Role
    return lib.RLCluster(
        actor=tiny_llama(tunix, 0, mesh),
        reference=tiny_llama(tunix, 1, mesh) if reference else None,
        tokenizer=Letters(),
        cluster_config=lib.ClusterConfig(
            role_to_mesh=dict.fromkeys((role.ACTOR, role.ROLLOUT, role.REFERENCE), mesh),
            training_config=lib.RLTrainingConfig(
                **{"actor_optimizer": optax.sgd(RATE), "eval_every_n_steps": 100, **training}
            ),
            rollout_config=tunix.base_rollout.RolloutConfig(
                **{
                    "max_tokens_to_generate": LIMIT,
                    "max_prompt_length": 4,
                    "kv_cache_size": 16,
                    "temperature": TEMPERATURE,
                    **(sampling or {}),
                }
            ),
        ),
    )


@dataclasses.dataclass
class Update:
    """One call of Tunix's trainer: its examples, and the policy's parameters around it."""

    examples: list[Any]
    before: nnx.State
    after: nnx.State


def train(cluster, learner, batches) -> list[Update]:
    updates = []
    update_actor = cluster.update_actor

    def parameters():
        return jax.tree.map(np.asarray, nnx.state(cluster.actor_trainer.model, nnx.Param))

    def recorded(examples, *arguments):
        before = parameters()
        update_actor(examples, *arguments)
        updates.append(Update(list(examples), before, parameters()))

    cluster.update_actor = recorded
    learner.train([{"prompts": np.array(prompts)} for prompts in batches])
    return updates


@pytest.fixture(scope="module")
def run(tunix):
    """Three updates of a GRPOLearner, and everything that went in and out."""
    cluster = make_cluster(tunix, max_steps=len(BATCHES))
    config = gvpo_config(beta=BETA, num_generations=K)
    texts = []

    def recording(prompts, completions, **columns):
        texts.append((list(prompts), list(completions)))
        return reward(prompts, completions, **columns)

    learner = gvpo_learner(cluster, config, recording)
    reference = nnx.state(cluster.inference_worker.get_model("reference"), nnx.Param)
    updates = train(cluster, learner, BATCHES)
    logger = cluster.actor_trainer.metrics_logger
    history = {
        name: logger.get_metric_history("actor", name, "train")
        for name in ("loss", "gvpo_mse", "kl", "log_ratio")
    }
    model = cluster.actor_trainer.model
    return SimpleNamespace(
        cluster=cluster,
        learner=learner,
        config=config,
        texts=texts,
        updates=updates,
        history=history,
        graph=nnx.split(model)[0],
        reference=reference,
    )


def our_logps(graph, state, example) -> jax.Array:
    """Summed log-probs [b] of completions that end with END or at the limit, scored here."""
    tokens = jnp.concatenate([example.prompt_ids, example.completion_ids], axis=1)
    ended = example.completion_ids == END
    lengths = jnp.where(ended.any(-1), ended.argmax(-1) + 1, LIMIT)
    width = example.prompt_ids.shape[1]
    completion = jnp.arange(LIMIT)[None] < lengths[:, None]
    real = jnp.concatenate([example.prompt_ids != PAD, completion], axis=1)
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    attend = jnp.tril(jnp.ones((1, *[tokens.shape[1]] * 2), bool)) & real[:, None, :]
    logits, _ = nnx.merge(graph, state)(tokens, positions, None, attend)
    logps = jax.nn.log_softmax(logits[:, width - 1 : -1] / TEMPERATURE)
    chosen = jnp.take_along_axis(logps, tokens[:, width:, None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(completion, chosen, 0), axis=1)


def grouped(x):
    return jnp.reshape(jnp.asarray(x), (-1, K))


def our_loss(state, graph, reference, example, rewards) -> jax.Array:
    """`gvpo_loss` as a function of the policy's parameters."""
    logps = grouped(our_logps(graph, state, example))
    reference = grouped(our_logps(graph, reference, example))
    return gvpo_loss(logps, reference, grouped(rewards), beta=BETA)


def assert_close(left, right, *, rtol, atol):
    left, right = jax.tree.leaves(left), jax.tree.leaves(right)
    assert len(left) == len(right) > 5
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def test_three_updates_follow_the_gradient_of_gvpo_loss(run):
    assert len(run.updates) == len(BATCHES)
    gradient_of = jax.jit(jax.value_and_grad(our_loss), static_argnums=1)
    for step, update in enumerate(run.updates):
        (example,) = update.examples
        rewards = jnp.asarray(reward(*run.texts[step]))
        value, gradient = gradient_of(update.before, run.graph, run.reference, example, rewards)
        np.testing.assert_allclose(run.history["loss"][step], value, rtol=1e-5, atol=1e-5)
        moved = jax.tree.map(lambda a, b: (a - b) / RATE, update.before, update.after)
        atol = last_bits((update.before, update.after)) / RATE
        assert_close(moved, gradient, rtol=1e-5, atol=atol)
        assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 1e-2


def test_the_rows_of_a_prompt_stand_side_by_side(run):
    for update, prompts, (asked, _) in zip(run.updates, BATCHES, run.texts, strict=True):
        rows = np.asarray(update.examples[0].prompt_ids)
        expected = [[START, *Letters().encode(prompt)] for prompt in prompts]
        assert [list(row[row != PAD]) for row in rows] == [e for e in expected for _ in range(K)]
        assert asked == [prompt for prompt in prompts for _ in range(K)]


def test_end_tokens_count_where_they_were_sampled(run):
    """Tunix's sampler drops them; a completion that was cut at the limit has none."""
    short, full = 0, 0
    for update, (_, texts) in zip(run.updates, run.texts, strict=True):
        (example,) = update.examples
        ids, mask = np.asarray(example.completion_ids), np.asarray(example.completion_mask)
        for row, counts, text in zip(ids, mask, texts, strict=True):
            sampled = [ord(letter) - ord("a") for letter in text]
            short, full = short + (len(sampled) < LIMIT), full + (len(sampled) == LIMIT)
            assert list(row[counts]) == sampled + [END] * (len(sampled) < LIMIT)
            assert not counts[len(sampled) + 1 :].any()
    assert short >= 3
    assert full >= 3


def test_metrics_are_those_of_the_batch(run):
    (example,), before = run.updates[-1].examples, run.updates[-1].before
    score = jax.jit(our_logps, static_argnums=0)
    logps, reference = (score(run.graph, state, example) for state in (before, run.reference))
    rewards = grouped(reward(*run.texts[-1]))
    mse = gvpo_mse(grouped(logps), grouped(reference), rewards, beta=BETA)
    np.testing.assert_allclose(run.history["gvpo_mse"][-1], mse, rtol=1e-4)
    np.testing.assert_allclose(run.history["log_ratio"][-1], jnp.mean(logps - reference), rtol=1e-4)
    assert run.history["kl"][-1] > 0


def test_micro_batches_of_whole_groups_make_the_same_update(tunix, run):
    """Samples are those of the other run: all prompts of a batch in one call of the sampler."""
    sizes = {"mini_batch_size": 2, "train_micro_batch_size": 1, "rollout_micro_batch_size": 2}
    cluster = make_cluster(tunix, max_steps=1, compute_logps_micro_batch_size=2, **sizes)
    learner = gvpo_learner(cluster, gvpo_config(beta=BETA, num_generations=K), reward)
    first, second = train(cluster, learner, BATCHES[:1])
    whole = run.updates[0].examples[0].completion_ids
    parts = [update.examples[0].completion_ids for update in (first, second)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert_close(first.after, first.before, rtol=0, atol=0)  # nothing before the second micro-batch
    assert_close(second.after, run.updates[0].after, rtol=1e-6, atol=1e-6)


def loss_fn(run, example, **changes):
    """Our policy loss as Tunix calls it, on the first update's parameters: value and gradient."""
    config = SimpleNamespace(**{**vars(run.config), **changes})

    def loss(state):
        model = nnx.merge(run.graph, state)
        value, metrics = gvpo_policy_loss(model, example, config, PAD, END)
        return value, metrics

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(run.updates[0].before)


def test_clipping_and_off_policy_settings_have_no_influence(run):
    (example,) = run.updates[0].examples
    plain = loss_fn(run, example)
    shape = example.completion_ids.shape
    noise = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    example = example.replace(old_per_token_logps=noise, sampler_is_weights=jnp.exp(noise))
    changes = {"epsilon": 1e-9, "epsilon_high": 1e-9, "epsilon_c": 3.0, "loss_algo": "gspo-token"}
    changes |= {"loss_agg_mode": "token-mean", "kl_loss_mode": "mse_kl", "kl_clamp_value": 1e-3}
    jax.tree.map(np.testing.assert_array_equal, plain, loss_fn(run, example, **changes))


def test_the_learner_refuses_sequence_packing(tunix):
    cluster = make_cluster(tunix, max_seq_token_per_tpu=64)
    with pytest.raises(UserError, match=r"packing tears groups apart.*max_seq_token_per_tpu"):
        gvpo_learner(cluster, gvpo_config(num_generations=K), reward)


def test_the_loss_refuses_packed_sequences(tunix, run):
    examples = iter([run.updates[0].examples])
    ((packed,),) = tunix.utils.pack_sequences(examples, max_token_budget=200)
    with pytest.raises(UserError, match="packing tears groups apart"):
        loss_fn(run, packed)


def test_rows_that_are_no_whole_groups_are_refused(run):
    (example,) = run.updates[0].examples
    with pytest.raises(UserError, match=r"7 completions do not divide.*num_generations=4"):
        loss_fn(run, jax.tree.map(lambda x: x[:7], example))
    with pytest.raises(UserError, match=r"8 completions do not divide.*num_generations=3"):
        loss_fn(run, example, num_generations=3)
    with pytest.raises(UserError, match="7 completions do not divide"):
        centred_rewards(np.zeros(7), K)


def test_groups_of_two_prompts_change_nothing(run):
    (example,) = run.updates[0].examples
    (value, _), gradient = loss_fn(run, jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), example))
    assert np.isnan(value)
    assert all(not np.any(g) for g in jax.tree.leaves(gradient))


def test_a_batch_without_reference_or_with_padding_as_the_end_is_refused(run):
    (example,) = run.updates[0].examples
    with pytest.raises(UserError, match="no reference log-probs: beta must be > 0"):
        loss_fn(run, example.replace(ref_per_token_logps=None))
    model = nnx.merge(run.graph, run.updates[0].before)
    with pytest.raises(UserError, match="token 2 both pads and ends"):
        gvpo_policy_loss(model, example, run.config, END, END)


def test_the_config_names_our_loss_and_estimator(tunix):
    config = gvpo_config(beta=0.2, num_generations=3, num_iterations=2)
    assert isinstance(config, tunix.grpo_learner.GRPOConfig)
    assert (config.beta, config.num_generations, config.num_iterations) == (0.2, 3, 2)
    registry = tunix.function_registry
    assert registry.get_policy_loss_fn(config.policy_loss_fn) is gvpo_policy_loss
    assert registry.get_advantage_estimator(config.advantage_estimator) is centred_rewards
    with pytest.raises(UserError, match="beta must be > 0, got 0"):
        gvpo_config(beta=0)
    with pytest.raises(UserError, match="at least 2 completions, got num_generations=1"):
        gvpo_config(num_generations=1)


def test_the_estimator_keeps_the_unit_of_the_reward(tunix):
    rewards = np.array([0.0, 1, 1, 2, 5, 5, 5, 9])
    expected = [-1, 0, 0, 1, -1, -1, -1, 3]
    np.testing.assert_allclose(centred_rewards(rewards, 4), expected)
    np.testing.assert_allclose(centred_rewards(10 * rewards, 4), 10 * np.array(expected))
    theirs = tunix.function_registry.get_advantage_estimator("grpo")
    np.testing.assert_allclose(theirs(10 * rewards, 4), theirs(rewards, 4), atol=1e-4)


def fake_cluster(tunix, *, pad=PAD, own=True, **sampling):
    """Only what the learner's checks look at."""
    own_rollout = importlib.import_module("tunix.rl.rollout.vanilla_rollout").VanillaRollout
    rollout = object.__new__(own_rollout) if own else SimpleNamespace()
    rollout.pad_id, rollout.eos_id = lambda: pad, lambda: END
    config = tunix.base_rollout.RolloutConfig(temperature=1.0)
    return SimpleNamespace(
        rollout=rollout,
        cluster_config=SimpleNamespace(
            training_config=SimpleNamespace(max_seq_token_per_tpu=None),
            rollout_config={
                tunix.rl_cluster.Mode.TRAIN: dataclasses.replace(config, **sampling),
                tunix.rl_cluster.Mode.EVAL: dataclasses.replace(config, temperature=0.0),
            },
        ),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pad": END}, "token 2 both pads and ends a completion.*pad token of its own"),
        ({"eos_tokens": [5, PAD]}, "token 0 both pads and ends"),
        ({"eos_tokens": [END, 5]}, "does not tell which of several end tokens"),
    ],
)
def test_end_tokens_that_cannot_be_scored_are_refused(tunix, settings, message):
    with pytest.raises(UserError, match=message):
        gvpo_learner(fake_cluster(tunix, **settings), gvpo_config(), reward)


@pytest.mark.parametrize("setting", [{"top_p": 0.9}, {"top_k": 5}, {"temperature": 0.0}])
def test_sampling_that_cuts_the_support_is_warned_of(tunix, monkeypatch, setting):
    monkeypatch.setattr(tunix.grpo_learner, "GRPOLearner", lambda *_: "learner")
    cluster = fake_cluster(tunix, own=False, **setting)
    cluster.actor_trainer = SimpleNamespace(with_rl_metrics_to_log=lambda _: None)
    with pytest.warns(UserWarning, match="do not cover the reference"):
        assert gvpo_learner(cluster, gvpo_config(), reward) == "learner"


def test_a_cluster_without_reference_and_a_grpo_config_are_refused(tunix, run):
    with pytest.raises(UserError, match="give RLCluster a reference model"):
        gvpo_learner(make_cluster(tunix, reference=False), gvpo_config(), reward)
    with pytest.raises(UserError, match=r"make the config with gvpo_config\(\)"):
        gvpo_learner(run.cluster, tunix.grpo_learner.GRPOConfig(), reward)


# The main branch after 0.1.7: the loss gets more options and returns a sum with its divisor.


@flax.struct.dataclass
class WeightedMetric:
    unreduced_sum: jax.Array
    denominator: jax.Array
    eps: float | None = flax.struct.field(default=None, pytree_node=False)
    min_denom: float | None = flax.struct.field(default=None, pytree_node=False)


@flax.struct.dataclass
class LossOutput:
    primary_loss: WeightedMetric
    aux_metrics: dict[str, Any]


class Registry(ModuleType):
    """Functions by category and name, with the newer version's doors."""

    def __init__(self):
        super().__init__("tunix.rl.function_registry")
        self.functions = {"policy_loss_fn": {}, "advantage_estimator": {}}
        self.default_registry = SimpleNamespace(list_functions=self.names)

    def names(self, category: str) -> list[str]:
        return list(self.functions[category])

    def register_policy_loss_fn(self, name: str):
        return lambda f: self.functions["policy_loss_fn"].setdefault(name, f)

    def register_advantage_estimator(self, name: str):
        return lambda f: self.functions["advantage_estimator"].setdefault(name, f)


class Table(nnx.Module):
    """A policy that is its own log-probs [b, t]."""

    def __init__(self, logps):
        self.logps = nnx.Param(logps)


def newer_token_logps(
    graphdef, state, prompt_tokens, completion_tokens, pad_id, eos_id, images=None,
    stop_gradient=True, return_entropy=False, segment_ids=None, segment_positions=None,
    temperature=1.0, chunk_size=0, routed_experts=None, token_mask=None,
):  # fmt: skip
    assert (chunk_size, temperature, stop_gradient) == (16, TEMPERATURE, False)
    return nnx.merge(graphdef, state).logps[...]


@pytest.fixture
def newer(monkeypatch):
    """A Tunix of the newer interface, as far as we use it."""
    registry = Registry()

    @dataclasses.dataclass(kw_only=True)
    class GRPOConfig:
        advantage_estimator: str = "grpo"
        policy_loss_fn: str = "grpo"
        reward_manager: str = "sequence-level"
        num_generations: int = 2
        num_iterations: int = 1
        beta: float = 0.04
        temperature: float | None = None
        use_rollout_logps: bool = True

        def __post_init__(self):
            for category in ("policy_loss_fn", "advantage_estimator"):
                if getattr(self, category) not in registry.names(category):
                    raise ValueError(f"{category} must be registered")

    contents = {
        "tunix.rl.function_registry": registry,
        "tunix.rl.grpo.grpo_learner": {"GRPOConfig": GRPOConfig, "GRPOLearner": object},
        "tunix.rl.common": {"compute_per_token_logps": newer_token_logps},
        "tunix.rl.rollout.vanilla_rollout": {"VanillaRollout": object},
        "tunix.sft.utils": {"LossOutput": LossOutput, "WeightedMetric": WeightedMetric},
    }
    found = {}
    for name, content in contents.items():
        found[name] = content if isinstance(content, ModuleType) else ModuleType(name)
        if isinstance(content, dict):
            vars(found[name]).update(content)
        monkeypatch.setitem(sys.modules, name, found[name])
    return found


def newer_example(groups: int):
    rows = groups * K
    generator = np.random.default_rng(3)
    lengths = 1 + np.arange(rows) % 5
    logps, ref = generator.normal(size=(2, rows, 5)).astype(np.float32) - 2
    return jnp.asarray(logps), SimpleNamespace(
        prompt_ids=jnp.repeat(jnp.arange(3 * groups).reshape(groups, 3), K, axis=0),
        completion_ids=jnp.ones((rows, 5), jnp.int32),
        completion_mask=jnp.asarray(np.arange(5)[None] < lengths[:, None]),
        ref_per_token_logps=jnp.asarray(ref),
        advantages=jnp.asarray(generator.normal(size=rows), jnp.float32),
        old_per_token_logps=None,
        segment_ids=None,
        routed_experts=None,
    )


def newer_loss(logps, example, **options):
    config = gvpo_config(beta=BETA, num_generations=K)
    config.temperature = TEMPERATURE
    options = {"compute_logps_chunk_size": 16, **options}
    return gvpo_policy_loss(
        Table(logps), example, algo_config=config, pad_id=PAD, eos_id=END, **options
    )


def rows_of(example, rows):
    return SimpleNamespace(
        **{name: None if x is None else x[rows] for name, x in vars(example).items()}
    )


@pytest.mark.usefixtures("newer")
def test_the_newer_interface_gets_a_sum_and_its_divisor():
    """Divided over micro-batches, as the newer trainer does, it is the whole batch's gradient."""
    logps, example = newer_example(groups=6)

    def expected(logps):
        masked = [jnp.where(example.completion_mask, x, 0).sum(-1) for x in (logps, ref)]
        return gvpo_loss(*map(grouped, masked), grouped(example.advantages), beta=BETA)

    def total(logps, rows):
        primary = newer_loss(logps, rows_of(example, rows)).primary_loss
        return primary.unreduced_sum, primary.denominator

    ref = example.ref_per_token_logps
    output = jax.jit(lambda logps: newer_loss(logps, example))(logps)
    assert isinstance(output, LossOutput)
    primary = output.primary_loss
    assert primary.denominator == 6
    value, gradient = jax.jit(jax.value_and_grad(expected))(logps)
    np.testing.assert_allclose(primary.unreduced_sum / primary.denominator, value, rtol=1e-5)
    assert {"kl", "pg_clipfrac", "gvpo_mse"} <= output.aux_metrics.keys()
    gradients, counts = [], []
    for rows in (slice(0, 2 * K), slice(2 * K, None)):  # two groups, then four
        part = functools.partial(total, rows=rows)
        grad, count = jax.jit(jax.grad(part, has_aux=True))(logps[rows])
        gradients.append(grad)
        counts.append(count)
    np.testing.assert_allclose(np.concatenate(gradients) / sum(counts), gradient, atol=1e-6)


def test_an_unknown_interface_is_named(newer, monkeypatch):
    logps, example = newer_example(groups=1)
    with pytest.raises(UserError, match=r"google-tunix .* \(it calls losses with shiny\)"):
        newer_loss(logps, example, shiny=1)
    newer_loss(logps, example, shiny=None)
    monkeypatch.setattr(newer["tunix.rl.common"], "compute_per_token_logps", lambda model: model)
    with pytest.raises(UserError, match=r"has no .*completion_tokens.*install google-tunix==0.1.7"):
        register_gvpo()
    monkeypatch.delattr(newer["tunix.rl.common"], "compute_per_token_logps")
    with pytest.raises(UserError, match="has no attribute 'compute_per_token_logps'") as raised:
        register_gvpo()
    assert "\n" not in str(raised.value)


def test_registering_again_changes_nothing(newer):
    register_gvpo()
    register_gvpo()
    functions = newer["tunix.rl.function_registry"].functions
    assert functions["policy_loss_fn"] == {NAME: gvpo_policy_loss}
    assert functions["advantage_estimator"] == {NAME: centred_rewards}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("tunix", 'google-tunix is missing: pip install "gvpo-jax[tunix]"'),
        ("qwix", 'google-tunix needs qwix: pip install "gvpo-jax[tunix]"'),
        ("tunix.rl.grpo", "is not as gvpo-jax knows it (tunix.rl.grpo is not there): "),
    ],
)
def test_a_missing_package_is_one_line(monkeypatch, missing, message):
    def import_module(name):
        raise ModuleNotFoundError(f"{missing} is not there", name=missing)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(UserError) as raised:
        gvpo_config()
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
