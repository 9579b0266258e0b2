"""How evenly a batch's tokens fall on the experts of a mixture, and the loss that evens it out.

Every token that goes through the routers counts once: those of a group's prompt, which is computed
once for all its completions, and of each completion all but the last, which no layer is given.
Padding and completions without a reward do not count.
Axes: l layers with experts, e experts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gvpo_jax.data.batch import Batch
from gvpo_jax.logprobs import completion_mask
from gvpo_jax.ops.experts import Routing


class Load(NamedTuple):
    """Sums over tokens.

    Attributes:
        sent: how many each expert was sent, `[l, e]`.
        likely: the routers' probabilities, `[l, e]`.
        tokens: how many there are, a scalar.
    """

    sent: jax.Array
    likely: jax.Array
    tokens: jax.Array


def counted_tokens(batch: Batch, parts: int = 1) -> tuple[jax.Array, jax.Array]:
    """What each token of the prompts, `[g, 1, p]`, and completions, `[g, k, t - 1]`, counts for.

    parts: of a group, each of which computes its prompt again.
    """
    p, t = batch.prompts.shape[1], batch.completions.shape[2]
    trained = jnp.any(batch.valid, axis=1, keepdims=True)[..., None]
    prompts = completion_mask(batch.prompt_lengths, p)[:, None] & trained
    completions = completion_mask(jnp.maximum(batch.lengths - 1, 0), t - 1)
    return prompts / parts, (completions & batch.valid[..., None]).astype(jnp.float32)


def load_of(routings: Sequence[Routing], counted_gkt: jax.Array) -> Load:
    """The load by the routing of every layer, of tokens that count for so much."""

    def of_layer(routing: Routing) -> tuple[jax.Array, jax.Array]:
        e = routing.likely.shape[-1]
        goes_to = routing.chosen[..., None] == jnp.arange(e)[(None,) * routing.chosen.ndim]
        counted = counted_gkt[..., None]
        sent = jnp.sum(jnp.sum(goes_to, axis=-2) * counted, axis=(0, 1, 2))
        return sent, jnp.sum(routing.likely * counted, axis=(0, 1, 2))

    sent, likely = zip(*map(of_layer, routings), strict=True)
    return Load(jnp.stack(sent), jnp.stack(likely), jnp.sum(counted_gkt))


def aux_loss(load: Load) -> jax.Array:
    """The load balancing loss of the Switch Transformer (2101.03961, eq. 4), over all layers.

    e * sum_e f_e P_e, where f_e is the number of times that a token was sent to expert e, and P_e
    the router's probability of it, both as means over tokens and layers. It is the number of
    experts of a token where the load is even. Gradients flow through P_e.
    """
    layers, e = load.sent.shape
    count = jnp.maximum(load.tokens, 1) * layers
    sent, likely = (jnp.sum(x, axis=0) / count for x in (load.sent, load.likely))
    return e * jnp.sum(jax.lax.stop_gradient(sent) * likely)


def load_metrics(load: Load) -> dict[str, jax.Array]:
    """The loss, and the share of a layer's tokens that one expert was sent, at most."""
    most = jnp.max(load.sent) / jnp.maximum(load.tokens, 1)
    return {"router/aux_loss": aux_loss(load), "router/max_share": most}
