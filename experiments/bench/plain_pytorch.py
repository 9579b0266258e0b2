"""The simple baseline: transformers' model, its generate, twenty lines of PyTorch, uncompiled."""

from ours import LEARNING_RATE


def load(w, folder, device):
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, w.dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(where(device))


def where(device: str) -> str:
    return "cuda" if device == "gpu" else "cpu"


def train(w, folder, device):
    import torch
    from workloads import batch

    model = load(w, folder, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    arrays = batch(w)
    prompts = torch.tensor(arrays.prompts).long().repeat_interleave(w.k, dim=0)
    completions = torch.tensor(arrays.completions).long().reshape(w.g * w.k, w.t)
    tokens = torch.cat([prompts, completions], dim=1).to(where(device))
    rewards, refs, mask = (
        torch.tensor(x).to(where(device)) for x in (arrays.rewards, arrays.ref_logps, arrays.mask)
    )

    def logps_gk():
        # Without the prompts' logits, and without the last token's successor.
        logits = model(tokens, logits_to_keep=w.t + 1, use_cache=False).logits[:, :-1].float()
        targets = tokens[:, w.p :]
        flat = torch.nn.functional.cross_entropy(
            logits.reshape(-1, w.vocab), targets.reshape(-1), reduction="none"
        )
        return -(flat.reshape(w.g, w.k, w.t) * mask).sum(-1)

    def centred(x):
        return x - x.mean(-1, keepdim=True)

    def update():
        logps = logps_gk()
        weights = centred(rewards) - 0.1 * centred(logps.detach() - refs)
        loss = -0.1 * (weights * logps).sum(-1).mean() / (w.k - 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss)

    with torch.no_grad():
        check = logps_gk().reshape(-1).tolist()
    return update, check


def rollout(w, folder, device):
    import torch
    from workloads import batch

    model = load(w, folder, device).eval()
    tokens = torch.tensor(batch(w).prompts).long().repeat_interleave(w.k, dim=0).to(where(device))

    def generate():
        with torch.inference_mode():
            out = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0,
                min_new_tokens=w.t, max_new_tokens=w.t, pad_token_id=0,
            )  # fmt: skip
        assert out[:, w.p :].numel() == w.tokens

    return generate, None
