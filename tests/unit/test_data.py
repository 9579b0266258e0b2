"""Rows, prompts and their order."""

import datetime
import glob
import gzip
import importlib
import json
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from gvpo_jax.data.prompts import DataConfig, completion_ids
from gvpo_jax.data.reasoning_gym import TaskConfig, reasoning_gym_rows
from gvpo_jax.data.rows import as_rows, batch_indices, check_row, columns_of, load_rows
from gvpo_jax.errors import UserError
from gvpo_jax.models.debug import debug_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ADDITION = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 2,
    "max_digits": 2,
    "operators": ["+"],
    "allow_parentheses": False,
    "allow_negation": False,
}
TASKS = [
    TaskConfig("basic_arithmetic", ADDITION, "What is {expression}?", "{expression} ="),
    TaskConfig(
        "gcd",
        {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 20},
        "What is the greatest common divisor of {numbers}?",
        "gcd({numbers}) =",
    ),
]


class Letters:
    """A tokenizer whose tokens are code points and whose one special token, 0, comes first."""

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt, chat_template=None):
        from jinja2 import Environment

        assert not tokenize
        template = Environment().from_string(chat_template or self.chat_template or "")
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


def encode(rows, tokenizer: Any, **options):
    encoded = DataConfig(**{"max_prompt_length": 1000, **options}).encode(rows, tokenizer)
    return ["".join(chr(i) if i else "^" for i in ids) for ids in encoded.token_ids]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# Files


def test_jsonl_rows_come_back_in_order_with_every_column(tmp_path):
    rows = [{"prompt": "a", "solution": 3}, {"prompt": [{"role": "user", "content": "ü"}]}]
    text = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n"
    assert load_rows(write(tmp_path / "rows.jsonl", text)) == rows


def test_parquet_rows_equal_jsonl_rows(tmp_path):
    pa = importlib.import_module("pyarrow")
    import pyarrow.parquet

    rows = [{"prompt": "a", "solution": 3}, {"prompt": "b", "solution": 4}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert load_rows(tmp_path / "rows.parquet") == rows


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "a"', "JSON"),
        (b'{"prompt": "\xff"}', "JSON"),
        ("[1]", "a list"),
        ('{"question": "a", "n": 1}', "'prompt'.*question, n"),
        ('{"prompt": ""}', "empty"),
        ('{"prompt": 3}', "text or a list"),
        ('{"prompt": []}', "text or a list"),
        ('{"prompt": [{"role": "user"}]}', "text or a list"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}', "answer_prefix"),
        ('{"prompt": "a", "answer_prefix": 3}', "answer_prefix"),
    ],
)
def test_bad_line_is_named_with_its_file(tmp_path, line, problem):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "rows.jsonl", b'{"prompt": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: .*{problem}") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("empty.jsonl", "\n \n", "no rows"),
        ("rows.tsv", "prompt\n", "end in .jsonl"),
        ("broken.parquet", "no parquet", "parquet"),
    ],
)
def test_bad_file_is_named(tmp_path, name, text, problem):
    with pytest.raises(UserError, match=f"{name}.*{problem}"):
        load_rows(write(tmp_path / name, text))
    with pytest.raises(UserError, match="no such file"):
        load_rows(tmp_path / "missing.jsonl")


def test_json_and_compressed_files_hold_the_same_rows(tmp_path):
    rows = [{"prompt": "a", "solution": 3}, {"prompt": "b\u2028", "n": [1, None]}]
    array = json.dumps(rows, indent=2, ensure_ascii=False).encode()
    lines = "\n".join(map(json.dumps, rows)).encode()
    files = {
        "rows.json": array,
        "bom.JSON": b"\xef\xbb\xbf\r\n" + array,
        "lines.json": lines,  # as others write them
        "rows.json.gz": gzip.compress(array),
        "rows.jsonl.gz": gzip.compress(lines),
    }
    for name, content in files.items():
        assert load_rows(write(tmp_path / name, content)) == rows, name


def test_folders_and_patterns_are_read_in_the_order_of_their_names(tmp_path):
    """The first of ten, then the last: 2 comes after 10, as everywhere that names are sorted."""
    folder = tmp_path / "run [1]"  # no pattern: it is there
    folder.mkdir()
    for name in ("train-2.jsonl", "train-10.json.gz", "test-0.jsonl", "._train-1.jsonl"):
        content = json.dumps({"prompt": name}).encode()
        write(folder / name, gzip.compress(content) if name.endswith("gz") else content)
    write(folder / "README.md", "no rows")
    names = [row["prompt"] for row in load_rows(folder)]
    assert names == ["test-0.jsonl", "train-10.json.gz", "train-2.jsonl"]
    pattern = f"{glob.escape(str(folder))}/train-*.json*"
    assert [row["prompt"] for row in load_rows(pattern)] == names[1:]
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "x.jsonl", '{"prompt": "deep"}')
    rows = load_rows(f"{tmp_path}/**/*.jsonl")
    assert [row["prompt"] for row in rows] == ["deep", "test-0.jsonl", "train-2.jsonl"]


BROKEN = {
    "rows.json": (b'[{"prompt": "a"}, {"prompt": ""}]', "rows.json: row 2: the prompt is empty"),
    "object.json": (b'{\n"prompt": "a"}', "object.json:1: not a JSON object on one line"),
    "number.json": (b"3", "number.json: a .json file is an array of objects"),
    "torn.json": (b'[{"prompt": "a"}', "torn.json: not a JSON array of objects: Expecting"),
    "deep.json": (b"[" * 200_000, "deep.json: not a JSON array of objects: maximum recursion"),
    "flat.jsonl.gz": (b'{"prompt": "a"}', "flat.jsonl.gz: can't be read: Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt": "a"}')[:-9], "cut.jsonl.gz: can't be read: Comp"),
    "rows.jsonl.gz": (gzip.compress(b'{"prompt": "a"}\n[]'), "rows.jsonl.gz:2: a row is a JSON ob"),
    "*.csv": (b"", "*.csv: no file has a name of this pattern"),
    "a,b.json": (b"", "a,b.json: there is no such file; several files are a folder, or a pattern"),
    "[a, b]": (b"", "[a, b]: no file has a name of this pattern; several files are a folder"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_in_a_file_is_told_by_file_and_row(tmp_path, name):
    content, problem = BROKEN[name]
    if content:
        write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        load_rows(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{problem}")
    assert "\n" not in str(caught.value)


def test_a_folder_without_data_and_a_shard_without_rows(tmp_path):
    with pytest.raises(UserError, match=r"no file in this folder ends in \.jsonl, \.json"):
        load_rows(tmp_path)
    write(tmp_path / "a.jsonl", "")
    with pytest.raises(UserError, match="holds no rows"):
        load_rows(tmp_path)
    write(tmp_path / "b.jsonl", '{"prompt": "b"}')
    assert load_rows(tmp_path) == [{"prompt": "b"}]


def test_a_prompt_that_does_not_fit_is_told_by_its_file_and_line(tmp_path):
    write(tmp_path / "a.jsonl", '{"prompt": "a"}\n')
    write(tmp_path / "b.jsonl", '{"prompt": "b"}\n\n{"prompt": "long"}\n')
    with pytest.raises(UserError, match=r"b\.jsonl:3: the prompt is \d tokens long"):
        encode(load_rows(tmp_path), Letters(), max_prompt_length=3)


def test_columns_keep_the_order_of_the_rows_and_have_none_where_one_lacks_them():
    rows = [{"prompt": "p", "solution": 1, "task": "t"}, {"prompt": "q", "solution": 2}]
    assert columns_of(rows) == {"solution": [1, 2], "task": ["t", None]}


# Prompts


def test_plain_text_gets_special_tokens_and_the_answer_prefix():
    assert encode([{"prompt": "ab", "answer_prefix": " c"}], Letters()) == ["^ab c"]


def test_messages_go_through_the_template_once_without_special_tokens():
    row = {"prompt": [{"role": "user", "content": "Q"}], "answer_prefix": "A ="}
    assert encode([row], Letters(TEMPLATE)) == ["<user>Q</user><assistant>A ="]


PART = {"type": "text", "text": "Ho"}
IMAGE = {"type": "image", "image": "x.png"}


@pytest.mark.parametrize("many", [list, np.array])
def test_texts_in_parts_are_one_text(tmp_path, many):
    """As chat data has them, in a list or as pandas reads it from Parquet."""
    parts = [{"role": "user", "content": many([PART, PART])}, {"role": "user", "content": "!"}]
    (row,) = as_rows([{"prompt": many(parts)}])
    assert row["prompt"] == [
        {"role": "user", "content": "HoHo"},
        {"role": "user", "content": "!"},
    ]
    if many is list:
        (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": parts}))
        assert load_rows(tmp_path / "rows.jsonl")[0] == row


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": [IMAGE, PART]}]},
        {"prompt": "Hi", "image": "x.png"},
        {"prompt": "Hi", "images": [b"1", b"2"]},
        {"prompt": "Hi", "image": np.zeros((2, 2))},
    ],
)
def test_images_are_refused(row):
    with pytest.raises(UserError, match=r"^row 1: .*'images?', and training is on text alone"):
        check_row("row 1", row)
    check_row("row 1", {"prompt": "Hi", "image": None, "images": []})


@pytest.mark.parametrize("part", ["Hi", {"type": "text"}, {"type": "text", "text": 3}])
def test_content_that_is_no_text_is_refused(part):
    rows = as_rows([{"prompt": [{"role": "user", "content": [PART, part]}]}])
    with pytest.raises(UserError, match="must be text or a list of messages"):
        check_row("row 1", rows[0])


def test_auto_leaves_strings_alone_and_always_makes_them_a_user_message():
    rows = [{"prompt": "Q"}]
    assert encode(rows, Letters(TEMPLATE), chat_template="auto") == ["^Q"]
    assert encode(rows, Letters(TEMPLATE), chat_template="always") == ["<user>Q</user><assistant>"]
    assert encode(rows, Letters(TEMPLATE), chat_template="never") == ["^Q"]


def test_a_transformers_tokenizer_is_called_rightly():
    tokenizers = importlib.import_module("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"?": 0, "^": 1, "<user>": 2, "</user>": 3, "<assistant>": 4, "Q": 5, "A": 6}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    core.post_processor = tokenizers.processors.TemplateProcessing("^ $A", None, [("^", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": list(words)[1:5]})
    rows = [{"prompt": "Q", "answer_prefix": "A"}]

    encoded = DataConfig(max_prompt_length=9, chat_template="always").encode(rows, tokenizer)
    assert encoded.token_ids == [[2, 5, 3, 4, 6]]
    encoded = DataConfig(max_prompt_length=9).encode(rows, tokenizer)
    assert encoded.token_ids == [[1, 5, 6]]


def test_template_arguments_reach_the_template():
    tokenizer = debug_tokenizer()
    tokenizer.chat_template = (
        "{{ messages[0].content }}{% if thinking %}<think>{% endif %}{{ (level or {}).much }}"
    )

    def text(**arguments):
        options = DataConfig(chat_template="always", template_arguments=arguments)
        return tokenizer.decode(options.encode([{"prompt": "hi"}], tokenizer).token_ids[0])

    assert text() == "hi"
    assert text(thinking=True) == "hi<think>"
    assert text(thinking=False, level={"much": 3}) == "hi3"
    with pytest.raises(UserError, match="template_arguments: tokenize is not the template's"):
        text(tokenize=True)
    with pytest.raises(UserError, match="row 1: template_arguments needs the chat template"):
        DataConfig(template_arguments={"a": 1}).encode([{"prompt": "hi"}], tokenizer)


class Words:
    """`^` begins texts, `$` ends them, and every other sign is a token; 3 tokens are known."""

    bos_token_id, eos_token_id, eos_token = 1, 2, "$"
    chat_template = "{{ messages[0].content }}"

    def __call__(self, text, add_special_tokens=True):
        ids = [{"^": 1, "$": 2}.get(sign, ord(sign)) for sign in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    def convert_ids_to_tokens(self, i):
        return chr(i)

    def decode(self, ids, skip_special_tokens):
        return "".join(map(chr, ids))

    apply_chat_template = Letters.apply_chat_template


def test_a_prompt_has_one_bos_token_and_no_end_token_of_the_tokenizers():
    words: Any = Words()
    rows = [{"prompt": prompt} for prompt in ("a", "^a", "^^a", "a$")]
    ids = DataConfig().encode(rows, words).token_ids
    assert ids == [[1, 97], [1, 97], [1, 1, 97], [1, 97, 2, 2]]


@pytest.mark.parametrize("options", [{}, {"chat_template": "always"}])
def test_a_token_that_the_embedding_has_no_row_for_is_refused_with_its_row(options):
    words: Any = Words()
    rows = [{"prompt": "ab"}, {"prompt": "abc"}]
    assert DataConfig(**options).encode(rows, words, 100).skipped == 0  # c is 99
    with pytest.raises(UserError, match=r"row 2: token 'c' has the id 99, .* only 99 rows"):
        DataConfig(**options).encode(rows, words, 99)
    with pytest.raises(UserError, match=r"token 'c' has the id 99, .* only 99 rows"):
        completion_ids("abc", words, (), 99)


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a", [97, 2]),
        ("a$", [97, 2]),
        ("a$\n", [97, 2]),
        ("a ", [97, 32, 2]),
        ("a#", [97, 35]),
        ("$a", [2, 97, 2]),
        ("", [2]),
        ("\n", [10, 2]),
    ],
)
def test_a_completion_has_one_end_token(text, ids):
    words: Any = Words()
    assert completion_ids(text, words, [35]) == ids


def test_a_chat_template_that_ignores_the_messages_is_refused():
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "Q"}]}]
    for template in ("Say something.", "{% for m in messages %}<{{ m.role }}>{% endfor %}"):
        with pytest.raises(UserError, match="row 2: the chat template writes the same text what"):
            encode(rows, Letters(), template=template)
    assert encode(rows, Letters(), template="{{ messages[-1].content[0] }}") == ["^a", "Q"]


def test_the_date_in_a_chat_template_is_the_one_given_and_not_in_the_fingerprint():
    template = "Today: {{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    tokenizer = debug_tokenizer()

    def encoded(content, **options):
        row = {"prompt": [{"role": "user", "content": content}]}
        return DataConfig(template=template, **options).encode([row], tokenizer)

    first, later = (encoded("hi", template_date=day) for day in ("2026-07-31", "2027-01-02"))
    assert tokenizer.decode(first.token_ids[0]) == "Today: 31 Jul 2026 hi"
    assert tokenizer.decode(later.token_ids[0]) == "Today: 02 Jan 2027 hi"
    today = datetime.date.today()
    texts = [f"Today: {day:%d %b %Y} hi" for day in (today, datetime.date.today())]
    assert tokenizer.decode(encoded("hi").token_ids[0]) in texts
    assert first.fingerprint() == later.fingerprint() == encoded("hi").fingerprint()
    assert first.fingerprint() != encoded("ho", template_date="2026-07-31").fingerprint()
    with pytest.raises(UserError, match=r"data.template_date=31.7.2026 is no day"):
        encoded("hi", template_date="31.7.2026")


def test_a_given_template_replaces_the_tokenizers_own():
    own = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    for tokenizer in (Letters(TEMPLATE), Letters()):
        assert encode([{"prompt": "Q"}], tokenizer, chat_template="always", template=own) == ["[Q]"]


def test_system_prompt_yields_to_the_rows_own():
    user = {"role": "user", "content": "Q"}
    rows = [{"prompt": [user]}, {"prompt": [{"role": "system", "content": "own"}, user]}]
    assert encode(rows, Letters(TEMPLATE), system_prompt="ours") == [
        "<system>ours</system><user>Q</user><assistant>",
        "<system>own</system><user>Q</user><assistant>",
    ]
    assert len(rows[0]["prompt"]) == 1  # the caller's rows are untouched


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "options", "problem"),
    [
        ([{"role": "user", "content": "Q"}], Letters(), {}, "row 1.*no chat template"),
        ("Q", Letters(), {"chat_template": "always"}, "row 1.*no chat template"),
        (
            [{"role": "user", "content": "Q"}],
            Letters(TEMPLATE),
            {"chat_template": "never"},
            "row 1.*list of messages",
        ),
        ("Q", Letters(TEMPLATE), {"system_prompt": "S"}, "row 1.*chat_template=always"),
        (
            "Q",
            Letters("{% for %}"),
            {"chat_template": "always"},
            "row 1: the chat template failed",
        ),
    ],
)
def test_prompt_that_cannot_be_templated(prompt, tokenizer, options, problem):
    with pytest.raises(UserError, match=problem):
        encode([{"prompt": prompt}], tokenizer, **options)


def test_too_long_prompts_raise_or_are_skipped_and_counted():
    letters: Any = Letters()
    rows = [{"prompt": "abc"}, {"prompt": "abcd"}, {"prompt": "ab", "answer_prefix": "xx"}]
    with pytest.raises(UserError, match=r"row 2: the prompt is 5 tokens long.* 4"):
        DataConfig(max_prompt_length=4).encode(rows, letters)
    encoded = DataConfig(max_prompt_length=4, too_long="skip").encode(rows, letters)
    assert encoded.rows == rows[:1]
    assert [len(ids) for ids in encoded.token_ids] == [4]
    assert encoded.skipped == 2
    with pytest.raises(UserError, match="no prompt is left: all 3"):
        DataConfig(max_prompt_length=3, too_long="skip").encode(rows, letters)


# Order


@pytest.mark.parametrize(("n_rows", "batch_size"), [(7, 3), (12, 4), (5, 8), (1, 1)])
def test_every_epoch_visits_each_row_once(n_rows, batch_size):
    epochs = 6
    steps = -(-epochs * n_rows // batch_size)
    visits = np.concatenate([batch_indices(n_rows, batch_size, step, 3) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(visits[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


def test_order_depends_on_seed_and_epoch_only():
    first = batch_indices(50, 50, 0, 0)
    np.testing.assert_array_equal(first, batch_indices(50, 50, 0, 0))
    np.testing.assert_array_equal(first[20:30], batch_indices(50, 10, 2, 0))  # any batch size
    assert not np.array_equal(first, np.arange(50))
    assert not np.array_equal(first, batch_indices(50, 50, 1, 0))
    assert not np.array_equal(first, batch_indices(50, 50, 0, 1))
    # Fixed for ever: a resumed run must see the order that the interrupted one saw.
    assert batch_indices(8, 8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_rows_in_their_order_epoch_after_epoch():
    batches = [batch_indices(5, 3, step, 7, shuffle=False).tolist() for step in range(4)]
    assert batches == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


def test_impossible_batches_raise():
    for arguments in ((0, 1, 0, 0), (1, 0, 0, 0), (1, 1, -1, 0), (1, 1, 0, -1)):
        with pytest.raises(ValueError, match="need n_rows"):
            batch_indices(*arguments)


# reasoning-gym


def test_rows_say_what_the_templates_say_and_solve_to_the_solution():
    importlib.import_module("reasoning_gym")
    import math
    import re

    for row in reasoning_gym_rows(TASKS, size=40, seed=0, split="train"):
        a, b = map(int, re.findall(r"\d+", row["prompt"]))
        if row["task"] == "gcd":
            assert row["prompt"] == f"What is the greatest common divisor of {a}, {b}?"
            assert row["answer_prefix"] == f"gcd({a}, {b}) ="
            assert row["solution"] == str(math.gcd(a, b))
        else:
            assert row["prompt"] == f"What is {a} + {b}?"
            assert row["answer_prefix"] == f"{a} + {b} ="
            assert row["solution"] == str(a + b)
        assert json.loads(row["entry"])["answer"] == row["solution"]


def test_default_question_is_the_tasks_own():
    importlib.import_module("reasoning_gym")
    (row,) = reasoning_gym_rows([TaskConfig("gcd")], size=1, seed=0, split="train")
    assert row["prompt"] == json.loads(row["entry"])["question"]
    assert row["answer_prefix"] == ""


def test_splits_share_no_question_even_with_other_seeds_sizes_and_tasks():
    importlib.import_module("reasoning_gym")

    # The two tasks can ask the same questions. 3 + 4 and 4 + 3 are one question here.
    arithmetic = {**ADDITION, "min_digits": 1, "max_digits": 1}
    chain = {key: arithmetic[key] for key in ADDITION if key.endswith(("terms", "digits"))}
    one = TaskConfig("basic_arithmetic", arithmetic, "Add {expression}", "{expression}")
    other = TaskConfig("chain_sum", chain, "add  {expression}", "{expression}")

    def pairs(split, seed, size):
        tasks = {0: [one], 1: [other], 2: [one, other]}[seed]
        rows = reasoning_gym_rows(tasks, size=size, seed=seed, split=split)
        sums = [row["answer_prefix"] for row in rows if "-" not in row["answer_prefix"]]
        return [tuple(sorted(text.split(" + "))) for text in sums]

    evals = {pair for seed in (0, 1) for pair in pairs("eval", seed, 12)}
    trains = {pair for seed in (0, 1, 2) for pair in pairs("train", seed, 30)}
    assert len(evals) > 5
    assert len(trains) > 15
    assert not evals & trains


def test_rows_are_deterministic_distinct_and_in_the_shares_asked_for():
    importlib.import_module("reasoning_gym")
    tasks = [TASKS[0], TaskConfig("gcd", TASKS[1].settings, TASKS[1].question, weight=3.0)]
    rows = reasoning_gym_rows(tasks, size=40, seed=0, split="train")
    assert rows == reasoning_gym_rows(tasks, size=40, seed=0, split="train")
    assert rows != reasoning_gym_rows(tasks, size=40, seed=1, split="train")
    assert Counter(row["task"] for row in rows) == {"basic_arithmetic": 10, "gcd": 30}
    assert Counter(row["task"] for row in rows[:8]) == {"basic_arithmetic": 2, "gcd": 6}
    assert len({row["prompt"] for row in rows}) == 40


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        (TaskConfig("gdc"), "did you mean 'gcd'"),
        (TaskConfig("gcd", {"max": 3}), "'gcd': bad settings.*max"),
        (TaskConfig("gcd", {"min_value": 0}), "'gcd': bad settings.*positive"),
        (TaskConfig("gcd", {"seed": 3}), "'seed' can't be a setting"),
        (TaskConfig("gcd", {}, "{nums}"), "names a field.*numbers"),
        (TaskConfig("gcd", {}, "{"), "no format string"),
        (TaskConfig("gcd", {}, "gcd?"), "same for every item"),
        (TaskConfig("gcd", weight=0.0), "weights must be positive"),
        (TaskConfig("gcd", {"min_value": 1, "max_value": 3}), "'gcd' has about [0-9] different"),
        (TaskConfig("rearc"), "can't be scored from saved rows"),
    ],
)
def test_bad_task_is_named(task, problem):
    importlib.import_module("reasoning_gym")
    with pytest.raises(UserError, match=problem):
        reasoning_gym_rows([task], size=50, seed=0, split="train")


def test_importing_loads_no_optional_package():
    code = (
        "import sys, gvpo_jax.data.prompts, gvpo_jax.data.reasoning_gym, gvpo_jax.rewards, "
        "gvpo_jax.rewards.numbers, gvpo_jax.rewards.debug, gvpo_jax.rewards.math, "
        "gvpo_jax.rewards.reasoning_gym\n"
        "heavy = {'reasoning_gym', 'math_verify', 'sympy', 'pyarrow', 'transformers'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
