"""A tiny random Llama and a tokenizer of single bytes: the whole program without a download."""

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from gvpo_jax.models.decoder import DecoderConfig
from gvpo_jax.models.hf_tensors import TensorSource, tensor_specs

_SPECIALS = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def debug_config() -> DecoderConfig:
    """Two layers of width 64: compiles in seconds, yet has grouped heads and an untied head."""
    return DecoderConfig(
        family="llama",
        vocab_size=256 + len(_SPECIALS),
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
    )


def debug_tensors(config: DecoderConfig) -> TensorSource:
    """Random weights under Hugging Face names, the same ones in whatever order they are read."""
    shapes = {name: spec.shape for name, spec in tensor_specs(config).items()}
    seeds = {name: seed for seed, name in enumerate(shapes)}

    def read(name: str) -> np.ndarray:
        shape = shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        noise = np.random.default_rng(seeds[name]).standard_normal(shape, np.float32)
        return noise / np.float32(np.sqrt(shape[-1]))

    return TensorSource("the debug model", shapes, read)


def debug_tokenizer() -> PreTrainedTokenizerBase:
    """Token i is byte i, followed by pad, eos and the two chat marks; with a chat template."""
    vocab = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in _SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIALS[0],
        eos_token=_SPECIALS[1],
        additional_special_tokens=_SPECIALS[2:],
        chat_template=_CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
