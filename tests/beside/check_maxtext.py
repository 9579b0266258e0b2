"""MaxText's example runs, learns, and gives MaxText's step the gradient of the plain identity."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core.spmd import logical_axis_rules
from identity import plain_gradient, same
from jax.flatten_util import ravel_pytree

folder = pathlib.Path(__file__).parents[2] / "experiments" / "in_your_code"
example = runpy.run_path(str(folder / "maxtext_step.py"))
K, P, BETA = example["K"], example["P"], example["BETA"]
data = example["groups"](jax.random.key(9))
rows = data["inputs"].shape[0]
data["ref_logps"] = jax.random.normal(jax.random.key(10), (rows, 1)) - 25.0
model = nnx.merge(example["graph"], example["state"]).model
graph, params, rest = nnx.split(model, nnx.Param, ...)
flat, unravel = ravel_pytree(params)


def logp_of_row(flat, tokens):  # one row alone, one token after the other, without any mask
    logits = nnx.merge(graph, unravel(flat), rest, copy=True)(
        tokens[None, :-1], jnp.arange(tokens.shape[0] - 1)[None], enable_dropout=False
    )[0]
    logps = [jax.nn.log_softmax(logits[t])[tokens[t + 1]] for t in range(P - 1, len(logits))]
    return sum(logps)


def loss(flat):
    return example["loss_fn"](
        nnx.merge(graph, unravel(flat), rest, copy=True), example["config"], data, None, None
    )[0]


with jax.set_mesh(example["mesh"]), logical_axis_rules(example["config"].logical_axis_rules):
    of_row = jax.jit(jax.value_and_grad(logp_of_row))
    tokens = jnp.concatenate([data["inputs"], data["targets"][:, -1:]], axis=1)
    logps, jacobian = (
        np.array(x, np.float64) for x in zip(*[of_row(flat, row) for row in tokens], strict=True)
    )
    found = jax.jit(jax.grad(loss))(flat)
by_group = [logps, *(np.asarray(data[x], np.float64)[:, 0] for x in ("ref_logps", "rewards"))]
same(
    found,
    plain_gradient(
        jacobian.reshape(-1, K, flat.size), *(x.reshape(-1, K) for x in by_group), beta=BETA
    ),
)
print(f"MaxText: the gradient of {flat.size} parameters is that of the identity")
