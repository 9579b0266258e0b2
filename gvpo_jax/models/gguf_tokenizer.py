"""The tokenizer of a .gguf file, rebuilt from the file's own vocabulary and merges."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gvpo_jax.errors import UserError

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types
_SPECIALS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# How Qwen2 and Llama 3 cut text into words; they differ in how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(
    source: str, metadata: Mapping[str, Any], max_length: int
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer from GGUF metadata, with its special tokens and chat template.

    Raises UserError for another kind of tokenizer or one that cuts text in a way unknown here.
    """
    if metadata.get("tokenizer.ggml.model") != "gpt2" or "tokenizer.ggml.merges" not in metadata:
        raise UserError(
            f"{source}: only byte-level BPE tokenizers are read from .gguf files; "
            "load the model's safetensors folder instead"
        )
    kind = metadata.get("tokenizer.ggml.pre", "default")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = (merge.partition(" ") for merge in metadata["tokenizer.ggml.merges"])
    merges = [(left, right) for left, _, right in pairs]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=kind == "llama-bpe"))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(source, kind)
    tokenizer.decoder = decoders.ByteLevel()
    _add_marked_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", ()))
    specials = _special_tokens(tokens, metadata)
    bos = specials.get("bos_token")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", kind == "llama-bpe"):
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokens.index(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **specials,
    )


def _pre_tokenizer(source: str, kind: str) -> PreTokenizer:
    whole = ByteLevel(add_prefix_space=False)
    if kind in ("default", "gpt-2"):
        return whole
    if kind == "smollm":
        return Sequence([Digits(individual_digits=True), whole])
    if kind in ("qwen2", "llama-bpe"):
        words = _WORDS.replace("DIGITS", "" if kind == "qwen2" else "{1,3}")
        split = Split(Regex(words), behavior="isolated")
        return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    raise UserError(
        f"{source}: tokenizer kind {kind!r} is not read from .gguf files; "
        "load the model's safetensors folder instead"
    )


def _add_marked_tokens(tokenizer: Tokenizer, tokens: list[str], types: Any) -> None:
    # They are in the vocabulary already: this keeps their ids and stops them from being cut.
    for token, kind in zip(tokens, types, strict=False):
        if kind == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])


def _special_tokens(tokens: list[str], metadata: Mapping[str, Any]) -> dict[str, str]:
    ids = {key: metadata.get(f"tokenizer.ggml.{kind}_token_id") for key, kind in _SPECIALS.items()}
    return {key: tokens[i] for key, i in ids.items() if i is not None}
