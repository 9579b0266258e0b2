"""Whole runs with reward functions and rows as people bring them."""

import json
import re

import datasets
import numpy as np
import pandas
import pytest
from small_run import config
from test_trainer import ROWS

from gvpo_jax.errors import UserError
from gvpo_jax.models.load import load_model
from gvpo_jax.rewards import completion_text
from gvpo_jax.rundir.files import read_jsonl, read_metrics
from gvpo_jax.trainer import Trainer
from gvpo_jax.training.policy import Policy


def trainer(run_dir, **settings):
    return Trainer(config(run_dir, **settings), load_model("debug"))


def length(completions, **_):
    return [float(len(completion_text(completion))) for completion in completions]


def vowels(prompt, completion):
    return float(sum(letter in "aeiou" for letter in completion)) or None


def test_records_hold_each_functions_own_reward(tmp_path):
    t = trainer(tmp_path, train__steps=1, rewards__weights=[2.0, -1.0])
    t.train(ROWS, [length, vowels], eval_dataset=ROWS[:1])
    rows = read_jsonl(tmp_path / "completions" / "step_000001.jsonl")
    assert len(rows) == 8
    for row in rows + read_jsonl(tmp_path / "eval" / "after.jsonl"):
        own = {"length": len(row["completion"]), "vowels": vowels("", row["completion"])}
        assert row["rewards"] == own
        assert row["reward"] == pytest.approx(2 * own["length"] - (own["vowels"] or 0))


def never(prompt, completion):
    raise AssertionError("it was called")


def needs_level(prompt, completion, level):
    return never(prompt, completion)


@pytest.mark.parametrize(
    ("funcs", "settings", "message"),
    [
        (never, {"rewards__weights": [1.0, 2.0]}, r"weight per reward function: 1 \(never\), got"),
        ([], {}, "no reward function"),
        (None, {}, "no reward function"),
        ([never, 3], {}, "something to call, got 3"),
        ("nowhere.py:f", {}, "nowhere.py: there is no such file"),
        (
            needs_level,
            {},
            "'needs_level' needs level, which the training data does not have .* word",
        ),
        (lambda completions: [], {}, "does not take prompts"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_sampled(tmp_path, funcs, settings, message):
    t = trainer(tmp_path, **settings)
    t.engine.generate = never
    with pytest.raises(UserError, match=message) as error:
        t.train(ROWS, funcs)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_columns_of_held_out_rows_are_checked_too(tmp_path):
    rows = [row | {"level": 1} for row in ROWS]
    for job in (
        lambda t: t.train(rows, needs_level, eval_dataset=ROWS),
        lambda t: t.evaluate(ROWS, needs_level),
    ):
        with pytest.raises(UserError, match="needs level, which the held-out data does not have"):
            job(trainer(tmp_path))


def test_a_column_that_only_some_rows_have_is_none_elsewhere(tmp_path):
    seen = []

    def spy(prompts, level, **_):
        seen.extend(level)
        return [float(i) for i in range(len(prompts))]

    rows = [*ROWS[:3], ROWS[3] | {"level": 7}]
    trainer(tmp_path, train__steps=2).train(rows, spy)
    assert sorted(seen, key=str) == [7] * 4 + [None] * 12


def test_a_function_that_changes_its_messages_changes_no_others(tmp_path):
    lengths = []

    def with_history(prompts, completions, **_):
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt.append(completion[0])
        lengths.extend(map(len, prompts))
        return [float(i) for i in range(len(prompts))]

    rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("one", "two")]
    trainer(tmp_path, train__steps=2).train(rows, with_history)
    assert lengths == [2] * 16
    assert [len(row["prompt"]) for row in rows] == [1, 1]
    records = read_jsonl(tmp_path / "completions" / "step_000002.jsonl")
    assert [len(record["prompt"]) for record in records] == [1] * 8


# Code that changes


CODE = "def graded(prompt, completion):\n    return float(len(completion)) * {}\n"


def graded(folder, factor):
    (folder / "graded_rewards.py").write_text(CODE.format(factor))
    return f"{folder}/graded_rewards.py:graded"


@pytest.mark.parametrize("steps", [2, 4])
def test_a_reward_whose_code_changed_is_noticed(tmp_path, steps):
    run = tmp_path / "run"
    trainer(run, train__stop_at=steps).train(ROWS, graded(tmp_path, 1))
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"reward graded .* has changed .*run.overwrite=true"):
        trainer(run).train(ROWS, graded(tmp_path, 2))
    assert (run / "metrics.jsonl").read_bytes() == before
    assert trainer(run).train(ROWS, graded(tmp_path, 1))["steps"] == 4


def test_a_run_that_is_overwritten_is_a_new_one(tmp_path):
    old, new, fresh = tmp_path / "old", graded(tmp_path, 2), tmp_path / "fresh"
    trainer(old, eval__every=1).train(ROWS, length, eval_dataset=ROWS[:1])
    (old / "notes.txt").write_text("mine")
    settings = {"run__seed": 1, "train__steps": 2}
    trainer(old, run__overwrite=True, **settings).train(ROWS, new)
    trainer(fresh, **settings).train(ROWS, new)
    for file in ("completions/step_000001.jsonl", "completions/step_000002.jsonl"):
        assert (old / file).read_bytes() == (fresh / file).read_bytes()
    folders = [
        [run, run / "completions", run / "eval", run / "checkpoints"] for run in (old, fresh)
    ]
    names = [
        {path.name for folder in of_run if folder.is_dir() for path in folder.iterdir()}
        for of_run in folders
    ]
    assert names[0] - names[1] == {"notes.txt"}
    assert [line["reward"] for line in read_metrics(old)] == [
        line["reward"] for line in read_metrics(fresh)
    ]
    assert trainer(old, **settings).train(ROWS, new)["steps"] == 2  # there is nothing to do


def test_runs_of_older_versions_which_know_names_only_go_on(tmp_path, monkeypatch):
    save = Policy.save

    def older(self, checkpoints, step, about, samples, score):
        del about["reward_code"]
        save(self, checkpoints, step, about, samples, score)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "save", older)
        trainer(tmp_path / "run", train__stop_at=2).train(ROWS, graded(tmp_path, 1))
    spec = graded(tmp_path, 2)
    assert trainer(tmp_path / "run", train__stop_at=3).train(ROWS, spec)["steps"] == 3
    with pytest.raises(UserError, match=r"reward graded \(graded_rewards\.py\) has changed"):
        trainer(tmp_path / "run").train(ROWS, graded(tmp_path, 3))


def test_a_run_that_a_fault_in_a_reward_ended_goes_on_when_it_is_mended(tmp_path):
    """The updates before it are saved; the change has to be allowed."""
    file, spec = tmp_path / "late.py", f"{tmp_path / 'late.py'}:late"
    file.write_text(
        "calls = []\n\ndef late(completions, **_):\n    calls.append(1)\n"
        "    assert len(calls) < 3, 'too late'\n    return [float(len(c)) for c in completions]\n"
    )
    saved = r"AssertionError: too late \(late.py:5\); the 2 updates before it are saved, and go on "
    with pytest.raises(UserError, match=saved):
        trainer(tmp_path / "run").train(ROWS, spec)
    file.write_text(file.read_text().replace("assert", "assert True or"))
    with pytest.raises(UserError, match=r"all the same with rewards\.allow_changed_code=true"):
        trainer(tmp_path / "run").train(ROWS, spec)
    allowed = trainer(tmp_path / "run", rewards__allow_changed_code=True, rewards__on_error="skip")
    assert allowed.train(ROWS, spec)["steps"] == 4


def test_an_evaluation_by_other_code_than_the_run_s_says_so(tmp_path, capfd):
    t = trainer(tmp_path / "run", train__steps=1)
    t.train(ROWS, graded(tmp_path, 1))
    t.restore(tmp_path / "run")
    t.evaluate(ROWS, graded(tmp_path, 1))
    assert "warning" not in capfd.readouterr().err
    t.evaluate(ROWS, graded(tmp_path, 2))
    assert "the code of reward graded (graded_rewards.py) is not that of" in capfd.readouterr().err


def test_a_failure_names_the_line_of_the_user_s_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import json\n\n\ndef broken(completions, **_):\n    return inner()\n\n\n"
        "def inner():\n    return json.loads('{')\n\n\ndef one(prompt, completion):\n"
        "    return int(completion[:0])\n"
    )
    told = "JSONDecodeError: .* \\(mine.py:9\\)\n"
    with pytest.raises(UserError, match=told):
        trainer(tmp_path / "run").train(ROWS, f"{tmp_path / 'mine.py'}:broken")
    with pytest.raises(UserError, match=r"ValueError: .* \(mine.py:13\)\n"):
        trainer(tmp_path / "run").train(ROWS, f"{tmp_path / 'mine.py'}:one")


# What the first batches show


def constant(completions, **_):
    return [0.0] * len(completions)


def test_the_first_batches_warn_once_of_a_set_up_that_teaches_nothing(tmp_path, capsys):
    settings = {"rollout__max_completion_length": 1, "train__steps": 5}
    rows = [{"prompt": [{"role": "user", "content": row["word"]}]} for row in ROWS]
    trainer(tmp_path / "a", train__stop_at=4, **settings).train(rows, constant)
    shown = [line for line in capsys.readouterr().out.splitlines() if "warning:" in line]
    assert len(shown) == 3
    assert re.search("all rewards within a group were equal in the first 3 batches", shown[0])
    assert re.search("cut at rollout.max_completion_length=1 tokens: raise it", shown[1])
    assert re.search("'constant' gave 0 for each of the first 24 .*completion_text", shown[2])
    trainer(tmp_path / "a", **settings).train(rows, constant)  # goes on: it is known
    trainer(tmp_path / "b", train__steps=3).train(ROWS, length)  # texts of several lengths
    assert "warning:" not in capsys.readouterr().out


def test_a_text_looked_for_in_messages_is_told_how_to_read_them(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "one"}]}]
    told = r"TypeError: .* \(test_peoples_rewards.py:\d+\); completions of chat prompts are lists"
    with pytest.raises(UserError, match=told):
        trainer(tmp_path).train(rows, lambda prompt, completion: float("x" in "y" + completion))


def test_a_column_with_the_name_of_an_argument_is_named_before_the_first_rollout(tmp_path):
    rows = [{"prompt": "a", "completions": "b"}]
    told = "the training data has a column 'completions', which is the name of an argument"
    with pytest.raises(UserError, match=told):
        trainer(tmp_path).train(rows, length)


def test_rows_that_are_few_or_held_out_and_trained_on_are_told_of(tmp_path, capsys):
    t = trainer(tmp_path, train__steps=1, eval__every=1)
    t.train(ROWS[:1], length, eval_dataset=[ROWS[0], {"prompt": "Another"}])
    shown = [line for line in capsys.readouterr().out.splitlines() if "warning:" in line]
    assert "there are 1 prompts for batches of 2" in shown[0]
    assert "1 of 2 held-out prompts are also trained on" in shown[1]
    trainer(tmp_path / "b", train__steps=1, eval__every=1).train(ROWS, length)
    assert "warning: eval.every asks for evaluations, but there are no" in capsys.readouterr().out


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_reward_for_texts_that_gets_messages_is_told_how_to_read_them(tmp_path, on_error):
    def textual(prompt, completion):
        return float(completion.strip() == "x")

    rows = [{"prompt": [{"role": "user", "content": "one"}]}]
    with pytest.raises(
        UserError, match=r"'textual' failed on row [1-9]: .*'list'.*completion_text"
    ):
        trainer(tmp_path, rewards__on_error=on_error).train(rows, textual)


# Rows and rewards in other containers


def test_rows_come_in_whatever_holds_them(tmp_path):
    hub = datasets.Dataset.from_list(ROWS)
    t = trainer(tmp_path)
    expected = t.evaluate(ROWS, length)
    for rows in (hub, pandas.DataFrame(ROWS), hub.data.table, iter(ROWS), tuple(ROWS)):
        assert t.evaluate(rows, length) == expected
    t = trainer(tmp_path / "run", train__steps=1)
    assert t.train(hub, length, eval_dataset=pandas.DataFrame(ROWS))["steps"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a", "b"], 'row 1: a row is a dict like {"prompt": "..."}, this is a str'),
        (
            datasets.DatasetDict(
                dict.fromkeys(["train", "test"], datasets.Dataset.from_list(ROWS))
            ),
            r'the splits train, test: give one of them, as dataset\["train"\]',
        ),
        ({"prompt": ["a", "b"]}, "mapping of prompt; give a list of rows"),
        ("rows.jsonl", "this is a str; .*load_rows"),
        (None, "this is a NoneType"),
        (3, "this is a int"),
    ],
)
def test_what_is_no_dataset_is_told_in_one_line(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).train(rows, length)


def test_columns_may_hold_what_json_does_not_know(tmp_path):
    odd = [{"a", "b"}, len, {1: "x", "b": "y"}, {(0, 0): 1}, {None: 1}, b"\xff", {1, 2}]
    rows = [{"prompt": "Say: ", "odd": value} for value in odd]
    summary = trainer(tmp_path, train__steps=2, rollout__lookahead=1).train(rows, length)
    assert summary["steps"] == 2
    loop: dict = {"prompt": "a"}
    loop["self"] = loop
    with pytest.raises(UserError, match="contains itself"):
        trainer(tmp_path / "loop").train([loop], length)


def given_rewards():
    import jax.numpy as jnp
    import torch

    values = [[1.0, 0.0]]
    yield from (np.array(values), jnp.array(values), torch.tensor(values))
    yield from ([np.array(values[0])], [[np.array(1.0), jnp.array(0)]], [[True, np.bool_(0)]])


def test_a_step_takes_rewards_of_any_library(tmp_path):
    for rewards in given_rewards():
        metrics = trainer(tmp_path).train_step(["2 + 2 ="], [[" 4", " 5"]], rewards)
        assert metrics["reward"] == 0.5


@pytest.mark.parametrize(
    ("completions", "rewards"), [([" 4"], [[1, 0]]), ([[" 4"]], [1.0]), ([["4", "5"]], ["10"])]
)
def test_a_step_names_a_text_or_number_in_place_of_a_list(tmp_path, completions, rewards):
    with pytest.raises(UserError, match="group 1: give a list of texts and one of rewards"):
        trainer(tmp_path).train_step(["2 + 2 ="], completions, rewards)


def test_records_are_the_same_in_every_process(tmp_path):
    rows = [{"prompt": "Say: ", "words": {"b", "a", "c"}}]
    trainer(tmp_path, train__steps=1).train(rows, length)
    text = (tmp_path / "completions" / "step_000001.jsonl").read_text()
    assert json.loads(text.splitlines()[0])["words"] == '{"a", "b", "c"}'
