"""The command line: a short run with all its commands, and one line for every mistake."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gvpo_jax.cli import main
from gvpo_jax.config_file import claim, load_config, open_run
from gvpo_jax.errors import Page
from gvpo_jax.models.export import export_model
from gvpo_jax.models.load import load_model

FLAGS = "GVPO_TESTS_XLA_FLAGS"
LONG = "x" * 300  # most file systems take 255
DEBUG = str(Path(__file__).parents[2] / "configs" / "debug.yaml")
SHORT = ["train.steps=2", "train.batch_size=2", "data.eval_size=2", "eval.every=0", "mesh.fsdp=1"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The debug model as a model folder."""
    model = load_model("debug")
    return export_model(tmp_path_factory.mktemp("exported") / "model", model, model.params)


@pytest.fixture
def model_folder(exported, tmp_path):
    """A model folder of the test's own, to damage."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path, capfd):
    """Call with arguments: one line on stderr, status 2, no file touched; gives the line.

    Below it there may be the address of a page.
    """

    def refused(*arguments: object) -> str:
        before = contents(tmp_path)
        status = main([str(argument) for argument in arguments])
        err = capfd.readouterr().err
        assert status == 2, err
        assert err.startswith("gvpo-jax: error: "), err
        assert err.endswith("\n"), err
        line, *more = err.splitlines()
        assert more in [[], *([f"see {page.url}"] for page in Page)], err
        assert contents(tmp_path) == before
        refused.page = more[0] if more else None
        return f"{line}\n"

    return refused


@pytest.fixture
def train(refused, tmp_path):
    """A refused `train` on the debug config with overrides; no run folder must come of it."""

    def train(*overrides: str) -> str:
        line = refused("train", DEBUG, f"run.dir={tmp_path / 'run'}", *overrides)
        assert not (tmp_path / "run").exists()
        return line

    return train


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_run_and_all_that_is_done_with_it(tmp_path, capfd, refused):
    run = tmp_path / "run"
    assert main(["train", DEBUG, f"run.dir={run}", *SHORT]) == 0
    out = capfd.readouterr().out
    assert '"eval/accuracy_after"' in out
    assert "left_out/" not in out  # nothing was
    assert not re.search(r"\d\.\d{7}", out)
    assert f"report: {run / 'report.html'}" in out
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    line = refused("train", DEBUG, f"run.dir={run}", *SHORT, "loss.beta=0.2")
    assert f"{run} holds a run with other settings (loss.beta=0.05)" in line
    assert refused.page == f"see {Page.RESUMING.url}"
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()
    capfd.readouterr()
    assert main(["eval", str(run)]) == 0
    assert 0 <= json.loads(capfd.readouterr().out)["eval/accuracy"] <= 1
    assert main(["inspect", str(run)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == f"{run}: 2 of 2 updates are saved"
    assert re.fullmatch(r" +2 +0\.\d{3} GiB +0\.\d{3} +whole", lines[-1])
    assert main(["export", str(run)]) == 0
    trained = load_file(run / "export" / "model.safetensors")
    assert any(np.any(trained[name] != x) for name, x in _start().items())
    other = tmp_path / "notes"
    other.mkdir()
    (other / "note.txt").write_text("mine")
    assert "notes is not an earlier export" in refused("export", run, other)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", LONG),
        ("train", DEBUG, f"data.path={LONG}.jsonl"),
        ("train", DEBUG, f"data.groups_path={LONG}", "data.path=null"),
        ("train", DEBUG, f"model.name={LONG}"),
        ("train", DEBUG, f"model.name=./{LONG}.gguf"),
        ("train", DEBUG, f"model.adapter={LONG}", "model.lora.rank=2"),
        ("train", DEBUG, f"rewards.funcs=[{LONG}.py:f]"),
        ("train", DEBUG, f"data.template={LONG}"),
        ("train", DEBUG, f"run.dir={LONG}"),
        ("report", LONG),
        ("inspect", f"{LONG}/{LONG}"),
        ("export", LONG),
        ("eval", LONG),
        ("compile", "debug", "--topology", "v5e:1x1", "--model-config", LONG),
    ],
)
def test_a_name_that_is_too_long_for_a_file_is_one_line(refused, tmp_path, arguments):
    more = [f"run.dir={tmp_path / 'run'}"] if arguments[:2] == ("train", DEBUG) else []
    own = any(argument.startswith("run.dir=") for argument in arguments)
    assert len(refused(*arguments, *([] if own else more))) < 520


def _start():
    from gvpo_jax.models.hf_tensors import named_tensors

    model = load_model("debug")
    tensors = named_tensors(model.config, model.params)
    return {name: tensors.read(name) for name in tensors.shapes}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs=3", "unknown setting epochs: write train.epochs; a config has run, model"),
        ("los.beta=1", "unknown setting los: did you mean 'loss'?"),
        ("loss.bata=1", "unknown setting loss.bata: did you mean 'beta'?"),
        ("loss.beta=0", "loss.beta must be > 0, got 0.0"),
        ("rollout.num_generations=1", "rollout.num_generations must be at least 2, got 1"),
        ("rollout.top_p=0", "rollout.top_p must be > 0"),
        ("loss.beta", "'loss.beta' is not an override: write key=value"),
        ("--loss.beta=1", "unrecognized arguments: --loss.beta=1"),
        ("mesh.fsdp=16", "does not fit 8 devices"),
        ("data.max_prompt_length=9999", "debug was made for 2048"),
        ("data.max_prompt_length=5", "debug.jsonl:1: the prompt is 22 tokens long"),
        ("rewards.funcs=[]", "rewards.funcs is empty"),
        ("rewards.funcs=[no_such_module:f]", "there is no such module"),
        ("rewards.funcs=[no_such_file.py:f]", "no_such_file.py: there is no such file"),
        ("rewards.funcs=[gvpo_jax.rewards.debug:no]", "no function 'no' there"),
        ("rewards.funcs=[letter_share]", "write module:function or path/to/file.py:function"),
        ("data.path=null", "give one of data.path, data.groups_path and data.tasks"),
        ("data.path=gone.jsonl", "data.path=gone.jsonl: there is no such file"),
        ("data.path=gone*", "data.path=gone*: no file has a name of this pattern"),
        ("data.eval_path=gone.csv", "data.eval_path=gone.csv: there is no such file"),
    ],
)
def test_a_wrong_setting(train, override, message):
    assert message in train(override)


def test_a_batch_that_does_not_lie_on_the_devices(train):  # conftest.py sets up eight
    said = train("train.batch_size=3", "rollout.num_generations=4")
    assert "train.batch_size / train.micro_batches = 3: 3 groups of 4 completions" in said
    assert "use a multiple of 8 groups" in said


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", "", "the file holds no rows"),
        ("\n\n", "", "the file holds no rows"),
        ('{"prompt": "a"}\n{"prompt": "b"\n', ":2", "not a JSON object on one line"),
        ('{"prompt": "a"}\n\n["b"]\n', ":3", "a row is a JSON object, this is a list"),
        ('{"question": "a"}\n', ":1", "no column 'prompt'; the columns are question"),
        ('{"prompt": ""}\n', ":1", "the prompt is empty"),
        ('{"prompt": [{"role": "user"}]}\n', ":1", "'prompt' must be text or a list of messages"),
    ],
)
@pytest.mark.parametrize("key", ["data.path", "data.eval_path"])
def test_a_broken_data_file_is_named_with_its_line(train, tmp_path, text, place, message, key):
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    assert f"error: {file}{place}: {message}" in train(f"{key}={file}")


def test_a_reward_file_that_cant_be_imported(train, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import json\n\nraise RuntimeError('two\\nlines')\n")
    line = train(f"rewards.funcs=['{file}:f']")
    assert "importing it failed: RuntimeError: two lines" in line


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_missing_config(refused, tmp_path, command):
    assert "there is no config file" in refused(command, tmp_path / "gone.yaml")


def test_a_broken_config_names_its_line(refused, tmp_path):
    (tmp_path / "c.yaml").write_text("loss:\n  beta: 0.1\n  bata: [\n")
    assert "c.yaml is not a readable YAML config: line 4:" in refused("train", tmp_path / "c.yaml")


def test_a_missing_model_folder(train, tmp_path):
    line = train(f"model.name={tmp_path / 'gone'}")
    assert "gone is neither a model folder nor a .gguf file" in line


def test_a_folder_that_is_no_model(train, tmp_path):
    (tmp_path / "model").mkdir()
    assert "model holds no config.json" in train(f"model.name={tmp_path / 'model'}")


def test_a_hub_name_that_cant_be_downloaded(train, monkeypatch):
    def download(*_, **__):
        raise RuntimeError("no net\ntry again")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    line = train("model.name=no-such-org/no-such-model")
    assert "could not be downloaded from the Hugging Face hub: no net; try again" in line


def test_an_unknown_architecture(train, model_folder):
    edit_json(model_folder / "config.json", architectures=["MambaForCausalLM"])
    line = train(f"model.name={model_folder}")
    assert (
        "config.json: architectures MambaForCausalLM of model_type llama is not supported, only"
        in line
    )


def test_a_missing_tensor(train, model_folder):
    weights = model_folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights)
    line = train(f"model.name={model_folder}")
    assert f"{model_folder} lacks tensor model.layers.1.mlp.up_proj.weight" in line


def test_a_torn_weight_file(train, model_folder):
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    line = train(f"model.name={model_folder}")
    assert "model.safetensors is not a whole safetensors file" in line


def test_a_chat_without_a_template(train, model_folder):
    (model_folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model_folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    line = train(f"model.name={model_folder}", "data.chat_template=always")
    assert "the tokenizer has no chat template" in line


def test_a_folder_of_something_else(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    line = refused("train", DEBUG, f"run.dir={tmp_path / 'mine'}")
    assert "mine exists and is not a run folder; choose another run.dir" in line


def test_a_run_of_another_config(refused, tmp_path):
    folder = claim(load_config(DEBUG, [f"run.dir={tmp_path / 'run'}"]))
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    settings = [f"run.dir={folder}", "loss.beta=0.2", "model.name=./gone"]
    line = refused("train", DEBUG, *settings)  # before any model is loaded
    assert "(model.name='debug', loss.beta=0.05); give those, or choose another run.dir" in line


@pytest.mark.parametrize("command", ["train", "eval", "report", "inspect", "export"])
def test_a_folder_that_is_no_run(refused, tmp_path, command):
    (tmp_path / "note.txt").write_text("mine")
    assert f"{tmp_path} is not a run" in refused(command, tmp_path)


def test_all_commands_answer_alike_to_what_is_not_there(refused):
    (both,) = {refused(command, "nope") for command in ("train", "eval")}
    assert "there is no config file nope and no run folder: a run folder is the run.dir" in both
    (runs,) = {refused(command, "nope") for command in ("report", "inspect", "export")}
    assert "nope is no folder; this command takes a run folder, the run.dir that tra" in runs
    assert "config" not in runs


def test_a_run_folder_of_nearly_that_name_is_named(refused, tmp_path):
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "config.yaml").write_text("{}")
    assert f"; did you mean {tmp_path / 'sums'}?" in refused("export", tmp_path / "sum")


def test_flags_of_other_programs_are_told_how_settings_are_written(refused):
    line = refused("train", DEBUG, "--learning-rate", "3", "--gpus=2")
    assert "TRL's learning_rate is optimizer.learning_rate here; " in line
    assert "settings are written key=value, without dashes; see" in line


@pytest.mark.parametrize(
    ("platform", "cure"),
    [("tpu", "'jax[tpu]'"), ("cuda", "'jax[cuda13]'"), ("rokm", "known backends: ['cpu', 'tpu'")],
)
def test_a_backend_that_cant_start_is_one_line(tmp_path, platform, cure):
    code = (
        "import sys; sys.modules['libtpu'] = None; from gvpo_jax.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "train", DEBUG, f"run.dir={tmp_path / 'run'}"]
    environment = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    *_, line, page = done.stderr.splitlines()
    assert page == f"see {Page.DEVICES.url}"
    assert line.startswith(f"gvpo-jax: error: JAX can't start on JAX_PLATFORMS={platform}: ")
    assert "Traceback" not in done.stderr
    assert cure in line
    assert line.endswith("or use this machine's processor: JAX_PLATFORMS=cpu")
    assert done.returncode == 2
    assert not (tmp_path / "run").exists()


def test_all_missing_extras_are_told_at_once_before_anything_is_read(
    train, refused, tmp_path, monkeypatch
):
    found = importlib.util.find_spec
    absent = ("gguf", "reasoning_gym", "math_verify", "httpx2", "pyarrow", "wandb", "tensorboardX")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: found(name, *rest) if name not in absent else None,
    )
    line = train(
        f"model.name={tmp_path / 'gone.gguf'}",
        "data.path=null",
        "data.tasks=[{name: chain_sum}]",
        "data.eval_path=gone.parquet",
        "rewards.funcs=[gvpo_jax.rewards.math:math_verify_reward]",
        "servers.kind=vllm",
        "servers.urls=[http://localhost:1]",
        "log.trackers=[wandb]",
        "log.tensorboard=true",
    )
    extras = "gguf,tasks,math,servers,parquet,wandb,tensorboard"
    assert line.endswith(f': pip install "gvpo-jax[{extras}]"\n')
    for module in absent:
        assert module in line
    assert 'pip install "gvpo-jax[tensorboard]"' in train("log.tensorboard=true")
    assert 'pip install "gvpo-jax[wandb]"' in train("log.trackers=wandb")
    assert refused.page == f"see {Page.EXTRAS.url}"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_command_alone_shows_its_help(capsys, arguments):
    with contextlib.suppress(SystemExit):
        assert main(arguments) == 2
    out = capsys.readouterr().out
    assert out.startswith("usage: gvpo-jax [-h]")
    assert "start with: gvpo-jax train quickstart" in out
    examples = [line.split()[1] for line in out.splitlines() if line.startswith("  gvpo-jax ")]
    assert set(examples) >= {"doctor", "init", "train", "eval", "export"}


@pytest.mark.parametrize(
    "command",
    ["train", "eval", "compile", "report", "inspect", "export", "init", "doctor"],
)
def test_a_commands_help_has_an_example_and_says_where_settings_are(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert re.search(r"\n\n[A-Z][^\n]{50}.*?\.\n\npositional arguments:", out, re.S)  # a sentence
    lines = out.splitlines()
    assert any(line.startswith(f"example: gvpo-jax {command} ") for line in lines)
    assert any(line.startswith("settings: all are in docs/settings.md") for line in lines)
    listed = any(line.startswith("  train.batch_size=8") for line in lines)
    assert listed == (command in ("train", "eval", "compile"))


@pytest.mark.parametrize(
    ("overrides", "page"),
    [
        (["rewards.funcs=[my.py:gone]"], Page.REWARDS),
        (["rewards.funcs=[my.py:wants]"], Page.REWARDS),
        (["data.path=my.jsonl"], Page.ROWS),
        (["data.columns={prompt: question}"], Page.COLUMNS),
        (["data.max_prompt_length=5"], Page.PROMPTS),
        (["model.name=a/b", "data.eval_size=0"], Page.MODELS),
        (["servers.kind=vllm"], Page.SERVERS),
        (["loss.beta=0"], None),
    ],
)
def test_a_mistake_points_to_the_page_that_explains_it(
    refused, tmp_path, monkeypatch, overrides, page
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    (tmp_path / "my.jsonl").write_text('{"question": "a"}\n')
    (tmp_path / "my.py").write_text("def wants(prompt, completion, answer):\n    return 1.0\n")
    refused("train", DEBUG, f"run.dir={tmp_path / 'run'}", *SHORT, *overrides)
    assert refused.page == (f"see {page.url}" if page else None)


def test_a_reward_that_fails_in_a_run_points_to_a_page(tmp_path, capfd):
    file = tmp_path / "my.py"
    file.write_text("def fails(prompt, completion):\n    return 1 / 0\n")
    overrides = [f"run.dir={tmp_path / 'run'}", *SHORT, f"rewards.funcs=['{file}:fails']"]
    assert main(["train", DEBUG, *overrides]) == 2
    *_, line, page = capfd.readouterr().err.splitlines()
    assert "ZeroDivisionError: division by zero (my.py:2)" in line
    assert page == f"see {Page.REWARD_FAILED.url}"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "(the machine has no more)"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nx"),
            "(allocating 9 bytes.)",
        ),
    ],
)
def test_no_memory_is_one_line(refused, monkeypatch, error, reason):
    def train(config):
        raise error

    monkeypatch.setattr("gvpo_jax.commands.train", train)
    line = refused("train", DEBUG)
    assert line.startswith(f"gvpo-jax: error: out of memory {reason}; train.micro_batches, ")
    assert refused.page == f"see {Page.MEMORY.url}"


def test_other_errors_of_jax_are_no_mistake_of_the_user(monkeypatch):
    def train(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr("gvpo_jax.commands.train", train)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        main(["train", DEBUG])


@pytest.mark.parametrize("command", ["eval", "report", "inspect", "export"])
def test_a_run_that_does_not_exist(refused, tmp_path, command):
    assert str(tmp_path / "gone") in refused(command, tmp_path / "gone")


def test_a_broken_checkpoint_is_found_and_left_as_it_is(tmp_path, capfd):
    run = tmp_path / "run"
    assert main(["train", DEBUG, f"run.dir={run}", *SHORT, "checkpoint.every=1"]) == 0
    step = run / "checkpoints" / "2"
    file = max((file for file in (step / "params").rglob("*")), key=lambda x: x.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    capfd.readouterr()
    assert main(["inspect", str(run)]) == 1
    out = capfd.readouterr().out
    assert out.startswith(f"{run}: 1 of 2 updates are saved\n")
    assert re.search(r"\n +2 .* checksum of params/\S+ differs\n +1 .* whole\n", out)
    assert file.read_bytes() == content
    shutil.rmtree(run / "checkpoints")
    assert main(["inspect", str(run)]) == 0
    assert capfd.readouterr().out == f"{run}: 0 of 2 updates are saved\n"
    assert not (run / "checkpoints").exists()


CODE = """
from pathlib import Path

Path(__file__).with_name("ran").touch()


def one(prompts, **columns):
    return [1.0] * len(prompts)
"""


@pytest.mark.parametrize(
    "named", ["{run}/own.py", "run/own.py", "../run/own.py", "{run}/../elsewhere.py"]
)
def test_code_that_a_run_folder_names_is_not_run(tmp_path, capfd, refused, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    assert main(["train", DEBUG, f"run.dir={run}", *SHORT]) == 0
    spec, config = f"{named.format(run=run)}:one", run / "config.yaml"
    file = run.parent / "elsewhere.py" if "elsewhere" in named else run / "own.py"
    file.write_text(CODE)
    assert "gvpo_jax.rewards.debug:letter_share" in config.read_text()
    config.write_text(config.read_text().replace("gvpo_jax.rewards.debug:letter_share", spec))
    told = refused("eval", run)
    assert ".py:one, which was not trained with here and would be run: read it" in told
    ran = file.with_name("ran")
    assert not ran.exists()
    assert main(["eval", str(run), "--trust-rewards"]) == 0
    assert '"eval/reward": 1.0' in capfd.readouterr().out
    assert ran.exists()


def test_servers_that_a_run_folder_names_get_nothing_unasked(tmp_path, refused, monkeypatch):
    """They would be sent the key that the folder asks for by its name."""
    monkeypatch.setenv("SOMEBODYS_KEY", "secret")
    run = tmp_path / "run"
    assert main(["train", DEBUG, f"run.dir={run}", *SHORT]) == 0
    config = run / "config.yaml"
    text = config.read_text().replace("kind: none", "kind: vllm")
    text = text.replace("urls: []", "urls: ['http://127.0.0.1:9']")
    text = text.replace("api_key_env: null", "api_key_env: SOMEBODYS_KEY")
    assert text.count("SOMEBODYS_KEY") == text.count("127.0.0.1:9") == 1
    config.write_text(text)
    told = refused("eval", run)
    assert "names servers (http://127.0.0.1:9), which were not trained with here" in told
    assert main(["eval", str(run), "servers.kind=none", "servers.urls=[]"]) == 0


def test_compiled_programs_are_not_read_from_where_a_run_folder_says(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    run, poisoned = tmp_path / "run", tmp_path / "poisoned"
    assert main(["train", DEBUG, f"run.dir={run}", *SHORT]) == 0
    config = run / "config.yaml"
    cache = "compilation_cache: ~/.cache/gvpo-jax"
    assert cache in config.read_text()
    config.write_text(config.read_text().replace(cache, f"compilation_cache: {poisoned}"))
    assert open_run(run).run.compilation_cache == "~/.cache/gvpo-jax"
    assert open_run(run, to_train=True).run.compilation_cache == str(poisoned)
    given = open_run(run, [f"run.compilation_cache={poisoned}"]).run.compilation_cache
    assert given == str(poisoned)


@pytest.mark.parametrize("spec", ["subprocess:getoutput", "json:dumps", "gvpo_jax.cli:main"])
def test_a_module_s_function_is_no_reward_until_somebody_says_so(tmp_path, refused, spec):
    """With columns of its choice a folder could have shells do anything."""
    run = tmp_path / "run"
    assert main(["train", DEBUG, f"run.dir={run}", *SHORT]) == 0
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("gvpo_jax.rewards.debug:letter_share", spec))
    told = refused("eval", run)
    assert f"names the reward function {spec}, which was not trained with here" in told


def test_own_code_that_was_trained_with_is_run_until_it_changes(tmp_path, capfd, refused):
    own, run = tmp_path / "own.py", tmp_path / "run"
    own.write_text(CODE + "\n\ndef keep(row):\n    return True\n")
    named = [f"rewards.funcs=[{own}:one]", f"data.filter={own}:keep"]
    assert main(["train", DEBUG, f"run.dir={run}", *SHORT, *named]) == 0
    assert main(["eval", str(run)]) == 0
    capfd.readouterr()
    own.write_text(own.read_text() + "\n")
    assert "was not trained with here" in refused("eval", run)


# Set by the program itself: a fork of this process, whose JAX has threads, is warned of.
NO_LARGE_FILES = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
runpy.run_module("gvpo_jax", run_name="__main__")
"""


def test_a_checkpoint_that_can_not_be_written_is_told_without_tracebacks(tmp_path):
    """Writing fails in Orbax's threads, as on a full disk; the run before it stays."""
    train = ["train", DEBUG, f"run.dir={tmp_path}", *SHORT, "run.compilation_cache=null"]
    done = subprocess.run(
        [sys.executable, "-c", NO_LARGE_FILES, *map(str, train)], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) < 12
    assert all(len(line) < 520 for line in lines)
    # A thread of Orbax's may still say a line behind it.
    (told,) = [line for line in lines if line.startswith("gvpo-jax: error: ")]
    assert told.startswith(f"gvpo-jax: error: could not write a checkpoint to {tmp_path}")
    assert told.endswith("those before it stay: make room, and give the same command")


@pytest.mark.parametrize(
    "spec", ["subprocess:run", "own.py:keep", ".py:keep", "/usr/x.py:keep", "gvpo_jax.cli:main"]
)
def test_a_run_folder_s_filter_is_run_only_when_told(tmp_path, refused, monkeypatch, spec):
    """Any function is one that could do harm, called with rows that come along."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    assert main(["train", DEBUG, f"run.dir={run}", *SHORT]) == 0
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("filter: null", f"filter: {spec}"))
    assert f"filter: {spec}" in config.read_text()
    for own in ([], ["rewards.funcs=[gvpo_jax.rewards.debug:letter_share]"]):
        told = refused("eval", run, *own)
        assert "names the data.filter " in told
        assert f"{spec}, which was not trained with here" in told
        assert "give --trust-rewards" in told
    assert main(["eval", str(run), "data.filter=null"]) == 0


@pytest.mark.parametrize("arguments", [[], ["trian", DEBUG], ["train"]])
def test_no_such_command(refused, arguments):
    assert "see gvpo-jax" in refused(*arguments)


@pytest.mark.parametrize(
    ("overrides", "stdout"), [(["loss.bata=1"], ""), (["model.name=./gone"], "loading ./gone\n")]
)
def test_the_same_from_a_shell(tmp_path, overrides, stdout):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "gvpo_jax", "train", DEBUG, f"run.dir={run}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("gvpo-jax: error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == stdout
    assert not run.exists()


def test_compiled_programs_are_kept_for_the_next_start(tmp_path):
    arguments = [*SHORT, "train.steps=1", "data.eval_size=0", f"run.dir={tmp_path / 'run'}"]
    environment = {**os.environ, "HOME": str(tmp_path), "XLA_FLAGS": os.environ[FLAGS]}
    del environment["JAX_COMPILATION_CACHE_DIR"]  # these tests' own
    command = [sys.executable, "-m", "gvpo_jax", "train", DEBUG, *arguments]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert any((tmp_path / ".cache" / "gvpo-jax").glob("jit_train_step*"))
