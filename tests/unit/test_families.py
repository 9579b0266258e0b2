"""Every family against transformers: a tiny random model of its own, saved, loaded, exported.

Odd sizes, windows shorter than prompts and completions, prompts of two lengths.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from gvpo_jax.errors import UserError
from gvpo_jax.models.decoder import decoder_fns, full_logits
from gvpo_jax.models.export import export_model
from gvpo_jax.models.families import granite
from gvpo_jax.models.family import all_families, families_table
from gvpo_jax.models.hf_config import config_json, decoder_config, for_length
from gvpo_jax.models.hf_files import read_json, write_json
from gvpo_jax.models.hf_tensors import named_tensors
from gvpo_jax.models.load import load_model, stop_token_ids
from gvpo_jax.parallel.layout import LAYOUT, path_name
from gvpo_jax.rollout.engine import SamplingParams
from gvpo_jax.rollout.inprocess import InProcessEngine, SamplingModel
from gvpo_jax.trainer import Trainer
from gvpo_jax.training.step import token_logps

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
KINDS = ["sliding_attention", "full_attention"]
LOCAL_THEN_ALL = {"layer_types": KINDS, "sliding_window": 4}
GEMMA = {"head_dim": 6, "query_pre_attn_scalar": 5} | LOCAL_THEN_ALL
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GROWING = {"llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 1e6}
GROWING |= {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 5}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [1.5, 2.0, 4.0]}
GEMMA4 = {"vocab_size_per_layer_input": 61}
# One line a family: what its model has beside SHAPE.
FAMILIES = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},
    "qwen3": {"head_dim": 10, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 4, "head_dim": 10},
    "ministral": LOCAL_THEN_ALL | {"head_dim": 6},
    "ministral3": {"head_dim": 6, "rope_parameters": GROWING, "sliding_window": None},
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GEMMA | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma4_text": {"num_hidden_layers": 5, "layer_types": [*KINDS, *KINDS[::-1], KINDS[1]]}
    | {"sliding_window": 4, "head_dim": 6, "global_head_dim": 8, "attention_k_eq_v": True}
    | {"num_global_key_value_heads": 3, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    | {"hidden_size_per_layer_input": 6, "final_logit_softcapping": 3.0, **GEMMA4},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    | {"norm_topk_prob": True, "head_dim": 6, "mlp_only_layers": [0], "num_hidden_layers": 3},
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    | {"shared_expert_intermediate_size": 20, "num_hidden_layers": 4, "decoder_sparse_step": 2}
    | {"mlp_only_layers": [3], "use_sliding_window": True, "sliding_window": 5},
    "smollm3": {"no_rope_layers": [1, 0], "sliding_window": 4, "use_sliding_window": True},
    "olmo2": {"num_key_value_heads": 3},
    "olmo3": LOCAL_THEN_ALL | {"rope_scaling": YARN},
    "phi3": {"sliding_window": 5, "rope_scaling": LONGROPE, "partial_rotary_factor": 0.75}
    | {"hidden_size": 48, "original_max_position_embeddings": 5},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.6, "mlp_bias": True}
    | {"embedding_multiplier": 5.0, "logits_scaling": 0.5},
}
P, T, K = 9, 7, 2
PROMPT_LENGTHS, LENGTHS = np.array([9, 6]), np.array([[7, 4], [5, 7]])
RNG = np.random.default_rng(0)
PROMPTS, COMPLETIONS = RNG.integers(3, 61, (2, P)), RNG.integers(3, 61, (2, K, T))
WEIGHTS = RNG.normal(size=(2, K, T)).astype(np.float32)


class Case:
    """A family's model in PyTorch, its folder, and the same model loaded from there."""

    def __init__(self, name, folder, **settings):
        config = transformers.AutoConfig.for_model(name, **SHAPE | FAMILIES[name] | settings)
        self.torch = random_model(config)
        self.torch.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        self.folder, self.ours = folder, load_model(str(folder), length=P + T)
        self.fns = decoder_fns(self.ours.config)


def random_model(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    of_files = (buffer for _, buffer in saved_buffers(model))
    for tensor in (*model.parameters(), *of_files):  # norms and biases too
        tensor.data += 0.2 * torch.randn(tensor.shape)
    return model.float().eval()


def tokenizer():
    vocabulary = {f"w{i}": i for i in range(SHAPE["vocab_size"])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="w0", eos_token="w1")


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def sequence(g, k):
    """A prompt and its completion, without padding."""
    return [*PROMPTS[g, : PROMPT_LENGTHS[g]], *COMPLETIONS[g, k, : LENGTHS[g, k]]]


def torch_logps(model, tokens, prompt_length):
    """Of the completion's tokens."""
    ids = torch.tensor([tokens])
    logps = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
    return logps[:-1].gather(1, ids[0, 1:, None])[prompt_length - 1 :, 0]


def torch_gradients(model):
    """By the names in files; PyTorch's model holds experts stacked, gate above up."""
    for name, parameter in model.named_parameters():
        layer, found, part = name.partition(".experts.")
        for i, of_expert in enumerate(parameter.grad if found else ()):
            parts = of_expert.chunk(2) if part == "gate_up_proj" else (of_expert,)
            names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
            for of, tensor in zip(names, parts, strict=True):
                yield f"{layer}.experts.{i}.{of}.weight", tensor
        if not found:
            yield name, parameter.grad


@pytest.fixture
def compare(record_property):
    """Asserts that numbers agree, and notes for experiments/parity by how much they don't."""
    found = {}

    def check(what, ours, theirs, scale=1.0):
        apart = float(np.max(np.abs(np.asarray(ours) - np.asarray(theirs)))) / scale
        found[what] = max(found.get(what, 0.0), apart)
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * scale, err_msg=what)

    yield check
    for what, apart in found.items():
        record_property(what, apart)


def saved_buffers(model):
    """Which files hold and nothing trains."""
    kept = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def test_every_family_has_its_line():
    assert FAMILIES.keys() == all_families().keys()


def test_the_readme_lists_them():
    assert f"\n{families_table()}\n" in (Path(__file__).parents[2] / "README.md").read_text()


def test_contributing_shows_a_real_one():
    shown = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    assert f"```python\n{Path(granite.__file__).read_text()}```\n" in shown


def test_logits(case, compare):
    ids = np.array([sequence(0, 0)])
    with torch.no_grad():
        expected = case.torch(input_ids=torch.tensor(ids)).logits.numpy()
    logits = jax.jit(functools.partial(full_logits, case.ours.config))(case.ours.params, ids)
    compare("logits", logits, expected)


def test_log_probs_and_gradients(case, compare):
    """Packed, behind a shared prompt; gradients of every tensor by its name."""
    arrays = PROMPTS, PROMPT_LENGTHS, COMPLETIONS, LENGTHS
    kept = np.arange(T) < LENGTHS[..., None]
    size = int(PROMPT_LENGTHS.sum() + (LENGTHS - 1).sum())

    def loss(params):
        logps = token_logps(case.fns, params, *arrays, packed_size=size)
        return jnp.sum(jnp.where(kept, WEIGHTS * logps, 0)), logps

    (_, logps), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.ours.params)
    case.torch.zero_grad()
    for g, k in np.ndindex(2, K):
        expected = torch_logps(case.torch, sequence(g, k), PROMPT_LENGTHS[g])
        (torch.tensor(WEIGHTS[g, k, : LENGTHS[g, k]]) * expected).sum().backward()
        compare("log-probs", logps[g, k, : LENGTHS[g, k]], expected.detach())
    ours = named_tensors(case.ours.config, grads)
    theirs = dict(torch_gradients(case.torch))
    theirs |= {name: torch.zeros_like(of_file) for name, of_file in saved_buffers(case.torch)}
    assert theirs.keys() == ours.shapes.keys()
    for name, gradient in theirs.items():
        scale = max(1, float(gradient.abs().max()))
        compare("gradients", ours.read(name), gradient, scale)


def test_greedy_text(case, compare):
    engine = InProcessEngine(SamplingModel(case.fns), stop_ids=())
    prompts = [row[:n].tolist() for row, n in zip(PROMPTS, PROMPT_LENGTHS, strict=True)]
    groups = engine.generate(
        case.ours.params,
        prompts,
        [0, 1],
        num_generations=K,
        max_completion_length=T,
        sampling=SamplingParams(temperature=0.0),
        seed=0,
    )
    for g, prompt in enumerate(prompts):
        whole = case.torch.generate(
            torch.tensor([prompt]), max_new_tokens=T, do_sample=False, eos_token_id=None
        )
        for k in range(K):
            assert groups.completions[g][k].tolist() == whole[0, len(prompt) :].tolist()
        with torch.no_grad():
            expected = torch_logps(case.torch, whole[0].tolist(), len(prompt))
        compare("sampler's log-probs", groups.old_logps[g], [expected.numpy()] * K)


def test_longrope_has_other_factors_for_short_sequences(tmp_path):
    case = Case("phi3", tmp_path)
    short = load_model(str(tmp_path), length=5).config
    ids = np.array([sequence(0, 0)[:5]])
    with torch.no_grad():
        expected = case.torch(input_ids=torch.tensor(ids)).logits.numpy()
    logits, others = (
        jax.jit(functools.partial(full_logits, c))(case.ours.params, ids)
        for c in (short, case.ours.config)
    )
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert np.abs(others - expected).max() > 1e-2


def test_export_is_equal_to_the_bit(case, tmp_path):
    export_model(tmp_path / "out", case.ours, case.ours.params)
    before, after = (load_file(f / "model.safetensors") for f in (case.folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([sequence(1, 1)])
    with torch.no_grad():
        expected, logits = (m(input_ids=ids).logits.numpy() for m in (case.torch, again))
    # PyTorch's products round by where in memory the same weights lie.
    np.testing.assert_allclose(logits, expected, atol=1e-4)


def test_every_parameter_has_a_layout_on_a_mesh(case):
    for path, leaf in jax.tree.leaves_with_path(case.ours.params):
        spec = next((spec for pattern, spec in LAYOUT if re.search(pattern, path_name(path))), None)
        assert spec is not None, path_name(path)
        assert len(spec) == leaf.ndim, path_name(path)


def test_config_json_round_trip(case):
    values = read_json(case.folder / "config.json")
    assert values is not None
    config = decoder_config(values)
    assert for_length(config, P + T) == case.ours.config
    assert decoder_config(config_json(config)) == config


# the language model of a multimodal checkpoint


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    return Case("gemma3_text", tmp_path_factory.mktemp("gemma3"))


def multimodal(text, folder, rename):
    """A checkpoint of a whole Gemma 3 around this model, its text config as sparse as the hub's."""
    tensors = load_file(text.folder / "model.safetensors")
    tensors = {rename(name): tensor for name, tensor in tensors.items()}
    extra = ("vision_tower.encoder.weight", "model.multi_modal_projector.weight")
    save_file(
        tensors | dict.fromkeys(extra, np.ones((2, 3), np.float32)), folder / "model.safetensors"
    )
    values = read_json(text.folder / "config.json")
    silent = all_families()["gemma3_text"].silent
    sparse = {k: v for k, v in values.items() if silent.get(k, 0) != v and k != "architectures"}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    write_json(folder / "config.json", whole | {"text_config": sparse, "eos_token_id": [1, 7]})
    tokenizer().save_pretrained(folder)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"language_model.{name}",
        lambda name: name.replace("model.", "model.language_model.", 1),
    ],
)
def test_the_language_model_of_a_multimodal_checkpoint(gemma3, tmp_path, rename):
    multimodal(gemma3, tmp_path, rename)
    half = load_model(str(tmp_path))
    assert half.config == gemma3.ours.config
    jax.tree.map(np.testing.assert_array_equal, half.params, gemma3.ours.params)
    export_model(tmp_path / "out", half, half.params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([sequence(0, 1)])
    with torch.no_grad():
        expected, logits = (m(input_ids=ids).logits.numpy() for m in (gemma3.torch, again))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_what_gemma4_files_hold_in_vain_is_left_out(tmp_path):
    case = Case("gemma4_text", tmp_path)
    file, vain = tmp_path / "model.safetensors", np.ones((2, 2), np.float32)
    save_file(load_file(file) | {"model.layers.4.self_attn.k_proj.weight": vain}, file)
    again = load_model(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, again.params, case.ours.params)
    save_file(load_file(file) | {"model.layers.1.self_attn.v_proj.weight": vain}, file)
    with pytest.raises(
        UserError, match=r"holds tensor model\.layers\.1\.self_attn\.v_proj\.weight"
    ):
        load_model(str(tmp_path))


def test_a_stranger_among_the_tensors_is_refused(gemma3, tmp_path):
    multimodal(gemma3, tmp_path, lambda name: f"language_model.{name}")
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"speech.weight": np.ones(3, np.float32)}, file)
    with pytest.raises(UserError, match=r"holds tensor speech\.weight, which a gemma3_text"):
        load_model(str(tmp_path))


def test_a_family_names_tokens_that_stop(gemma3):
    vocabulary = tokenizer()
    vocabulary.add_special_tokens({"additional_special_tokens": ["w9", "<end_of_turn>"]})
    config = dataclasses.replace(gemma3.ours.config, vocab_size=62)
    model = dataclasses.replace(gemma3.ours, tokenizer=vocabulary, config=config)
    assert stop_token_ids(model) == (1, 61)
    assert stop_token_ids(gemma3.ours) == (1,)


# what is refused


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "gemma3n"}, "model_type gemma3n is not supported; supported are gemma2, "),
        (
            {"architectures": ["VL"], "text_config": {"model_type": "qwen2_5_vl_text"}},
            "VL is multimodal, and its language model, 'qwen2_5_vl_text', is not supported; ",
        ),
        ({"sliding_window": 0}, "sliding_window is 0; layers that have one need a positive"),
        ({"sliding_window": "4"}, "sliding_window is '4'"),
        ({"layer_types": ["sliding_attention"]}, "lists 1 layers, num_hidden_layers is 2"),
        ({"layer_types": ["linear_attention"] * 2}, "'linear_attention'. are not supported, only"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_"),
        ({"model_type": "gemma4_text", "enable_moe_block": True}, "only the dense models are"),
        ({"model_type": "gemma4_text", "num_kv_shared_layers": 1} | GEMMA4, "shared_layers is 1: "),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 200}, "200 is not of 1 to 128"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers lists 1 layers, num_"),
        ({"model_type": "gemma2", "hidden_activation": "relu"}, "hidden_activation 'relu' is not"),
    ],
)
def test_configs_that_are_refused(values, words):
    with pytest.raises(UserError, match=f"^config.json: .*{words}"):
        decoder_config({"model_type": "mistral", **SHAPE, **values})


@pytest.mark.parametrize("name", ["gemma3_text", "llama"])
def test_a_reference_in_bfloat16_scores_as_the_policy_does(name, tmp_path):
    """To the last bit: norms that are computed in float32 are not rounded in the copy."""
    settings = {"model__dtype": "bfloat16", "data__max_prompt_length": P}
    c = small_run.config(tmp_path / "run", **settings)
    policy = Trainer(c, Case(name, tmp_path / "model").ours).policy
    logps = [
        policy.logps_of_all(params, PROMPTS, PROMPT_LENGTHS, COMPLETIONS[:, :1])
        for params in (policy.params, policy.reference)
    ]
    np.testing.assert_array_equal(*logps)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(policy.reference)}
    assert dtypes == ({"bfloat16", "float32"} if name == "gemma3_text" else {"bfloat16"})


SENSELESS = ["x", "", None, [], {}, -1, 0, 0.5, 1e30, 10**30, float("inf"), float("nan"), [1, "x"]]


@pytest.mark.parametrize("name", FAMILIES)
def test_whatever_config_json_holds_is_a_decoder_or_one_line(name):
    values = json.loads(
        transformers.AutoConfig.for_model(name, **SHAPE | FAMILIES[name]).to_json_string()
    )
    values["architectures"] = [all_families()[name].architecture]
    places = [(values, key) for key in values | dict(all_families()[name].silent)]
    places += [
        (entry, key) for entry in values.values() if isinstance(entry, dict) for key in entry
    ]
    for (of, key), value in itertools.product(places, SENSELESS):
        changed = {**of, key: value}
        if of is not values:
            changed = {k: changed if entry is of else entry for k, entry in values.items()}
        with contextlib.suppress(UserError):  # and no other
            config = decoder_config(changed)
            assert math.isfinite(config.rope_theta + config.rms_norm_eps), (key, value)
            assert hash(config) is not None, (key, value)
