"""`gvpo-jax init`: what it writes trains as it is, and it replaces nothing."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gvpo_jax import starter
from gvpo_jax.cli import main
from gvpo_jax.config_file import load_config
from gvpo_jax.data.rows import load_rows
from gvpo_jax.errors import UserError
from gvpo_jax.models.load import load_model
from gvpo_jax.rewards import load_reward_func

CONFIG, REWARDS, ROWS, HELD_OUT = starter.FILES


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The files, in a folder below the one that the test runs in."""
    monkeypatch.chdir(tmp_path)
    starter.write_starter("my task")
    return tmp_path / "my task"


def commands(text: str) -> list[list[str]]:
    """The arguments of the commands in what `init` prints."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("  gvpo-jax ")]
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.slow
def test_what_it_prints_trains_and_evaluates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my task"]) == 0
    out = capsys.readouterr().out
    for name in starter.FILES:
        assert (tmp_path / "my task" / name).is_file()
        assert f"wrote my task/{name} " in out
    first, second = commands(out)
    assert {"model.name=debug", "train.steps=2"} <= set(first)
    assert second == ["train", "my task/config.yaml"]
    assert main(first) == 0
    run = tmp_path / "runs" / "try"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["eval/accuracy_after"] == 0  # it can't write dates
    answers = (run / "eval" / "after.jsonl").read_text()
    for row in load_rows(tmp_path / "my task" / HELD_OUT):
        assert row["prompt"] in answers
    assert not (tmp_path / "runs" / "first").exists()
    capsys.readouterr()
    assert main(["eval", "runs/try"]) == 0
    assert json.loads(capsys.readouterr().out)["eval/accuracy"] == 0


def test_the_rows_are_ten_and_the_held_out_ones_are_others(task):
    rows, held_out = load_rows(task / ROWS), load_rows(task / HELD_OUT)
    assert len(rows) == 10
    assert len(held_out) >= 5
    prompts = [row["prompt"] for row in [*rows, *held_out]]
    assert len(set(prompts)) == len(prompts)
    longest = load_config(task / CONFIG).data.max_prompt_length
    tokenizer = load_model("debug").tokenizer  # of bytes: none makes more tokens
    for prompt in prompts:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
        assert len(tokenizer(chat)["input_ids"]) < longest


def test_the_reward_tells_right_answers_from_wrong_ones(task):
    correct = load_reward_func(f"{task / REWARDS}:correct")
    for row in [*load_rows(task / ROWS), *load_rows(task / HELD_OUT)]:
        assert correct(row["prompt"], f"It is {row['solution']}.", row["solution"]) == 1
        assert correct(row["prompt"], "1999-01-01", row["solution"]) == 0
        assert correct(row["prompt"], "no date", row["solution"]) == 0


def test_the_reward_files_own_check_runs(task):
    command = [sys.executable, task / REWARDS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "the reward does what it should\n"
    text = (task / REWARDS).read_text()
    assert "\nif __name__" in text
    (task / REWARDS).write_text(text.replace("dates[-1:]", "dates[:0]"))  # a reward that is wrong
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_every_setting_has_a_sentence_behind_it(task):
    sections = yaml.safe_load((task / CONFIG).read_text())
    lines = (task / CONFIG).read_text().splitlines()
    settings = [line for line in lines if line.startswith("  ")]
    assert len(settings) == sum(map(len, sections.values())) >= 15
    for line in settings:
        assert line.partition("  # ")[2].endswith("."), line


def test_the_config_is_of_a_known_small_model(task):
    config = load_config(task / CONFIG)
    assert config.model.name == "Qwen/Qwen2.5-0.5B-Instruct"
    assert config.rewards.funcs == [f"{task / REWARDS}:correct"]
    assert config.data.path == str(task / ROWS)


@pytest.mark.parametrize("name", starter.FILES)
def test_no_file_is_replaced(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("mine")
    assert main(["init"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"gvpo-jax: error: . has {name} already, and nothing is replaced: give")
    assert err.count("\n") == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_it_writes_here_by_default_beside_other_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine")
    assert main(["init"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*starter.FILES, "notes.txt"}
    assert commands(capsys.readouterr().out)[1] == ["train", "config.yaml"]


def test_a_link_to_nothing_is_a_file_too(tmp_path):
    (tmp_path / ROWS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"has rows\.jsonl already"):
        starter.write_starter(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("folder", "said"),
    [("file/below", "can't write to .*: Not a directory"), ("gs://bucket/x", "is an address")],
)
def test_a_folder_that_can_not_be_is_told(tmp_path, monkeypatch, folder, said):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    with pytest.raises(UserError, match=said):
        starter.write_starter(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_nothing_stays_where_a_disk_is_full(tmp_path, monkeypatch):
    opened = Path.open

    def full(self, mode="r", *rest):
        if self.name == HELD_OUT and mode == "xb":
            raise OSError(28, "No space left on device")
        return opened(self, mode, *rest)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="No space left"):
        starter.write_starter(tmp_path / "a" / "b")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "eval"])
def test_its_folder_is_not_taken_for_a_run(task, capsys, command):
    """Training there would replace the config, and its comments."""
    before = (task / CONFIG).read_text()
    assert main([command, "my task"]) == 2
    err = capsys.readouterr().err
    assert "was written by hand; give the file, my task/config.yaml" in err
    assert (task / CONFIG).read_text() == before
    assert not any(task.glob("checkpoints"))
