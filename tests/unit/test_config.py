import dataclasses
import re
from pathlib import Path

import pytest

from gvpo_jax.config import Config
from gvpo_jax.config_file import difference, load_config, override, to_yaml
from gvpo_jax.errors import UserError

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
    assert type(task.settings) is dict  # plain values: nothing of OmegaConf gets out
    assert type(task.settings["ops"]) is list


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("los: {beta: 1}", [], "c.yaml: Key 'los' not in 'Config'. Did you mean.*'loss'"),
        ("loss: {bata: 1}", [], "c.yaml: loss.bata: .*Did you mean: 'beta'?"),
        ("", ["rollout.num_generation=8"], "rollout.num_generation: .*Did you mean.*'num_gener"),
        ("data: {tasks: [{nam: gcd}]}", [], "Did you mean: 'name'?"),
        ("", ["epochs=3"], "'epochs' not in 'Config', which has run, model, data,"),
        ("", ["train.epochs=3"], "'epochs' not in 'TrainConfig', which has steps, batch_size,"),
    ],
)
def test_a_misspelt_key_is_told_its_neighbour(write, text, given, message):
    assert re.search(message, refused(write(text), *given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("loss.beta=x", "loss.beta: Value 'x' .*could not be converted to Float"),
        ("train.steps=1.5", "train.steps: .*could not be converted to Integer"),
        ("train.steps=", "train.steps: Incompatible value 'None'"),
        ("optimizer.name=adm", "optimizer.name: Invalid value 'adm', expected one of .*'adamw'"),
        ("rewards.funcs=a:b", "rewards.funcs: needs a list"),
        ("loss=3", "LossConfig"),
        ("loss.beta", "'loss.beta' is not an override: write key=value"),
        ("train.steps=[", r"'train.steps=\[' is not an override: write key=value"),
    ],
)
def test_a_wrong_type_names_its_key(write, given, message):
    assert re.search(message, refused(write(""), given))


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
        ("rewards.weights=[1.0]", "rewards.weights has 1 numbers for 0 functions"),
    ],
)
def test_a_value_out_of_range_names_key_and_limit(write, given, message):
    assert refused(write(""), given).startswith(message)


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss:\n  beta: [0.1\n", "c.yaml is not a readable YAML config: line 3: "),
        ("loss: {beta: 0.1, beta: 0.2}", "line 1: found duplicate key beta"),
        ("- 1\n", "c.yaml: a list stands where a mapping belongs"),
        ("data: {tasks: {name: gcd}}", "data.tasks and rewards.funcs are lists, with a dash"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_a_broken_file_names_its_line(write, text, message):
    assert message in refused(write(text))


def test_a_missing_file_and_a_folder(tmp_path):
    assert refused(tmp_path / "no.yaml") == f"there is no config file {tmp_path / 'no.yaml'}"
    assert refused(tmp_path) == f"{tmp_path} is a folder, not a config file"


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
    with pytest.raises(UserError, match="Did you mean: 'beta'"):
        override(base, loss__bata=0.2)
    with pytest.raises(UserError, match="'nothing' not in"):
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
