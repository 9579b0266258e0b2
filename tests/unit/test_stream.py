"""Rows that are read while training goes on: their order, what is read when, going on, mistakes."""

import gzip
import importlib
import itertools
import json
import sys
import types
from importlib.machinery import ModuleSpec

import jax
import numpy as np
import pytest

from gvpo_jax.cli import main
from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.data.encoding import Encoder
from gvpo_jax.data.rows import load_rows
from gvpo_jax.data.stream import HEAD, Order, RowStream, StreamedPrompts, as_stream
from gvpo_jax.errors import UserError
from gvpo_jax.models.debug import debug_tokenizer
from gvpo_jax.trainer import Trainer
from tests.small_run import config as small
from tests.small_run import one_layer

OPTIONS = override(Config(), data__max_prompt_length=8).data
SKIP = override(Config(), data__max_prompt_length=8, data__too_long="skip").data


def prompts_of(rows, order, options=OPTIONS):
    tokenizer, stream = debug_tokenizer(), as_stream(rows)
    head = options.encode(stream.head(), tokenizer)
    return StreamedPrompts(stream, Encoder(options, tokenizer, None), head, order, 8)


def texts(prompts, numbers, size):
    batches, _ = prompts.visit(numbers, size)
    return [[prompts.rows[place]["prompt"] for place in batch] for batch in batches]


ROWS = [{"prompt": f"{i:03}"} for i in range(50)]


@pytest.mark.parametrize("buffer", [1, 7, 50, 1000])
def test_every_epoch_has_each_row_once_and_none_comes_too_early(buffer):
    prompts = prompts_of(ROWS, Order(3, buffer))
    given = [int(text) for batch in texts(prompts, range(15), 10) for text in batch]
    epochs = [given[start : start + 50] for start in (0, 50, 100)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
        # A row can't be given before it was read: with place p, p + buffer rows were read.
        assert all(row <= place + buffer for place, row in enumerate(epoch))
    assert (epochs[0] != epochs[1]) == (buffer > 1)
    other = prompts_of(ROWS, Order(4, buffer))
    same = [int(text) for batch in texts(other, range(5), 10) for text in batch] == epochs[0]
    assert same == (buffer == 1)


def test_without_a_buffer_rows_come_as_they_are():
    prompts = prompts_of(ROWS, Order(3, 0))
    assert texts(prompts, [0, 1], 3) == [["000", "001", "002"], ["003", "004", "005"]]
    assert texts(prompts, [16, 17], 3)[0] == ["048", "049", "000"]


@pytest.mark.parametrize("options", [OPTIONS, SKIP])
def test_a_batch_depends_on_its_number_alone(options):
    """Read in turn, from the middle, backwards, and by rounds of another size."""
    rows = [*ROWS, {"prompt": "far too long"}] if options is SKIP else ROWS
    order = Order(0, 8)
    in_turn = prompts_of(rows, order, options)
    read = {n: (texts(in_turn, [n], 4)[0], in_turn.token_ids.copy()) for n in range(30)}
    for numbers in ([29], [12, 13, 14], [3], [0, 1]):
        prompts = prompts_of(rows, order, options)
        for these in (numbers, [5], numbers):
            assert texts(prompts, these, 4) == [read[n][0] for n in these]
            assert prompts.token_ids == {k: v for n in these for k, v in read[n][1].items()}


def test_rows_that_are_too_long_are_left_out_and_counted_where_they_lie():
    rows = [{"prompt": "a"}, {"prompt": "much too long"}, {"prompt": "b"}, {"prompt": "c"}]
    for first in ((), ([0],), ([0, 1], [2])):
        prompts = prompts_of(rows, Order(0, 0), SKIP)
        for numbers in first:
            prompts.visit(numbers, 2)
        batches, left_out = prompts.visit([3, 4, 5], 2)
        found = [[prompts.rows[place]["prompt"] for place in batch] for batch in batches]
        assert found == [["a", "b"], ["c", "a"], ["b", "c"]]
        assert left_out == [1, 0, 1]
    with pytest.raises(UserError, match=r"row 2: the prompt is 13 tokens long, the limit is 8"):
        prompts_of(rows, Order(0, 0))


def test_no_more_is_read_than_the_buffer_holds():
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield {"prompt": str(number)}

    prompts = prompts_of(endless, Order(0, 20))
    assert len(read) == HEAD
    read.clear()
    texts(prompts, [0, 1], 5)
    assert len(read) == 10 + 20
    assert len(prompts.rows) == len(prompts.token_ids) == 10
    texts(prompts, [2], 5)
    assert len(read) == 15 + 20
    assert len(prompts.rows) == 5


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (iter(ROWS), "a list_iterator gives them once: give the function that makes it"),
        ({"prompt": ["a"]}, "takes an IterableDataset, or a function .* this is a dict"),
        ("rows.jsonl", "this is a str"),
        (3, "this is a int"),
        (lambda: 3, "<lambda> should take no arguments and give the rows one after the other"),
        (lambda split: ROWS, "<lambda> should take no arguments .*: .*missing 1 required"),
        ([], "there are no rows"),
        ([{"question": "a"}], "row 1: no column 'prompt'; the columns are question"),
        ([3], "row 1: a row is a dict"),
        ([{"prompt": "far too long"}], "row 1: the prompt is 12 tokens long"),
    ],
)
def test_what_can_not_be_streamed_is_told(dataset, said):
    with pytest.raises(UserError, match=said):
        prompts_of(dataset, Order(0, 4))


def test_a_stream_of_which_nothing_is_left_ends():
    rows = [{"prompt": "a"}]
    prompts = prompts_of(rows, Order(0, 4), SKIP)
    rows[:] = [{"prompt": "far too long"}]
    with pytest.raises(UserError, match="no prompt of the stream has at most 8 tokens"):
        prompts.visit([0], 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"train__epochs": 1}, "which train.epochs needs: .*; train.steps says how long"),
        ({"rollout__demonstrations": 1}, "which rollout.demonstrations needs"),
        ({"replay__completions": 1}, "which replay.completions needs"),
        ({"data__groups_path": "x"}, "which data.groups_path needs"),
        ({"sft__steps": 1}, "which sft.steps or sft.epochs needs"),
        ({"loss__name": "sft"}, "which loss.name=sft needs"),
    ],
)
def test_what_needs_all_rows_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        override(Config(), data__streaming=True, rollout__num_generations=4, **settings)


def test_a_buffer_without_streaming_is_refused():
    with pytest.raises(UserError, match=r"data\.shuffle_buffer is for data.streaming=true"):
        override(Config(), data__shuffle_buffer=5)


# Runs.


def reward(prompts, completions, **_):
    return [float(len(set(text))) for text in completions]


def stream(rows):
    return lambda: iter(rows)


def run(folder, rows=None, **settings):
    settings = {"data__streaming": True, "data__shuffle_buffer": 6} | settings
    trainer = Trainer(small(folder, **settings), one_layer())
    rows = [{"prompt": f"p {i}"} for i in range(20)] if rows is None else rows
    return trainer.train(stream(rows), reward, eval_dataset=[{"prompt": "x"}]), trainer


MIXED = [{"prompt": "long " * (40 * (i % 3 == 1)) + str(i)} for i in range(11)]


@pytest.mark.parametrize("more", [{}, {"rollout__lookahead": 1}])
def test_a_run_that_goes_on_is_that_of_one_session(tmp_path, more):
    """Weights, metrics, what was sampled, and what was left out; over more than one epoch."""
    settings = {"train__steps": 6, "data__too_long": "skip", "checkpoint__every": 1} | more
    whole, one = run(tmp_path / "whole", MIXED, **settings)
    run(tmp_path / "parts", MIXED, **settings, train__stop_at=2)
    run(tmp_path / "parts", MIXED, **settings, train__stop_at=3)
    parts, other = run(tmp_path / "parts", MIXED, **settings)
    jax.tree.map(np.testing.assert_array_equal, one.policy.params, other.policy.params)
    for number in range(1, 7):
        name = f"completions/step_{number:06d}.jsonl"
        drawn = (tmp_path / "whole" / name).read_text()
        assert drawn == (tmp_path / "parts" / name).read_text()
    timed = ("step_time", "tokens_per_second")
    for a, b in zip(one.history, other.history, strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }
    assert whole["left_out/training_rows"] == parts["left_out/training_rows"] >= 4
    assert sum(line.get("skipped_rows", 0) for line in one.history) >= 4


def test_other_first_rows_are_another_run(tmp_path):
    run(tmp_path, train__steps=2, train__stop_at=1)
    with pytest.raises(UserError, match="training rows are not those of this run"):
        run(tmp_path, [{"prompt": "other"}] * 20, train__steps=2)
    with pytest.raises(UserError, match=r"data\.shuffle_buffer=6"):
        run(tmp_path, train__steps=2, data__shuffle_buffer=7)


def test_a_row_that_can_not_be_used_costs_nothing_before_it(tmp_path):
    rows = [{"prompt": str(i)} for i in range(HEAD + 3)] + [{"question": "x"}]
    config = {"train__batch_size": 128, "train__steps": 4, "data__shuffle": False}
    with pytest.raises(UserError, match=rf"row {HEAD + 4}: no column 'prompt'.*the 2 updates befo"):
        run(tmp_path, rows, **config)


def test_an_iterable_dataset_of_datasets_is_streamed(tmp_path):
    datasets = importlib.import_module("datasets")
    rows = datasets.Dataset.from_list([{"prompt": f"p {i}"} for i in range(20)])
    config = small(tmp_path, data__streaming=True, train__steps=1)
    summary = Trainer(config, one_layer()).train(rows.to_iterable_dataset(), reward)
    assert summary["steps"] == 1


def written(folder, kind):
    rows = [{"question": f"q {i}", "text": str(i)} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    file = folder / f"rows.{kind}"
    if kind == "parquet":
        arrow, parquet = map(importlib.import_module, ("pyarrow", "pyarrow.parquet"))
        parquet.write_table(arrow.Table.from_pylist(rows), file, row_group_size=7)
    elif kind == "csv":
        file.write_text("question,text\n" + "".join(f"q {i},{i}\n" for i in range(40)))
    elif kind == "json":
        file.write_text(json.dumps(rows))
    else:
        file.write_bytes(gzip.compress(lines.encode()) if kind == "jsonl.gz" else lines.encode())
    return file


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "json", "parquet"])
def test_each_kind_of_file_is_streamed_as_it_is_loaded(tmp_path, kind):
    config = override(
        Config(), data__path=str(written(tmp_path, kind)), data__streaming=True,
        data__columns={"prompt": "question"},
    ).data  # fmt: skip
    streamed = list(RowStream(config.read_training))
    assert streamed == config.load_training(0)
    assert [row.place for row in streamed] == [row.place for row in config.load_training(0)]
    assert streamed[39] == {"prompt": "q 39", "text": "39"}


def test_a_file_is_read_as_far_as_it_is_needed(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "a"}\n' * 3 + "broken\n")
    config = override(Config(), data__path=str(tmp_path / "x.jsonl"), data__streaming=True).data
    rows = iter(RowStream(config.read_training))
    assert [next(rows)["prompt"] for _ in range(3)] == ["a"] * 3
    with pytest.raises(UserError, match=r"x\.jsonl:4: not a JSON object"):
        next(rows)
    with pytest.raises(UserError, match=r"x\.jsonl:4: not a JSON object"):
        load_rows(tmp_path / "x.jsonl")


def test_the_command_streams_with_filter_and_columns(tmp_path, capfd):
    (tmp_path / "own.py").write_text(
        "def even(row): return int(row['text']) % 2 == 0\n"
        "def one(prompt, completion, text): return float(len(set(completion)))\n"
    )
    file = written(tmp_path, "jsonl")
    settings = [
        f"data.path={file}", "data.columns={prompt: question}", "data.streaming=true",
        "data.shuffle=false", f"data.filter={tmp_path}/own.py:even", "mesh.fsdp=1",
        f"rewards.funcs={tmp_path}/own.py:one", "train.steps=2", "train.batch_size=4",
        "data.eval_path=null", f"run.dir={tmp_path}/run", "log.completions_every=1",
    ]  # fmt: skip
    assert main(["train", "debug", *settings]) == 0
    found = (tmp_path / "run" / "completions" / "step_000002.jsonl").read_text().splitlines()
    asked = list(dict.fromkeys(json.loads(line)["text"] for line in found))
    assert asked == ["8", "10", "12", "14"]
    capfd.readouterr()
    assert main(["train", "debug", *settings, "data.path=gone.jsonl", "run.overwrite=true"]) == 2
    assert "data.path=gone.jsonl: there is no such file" in capfd.readouterr().err
    assert main(["train", "debug", *settings, "data.columns={prompt: x}", "run.dir=r2"]) == 2
    assert "no column 'x'" in capfd.readouterr().err


def test_the_hub_is_asked_for_a_stream(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))

        def rows():
            yield {"prompt": "a"}
            raise OSError("the network\nis gone")

        return rows()

    module = types.SimpleNamespace(load_dataset=load_dataset, config=types.SimpleNamespace())
    module.__spec__ = ModuleSpec("datasets", None, origin="here")
    monkeypatch.setitem(sys.modules, "datasets", module)
    config = override(Config(), data__path="a/b", data__name="m", data__streaming=True).data
    rows = iter(RowStream(config.read_training))
    assert next(rows) == {"prompt": "a"}
    assert asked == [(("a/b", "m"), {"split": "train", "streaming": True})]
    with pytest.raises(UserError, match=r"a/b \(train\): can't be read after row 1: OSError: the"):
        next(rows)
