"""The work that all contestants do: models of random weights and batches, the same for all."""

import dataclasses
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model's shape and a batch: g prompts of p tokens, k completions of t tokens for each.

    mixed: the completions to train on have lognormal lengths, cut at t.
    """

    vocab: int
    width: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    g: int
    k: int
    p: int
    t: int
    family: str = "llama"
    dtype: str = "float32"
    mixed: bool = False

    @property
    def lengths(self) -> np.ndarray:
        """Of the completions, `[g, k]`; a batch without its padding, with a median of t / 8."""
        if not self.mixed:
            return np.full((self.g, self.k), self.t)
        drawn = np.random.default_rng(1).lognormal(np.log(self.t / 8), 1.0, (self.g, self.k))
        return np.clip(drawn, 1, self.t).astype(int)

    @property
    def tokens(self) -> int:
        """Of the completions: what both tasks are counted in."""
        return int(self.lengths.sum())

    @property
    def weights(self) -> int:
        """Entries of the matrices that every token is multiplied by, the head included."""
        heads = (2 * self.heads + 2 * self.kv_heads) * (self.width // self.heads)
        layer = self.width * (heads + 3 * self.feed_forward)
        return self.layers * layer + self.vocab * self.width

    @property
    def training_flops(self) -> float:
        """Of an update that computes each prompt once, forward and backward, without any padding.

        The head is needed for the completions' tokens alone.
        """
        head = self.vocab * self.width
        prompts, pairs = self.g * self.p, self.g * self.p**2 / 2
        pairs += float(np.sum(self.lengths * (self.p + self.lengths / 2)))
        products = (self.weights - head) * (prompts + self.tokens) + head * self.tokens
        return 6 * products + 12 * self.layers * self.width * pairs

    @property
    def decoding_bytes(self) -> float:
        """Read in all decoding steps: the weights, and the keys and values that there are by then.

        A prompt's are read once for all of its completions.
        """
        size = 2 if self.dtype == "bfloat16" else 4
        vector = 2 * self.layers * self.kv_heads * (self.width // self.heads)
        step = self.g * self.p + self.g * self.k * self.t / 2
        return self.t * size * (self.weights + vector * step)

    @property
    def ideal(self) -> float:
        """How many times fewer tokens the model sees with each prompt once, and no padding."""
        return self.g * self.k * (self.p + self.t) / (self.g * self.p + self.tokens)


TINY = {"vocab": 8192, "width": 256, "feed_forward": 1024, "layers": 4, "heads": 8, "kv_heads": 4}
SMOLLM2 = {
    "vocab": 49152, "width": 576, "feed_forward": 1536, "layers": 30, "heads": 9, "kv_heads": 3,
}  # fmt: skip
QWEN = {"vocab": 151_936, "family": "qwen2", "dtype": "bfloat16", "p": 256, "k": 8, "kv_heads": 2}
WORKLOADS = {
    "small": Workload(512, 64, 128, 2, 4, 2, g=2, k=4, p=16, t=16, mixed=True),
    "tiny": Workload(**TINY, g=4, k=8, p=32, t=64),
    "smollm2": Workload(**SMOLLM2, g=4, k=8, p=32, t=32),
    "long_prompt": Workload(**TINY, g=2, k=8, p=1024, t=128),
    "long_completion": Workload(**TINY, g=2, k=4, p=64, t=1024),
    "large_vocabulary": Workload(**TINY | {"vocab": 151_936}, g=4, k=8, p=32, t=64),
    "mixed_lengths": Workload(**TINY, g=4, k=8, p=64, t=512, mixed=True),
    # Qwen2.5's shapes, for a GPU
    "qwen2.5-0.5b": Workload(**QWEN, width=896, feed_forward=4864, layers=24, heads=14, g=8, t=256),
    "qwen2.5-1.5b": Workload(
        **QWEN, width=1536, feed_forward=8960, layers=28, heads=12, g=8, t=256
    ),
}
ROPE_THETA = 1_000_000  # the one that Tunix's Llama takes, whatever its config says
ON_CPU = ("tiny", "smollm2", "long_prompt", "long_completion", "large_vocabulary", "mixed_lengths")
ON_GPU = ("qwen2.5-0.5b", "qwen2.5-1.5b")


@dataclasses.dataclass(frozen=True)
class Arrays:
    """A batch: prompts [g, p], completions [g, k, t], rewards and reference log-probs [g, k].

    mask: [g, k, t], 1 where there is a token; 0 where there is padding, whose token is 0.
    """

    prompts: np.ndarray
    completions: np.ndarray
    mask: np.ndarray
    rewards: np.ndarray
    ref_logps: np.ndarray


def workload(name: str, task: str) -> Workload:
    """What there is to do; nobody ends a text while sampling."""
    w = WORKLOADS[name]
    return w if task == "train" else dataclasses.replace(w, mixed=False)


def batch(w: Workload) -> Arrays:
    rng = np.random.default_rng(0)
    mask = np.arange(w.t) < w.lengths[..., None]
    return Arrays(
        prompts=rng.integers(1, w.vocab - 1, (w.g, w.p)).astype(np.int32),
        completions=(rng.integers(1, w.vocab - 1, mask.shape) * mask).astype(np.int32),
        mask=mask.astype(np.int32),
        rewards=rng.random((w.g, w.k)).astype(np.float32),
        ref_logps=(-w.lengths * np.log(w.vocab)).astype(np.float32),
    )


def write_model(w: Workload, folder: Path) -> None:
    """A folder that transformers loads; its tokenizer's words are the numbers of the tokens."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

    torch.manual_seed(0)
    config = {"llama": LlamaConfig, "qwen2": Qwen2Config}[w.family](
        vocab_size=w.vocab,
        hidden_size=w.width,
        intermediate_size=w.feed_forward,
        num_hidden_layers=w.layers,
        num_attention_heads=w.heads,
        num_key_value_heads=w.kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        rope_theta=ROPE_THETA,
        rms_norm_eps=1e-6,
        initializer_range=0.1,  # wide, so that log-probs tell models and tokens apart
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folder)
    words = {str(i): i for i in range(w.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="0", eos_token=str(w.vocab - 1)
    ).save_pretrained(folder)
