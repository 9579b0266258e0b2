"""The mutants: ways to get GVPO wrong, each as one small change of the code."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """`old` occurs exactly once in `gvpo_jax/<file>` and becomes `new`; `tests` must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


LOSS = ("tests/unit/test_loss.py", "tests/unit/test_identities.py")
STEP = ("tests/unit/test_logprobs.py", "tests/unit/test_train_step.py")
PACKED = ("tests/unit/test_shared_prefix.py", "tests/unit/test_packing.py")
ROLLOUT = ("tests/unit/test_rollout.py",)
LORA = ("tests/unit/test_lora.py",)
QUANTIZED = "tests/unit/test_quantized.py"  # whole runs: one test each, too
FAMILIES = tuple(
    f"tests/unit/test_families.py::test_{name}"
    for name in ("logits", "log_probs_and_gradients", "greedy_text")
)
BALANCE = ("tests/unit/test_balance.py",)
SCAN = "tests/unit/test_scan_layers.py"
GGUF = ("tests/unit/test_gguf_families.py",)
# One test each: the others of the file take long, and are about other things.
FILLING = ("tests/unit/test_train_step.py::test_ragged_groups_are_filled_up_with_nothing",)
TEXT = (
    "tests/unit/test_trainer.py::test_steps_on_text_raise_the_probability_of_what_was_rewarded",
    "tests/unit/test_trainer.py::test_texts_end_with_the_tokenizers_own_end_token",
)

# The first three are those that `--small` runs.
MUTANTS = (
    Mutant(
        "gradients flow through the weights",
        "loss.py",
        "weights = jax.lax.stop_gradient(",
        "weights = (",
        LOSS,
    ),
    Mutant(
        "divided by k instead of k - 1",
        "loss.py",
        "jnp.maximum(count - 1, 1)",
        "jnp.maximum(count, 1)",
        LOSS,
    ),
    Mutant(
        "the reference left out",
        "loss.py",
        "beta * (logps - ref_logps)",
        "beta * logps",
        LOSS,
    ),
    Mutant(
        "the sign of the loss turned",
        "loss.py",
        "return -_over_devices(",
        "return _over_devices(",
        LOSS,
    ),
    Mutant(
        "the sign of the log-ratio turned",
        "loss.py",
        "rewards - beta *",
        "rewards + beta *",
        LOSS,
    ),
    Mutant(
        "beta times the rewards, not the log-ratios",
        "loss.py",
        "rewards - beta *",
        "beta * rewards -",
        LOSS,
    ),
    Mutant(
        "beta not in front of the loss",
        "loss.py",
        "jnp.sum(beta * weights",
        "jnp.sum(weights",
        LOSS,
    ),
    Mutant(
        "rewards divided by their standard deviation",
        "loss.py",
        "rewards - beta *",
        "rewards / jnp.std(rewards, axis=-1, keepdims=True) - beta *",
        LOSS,
    ),
    Mutant(
        "the log-ratio not centred",
        "loss.py",
        "_center(rewards - beta * (logps - ref_logps), where, axis_name)",
        "_center(rewards, where, axis_name) - beta * (logps - ref_logps)",
        LOSS,
    ),
    Mutant(
        "the rewards not centred",
        "loss.py",
        "_center(rewards - beta * (logps - ref_logps), where, axis_name)",
        "rewards - _center(beta * (logps - ref_logps), where, axis_name)",
        LOSS,
    ),
    Mutant(
        "centred over the batch, not inside the group",
        "loss.py",
        "(x - _sum_of_group(x * mask, axis_name) / count)",
        "(x - jnp.sum(x * mask) / jnp.sum(mask))",
        LOSS,
    ),
    Mutant(
        "missing completions counted in the mean, as zeros",
        "loss.py",
        "count = jnp.maximum(_sum_of_group(mask, axis_name), 1)",
        "count = x.shape[-1]",
        LOSS,
    ),
    Mutant(
        "missing completions counted in k - 1",
        "loss.py",
        "jnp.maximum(count - 1, 1)",
        "(rewards.shape[-1] - 1)",
        LOSS,
    ),
    Mutant(
        "groups with nothing to compare counted in the average",
        "loss.py",
        "jnp.sum(counts.astype(dtype))",
        "counts.size",
        LOSS,
    ),
    Mutant(
        "every second completion not differentiated",
        "loss.py",
        "weights * logps * per_group",
        "weights * per_group * logps.at[..., 1::2].set(jax.lax.stop_gradient(logps[..., 1::2]))",
        LOSS,
    ),
    Mutant(
        "bfloat16 inputs computed in bfloat16",
        "loss.py",
        "dtype = float_type(logps, ref_logps, rewards)",
        "dtype = logps.dtype",
        LOSS,
    ),
    Mutant(
        "groups that are cut over devices not added up",
        "loss.py",
        "return x if axis_name is None else jax.lax.psum(x, axis_name)",
        "return x",
        LOSS,
    ),
    Mutant(
        "clipped residuals not centred again (Huber)",
        "loss.py",
        "_center(_clip(residuals, delta), where, axis_name)",
        "_clip(residuals, delta)",
        LOSS,
    ),
    Mutant(
        "the last token, the end token, left out of the log-prob",
        "logprobs.py",
        "places < lengths[..., None]",
        "places < lengths[..., None] - 1",
        STEP,
    ),
    Mutant(
        "log-probs from bfloat16 logits",
        "logprobs.py",
        "        total = jax.nn.logsumexp(logits, axis=-1)",
        "        logits = logits.astype(jnp.bfloat16)\n"
        "        total = jax.nn.logsumexp(logits, axis=-1)",
        STEP,
    ),
    Mutant(
        "the gradient of a chunk of logits without its target",
        "logprobs.py",
        "jnp.where(ids == targets[..., None], 1, 0) - jnp.exp",
        "-jnp.exp",
        STEP,
    ),
    Mutant(
        "only the last chunk's gradient of the head used",
        "logprobs.py",
        "jax.tree.map(jnp.add, added, here)",
        "here",
        STEP,
    ),
    Mutant(
        "mean over a completion's tokens instead of their sum",
        "training/objectives.py",
        "return jnp.sum(jnp.where(mask, token_logps, 0), axis=-1)",
        "return jnp.sum(jnp.where(mask, token_logps, 0), -1) / jnp.maximum(jnp.sum(mask, -1), 1)",
        STEP,
    ),
    Mutant(
        "the reference's log-probs left out of the step",
        "training/objectives.py",
        "_sum(logps_gkt - ref_logps_gkt, mask_gkt)",
        "_sum(logps_gkt, mask_gkt)",
        STEP,
    ),
    Mutant(
        "completions without a reward trained on",
        "training/objectives.py",
        "beta=beta, where=where_gk",
        "beta=beta",
        STEP,
    ),
    Mutant(
        "padding behind a completion counted",
        "training/step.py",
        "completion_mask(batch.lengths, batch.completions.shape[-1]) &",
        "jnp.ones(batch.completions.shape, bool) &",
        STEP,
    ),
    Mutant(
        "the mask taken from token values: token 0 is padding",
        "training/step.py",
        "completion_mask(batch.lengths, batch.completions.shape[-1]) &",
        "(batch.completions != 0) &",
        STEP,
    ),
    Mutant(
        "micro-batches' mean losses added up: the gradient grows with their number",
        "training/step.py",
        "        return total / count",
        "        return total / jnp.maximum(jnp.sum(jnp.sum(batch.valid, -1) >= 2), 1)",
        STEP,
    ),
    Mutant(
        "micro-batches' mean losses averaged, however many groups each has",
        "training/step.py",
        "        return total / count",
        "        return total / micro_batches / jnp.maximum("
        "jnp.sum(jnp.sum(batch.valid, -1) >= 2), 1)",
        STEP,
    ),
    Mutant(
        "only the last micro-batch's gradient used",
        "training/step.py",
        "accumulator=(add_up.SUM, (add_up.CONCAT",
        "accumulator=(optax.microbatching.Accumulator("
        "lambda x: jax.tree.map(jnp.zeros_like, x), lambda so_far, new, _: new, "
        "lambda x: x, lambda x: x), (add_up.CONCAT",
        STEP,
    ),
    Mutant(
        "only the last part of every group differentiated, where groups are cut",
        "training/step.py",
        "jax.tree.map(jnp.add, total, _wide(grads))",
        "grads",
        STEP,
    ),
    Mutant(
        "parts of groups differentiated with each other's weights",
        "training/step.py",
        "weights = cut(jax.grad(loss_of)(logps_gkt, batch, advantages_gk))",
        "weights = cut(jax.grad(loss_of)(logps_gkt, batch, advantages_gk))[::-1]",
        STEP,
    ),
    Mutant(
        "groups that fill up the batch counted",
        "data/batch.py",
        "missing, axis=0)]) for x in batch))",
        "missing, axis=0)]) for x in batch))\n    return filled",
        STEP,
    ),
    Mutant(
        "no reward taken for a reward of 0",
        "data/groups.py",
        "valid = ~np.isnan(wide.rewards) & (wide.lengths > 0)",
        "valid, _ = wide.lengths > 0, np.nan_to_num(wide.rewards, copy=False)",
        FILLING,
    ),
    Mutant(
        "the end token left out of a sampled completion",
        "rollout/inprocess.py",
        "drawn: Any = to_host((state.completions_snt, state.lengths_sn, state.logps_snt))",
        "drawn: Any = to_host((state.completions_snt, jnp.maximum(state.lengths_sn - 1, 1), "
        "state.logps_snt))",
        ROLLOUT,
    ),
    Mutant(
        "no end token behind completions given as text",
        "data/prompts.py",
        "return [*ids, *([end] if isinstance(end, int) else stop_ids[:1])]",
        "return ids",
        TEXT,
    ),
    Mutant(
        "the policy scored as its own reference",
        "training/policy.py",
        "self._programs.token_logps(self.reference,",
        "self._programs.token_logps(self.params,",
        TEXT,
    ),
    Mutant(
        "the last token that a packed row is fed left out",
        "training/step.py",
        "fed_gk = jnp.maximum(lengths - 1, 0)",
        "fed_gk = jnp.maximum(lengths - 2, 0)",
        PACKED,
    ),
    Mutant(
        "a packed completion's first token predicted from the prompt's last but one",
        "ops/packing.py",
        "self.prompt_lengths.reshape(s, g // s) - 1",
        "jnp.maximum(self.prompt_lengths.reshape(s, g // s) - 2, 0)",
        PACKED,
    ),
    Mutant(
        "packed completions see the padding of their prompt",
        "ops/packing.py",
        "mask = completion_mask(packed.prompt_lengths, p)",
        "mask = completion_mask(jnp.full_like(packed.prompt_lengths, p), p)",
        PACKED,
    ),
    Mutant(
        "packed completions placed one position early",
        "models/decoder.py",
        "_positions(completions_gkt, packed.prompt_lengths)",
        "_positions(completions_gkt, packed.prompt_lengths - 1)",
        PACKED,
    ),
    Mutant(
        "the gradient of a packed token goes to its neighbour",
        "ops/packing.py",
        "return _take(g, place), None, None",
        "return jnp.roll(_take(g, place), 1, axis=1), None, None",
        PACKED,
    ),
    Mutant(
        "packed groups dealt out to other parts than the plan says",
        "training/policy.py",
        "order = plan.rows.T.ravel()",
        "order = plan.rows.ravel()",
        PACKED,
    ),
    Mutant(
        "query heads of a part given other key-value heads",
        "ops/cpu.py",
        "queries_gkthd.reshape(g, k, t, n, h // n, d)",
        "queries_gkthd.reshape(g, k, t, h // n, n, d).swapaxes(3, 4)",
        ("tests/unit/test_kernels.py",),
    ),
    Mutant(
        "each head of a group is given the first group's prompt",
        "ops/cpu.py",
        "jnp.repeat(prefix.mask, n, axis=0)",
        "jnp.repeat(prefix.mask[:1], n * g, axis=0)",
        ("tests/unit/test_kernels.py",),
    ),
    Mutant(
        "an adapter not multiplied by alpha / rank",
        "models/lora.py",
        "self.lora_a[...].astype(x.dtype), last) * self.scale",
        "self.lora_a[...].astype(x.dtype), last)",
        LORA,
    ),
    Mutant(
        "an adapter merged without alpha / rank",
        "models/lora.py",
        "added = (a @ b) * scale",
        "added = a @ b",
        LORA,
    ),
    Mutant(
        "the reference of an adapter without its base",
        "training/programs.py",
        "join(stacked(model, frozen), ",
        "join(jax.tree.map(jnp.zeros_like, stacked(model, frozen)), ",
        LORA,
    ),
    Mutant(
        "a sliding window one token too wide behind the prompt",
        "ops/attention.py",
        "ages_gp[:, None, None] < window",
        "ages_gp[:, None, None] <= window",
        FAMILIES,
    ),
    Mutant(
        "a sliding window one token too wide inside a completion",
        "ops/attention.py",
        "jnp.arange(start, end)[:, None] - window",
        "jnp.arange(start, end)[:, None] - window - 1",
        FAMILIES,
    ),
    Mutant(
        "local layers with the rotary base of the global ones",
        "models/decoder.py",
        "rotations(positions_gkt, c.local_rope_theta, None",
        "rotations(positions_gkt, c.rope_theta, None",
        FAMILIES,
    ),
    Mutant(
        "norms by w where they are by 1 + w",
        "models/blocks.py",
        'scale = 1 + scale if self.config.norm == "one_plus" else scale',
        "scale = scale",
        FAMILIES,
    ),
    Mutant(
        "the shares of a mixture's experts left out",
        "ops/experts.py",
        "weighted = known * shares[:, None]",
        "weighted = known",
        FAMILIES,
    ),
    Mutant(
        "rows behind those of the last expert taken for results",
        "ops/experts.py",
        "known = jnp.where((jnp.take(chosen, order) < e)[:, None], out.astype(jnp.float32), 0)",
        "known = out.astype(jnp.float32)",
        ("tests/unit/test_experts.py",),
    ),
    Mutant(
        "layers with and without a window taken for alike",
        "models/stacking.py",
        "return c.window(layer), layer in c.no_rope_layers, dense",
        "return layer in c.no_rope_layers, dense",
        (f"{SCAN}::test_an_update_is_the_same[windows]",),
    ),
    Mutant(
        "layers with and without positions taken for alike",
        "models/stacking.py",
        "return c.window(layer), layer in c.no_rope_layers, dense",
        "return c.window(layer), dense",
        (f"{SCAN}::test_an_update_is_the_same[no_positions]",),
    ),
    Mutant(
        "gradients of stacked layers given back in the wrong order",
        "models/stacking.py",
        "for row, layer in enumerate(self.places[i])",
        "for row, layer in enumerate(reversed(self.places[i]))",
        (f"{SCAN}::test_an_update_is_the_same[alike]",),
    ),
    Mutant(
        "norms of float32 in a stack of bfloat16",
        "models/stacking.py",
        "keeps = is_quantized(x) or path[-1].key in self.in_float32",
        "keeps = is_quantized(x)",
        (f"{SCAN}::test_in_bfloat16_norms_in_float32_stay_so_in_the_stack",),
    ),
    Mutant(
        "gradients of parts added up in the dtype of the stacked layers",
        "training/step.py",
        "return jax.tree.map(lambda x: x.astype(float_type(x)), tree)",
        "return tree",
        (
            f"{SCAN}::test_gradients_of_parts_add_up_in_float32_where_layers_are_stacked_in_bfloat16",
        ),
    ),
    Mutant(
        "the bits of nf4 codes read in the wrong order",
        "models/quantized.py",
        "for bit in range(4):",
        "for bit in reversed(range(4)):",
        (f"{QUANTIZED}::test_nf4_is_the_nearest_level_of_each_tile_by_a_loop",),
    ),
    Mutant(
        "a kernel widened in the dtype of the computation, not in float32",
        "models/quantized.py",
        "levels.reshape(len(kernel.scale), -1, levels.shape[1]) * kernel.scale[:, None]",
        "(levels.reshape(len(kernel.scale), -1, levels.shape[1]).astype(dtype)"
        " * kernel.scale[:, None].astype(dtype))",
        (f"{QUANTIZED}::test_widened_is_what_qwix_makes_of_it",),
    ),
    Mutant(
        "wide kernels kept for the backward pass",
        "models/quantized.py",
        "widened = jax.checkpoint(lambda x, w: product(x, widen(w, x.dtype), *args, **options))",
        "widened = lambda x, w: product(x, widen(w, x.dtype), *args, **options)",
        (f"{QUANTIZED}::test_the_backward_pass_is_left_the_quantised_kernel_alone",),
    ),
    Mutant(
        "the head quantised too",
        "models/quantized.py",
        'r"layers/.*/(?!router)',
        'r"(layers/.*/|)(?!router)',
        (f"{QUANTIZED}::test_nothing_but_the_linear_kernels_of_layers_is_quantised",),
    ),
    Mutant(
        "an adapter merged into the quantised weights",
        "training/policy.py",
        "to_first_host(self.frozen) if base is None else base",
        "to_first_host(self.frozen)",
        (f"{QUANTIZED}::test_exports_are_merged_into_the_weights_before_quantization",),
    ),
    Mutant(
        "4 bits counted as 8",
        "tpu_compile/lowering.py",
        "of_each = 4 if x.dtype == jnp.uint4 else",
        "of_each =",
        (f"{QUANTIZED}::test_nothing_but_the_linear_kernels_of_layers_is_quantised",),
    ),
    Mutant(
        "a shared expert without its gate",
        "models/blocks.py",
        "jax.nn.sigmoid(self.shared_gate(x)) * self.shared(x)",
        "self.shared(x)",
        FAMILIES,
    ),
    Mutant(
        "padding of prompts counted in the load of experts",
        "training/balance.py",
        "completion_mask(batch.prompt_lengths, p)[:, None] & trained",
        "jnp.ones((1, 1, p), bool) & trained",
        BALANCE,
    ),
    Mutant(
        "the load balancing loss of each layer by itself",
        "training/balance.py",
        "sent, likely = (jnp.sum(x, axis=0) / count for x in (load.sent, load.likely))",
        "sent, likely = (x / count for x in (load.sent, load.likely))",
        BALANCE,
    ),
    Mutant(
        "each part of a group counts its prompt whole",
        "training/balance.py",
        "return prompts / parts, ",
        "return prompts / 1, ",
        BALANCE,
    ),
    Mutant(
        "the load of each micro-batch weighs the same",
        "training/step.py",
        "aux_loss(load) * load.tokens / jnp.maximum(tokens, 1)",
        "aux_loss(load)",
        BALANCE,
    ),
    Mutant(
        "experts in another order taken for others",
        "rollout/routing.py",
        "np.sort(a, axis=-1) != np.sort(b, axis=-1)",
        "a != b",
        ("tests/unit/test_routing.py",),
    ),
    Mutant(
        "the last token of a completion counted, which goes through no layer",
        "rollout/routing.py",
        "lengths[..., None] - 1",
        "lengths[..., None]",
        ("tests/unit/test_routing.py::test_sets_are_compared_where_tokens_count",),
    ),
    Mutant(
        "Gemma's norms read from GGUF as 1 + w",
        "models/gguf.py",
        "array = array - 1",
        "array = array + 0",
        GGUF,
    ),
    Mutant(
        "the shares of Qwen2-MoE's experts normalised where GGUF does not say",
        "models/gguf.py",
        'family.gguf == "qwen3moe",',
        "True,",
        GGUF,
    ),
    Mutant(
        "the sum of a block of the vocabulary kept at its old scale",
        "logprobs.py",
        "total = total * jnp.exp(largest - new)",
        "total = total + 0",
        ("tests/unit/test_logprobs.py",),
    ),
    Mutant(
        "the head's gradient of every block of the vocabulary written to the first rows",
        "logprobs.py",
        "d_head, d_rows, start, axis=0",
        "d_head, d_rows, 0, axis=0",
        ("tests/unit/test_logprobs.py",),
    ),
    Mutant(
        "halves of a head swapped by a product without the sign",
        "models/rope.py",
        "jnp.concatenate([-sin, sin], axis=-1)",
        "jnp.concatenate([sin, sin], axis=-1)",
        ("tests/unit/test_kernels.py::test_rotating_by_a_product_gives_the_same_numbers",),
    ),
    Mutant(
        "loops counted once by the compiler's clock",
        "tpu_compile/clock.py",
        "trips_of(line, self.computations) or self.trips",
        "1",
        ("tests/unit/test_clock.py",),
    ),
    Mutant(
        "transfers that do not wait for each other",
        "tpu_compile/clock.py",
        "free = arrives[key] = max(now, free) + seconds",
        "arrives[key] = now + seconds",
        ("tests/unit/test_clock.py",),
    ),
    Mutant(
        "any scaling of rotary positions in GGUF taken for Llama 3's",
        "models/gguf.py",
        "not np.allclose(factors, expected, rtol=1e-4)",
        "False",
        ("tests/unit/test_models_load.py::test_llama_3s_scaling_is_told_by_what_it_divides",),
    ),
)
SMALL = MUTANTS[:3]
