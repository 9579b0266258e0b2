"""GVPO in EasyDeL: its GRPO trainer samples, rewards and logs; the loss in its step is replaced."""

import functools
import tempfile

import easydel as ed
import jax
import jax.numpy as jnp
from datasets import Dataset
from easydel.infra.loss_utils import LossMetrics
from easydel.trainers.group_relative_policy_optimization._fn import get_per_token_logps
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from gvpo_jax import group, gvpo_loss, gvpo_mse


def gvpo_step(state, batch, *, k, beta):
    prompts, prompts_seen = (jnp.repeat(batch[x], k, axis=0) for x in ("prompt_ids", "prompt_mask"))
    tokens = jnp.concatenate([prompts, batch["completion_ids"]], axis=1)
    seen = jnp.concatenate([prompts_seen, batch["completion_mask"]], axis=1)

    def loss_fn(params):
        logps = get_per_token_logps(state.merge(params), tokens, seen, prompts.shape[1])
        logps, ref_logps = (
            jnp.sum(x, axis=-1, where=batch["completion_mask"] != 0)  # sums over tokens, not means
            for x in (logps, batch["ref_per_token_logps"])
        )
        arrays = [group(x, k) for x in (logps, ref_logps, batch["advantages"])]  # [g, k]
        return gvpo_loss(*arrays, beta=beta), LossMetrics(loss=gvpo_mse(*arrays, beta=beta))

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.graphstate)
    return state.apply_gradients(grads=grads), metrics


class GVPOTrainer(ed.GRPOTrainer):
    def configure_functions(self):
        functions = super().configure_functions()
        step = functools.partial(gvpo_step, k=self.num_generations, beta=self.arguments.beta)
        functions.sharded_training_step_function = ed.ejit(
            step, donate_argnums=0, out_shardings=(self.state_shardings, None)
        )
        self._train_shared_fn_static_args = ()
        return functions

    def on_step_end(self, state, metrics, step):
        losses.append(float(metrics.loss))
        return super().on_step_end(state, metrics, step)


def even_digits(prompts, completions, **columns):
    return [sum(x in "02468" for x in completion) for completion in completions]


losses, words = [], ["<pad>", "<eos>", *"0123456789"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
)
config = ed.Qwen2Config(
    vocab_size=12, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
numbers = {"dtype": jnp.float32, "param_dtype": jnp.float32}
model = ed.Qwen2ForCausalLM(config, **numbers, rngs=nnx.Rngs(0)).shard_model()
model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1)
arguments = ed.GRPOConfig(
    beta=1.0, num_generations=8, top_k=12, scale_rewards="none", learning_rate=3e-3,
    max_prompt_length=3, max_completion_length=8, total_batch_size=8, max_training_steps=12,
    skip_apply_chat_template=True, use_esurge_generation=False, use_wandb=False,
    save_directory=tempfile.mkdtemp(), do_last_save=False,
)  # fmt: skip
rows = Dataset.from_dict({"prompt": [f"{number:03}" for number in range(96)]})
GVPOTrainer(arguments, model, even_digits, rows, processing_class=tokenizer).train()
print(f"gvpo_mse: before {losses[0]:.3f}, after {losses[-1]:.3f}")
assert losses[-1] < losses[0] / 4
