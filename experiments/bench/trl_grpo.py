"""TRL's GRPOTrainer, its own loss and backward pass; it samples by transformers' generate."""

import tempfile

from ours import LEARNING_RATE
from plain_pytorch import load, where


def train(w, folder, device):
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from workloads import batch

    rows = w.g * w.k
    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="gvpo-jax-bench-"),
        use_cpu=device == "cpu",
        per_device_train_batch_size=rows,
        num_generations=w.k,
        max_completion_length=w.t,
        learning_rate=LEARNING_RATE,
        loss_type="grpo",
        beta=0.0,
        gradient_checkpointing=False,
        bf16=w.dtype == "bfloat16",
        report_to="none",
        save_strategy="no",
    )
    trainer = GRPOTrainer(
        model=load(w, folder, device),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1"] * rows}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.create_optimizer_and_scheduler(1000)
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped, trainer.current_gradient_accumulation_steps = model, 1
    arrays = batch(w)
    rewards = arrays.rewards - arrays.rewards.mean(-1, keepdims=True)
    inputs = {
        "prompt_ids": torch.tensor(arrays.prompts).long().repeat_interleave(w.k, dim=0),
        "prompt_mask": torch.ones(rows, w.p, dtype=torch.long),
        "completion_ids": torch.tensor(arrays.completions).long().reshape(rows, w.t),
        "completion_mask": torch.tensor(arrays.mask).long().reshape(rows, w.t),
        "advantages": torch.tensor(rewards / arrays.rewards.std(-1, keepdims=True)).reshape(-1),
        "num_items_in_batch": torch.tensor(w.tokens),
    }
    inputs = {name: x.to(where(device)) for name, x in inputs.items()}
    trainer._prepare_inputs = lambda _: inputs  # the batch is given, nothing is sampled

    def update():
        model.train()
        loss = trainer.training_step(model, {}, None)
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()
        float(loss)

    tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    with torch.no_grad():
        logps, *_ = trainer._get_per_token_logps_and_entropies(
            model, tokens, torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1), w.t
        )
    return update, (logps * inputs["completion_mask"]).sum(-1).tolist()
