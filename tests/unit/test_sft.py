"""Supervised fine-tuning, alone and as a warm start, against transformers and NumPy."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from small_run import config
from transformers import AutoModelForCausalLM

from gvpo_jax import commands
from gvpo_jax.config import Config
from gvpo_jax.config_file import load_config, open_run, override
from gvpo_jax.errors import UserError
from gvpo_jax.models.load import load_model
from gvpo_jax.rundir.files import read_metrics
from gvpo_jax.trainer import Trainer
from gvpo_jax.training.objectives import sft

WORDS = ("ash", "birch", "cedar", "fir", "oak", "elm")
ROWS = [{"prompt": f"Say {word}:", "solution": f" {word}"} for word in WORDS]


def trainer(folder, **settings):
    given = {"loss__name": "sft", "train__batch_size": 6, "mesh__fsdp": 1} | settings
    given = {"rollout__max_completion_length": 8, "data__shuffle": False} | given
    return Trainer(config(folder, **given), load_model("debug"))


def test_the_objective_is_a_plain_loop():
    rng = np.random.default_rng(0)
    logps, mask = -rng.exponential(size=(3, 2, 5)), rng.random((3, 2, 5)) < 0.6
    where = np.array([[True, True], [True, False], [False, True]])
    total, count = 0.0, 0
    for place in np.ndindex(mask.shape):
        if mask[place] and where[place[:2]]:
            total, count = total - logps[place], count + 1
    loss = sft()
    advantages = loss.advantages(jnp.zeros((3, 2)), where)
    value = loss.total(jnp.asarray(logps), None, None, advantages, mask, where)
    value = value / loss.count(advantages, mask, where)
    np.testing.assert_allclose(value, total / count, rtol=1e-6)
    nothing = np.zeros_like(mask)
    assert float(loss.count(advantages, nothing, where)) == 1


def test_loss_and_gradient_are_those_of_transformers(tmp_path):
    """Its cross-entropy over the completions' tokens, with the prompts' labels at -100."""
    ours = trainer(tmp_path / "run", train__steps=1, optimizer__name="sgd", optimizer__b1=0.0,
                   optimizer__learning_rate=0.5, optimizer__max_grad_norm=None)  # fmt: skip
    ours.save_pretrained(tmp_path / "before")
    ours.train_offline(ROWS)
    ours.save_pretrained(tmp_path / "after")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "before", dtype=torch.float32)
    total, tokens = 0.0, 0
    for row in ROWS:
        prompt = ours.tokenizer(row["prompt"]).input_ids
        answer = [*ours.tokenizer(row["solution"]).input_ids, ours.tokenizer.eos_token_id]
        labels = torch.tensor([[*[-100] * len(prompt), *answer]])
        loss = model(torch.tensor([[*prompt, *answer]]), labels=labels).loss
        total, tokens = total + loss * len(answer), tokens + len(answer)
    mean = total / tokens
    mean.backward()
    np.testing.assert_allclose(ours.history[0]["loss"], mean.item(), rtol=1e-5)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "after", dtype=torch.float32)
    moved = dict(after.named_parameters())
    for name, x in model.named_parameters():
        want = x.detach() - 0.5 * x.grad
        torch.testing.assert_close(moved[name].detach(), want, rtol=1e-4, atol=2e-6)


def test_metrics_of_rewards_are_left_out_and_the_loss_falls(tmp_path):
    t = trainer(tmp_path, train__steps=20)
    summary = t.train_offline(ROWS)
    losses = [row["loss"] for row in t.history]
    assert losses[-1] < losses[0] / 2
    assert summary["left_out/groups"] == 0
    strange = ("reward", "gvpo_mse", "weight_abs", "source/")
    assert not [name for name in t.history[0] if name.startswith(strange)]
    assert t.generate(["Say oak:"], seed=0)[0][0].strip() in {*WORDS, "oak"}


def test_micro_batches_and_devices_change_nothing(tmp_path):
    plain = {"train__steps": 3, "optimizer__name": "sgd", "optimizer__learning_rate": 0.1}
    one = trainer(tmp_path / "one", **plain)
    cut = trainer(tmp_path / "cut", **plain, train__micro_batches=3, mesh__fsdp=2)
    for t in (one, cut):
        t.train_offline(ROWS)
    for a, b in zip(*(jax.tree.leaves(t.policy.params) for t in (one, cut)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


LONG = [{"prompt": "a", "solution": "b" * 99}]


@pytest.mark.parametrize(
    ("rows", "settings", "told"),
    [
        (
            [{"prompt": "a", "answer": "b"}],
            {},
            "row 1: sft needs a text.* there are prompt, answer",
        ),
        ([{"prompt": "a", "solution": 3}], {}, "row 1: sft needs a text.* and it is '3'"),
        (LONG, {}, "row 1, solution: .*data.bad_samples=skip"),
        (LONG, {"data__bad_samples": "skip"}, "no row has a text"),
    ],
)
def test_rows_without_a_text_are_told(tmp_path, rows, settings, told):
    with pytest.raises(UserError, match=told):
        trainer(tmp_path, **settings).train_offline(rows)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loss__kl_coef": 0.1}, "leave out loss.kl_coef"),
        ({"rollout__demonstrations": 1}, "leave out rollout.demonstrations"),
        ({"sft__steps": 3}, "leave out sft.steps or sft.epochs"),
    ],
)
def test_what_samples_is_refused_beside_sft(settings, told):
    with pytest.raises(UserError, match=told):
        override(Config(), loss__name="sft", **settings)
    with pytest.raises(UserError, match=r"sft.steps=3 and sft.epochs=1 are both given"):
        override(Config(), sft__steps=3, sft__epochs=1.0)


def test_a_list_of_texts_is_each_of_them_and_another_column_is_taken(tmp_path):
    t = trainer(tmp_path, sft__column="texts", train__steps=1, train__batch_size=2)
    t.train_offline([{"prompt": "Say it:", "texts": [" oak", " elm"]}])
    eos = 1
    assert t.history[0]["num_tokens"] == sum(
        len(t.tokenizer("Say it:").input_ids) + len(t.tokenizer(x).input_ids) + eos
        for x in (" oak", " elm")
    )


# A warm start, and the run from there on.


def warm(folder, tmp_path, *more):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = [
        f"data.path={rows}", "data.tasks=[]", "data.eval_size=0", "data.max_prompt_length=16",
        "rollout.max_completion_length=8", "mesh.fsdp=1", "train.batch_size=2", "train.steps=2",
        "sft.steps=3", "sft.learning_rate=3e-3", f"run.dir={folder}", "log.samples=0",
    ]  # fmt: skip
    return load_config("debug", [*settings, *more])


def test_the_run_begins_with_the_warm_start_s_model_as_its_reference(tmp_path):
    run = tmp_path / "run"
    commands.train(warm(run, tmp_path))
    there = load_model(str(run / "sft" / "model"))
    began = load_config(run / "config.yaml")
    assert began.model.name == str(run / "sft" / "model")
    assert began.sft.steps is None
    assert [row["step"] for row in read_metrics(run / "sft")] == [1, 2, 3]
    assert read_metrics(run / "sft")[-1]["learning_rate"] == pytest.approx(3e-3)
    first = read_metrics(run)[0]
    assert first["log_ratio"] == pytest.approx(0, abs=1e-4)  # to the reference: that same model
    start = load_model("debug")
    moved = [np.abs(a - b).max() for a, b in zip(
        jax.tree.leaves(there.params), jax.tree.leaves(start.params), strict=True
    )]  # fmt: skip
    assert max(moved) > 1e-3


def test_it_is_done_once_and_goes_on_where_it_stopped(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    commands.train(warm(whole, tmp_path))
    commands.train(warm(run, tmp_path, "train.stop_at=1"))
    before = (run / "sft" / "metrics.jsonl").read_bytes()
    moved = tmp_path / "moved"
    shutil.move(run, moved)
    commands.train(open_run(moved, ["train.stop_at=null"]))
    shutil.move(moved, run)
    commands.train(warm(run, tmp_path))  # nothing to do
    assert (run / "sft" / "metrics.jsonl").read_bytes() == before
    losses = [[row["loss"] for row in read_metrics(folder)] for folder in (whole, run)]
    assert losses[0] == losses[1]
    for other in ("sft.learning_rate=0.001", "sft.steps=4"):
        with pytest.raises(UserError, match=f"with .*{other.partition('=')[0]}="):
            commands.train(warm(run, tmp_path, other))
    commands.train(warm(run, tmp_path, "sft.learning_rate=1e-3", "run.overwrite=true"))
    assert (run / "sft" / "metrics.jsonl").read_bytes() != before


def test_without_its_warm_start_the_run_says_what_it_began_with(tmp_path):
    commands.train(warm(tmp_path / "run", tmp_path, "train.stop_at=1"))
    with pytest.raises(UserError, match="began with a warm start: give the same"):
        commands.train(warm(tmp_path / "run", tmp_path, "sft.steps=null"))


def test_with_an_adapter_the_run_goes_on_with_it(tmp_path):
    run = tmp_path / "run"
    commands.train(warm(run, tmp_path, "model.lora.rank=2"))
    assert (run / "sft" / "model" / "adapter_model.safetensors").is_file()
    assert load_config(run / "config.yaml").model.adapter == str(run / "sft" / "model")


def test_a_mistake_of_the_run_shows_before_the_warm_start(tmp_path):
    with pytest.raises(UserError, match="no_such"):
        commands.train(warm(tmp_path / "run", tmp_path, "rewards.funcs=[no_such.py:f]"))
    assert not (tmp_path / "run" / "sft").exists()


def test_epochs_are_done_once_too(tmp_path):
    epochs = "sft.steps=null", "sft.epochs=1"
    commands.train(warm(tmp_path / "run", tmp_path, *epochs, "train.stop_at=1"))
    before = (tmp_path / "run" / "sft" / "metrics.jsonl").read_bytes()
    assert before.count(b"\n") == 3  # six rows, two at a time
    commands.train(warm(tmp_path / "run", tmp_path, *epochs))
    assert (tmp_path / "run" / "sft" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"began with a warm start of sft.epochs=1"):
        commands.train(warm(tmp_path / "run", tmp_path, "sft.steps=null", "sft.epochs=2"))


def failing(tmp_path):
    """A run whose warm start is done, and which then failed before its first checkpoint."""
    file = tmp_path / "own.py"
    file.write_text("def fails(prompt, completion):\n    return 1 / 0\n")
    run, reward = tmp_path / "run", f"rewards.funcs=['{file}:fails']"
    with pytest.raises(UserError, match="division by zero"):
        commands.train(warm(run, tmp_path, reward))
    return run


def test_what_samples_may_be_changed_until_the_run_has_begun(tmp_path):
    run = failing(tmp_path)
    before = (run / "sft" / "metrics.jsonl").read_bytes()
    assert commands.train(warm(run, tmp_path, "rollout.num_generations=3"))["steps"] == 2
    assert (run / "sft" / "metrics.jsonl").read_bytes() == before


def test_a_warm_start_of_other_rows_or_another_model_is_not_used_again(tmp_path):
    run = failing(tmp_path)
    rows = tmp_path / "others.jsonl"
    rows.write_text("".join(json.dumps(row | {"solution": " no"}) + "\n" for row in ROWS))
    with pytest.raises(UserError, match="training rows are not those of this run"):
        commands.train(warm(run, tmp_path, f"data.path={rows}"))


def test_starting_over_begins_with_the_warm_start(tmp_path, monkeypatch):
    """Ended in the middle of it, the next start has no old run to go on with."""
    run = tmp_path / "run"
    commands.train(warm(run, tmp_path))

    def ends(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_offline", ends)
        with pytest.raises(KeyboardInterrupt):
            commands.train(warm(run, tmp_path, "run.overwrite=true", "sft.learning_rate=1e-3"))
    assert read_metrics(run) == []
    assert not (run / "sft" / "model").exists()


def test_in_a_bucket_there_is_none():
    with pytest.raises(UserError, match=r"run.dir=gs://bucket/run: a warm start"):
        override(Config(), run__dir="gs://bucket/run", sft__steps=3)
