import dataclasses
import datetime
import errno
import gc
import json
import shutil
from pathlib import Path

import filelock
import jax
import numpy as np
import pytest
from small_run import config, one_layer

from gvpo_jax.commands import export
from gvpo_jax.config import Config
from gvpo_jax.config_file import check_claim, load_config, open_run, override, with_run_date
from gvpo_jax.data.groups import Source, make_group
from gvpo_jax.data.prompts import EncodedPrompts, completion_ids
from gvpo_jax.errors import UserError
from gvpo_jax.models.load import load_model
from gvpo_jax.rewards.debug import letter_share
from gvpo_jax.rundir.claim import lock
from gvpo_jax.rundir.files import read_jsonl, read_metrics
from gvpo_jax.rundir.log import crossed
from gvpo_jax.trainer import Trainer
from gvpo_jax.training.checkpoint import Checkpoints
from gvpo_jax.training.step import TrainConfig

ROWS = [
    {"prompt": f"Spell {word}: ", "word": word, "solution": word}
    for word in ("ash", "birch", "cedar", "fir", "oak")
]
CLOCKS = {"step_time", "tokens_per_second"}


def train(run_dir, **settings):
    trainer = Trainer(config(run_dir, **settings), load_model("debug"))
    summary = trainer.train(ROWS, letter_share, eval_dataset=ROWS[:2])
    return trainer, summary


def trained(policy):
    """All that updates changed."""
    return policy.state, policy.reference


def assert_same_run(a: Path, b: Path, trainer_a: Trainer, trainer_b: Trainer):
    """Bitwise equal states, and equal numbers and texts on disk, clocks apart."""
    for x, y in zip(
        jax.tree.leaves(trained(trainer_a.policy)),
        jax.tree.leaves(trained(trainer_b.policy)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    logs = [
        [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(run)]
        for run in (a, b)
    ]
    assert logs[0] == logs[1]
    for folder in ("completions", "eval"):
        files = sorted(path.name for path in (a / folder).iterdir())
        assert files == sorted(path.name for path in (b / folder).iterdir())
        for name in files:
            assert (a / folder / name).read_bytes() == (b / folder / name).read_bytes(), name


VARIANTS = {
    "initial": {},
    "previous": {"reference__name": "previous", "reference__refresh_every": 2},
    "ema": {"reference__name": "ema", "reference__decay": 0.5},
    "reuse": {"train__steps_per_generation": 2, "train__num_iterations": 2, "train__steps": 8},
    "ahead": {"rollout__lookahead": 2, "train__steps": 8},
    "replay": {
        "replay__completions": 2,
        "replay__groups": 1,
        "replay__capacity": 6,
        "train__steps": 8,
        "rollout__lookahead": 1,
    },
    "demonstrations": {"rollout__demonstrations": 1, "reference__name": "previous"},
    "grpo": {"loss__name": "grpo", "train__num_iterations": 2},
    "lora": {"model__lora__rank": 4, "rollout__lookahead": 1},
    "lora_previous": {"model__lora__rank": 4, "reference__name": "previous"},
}  # an average of adapters: in test_quantized.py


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, variant):
    settings = VARIANTS[variant]
    steps = settings.get("train__steps", 4)
    whole, summary = train(tmp_path / "whole", **settings)
    assert summary["steps"] == steps
    half, half_summary = train(tmp_path / "parts", train__stop_at=steps // 2, **settings)
    assert half_summary["steps"] == steps // 2
    assert not (tmp_path / "parts" / "summary.json").exists()
    resumed, _ = train(tmp_path / "parts", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", whole, resumed)
    final = jax.tree.leaves(resumed.policy.state.params)
    middle = jax.tree.leaves(half.policy.state.params)
    assert any((a != b).any() for a, b in zip(final, middle, strict=True))


def test_a_run_leaves_what_the_readme_says(tmp_path):
    run = tmp_path / "run"
    _, summary = train(run, eval__every=2)
    for name in ("config.yaml", "metrics.jsonl", "report.html", "summary.json"):
        assert (run / name).stat().st_size > 0, name
    assert json.loads((run / "summary.json").read_text()) == summary
    assert {"eval/accuracy_before", "eval/accuracy_after", "steps", "wall_seconds", "model"} <= set(
        summary
    )
    assert sorted(p.name for p in (run / "eval").iterdir()) == [
        "after.jsonl", "before.jsonl", "step_000002.jsonl",
    ]  # fmt: skip
    logged = {line["step"]: line for line in read_metrics(run)}
    assert sorted(logged) == [0, 1, 2, 3, 4]
    names = {
        "reward", "reward_std", "frac_reward_zero_std", "completions/mean_length",
        "completions/clipped_ratio", "kl", "grad_norm", "learning_rate", "num_tokens",
        "step_time", "loss", "gvpo_mse",
    }  # fmt: skip
    assert names <= set(logged[1])
    rows = read_jsonl(run / "completions" / "step_000001.jsonl")
    assert len(rows) == 2 * 4
    assert np.mean([row["reward"] for row in rows]) == pytest.approx(logged[1]["reward"])
    assert logged[1]["kl"] == pytest.approx(0, abs=1e-9)
    assert logged[1]["gvpo_mse"] > 0


def test_a_finished_run_started_again_changes_nothing(tmp_path):
    _, summary = train(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    _, again = train(tmp_path)
    assert again == summary
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_references_move_as_they_say(tmp_path):
    trainers = {
        name: train(tmp_path / name, **VARIANTS[name])[0] for name in ("initial", "previous", "ema")
    }
    start = load_model("debug").params["final_norm"]["scale"]
    scale = {name: t.policy.reference["final_norm"]["scale"] for name, t in trainers.items()}
    np.testing.assert_array_equal(scale["initial"], start)
    assert trainers["previous"].policy.refreshed_at == 2
    assert (scale["previous"] != start).any()
    assert (
        scale["previous"] != trainers["previous"].policy.state.params["final_norm"]["scale"]
    ).any()
    assert (scale["ema"] != start).any()


def test_steps_on_text_raise_the_probability_of_what_was_rewarded(tmp_path):
    trainer = Trainer(config(tmp_path), load_model("debug"))
    completions = [["yes", "no", "maybe", "so"], ["good", "bad"]]
    prompts, rewards = ["Say: ", "Tell: "], [[1.0, 0.0, None, 0.5], [1.0, 0.0]]
    first = trainer.train_step(prompts, completions, rewards)
    for _ in range(20):
        last = trainer.train_step(prompts, completions, rewards)
    assert last["gvpo_mse"] < first["gvpo_mse"] / 2
    assert first["reward"] == 0.5


@pytest.mark.parametrize(
    ("prompts", "completions", "rewards", "message"),
    [
        ("a", [["x", "y"]], [[1.0, 0.0]], "must be a list"),
        (["a"], [["x", "y"]], [[1.0]], "group 1 has 2 completions but 1 rewards"),
        (["a", "b"], [["x", "y"]], [[1.0, 0.0]], "2 prompts"),
        (["a"], [["x", "y"]], [[1.0, None]], "no group has two"),
        (["a"], [["x", "y" * 50]], [[1.0, 0.0]], "51 tokens"),
        (["a"], [["x", "y"]], [[1.0, float("inf")]], "infinite"),
        (["a"], [["x", "y"]], [[1.0, 1e39]], "completion 2: .*infinite, at least in float32"),
        (["a"], [["x", "y"]], [[1.0, "one"]], "a reward is a number, got 'one'"),
        (["a"], [["x", None]], [[1.0, 0.0]], "must be a text, got None"),
        (["a"], [["x", "\ud83d"]], [[1.0, 0.0]], "completion 2: .*half of a character"),
        (["a"], [["x", "y", "z" * 50]], [[1.0, 0.0, None]], "51 tokens"),
        (["a" * 50], [["x", "y"]], [[1.0, 0.0]], "max_prompt_length"),
    ],
)  # fmt: skip
def test_steps_on_text_refuse_what_does_not_fit(tmp_path, prompts, completions, rewards, message):
    trainer = Trainer(config(tmp_path), load_model("debug"))
    before = jax.device_get(trainer.policy.state.params)
    with pytest.raises(UserError, match=message):
        trainer.train_step(prompts, completions, rewards)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(trainer.policy.state.params))


def test_rewards_may_abstain_and_then_their_completions_leave_the_group(tmp_path):
    def some(prompts, completions, **_):
        return [None if i % 4 == 0 else float(len(text)) for i, text in enumerate(completions)]

    trainer = Trainer(config(tmp_path, train__steps=1), load_model("debug"))
    trainer.train(ROWS, some)
    line = read_metrics(tmp_path)[-1]
    assert line["rewards/abstained"] == 2
    rows = read_jsonl(tmp_path / "completions" / "step_000001.jsonl")
    assert [row["reward"] is None for row in rows] == [True, False, False, False] * 2


def test_a_batch_without_any_reward_is_told_of(tmp_path, capsys):
    calls = []

    def once(prompts, completions, **_):
        calls.append(len(completions))
        return [None if len(calls) > 1 else float(len(text)) for text in completions]

    Trainer(config(tmp_path / "a", train__steps=2), load_model("debug")).train(ROWS, once)
    shown = capsys.readouterr().out
    assert shown.count("no completion has a reward") == shown.count("step 2: no completion") == 1
    with pytest.raises(UserError, match="no completion of the first batch has a reward"):
        Trainer(config(tmp_path / "b", train__steps=2), load_model("debug")).train(ROWS, once)


def test_reward_functions_get_trls_call(tmp_path):
    calls = []

    def spy(prompts, completions, completion_ids, word, **columns):
        calls.append((prompts, completions, completion_ids, word, columns))
        return [0.0] * len(prompts)

    rows = [
        {"prompt": [{"role": "user", "content": f"Spell {w}"}], "word": w} for w in ("ash", "oak")
    ]
    Trainer(config(tmp_path, train__steps=1), load_model("debug")).train(rows, spy)
    prompts, completions, ids, word, _ = calls[0]
    assert len(prompts) == len(completions) == len(ids) == len(word) == 8
    assert prompts[0] == prompts[3] != prompts[4]
    assert word[:4] == [prompts[0][0]["content"].removeprefix("Spell ")] * 4
    assert completions[0][0]["role"] == "assistant"
    assert all(1 <= len(row) <= 6 for row in ids)


def test_an_export_loads_in_transformers_with_the_trained_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer, _ = train(tmp_path / "run")
    trainer.save_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    trained = trainer.policy.state.params["layers"][1]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(
        model.model.layers[1].mlp.up_proj.weight.detach().numpy(), trained.T
    )
    reloaded = load_model(str(tmp_path / "out"))
    assert (trained != load_model("debug").params["layers"][1]["mlp"]["up"]["kernel"]).any()
    np.testing.assert_array_equal(reloaded.params["layers"][1]["mlp"]["up"]["kernel"], trained)


def test_another_models_run_is_not_resumed(tmp_path):
    train(tmp_path, train__stop_at=2)
    other = load_model("debug")
    other.params["final_norm"]["scale"] = other.params["final_norm"]["scale"] + 1
    with pytest.raises(UserError, match="not the model that this run started from"):
        Trainer(config(tmp_path), other).train(ROWS, letter_share, eval_dataset=ROWS[:2])


def test_a_run_on_other_rows_is_not_resumed(tmp_path):
    train(tmp_path, train__stop_at=2)
    told = "^training rows and held-out rows are not those of this run"
    with pytest.raises(UserError, match=told):
        Trainer(config(tmp_path), load_model("debug")).train(ROWS[1:], letter_share)


def test_a_run_with_another_reward_function_is_not_resumed(tmp_path):
    def other(prompts, **_):
        return [0.0] * len(prompts)

    train(tmp_path)
    with pytest.raises(UserError, match=r"^reward functions are not those"):
        Trainer(config(tmp_path), load_model("debug")).train(ROWS, other, eval_dataset=ROWS[:2])


def test_prompts_and_completions_must_fit_the_model():
    with pytest.raises(UserError, match="was made for"):
        Trainer(override(Config(), data__max_prompt_length=1_000_000))


@pytest.mark.parametrize(
    ("last", "step", "every", "expected"),
    [(-1, 0, 5, True), (0, 4, 5, False), (4, 5, 5, True), (4, 12, 5, True), (3, 4, 0, False)],
)
def test_something_is_due_when_a_multiple_was_crossed(last, step, every, expected):
    assert crossed(last, step, every) is expected


def test_every_batch_of_a_rollout_keeps_its_own_completions(tmp_path):
    train(tmp_path, train__steps_per_generation=2, train__num_iterations=2, train__steps=8)
    logged = {line["step"]: line for line in read_metrics(tmp_path)}
    files = sorted(path.name for path in (tmp_path / "completions").iterdir())
    assert files == [f"step_00000{step}.jsonl" for step in (1, 2, 5, 6)]
    for step in (1, 2, 5, 6):
        rows = read_jsonl(tmp_path / "completions" / f"step_00000{step}.jsonl")
        assert np.mean([row["reward"] for row in rows]) == pytest.approx(logged[step]["reward"])


def test_training_that_blows_up_stops_with_its_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match="not finite; lower"):
        train(tmp_path, optimizer__name="sgd", optimizer__learning_rate=1e30, checkpoint__every=1)
    trainer = Trainer(load_config(tmp_path / "config.yaml"), load_model("debug"))
    trainer.restore(tmp_path)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(trainer.policy.state.params))


def test_a_session_that_stops_early_is_gone_on_with_by_naming_the_run(tmp_path):
    train(tmp_path, train__stop_at=2)
    saved = load_config(tmp_path / "config.yaml")
    assert saved.train.stop_at is None
    summary = Trainer(saved, load_model("debug")).train(ROWS, letter_share, eval_dataset=ROWS[:2])
    assert summary["steps"] == 4


def test_the_best_checkpoint_stays_and_is_found(tmp_path, monkeypatch):
    """The held-out accuracy of four steps, of which the second is best."""
    from gvpo_jax import loop

    told = iter([0.0, 0.2, 0.9, 0.4, 0.1])  # before, three steps, after

    def evaluate(*arguments, **options):
        metrics, records = loop_evaluate(*arguments, **options)
        return metrics | {"eval/accuracy": next(told)}, records

    loop_evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", evaluate)
    settings = {"checkpoint__every": 1, "checkpoint__keep": 1, "eval__every": 1}
    train(tmp_path, **settings, checkpoint__keep_best=1, train__stop_at=3)
    trainer, _ = train(tmp_path, **settings, checkpoint__keep_best=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"]
    assert trainer.restore(tmp_path, step="best") == 2
    assert trainer.restore(tmp_path) == 4
    file = tmp_path / "metrics.jsonl"  # the score of the last one comes after it was saved
    file.write_text(file.read_text().replace('"eval/accuracy": 0.1', '"eval/accuracy": 0.95'))
    assert trainer.restore(tmp_path, step="best") == 4
    with pytest.raises(UserError, match="no checkpoint 3; there are 2, 4"):
        trainer.restore(tmp_path, step=3)


def test_two_processes_can_not_train_in_one_folder(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match="another process"):
        train(tmp_path)


def test_results_whose_checkpoints_are_gone_are_not_overwritten(tmp_path):
    train(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="checkpoints are gone"):
        train(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_in_its_first_save_starts_over_and_says_so(tmp_path, capsys):
    """Saves are written in the background: the second one, here at 2, waits for the first."""
    whole, _ = train(tmp_path / "whole", checkpoint__every=1)
    parts = tmp_path / "parts"
    train(parts, checkpoint__every=1)
    shutil.rmtree(parts / "checkpoints")
    (parts / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    (parts / "summary.json").unlink()
    (parts / "completions" / ".step_000001.jsonl.77.tmp").write_text("torn")
    metrics = (parts / "metrics.jsonl").read_text().splitlines(keepends=True)
    steps = [json.loads(line)["step"] for line in metrics]
    (parts / "metrics.jsonl").write_text("".join(metrics[: steps.index(3)]))  # up to update 2
    capsys.readouterr()
    again, _ = train(parts, checkpoint__every=1)
    told = "starting over: 2 updates were done before the first checkpoint was whole"
    assert told in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", parts, whole, again)
    assert not list(parts.rglob("*.tmp"))


def test_other_held_out_rows_are_refused_and_the_run_stays_usable(tmp_path):
    train(tmp_path, train__stop_at=2)
    trainer = Trainer(config(tmp_path, train__steps=8), load_model("debug"))
    with pytest.raises(UserError, match="are not those"):
        trainer.train(ROWS, letter_share, eval_dataset=ROWS[1:3])
    _, summary = train(tmp_path)
    assert summary["steps"] == 4


def test_a_reward_that_fails_on_every_row_is_an_error_also_where_errors_are_skipped(tmp_path):
    def broken(prompts, completions, word, **_):
        return 1 / 0

    trainer = Trainer(config(tmp_path, rewards__on_error="skip"), load_model("debug"))
    with pytest.raises(UserError, match=r"every reward failed, first: .*ZeroDivisionError"):
        trainer.train(ROWS, broken)


def test_completions_without_a_reward_are_wrong_and_counted(tmp_path):
    def some(prompts, completions, **_):
        return [None if i % 2 else 1.0 for i in range(len(prompts))]

    def none(prompts, completions, **_):
        return [None] * len(prompts)

    trainer = Trainer(config(tmp_path), load_model("debug"))
    metrics, records = trainer.evaluate(ROWS, some)
    assert metrics["eval/accuracy"] == 0.5
    assert metrics["eval/reward"] == 1
    assert metrics["eval/unscored"] == len(records) / 2
    assert [r["correct"] for r in records] == [r["reward"] is not None for r in records]
    with pytest.raises(UserError, match="no held-out completion got a reward"):
        trainer.evaluate(ROWS, none)


def test_texts_end_with_the_tokenizers_own_end_token(tmp_path):
    model = load_model("debug")
    model = dataclasses.replace(model, generation_config={"eos_token_id": [258, 259, 257]})
    trainer = Trainer(config(tmp_path), model)
    assert trainer.stop_ids[0] == 258
    assert (
        completion_ids("a", model.tokenizer, trainer.stop_ids)[-1]
        == model.tokenizer.eos_token_id
        == 257
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "no rows"), ([{"question": "x"}], "no column 'prompt'"), ([{"prompt": None}], "row 1")],
)
def test_rows_that_are_none_are_refused(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        Trainer(config(tmp_path), load_model("debug")).train(rows, letter_share)


def test_a_setting_with_a_short_name_may_be_given_by_its_full_one(tmp_path):
    sizes = {"max_prompt_length": 8, "max_completion_length": 8, "mesh__fsdp": 1}
    trainer = Trainer.from_pretrained(
        "debug", optimizer__learning_rate=0.5, loss__beta=0.3, run__dir=str(tmp_path), **sizes
    )
    assert trainer.config.optimizer.learning_rate == 0.5
    assert trainer.config.loss.beta == 0.3


def bytes_held():
    """Of arrays that are alive on devices."""
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.parametrize(("how", "trees"), [("resume", 1), ("export", 1)])
def test_nothing_is_held_twice_while_a_checkpoint_is_read(tmp_path, monkeypatch, how, trees):
    """Beside the reference there is no other copy of the parameters, and no optimizer state."""
    train(tmp_path, train__stop_at=2)
    before, held = bytes_held(), []
    read = Checkpoints.restore

    def spy(self, *arguments, **options):
        held.append(bytes_held() - before)
        return read(self, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "restore", spy)
    trainer = Trainer(config(tmp_path), load_model("debug"))
    params = sum(x.nbytes for x in jax.tree.leaves(trainer.policy.params))
    if how == "resume":
        trainer.train(ROWS, letter_share, eval_dataset=ROWS[:2])
    else:
        trainer.restore(tmp_path)
        state = sum(x.nbytes for x in jax.tree.leaves(trainer.policy.params))
        assert bytes_held() - before < 2.1 * state  # policy and reference, no moments
    assert held[0] < 1.1 * trees * params


def test_a_folder_without_checkpoints_is_left_as_it_is(tmp_path):
    with pytest.raises(UserError, match="typo has no checkpoint yet"):
        Trainer(config(tmp_path / "run"), load_model("debug")).restore(tmp_path / "typo")
    assert list(tmp_path.iterdir()) == []


def test_lengths_are_checked_before_weights_are_read(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("gvpo_jax.models.load.read_params", lambda *_, **__: read.append(1))
    with pytest.raises(UserError, match="debug was made for 2048; lower one of them"):
        Trainer(config(tmp_path, data__max_prompt_length=2043))
    assert read == []


def test_a_resumed_run_may_be_cut_otherwise(tmp_path):
    """On fewer chips, say: none of these changes what is computed."""
    train(tmp_path, train__stop_at=2)
    other = {"train__micro_batches": 2, "train__completion_parts": 2, "rollout__slots": 4}
    _, summary = train(tmp_path, **other)
    assert summary["steps"] == 4


def test_another_error_of_the_lock_is_told_as_it_is(tmp_path, monkeypatch):
    def fails(self):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", fails)
    with pytest.raises(UserError, match=r"can't use run.dir=.*: No locks available"):
        train(tmp_path)


def test_a_servers_run_is_exported_without_servers_or_key(tmp_path):
    train(tmp_path / "run", train__steps=1)
    asks = {"servers__urls": ["http://a:1"], "servers__api_key_env": "NOT_SET_HERE"}
    of_run = config(tmp_path / "run", servers__kind="vllm", **asks)
    folder = export(of_run, tmp_path / "model")
    assert load_model(str(folder)).config == load_model("debug").config


@pytest.mark.parametrize("reference", ["initial", "previous", "ema"])
def test_a_restored_policy_goes_on_from_its_step_with_its_reference(tmp_path, reference):
    settings = {"reference__name": reference, "reference__decay": 0.5, "train__steps": 3}
    whole, _ = train(tmp_path, **settings)
    restored = Trainer(config(tmp_path / "other", **settings), load_model("debug"))
    assert restored.restore(tmp_path) == 3
    for name in ("params", "reference"):
        a, b = (jax.tree.leaves(getattr(t.policy, name)) for t in (whole, restored))
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert restored.policy.reference_fingerprint == whole.policy.reference_fingerprint
    assert restored.policy.updates == int(restored.policy.state.step) == 3
    _, summary = restored, restored.train(ROWS, letter_share)
    assert summary["steps"] == 3
    assert sorted(p.name for p in (tmp_path / "other" / "checkpoints").iterdir()) == ["3"]
    ages = [line["source/policy/staleness"] for line in read_metrics(tmp_path / "other")]
    assert ages == [0, 0, 0]


def test_a_trainer_outlives_a_checkpoint_of_other_weights(tmp_path):
    train(tmp_path, train__steps=1)
    other = load_model("debug")
    other.params["final_norm"]["scale"] = other.params["final_norm"]["scale"] * 1.1
    trainer = Trainer(config(tmp_path / "other"), other)
    with pytest.raises(UserError, match="not the model that this run started from"):
        trainer.restore(tmp_path)
    assert len(trainer.generate(["Spell a: "])) == 1


def test_token_ids_beyond_the_embedding_are_refused_everywhere(tmp_path):
    trainer = Trainer(config(tmp_path), load_model("debug"))
    trainer.tokenizer.add_tokens(["[NEW]"])  # its id is 260; the embedding has 260 rows
    new, groups = [{"prompt": "a"}, {"prompt": "[NEW]"}], {"rewards": [1, 0]}
    answer = [{"prompt": "a", "completions": ["b", "[NEW]"], **groups}]
    given = [{"prompt": "a", "completions": [[97], [260]], **groups}]
    demonstrated = Trainer(config(tmp_path, rollout__demonstrations=1), load_model("debug"))
    demonstrated.tokenizer.add_tokens(["[NEW]"])
    for run, place in {
        lambda: trainer.generate(["a", "[NEW]"]): "row 2: token",
        lambda: trainer.evaluate(new, letter_share): "row 2: token",
        lambda: trainer.train(new, letter_share): "row 2: token",
        lambda: trainer.train(ROWS, letter_share, eval_dataset=new): "row 2: token",
        lambda: trainer.train_step(["[NEW]"], [["a", "b"]], [[1.0, 0.0]]): "row 1: token",
        lambda: trainer.train_step(["a"], [["a", "[NEW]"]], [[1.0, 0.0]]): "group 1, completion 2:",
        lambda: trainer.train_offline(answer): "groups, row 1, completion 2: token",
        lambda: trainer.train_offline(given): "token ids below 260",
        lambda: demonstrated.train(
            [{"prompt": "a", "solution": "[NEW]"}], letter_share
        ): "row 1, solution: token",
    }.items():
        with pytest.raises(UserError, match=place):
            run()
    with pytest.raises(UserError, match="debug: 260 can't be a stop token"):
        Trainer(config(tmp_path, rollout__stop_token_ids=[260]), load_model("debug"))


def test_rows_of_the_embedding_that_no_token_has_may_be_sampled(tmp_path):
    """As Qwen's: the embedding has more rows than the tokenizer knows tokens."""
    debug = one_layer()
    shape = dataclasses.replace(debug.config, vocab_size=320)
    wide = {name: jax.tree.map(lambda x: x, part) for name, part in debug.params.items()}
    noise = np.random.default_rng(0).standard_normal((60, 64), np.float32)
    wide["embed"]["embedding"] = np.concatenate([wide["embed"]["embedding"], noise])
    wide["head"]["kernel"] = np.concatenate([wide["head"]["kernel"], noise.T], axis=1)
    model = dataclasses.replace(debug, config=shape, params=wide)
    seen = []

    def spy(prompts, completions, completion_ids, **_):
        seen.extend(zip(completion_ids, completions, strict=True))
        return [float(len(text)) for text in completions]

    Trainer(config(tmp_path, train__steps=2), model).train(ROWS, spy)
    assert any(max(ids) >= 260 for ids, _ in seen)
    known = [[i for i in ids if i < 256] for ids, _ in seen]
    assert [text for _, text in seen] == [bytes(ids).decode(errors="replace") for ids in known]


@pytest.mark.parametrize("where", ["weights", "logits"])
def test_nan_is_named_in_training_evaluation_and_sampling(tmp_path, where):
    model = load_model("debug")
    number = np.nan if where == "weights" else 3e38  # which overflows
    model.params["final_norm"]["scale"] = np.full_like(model.params["final_norm"]["scale"], number)
    trainer = Trainer(config(tmp_path), model)
    groups = [{"prompt": "a", "completions": ["b", "c"], "rewards": [1, 0]}]
    for run in (
        lambda: trainer.generate(["a"]),
        lambda: trainer.evaluate(ROWS, letter_share),
        lambda: trainer.train_step(["a"], [["b", "c"]], [[1.0, 0.0]]),
        lambda: trainer.train(ROWS, letter_share),
        lambda: trainer.train_offline(groups),
    ):
        with pytest.raises(UserError, match="NaN among the logits of the"):
            run()


DATED = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }} "


def on_day(monkeypatch, day):
    class Today(datetime.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    monkeypatch.setattr("gvpo_jax.data.prompts.datetime.date", Today)


def test_a_run_goes_on_tomorrow_with_the_date_it_began_with(tmp_path, monkeypatch):
    settings = {"data__template": DATED, "data__chat_template": "always"}
    on_day(monkeypatch, "2026-07-31")
    whole, _ = train(tmp_path / "whole", **settings)
    train(tmp_path / "parts", train__stop_at=2, **settings)
    on_day(monkeypatch, "2026-08-01")
    resumed, _ = train(tmp_path / "parts", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", whole, resumed)
    assert load_config(tmp_path / "parts" / "config.yaml").data.template_date == "2026-07-31"
    resumed.save_pretrained(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "gvpo_jax_export.json").read_text())
    assert told["template_date"] == "2026-07-31"
    with pytest.raises(UserError, match=r"other settings \(data.template_date='2026-07-31'\)"):
        train(tmp_path / "parts", data__template_date="2026-08-01", **settings)
    restored = Trainer(config(tmp_path / "elsewhere", **settings), load_model("debug"))
    restored.restore(tmp_path / "parts")
    assert restored.config.data.template_date == "2026-07-31"
    other, _ = train(tmp_path / "other", train__steps=1, **settings)
    assert other.config.data.template_date == "2026-08-01"
    over = config(tmp_path / "parts", run__overwrite=True, **settings)
    over = with_run_date(over, tmp_path / "parts")
    assert over.data.template_date == "2026-08-01"  # a new run


def test_the_template_that_trained_is_exported(tmp_path):
    template = "[user] {{ messages[0]['content'] }} [assistant]"
    model = load_model("debug")
    trainer = Trainer(config(tmp_path, data__template=template), model)
    trainer.save_pretrained(tmp_path / "out")
    again = load_model(str(tmp_path / "out")).tokenizer
    assert again.chat_template == template != model.tokenizer.chat_template
    message = [{"role": "user", "content": "hi"}]
    text = again.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text == "[user] hi [assistant]"


def test_rewards_records_and_evaluation_get_the_text_before_a_stop_string(tmp_path):
    """Every ASCII letter ends a text here; tokens and log-probs go up to it."""
    seen = []

    def none_of_it(prompts, completions, completion_ids, **columns):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    letters = [chr(c) for c in range(128) if chr(c).isalpha()]
    trainer = Trainer(config(tmp_path, train__steps=1, rollout__stop=letters), load_model("debug"))
    trainer.train(ROWS, none_of_it, eval_dataset=ROWS[:2])
    ended = 0
    for text, ids in seen:
        whole = trainer.tokenizer.decode(ids, skip_special_tokens=True)
        found = [place for place, letter in enumerate(whole) if letter in letters]
        assert found in ([], [len(whole) - 1])
        assert text == (whole[:-1] if found else whole)
        ended += bool(found)
    assert ended > len(seen) // 4
    assert len(seen) == 2 * 4 + 2 * 2 * 4  # an update's samples, and two evaluations'
    texts = [text for text, _ in seen]
    assert [r["completion"] for r in read_jsonl(tmp_path / "eval" / "before.jsonl")] == texts[:8]
    sampled = read_jsonl(tmp_path / "completions" / "step_000001.jsonl")
    assert [r["completion"] for r in sampled] == texts[8:16]
    stops = {*trainer.stop_ids, *map(ord, letters)}
    clipped = np.mean([ids[-1] not in stops for _, ids in seen[8:16]])
    assert read_metrics(tmp_path)[1]["completions/clipped_ratio"] == clipped
    generated = trainer.generate([row["prompt"] for row in ROWS[:2]], num_generations=4)
    assert not any(letter in text for group in generated for text in group for letter in letters)
    with pytest.raises(UserError, match=r"rollout\.stop holds an empty text"):
        config(tmp_path, rollout__stop=["a", ""])


def test_special_tokens_are_kept_for_rewards_where_asked_for(tmp_path):
    """Tokens below 256 are bytes, 258 and 259 are <|im_start|> and <|im_end|>."""
    group = make_group([1], [[*b"a", 258, *b"b", 259], [*b"c"]], [None] * 2, source=Source.POLICY)

    def judged(**settings):
        trainer, seen = Trainer(config(tmp_path, **settings), load_model("debug")), []

        def keep(prompts, completions, completion_ids, **columns):
            seen.extend(completions)
            return [0.0] * len(completions)

        prompts = EncodedPrompts([{"prompt": "p"}], [[1]], skipped=0)
        (texts,), _ = trainer._judge(keep).judge(prompts, [0], group)
        assert texts == seen
        return seen

    assert judged() == ["ab", "c"]
    assert judged(rewards__skip_special_tokens=False) == ["a<|im_start|>b<|im_end|>", "c"]
    both = {"rewards__skip_special_tokens": False, "rollout__stop": ["<|im_end|>"]}
    assert judged(**both) == ["a<|im_start|>b", "c"]


def test_rows_are_visited_in_their_order_where_they_are_not_shuffled(tmp_path):
    trainer = Trainer(config(tmp_path, data__shuffle=False, train__steps=3), load_model("debug"))
    trainer.train(ROWS, letter_share)
    visited = [
        [row["word"] for row in read_jsonl(tmp_path / "completions" / f"step_00000{step}.jsonl")]
        for step in (1, 2, 3)
    ]
    pairs = [("ash", "birch"), ("cedar", "fir"), ("oak", "ash")]
    assert visited == [[a] * 4 + [b] * 4 for a, b in pairs]


def test_given_groups_are_visited_in_their_order_too(tmp_path):
    rows = [
        {"prompt": "x" * n, "completions": ["a", "b", "c", "d"], "rewards": [n, 0, n, 0]}
        for n in (1, 2, 3, 4, 5)
    ]
    settings = {"data__shuffle": False, "train__epochs": 1, "train__steps": None}
    trainer = Trainer(config(tmp_path, **settings), load_model("debug"))
    summary = trainer.train_offline(rows)
    assert summary["steps"] == 3  # of 2 groups each
    assert [row["reward"] for row in trainer.history] == [0.75, 1.75, 1.5]  # of 1, 2; 3, 4; 5, 1


@pytest.mark.parametrize(
    ("epochs", "rows", "per_update", "per_round", "passes", "steps"),
    [
        (1, 10, 2, 1, 1, 5),
        (1, 11, 2, 1, 1, 6),
        (3, 11, 2, 1, 1, 17),  # 33 visits
        (1, 11, 2, 4, 1, 8),  # 2 rollouts of 8 prompts
        (1, 11, 2, 4, 3, 24),
        (0.1, 30, 1, 1, 1, 3),  # 0.1 * 30 is above 3 in floats
        (0.001, 30, 1, 1, 1, 1),
        (2, 1, 8, 1, 1, 1),
    ],
)
def test_epochs_become_updates(epochs, rows, per_update, per_round, passes, steps):
    train = TrainConfig(
        epochs=epochs, batch_size=8, steps_per_generation=per_round, num_iterations=passes
    )
    settled = train.settled(rows, per_update)
    assert (settled.steps, settled.epochs, settled.updates) == (steps, None, steps)


def test_a_run_of_epochs_is_that_of_as_many_steps_and_grows_by_more(tmp_path):
    """5 rows, 2 an update: one epoch takes 3 updates, two take 5."""
    epochs = {"train__steps": None, "train__epochs": 1}
    first, summary = train(tmp_path / "a", **epochs)
    assert (
        summary["steps"] == json.loads((tmp_path / "a" / "summary.json").read_text())["steps"] == 3
    )
    written = load_config(tmp_path / "a" / "config.yaml").train
    assert (written.steps, written.epochs) == (3, None)
    trainer, _ = train(tmp_path / "b", train__steps=3)
    assert_same_run(tmp_path / "a", tmp_path / "b", first, trainer)
    _, again = train(tmp_path / "a", **epochs)  # has done them all
    assert again == json.loads((tmp_path / "a" / "summary.json").read_text())
    with pytest.raises(UserError, match=r"other settings \(train\.steps=3\)"):
        train(tmp_path / "a", **epochs | {"train__epochs": 0.5})
    longer, summary = train(tmp_path / "a", **epochs | {"train__epochs": 2})
    assert summary["steps"] == 5
    by_name = open_run(tmp_path / "a", ["train.epochs=3"])
    assert (by_name.train.steps, by_name.train.epochs) == (None, 3)
    check_claim(by_name)  # before there are rows
    assert open_run(tmp_path / "a").train.steps == 5
    steps = [row["step"] for row in longer.history]
    assert steps == [0, 1, 2, 3, 4, 5, 5]  # with the evaluations before and after


def test_a_schedule_ends_with_the_epochs(tmp_path):
    settings = {"optimizer__schedule": "linear", "train__steps": None, "train__epochs": 2}
    trainer, _ = train(tmp_path, **settings)
    rates = [row["learning_rate"] for row in trainer.history if "learning_rate" in row]
    np.testing.assert_allclose(rates, 3e-3 * (1 - np.arange(5) / 5), rtol=1e-6)


def test_steps_and_epochs_are_not_both_given(tmp_path):
    with pytest.raises(UserError, match=r"train\.steps=4 and train\.epochs=2 are both given"):
        config(tmp_path, train__epochs=2)
    assert Config().train.updates == 100


def test_history_grows_with_the_run_and_a_resumed_one_has_all_of_it(tmp_path):
    during = []

    def watching(prompts, completions, **columns):
        during.append([row["step"] for row in trainer.history])
        return letter_share(prompts, completions, **columns)

    settings = {"train__steps": 3, "eval__every": 2}
    for stop_at in (2, None):
        of_run = config(tmp_path, train__stop_at=stop_at, **settings)
        trainer = Trainer(of_run, load_model("debug"))
        trainer.train(ROWS, watching, eval_dataset=ROWS[:2])
    assert [row["step"] for row in trainer.history] == [0, 1, 2, 2, 3, 3]
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [{k: v for k, v in row.items() if v == v} for row in trainer.history] == [
        {k: v for k, v in row.items() if v is not None} for row in lines
    ]
    assert [sorted(row) for row in trainer.history] == [sorted(row) for row in lines]
    assert "eval/accuracy" in trainer.history[3]
    assert trainer.history[4]["reward"] == lines[4]["reward"]
    # before; updates 1 and 2, whose metrics come when the next is under way, or is saved; ...
    assert during == [[], [0], [0], [0, 1], [0, 1, 2, 2], [0, 1, 2, 2, 3]]
