"""google-tunix: the update of its GRPO learner's trainer, and its sampler."""

import itertools

import numpy as np
from ours import LEARNING_RATE


class Numbers:
    """A tokenizer whose words are the numbers of the tokens; nothing ends a text."""

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(str(int(token)) for token in ids)

    def bos_id(self):
        return None

    def eos_id(self):
        return -1

    def pad_id(self):
        return 0


def load(w, folder):
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType
    from workloads import ROPE_THETA

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    shape = {
        "num_layers": w.layers,
        "vocab_size": w.vocab,
        "embed_dim": w.width,
        "hidden_dim": w.feed_forward,
        "num_heads": w.heads,
        "head_dim": w.width // w.heads,
        "num_kv_heads": w.kv_heads,
        "rope_theta": ROPE_THETA,
        "norm_eps": 1e-6,
    }
    if w.family == "qwen2":
        from tunix.models.qwen2 import model, params

        config = model.ModelConfig(**shape, use_tied_embedding=True)
    else:
        from tunix.models.llama3 import model, params

        config = model.ModelConfig(**shape, weight_tying=True)
    loaded = params.create_model_from_safe_tensors(
        str(folder), config, mesh, dtype=jnp.dtype(w.dtype)
    )
    return loaded, mesh


def train(w, folder, device):
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.rl import rl_cluster
    from tunix.rl.common import compute_per_token_logps
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout
    from workloads import batch

    model, mesh = load(w, folder)
    role = rl_cluster.Role
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LEARNING_RATE))
    cluster = rl_cluster.RLCluster(
        actor=model,
        tokenizer=Numbers(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys((role.ACTOR, role.ROLLOUT, role.REFERENCE), mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optimizer, eval_every_n_steps=10**6, max_steps=10**6
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=w.t, max_prompt_length=w.p, kv_cache_size=w.p + w.t
            ),
        ),
    )
    grpo_learner.GRPOLearner(
        cluster,
        grpo_learner.GRPOConfig(num_generations=w.k, num_iterations=1, beta=0.0),
        reward_fns=lambda prompts, completions, **_: [0.0] * len(completions),
    )
    arrays, rows = batch(w), w.g * w.k
    rewards = arrays.rewards - arrays.rewards.mean(-1, keepdims=True)
    example = grpo_learner.TrainExample(
        prompt_ids=jnp.asarray(np.repeat(arrays.prompts, w.k, axis=0)),
        prompt_mask=jnp.ones((rows, w.p), jnp.int32),
        completion_ids=jnp.asarray(arrays.completions.reshape(rows, w.t)),
        completion_mask=jnp.asarray(arrays.mask.reshape(rows, w.t)),
        advantages=jnp.asarray(rewards / arrays.rewards.std(-1, keepdims=True)).reshape(-1),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )
    graph, state = nnx.split(cluster.actor_trainer.model)
    scored = jax.jit(
        lambda state: compute_per_token_logps(
            graph, state, example.prompt_ids, example.completion_ids, pad_id=0, eos_id=-1
        )
    )(state)
    scored = scored[0] if isinstance(scored, tuple) else scored

    def update():
        cluster.update_actor([example], None)
        jax.block_until_ready(nnx.state(cluster.actor_trainer.model))

    return update, jnp.sum(scored * example.completion_mask, axis=-1).tolist()


def rollout(w, folder, device):
    from tunix.generate.sampler import CacheConfig, Sampler
    from workloads import batch

    model, _ = load(w, folder)
    cache = CacheConfig(
        cache_size=w.p + w.t, num_layers=w.layers, num_kv_heads=w.kv_heads,
        head_dim=w.width // w.heads,
    )  # fmt: skip
    sampler = Sampler(model, Numbers(), cache)
    prompts = [Numbers().decode(row) for row in np.repeat(batch(w).prompts, w.k, axis=0)]
    seeds = itertools.count()

    def generate():
        out = sampler(
            prompts, max_generation_steps=w.t, max_prompt_length=w.p, temperature=1.0, top_p=1.0,
            seed=next(seeds),
        )  # fmt: skip
        assert sum(len(tokens) for tokens in out.tokens) == w.tokens

    return generate, None
