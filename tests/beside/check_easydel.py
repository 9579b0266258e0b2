"""EasyDeL's example runs, learns, and its step takes the gradient of the plain identity."""

import pathlib
import runpy

import easydel as ed
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from identity import plain_gradient, same
from jax.flatten_util import ravel_pytree

folder = pathlib.Path(__file__).parents[2] / "experiments" / "in_your_code"
example = runpy.run_path(str(folder / "easydel_trainer.py"))
G, K, BETA, RATE = 2, 4, 0.5, 1e3  # a long step: its rounding does not count
PROMPTS = [[0, 3], [5, 6]]  # the first is padded on the left
LENGTHS = [3, 1, 2, 3, 3, 2, 1, 1]  # of the completions, which the end token ends
tokens = jax.random.randint(jax.random.key(1), (G * K, 3), 2, 12)
mask = jnp.arange(3) < jnp.array(LENGTHS)[:, None]
batch = {
    "prompt_ids": jnp.array(PROMPTS),
    "prompt_mask": jnp.array([[0, 1], [1, 1]]),
    "completion_ids": jnp.where(mask, tokens, 0),
    "completion_mask": mask.astype(jnp.int32),
    "ref_per_token_logps": jax.random.normal(jax.random.key(2), (G * K, 3)) - 2.5,
    "advantages": jax.random.normal(jax.random.key(3), (G * K,)),
}
example["config"].attn_dtype = jnp.float32  # by default attention rounds to bfloat16
model = ed.Qwen2ForCausalLM(example["config"], **example["numbers"], rngs=nnx.Rngs(4))
state = model.shard_model().to_state().init_tx(optax.sgd(RATE))
flat, unravel = ravel_pytree(state.graphstate)


def logp_of_row(flat, prompt, completion):  # one row alone, without padding or mask
    row = jnp.concatenate([prompt, completion])
    logits = state.merge(unravel(flat))(input_ids=row[None], attention_mask=row[None] * 0 + 1)
    logps = jax.nn.log_softmax(logits.logits[0])
    return sum(logps[t - 1, row[t]] for t in range(len(prompt), len(row)))


of_row = jax.jit(jax.value_and_grad(logp_of_row))
logps, jacobian = [], []
with state.model.mesh:
    for row, length in enumerate(LENGTHS):
        prompt = jnp.array([token for token in PROMPTS[row // K] if token])
        value, gradient = of_row(flat, prompt, tokens[row, :length])
        logps.append(value)
        jacobian.append(gradient)
    after, metrics = example["gvpo_step"](state, batch, k=K, beta=BETA)
found = (flat - ravel_pytree(after.graphstate)[0]) / RATE
ref_logps = np.sum(np.asarray(batch["ref_per_token_logps"], np.float64), axis=1, where=mask)
by_group = [
    np.asarray(x, np.float64).reshape(G, K) for x in (logps, ref_logps, batch["advantages"])
]
wanted = plain_gradient(np.array(jacobian, np.float64).reshape(G, K, -1), *by_group, beta=BETA)
same(found, wanted)
print(f"EasyDeL: the gradient of {flat.size} parameters is that of the identity")
