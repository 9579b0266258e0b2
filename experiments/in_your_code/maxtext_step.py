"""GVPO in MaxText: its config, mesh, model, optimizer and train step, with the loss replaced."""

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train
from maxtext.utils import sharding, train_utils

from gvpo_jax import group, gvpo_loss, gvpo_mse

G, K, P, S, V, BETA = 8, 8, 3, 10, 32, 1.0  # prompts, completions, lengths, vocabulary, beta
config = pyconfig.initialize(
    run_name="gvpo", enable_checkpointing=False, log_config=False, skip_jax_distributed_system=True,
    hardware="cpu", dtype="float32", per_device_batch_size=G * K / jax.device_count(), steps=100,
    max_target_length=S, vocab_size=V, base_emb_dim=64, base_mlp_dim=128, base_num_query_heads=4,
    base_num_kv_heads=2, head_dim=16, base_num_decoder_layers=2, learning_rate=1e-3,
)  # fmt: skip


def sequence_logps(model, data):  # [g * k, s] -> [g * k, 1]: sums over the completions' tokens
    logps = jax.nn.log_softmax(model(data["inputs"], data["inputs_position"], enable_dropout=False))
    logps = jnp.take_along_axis(logps, data["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(logps, axis=-1, where=data["targets_segmentation"] != 0, keepdims=True)


def loss_fn(model, config, data, dropout_rng, params, sparsity_state=None, is_train=True):
    rows = sequence_logps(model, data), data["ref_logps"], data["rewards"]
    arrays = [group(x[:, 0], K) for x in rows]  # [g, k]
    nnx.pop(model, nnx.Intermediate)
    logged = {"xent_sum": gvpo_mse(*arrays, beta=BETA), "total_weights": 1}  # MaxText's lm_loss
    return gvpo_loss(*arrays, beta=BETA), logged | {"intermediate_outputs": {}, "moe_lb_loss": 0.0}


def groups(key):  # even tokens are right; any samples do that cover the reference, here uniform
    tokens = jax.random.randint(key, (G, K, S + 1), 0, V)
    tokens = tokens.at[..., :P].set(tokens[:, :1, :P]).reshape(G * K, S + 1)  # a group's prompt
    places = jnp.tile(jnp.arange(S), (G * K, 1))
    data = {"inputs": tokens[:, :-1], "inputs_position": places, "targets": tokens[:, 1:]}
    data |= {"rewards": jnp.sum(1.0 - tokens[:, P:] % 2, axis=-1, keepdims=True)}
    return data | {"targets_segmentation": jnp.where(places < P - 1, 0, 1)}  # 1: is trained on


train.loss_fn = loss_fn  # what MaxText's train_step differentiates
_, _, shardings, model, mesh, *_, state = train_utils.setup_train_loop(config, None)
reference, (graph, state) = nnx.clone(model), nnx.split(state)
rows = sharding.get_input_data_sharding(config, mesh)
step = train_utils.jit_train_step(config, graph, state, shardings, rows, train.train_step, None)
score, losses = nnx.jit(sequence_logps), []
with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
    for key in jax.random.split(jax.random.key(0), config.steps):
        data = groups(key)
        data["ref_logps"] = score(reference, data)
        state, metrics = step(state, jax.device_put(data, rows))
        losses.append(float(metrics["scalar"]["learning/lm_loss"]))
before, after = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
print(f"gvpo_mse: before {before:.3f}, after {after:.3f}")
assert after < before / 3
