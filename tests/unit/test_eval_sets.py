"""Evaluation sets: where their rows come from, how each is sampled, and what is told of each."""

import json
import sys
import types
from importlib.machinery import ModuleSpec

import pytest

from gvpo_jax.cli import main
from gvpo_jax.collect.evaluate import EvalConfig, _summary
from gvpo_jax.config import Config, check_extras
from gvpo_jax.config_file import check_trusted, difference, load_config, override, to_yaml
from gvpo_jax.data.eval_sets import EvalSet, load_eval_sets
from gvpo_jax.errors import UserError
from gvpo_jax.rollout import InProcessEngine
from gvpo_jax.rundir.formats import score_names, scores_text
from gvpo_jax.trainer import Trainer
from tests.small_run import config as small
from tests.small_run import one_layer

# What the hub has under the names of configs/eval/math.yaml, as other people's code reads it.
HUB = {
    ("HuggingFaceH4/aime_2024", None, "train"): [
        {"id": 60, "problem": "AIME a", "solution": "long", "answer": "204", "year": "2024"}
    ],
    ("math-ai/aime25", None, "test"): [{"problem": "AIME b", "answer": "70", "id": "0"}],
    ("math-ai/amc23", None, "test"): [{"id": 0, "question": "AMC", "answer": "27"}],
    ("HuggingFaceH4/MATH-500", None, "test"): [
        {"problem": "MATH", "solution": "long", "answer": r"\frac{1}{2}", "level": 2}
    ],
    ("math-ai/minervamath", None, "test"): [{"question": "Minerva", "answer": "1e33"}],
    ("math-ai/olympiadbench", None, "test"): [
        {"question": "Olympiad", "solution": ["long"], "final_answer": ["$1$", "2"]}
    ],
    ("openai/gsm8k", "main", "test"): [{"question": "GSM8K", "answer": "so\n#### 1,234"}],
}


@pytest.fixture
def asked(monkeypatch):
    """In place of `datasets`: what it is asked for; it has what `HUB` has."""
    found = []

    def load_dataset(path, name=None, *, split):
        found.append((path, name, split))
        return HUB[found[-1]]

    module = types.SimpleNamespace(load_dataset=load_dataset, config=types.SimpleNamespace())
    module.__spec__ = ModuleSpec("datasets", None, origin="here")
    monkeypatch.setitem(sys.modules, "datasets", module)
    return found


def test_the_recipe_asks_for_what_the_hub_has(asked):
    rows = load_eval_sets(load_config("eval/math").eval.sets)
    assert asked == list(HUB)
    assert [(row["task"], row["prompt"], row["solution"]) for row in rows] == [
        ("aime2024", "AIME a", "204"), ("aime2025", "AIME b", "70"), ("amc2023", "AMC", "27"),
        ("math500", "MATH", r"\frac{1}{2}"), ("minerva", "Minerva", "1e33"),
        ("olympiadbench", "Olympiad", ["$1$", "2"]), ("gsm8k", "GSM8K", "1,234"),
    ]  # fmt: skip


SMALL = (
    "data.max_prompt_length=256", "rollout.max_completion_length=4", "mesh.fsdp=1",
    "eval.batch_size=4", "model.name=debug", "data.template={{ messages[1].content }}",
)  # fmt: skip


@pytest.mark.parametrize("settings", [(), ("eval.sets.0.num_generations=2",)])
def test_each_set_is_sampled_as_it_says_and_has_a_score(
    asked, tmp_path, monkeypatch, capsys, settings
):
    drawn = {}
    generate = InProcessEngine.generate

    def spy(self, params, token_ids, visits, **options):
        for visit in visits:
            drawn[visit] = options["num_generations"], options["sampling"].temperature
        return generate(self, params, token_ids, visits, **options)

    monkeypatch.setattr(InProcessEngine, "generate", spy)
    assert main(["eval", "eval/math", *SMALL, f"run.dir={tmp_path}", *settings]) == 0
    first = 2 if settings else 32
    assert drawn == {
        0: (first, 1), 1: (32, 1), 2: (32, 1), **{place: (1, 0) for place in range(3, 7)}
    }  # fmt: skip
    metrics = json.loads(capsys.readouterr().out)
    names = [each.name for each in load_config("eval/math").eval.sets]
    assert [name for name in metrics if name.startswith("eval/accuracy/")] == [
        f"eval/accuracy/{name}" for name in names
    ]
    assert {"eval/mean_of_sets", "eval/pass@1/gsm8k", "eval/pass@32/amc2023"} <= set(metrics)
    assert ("eval/pass@32/aime2024" in metrics) == (not settings)
    assert "eval/pass@32" not in metrics  # not all prompts have so many completions
    assert "eval/maj@32/amc2023" in metrics
    assert not any("maj@1" in name for name in metrics)


def test_a_run_is_judged_by_sets_that_it_was_not_trained_with(asked, tmp_path, capsys):
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"question": f"q {i}", "gold": str(i)}) + "\n" for i in range(3))
    )
    (tmp_path / "own.yaml").write_text(
        "rewards: {funcs: [gvpo_jax.rewards.numbers:exact_number], weights: []}\n"
        "rollout: {max_completion_length: 5}\n"
        "eval: {sets: [{name: own, path: own.jsonl, size: 2,\n"
        "  columns: {prompt: question, solution: gold}}]}\n"
    )
    run = str(tmp_path / "run")
    assert main(["train", "debug", f"run.dir={run}", "train.steps=1", "mesh.fsdp=1"]) == 0
    capsys.readouterr()
    assert main(["eval", run, "--sets", str(tmp_path / "own.yaml"), "eval.num_generations=3"]) == 0
    assert "eval/accuracy/own" in json.loads(capsys.readouterr().out)
    lines = (tmp_path / "run" / "eval" / "latest.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [(row["prompt"], row["solution"]) for row in told] == [("q 0", "0")] * 3 + [
        ("q 1", "1")
    ] * 3


def test_the_functions_of_a_run_that_came_from_elsewhere_are_not_asked_for_by_sets(tmp_path):
    """Those that the sets name are the user's own, and take their place."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "evil.py").write_text("def evil(prompt, completion): return 1.0")
    config = override(Config(), rewards__funcs=[f"{tmp_path}/evil.py:evil"])
    (run / "config.yaml").write_text(to_yaml(config))
    sets = tmp_path / "own.yaml"
    for text, refused in (("", True), ("rewards: {funcs: ['os:getcwd']}\n", False)):
        sets.write_text(f"{text}eval: {{sets: [{{name: a, path: a/b}}]}}")
        if refused:
            with pytest.raises(UserError, match=r"evil\.py:evil, which was not trained with here"):
                check_trusted(run, sets=sets)
        else:
            check_trusted(run, sets=sets)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {name: debug}", "model is not about evaluation: leave it out"),
        ("eval: {every: 3}", r"has no eval\.sets: name some"),
        ("eval: {sets: [{nam: x}]}", r"unknown setting eval\.sets\.0\.nam: did you mean 'name'"),
    ],
)
def test_what_is_no_config_of_sets_is_told(tmp_path, text, said):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_config("debug", sets=tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ([{"path": "x"}], r"eval\.sets\.0\.name='': give a short name"),
        ([{"name": "a b", "path": "x"}], r"eval\.sets\.0\.name='a b': give a short name"),
        ([{"name": "a", "path": "x"}] * 2, r"eval\.sets\.1\.name=a: an earlier set has that"),
        ([{"name": "a"}], r"eval\.sets\.0 \(a\) has no path"),
        ([{"name": "a", "path": "x", "size": 0}], r"eval\.sets\.0\.size must be at least 1"),
        ([{"name": "a", "path": "x", "temperature": -1}], r"eval\.sets\.0\.temperature must be at"),
        (
            [{"name": "a", "path": "x", "answer_pattern": "("}],
            r"eval\.sets\.0\.answer_pattern=\( is no regular expression",
        ),
    ],
)
def test_a_set_that_is_none_is_refused(sets, said):
    with pytest.raises(UserError, match=said):
        override(Config(), eval__sets=sets)


ROW = {"question": "2 + 2?", "answer": "4"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"columns": {"prompt": "problem"}}, r"no column 'problem', which eval\.sets\.0\.columns n"
         ".*are question, answer"),
        ({"columns": {"prompt": "question", "solution": "answer"}, "answer_pattern": "#### (.+)"},
         r"eval\.sets\.0\.answer_pattern=#### \(\.\+\) finds nothing in 'solution'"),
        ({"path": "gone.jsonl"}, r"eval\.sets\.0\.path=gone\.jsonl: there is no such file"),
    ],
)  # fmt: skip
def test_rows_that_can_not_be_used_name_the_set(tmp_path, given, said):
    (tmp_path / "x.jsonl").write_text(json.dumps(ROW))
    with pytest.raises(UserError, match=said):
        load_eval_sets([EvalSet(**{"name": "a", "path": str(tmp_path / "x.jsonl")} | given)])


def test_a_split_or_a_part_that_is_not_there_names_the_set(monkeypatch):
    module = types.SimpleNamespace(config=types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "datasets", module)
    for text, name in (('Unknown split "x"', "split"), ("Config name is missing", "subset")):

        def fails(*_, text=text, **__):
            raise ValueError(text)

        module.load_dataset = fails
        with pytest.raises(UserError, match=rf"a/b: eval\.sets\.0\.{name} says which"):
            load_eval_sets([EvalSet(name="a", path="a/b")])


def test_sets_without_a_checker_are_told_before_a_model_is_loaded(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("eval: {sets: [{name: a, path: openai/gsm8k}]}")
    assert main(["eval", str(tmp_path / "c.yaml")]) == 2
    assert (
        "eval.sets: nothing says which answers are right; name a function"
        in capsys.readouterr().err
    )


def test_a_checker_alone_judges(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "2 + 2?", "solution": "4"}) * 1)
    (tmp_path / "c.yaml").write_text(
        "eval: {checker: gvpo_jax.rewards.numbers:exact_number, batch_size: 8,\n"
        "  sets: [{name: a, path: x.jsonl}]}\nmesh: {fsdp: 1}\n"
    )
    assert main(["eval", str(tmp_path / "c.yaml"), "rollout.max_completion_length=4"]) == 0
    assert "eval/accuracy" in json.loads(capsys.readouterr().out)


def test_sets_stay_through_a_config_file_and_may_lie_elsewhere(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "c.yaml").write_text("eval: {sets: [{name: a, path: x.jsonl, temperature: 0}]}")
    config = load_config(tmp_path / "c.yaml")
    assert config.eval.sets[0].path == str(tmp_path / "x.jsonl")
    (tmp_path / "d.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "d.yaml") == config
    moved = override(config, eval__sets=[EvalSet(name="a", path="y.jsonl", temperature=0)])
    assert difference(config, moved) == []
    other = override(config, eval__sets=[EvalSet(name="a", path="y.jsonl", temperature=1)])
    assert difference(config, other) == ["eval.sets"]


def test_the_extra_of_a_set_on_the_hub_is_asked_for(monkeypatch):
    config = override(Config(), eval__sets=[{"name": "a", "path": "openai/gsm8k"}])
    check_extras(config)
    monkeypatch.setattr("gvpo_jax.config.has_extra", lambda extra: extra != "hub")
    with pytest.raises(UserError, match=r"openai/gsm8k is neither .*gvpo-jax\[hub\]"):
        check_extras(config)


def test_pass_at_may_be_as_many_as_a_set_samples():
    sets = [{"name": "a", "path": "x", "num_generations": 8}]
    override(Config(), eval__num_generations=1, eval__sets=sets, eval__pass_at=[8])
    with pytest.raises(UserError, match=r"eval\.pass_at has 9: .* which is 8"):
        override(Config(), eval__num_generations=1, eval__sets=sets, eval__pass_at=[9])


def test_the_mean_of_sets_counts_each_set_once():
    rights = {"a": [[1], [1], [0], [0]], "b": [[1, 0, 0, 0]]}
    records = [
        {"task": name, "group": f"{name}{g}", "correct": bool(x), "reward": float(x),
         "completion": f"#### {x}"}
        for name, prompts in rights.items()
        for g, marks in enumerate(prompts)
        for x in marks
    ]  # fmt: skip
    sets = [EvalSet(name=name, path="x") for name in rights]
    options = EvalConfig(sets=sets, pass_at=[1, 2], answer_pattern="#### (.)")
    metrics = _summary(records, options)
    assert metrics["eval/accuracy"] == pytest.approx((1 + 1 + 0 + 0 + 0.25) / 5)
    assert metrics["eval/accuracy/a"] == pytest.approx(0.5)
    assert metrics["eval/mean_of_sets"] == pytest.approx((0.5 + 0.25) / 2)
    assert metrics["eval/pass@2/b"] == pytest.approx(0.5)
    assert metrics["eval/maj@4/b"] == 0
    assert not {"eval/pass@2", "eval/pass@2/a", "eval/maj@1/a", "eval/maj@4"} & set(metrics)


def test_the_summary_and_the_screen_tell_what_was_asked_for(tmp_path, capfd):
    """pass@k and maj@k, before and after, with their intervals; and each set."""
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"prompt": x}) + "\n" for x in "abc"))
    file = tmp_path / "own.py"
    file.write_text("def even(prompt, completion): return float(len(completion) % 2 == 0)")
    config = small(
        tmp_path / "run", train__steps=1, eval__pass_at=[2], eval__answer_pattern="(.)",
        eval__success_reward=None,
    )  # fmt: skip
    rows = [{"prompt": x, "task": name} for name in ("u", "v") for x in "abc"]
    sets = [EvalSet(name=name, path="x", num_generations=4) for name in ("u", "v")]
    for folder, more in (("plain", {}), ("sets", {"eval__sets": sets})):
        c = override(config, run__dir=str(tmp_path / folder), **more)
        trainer = Trainer(c, one_layer())
        summary = trainer.train([{"prompt": "ab"}] * 2, f"{file}:even", eval_dataset=rows)
        assert json.loads((tmp_path / folder / "summary.json").read_text()) == summary
        logged = [line for line in trainer.history if "eval/accuracy" in line]
        for when, line in zip(("before", "after"), logged, strict=True):
            for name in ("eval/pass@2", "eval/maj@4"):
                assert summary[f"{name}_{when}"] == line[name]
                assert summary[f"{name}_{when}_low"] == line[f"{name}_low"]
            told = {name for name in summary if name.endswith(f"/u_{when}")}
            of_sets = {f"eval/{x}/u_{when}" for x in ("accuracy", "pass@2", "maj@4")}
            assert told == (of_sets if more else set())
            assert (f"eval/mean_of_sets_{when}" in summary) == bool(more)
    said = capfd.readouterr()
    assert said.out.count("; pass@2 ") + said.err.count("; pass@2 ") >= 4


def test_scores_in_one_line():
    before = {"eval/accuracy": 0.25, "eval/reward": 0.3, "eval/pass@8": 0.5, "eval/pass@8_low": 0.4}
    before["eval/pass@8_high"] = 0.6
    after = before | {"eval/accuracy": 0.5, "eval/pass@8/a": 0.1}
    text = "accuracy 25.0% -> 50.0%; pass@8 50.0% [40.0%, 60.0%] -> 50.0% [40.0%, 60.0%]"
    assert scores_text([before, after]) == text
    assert score_names([before, {"eval/reward": 1}])[0] == "eval/reward"
    assert scores_text([{"eval/reward": 1.5}]) == "reward 1.5"
