"""The tokenizer of a .gguf file, rebuilt from the file's own vocabulary."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gvpo_jax.errors import UserError

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types
_SPECIALS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Tokens that end a turn, of which llama.cpp takes one by its text where no key names it.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>")
_END_OF_MESSAGE = ("<|eom_id|>",)
# How text is cut into words, by tokenizer.ggml.pre: llama.cpp's expressions, one after the other.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_WORDS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (_QWEN2,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe"), (_LLAMA3,)),
}
_LLAMA3_KINDS = ("llama-bpe", "llama3", "llama-v3")


def build_tokenizer(
    source: str, metadata: Mapping[str, Any], max_length: int
) -> PreTrainedTokenizerBase:
    """The tokenizer in GGUF metadata, with its special tokens and chat templates.

    Raises:
        UserError: a kind of tokenizer that is unknown here, or a special token's id that is none of
            its tokens.
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    model, kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model == "gpt2" and "tokenizer.ggml.merges" in metadata:
        kind = kind or "default"
        tokenizer = _byte_level(source, kind, tokens, metadata["tokenizer.ggml.merges"])
    elif model == "llama" and "tokenizer.ggml.scores" in metadata:
        tokenizer = _sentencepiece(tokens, metadata)
    else:
        raise UserError(
            f"{source}: tokenizers of the kind {model!r} are not read from .gguf files; "
            "load the model's safetensors folder instead"
        )
    _add_marked_tokens(tokenizer, tokens, metadata.get("tokenizer.ggml.token_type", ()))
    specials = _special_tokens(source, tokens, metadata)
    bos = specials.get("bos_token")
    adds_bos = model == "llama" or kind in _LLAMA3_KINDS  # where the file does not say
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", adds_bos):
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokens.index(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_chat_template(metadata),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **specials,
    )


def end_token_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Tokens that end a completion: of the text, of a turn and of a message."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    ids = [metadata.get("tokenizer.ggml.eos_token_id")]
    for kind, texts in (("eot", _END_OF_TURN), ("eom", _END_OF_MESSAGE)):
        by_text = next((tokens.index(text) for text in texts if text in tokens), None)
        ids.append(metadata.get(f"tokenizer.ggml.{kind}_token_id", by_text))
    return list(dict.fromkeys(i for i in ids if i is not None))


def _byte_level(source: str, kind: str, tokens: list[str], merges: list[str]) -> Tokenizer:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=pairs, ignore_merges=kind in _LLAMA3_KINDS))
    if _WORDS.get(kind) == (_QWEN2,):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(source, kind)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: list[str], metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE, as transformers has it: the pieces' scores say what is merged first."""
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [
        (-score, vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in zip(tokens, metadata["tokenizer.ggml.scores"], strict=True)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _pre_tokenizer(source: str, kind: str) -> PreTokenizer:
    if kind not in _WORDS:
        raise UserError(
            f"{source}: tokenizer kind {kind!r} is not read from .gguf files; "
            "load the model's safetensors folder instead"
        )
    splits = [Split(Regex(words), behavior="isolated") for words in _WORDS[kind]]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


def _add_marked_tokens(tokenizer: Tokenizer, tokens: list[str], types: Any) -> None:
    # They are in the vocabulary already: this keeps their ids and stops them from being cut.
    # Each call goes through all that were added before: Gemma has 6,000.
    control, own = (
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, of_token in zip(tokens, types, strict=False)
            if of_token == kind
        ]
        for kind in (_CONTROL, _USER_DEFINED)
    )
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(own)


def _special_tokens(source: str, tokens: list[str], metadata: Mapping[str, Any]) -> dict[str, str]:
    ids = {
        name: metadata.get(f"tokenizer.ggml.{kind}_token_id") for name, kind in _SPECIALS.items()
    }
    for name, i in ids.items():
        if i is not None and not 0 <= i < len(tokens):
            raise UserError(
                f"{source}: its {name} has the id {i}, and there are {len(tokens)} tokens"
            )
    return {name: tokens[i] for name, i in ids.items() if i is not None}


def _chat_template(metadata: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template; where there are further ones by name, all of them."""
    key = "tokenizer.chat_template"
    names = metadata.get(f"{key}s", ())
    named = {name: metadata[f"{key}.{name}"] for name in names if f"{key}.{name}" in metadata}
    if named and key in metadata:
        return {"default": metadata[key], **named}
    return named or metadata.get(key)
