import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from gvpo_jax.config import Config
from gvpo_jax.config_file import difference, load_config, override, to_yaml
from gvpo_jax.config_trl import OTHER_NAMES, TRL_NAMES
from gvpo_jax.data.rows import load_rows
from gvpo_jax.errors import UserError
from gvpo_jax.models.export import new_folder
from gvpo_jax.settings import all_settings
from gvpo_jax.trainer import Trainer

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "c.yaml").write_text(text)
        return tmp_path / "c.yaml"

    return write


def refused(path: Path | str, *overrides: str) -> str:
    """The message of a refused config, which is one line."""
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_empty_file_is_the_defaults(write):
    config = load_config(write(""))
    assert config == Config()
    assert (config.loss.beta, config.rollout.num_generations) == (0.1, 4)
    assert (config.reference.name, config.model.name) == ("initial", "debug")
    assert config.optimizer.max_grad_norm == 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.loss.beta = 0.2  # type: ignore[misc]


def test_overrides_go_over_yaml_over_defaults(write):
    file = write("loss: {beta: 0.2}\ntrain: {steps: 7, batch_size: 3}\nrewards: {funcs: [a:b]}")
    given = ["train.steps=9", "rewards.funcs=[c:d, e:f]", "optimizer.max_grad_norm=null"]
    config = load_config(file, given)
    assert (config.loss.beta, config.train.steps, config.train.batch_size) == (0.2, 9, 3)
    assert config.rewards.funcs == ["c:d", "e:f"]
    assert config.optimizer.max_grad_norm is None
    assert config.train.num_iterations == Config().train.num_iterations


def test_tasks_and_their_settings(write):
    file = write("data: {tasks: [{name: gcd, weight: 2, settings: {min_value: 1, ops: [+, -]}}]}")
    (task,) = load_config(file).data.tasks
    assert (task.name, task.weight, task.question) == ("gcd", 2.0, "")
    assert task.settings == {"min_value": 1, "ops": ["+", "-"]}
    assert type(task.settings) is dict
    assert type(task.settings["ops"]) is list


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("los: {beta: 1}", [], "c.yaml: unknown setting los: did you mean 'loss'?"),
        ("loss: {bata: 1}", [], "c.yaml: unknown setting loss.bata: did you mean 'beta'?"),
        ("", ["rollout.num_generation=8"], "rollout.num_generation: did you mean 'num_generatio"),
        ("data: {tasks: [{nam: gcd}]}", [], "data.tasks.0.nam: did you mean 'name'?"),
        ("", ["epochs=3"], "unknown setting epochs: write train.epochs; a config has run, model,"),
        ("", ["train.loops=3"], "unknown setting train.loops: train has steps, epochs"),
        ("", ["train.steps.x=3"], "train.steps must be a whole number"),
    ],
)
def test_a_misspelt_key_is_told_its_neighbour(write, text, given, message):
    assert message in refused(write(text), *given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("loss.beta=x", "loss.beta must be a number, got 'x'"),
        ("train.steps=1.5", "train.steps must be a whole number, got '1.5'"),
        ("train.batch_size=", "train.batch_size must be a whole number, got ''"),
        ("train.steps=inf", "train.steps must be a whole number, got 'inf'"),
        ("train.packing=maybe", "train.packing must be true or false, got 'maybe'"),
        ("optimizer.name=adamm", "must be one of adamw, adafactor, sgd, got 'adamm'; did you mean"),
        ("rewards.weights=1;2", "rewards.weights.0 must be a number, got '1;2'"),
        ("rewards.weights=[1, x]", "rewards.weights.1 must be a number, got 'x'"),
        ("data.tasks=gcd", "data.tasks.0 is a section, a mapping like {name: value}; got 'gcd'"),
        ("data.tasks.0.weight=2", "data.tasks must be a list: put a dash before each entry"),
        ("loss=3", "loss is a section, a mapping like {name: value}; got '3'"),
        ("loss.beta", "'loss.beta' is not an override: write key=value"),
        ("=3", "'=3' is not an override: write key=value"),
        ("rollout.stop_token_ids=[1", "rollout.stop_token_ids: '[1' is no list or mapping"),
        ("run.dir=", "run.dir is empty: give the path of a folder"),
    ],
)
def test_a_wrong_type_names_its_key(write, given, message):
    assert message in refused(write(""), given)


@pytest.mark.parametrize(
    ("given", "quoted"),
    [
        (["data.columns={prompt:", "question}"], "'data.columns={prompt: question}'"),
        (["loss.beta=1", "rewards.funcs=[a.py:f,", "b.py:g]"], "'rewards.funcs=[a.py:f, b.py:g]'"),
        (["data.columns={a:", "b,", "c:", "d}", "x=1"], "'data.columns={a: b, c: d}'"),
    ],
)
def test_what_the_shell_took_apart_is_told_with_its_quotes(write, given, quoted):
    said = refused(write(""), *given)
    assert "the shell took the value apart at its blanks; put it in quotes: " in said
    assert quoted in said


TEXTS = [
    "Put the answer after ####", "Answer: yes or no", "{think} first", "[INST] be brief", "*bold*",
    "%d", "@user", "line one\nline two", "- be brief", "yes", "1.0", "007", "1e3", "'quoted' words",
    "Use ${answer} as a mark", "${oc.env:HOME}", "$x$ and $\\boxed{}$", " spaces ", "null and void",
    "it's 5:30", "a, b", "`code`", "| table |", "> quote", "& more", "!important", "? why", "t\tt",
    "\u00fc\u2028x", "a=b=c", "2026-07-01", "12:30", "0x10", "\x1b[31m", "\ud83d", "",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_was_typed(write, text):
    given = load_config(write(""), [f"data.system_prompt={text}"])
    assert given.data.system_prompt == text
    assert override(Config(), data__system_prompt=text) == given
    assert load_config(write(to_yaml(given))) == given
    tasks = override(Config(), data__tasks=[{"name": "a", "settings": {"x": text, "y": [text]}}])
    assert load_config(write(to_yaml(tasks))) == tasks
    if text.strip() == text != "":
        run = load_config(write(""), [f"run.dir={text}"])
        assert run.run.dir == text
        assert load_config(write(to_yaml(run))).run.dir == text


def test_unquoted_texts_in_yaml_stay_texts_too(write):
    file = write("run: {dir: 007}\nmodel: {name: on}\ndata: {system_prompt: '${HOME} 1'}")
    config = load_config(file, ["data.template={{ messages }} # all"])
    assert (config.run.dir, config.model.name) == ("007", "on")
    assert config.data.system_prompt == "${HOME} 1"
    assert config.data.template == "{{ messages }} # all"


@pytest.mark.parametrize(
    ("typed", "number"),
    [("10", 10), ("010", 10), ("1_000", 1000), ("1e3", 1000), ("10.0", 10), (" 10 ", 10)],
)
def test_whole_numbers_are_decimal(write, typed, number):
    assert load_config(write(f"train: {{steps: {typed}}}")).train.steps == number
    assert load_config(write(""), [f"train.steps={typed}"]).train.steps == number
    assert load_config(write(""), [f" train.steps ={typed}"]).train.steps == number


def test_numbers_of_other_libraries_and_single_entries_are_taken():
    config = override(
        Config(),
        train__steps=np.int64(7),
        loss__beta=jnp.float32(0.5),
        rewards__weights=np.array([1.0, 2.0]),
        rollout__stop_token_ids=3,
        run__dir=Path("runs") / "x",
        train__packing=np.bool_(False),
    )
    assert (config.train.steps, config.loss.beta, config.run.dir) == (7, 0.5, "runs/x")
    assert (config.rewards.weights, config.rollout.stop_token_ids) == ([1.0, 2.0], [3])
    assert config.train.packing is False
    assert type(config.train.steps) is int
    for wrong in ({"train__steps": True}, {"run__dir": 3}, {"train__packing": 2}):
        with pytest.raises(UserError, match="must be"):
            override(config, **wrong)


def test_values_without_a_type_of_their_own_are_what_yaml_says(write):
    text = "{a: 1, b: 1e3, c: yes, d: null, e: '1', f: [off, x], g: {h: 0.5}, i: 007}"
    (task,) = load_config(write(f"data: {{tasks: [{{name: t, settings: {text}}}]}}")).data.tasks
    expected = {"a": 1, "b": 1000.0, "c": True, "d": None, "e": "1", "f": [False, "x"]}
    assert task.settings == expected | {"g": {"h": 0.5}, "i": 7}


def test_entries_of_lists_are_reached_by_their_place(write):
    file = write("data: {tasks: [{name: a}, {name: b}]}\nrewards: {funcs: [a:b, c:d]}")
    config = load_config(file, ["data.tasks.1.weight=2", "rewards.funcs.0=x:y"])
    assert [task.weight for task in config.data.tasks] == [1.0, 2.0]
    assert config.rewards.funcs == ["x:y", "c:d"]
    assert "data.tasks has 2 entries" in refused(file, "data.tasks.2.weight=2")
    assert "data.tasks has 2 entries" in refused(file, "data.tasks.x=2")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("loss.beta=0", "loss.beta must be > 0, got 0.0"),
        ("loss.beta=-0.1", "loss.beta must be > 0, got -0.1"),
        ("loss.beta=nan", "loss.beta must be > 0, got nan"),
        ("loss.beta=inf", "loss.beta must be > 0, got inf"),
        ("rollout.num_generations=1", "rollout.num_generations must be at least 2, got 1"),
        ("rollout.temperature=0", "rollout.temperature must be > 0, got 0.0"),
        ("rollout.top_p=0", "rollout.top_p must be > 0, got 0.0"),
        ("rollout.top_p=1.1", "rollout.top_p must be between 0 and 1, got 1.1"),
        ("rollout.top_k=-1", "rollout.top_k must be at least 0, got -1"),
        ("rollout.min_p=2", "rollout.min_p must be between 0 and 1, got 2.0"),
        ("eval.temperature=-1", "eval.temperature must be at least 0, got -1.0"),
        ("train.batch_size=0", "train.batch_size must be at least 1, got 0"),
        ("train.micro_batches=3", "train.batch_size=8 does not divide into train.micro_batches=3"),
        ("train.stop_at=0", "train.stop_at must be at least 1, got 0"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate must be at least 0, got nan"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate must be at least 0, got inf"),
        ("optimizer.max_grad_norm=-1", "optimizer.max_grad_norm must be > 0, got -1.0; null"),
        ("reference.decay=1.5", "reference.decay must be between 0 and 1, got 1.5"),
        ("loss.huber_delta=0", "loss.huber_delta must be > 0, got 0.0; null: no clipping"),
        ("loss.kl_coef=-1", "loss.kl_coef must be at least 0, got -1.0"),
        ("rollout.lookahead=-1", "rollout.lookahead must be at least 0, got -1"),
        ("rollout.demonstrations=3", "rollout.num_generations=4 leaves fewer than two samples"),
        ("replay.completions=3", "rollout.num_generations=4 leaves fewer than two samples"),
        ("replay.groups=8", "replay.groups=8 must be less than train.batch_size=8"),
        ("replay.capacity=0", "replay.capacity must be at least 1, got 0"),
        ("run.seed=-1", "run.seed must be between 0 and 2147483647, got -1"),
    ],
)
def test_a_value_out_of_range_names_key_and_limit(write, given, message):
    assert message in refused(write(""), given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["loss.name=grpo", "loss.huber_delta=1"], "loss.huber_delta is for gvpo"),
        (["loss.epsilon=0.1"], "loss.name=gvpo has neither clipping .* leave out loss.epsilon"),
        (["loss.name=dpo", "loss.kl_coef=0.1"], "leave out loss.kl_coef"),
        (["loss.name=rloo", "rollout.temperature=0.7"], "rollout.temperature must be 1, got 0.7"),
        (["data.groups_path=g.jsonl", "replay.groups=1"], "replay.groups: nothing is sampled"),
        (["data.groups_path=g.jsonl", "rollout.lookahead=1"], "rollout.lookahead: nothing is"),
    ],
)
def test_settings_that_would_do_nothing_or_wrong_are_refused(write, given, message):
    assert re.search(message, refused(write(""), *given))


@pytest.mark.parametrize("other", ["data.groups_path=g.jsonl", "rollout.demonstrations=1"])
def test_a_baseline_that_needs_the_samplers_probabilities_says_so(write, other):
    assert "use gvpo or dpo" in refused(write(""), "loss.name=grpo", other)
    assert load_config(write(""), ["loss.name=dpo", other]).loss.name == "dpo"


# 30 lines that stand for 2^30 values.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 31))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss:\n  beta: [0.1\n", "c.yaml is not a readable YAML config: line 3: "),
        ("loss: {beta: 0.1, beta: 0.2}", "line 1: found duplicate key beta"),
        ("loss:\n\tbeta: 1\n", "cannot start any token; indent with spaces"),
        ("loss:\n  beta: 1\n   name: gvpo\n", "line 3: mapping values are not allowed here; inden"),
        ("- 1\n", "c.yaml: a config is made of sections, a mapping like {name: value}; got"),
        ("3", "c.yaml: a config is made of sections"),
        ("data: {tasks: {name: gcd}}", "data.tasks must be a list: put a dash before each"),
        ("!!python/object/apply:os.getcwd []", "line 1: could not read the tag"),
        ("data: {path: !x y}", "line 1: could not read the tag !x; put a text with ! in quotes"),
        ("a: &a [*a]", "line 1: a value contains itself"),
        (BOMB, "c.yaml: it holds more than 100000 values; write it without aliases"),
        ("[" * 5000, "c.yaml is not a readable YAML config: "),
        ("rollout: {engine: vllm}\nservers: 3", "servers"),
    ],
)
def test_a_broken_file_names_its_line(write, text, message):
    assert message in refused(write(text))


def test_a_missing_file_and_a_folder(tmp_path):
    assert f"there is no config file {tmp_path / 'no.yaml'} and no run" in refused(
        tmp_path / "no.yaml"
    )
    assert refused(tmp_path) == f"{tmp_path} is a folder, not a config file"
    for i in range(11):
        (tmp_path / "runs" / f"beta{i:02}").mkdir(parents=True)
        (tmp_path / "runs" / f"beta{i:02}" / "config.yaml").touch()
    told = refused(tmp_path / "runs")
    assert "not a config file; the runs in it are beta00, beta01, " in told
    assert told.endswith("beta08, ...")


def test_data_is_found_from_here_or_beside_the_config(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "here").mkdir()
    config = tmp_path / "configs" / "c.yaml"
    config.write_text("data: {path: rows.jsonl, eval_path: gone.jsonl}")
    beside = tmp_path / "configs" / "rows.jsonl"
    beside.touch()
    monkeypatch.chdir(tmp_path / "here")
    data = load_config(config).data
    assert data.path == str(beside)
    assert data.eval_path == "gone.jsonl"  # reading it will say that it is missing
    (tmp_path / "here" / "rows.jsonl").touch()
    assert load_config(config).data.path == str(tmp_path / "here" / "rows.jsonl")
    assert load_config(config, [f"data.path={beside}"]).data.path == str(beside)


def test_a_pattern_of_files_is_found_from_here_or_beside_the_config(tmp_path, monkeypatch):
    folder = tmp_path / "set [1]"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-0.jsonl").write_text('{"prompt": "beside"}')
    config = folder / "c.yaml"
    config.write_text("data: {path: data/train-*.jsonl, eval_path: data, groups_path: 'no-*'}")
    monkeypatch.chdir(tmp_path)
    data = load_config(config).data
    assert load_rows(data.path or "") == load_rows(data.eval_path or "") == [{"prompt": "beside"}]
    assert data.groups_path == "no-*"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-9.jsonl").write_text('{"prompt": "here"}')
    data = load_config(config).data
    assert load_rows(data.path or "") == [{"prompt": "here"}]
    monkeypatch.chdir("/")  # the run goes on from elsewhere
    kept = tmp_path / "config.yaml"
    kept.write_text(to_yaml(override(Config(), data__path=data.path)))
    assert load_config(kept).data.path == data.path


def test_every_path_is_found_beside_the_config_or_at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("there/model", "home"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "there" / "my.py").touch()
    (tmp_path / "there" / "chat.jinja").write_text("{{ messages }}\n\n")
    config = tmp_path / "there" / "c.yaml"
    config.write_text(
        "model: {name: model}\nrewards: {funcs: ['my.py:f', 'a.b:c', 'no.py:f']}\n"
        "data: {template: chat.jinja}\nrun: {dir: ~/runs/x}\nservers: {weights_dir: ~/w}"
    )
    read = load_config(config)
    assert read.model.name == str(tmp_path / "there" / "model")
    assert read.rewards.funcs == [f"{tmp_path}/there/my.py:f", "a.b:c", "no.py:f"]
    assert read.data.template == "{{ messages }}\n\n"
    assert read.run.dir == f"{tmp_path}/home/runs/x"
    assert read.servers.weights_dir == f"{tmp_path}/home/w"
    (tmp_path / "home" / "my.py").touch()
    given = load_config(config, ["rewards.funcs=~/my.py:f", "model.name=debug", "data.path="])
    assert given.rewards.funcs == [f"{tmp_path}/home/my.py:f"]
    assert (given.model.name, given.data.path) == ("debug", None)
    assert override(Config(), run__dir="~/x").run.dir == f"{tmp_path}/home/x"
    assert "data.template=gone.jinja: neither a readable file nor a Jinja" in refused(
        config, "data.template=gone.jinja"
    )
    monkeypatch.chdir(tmp_path / "home")  # the run goes on from elsewhere
    kept = tmp_path / "home" / "config.yaml"
    kept.write_text(to_yaml(read))
    assert load_config(kept) == read


@pytest.mark.parametrize("name", ["debug", "debug.yaml", "configs/debug.yaml", "configs/debug"])
def test_the_packages_configs_are_found_by_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = load_config(name)
    assert config.rewards.funcs == ["gvpo_jax.rewards.debug:letter_share"]
    assert config.data.path is not None
    assert Path(config.data.path).is_file()
    assert refused(f"elsewhere/{name}").startswith("there is no config file elsewhere/")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("loss: {beta: 0.3}")
    assert load_config(name).loss.beta == 0.3  # the user's own file comes first


def test_every_config_that_came_along_is_found_without_its_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert any("." in file.stem for file in files)  # qwen2.5-math-7b: that is no ending
    for file in files:
        assert load_config(file.stem) == load_config(file.name)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_package_loads_and_comes_back(file, write):
    config = load_config(file)
    assert config.rewards.funcs
    given = (config.data.path, config.data.groups_path, config.data.tasks)
    assert [bool(source) for source in given].count(True) == 1
    assert load_config(write(to_yaml(config))) == config


def test_there_are_configs():
    assert {"debug.yaml", "quickstart.yaml"} <= {file.name for file in CONFIGS}


def test_yaml_holds_every_key_and_odd_values(write):
    config = override(
        Config(),
        data__template="{% for m in messages %}\n{{ m['role'] + ': #' }}{% endfor %}",
        data__tasks=[{"name": "a", "settings": {"x": [1, None, True], "y": "007"}}],
        optimizer__learning_rate=1e-7,
        optimizer__max_grad_norm=None,
        run__dir="runs/ä b",
    )
    text = to_yaml(config)
    assert load_config(write(text)) == config
    for section in dataclasses.fields(Config):
        assert re.search(rf"^{section.name}:", text, re.MULTILINE)


def test_override_is_a_copy_that_is_checked():
    base = Config()
    assert override(base, loss__beta=0.2, run__dir="x").loss.beta == 0.2
    assert base.loss.beta == 0.1
    with pytest.raises(UserError, match="did you mean 'beta'"):
        override(base, loss__bata=0.2)
    with pytest.raises(UserError, match="unknown setting nothing"):
        override(base, nothing=1)
    with pytest.raises(UserError, match="beta must be > 0"):
        override(base, loss__beta=0)


def test_difference_names_what_a_resumed_run_must_keep():
    base = Config()
    assert difference(base, base) == []
    free = override(
        base,
        run__dir="elsewhere",
        train__stop_at=3,
        checkpoint__every=1,
        checkpoint__keep=9,
        log__samples=0,
        log__tensorboard=True,
        log__trackers=["wandb"],
        log__profile="3:2",
        eval__batch_size=1,
        mesh__data=2,
    )
    assert difference(base, free) == []
    changed = override(
        free, loss__beta=0.2, run__seed=1, eval__every=5, data__tasks=[{"name": "a"}]
    )
    assert sorted(difference(base, changed)) == [
        "data.tasks",
        "eval.every",
        "loss.beta",
        "run.seed",
    ]


def test_files_that_were_moved_are_no_other_settings():
    there = override(
        Config(),
        data__path="/a/rows.jsonl",
        data__eval_path="/a/held_out.jsonl",
        data__filter="/a/own.py:keep",
        rewards__funcs=["/a/own.py:one", "own:two"],
        model__name="/a/model",
    )
    moved = {key: value.replace("/a/", "/b/") for key, value in [
        ("data__path", there.data.path), ("data__eval_path", there.data.eval_path),
        ("data__filter", there.data.filter), ("model__name", there.model.name),
    ]}  # fmt: skip
    assert (
        difference(there, override(there, **moved, rewards__funcs=["/b/own.py:one", "own:two"]))
        == []
    )
    for key, value in {
        "rewards__funcs": ["/b/other.py:one", "own:two"],
        "model__name": "/b/another",
        "data__path": None,
        "data__filter": "/a/own.py:other",
        "eval__checker": "/a/own.py:right",
    }.items():
        assert difference(there, override(there, **{key: value})) == [key.replace("__", ".")]


def test_older_names_are_read_wherever_settings_are_given(write):
    old = write("rollout: {engine: vllm, servers: ['http://a:1'], api_key_env: KEY, top_k: 3}")
    config = load_config(old)
    assert (config.servers.kind, config.servers.urls) == ("vllm", ["http://a:1"])
    assert (config.servers.api_key_env, config.rollout.top_k) == ("KEY", 3)
    assert load_config(old, ["rollout.api_key_env=null"]).servers.api_key_env is None
    here = load_config(old, ["rollout.engine=in_process", "rollout.servers=[]"])
    assert (here.servers.kind, here.servers.urls) == ("none", [])
    again = override(Config(), rollout__engine="vllm", rollout__servers=["http://a:1"])
    assert again.servers == override(config, servers__api_key_env=None).servers


def test_every_name_that_trl_s_are_answered_with_exists():
    keys = {setting.key for setting in all_settings(Config())}
    for theirs, ours in TRL_NAMES.items():
        if ours.startswith("Trainer."):
            assert hasattr(Trainer, re.match(r"Trainer\.(\w+)", ours)[1])
            continue
        named = re.findall(r"\b[a-z]+(?:\.[a-z_0-9]+)+", ours.replace("metrics.jsonl", ""))
        assert ours.startswith(named[0]), theirs
        assert set(named) <= keys, theirs
        assert theirs not in (field.name for field in dataclasses.fields(Config)), theirs
    assert set(OTHER_NAMES.values()) <= keys
    assert not OTHER_NAMES.keys() & TRL_NAMES.keys()
    values = {re.match(r"([a-z.]+=\w+)", ours) for ours in TRL_NAMES.values()} - {None}
    given = [found[0] for found in values]
    assert len(given) > 4
    load_config("debug", [*given, "servers.urls=[http://localhost:1]"])


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("per_device_train_batch_size", "train.batch_size, in prompts over all devices here"),
        ("num_generations", "rollout.num_generations here"),
        ("max_prompt_length", "data.max_prompt_length here"),
        ("max_steps", "train.steps here"),
        ("output_dir", "run.dir here"),
        ("lora_r", "model.lora.rank here"),
        ("vllm_mode", "servers.kind=vllm, whose servers run on their own here"),
    ],
)
def test_trl_s_names_are_answered_with_ours(write, name, answer):
    """In a file, in a section, behind a command and as a keyword."""
    told = f"unknown setting {name}: TRL's {name} is {answer}; "
    assert told in refused(write(f"{name}: 4"))
    assert told in refused(write(""), f"{name}=4")
    assert f"mesh.{name}: TRL's {name} is {answer}; " in refused(write(f"mesh: {{{name}: 4}}"))
    with pytest.raises(UserError, match=re.escape(told)) as error:
        override(Config(), **{name: 4})
    assert str(error.value).endswith("as a keyword section.name is section__name")


def test_from_pretrained_answers_trl_s_names_before_it_loads():
    with pytest.raises(UserError, match=r"TRL's max_steps is train\.steps here"):
        Trainer.from_pretrained("no/such-model", max_steps=3)
    with pytest.raises(UserError, match=r"config is a str.* Trainer\.from_pretrained"):
        Trainer("debug")  # type: ignore[arg-type]


def test_a_setting_without_its_section_is_found(write):
    told = refused(write("batch_size: 4"))
    assert "unknown setting batch_size: write sft.batch_size or train.batch_size or eval" in told
    assert "unknown setting funcs: write rewards.funcs; " in refused(write(""), "funcs=[a:b]")
    assert "unknown setting train_steps: write train.steps; " in refused(write(""), "train_steps=4")
    assert "optimizer.lr: write optimizer.learning_rate; " in refused(write("optimizer: {lr: 1}"))
    told = refused(write(""), "rollout.stop_strings=a")
    assert "rollout.stop_strings: write rollout.stop; " in told


def test_a_mistake_behind_the_command_is_not_the_file_s(write):
    file = write("train: {batch_size: 4}")
    assert refused(file, "train.steps=x") == "train.steps must be a whole number, got 'x'"
    assert refused(file, "train.micro_batches=3").startswith("train.batch_size=4 does not divide")
    wrong = write("train: {steps: x}")
    assert refused(wrong) == f"{wrong}: train.steps must be a whole number, got 'x'"
    assert refused(wrong, "train.batch_size=2").startswith(f"{wrong}: train.steps must be")


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("quikstart", "quickstart"), ("configs/ofline.yaml", "offline"), ("mein.yaml", "mine.yaml")],
)
def test_a_missing_config_is_told_its_neighbours(tmp_path, monkeypatch, asked, meant):
    (tmp_path / "mine.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    line = refused(asked)
    assert f"{asked} and no run folder: did you mean {meant}? " in line
    assert line.endswith(
        "colab, colab_gemma3_1b_lora, colab_qwen3_1.7b_qlora, debug, eval/math, offline, "
        "quickstart, qwen2.5-math-1.5b, qwen2.5-math-7b, qwen3_30b_a3b_v5p, servers"
    )


@pytest.mark.parametrize(
    ("key", "address"),
    [
        ("run.dir", "s3://bucket/x"),
        *(
            (key, "https://host/x")
            for key in ("run.dir", "data.path", "data.eval_path", "model.name")
        ),
    ],
)
def test_an_address_that_can_not_be_read_is_no_path(write, tmp_path, monkeypatch, key, address):
    """`Path` would make a folder `https:` here, on a pod one on each host's own disk."""
    monkeypatch.chdir(tmp_path)
    problem = f"{key}={address} is an address: give a path on this machine"
    with pytest.raises(UserError, match=re.escape(problem)):
        load_config(write(""), [f"{key}={address}"])
    with pytest.raises(UserError, match=re.escape(problem)):
        override(Config(), **{key.replace(".", "__"): address})
    with pytest.raises(UserError, match="is an address"):
        load_rows("https://host/x")
    with pytest.raises(UserError, match="is an address"), new_folder(Path(address)):
        pass
    assert not list(tmp_path.glob("*:"))


def test_a_section_may_be_given_as_a_mapping():
    config = load_config("debug", ["rewards.model={batch_size: 32, dtype: bfloat16}"])
    assert (config.rewards.model.batch_size, config.rewards.model.dtype) == (32, "bfloat16")
    assert "did you mean 'batch_size'" in refused("debug", "rewards.model={batchsize: 32}")
    assert "is a section" in refused("debug", "rewards.model=32")


def test_a_misspelt_keyword_is_looked_for_in_all_sections():
    with pytest.raises(UserError, match=r"did you mean optimizer\.learning_rate\?"):
        override(Config(), lerning_rate=1)
