"""GGUF of Gemma 3 and of mixtures of experts: written here as llama.cpp's converter does."""

import functools

import gguf
import jax
import numpy as np
import pytest
import torch
import transformers
from test_families import FAMILIES, SHAPE, random_model, tokenizer
from test_models_load import CORPUS, TEXTS, small_bpe

from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import full_logits
from gvpo_jax.models.gguf_tokenizer import build_tokenizer
from gvpo_jax.models.load import load_model

ARCHITECTURES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "qwen2_moe": "qwen2moe"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

# What a file can hold: llama.cpp knows of no dense layers among others, and of Gemma's pattern.
CHANGES = {
    "gemma3_text": {"num_hidden_layers": 6, "layer_types": None, "query_pre_attn_scalar": 6},
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen2_moe": {"mlp_only_layers": [], "decoder_sparse_step": 1, "use_sliding_window": False},
}


def random_one(family):
    tokens, _, _ = small_bpe()
    values = SHAPE | FAMILIES[family] | CHANGES[family] | {"vocab_size": len(tokens)}
    return random_model(transformers.AutoConfig.for_model(family, **values))


def write(path, model, changes=None):
    """The model's weights and sizes in a .gguf file, with a byte-level tokenizer."""
    c = model.config
    arch = ARCHITECTURES[c.model_type]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    if arch == "gemma3":
        writer.add_rope_freq_base(c.rope_parameters["full_attention"]["rope_theta"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c.rope_parameters["full_attention"]["factor"])
        writer.add_sliding_window(c.sliding_window)
    else:
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_expert_count(c.num_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    if arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    for key, value in (changes or {}).items():
        writer.add_uint32(f"{arch}.{key}", value)
    tokens, merges, specials = small_bpe()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in specials else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(len(tokens) - 1)
    for name, array in stored_tensors(model):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_tensors(model):
    """As the converter has them: gates of shared experts are vectors, Gemma's norms 1 + w."""
    gemma = model.config.model_type == "gemma3_text"
    names = NAMES | (GEMMA_NAMES if gemma else {})
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.numpy() + (1 if gemma and name.endswith("norm.weight") else 0)
        name, _, kind = name.removeprefix("model.layers.").rpartition(".")
        layer, _, part = name.partition(".")
        start = f"blk.{layer}." if layer.isdigit() else ""
        if kind == "gate_up_proj":
            gate, up = np.split(array, 2, axis=1)
            yield f"{start}ffn_gate_exps.weight", np.ascontiguousarray(gate)
            yield f"{start}ffn_up_exps.weight", np.ascontiguousarray(up)
        elif kind == "down_proj":
            yield f"{start}ffn_down_exps.weight", array
        else:
            array = array[0] if part == "mlp.shared_expert_gate" else array
            yield f"{start}{names[part if start else name]}.{kind}", array


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request, tmp_path_factory):
    """A PyTorch model, and the file with its weights."""
    model = random_one(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    write(folder / "x.gguf", model)
    return model, folder


def test_the_file_is_the_folder(pair, tmp_path):
    model, folder = pair
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    ours, theirs = load_model(str(folder / "x.gguf")), load_model(str(tmp_path))
    assert ours.config == theirs.config
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=3e-7)  # 1 + w, minus 1
    jax.tree.map(close, ours.params, theirs.params)


def test_logits_are_those_of_transformers_from_the_same_file(pair):
    model, folder = pair
    # transformers reads from it neither how wide experts are nor what Gemma's scores scale by.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="x.gguf", config=model.config
    ).eval()
    ours = load_model(str(folder / "x.gguf"))
    ids = np.random.default_rng(0).integers(0, 250, (1, 14))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids)).logits.numpy()
    found = jax.jit(functools.partial(full_logits, ours.config))(ours.params, ids)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_of_gemma_3_only_27b_scales_scores_by_the_width_of_a_head_of_the_hidden_size(tmp_path):
    model = random_one("gemma3_text")
    write(tmp_path / "x.gguf", model)
    assert load_model(str(tmp_path / "x.gguf")).config.attention_multiplier == 6**-0.5
    write(tmp_path / "x.gguf", model, {"block_count": 62})
    with pytest.raises(UserError, match=r"lacks tensor model\.layers\.6"):
        load_model(str(tmp_path / "x.gguf"))


def test_gemmas_text_is_cut_as_sentencepiece_does_without_a_space_in_front(tmp_path):
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        add_dummy_prefix=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    every = range(theirs.vocab_size())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in every],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in every],
        "tokenizer.ggml.token_type": [[1, 3][theirs.is_control(i)] for i in every],
        "tokenizer.ggml.bos_token_id": theirs.bos_id(),
        "tokenizer.ggml.add_space_prefix": False,
    }
    ours = build_tokenizer("x.gguf", metadata, 64)
    for text in [*TEXTS[:3], *CORPUS, " 4", "x != y"]:
        ids = theirs.encode(text)
        assert ours(text).input_ids == [theirs.bos_id(), *ids]
        assert ours.decode(ids, clean_up_tokenization_spaces=False) == theirs.decode(ids)
