"""Reward models: against transformers in PyTorch, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from gvpo_jax.cli import main
from gvpo_jax.config import Config
from gvpo_jax.errors import UserError
from gvpo_jax.memory import memory_needed
from gvpo_jax.models.debug import debug_config, debug_tokenizer
from gvpo_jax.models.reward_model import open_reward_model
from gvpo_jax.parallel.mesh import MeshConfig
from gvpo_jax.rewards import RewardConfig, RewardError, compute_rewards, load_reward_func
from gvpo_jax.rewards.functions import code_fingerprint
from gvpo_jax.rewards.load import is_reward_model
from gvpo_jax.rewards.model import RewardModel, RewardModelConfig
from gvpo_jax.rundir.files import read_metrics

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "num_labels": 1,
}
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3")


def make(folder, family="qwen2", **changes):
    """A random reward model in a folder, and the same in PyTorch."""
    tokenizer = debug_tokenizer()
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    given = {**SIZES, "vocab_size": len(tokenizer), "bos_token_id": None, **ends, **changes}
    if family.startswith("gemma"):
        given |= {"query_pre_attn_scalar": 8, "sliding_window": 16}
    config = transformers.AutoConfig.for_model(family, **given)
    model = transformers.AutoModelForSequenceClassification.from_config(config).float().eval()
    for parameter in model.parameters():  # biases and norms, too, are like no others
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "judge"
    return folder, *make(folder)


def by_torch(model, tokenizer, texts):
    """As TRL scores texts."""
    padded = tokenizer(
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side="right",
        add_special_tokens=False,
    )
    padded.pop("token_type_ids", None)
    with torch.no_grad():
        return model(**padded).logits[:, 0].numpy()


CHATS = [
    ([{"role": "user", "content": "What is 2 + 2?"}], [{"role": "assistant", "content": "Four."}]),
    ([{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "a" * 40}]),
    (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
        [{"role": "assistant", "content": ""}],
    ),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers(tmp_path, family):
    model, tokenizer = make(tmp_path / "m", family)
    reward = RewardModel(str(tmp_path / "m"), RewardModelConfig(batch_size=2))
    prompts, completions = ["Once upon", "x", "a b c " * 9], [" a time", "", " and so on"]
    texts = [p + c for p, c in zip(prompts, completions, strict=True)]
    np.testing.assert_allclose(
        reward(prompts, completions), by_torch(model, tokenizer, texts), rtol=2e-4, atol=2e-4
    )


def test_chats_are_written_by_the_reward_models_own_template(qwen2):
    folder, model, tokenizer = qwen2
    prompts, completions = zip(*CHATS, strict=True)
    texts = [tokenizer.apply_chat_template(p + c, tokenize=False) for p, c in CHATS]
    np.testing.assert_allclose(
        RewardModel(str(folder))(prompts, completions),
        by_torch(model, tokenizer, texts),
        rtol=2e-4,
        atol=2e-4,
    )


def test_a_text_that_ends_in_padding_is_scored_before_it(qwen2):
    folder, model, tokenizer = qwen2
    pad = tokenizer.decode([tokenizer.pad_token_id])
    texts = ["abc" + pad, "abc" + pad + pad]
    found = RewardModel(str(folder))(["abc", "abc"], [pad, pad + pad])
    np.testing.assert_allclose(found, by_torch(model, tokenizer, texts), rtol=2e-4, atol=2e-4)
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_scores_do_not_depend_on_the_batch_or_its_order(qwen2):
    folder, *_ = qwen2
    prompts, completions = ["a", "bb " * 20, "c", "dd", "e"], ["1", "2", "3 " * 15, "4", "5"]
    whole = RewardModel(str(folder), RewardModelConfig(batch_size=8))(prompts, completions)
    small = RewardModel(str(folder), RewardModelConfig(batch_size=1))
    back = small(prompts[::-1], completions[::-1])[::-1]
    np.testing.assert_allclose(whole, back, rtol=1e-4, atol=1e-4)
    assert np.ptp(whole) > 0.1


def test_bfloat16_is_near_float32(qwen2):
    folder, *_ = qwen2
    prompts, completions = ["Once upon a time"] * 2, [" there was", " x"]
    exact = RewardModel(str(folder))(prompts, completions)
    rough = RewardModel(str(folder), RewardModelConfig(dtype="bfloat16"))(prompts, completions)
    assert rough != exact
    np.testing.assert_allclose(rough, exact, atol=0.1 * max(1, np.abs(exact).max()))


def test_the_weights_lie_cut_over_the_devices(qwen2):
    folder, *_ = qwen2
    reward = RewardModel(str(folder))
    reward(["a"], ["b"])
    kernel = reward._scorer._params["decoder"]["layers"][0]["attn"]["q"]["kernel"]
    assert len(jax.devices()) == 8
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_a_text_that_is_too_long_fails_its_row_alone(qwen2):
    folder, *_ = qwen2
    found = RewardModel(str(folder))(["a", "b", ""], ["c " * 400, "d", ""])
    assert isinstance(found[0], RewardError)
    assert "made for 1 to 128" in str(found[0])
    assert isinstance(found[1], float)
    assert isinstance(found[2], RewardError)


def test_what_a_completion_says_fails_its_row_alone(qwen2, tmp_path):
    folder, _, tokenizer = qwen2
    shutil.copytree(folder, tmp_path / "m")
    more = type(tokenizer).from_pretrained(folder)
    more.add_tokens(["<unknown-here>"])  # that has no row in the embeddings
    more.chat_template = (
        "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('not that') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    more.save_pretrained(tmp_path / "m")
    reward, whole = RewardModel(str(tmp_path / "m")), RewardModel(str(folder))
    found = reward(["a", "a", "a"], ["<unknown-here>", "b", "\ud800"])
    assert "has no embedding for token" in str(found[0])
    assert found[1] == pytest.approx(whole(["a"], ["b"])[0], abs=1e-5)
    assert isinstance(found[2], Exception)
    chats = [[[{"role": role, "content": x}] for x in "ab"] for role in ("user", "assistant")]
    chats[1][0][0]["content"] = "no"
    found = reward(*chats)
    assert "not that" in str(found[0])
    assert isinstance(found[1], float)


def test_it_is_one_of_several_rewards_of_a_run(qwen2):
    folder, *_ = qwen2
    config = RewardConfig(funcs=[str(folder), "gvpo_jax.rewards.debug:letter_share"])
    model, share = config.functions()
    scores = compute_rewards(
        [model, share],
        [2.0, 1.0],
        prompts=["a", "b"],
        completions=["c", "d"],
        completion_ids=[[1], [2]],
        columns={"solution": ["x", "y"]},
    )
    assert list(scores.by_func) == ["judge", "letter_share"]
    np.testing.assert_allclose(
        scores.rewards, 2 * np.array(model(["a", "b"], ["c", "d"])) + 1, rtol=1e-5
    )


def test_another_models_code_is_another(qwen2, tmp_path):
    folder, *_ = qwen2
    torch.manual_seed(1)
    make(tmp_path / "judge")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    assert code_fingerprint(RewardModel(str(folder))) == code_fingerprint(RewardModel(str(copy)))
    save_file({**tensors, "score.weight": tensors["score.weight"] + 1}, copy / "model.safetensors")
    assert code_fingerprint(RewardModel(str(folder))) != code_fingerprint(RewardModel(str(copy)))


@pytest.mark.parametrize(
    ("spec", "is_one"),
    [
        ("org/name", True),
        ("gs://bucket/model", True),
        ("my_rewards.py", False),
        ("rewards/my_rewards.py", False),
        ("module:function", False),
        ("a/b.py:f", False),
        ("correct", False),
        ("", False),
    ],
)
def test_what_is_taken_for_a_reward_model(spec, is_one):
    assert is_reward_model(spec) == is_one


def change(folder, copy, **values):
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text()) | values
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "its architecture is Qwen2ForCausalLM"),
        ({"architectures": None}, "its architecture is not given"),
        ({"architectures": 5}, "its architecture is 5"),
        ({"model_type": "bert"}, "model_type bert is not supported"),
        ({"hidden_size": 64}, "score.weight is \\[1, 32\\]"),
    ],
)
def test_what_is_no_reward_model_is_refused(qwen2, tmp_path, values, told):
    with pytest.raises(UserError, match=told) as caught:
        open_reward_model(str(change(qwen2[0], tmp_path / "m", **values)))
    assert "\n" not in str(caught.value)


def test_two_labels_are_refused(tmp_path):
    make(tmp_path / "m", num_labels=2)
    with pytest.raises(UserError, match="gives 2 numbers for a text"):
        open_reward_model(str(tmp_path / "m"))


def test_weights_that_are_not_finite_are_refused(qwen2, tmp_path):
    folder = change(qwen2[0], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["score.weight"][0, 3] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"score\.weight"):
        RewardModel(str(folder))(["a"], ["b"])


def test_folders_and_names_without_a_model_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no folder with a config.json"):
        load_reward_func(str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"or give a reward model's folder, or its hub name .there is no folder correct here",
    ):
        load_reward_func("correct")


def test_chats_without_a_template_are_refused(qwen2, tmp_path):
    folder = change(qwen2[0], tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    reward = RewardModel(str(folder))
    assert reward(["a"], ["b"])
    with pytest.raises(UserError, match="has no chat template"):
        reward([CHATS[0][0]], [CHATS[0][1]])


def test_a_run_trains_with_it_and_goes_on_when_it_lies_elsewhere(qwen2, tmp_path, capsys):
    folder, run = qwen2[0], tmp_path / "run"
    command = ["train", "debug", f"run.dir={run}", "data.eval_size=2", "train.batch_size=8"]
    assert main([*command, "train.steps=1", f"rewards.funcs=[{folder}]"]) == 0
    shutil.copytree(folder, tmp_path / "elsewhere" / "judge")
    moved = f"rewards.funcs=[{tmp_path}/elsewhere/judge]"
    assert main([*command, "train.steps=2", moved]) == 0
    metrics = read_metrics(run)
    assert [row["step"] for row in metrics if "reward" in row] == [1, 2]
    assert {"rewards/judge"} <= {key for row in metrics for key in row}
    assert main(["eval", str(run)]) == 0  # it is no code
    other = change(folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({**tensors, "score.weight": tensors["score.weight"] + 1}, other / "model.safetensors")
    shutil.rmtree(tmp_path / "elsewhere" / "judge")
    other.rename(tmp_path / "elsewhere" / "judge")
    capsys.readouterr()
    assert main([*command, "train.steps=3", moved]) == 2
    assert "the code of reward judge" in capsys.readouterr().err


def test_its_weights_count_in_the_memory_that_is_needed(qwen2):
    config = Config(rewards=RewardConfig(funcs=[str(qwen2[0])]))
    need = memory_needed(config, debug_config(), MeshConfig().mesh(), trains=True)
    numbers = sum(x.numel() for x in qwen2[1].parameters())
    assert need["reward models"] == 4 * numbers // 8
