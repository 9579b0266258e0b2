"""Every argument of TRL 1.16's GRPOConfig: its default there, and what becomes of it here.

`TAKEN` have an equal, which `gvpo_jax.config_trl` names. What is in `WITHOUT_EFFECT` changes
nothing of what is trained: it is said once where it is given. What is in `REFUSED` would change
it, and has no equal. Defaults are TRL's, but for `beta`, where None is 0.1, or 0 with another loss
than GVPO's, and for `loss_type`. `max_prompt_length` is one that earlier versions of TRL had.
"""

from typing import Any

from gvpo_jax.config_trl import TRL_NAMES

TAKEN: dict[str, Any] = {
    "output_dir": None,
    # batches, in completions
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "generation_batch_size": None,
    "steps_per_generation": None,
    "num_iterations": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    # the optimizer
    "learning_rate": 1e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    # the model
    "bf16": None,
    "fp16": False,
    "model_init_kwargs": None,
    "gradient_checkpointing": True,
    "router_aux_loss_coef": None,
    # sampling
    "max_prompt_length": 512,
    "max_completion_length": 512,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
    "use_vllm": False,
    "vllm_mode": "colocate",
    "vllm_server_base_url": None,
    "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000,
    "vllm_server_timeout": 240.0,
    # data, rewards and the loss
    "shuffle_dataset": True,
    "chat_template_kwargs": None,
    "reward_weights": None,
    "beta": None,
    "loss_type": "gvpo",
    "importance_sampling_level": "token",
    "scale_rewards": "group",
    "epsilon": 0.2,
    "epsilon_high": None,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "seed": 42,
    # evaluations, files and the screen
    "eval_strategy": "no",
    "eval_steps": None,
    "per_device_eval_batch_size": 8,
    "metric_for_best_model": None,
    "greater_is_better": None,
    "num_generations_eval": None,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": None,
    "logging_steps": 10,
    "log_completions": False,
    "num_completions_to_print": None,
    "report_to": "none",
    "project": "huggingface",
    # the hub
    "push_to_hub": False,
    "hub_model_id": None,
    "hub_private_repo": None,
}

_TORCH = "it is about PyTorch"
_DATALOADER = "rows are in memory, and are tokenised before the first update"
_MESH = "arrays are laid out over the mesh, see mesh.fsdp"
_LOG = "metrics.jsonl has every metric of every update"
_TRACKIO = "the run's name and folder are those of output_dir"
_HUB = "the hub gets the model from trainer.push_to_hub(), and nothing before that"
_VLLM = "it is about a vLLM inside of the trainer's process, or one that PyTorch updates"
_EVAL = "an evaluation samples, and keeps rewards and texts alone"

WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(
        (
            *("torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "tf32"),
            *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "ddp_backend"),
            *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
            *("ddp_static_graph", "liger_kernel_config", "activation_checkpointing"),
            "accelerator_config",
        ),
        (None, _TORCH),
    ),
    **dict.fromkeys(
        ("torch_compile", "use_liger_kernel", "use_cache", "auto_find_batch_size", "use_cpu"),
        (False, _TORCH),
    ),
    "ddp_timeout": (1800, _TORCH),
    "debug": ("", _TORCH),
    "local_rank": (-1, _TORCH),
    "enable_jit_checkpoint": (False, "a run that is told to end is always saved"),
    "ds3_gather_for_generation": (True, _MESH),
    "fsdp": (None, _MESH),
    "fsdp_config": (None, _MESH),
    "deepspeed": (None, _MESH),
    "parallelism_config": (None, _MESH),
    "average_tokens_across_devices": (True, "sums run over the whole batch"),
    "cast_lm_head_to_fp32": (False, "logits are always summed up in float32"),
    "disable_dropout": (False, "there is no dropout"),
    "full_determinism": (False, "a run is the same each time anyway"),
    "pad_to_multiple_of": ("auto", "padding is left out, see train.packing"),
    "cache_implementation": (None, "the cache is a part of the compiled program"),
    "dataloader_drop_last": (False, "batches go on across epochs, and are always full"),
    "dataloader_num_workers": (0, _DATALOADER),
    "dataloader_pin_memory": (True, _DATALOADER),
    "dataloader_persistent_workers": (False, _DATALOADER),
    "dataloader_prefetch_factor": (None, _DATALOADER),
    "dataloader_multiprocessing_context": (None, _DATALOADER),
    "dataloader_in_order": (True, _DATALOADER),
    "remove_unused_columns": (False, "reward functions get all columns"),
    "label_names": (None, "there are no labels"),
    "label_smoothing_factor": (0.0, "there are no labels"),
    "length_column_name": ("length", _DATALOADER),
    "ignore_data_skip": (False, "a run goes on with the row at which it stopped"),
    "restore_callback_states_from_checkpoint": (False, "callbacks keep their own state"),
    "data_seed": (None, "seed is of the data's order too"),
    "logging_strategy": ("steps", _LOG),
    "logging_first_step": (False, _LOG),
    "logging_nan_inf_filter": (True, "a loss that is not finite ends the run"),
    "log_on_each_node": (True, "the first process alone writes"),
    "log_level": ("passive", _LOG),
    "log_level_replica": ("warning", _LOG),
    "log_multimodal": (True, "there are no images"),
    "log_unique_prompts": (False, "completions/ has all that were sampled for an update"),
    "log_completions_hub_repo": (None, _HUB),
    "include_num_input_tokens_seen": ("no", "num_tokens is always counted"),
    "disable_tqdm": (None, "a terminal gets a bar, a file one line for each update"),
    "skip_memory_metrics": (True, _LOG),
    "run_name": (None, _TRACKIO),
    "trackio_space_id": (None, _TRACKIO),
    "trackio_bucket_id": (None, _TRACKIO),
    "trackio_static_space_id": (None, _TRACKIO),
    "eval_delay": (0, "evaluations are made from the start on"),
    "eval_on_start": (False, "held-out rows are always answered before the run"),
    "prediction_loss_only": (False, _EVAL),
    "eval_do_concat_batches": (True, _EVAL),
    "eval_use_gather_object": (False, _EVAL),
    "eval_accumulation_steps": (None, _EVAL),
    "batch_eval_metrics": (False, _EVAL),
    "include_for_metrics": ([], _EVAL),
    "bf16_full_eval": (False, "evaluations compute as the training does"),
    "fp16_full_eval": (False, "evaluations compute as the training does"),
    "save_only_model": (False, "a checkpoint is whole, so that the run can go on"),
    "save_on_each_node": (False, "all hosts write one checkpoint"),
    "hub_strategy": ("every_save", _HUB),
    "hub_always_push": (False, _HUB),
    "hub_revision": (None, _HUB),
    "do_train": (False, "call train()"),
    "do_eval": (False, "call evaluate()"),
    "do_predict": (False, "call evaluate()"),
    "vllm_model_impl": ("vllm", _VLLM),
    "vllm_enable_sleep_mode": (False, _VLLM),
    "vllm_group_port": (51216, _VLLM),
    "vllm_gpu_memory_utilization": (0.3, _VLLM),
    "vllm_max_model_length": (None, _VLLM),
    "vllm_tensor_parallel_size": (1, _VLLM),
    "use_bias_correction_kl": (True, "GVPO has no KL term that could be biased"),
    "vllm_importance_sampling_correction": (True, "GVPO needs no importance weights"),
    "vllm_importance_sampling_mode": ("sequence_mask", "GVPO needs no importance weights"),
    "vllm_importance_sampling_clip_max": (3.0, "GVPO needs no importance weights"),
    "vllm_importance_sampling_clip_min": (None, "GVPO needs no importance weights"),
    "vllm_importance_sampling_cap": (None, "GVPO needs no importance weights"),
    "use_transformers_continuous_batching": (False, "see rollout.slots"),
    "transformers_continuous_batching_config": (None, "see rollout.slots"),
    "use_transformers_paged": (False, "see rollout.slots"),
    "resume_from_checkpoint": (None, "train() always goes on with the run in output_dir"),
}

_LOSS = "it belongs to a loss that is not here"
_ENTROPY = "no loss here has an entropy term"

REFUSED: dict[str, tuple[Any, str]] = {
    "trust_remote_code": (False, "code of a model's folder is never run"),
    "lr_scheduler_kwargs": (None, "schedules have no further arguments"),
    "optim_args": (None, "give an Optax optimizer: optimizers=(optax.adamw(...), None)"),
    "optim_target_modules": (None, "give an Optax optimizer: optimizers=(optax.adamw(...), None)"),
    "hub_token": (None, "log in with hf auth login, or set HF_TOKEN: a config is no place for it"),
    "neftune_noise_alpha": (None, "embeddings get no noise"),
    "load_best_model_at_end": (
        False,
        "give save_strategy='best', and take it with gvpo-jax export RUN --step best",
    ),
    "train_sampling_strategy": ("random", "rows come in random order, or by shuffle_dataset=False"),
    "vllm_structured_outputs_regex": (
        None,
        "samples must come from the policy's own distribution",
    ),
    "delta": (None, _LOSS),
    "sapo_temperature_neg": (1.05, _LOSS),
    "sapo_temperature_pos": (1.0, _LOSS),
    "vespo_k_pos": (2.0, _LOSS),
    "vespo_lambda_pos": (3.0, _LOSS),
    "vespo_k_neg": (3.0, _LOSS),
    "vespo_lambda_neg": (2.0, _LOSS),
    "multi_objective_aggregation": (
        "sum_then_normalize",
        "rewards are summed up by their weights",
    ),
    "mask_truncated_completions": (
        False,
        "GVPO's optimum needs all samples: have the reward give None for those to leave out",
    ),
    "top_entropy_quantile": (1.0, _ENTROPY),
    "entropy_coef": (0.0, _ENTROPY),
    "use_adaptive_entropy": (False, _ENTROPY),
    "entropy_coef_min": (0.0, _ENTROPY),
    "entropy_coef_max": (1.0, _ENTROPY),
    "entropy_coef_delta": (0.005, _ENTROPY),
    "entropy_target": (0.2, _ENTROPY),
    "max_tool_calling_iterations": (None, "completions are texts, without calls of tools"),
    "off_policy_mask_threshold": (None, "GVPO takes samples of any policy, without a mask"),
}

DEFAULTS: dict[str, Any] = TAKEN | {
    name: default for name, (default, _) in (WITHOUT_EFFECT | REFUSED).items()
}


def table() -> str:
    """All of them as Markdown, for docs/trl.md."""
    lines = ["| argument | default | here |", "|---|---|---|"]
    for name, default in DEFAULTS.items():
        if name in TAKEN:
            here = f"`{TRL_NAMES[name]}`" if " " not in TRL_NAMES[name] else TRL_NAMES[name]
        else:
            refused = name in REFUSED
            why = (REFUSED if refused else WITHOUT_EFFECT)[name][1]
            here = f"{'refused' if refused else 'without effect'}: {why}"
        lines.append(f"| `{name}` | `{default!r}` | {here} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
