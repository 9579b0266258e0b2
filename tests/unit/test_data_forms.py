"""Datasets in the forms that people have: other columns, conversations, CSV, filters, the hub."""

import gzip
import importlib
import json
import re
import sys
import types

import numpy as np
import pytest

from gvpo_jax.config import Config, check_extras
from gvpo_jax.config_file import load_config, override
from gvpo_jax.data import hub
from gvpo_jax.data.forms import Form
from gvpo_jax.data.rows import as_rows, load_rows, load_sets
from gvpo_jax.errors import UserError

GSM8K = {"question": "2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_columns_and_the_answer_behind_its_mark(tmp_path):
    file = write(
        tmp_path / "x.jsonl", [GSM8K, GSM8K | {"answer": "#### 1 #### 1,234 ", "level": 3}]
    )
    form = Form({"prompt": "question", "solution": "answer"}, r"#### *(.+)")
    rows = load_rows(file, form)
    assert rows[0] == {"prompt": "2 + 2?", "solution": "4"}
    assert rows[1] == {"prompt": "2 + 2?", "solution": "1 #### 1,234", "level": 3}
    assert load_rows(file, Form(form.columns, "#### [0-9,]+"))[1]["solution"] == "#### 1,234"


def test_a_dot_leads_into_a_column_of_dicts(tmp_path):
    row = {"prompt": "x", "reward_model": {"ground_truth": "7"}, "a.b": 1}
    (found,) = load_rows(
        write(tmp_path / "x.jsonl", [row]),
        Form({"solution": "reward_model.ground_truth", "level": "a.b"}),
    )
    assert (found["solution"], found["level"]) == ("7", 1)
    assert found["reward_model"] == {"ground_truth": "7"}
    assert "a.b" not in found


@pytest.mark.parametrize(
    ("row", "form", "said"),
    [
        (
            GSM8K,
            Form({"prompt": "problem"}),
            "no column 'problem', .* columns are question, answer",
        ),
        ({"prompt": "x", "a": {"b": 1}}, Form({"solution": "a.c"}), r"no column 'a\.c'"),
        ({"prompt": "x"}, Form(answer_pattern="x"), "no column 'solution'; data.columns={solution"),
        ({"prompt": "x", "solution": 4}, Form(answer_pattern="x"), "'solution' is 4"),
        (
            {"prompt": "x", "solution": "the answer is 5"},
            Form(answer_pattern="#### (.+)"),
            r"data.answer_pattern=#### \(.\+\) finds nothing in .* 'the answer is 5'",
        ),
        ("text", Form({"prompt": "x"}), "a row is a JSON object"),
    ],
)
def test_what_is_not_there_is_told_with_its_place(tmp_path, row, form, said):
    with pytest.raises(UserError, match=rf"x\.jsonl:1: .*{said}"):
        load_rows(write(tmp_path / "x.jsonl", [row]), form)


def test_a_pattern_that_is_none_is_told_before_anything_is_read():
    data = override(Config(), data__path="gone.jsonl", data__answer_pattern="(").data
    with pytest.raises(UserError, match=r"data.answer_pattern=\( is no regular expression"):
        data.load(0)


CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SHARE_GPT = [
    {"from": "system", "value": "Be short."}, {"from": "human", "value": "2 + 2?"},
    {"from": "gpt", "value": "4"}, {"from": "human", "value": "3 + 3?"},
]  # fmt: skip


def test_a_conversation_ends_before_its_last_answer(tmp_path):
    rows = [{"messages": CHAT}, {"conversations": SHARE_GPT, "solution": "6"}]
    rows += [{"messages": CHAT, "solution": "four"}, {"prompt": "x", "messages": CHAT}]
    found = load_rows(write(tmp_path / "x.jsonl", rows))
    assert found[0] == {"prompt": CHAT[:1], "solution": "4"}
    roles = [message["role"] for message in found[1]["prompt"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert found[1]["prompt"][-1]["content"] == "3 + 3?"
    assert found[1]["solution"] == "6"
    assert found[2]["solution"] == "four"
    assert found[3] == {"prompt": "x", "messages": CHAT}
    assert as_rows([{"messages": np.array(CHAT, object)}]) == [found[0]]


@pytest.mark.parametrize("role", ["gpt", "GPT", "chatgpt", "bot", "model", "Assistant"])
def test_an_answer_is_no_part_of_the_prompt_whatever_its_speaker_is_called(tmp_path, role):
    turns = [{"from": "Human", "value": "2 + 2?"}, {"from": role, "value": "4"}]
    (row,) = load_rows(write(tmp_path / "x.jsonl", [{"conversations": turns, "solution": None}]))
    assert row == {"prompt": [{"role": "user", "content": "2 + 2?"}], "solution": "4"}


@pytest.mark.parametrize("role", ["someone", ["x"], None])
def test_a_speaker_that_nobody_knows_is_refused(tmp_path, role):
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": role, "value": "4"}]
    with pytest.raises(UserError, match=r"x\.jsonl:1: the conversation has a turn of"):
        load_rows(write(tmp_path / "x.jsonl", [{"conversations": turns}]))


def test_an_answer_in_parts_is_one_text(tmp_path):
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "#### 4"}]
    talk = [CHAT[0], {"role": "assistant", "content": parts}]
    file = write(tmp_path / "x.jsonl", [{"messages": talk, "prompt": None}])
    assert load_rows(file)[0]["solution"] == "It is #### 4"
    assert load_rows(file, Form(answer_pattern="#### (.+)"))[0]["solution"] == "4"


@pytest.mark.parametrize("pattern", [r"(\d*)", "[0-9]*", r"is (\d+)|no", r"no|is (\d+)$"])
def test_an_empty_find_is_no_answer(tmp_path, pattern):
    file = write(tmp_path / "x.jsonl", [{"prompt": "x", "solution": "the answer is 72"}])
    assert load_rows(file, Form(answer_pattern=pattern))[0]["solution"] == "72"
    with pytest.raises(UserError, match="finds nothing in 'solution'"):
        load_rows(file, Form(answer_pattern="x*"))


def test_a_group_that_took_no_part_gives_the_whole_find(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"prompt": "x", "solution": "answer: 4"}])
    assert load_rows(file, Form(answer_pattern="####(.+)|[0-9]"))[0]["solution"] == "4"


@pytest.mark.parametrize("pattern", ["", "(", "a{99999999999}", "(" * 5000 + ")" * 5000])
def test_patterns_that_are_none(pattern):
    with pytest.raises(UserError, match=r"data\.answer_pattern"):
        Form(answer_pattern=pattern).check()


@pytest.mark.parametrize("value", [True, 2024, None, ["a"]])
def test_a_column_s_name_is_a_text(value):
    with pytest.raises(UserError, match=r"data.columns.prompt must be a text"):
        override(Config(), data__columns={"prompt": value})


@pytest.mark.parametrize(
    "row", [{"messages": []}, {"messages": "x"}, {"messages": [{"role": "assistant"}]}]
)
def test_a_conversation_without_a_question_is_refused(tmp_path, row):
    with pytest.raises(UserError, match=r"x\.jsonl:1: "):
        load_rows(write(tmp_path / "x.jsonl", [row]))


def test_csv_has_texts_under_the_names_of_its_first_line(tmp_path):
    text = '\ufeffprompt,solution\n"2 + 2?\nNow, please",4\n3 + 3?,6\n'
    (tmp_path / "x.csv").write_text(text)
    (tmp_path / "y.csv.gz").write_bytes(gzip.compress(text.encode()))
    first = [
        {"prompt": "2 + 2?\nNow, please", "solution": "4"},
        {"prompt": "3 + 3?", "solution": "6"},
    ]
    assert load_rows(tmp_path / "x.csv") == load_rows(tmp_path / "y.csv.gz") == first
    assert load_rows(tmp_path) == first * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,solution\nx\n", r"x\.csv:2: the line has not as many values .*prompt, solution"),
        ("prompt,solution\nx,1,2\n", r"x\.csv:2: the line has not as many"),
        ('prompt\n"x\n', r"x\.csv: can't be read as CSV: unexpected end of data"),
        ("prompt\n", "holds no rows"),
        ("prompt,solution,solution\nq,4,5\n", r"x\.csv:1: the column 'solution' has no name, stan"),
        ("prompt, solution\nq, 4\n", r"x\.csv:1: the column ' solution' has no name"),
        ("prompt;solution\nq;4\n", "values are separated by commas, not semicolons"),
        ("prompt,\nq,4\n", r"x\.csv:1: the column '' has no name"),
        ("question\nx\n", r"x\.csv:2: no column 'prompt'; the columns are question"),
    ],
)
def test_csv_that_is_broken_is_told(tmp_path, text, said):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        load_rows(tmp_path / "x.csv")


def test_csv_that_is_no_text_is_told(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"prompt\n\xff\n")
    with pytest.raises(UserError, match=r"x\.csv: can't be read as CSV"):
        load_rows(tmp_path / "x.csv")


def test_a_filter_sees_the_row_in_its_form(tmp_path):
    rows = [GSM8K | {"level": level} for level in range(4)]
    form = Form({"prompt": "question"})

    def hard(row):
        assert "prompt" in row
        return row.pop("level") > 1  # of a copy

    found = load_rows(write(tmp_path / "x.jsonl", rows), form, keep=hard)
    assert [row["level"] for row in found] == [2, 3]
    no_answer = GSM8K | {"answer": "none", "level": 0}
    whole = Form({"prompt": "question", "solution": "answer"}, "#### (.+)")
    file = write(
        tmp_path / "y.jsonl", [no_answer, *rows, {"question": "", "answer": "", "level": 0}]
    )
    found = load_rows(file, whole, keep=hard)  # before what it drops is looked at closely
    assert [row["solution"] for row in found] == ["4", "4"]

    def meddles(row):
        row["prompt"].append("mine")
        return True

    talk = write(tmp_path / "z.jsonl", [{"prompt": CHAT[:1]}])
    assert load_rows(talk, keep=meddles) == [{"prompt": CHAT[:1]}]
    with pytest.raises(UserError, match="keeps no row"):
        load_rows(tmp_path / "x.jsonl", form, keep=lambda row: False)
    with pytest.raises(UserError, match=r"x\.jsonl:1: data.filter failed: KeyError: 'size'"):
        load_rows(tmp_path / "x.jsonl", form, keep=lambda row: row["size"])


async def late(row):
    return False


def leaves(row):
    raise SystemExit(0)


@pytest.mark.parametrize(("keep", "said"), [(late, "is async"), (leaves, "failed: SystemExit: 0")])
def test_a_filter_that_gives_no_answer_is_told(tmp_path, keep, said):
    with pytest.raises(UserError, match=said):
        load_rows(write(tmp_path / "x.jsonl", [{"prompt": "x"}]), keep=keep)


def test_a_filter_is_found_beside_the_config(tmp_path):
    (tmp_path / "my.yaml").write_text("data: {filter: 'mine.py:hard', path: x.jsonl}")
    (tmp_path / "mine.py").write_text("hard = bool")
    config = load_config(tmp_path / "my.yaml")
    assert config.data.filter == f"{tmp_path / 'mine.py'}:hard"


def test_each_file_of_a_folder_is_an_evaluation_set(tmp_path):
    for name, count in (("aime2024", 1), ("math500", 3), ("test-00000-of-00002", 2)):
        write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {i}"} for i in range(count)])
    write(tmp_path / "test-00001-of-00002.jsonl", [{"prompt": "x", "task": "mine"}])
    data = override(Config(), data__path=str(tmp_path), data__eval_path=str(tmp_path)).data
    rows, held_out = data.load(0)
    assert all(set(row) <= {"prompt", "task"} for row in rows)
    assert sum("task" in row for row in rows) == 1
    tasks = [row["task"] for row in held_out]
    assert tasks == ["aime2024", *["math500"] * 3, "test", "test", "mine"]
    assert len(held_out) == len(rows) == 7
    first = override(Config(), data__path="x", data__eval_size=2).data
    only = load_sets(tmp_path / "math500.jsonl", 2)
    assert [row["prompt"] for row in only] == ["math500 0", "math500 1"]
    assert "task" not in only[0]
    assert len(load_sets(tmp_path, first.eval_size)) == 1 + 2 + 2
    assert load_sets(tmp_path, 2)[1].place == f"{tmp_path / 'math500.jsonl'}:1"


def test_a_table_beside_rows_is_none_of_them(tmp_path):
    write(tmp_path / "x.jsonl", [{"prompt": "x"}])
    (tmp_path / "stats.csv").write_text("prompt,count\ny,1\n")
    assert load_rows(tmp_path) == [{"prompt": "x"}]
    assert len(load_rows(tmp_path / "*")) == 2


# The hub.


@pytest.mark.parametrize("setting", ["name", "split", "eval_split"])
def test_what_is_for_the_hub_is_not_passed_over(tmp_path, setting):
    path = str(write(tmp_path / "x.jsonl", [{"prompt": "x"}]))
    data = override(Config(), data__path=path, **{f"data__{setting}": "x"}).data
    with pytest.raises(UserError, match=rf"data.{setting}=x is for datasets of the hub"):
        data.load(0)


@pytest.mark.parametrize(
    ("path", "is_one"),
    [
        ("openai/gsm8k", True), ("HuggingFaceH4/MATH-500", True), ("rows.jsonl", False),
        ("a/b/c", False), ("./gsm8k", False), ("data/x.jsonl", False), ("data/*.jsonl", False),
        ("/abs/file", False),
    ],
)  # fmt: skip
def test_a_name_of_the_hub_is_one_that_is_not_here(path, is_one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_name(path) == is_one
    if is_one:
        (tmp_path / path).mkdir(parents=True)
        assert not hub.is_hub_name(path)


@pytest.fixture
def datasets(monkeypatch):
    """In place of `datasets`: what it is asked for, and what it answers."""
    module = types.SimpleNamespace(asked=[], answer=[GSM8K], config=types.SimpleNamespace())

    def load_dataset(*arguments, **options):
        module.asked.append((*arguments, options))
        if isinstance(module.answer, Exception):
            raise module.answer
        return module.answer

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_rows_come_from_the_hub_with_name_and_split(datasets):
    data = override(
        Config(), data__path="openai/gsm8k", data__eval_path="openai/gsm8k", data__name="main",
        data__columns={"prompt": "question", "solution": "answer"},
        data__answer_pattern="#### (.+)",
    ).data  # fmt: skip
    rows, held_out = data.load(0)
    assert rows == held_out == [{"prompt": "2 + 2?", "solution": "4"}]
    asked = ("openai/gsm8k", "main")
    assert datasets.asked == [(*asked, {"split": "train"}), (*asked, {"split": "test"})]
    assert rows[0].place == "openai/gsm8k (train): row 1"


class DatasetNotFoundError(FileNotFoundError):
    pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("Couldn't reach"), "nor such a dataset in the cache, and the hub can't"),
        (DatasetNotFoundError("x"), "no such file or folder here, and no such dataset on the hub"),
        (
            ValueError("Config name is missing.\nPick: ['main']"),
            r"data.name says which.*\['main'\]",
        ),
        (ValueError("BuilderConfig 'm' not found"), "data.name says which"),
        (ValueError('Unknown split "x". Should be one of'), "data.split, or data.eval_split"),
        (RuntimeError("odd"), "can't be read: RuntimeError: odd"),
    ],
)
def test_what_the_hub_has_not_is_one_line(datasets, error, said):
    datasets.answer = error
    with pytest.raises(UserError, match=said) as told:
        load_rows("openai/gsm8k")
    assert "\n" not in str(told.value)


def test_a_hub_that_can_not_be_reached_is_not_tried_again(monkeypatch):
    """The real package, which would try for half a minute."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="nor such a dataset in the cache, and the hub"):
        load_rows("nobody/nothing", name="x")
    assert constants.HF_HUB_OFFLINE is False


def test_the_extra_is_named_where_datasets_is_missing(monkeypatch):
    config = override(Config(), data__path="openai/gsm8k", model__name="debug")
    check_extras(config)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'datasets is missing: pip install "gvpo-jax\[hub\]"'):
        load_rows("openai/gsm8k")


# Objects of other libraries.


def test_the_only_split_of_a_dataset_dict_is_taken_and_several_are_named():
    datasets = importlib.import_module("datasets")
    part = datasets.Dataset.from_list([{"prompt": "a", "x": None}, {"prompt": "b", "x": 1}])
    rows = [{"prompt": "a", "x": None}, {"prompt": "b", "x": 1}]
    assert as_rows(datasets.DatasetDict(test=part)) == rows
    assert as_rows(datasets.IterableDatasetDict(train=part.to_iterable_dataset())) == rows
    for names, said in ((("train", "test"), 'dataset["train"]'), (("a", "b"), 'dataset["a"]')):
        several = datasets.DatasetDict(dict.fromkeys(names, part))
        with pytest.raises(UserError, match=re.escape(f"{', '.join(names)}: give one of them, as "
                                                      f"{said}")):  # fmt: skip
            as_rows(several)
    with pytest.raises(UserError, match="a mapping of prompt, x; give a list of rows"):
        as_rows({"prompt": ["a"], "x": [1]})
    with pytest.raises(UserError, match="a mapping of nothing"):
        as_rows({})


def test_what_a_data_frame_lacks_is_none():
    pandas = importlib.import_module("pandas")
    frame = pandas.DataFrame(
        {"prompt": ["a", "b"], "text": ["x", None], "number": [1.5, None], "list": [[1], None],
         "count": [1, 2], "day": [pandas.Timestamp("2026-01-01"), None]}
    )  # fmt: skip
    first, second = as_rows(frame)
    assert second == {"prompt": "b", "count": 2} | dict.fromkeys(("text", "number", "list", "day"))
    assert (first["text"], first["number"], first["list"], first["count"]) == ("x", 1.5, [1], 1)
    assert type(first["count"]) is int
