"""README and docs: every code block runs, every link leads somewhere, and the sentences are short.

A page's blocks run in their order, in a folder of their own. A block's second word is a file that
it is written to: ```json train.jsonl.
"""

import dataclasses
import json
import os
import re
import shlex
import statistics
import tomllib
import traceback
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import pytest
import yaml

import gvpo_jax
import gvpo_jax.integrations.tunix
from gvpo_jax.cli import main
from gvpo_jax.config import Config
from gvpo_jax.config_file import load_config, settings_page
from gvpo_jax.models.decoder import Decoder
from gvpo_jax.settings import all_settings

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
GENERATED = "docs/settings.md"  # by `python -m gvpo_jax.config_file`
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page != GENERATED]

# What a test takes in place of what the page says: nothing is downloaded, all takes seconds.
REPLACED = {
    "Qwen/Qwen2.5-0.5B-Instruct": "debug",
    "configs/quickstart.yaml": "configs/debug.yaml",
    "configs/qwen2.5-math-7b.yaml": "configs/debug.yaml",
    "v5e:8x8": "v5e:2x2 --only reference",
    "train__steps=20": "train__steps=2, mesh__fsdp=1",
    "max_completion_length=32": "max_completion_length=8",
    "max_completion_length: 32": "max_completion_length: 8",
}
# What is added to each `gvpo-jax train`.
SHORTER = ["train.steps=2", "train.batch_size=4", "data.eval_size=2", "mesh.fsdp=1"]

# Beginnings of commands that do not run here, and why.
CANNOT_RUN = {
    "python3 -m venv .venv ": "installs; .ci/run trains an update of the quickstart",
    "python3 -m venv .venv-test ": "installs, and runs the tests; .ci/run runs it",
    "pip install ": "installs",
    "VLLM_SERVER_DEV_MODE=1 vllm serve ": "vLLM is not installed with the tests",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve ": "vLLM is not installed with the tests",
    "python -m sglang.launch_server ": "SGLang is not installed with the tests",
    "gvpo-jax train configs/servers.yaml ": "needs a server",
    "gvpo-jax eval runs/servers ": "needs the run of the line above it",
    "gvpo-jax eval runs/math ": "needs the sets of the hub; test_eval_sets.py has stand-ins",
    "gvpo-jax eval eval/math ": "needs the sets of the hub; test_eval_sets.py has stand-ins",
    "gvpo-jax export runs/math": "needs that run",
    "lm_eval ": "is not installed with the tests",
    "python experiments/bench/run.py": "takes long; test_experiments.py runs its small size",
}

# What a page takes for granted.
PRELUDE = {
    "README.md": """
import types
import jax.numpy as jnp
params = jnp.zeros(16)
batch = types.SimpleNamespace(ref_logps=jnp.zeros(16), rewards=jnp.arange(16.0))
sequence_logps = lambda params, batch: params - 1.0
""",
    "docs/models.md": """
import jax.numpy as jnp
from gvpo_jax.models.debug import debug_tokenizer
params, tokenizer = {"table": jnp.ones((260, 4))}, debug_tokenizer()
hidden = lambda params, tokens: params["table"][tokens]
head = lambda params: params["table"]
""",
    "docs/tunix.md": "rl_cluster, reward_fns, dataset = 'cluster', ['reward'], ['row']",
}

OLD_NAMES = {"rollout.engine", "rollout.servers"}  # which docs/servers.md explains
SECTIONS = {f.name: type(getattr(Config(), f.name)) for f in dataclasses.fields(Config)}


class Block(NamedTuple):
    place: str
    language: str
    file: str
    text: str


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[Block]:
    text = read(page)
    found = re.finditer(r"^```(\w*) ?(\S*)\n(.*?)^```$", text, re.M | re.S)
    found = [Block(f"{page}:{text[: m.start()].count(chr(10)) + 1}", *m.groups()) for m in found]
    assert len(found) == text.count("```") / 2
    return found


def commands(block: Block) -> list[str]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def replaced(text: str) -> str:
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    return text


def reason(command: str) -> str | None:
    return next((why for start, why in CANNOT_RUN.items() if command.startswith(start)), None)


def run_python(block: Block, namespace: dict) -> None:
    exec(compile(replaced(block.text), block.place, "exec"), namespace)


def run_yaml(block: Block, namespace: dict) -> None:
    file = Path(block.file or "block.yaml")
    file.write_text(replaced(block.text))
    assert isinstance(load_config(file), Config)


def run_sh(block: Block, namespace: dict) -> None:
    for command in commands(block):
        if reason(command):
            continue
        name, *arguments = shlex.split(replaced(command), comments=True)
        assert name == "gvpo-jax", f"{block.place}: say in CANNOT_RUN why {command!r} does not run"
        shorter = SHORTER if arguments[0] == "train" else []
        assert main([*arguments, *shorter]) == 0, f"{block.place}: {command}"


def run_json(block: Block, namespace: dict) -> None:
    assert [json.loads(line) for line in block.text.splitlines()]


RUN = {"python": run_python, "yaml": run_yaml, "sh": run_sh, "json": run_json}


class Learner:
    """Stands in for Tunix's learner, which needs a cluster; test_tunix.py has the real one."""

    def __init__(self, rl_cluster, algo_config, reward_fns):
        assert (rl_cluster, reward_fns) == ("cluster", ["reward"])
        assert algo_config.beta == 0.1
        assert algo_config.num_generations == 8

    def train(self, dataset):
        assert dataset == ["row"]


@pytest.fixture
def tunix(monkeypatch):
    """A learner that trains nothing; what importing Tunix changes is put back."""
    before, strict = flax.config.flax_always_shard_variable, jax.config.jax_numpy_rank_promotion
    monkeypatch.setattr(gvpo_jax.integrations.tunix, "gvpo_learner", Learner)
    yield
    flax.config.update("flax_always_shard_variable", before)
    jax.config.update("jax_numpy_rank_promotion", strict)


@pytest.mark.slow
@pytest.mark.usefixtures("tunix")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Tunix's
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_every_code_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "page"}
    exec(PRELUDE.get(page, ""), namespace)
    for block in blocks(page):
        if block.file:
            Path(block.file).write_text(replaced(block.text))
        if block.language != "text":  # a picture
            assert block.language in RUN, f"{block.place}: what language is {block.language!r}?"
            RUN[block.language](block, namespace)


def test_what_is_replaced_or_left_out_is_in_the_docs():
    everything = [block for page in PAGES for block in blocks(page)]
    for old in REPLACED:
        assert any(old in block.text for block in everything), f"no page has {old!r}"
    shell = [line for b in everything if b.language == "sh" for line in commands(b)]
    for start in CANNOT_RUN:
        assert any(line.startswith(start) for line in shell), f"no page has {start!r}"


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_every_setting_that_is_named_exists(page):
    text = re.sub(r"\w+\.(py|md|json|jsonl|yaml|html|svg)\b", "", read(page))
    if page == "docs/verl.md":  # the first column has verl's names
        text = re.sub(r"^\|[^|]*\|", "", text, flags=re.MULTILINE)
    sections = "|".join(SECTIONS)
    named = set(re.findall(rf"(?<![\w./-])({sections})(\.|__)([a-z]\w*)", text))
    for section, _, key in named:
        if f"{section}.{key}" not in OLD_NAMES:
            assert hasattr(SECTIONS[section](), key), f"{page}: there is no {section}.{key}"


@pytest.mark.slow
def test_every_metric_of_a_run_is_explained(tmp_path):
    settings = ["train.steps=3", "replay.completions=2", "eval.every=2", "mesh.fsdp=1"]
    run = tmp_path / "run"
    assert main(["train", "configs/debug.yaml", f"run.dir={run}", *settings]) == 0
    lines = (run / "metrics.jsonl").read_text().splitlines()
    written = {name for line in lines for name in json.loads(line)}
    explained = set(re.findall(r"`([\w/]+)`", read("docs/runs.md")))
    explained |= {"source/replay/staleness", "source/policy/share", "rewards/letter_share"}
    patterns = [name.replace("NAME", r"\w+") for name in explained]
    missing = {n for n in written if not any(re.fullmatch(p, n) for p in patterns)}
    assert not missing
    assert {"reward", "padding", "source/replay/staleness", "eval/unscored"} <= written


def slug(heading: str) -> str:
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", read(page)):
        if "://" in target:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: there is no {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert anchor in map(slug, headings), f"{page}: {target} has no heading {anchor}"


def sentences(text: str) -> list[str]:
    """The sentences of a page, without code, tables, headings and pictures; code is one word.

    An item of a list is a sentence of its own, unless what comes before it ended in a comma or in
    no mark: then it goes on with that sentence.
    """
    for pattern in (r"^```.*?^```$", r"<!--.*?-->", r"^(#|\||    |!\[).*?$"):
        text = re.sub(pattern, "\n\n:\n\n", text, flags=re.M | re.S)  # ends a sentence
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^ *([-*]|\d+\.) ", "\n\n", text, flags=re.M).replace("e.g.", "eg")
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    joined = ""
    for paragraph in filter(None, paragraphs):
        joined += paragraph + ("\n" if re.search(r"[.:!?][)*]*$", paragraph) else " ")
    parts = re.split(r"(?<=[.!?])[)*]*\s+|\n", joined)
    return [part for part in parts if re.search(r"\w", part)]


def words(sentence: str) -> int:
    return len([word for word in sentence.split() if re.search(r"\w", word)])


def test_sentences_are_counted_fairly():
    text = (
        "# A heading\n\nOne two `a b c` four. Five (see [six seven](x.md)).\n\n"
        "```sh\ncode\n```\n\nIt has\n\n- this,\n- and that.\n\nIt has\n\n| a | table |\n\n"
        "- **Bold.** Is version 0.1.7, e.g.\n  on two lines: yes.\n"
    )
    assert [words(sentence) for sentence in sentences(text)] == [4, 4, 5, 2, 1, 8]


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_sentences_are_short(page):
    found = sentences(read(page))
    mean = statistics.fmean(map(words, found))
    longest = sorted(found, key=words)[-5:]
    shown = "".join(f"\n  {words(sentence)} words: {sentence}" for sentence in longest)
    assert mean < 18, f"{page}: {mean:.1f} words a sentence; the longest are{shown}"
    assert words(longest[-1]) <= 40, f"{page}: a sentence too long{shown}"


def test_the_readme_is_short_and_begins_with_two_lines_to_paste():
    assert len(read("README.md").splitlines()) < 150
    first, second = [block for block in blocks("README.md") if block.language == "sh"][:2]
    for block, environment in ((first, ".venv"), (second, ".venv-test")):
        assert len(block.text.splitlines()) == 1
        assert block.text.startswith(f"python3 -m venv {environment} && ")
    assert "gvpo-jax train" in first.text
    assert "pytest" in second.text


def test_the_way_from_the_command_to_the_gradient_is_short_and_as_told():
    text = read("CONTRIBUTING.md")
    walk = text[text.index("<!-- walk -->") : text.index("<!-- /walk -->")]
    steps = re.findall(r"^\d+\. .*?`([\w/]+\.py):([\w.]+)`", walk, re.M)
    assert 3 <= len(steps) <= 9
    assert len(steps) == len(re.findall(r"^\d+\. ", walk, re.M))
    for file, name in steps:
        assert (ROOT / file).is_file(), f"there is no {file}"
        for part in name.split("."):
            defined = rf"^\s*(def|class) {part}\b"
            assert re.search(defined, read(file), re.M), f"{file} has no {name}"


def test_the_map_has_every_folder():
    folders = {path.parent.name for path in (ROOT / "gvpo_jax").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "gvpo_jax").glob("*.py")} - {"__init__", "__main__"}
    rows = re.findall(r"^\| (`.*?) \|", read("CONTRIBUTING.md"), re.M)
    assert set(re.findall(r"`(\w+)/?`", " ".join(rows))) >= folders | files


def test_versions_are_written_alike():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert yaml.safe_load(read("CITATION.cff"))["version"] == gvpo_jax.__version__
    assert f"## {gvpo_jax.__version__}" in read("CHANGELOG.md")
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    (ruff,) = [hook["rev"] for hook in hooks if hook["repo"].endswith("/ruff-pre-commit")]
    assert f"ruff=={ruff.removeprefix('v')}" in project["optional-dependencies"]["dev"]
    for job in yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"].values():
        pythons = [
            f"Programming Language :: Python :: {x}" for x in job["strategy"]["matrix"]["python"]
        ]
        assert set(pythons) == {x for x in project["classifiers"] if ":: Python :: 3." in x}


def test_the_settings_page_is_that_of_this_config():
    text = read("docs/settings.md")
    assert text == settings_page(), "run: python -m gvpo_jax.config_file > docs/settings.md"
    for setting in all_settings(Config()):
        assert f"| `{setting.key}` |" in text
        assert setting.about["description"].endswith(".") or "..." in text


def test_the_walk_is_the_way_that_a_run_takes(tmp_path, monkeypatch):
    """The functions of this package that are under way when the model runs forward in an update."""
    seen = []
    forward = Decoder.__call__

    def spy(self, *arguments, **options):
        frames = [f for f in traceback.extract_stack() if f"{os.sep}gvpo_jax{os.sep}" in f.filename]
        seen.append([frame.name for frame in frames])
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Decoder, "__call__", spy)
    settings = ["train.steps=1", "data.eval_size=0", "mesh.fsdp=1"]
    assert main(["train", "debug", f"run.dir={tmp_path}", *settings]) == 0
    text = read("CONTRIBUTING.md")
    walk = text[text.index("<!-- walk -->") : text.index("<!-- /walk -->")]
    told = [name.split(".")[-1] for name in re.findall(r"^\d+\. `[\w/]+\.py:([\w.]+)`", walk, re.M)]
    updates = [names[: len(told)] for names in seen if "train_step" in names]
    assert updates
    assert updates[0] == told
