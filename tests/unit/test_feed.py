"""Batches from every source, through whole runs of the debug model."""

import dataclasses
import datetime
import json

import jax
import numpy as np
import pytest
from small_run import config
from test_trainer import ROWS, assert_same_run, letter_share

from gvpo_jax.collect.metrics import reward_metrics
from gvpo_jax.collect.replay import ReplayBuffer
from gvpo_jax.data.groups import Source, make_group, to_batch
from gvpo_jax.errors import UserError
from gvpo_jax.models.load import load_model
from gvpo_jax.rollout import InProcessEngine
from gvpo_jax.rundir.files import read_jsonl, read_metrics
from gvpo_jax.trainer import Trainer
from gvpo_jax.training.policy import Policy

GROUPS = [
    {"prompt": "Spell ash: ", "completions": ["ash", "x1", "zz!"], "rewards": [1.0, 0.3, 0.5]},
    {"prompt": "Spell oak, please: ", "completions": ["oak", "9"], "rewards": [1.0, 0.0]},
    {
        "prompt": "Spell fir: ",
        "completions": ["fir", "f-", "7", "??"],
        "rewards": [1, 0.5, 0, None],
    },
    {"prompt": "Spell elm: ", "completions": ["elm", "e l m"], "rewards": [1.0, 0.6]},
]


def trainer(run_dir, **settings):
    return Trainer(config(run_dir, **settings), load_model("debug"))


def batches_of(run_dir, monkeypatch, rows=ROWS, **settings):
    """The batches of a run's updates."""
    batches, update = [], Policy.update

    def spy(self, batch, plan):
        batches.append(jax.device_get(batch))
        return update(self, batch, plan)

    monkeypatch.setattr(Policy, "update", spy)
    trainer(run_dir, **settings).train(rows, letter_share)
    return batches


def test_a_round_is_sampled_at_once_and_its_samples_are_those_of_batch_after_batch(
    tmp_path, monkeypatch
):
    asked, generate = [], InProcessEngine.generate

    def spy(self, params, prompts, *given, **options):
        asked.append(len(prompts))
        return generate(self, params, prompts, *given, **options)

    monkeypatch.setattr(InProcessEngine, "generate", spy)
    still = {"optimizer__learning_rate": 1e-12}  # or the second batch would see another policy
    two = {"train__steps_per_generation": 2}
    at_once = list(batches_of(tmp_path / "2", monkeypatch, **still, **two))
    assert asked == [4, 4]
    alone = batches_of(tmp_path / "1", monkeypatch, **still)
    assert asked == [4, 4, 2, 2, 2, 2]
    assert [batch.version.max() for batch in at_once] == [0, 0, 2, 2]
    for a, b in zip(at_once, alone, strict=True):
        np.testing.assert_array_equal(a.prompts, b.prompts)
        np.testing.assert_array_equal(a.completions, b.completions)
        np.testing.assert_array_equal(a.rewards, b.rewards)


def test_older_completions_of_the_prompt_join_its_group(tmp_path, monkeypatch):
    batches = batches_of(tmp_path, monkeypatch, ROWS[:2], replay__completions=2)
    assert batches[0].valid.sum(axis=-1).tolist() == [2, 2]  # nothing to replay yet
    assert all(batch.rewards.shape == (2, 4) for batch in batches)
    for step, batch in enumerate(batches[1:], start=1):
        assert (batch.source == [0, 0, 1, 1]).all()
        assert (batch.version[:, :2] == step).all()
        assert (batch.version[:, 2:] < step).all()
        for g, tokens in enumerate(batch.completions):
            earlier = [
                old.completions[h, i, :6].tolist()
                for old in batches[:step]
                for h in range(2)
                if old.prompts[h].tolist() == batch.prompts[g].tolist()
                for i in range(2)
            ]
            assert all(ids[:6].tolist() in earlier for ids in tokens[2:])
    shares = [line.get("source/replay/share", 0) for line in read_metrics(tmp_path)]
    assert shares == [0, 0.5, 0.5, 0.5]
    ages = [line["source/replay/staleness"] for line in read_metrics(tmp_path)[1:]]
    expected = [(b.version[:, :2] - b.version[:, 2:]).mean() for b in batches[1:]]
    np.testing.assert_allclose(ages, expected, rtol=1e-6)


def test_each_group_draws_other_older_completions_at_each_step(tmp_path, monkeypatch):
    keys = []
    draw = ReplayBuffer.completions
    monkeypatch.setattr(
        ReplayBuffer,
        "completions",
        lambda self, *given: keys.append(given[-1]) or draw(self, *given),
    )
    trainer(tmp_path, replay__completions=2).train(ROWS, letter_share)
    assert len(keys) == len(set(keys)) == 8


def test_rewards_are_told_of_the_policys_own_new_samples():
    """The older one and the demonstration would make it look better than it is."""
    source = [Source.POLICY, Source.POLICY, Source.REPLAY, Source.DEMONSTRATION]
    group = make_group([1], [[2], [3], [4], [5]], [0.0, 0.5, 1.0, 1.0], source=Source.POLICY)
    batch = to_batch(group)._replace(source=np.array([source]))
    assert reward_metrics(batch)["reward"] == 0.25
    only = batch._replace(source=np.full((1, 4), Source.REPLAY))
    assert reward_metrics(only)["reward"] == 0.625


def test_whole_older_groups_fill_up_the_batch(tmp_path, monkeypatch):
    batches = batches_of(tmp_path, monkeypatch, replay__groups=1)
    assert all(batch.rewards.shape == (2, 4) for batch in batches)
    assert batches[0].valid.any(axis=-1).tolist() == [True, False]
    for step, batch in enumerate(batches[1:], start=1):
        assert (batch.source == [[0] * 4, [1] * 4]).all()
        same = [
            np.array_equal(batch.completions[1], old.completions[0])
            and np.array_equal(batch.rewards[1], old.rewards[0])
            and np.array_equal(batch.ref_logps[1], old.ref_logps[0])
            for old in batches[:step]
        ]
        assert any(same)


def test_a_demonstration_is_one_of_the_k(tmp_path, monkeypatch):
    batches = batches_of(tmp_path, monkeypatch, rollout__demonstrations=1, train__steps=2)
    for batch in batches:
        assert (batch.source == [0, 0, 0, Source.DEMONSTRATION]).all()
        assert (batch.rewards[:, 3] == 1).all()  # a word is all letters
        assert np.isnan(batch.old_logps[:, 3, 0]).all()
    rows = read_jsonl(tmp_path / "completions" / "step_000001.jsonl")
    shown = [row for row in rows if row["source"] == "demonstration"]
    assert [row["completion"] for row in shown] == [row["word"] for row in shown]
    assert {row["version"] for row in shown} == {-1}
    line = read_metrics(tmp_path)[0]
    assert line["source/demonstration/share"] == 0.25
    assert line["source/demonstration/residual"] > 0 > line["source/policy/residual"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}], "row 1: rollout.demonstrations=1 needs"),
        ([{"prompt": "a", "solution": 3}], "row 1: rollout.demonstrations=1 needs"),
        ([ROWS[0], {"prompt": "a", "solution": "x" * 9}], "row 2, solution: 10 tokens"),
    ],
)
def test_demonstrations_that_can_not_be_used_are_named_before_the_run(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "run", rollout__demonstrations=1).train(rows, letter_share)
    assert not (tmp_path / "run").exists()


def test_demonstrations_that_are_too_long_can_be_left_out(tmp_path, monkeypatch, capsys):
    rows = [ROWS[0], {"prompt": "Spell a: ", "solution": "x" * 9}]
    settings = {"rollout__demonstrations": 1, "data__bad_samples": "skip", "train__steps": 1}
    (batch,) = batches_of(tmp_path, monkeypatch, rows, **settings)
    assert sorted(batch.valid[:, 3].tolist()) == [False, True]
    assert "1 demonstrations skipped" in capsys.readouterr().out


def test_rollouts_drawn_ahead_are_that_much_older(tmp_path, monkeypatch):
    batches = batches_of(tmp_path, monkeypatch, rollout__lookahead=2)
    assert [int(batch.version.max()) for batch in batches] == [0, 0, 0, 1]
    ages = [line["source/policy/staleness"] for line in read_metrics(tmp_path)]
    assert ages == [0, 1, 2, 2]


def test_samples_drawn_ahead_are_those_of_that_policy(tmp_path, monkeypatch):
    """The second batch, drawn ahead, is what the start policy samples for the second prompts."""
    ahead = batches_of(tmp_path / "a", monkeypatch, rollout__lookahead=1)
    frozen = batches_of(tmp_path / "b", monkeypatch, optimizer__learning_rate=0.0)
    np.testing.assert_array_equal(ahead[1].completions, frozen[1].completions)
    assert (ahead[3].completions != frozen[3].completions).any()


def offline(run_dir, rows=GROUPS, **settings):
    settings = {"data__bad_samples": "skip", "optimizer__learning_rate": 3e-3} | settings
    t = trainer(run_dir, **settings)
    return t, t.train_offline(rows, reward_funcs=letter_share, eval_dataset=ROWS[:2])


def test_groups_from_elsewhere_train_the_policy_and_resume_bitwise(tmp_path, capsys):
    whole, summary = offline(tmp_path / "whole", train__steps=20)
    assert summary["steps"] == 20
    assert "1 completions skipped" in capsys.readouterr().out
    lines = [line for line in read_metrics(tmp_path / "whole") if "loss" in line]
    assert lines[-1]["gvpo_mse"] < lines[0]["gvpo_mse"] / 3
    assert not [name for name in lines[0] if name.startswith(("source/policy", "source/replay"))]
    offline(tmp_path / "parts", train__steps=20, train__stop_at=3)
    resumed, _ = offline(tmp_path / "parts", train__steps=20)
    for run in ("whole", "parts"):
        (tmp_path / run / "completions").mkdir(exist_ok=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", whole, resumed)


def count_scores(policy):
    """How often the reference is scored from now on."""
    calls, programs = [], policy._programs

    def token_logps(*arguments):
        calls.append(len(arguments[1]))
        return programs.token_logps(*arguments)

    policy._programs = dataclasses.replace(programs, token_logps=token_logps)
    return calls


@pytest.mark.parametrize(("reference", "expected"), [("initial", 2), ("previous", 6), ("ema", 6)])
def test_reference_scores_are_kept_while_the_reference_stays(tmp_path, reference, expected):
    t = trainer(tmp_path, data__bad_samples="skip", train__steps=6, reference__name=reference)
    calls = count_scores(t.policy)
    t.train_offline(GROUPS)
    assert len(calls) == expected  # 4 groups make 2 batches


def test_scored_groups_need_no_scoring_and_fit_their_reference_alone(tmp_path):
    rows = trainer(tmp_path / "a", data__bad_samples="skip").with_reference_logps(GROUPS[:2])
    rows = json.loads(json.dumps(rows))
    plain, _ = offline(tmp_path / "b", GROUPS[:2])
    t = trainer(tmp_path / "c")
    calls = count_scores(t.policy)
    t.train_offline(rows)
    assert calls == []
    for a, b in zip(
        jax.tree.leaves(plain.policy.state), jax.tree.leaves(t.policy.state), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)
    other = load_model("debug")
    other.params["final_norm"]["scale"] = other.params["final_norm"]["scale"] * 1.1
    with pytest.raises(UserError, match="row 1: its ref_logps are of another reference"):
        Trainer(config(tmp_path / "d"), other).train_offline(rows)
    assert not (tmp_path / "d").exists()


def test_scores_that_change_with_every_update_are_not_kept(tmp_path):
    with pytest.raises(UserError, match="ema"):
        trainer(tmp_path, reference__name="ema").with_reference_logps(GROUPS[:1])


def test_offline_groups_move_the_policy_as_the_same_texts_do_in_single_steps(tmp_path):
    rows = GROUPS[:2]
    settings = {"train__steps": 1, "optimizer__name": "sgd", "optimizer__learning_rate": 0.1}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train_offline(rows)
    single = trainer(tmp_path / "single", **settings)
    columns = [[row[name] for row in rows] for name in ("prompt", "completions", "rewards")]
    single.train_step(*columns)
    for a, b in zip(
        jax.tree.leaves(whole.policy.state.params),
        jax.tree.leaves(single.policy.state.params),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_rows_that_json_can_not_hold_are_drawn_ahead_too(tmp_path):
    rows = [row | {"when": datetime.date(2026, 1, 1)} for row in ROWS]
    trainer(tmp_path, rollout__lookahead=1, checkpoint__every=1).train(rows, letter_share)
    assert read_metrics(tmp_path)[-1]["step"] == 4


def test_a_round_that_fails_does_not_take_the_checkpoint_before_it_along(tmp_path):
    calls = []

    def fails_at_last(prompts, completions, **_):
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("on purpose")
        return [0.0] * (len(prompts) - 1) + [1.0]

    settings = {"rollout__lookahead": 1, "checkpoint__every": 2}
    with pytest.raises(UserError, match="on purpose"):
        trainer(tmp_path, **settings).train(ROWS, fails_at_last)
    assert trainer(tmp_path, **settings).restore(tmp_path) == 2


def test_replay_of_prompts_that_are_forgotten_first_is_refused(tmp_path):
    with pytest.raises(UserError, match="raise it to at least as many"):
        trainer(tmp_path, replay__completions=1, replay__capacity=3).train(ROWS, letter_share)


def test_a_reward_function_never_sees_a_demonstration_that_was_skipped(tmp_path):
    seen = []

    def strict(prompts, completions, **_):
        seen.extend(completions)
        return [1 / len(text) if text else 0.0 for text in completions]

    rows = [{"prompt": "Spell a: ", "solution": "x" * 9}]
    settings = {"rollout__demonstrations": 1, "data__bad_samples": "skip", "train__steps": 1}
    trainer(tmp_path, **settings).train(rows, strict)
    assert len(seen) == 2 * 3


def test_a_baseline_is_not_fed_groups_of_unknown_origin(tmp_path):
    with pytest.raises(UserError, match="given groups do not have: use gvpo or dpo"):
        trainer(tmp_path, loss__name="grpo").train_offline(GROUPS)


def test_a_function_of_one_sample_is_a_reward_function(tmp_path):
    def vowels(prompt, completion):
        assert prompt.startswith("Spell")
        return sum(letter in "aeiou" for letter in completion) / 6

    t = trainer(tmp_path, train__steps=1)
    t.train(ROWS, vowels)
    for row in read_jsonl(tmp_path / "completions" / "step_000001.jsonl"):
        assert row["reward"] == pytest.approx(vowels(row["prompt"], row["completion"]))
    assert "rewards/vowels" in read_metrics(tmp_path)[0]
