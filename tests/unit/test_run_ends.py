"""What fails late costs nothing that was there; a run made longer is one that was that long."""

import json
from statistics import fmean

import pytest
from small_run import config
from test_trainer import ROWS, assert_same_run, train

from gvpo_jax.cli import main
from gvpo_jax.config_file import check_claim, claim, override
from gvpo_jax.errors import UserError
from gvpo_jax.models.load import load_model
from gvpo_jax.report import write_report
from gvpo_jax.rewards.debug import letter_share
from gvpo_jax.rundir.files import read_jsonl, read_metrics
from gvpo_jax.rundir.log import Counters
from gvpo_jax.trainer import Trainer


def run_with(run_dir, reward, rows=ROWS, held_out=ROWS[:2], **settings):
    trainer = Trainer(config(run_dir, **settings), load_model("debug"))
    return trainer, trainer.train(rows, reward, eval_dataset=held_out)


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def evaluation_steps(run_dir):
    """Of the lines of metrics.jsonl that tell of an evaluation, duplicates included."""
    lines = read_jsonl(run_dir / "metrics.jsonl")
    return [line["step"] for line in lines if "eval/reward" in line]


# A round is 4 updates: 3 updates end within one, 4 where an evaluation is due.
@pytest.mark.parametrize("short", [3, 4])
def test_a_run_made_longer_is_one_that_was_that_long(tmp_path, short):
    reuse = {"train__steps_per_generation": 2, "train__num_iterations": 2, "eval__every": 2}
    whole, summary = train(tmp_path / "whole", train__steps=8, **reuse)
    train(tmp_path / "parts", train__steps=short, **reuse)
    assert "after.jsonl" in files_of(tmp_path / "parts" / "eval")
    longer = config(tmp_path / "parts", train__steps=8, train__stop_at=4, **reuse)
    Trainer(longer, load_model("debug")).train(ROWS, letter_share, eval_dataset=ROWS[:2])
    assert files_of(tmp_path / "parts" / "eval") == ["before.jsonl", "step_000004.jsonl"]
    assert not (tmp_path / "parts" / "summary.json").exists()
    resumed, again = train(tmp_path / "parts", train__steps=8, **reuse)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", whole, resumed)
    assert evaluation_steps(tmp_path / "parts") == evaluation_steps(tmp_path / "whole") == [0, 4, 8]
    clocks = ("train_seconds", "wall_seconds", "peak_memory_gib")
    assert {k: v for k, v in summary.items() if k not in clocks} == {
        k: v for k, v in again.items() if k not in clocks
    }


def test_a_run_killed_before_its_summary_has_its_last_evaluation_once(tmp_path):
    _, summary = train(tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "summary.json").unlink()
    _, again = train(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert again["eval/accuracy_after"] == summary["eval/accuracy_after"]
    assert (tmp_path / "summary.json").is_file()


def test_a_run_killed_before_its_report_gets_it_from_the_next_start(tmp_path):
    train(tmp_path)
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    train(tmp_path)
    assert (tmp_path / "report.html").read_text() == page


def failing_from(call):
    """`letter_share` that fails once, at this call."""
    calls = []

    def judge(prompts, completions, **columns):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("no credit left")
        return letter_share(prompts=prompts, completions=completions, **columns)

    return judge


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    return run_dir, run_with(run_dir, failing_from(99), eval__every=2)[0]


# Calls: the evaluation before, updates 1 and 2, the evaluation at 2, updates 3 and 4, after.
@pytest.mark.parametrize(("call", "saved"), [(4, 2), (6, 3), (7, 4)])
def test_a_reward_function_that_fails_costs_no_update(tmp_path, unbroken, call, saved):
    whole_dir, whole = unbroken
    judge = failing_from(call)
    with pytest.raises(UserError, match="no credit left"):
        run_with(tmp_path / "parts", judge, eval__every=2)
    assert files_of(tmp_path / "parts" / "checkpoints") == [str(saved)]
    resumed, summary = run_with(tmp_path / "parts", judge, eval__every=2)
    assert summary["steps"] == 4
    assert_same_run(whole_dir, tmp_path / "parts", whole, resumed)
    assert evaluation_steps(tmp_path / "parts") == [0, 2, 4]


def test_files_that_can_not_be_written_do_not_cost_the_result(tmp_path, capsys):
    def hostile(prompts, completions, **columns):
        for name in ("report.html", "summary.json", "eval/after.jsonl"):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
        return letter_share(prompts=prompts, completions=completions, **columns)

    _, summary = run_with(tmp_path, hostile)
    assert summary["steps"] == 4
    assert summary["eval/accuracy_after"] >= 0
    shown = capsys.readouterr().out
    for name in ("report.html", "summary.json", "eval/after.jsonl"):
        assert shown.count(f"can't write {tmp_path / name}: Is a directory") == 1
    assert not [path for path in tmp_path.rglob("*.tmp")]
    with pytest.raises(UserError, match=r"can't write .*report\.html: Is a directory"):
        write_report(tmp_path)


def test_a_full_disk_under_the_metrics_is_told_once_and_training_goes_on(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("{}\n")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    trainer = Trainer(config(tmp_path, train__steps=2), load_model("debug"))
    assert trainer.train(ROWS, letter_share)["steps"] == 2
    assert capsys.readouterr().out.count("metrics.jsonl: No space left on device") == 1


def test_what_is_sampled_is_kept_every_so_many_updates_however_many_share_it(tmp_path):
    Trainer(
        config(tmp_path, train__num_iterations=3, train__steps=13, log__completions_every=4),
        load_model("debug"),
    ).train(ROWS, letter_share)
    # Sampled for updates 1, 4, 7, 10, 13; due from 1, 5, 9, 13 on.
    steps = [f"step_{step:06d}.jsonl" for step in (1, 7, 10, 13)]
    assert files_of(tmp_path / "completions") == steps


def test_graded_rewards_are_told_as_reward(tmp_path, capsys):
    _, summary = train(tmp_path, eval__success_reward=None)
    told = {}
    for when in ("before", "after"):
        rows = read_jsonl(tmp_path / "eval" / f"{when}.jsonl")
        assert "correct" not in rows[0]
        told[when] = fmean(row["reward"] for row in rows)
        assert summary[f"eval/reward_{when}"] == pytest.approx(told[when])
        low, high = (summary[f"eval/reward_{when}_{end}"] for end in ("low", "high"))
        assert low < told[when] < high
        assert summary[f"eval/unscored_{when}"] == 0
    assert not {0.0, 1.0} >= {row["reward"] for row in rows}
    lines = read_metrics(tmp_path)
    assert lines[0]["eval/reward"] == pytest.approx(told["before"])
    assert lines[-1]["eval/reward"] == pytest.approx(told["after"])
    shown = capsys.readouterr().out
    assert f"evaluation before: reward {told['before']:.3g} [" in shown
    assert f"evaluation after: reward {told['before']:.3g} [" in shown
    page = (tmp_path / "report.html").read_text()
    assert "Held-out reward" in page
    assert "ccuracy" not in json.dumps([summary, *lines]) + shown + page


def test_rewards_of_zero_and_one_are_accuracy_without_a_setting(tmp_path):
    trainer = Trainer(config(tmp_path, eval__success_reward=None), load_model("debug"))

    def half(prompts, completions, **_):
        return [i % 2 for i in range(len(prompts))]

    def quarter_of_two(prompts, completions, **_):
        return [2 * (i % 4 == 0) for i in range(len(prompts))]

    rows = [{**row, "correct": "no", "task": task} for row, task in zip(ROWS, "aabba", strict=True)]
    metrics, records = trainer.evaluate(rows, half)
    assert metrics["eval/accuracy"] == metrics["eval/reward"] == 0.5
    assert metrics["eval/accuracy/a"] == metrics["eval/accuracy/b"] == 0.5
    assert [r["correct"] for r in records] == [False, True] * 10
    metrics, records = trainer.evaluate(rows, quarter_of_two)
    assert metrics["eval/reward"] == metrics["eval/reward/a"] == 0.5
    assert "eval/accuracy" not in metrics
    assert "correct" not in records[0]


def test_what_is_left_out_is_counted_and_said(tmp_path, capsys):
    def some(prompts, completions, **_):
        bad = [None, float("nan")]
        return [bad[i] if i < 2 else float(len(text)) for i, text in enumerate(completions)]

    long = {"prompt": "x" * 40}
    skip = {"data__too_long": "skip", "rewards__on_error": "skip", "train__num_iterations": 2}
    rows, held_out = [*ROWS, long, long], [*ROWS[:2], long]
    _, summary = run_with(tmp_path, some, rows, held_out, **skip)
    counts = {k.removeprefix("left_out/"): v for k, v in summary.items() if "left_out" in k}
    assert counts == {  # 4 updates on 2 rollouts, each counted once
        "training_rows": 2, "held_out_rows": 1, "rewards_failed": 2, "rewards_abstained": 2,
        "groups": 0,
    }  # fmt: skip
    assert summary["eval/unscored_before"] == summary["eval/unscored_after"] == 2
    told = [line.get("left_out/rewards_failed") for line in read_metrics(tmp_path)]
    assert told == [None, 1, 1, 2, 2]  # before, and 4 updates
    shown, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    prompts = "2 prompts skipped: over data.max_prompt_length tokens, 1 held-out prompts skipped"
    assert shown.count(f"left out: {prompts}") == 2
    assert "1 rewards failed  1 rewards abstained" in shown
    for text in (shown, page):
        assert "2 of 8 completions without a reward" in text
        assert "2 completions whose reward failed" in text
        assert "2 completions that no function gave a reward" in text


def test_a_run_of_the_old_default_goes_on(tmp_path):
    old = config(tmp_path / "run", eval__success_reward=1.0)
    folder = claim(old)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert check_claim(override(old, eval__success_reward=None)) == folder
    with pytest.raises(UserError, match=r"\(eval.success_reward=1.0\)"):
        check_claim(override(old, eval__success_reward=0.5))
    saved = {"step": 2, "rollouts": 2, "accuracy_before": 0.25, "accuracy_after": None}
    counters = Counters.of_checkpoint(saved)
    assert (counters.step, counters.summary("m")["eval/accuracy_before"]) == (2, 0.25)


@pytest.mark.parametrize("where", ["prompt", "answer_prefix"])
def test_half_an_emoji_is_told_with_its_row(tmp_path, capsys, where):
    rows = [ROWS[0], {"prompt": "a", where: "cut \ud83d end"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        f"data.path={data}",
        "data.tasks=[]",
        "rewards.funcs=gvpo_jax.rewards.debug:letter_share",
    ]
    assert main(["train", "debug", f"run.dir={tmp_path / 'run'}", "mesh.fsdp=1", *settings]) == 2
    error, page = capsys.readouterr().err.splitlines()
    assert page.startswith("see https://")
    assert r"rows.jsonl:2: the text holds \ud83d, half of a character" in error


def test_half_an_emoji_in_texts_of_steps_is_told_with_its_place(tmp_path):
    trainer = Trainer(config(tmp_path), load_model("debug"))
    with pytest.raises(UserError, match=r"group 1, completion 2: the text holds \\ud83d"):
        trainer.train_step(["a"], [["x", "\ud83d"]], [[1.0, 0.0]])


def test_half_an_emoji_in_another_column_is_taken(tmp_path):
    """It reaches the reward function, the screen, and the files, as it was."""
    rows = [{**row, "solution": "a\ud83d"} for row in ROWS]
    run_with(tmp_path, letter_share, rows, rows[:2], train__steps=1)
    for name in ("eval/after.jsonl", "completions/step_000001.jsonl"):
        assert read_jsonl(tmp_path / name)[0]["solution"] == "a\ud83d"
    assert (tmp_path / "report.html").is_file()


def test_a_policy_that_is_not_finite_is_not_saved_as_the_newest_checkpoint(tmp_path):
    """One huge step leaves finite losses and weights that give NaN."""
    broken = {"optimizer__name": "sgd", "optimizer__learning_rate": 1e30}
    broken |= {"optimizer__max_grad_norm": None, "train__steps": 4}
    with pytest.raises(UserError, match="not finite"):
        train(tmp_path, **broken)
    assert not list((tmp_path / "checkpoints").iterdir())
