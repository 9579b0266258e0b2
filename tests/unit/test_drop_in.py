"""`Trainer.train_step` beside the small PyTorch trainer that it replaces, on the same weights."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_jax.trainer import Trainer

BETA, RATE = 0.2, 1e-2
PROMPTS = ["Say yes: ", "A longer prompt, to be padded: "]
COMPLETIONS = [["yes", "no", "maybe so"], ["fine", "?", "0 1 2"]]
REWARDS = [[1.0, 0.0, 0.3], [0.5, -1.0, 0.0]]


class TorchTrainer:
    """GVPO in plain PyTorch: one sequence at a time, nothing shared, nothing padded."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), RATE, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0
        )

    def logprob(self, model, prompt, completion):
        start = self.tokenizer(prompt)["input_ids"]
        rest = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        rest = [*rest, self.tokenizer.eos_token_id]
        logits = model(torch.tensor([start + rest])).logits[0, len(start) - 1 : -1]
        return torch.log_softmax(logits, -1)[range(len(rest)), rest].sum()

    def train_step(self, prompts, completions, rewards):
        losses = []
        for prompt, group, values in zip(prompts, completions, rewards, strict=True):
            logps = torch.stack([self.logprob(self.model, prompt, text) for text in group])
            refs = torch.stack([self.logprob(self.reference, prompt, text) for text in group])
            reward, ratio = torch.tensor(values), (logps - refs).detach()
            weights = (reward - reward.mean()) - BETA * (ratio - ratio.mean())
            losses.append(-BETA * (weights * logps).sum() / (len(group) - 1))
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm.item()}


@pytest.mark.slow
def test_five_steps_on_text_are_those_of_a_pytorch_trainer(tmp_path):
    ours = Trainer.from_pretrained(
        "debug",
        beta=BETA,
        learning_rate=RATE,
        max_completion_length=16,
        optimizer__eps=1e-3,
        mesh__fsdp=1,
    )
    ours.save_pretrained(tmp_path / "start")
    theirs = TorchTrainer(tmp_path / "start")
    first = None
    for _ in range(5):
        a = ours.train_step(PROMPTS, COMPLETIONS, REWARDS)
        b = theirs.train_step(PROMPTS, COMPLETIONS, REWARDS)
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-3)
        first = first or b
    assert abs(b["grad_norm"]) < 0.7 * first["grad_norm"]  # it was training all the while
    ours.save_pretrained(tmp_path / "end")
    end = AutoModelForCausalLM.from_pretrained(tmp_path / "end", dtype=torch.float32)
    for (name, x), y in zip(end.named_parameters(), theirs.model.parameters(), strict=True):
        np.testing.assert_allclose(x.detach().numpy(), y.detach().numpy(), atol=2e-5, err_msg=name)
