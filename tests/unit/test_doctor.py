"""`gvpo-jax doctor`: what it finds on machines that are made up here; and the pages of errors."""

import ast
import fcntl
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from gvpo_jax import installed, machine, memory
from gvpo_jax.cli import main
from gvpo_jax.config import Config
from gvpo_jax.config_file import load_config, override
from gvpo_jax.doctor import about_config, examine, findings, system
from gvpo_jax.errors import Page, UserError, explained_by
from gvpo_jax.models.debug import debug_config
from gvpo_jax.models.decoder import param_shapes
from gvpo_jax.rewards.call import RewardError

ROOT = Path(__file__).parents[2]
GIB = 2**30
CPU = {"kind": "cpu", "platform": "cpu", "host": 0, "bytes": None}
TPU = {"kind": "TPU v5 lite", "platform": "tpu", "host": 0, "bytes": 16 * GIB}


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A machine without accelerators; `devices` is what JAX tells."""
    for name in ("JAX_PLATFORMS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("DEV", "PCI", "CGROUP"):
        monkeypatch.setattr(machine, name, tmp_path / "system" / name)
    monkeypatch.setattr(machine, "nvidia_gpus", list)
    monkeypatch.setattr(machine, "TPU_LOCK", tmp_path / "system" / "libtpu_lockfile")
    (tmp_path / "system" / "DEV").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    told = SimpleNamespace(devices=[CPU], system=tmp_path / "system")
    monkeypatch.setattr(system, "ask_devices", lambda: told.devices)
    return told


def named(found, name):
    """The one finding of that name."""
    (finding,) = [finding for finding in found if finding.name == name]
    return finding


def levels(found):
    return {finding.name for finding in found if finding.level == "problem"}


def add_tpu(there):
    device = there.system / "PCI" / "0000:00:05.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1ae0\n")
    (device / "device").write_text("0x0063\n")


def test_a_machine_on_which_all_works(there, capsys):
    found = examine.examine()
    assert not levels(found)
    assert named(found, "memory").section == "machine"
    assert named(found, "trainer").value == "all that it needs is there"
    assert {f.name for f in found if f.section == "extras"} == installed.EXTRAS.keys()
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nno problem was found\n")
    assert re.search(r"\n  jax +1 x cpu \(cpu\)\n", out)


def test_accelerators_that_jax_sees(there):
    add_tpu(there)
    there.devices = [TPU] * 4
    found = list(system.devices())
    assert named(found, "TPU chips").value == "1 (v5e)"
    assert named(found, "jax").value == "4 x tpu (TPU v5 lite), 16 GiB each"
    assert not levels(found)


def test_a_network_card_of_google_is_no_tpu(there):
    add_tpu(there)
    (there.system / "PCI" / "0000:00:05.0" / "device").write_text("0x0042\n")
    assert machine.tpu_chips() == []
    (there.system / "DEV" / "accel0").touch()
    assert machine.tpu_chips() == ["TPU"]


@pytest.mark.parametrize(
    ("libtpu", "platforms", "level", "said"),
    [
        (None, None, "problem", "pip install -U 'jax[tpu]'"),
        ("0.0.42", None, "problem", "another process may hold it"),
        ("0.0.42", "cpu", "note", "take JAX_PLATFORMS out of the environment"),
        (None, "cpu,tpu", "problem", "pip install -U 'jax[tpu]'"),
    ],
)
def test_a_tpu_that_jax_does_not_see(there, monkeypatch, libtpu, platforms, level, said):
    add_tpu(there)
    monkeypatch.setattr(installed, "version_of", lambda name: libtpu if name == "libtpu" else None)
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    finding = named(system.devices(), "TPU unused")
    assert finding.level == level
    assert said in finding.remedy
    assert finding.page == Page.DEVICES


def test_a_gpu_that_jax_does_not_see(there, monkeypatch):
    monkeypatch.setattr(machine, "nvidia_gpus", lambda: ["NVIDIA L4, 23034 MiB"])
    monkeypatch.setattr(installed, "version_of", lambda name: None)
    found = list(system.devices())
    assert named(found, "GPU").value == "NVIDIA L4, 23034 MiB"
    assert named(found, "GPU unused").remedy == "pip install -U 'jax[cuda13]'"
    there.devices = [{**TPU, "platform": "gpu"}]
    assert not levels(system.devices())


def test_nvidia_smi_tells_the_gpus(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4, 23034 MiB, 550.1'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert machine.nvidia_gpus() == ["NVIDIA L4, 23034 MiB, 550.1 (name, memory, driver)"]
    tool.write_text("#!/bin/sh\necho 'no driver'\nexit 9\n")
    monkeypatch.setattr(machine, "DEV", tmp_path)
    assert machine.nvidia_gpus() == []
    (tmp_path / "nvidia0").touch()
    assert machine.nvidia_gpus() == ["NVIDIA GPU"]


HOLD = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_tpu_that_another_process_holds(there):
    add_tpu(there)
    machine.TPU_LOCK.touch()
    assert not levels(x for x in system.devices() if x.name == "TPU in use")
    command = [sys.executable, "-c", HOLD, str(machine.TPU_LOCK)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        finding = named(system.devices(), "TPU in use")
        process.communicate("")
    assert finding.level == "problem"
    assert finding.value == f"by process {process.pid}"
    assert machine.holders(machine.TPU_LOCK) == []


def test_who_waits_for_a_lock_does_not_hold_it(tmp_path, monkeypatch):
    file = tmp_path / "lock"
    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        number = file.stat().st_ino
        locks = tmp_path / "locks"
        locks.write_text(
            f"1: FLOCK  ADVISORY  WRITE 11 fe:00:{number} 0 EOF\n"
            f"1: -> FLOCK  ADVISORY  WRITE 12 fe:00:{number} 0 EOF\n"
            "2: POSIX  ADVISORY  WRITE 13 fe:00:1 0 EOF\nodd\n"
        )
        monkeypatch.setattr(machine, "LOCKS", locks)
        assert machine.holders(file) == [11]
    assert machine.holders(tmp_path / "gone") is None


def test_devices_that_can_not_be_asked_are_a_line(there, monkeypatch):
    def ask():
        raise UserError("JAX can't start: it is broken", page=Page.DEVICES)

    monkeypatch.setattr(system, "ask_devices", ask)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    found = examine.examine()
    finding = named([x for x in found if x.section == "devices"], "jax")
    assert (finding.level, finding.value) == ("problem", "JAX can't start: it is broken")
    assert "pip install -U 'jax[tpu]'" in finding.remedy
    assert named(found, "memory")  # it went on


def test_jax_itself_is_asked_in_another_process(monkeypatch):
    devices = system.ask_devices()
    assert {device["platform"] for device in devices} == {"cpu"}
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    with pytest.raises(UserError, match=r"JAX can't start: .*nonsense"):
        system.ask_devices()
    monkeypatch.setattr(system, "_ASK", "import os; os.abort()")
    with pytest.raises(UserError, match="its process ended with status -6"):
        system.ask_devices()
    monkeypatch.setattr(system, "_ASK", "import time; time.sleep(60)")
    monkeypatch.setattr(system, "_SECONDS", 0.2)
    with pytest.raises(UserError, match=r"within 0.2 s; on a slice of several hosts"):
        system.ask_devices()


def test_whatever_fails_is_a_line_and_the_rest_goes_on(there, monkeypatch):
    def broken(*_):
        raise RuntimeError("two\nlines")

    for name in ("tpu_chips", "host_memory"):
        monkeypatch.setattr(machine, name, broken)
    monkeypatch.setattr(installed, "version_of", broken)
    found = examine.examine()
    lost = [finding for finding in found if finding.name == "not all is known"]
    assert [finding.section for finding in lost] == ["versions", "devices", "machine"]
    assert {finding.value for finding in lost} == {"RuntimeError: two lines"}
    assert named(found, "gguf").section == "extras"


@pytest.mark.parametrize(
    ("changes", "name", "level", "said"),
    [
        ({"optax": None}, "trainer", "note", "without its trainer (optax missing)"),
        ({"jax": "0.11.2", "flax": "0.12.9"}, "trainer", "problem", "pip install -U flax"),
        ({"flax": "0.11.0"}, "trainer", "problem", "needs flax 0.12.1 or newer"),
        ({"jax-cuda13-plugin": "0.9"}, "CUDA plugin", "problem", "pip install -U 'jax[cuda13]'"),
        ({"jax-cuda12-plugin": "0.9"}, "CUDA plugin", "problem", "pip install -U 'jax[cuda12]'"),
        ({"libtpu": "0.0.1"}, "libtpu", "note", "pip install -U 'jax[tpu]'"),
    ],
)
def test_versions_that_do_not_go_together(monkeypatch, changes, name, level, said):
    real = installed.version_of
    monkeypatch.setattr(installed, "version_of", lambda x: changes[x] if x in changes else real(x))
    found = [x for x in system.versions() if x.name == name and x.level != "ok"]
    (finding,) = found
    assert finding.level == level
    assert said in finding.remedy
    assert finding.page in (Page.EXTRAS, Page.VERSIONS)


def test_the_libtpu_that_jax_names_is_read_from_jax(monkeypatch):
    assert re.fullmatch(r"0\.0\.\d+(\.\*)?", system._libtpu_wanted() or "")


def test_disks_without_room_and_folders_that_can_not_be_written(there, monkeypatch):
    monkeypatch.setattr(machine, "free_disk", lambda folder: GIB // 2)
    found = list(system.this_machine())
    assert levels(found) == {"here"}
    assert "too little room on the disk" in named(found, "here").remedy
    assert named(found, "Hugging Face cache").level == "note"
    monkeypatch.setattr(machine, "free_disk", lambda folder: GIB)
    monkeypatch.setattr(machine, "why_not_writable", lambda folder: "Read-only file system")
    found = list(system.this_machine())
    assert "can't be written (Read-only file system)" in named(found, "here").value
    assert "set HF_HOME" in named(found, "Hugging Face cache").remedy


def test_a_folder_is_tried_where_it_would_be_made(tmp_path, monkeypatch):
    assert machine.why_not_writable(tmp_path / "a" / "b") is None
    assert not (tmp_path / "a").exists()
    assert machine.free_disk(tmp_path / "a" / "b") > 0

    def refused(dir):
        assert dir == tmp_path
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", refused)
    assert machine.why_not_writable(tmp_path / "a" / "b") == "Permission denied"


def test_a_machine_without_a_home(there, monkeypatch):
    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    finding = named(system.this_machine(), "compiled programs")
    assert finding.level == "note"
    assert "there is no home folder" in finding.value


@pytest.mark.parametrize(("value", "said"), [("1", True), ("true", True), ("0", False)])
def test_a_hub_that_is_offline_is_told(there, monkeypatch, value, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    names = {finding.name for finding in system.this_machine()}
    assert ("Hugging Face hub" in names) == said


def config_of(**values):
    share = ["gvpo_jax.rewards.debug:letter_share"]
    defaults = {"data__path": "rows.jsonl", "mesh__fsdp": 1, "rewards__funcs": share}
    return override(Config(), **(defaults | values))


def looked_at(config, **options):
    Path("rows.jsonl").write_text('{"prompt": "a"}\n')
    return list(about_config.about_config(lambda: config, with_devices=True, **options))


def test_a_config_that_will_work(there):
    found = looked_at(config_of())
    assert not levels(found)
    assert named(found, "model").value == "debug: it is here"
    assert re.fullmatch(
        r"it needs [\d.]+ GiB or more on each device, a device has .* GiB",
        named(found, "memory").value,
    )
    assert named(found, "mesh").value == "data=1, fsdp=1, tensor=1"


def test_a_model_that_must_be_downloaded(there, monkeypatch):
    config = config_of(model__name="Qwen/Qwen2.5-0.5B-Instruct", run__dir="runs/x")
    found = looked_at(config)
    assert named(found, "model").level == "note"
    assert "hf download Qwen/Qwen2.5-0.5B-Instruct" in named(found, "model").remedy
    assert named(found, "memory").level in ("ok", "note")  # its shape is known
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert levels(looked_at(config)) == {"model"}
    unknown = looked_at(config_of(model__name="someone/something"))
    assert named(unknown, "memory").value == "not known until the model is downloaded"


def test_a_model_in_the_cache(there, tmp_path, monkeypatch):
    file = tmp_path / "cache" / "config.json"
    file.parent.mkdir()
    file.write_text("{}")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(file))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = config_of(model__name="a/b")
    models = [finding for finding in looked_at(config) if finding.name == "model"]
    assert "it is not in the cache" in models[0].value
    (tmp_path / "cache" / "model.safetensors").touch()
    models = [finding for finding in looked_at(config) if finding.name == "model"]
    assert models[0].value == "a/b: it is in the cache"
    assert models[1].level == "problem"  # a config.json that says nothing


@pytest.mark.parametrize(
    ("values", "name", "page", "said"),
    [
        ({"model__name": "./gone"}, "model", Page.MODELS, "is neither a model folder nor a"),
        ({"model__name": "a b"}, "model", Page.MODELS, "no name on the Hugging Face hub"),
        ({"data__path": "gone.jsonl"}, "data.path", Page.ROWS, "there is no such file"),
        ({"rewards__funcs": ["gone.py:f"]}, "rewards.funcs", Page.REWARDS, "no such file"),
        ({"mesh__fsdp": 99}, "mesh", None, "does not fit 8 devices"),
        (
            {"mesh__fsdp": 8, "train__batch_size": 3, "rollout__num_generations": 2},
            "batch",
            None,
            "use a multiple of",
        ),
    ],
)
def test_what_of_a_config_will_not_work(there, values, name, page, said):
    found = looked_at(config_of(**values))
    assert levels(found) == {name}
    assert said in named(found, name).remedy
    assert named(found, name).page == page


def test_extras_that_a_config_needs(there, monkeypatch):
    monkeypatch.setattr("gvpo_jax.config.has_extra", lambda extra: extra != "tensorboard")
    finding = named(looked_at(config_of(log__tensorboard=True)), "extras")
    assert 'pip install "gvpo-jax[tensorboard]"' in finding.remedy
    assert finding.page == Page.EXTRAS


@pytest.mark.parametrize(
    ("available", "level", "said"),
    [
        (10**15, "ok", "it needs"),
        (0.5, "note", "this run may not fit: it needs"),
        (0.001, "problem", "debug does not fit: parameters and optimizer state alone need"),
        (None, "ok", "what a device has is not known"),
    ],
)
def test_memory_that_does_not_suffice(there, monkeypatch, available, level, said):
    config = config_of()
    need = memory.estimate(config, debug_config(), config.mesh.mesh(), trains=True)
    limit = None if available is None else int((need.kept + need.peak) * available)
    if available == 0.5:
        assert limit is not None
        assert need.kept < limit < need.peak
    monkeypatch.setattr(memory, "device_memory", lambda mesh: limit)
    finding = named(looked_at(config), "memory")
    assert finding.level == level
    assert said in (finding.remedy or finding.value)


@pytest.mark.parametrize(("times", "level"), [(3.01, "ok"), (2.9, "note"), (0.9, "problem")])
def test_checkpoints_that_do_not_fit_on_the_disk(there, monkeypatch, times, level):
    """Of float32 parameters and AdamW's two moments; two stay, one is written."""
    size = 3 * 4 * sum(x.size for x in jax.tree.leaves(param_shapes(debug_config())))
    monkeypatch.setattr(machine, "free_disk", lambda _: int(times * size))
    found = list(about_config._memory(config_of(), debug_config(), Path()))
    finding = named(found, "checkpoints")
    assert finding.level == level
    assert ("checkpoint.keep=2 and the one" in finding.remedy) == (level != "ok")


def test_no_weights_are_read_and_no_code_is_run(there, tmp_path, monkeypatch):
    code = "raise SystemExit('it ran')\ndef f(prompt, completion): ...\ndef g(row): ...\n"
    (tmp_path / "work" / "mine.py").write_text(code)
    monkeypatch.setattr("gvpo_jax.models.load.load_model", None)
    monkeypatch.setattr("gvpo_jax.models.hf_files.open_file", None)
    found = looked_at(config_of(rewards__funcs=["mine.py:f"], data__filter="mine.py:g"))
    assert not levels(found)


MINE = """
import os.path
from functools import partial as made
if True:
    def inside(prompt, completion): ...
class Judge:
    def method(self): ...
first, second = made(print), lambda x: x
"""


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("mine.py:inside", None),
        ("mine.py:Judge", None),
        ("mine.py:made", None),
        ("mine.py:second", None),
        ("math:gcd", None),
        ("org/judge", None),  # a reward model of the hub
        ("mine.py:method", "the file has no method; it has Judge, first, inside, made, os, second"),
        ("gone.py:f", "there is no such file"),
        ("broken.py:f", "the file is no Python, line 1"),
        ("no_such_module.part:f", "there is no module no_such_module"),
        ("correct", "write module:function"),
    ],
)
def test_functions_are_looked_for_without_running_them(there, tmp_path, spec, told):
    (tmp_path / "work" / "mine.py").write_text(MINE)
    (tmp_path / "work" / "broken.py").write_text("def f(:\n")
    (tmp_path / "work" / "any.py").write_text("from mine import *\n")
    for changes, name in (
        ({"rewards__funcs": [spec]}, "rewards.funcs"),
        ({"eval__checker": spec}, "eval.checker"),
        ({"data__filter": spec}, "data.filter"),
    ):
        found = looked_at(config_of(**changes))
        if name != "rewards.funcs" and spec == "org/judge":
            continue
        if told is None:
            assert not levels(found)
        else:
            assert told in named(found, name).remedy
    assert not levels(looked_at(config_of(rewards__funcs=["any.py:whatever"])))


def test_a_run_that_samples_needs_a_reward(there):
    empty = looked_at(config_of(rewards__funcs=[]))
    assert "it is empty: name a reward" in named(empty, "rewards.funcs").remedy
    offline = config_of(rewards__funcs=[], loss__name="sft", data__eval_size=0)
    assert "rewards.funcs" not in levels(looked_at(offline))


def test_a_config_that_can_not_be_read_is_a_line(there, capsys):
    assert main(["doctor", "gone.yaml"]) == 1
    out = capsys.readouterr().out
    assert "! will not work:\n  config: there is no config file gone.yaml" in out
    assert main(["doctor", "debug", "loss.beta=0"]) == 1
    assert "config: loss.beta must be > 0" in capsys.readouterr().out
    assert main(["doctor", "debug", "mesh.fsdp=1"]) == 0


def test_json_is_one_object_with_all_of_it(there, capsys):
    assert main(["doctor", "debug", "mesh.fsdp=1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["works"] is True
    assert [*told] == ["works", "versions", "devices", "machine", "extras", "config"]
    assert {"name": "gvpo-jax", "value": "0.1.0", "level": "ok"} in told["versions"]
    add_tpu(there)
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["works"] is False
    (unused,) = [x for x in told["devices"] if x["name"] == "TPU unused"]
    assert unused["level"] == "problem"
    assert unused["page"] == Page.DEVICES.url


def test_json_tells_no_user_no_home_and_no_key(there, tmp_path, monkeypatch, capsys):
    home = tmp_path / "people" / "marvin"
    home.mkdir(parents=True)
    for name, value in {
        "HOME": str(home),
        "USER": "marvin",
        "HF_TOKEN": "hf_abcdefghijklmnop",
        "VLLM_API_KEY": "a-very-secret-key",
        "HF_HOME": str(home / "hub"),
    }.items():
        monkeypatch.setenv(name, value)
    Path("c.yaml").write_text(
        f"run: {{dir: {home}/runs}}\ndata: {{path: /scratch/marvin/gone.jsonl}}\n"
        "model: {name: ./a-very-secret-key}\n"
    )
    assert main(["doctor", "c.yaml", "--json"]) == 1
    out = capsys.readouterr().out
    assert "~/runs: " in out
    assert "~/hub/hub" in out
    assert "/scratch/USER/gone.jsonl" in out
    for secret in ("marvin", str(tmp_path / "people"), "hf_abc", "a-very-secret-key"):
        assert secret not in out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:secret@host/x", "https://...@host/x"),
        ("token hf_0123456789abcdef is", "token ... is"),
        ("/home/somebody/x and /Users/one", "/home/USER/x and /Users/USER"),
        (r"C:\Users\one\x", r"C:\Users\USER\x"),
        ("AKIA0123456789ABCDEF, github_pat_0123456789", "..., ..."),
        ("jax 0.10.2", "jax 0.10.2"),
    ],
)
def test_what_is_hidden(text, shown):
    assert findings.hide(text) == shown


def test_without_the_trainer_it_says_what_the_extra_brings(tmp_path):
    """With jax alone: whatever else is imported is not there."""
    code = """
import importlib.abc, importlib.metadata, sys

absent = ("flax", "optax", "orbax", "transformers", "yaml", "chex", "rich", "etils", "jinja2",
          "huggingface_hub", "safetensors", "tokenizers", "fsspec", "packaging", "filelock")

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in absent else found(name, *rest)
sys.meta_path.insert(0, Absent())
from gvpo_jax.cli import main
print(main(["init", "task"]), main(["doctor"]), main(["doctor", "task/config.yaml"]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 0 1"
    assert re.search(r"\n  trainer: .*pip install -U 'gvpo-jax\[train\]'\n", done.stdout)
    assert re.search(r"\n! will not work:\n  config: .*pip install", done.stdout)


def test_the_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].keys() - {"test", "dev", "docs"}
    assert installed.EXTRAS.keys() == extras
    page = (ROOT / "docs" / "install.md").read_text()
    for extra, (_, purpose) in installed.EXTRAS.items():
        assert f"| `{extra}` | {purpose} |" in page


def slug(heading: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", Page)
def test_every_page_that_errors_point_to_is_there(page):
    file, _, anchor = page.partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.M)
    assert anchor in map(slug, headings)
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert page.url == f"{urls['Repository']}/blob/main/{page}"


def test_every_page_is_pointed_to():
    used = set()
    for file in (ROOT / "gvpo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used |= {node.attr} if node.value.id == "Page" else set()
    assert used == {page.name for page in Page}


def test_the_innermost_page_stays_and_tracebacks_show_it():
    @explained_by(Page.ROWS)
    def outer(error):
        raise error

    with pytest.raises(UserError) as plain:
        outer(UserError("a line"))
    assert plain.value.page is Page.ROWS
    assert str(plain.value) == "a line"
    assert plain.value.__notes__ == [f"see {Page.ROWS.url}"]
    with pytest.raises(UserError) as own:
        outer(RewardError("a line"))
    assert own.value.page is Page.REWARD_FAILED
    assert UserError("a line").page is None
    with pytest.raises(ValueError, match="a bug") as other:
        outer(ValueError("a bug"))
    assert not hasattr(other.value, "page")


def test_the_starters_config_fits_a_machine_of_16_gib(there, monkeypatch):
    monkeypatch.setattr("gvpo_jax.memory.host_memory", lambda: 16 * GIB)
    config = load_config(ROOT / "configs" / "init" / "config.yaml", ["mesh.fsdp=1"])
    found = looked_at(config)
    assert named(found, "memory").value.endswith("a device has 16 GiB")
    assert not levels(found)
