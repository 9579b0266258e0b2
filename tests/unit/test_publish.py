"""The card of a model, and sending it to the hub: a stand-in speaks the hub's HTTP."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import small_run
import torch
import transformers
import yaml
from hub_stub import TOKEN, StubHub
from safetensors.numpy import load_file

from gvpo_jax import publish
from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.errors import UserError
from gvpo_jax.models.export import export_model
from gvpo_jax.models.load import load_model
from gvpo_jax.models.upload import check_repository, upload
from gvpo_jax.report.card import About, model_card, plain
from gvpo_jax.rundir.files import write_jsonl, write_text
from gvpo_jax.trainer import Trainer

# Of httpx, about how huggingface_hub sends LFS files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROWS = [{"prompt": f"prompt {i}"} for i in range(4)]
HELD_OUT = [{"prompt": f"question {i}"} for i in range(3)]


def a_share(prompt, completion):
    return completion.count("a") / 10


@pytest.fixture
def hub(monkeypatch):
    """The stand-in, in the hub's place, and a token for it."""
    with StubHub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run, and its trainer."""
    folder = tmp_path_factory.mktemp("published") / "my_run"
    trainer = Trainer(small_run.config(folder, eval__every=2))
    trainer.train(ROWS, a_share, eval_dataset=HELD_OUT)
    return folder, trainer


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "run"
    settings = {"model__lora__rank": 4, "model__lora__alpha": 8, "train__steps": 2}
    trainer = Trainer(small_run.config(folder, **settings))
    trainer.train(ROWS, a_share)
    return trainer


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = load_model("debug")
    return export_model(tmp_path_factory.mktemp("exported") / "model", model, model.params)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def parts_of(card: str) -> tuple[dict, str]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.S)
    assert match
    return yaml.safe_load(match[1]), card[match.end() :]


def table(card: str, head: str) -> list[list[str]]:
    """The lines of the table whose head begins so, as cells."""
    lines = card[card.index(head) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_a_run_is_pushed_whole(run, hub, tmp_path):
    folder, trainer = run
    url = trainer.push_to_hub("owner/name", private=True)
    assert url == f"{hub.url}/owner/name"
    sent, written = hub.repositories["owner/name"], files_of(folder / "export")
    assert sent.pop(".gitattributes") == b""
    assert sent == written
    assert {"README.md", "curves.svg", "model.safetensors", "tokenizer.json"} <= sent.keys()
    assert hub.private["owner/name"]

    got = hub.save("owner/name", tmp_path / "got")
    model = transformers.AutoModelForCausalLM.from_pretrained(got, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(got)
    ids = tokenizer("an apple").input_ids
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    theirs = [theirs[i, token].item() for i, token in enumerate(ids[1:])]
    ours = load_model(str(got)).params["embed"]["embedding"]
    np.testing.assert_array_equal(ours, model.get_input_embeddings().weight.detach().numpy())
    assert np.isfinite(theirs).all()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks
def test_an_adapter_is_pushed_alone(adapter_run, hub, tmp_path):
    written = tmp_path / "adapter"
    adapter_run.push_to_hub("name", written, adapter=True)
    sent = hub.repositories["me/name"]  # the token's owner
    assert {k: v for k, v in sent.items() if k != ".gitattributes"} == files_of(written)
    about, text = parts_of(sent["README.md"].decode())
    assert about["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in text

    adapter_run.save_pretrained(tmp_path / "merged")
    model = load_model("debug")
    export_model(tmp_path / "base", model, model.params)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    got = peft.PeftModel.from_pretrained(base, hub.save("me/name", tmp_path / "got"))
    merged = got.merge_and_unload().state_dict()
    whole = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(merged[name].numpy(), whole[name], atol=1e-6)


def test_what_was_there_of_an_earlier_export_goes(exported, hub):
    upload(exported, "me/name")
    files = hub.repositories["me/name"]
    earlier = (
        "model-00001-of-00002.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    )
    files |= dict.fromkeys([*earlier, "notes.md", "pytorch_model.bin"], b"older")
    upload(exported, "me/name")
    assert not files.keys() & set(earlier)
    assert {"notes.md", "pytorch_model.bin"} < files.keys()  # not ours
    assert files["config.json"] == (exported / "config.json").read_bytes()


def closed_port() -> int:
    with contextlib.closing(socket.socket()) as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


@pytest.mark.parametrize(
    ("part", "status", "says"),
    [
        ("repos/create", 401, "your token is not accepted there (401): hf auth login"),
        ("repos/create", 403, "you may not write there (403): give a name of your own"),
        ("repos/create", 400, "the hub says 400"),
        ("repos/create", 500, "the hub says 500"),
        ("preupload", 403, "you may not write there (403)"),
        ("preupload", 401, "your token is not accepted there (401)"),
        ("/lfs/objects", 403, "you may not write there (403)"),
        ("/commit/", 409, "it is taken, or something else is being written there (409)"),
        ("/commit/", 413, "the hub says 413"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_the_export_stays(exported, hub, part, status, says):
    before, hub.faults[part] = files_of(exported), status
    with pytest.raises(UserError) as caught:
        upload(exported, "owner/name")
    line = str(caught.value)
    assert line.startswith("owner/name was not sent to the hub: ")
    assert says in line
    assert line.endswith(f"hf upload owner/name {exported} sends it too")
    assert "\n" not in line
    assert TOKEN not in line
    assert files_of(exported) == before


def test_a_name_of_somebody_else(exported, hub):
    """Whether there is such a repository, or none."""
    hub.foreign.add("other")
    with pytest.raises(UserError, match=r"^other/new was .*\(403\): give a name of your own"):
        upload(exported, "other/new")
    hub.repositories["other/name"] = {"config.json": b"theirs"}
    with pytest.raises(UserError, match=r"^other/name was .*\(403\): give a name of your own"):
        upload(exported, "other/name")
    assert hub.repositories["other/name"] == {"config.json": b"theirs"}


def test_what_shall_be_private_is_not_put_where_all_can_see_it(exported, hub):
    hub.repositories["me/name"] = {}
    with pytest.raises(UserError, match="is there already, and public: make it private") as caught:
        upload(exported, "me/name", private=True)
    assert "hf upload" not in str(caught.value)  # which would show it to all
    assert hub.repositories["me/name"] == {}
    hub.private["me/name"] = True
    upload(exported, "me/name", private=True)
    assert "config.json" in hub.repositories["me/name"]


def test_without_a_login_without_a_network_and_told_to_stay_offline(
    exported, hub, monkeypatch, tmp_path
):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(UserError, match=r"the hub can't be reached, or broke off \("):
        upload(exported, "me/name")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: unset it"):
        upload(exported, "me/name")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="you are not logged in: hf auth login, or HF_TOKEN"):
        upload(exported, "me/name")
    assert not hub.requests


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "../x", "-a", "a--b", "x" * 97, "a/", "ü"])
def test_names_that_no_repository_has(name, run, hub):
    folder, trainer = run
    with pytest.raises(UserError, match="is no name for a repository of the hub: give NAME or"):
        trainer.push_to_hub(name, folder / "never")
    assert not (folder / "never").exists()
    assert not hub.requests


def test_a_start_model_in_a_folder_is_not_told_by_its_path(hub, exported, tmp_path):
    model = load_model(str(exported))
    assert model.name == str(exported)
    folder = export_model(tmp_path / "out", model, model.params)
    assert json.loads((folder / "gvpo_jax_export.json").read_text())["start_model"] == model.name
    upload(folder, "me/name")
    received = b"".join([*hub.bodies, *hub.repositories["me/name"].values()])
    assert b"config.json" in received
    assert "gvpo_jax_export.json" not in hub.repositories["me/name"]
    assert str(tmp_path).encode() not in received
    assert str(exported).encode() not in received


@pytest.mark.parametrize(
    ("start", "is_place"),
    [
        ("Qwen/Qwen3-0.6B", False),
        ("debug", False),
        ("package://models/x.gguf", False),
        ("/home/x/base", True),
        ("./base", True),
        ("~/base", True),
        ("my/own/base", True),
        ("gs://bucket/base", True),
    ],
)
def test_the_command_that_sends_it_later_sends_no_more(hub, exported, tmp_path, start, is_place):
    folder = tmp_path / "an export"
    shutil.copytree(exported, folder)
    (folder / "gvpo_jax_export.json").write_text(json.dumps({"start_model": start}))
    hub.faults["repos/create"] = 500
    with pytest.raises(UserError) as caught:
        upload(folder, "me/name", private=True)
    end = " . --exclude gvpo_jax_export.json" if is_place else ""
    command = f"hf upload me/name '{folder}' --private{end} sends it too"
    assert str(caught.value).endswith(command)


def test_an_adapter_beside_a_base_in_a_folder_is_not_sent(hub, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/x/base"}')
    with pytest.raises(UserError, match="names the base by a path of this machine"):
        upload(tmp_path, "me/name")
    assert not hub.requests


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    keep |= {"HF_HUB_DISABLE_XET": "1", "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-m", "gvpo_jax", "export", *map(str, arguments)]
    return subprocess.run(command, env=keep, capture_output=True, text=True)


def test_the_command_pushes_and_fails_in_one_line(run, tmp_path):
    folder, _ = run
    with StubHub() as hub:
        there = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
        out = tmp_path / "out"
        done = command(folder, out, "--push", "me/name", "--private", **there)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{out}, and at {hub.url}/me/name\n"
        assert hub.private["me/name"]
        sent = hub.repositories["me/name"]
        assert {k: v for k, v in sent.items() if k != ".gitattributes"} == files_of(out)

        hub.faults["preupload"] = 403
        other = tmp_path / "other"
        done = command(folder, other, "--push", "me/other", **there)
        assert done.returncode == 2
        assert done.stderr.startswith("gvpo-jax: error: me/other was not sent to the hub: you may")
        assert done.stderr.count("\n") == 1
        assert (other / "model.safetensors").read_bytes() == sent["model.safetensors"]
    done = command(folder, tmp_path / "third", "--private", HF_ENDPOINT=hub.url)
    assert done.returncode == 2
    assert done.stderr == "gvpo-jax: error: --private is for --push NAME: give that too\n"


def test_the_card_tells_data_results_and_settings(run):
    folder, trainer = run
    trainer.save_pretrained(folder / "export")
    about, text = parts_of((folder / "export" / "README.md").read_text())
    assert about["library_name"] == "transformers"
    assert about["tags"] == ["gvpo", "gvpo-jax", "generated_from_trainer"]
    assert "base_model" not in about  # debug is none of the hub
    assert text.startswith("\n# my\\_run\n")
    assert "arxiv.org/abs/2504.19599" in text
    assert "after 4 updates" in text
    assert "- Reward: a\\_share" in text

    ((title, count, before, after),) = table(text, "|  | questions |")
    summary = json.loads((folder / "summary.json").read_text())
    assert title == "Held-out accuracy"
    assert count == "3"
    for told, name in ((before, "before"), (after, "after")):
        values = [summary[f"eval/accuracy_{name}{end}"] for end in ("", "_low", "_high")]
        assert told == "{:.1%} [{:.1%}, {:.1%}]".format(*values)

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = {str(row["step"]): row for row in rows if "reward" in row}
    curve = table(text, "| updates | reward |")
    assert [line[0] for line in curve] == ["1", "2", "3", "4"]
    for step, reward, *_ in curve:
        assert float(reward) == pytest.approx(trained[step]["reward"], rel=1e-2, abs=1e-9)

    settings = dict(table(text, "| setting |"))
    assert settings["optimizer.learning\\_rate"] == "0.003"
    assert settings["train.steps"] == "4"
    assert not [name for name in settings if name.startswith(("run.", "mesh.", "log."))]
    picture = ET.parse(folder / "export" / "curves.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    titles = [e.text for e in picture.iter() if e.get("class") == "title"]
    assert titles == ["Training reward", "Held-out accuracy", "Divergence from the reference"]


def test_the_card_of_an_earlier_step_tells_nothing_of_later_ones(run):
    folder, trainer = run
    card = publish.card_of(
        trainer.config, "debug", run_dir=folder, step=2, adapter=False, hub_name=None
    )["README.md"]
    assert "after 2 updates" in card
    assert [line[0] for line in table(card, "| updates | reward |")] == ["1", "2"]
    assert "| questions | before | step 2 |" in card


def test_weights_that_are_of_no_run_have_no_curves(run, tmp_path):
    """Though the folder of the settings holds a run, of other weights."""
    folder, trainer = run
    other = Trainer(trainer.config)
    other.save_pretrained(tmp_path / "fresh")
    other.restore(folder)
    other.save_pretrained(tmp_path / "restored")
    other.train_step(["1 + 1 ="], [["2", "3"]], [[1.0, 0.0]])
    other.save_pretrained(tmp_path / "stepped")
    cards = {x: (tmp_path / x / "README.md").read_text() for x in ("fresh", "restored", "stepped")}
    assert ["updates | reward" in card for card in cards.values()] == [False, True, False]
    assert not (tmp_path / "stepped" / "curves.svg").exists()


def test_a_broken_run_file_costs_the_curves_alone(run, tmp_path, capsys):
    _, trainer = run
    write_text(tmp_path / "metrics.jsonl", 'no json\n{"step": 1}\n')
    how = {"run_dir": tmp_path, "step": 1, "adapter": False, "hub_name": None}
    card = publish.card_of(trainer.config, "debug", **how)
    assert list(card) == ["README.md"]
    assert "the card is written without curves and scores" in capsys.readouterr().err


def test_scores_of_tasks_and_of_votes(tmp_path):
    rows = [
        {"prompt": f"{task} {i}", "reward": float(i < right), "columns": {"task": task}}
        for task, right in (("a|b", 4), ("<c>", 1))
        for i in range(4)
    ]
    write_jsonl(tmp_path / "eval" / "step_000002.jsonl", rows)
    metrics = {"eval/pass@4": 0.5, "eval/pass@4_low": 0.25, "eval/pass@4_high": 0.75}
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 2, **metrics}])
    card = model_card(About("n", "b", False, False, "gvpo"), tmp_path, 2)["README.md"]
    lines = table(card, "|  | questions | step 2 |")
    assert [line[:2] for line in lines] == [
        ["Held-out accuracy", "8"],
        ["&lt;c&gt;", "4"],
        ["a\\|b", "4"],
        ["pass&#64;4", ""],
    ]
    assert [line[2].split()[0] for line in lines] == ["62.5%", "25.0%", "100.0%", "50.0%"]
    assert lines[-1][2] == "50.0% [25.0%, 75.0%]"


NASTY = "*a* [b](http://x.y) <img src=x> `c` $d$ |e| #f @g ![h](i)\n---\n# j \ud800 \u202e"


def test_texts_of_others_are_no_markdown(tmp_path):
    write_jsonl(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 0.5, f"rewards/{NASTY}": 1.0}])
    about = About(NASTY, NASTY, False, False, "gvpo", [NASTY], [], [], {NASTY: NASTY})
    card = model_card(about, tmp_path, 1)["README.md"]
    front, text = parts_of(card)
    assert front["tags"][0] == "gvpo"
    assert text.count("\n# ") == 1
    for mark in ("<img", "](http://x", "`c`", " |e| ", " *a* ", "@g", "\n---\n", "\u202e"):
        assert mark not in text
    assert not re.search(r"(?<!\\)\]\(i\)", text)  # escaped it is no picture
    for line in text.splitlines():  # a table's lines have as many cells as its head
        if line.startswith("| \\*a"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert plain("a_b & c~d") == "a\\_b &amp; c\\~d"
    load = load_model("debug")
    folder = export_model(tmp_path / "out", load, load.params, texts={"README.md": card})
    assert (folder / "README.md").read_text().startswith("---\n")  # lone surrogates too


def test_no_places_and_no_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_API_KEY", "sesame-open-123")
    monkeypatch.chdir(tmp_path)
    config = override(
        Config(),
        run__dir="/home/anna/secret/runs/x",
        model__name="/home/anna/models/base",
        data__path="/home/anna/data/rows.jsonl",
        data__eval_path="s3://user:pw@bucket/held.jsonl?sig=abc",
        data__system_prompt="look at /home/anna/notes/plan.txt, say sesame-open-123",
        data__template_arguments={
            "url": "https://u:p@host/x?key=1",
            "home": "/home/anna",
            "windows": "C:\\Users\\anna\\x",
            "filler": "x" * 61,
            "cut": "sesame-open-123",
        },
        rewards__funcs=["/home/anna/code/reward.py:f"],
        servers__kind="vllm",
        servers__urls=["http://10.0.0.1:8000"],
        servers__weights_dir="/home/anna/w",
        servers__api_key_env="MY_API_KEY",
    )
    how = {"run_dir": None, "step": 0, "adapter": False, "hub_name": "me/x"}
    card = publish.card_of(config, config.model.name, **how)["README.md"]
    for secret in ("anna", "sesame", "u:p", "pw", "sig=", "key=1", "10.0.0.1", "8000", "MY_API"):
        assert secret not in card, secret
    settings = dict(table(card, "| setting |"))
    assert settings["data.path"] == "rows.jsonl"
    assert settings["data.eval\\_path"] == "held.jsonl"
    assert settings["rewards.funcs"] == "reward.py:f"
    assert settings["servers.kind"] == "vllm"
    assert settings["data.system\\_prompt"] == "look at plan.txt, say ..."
    assert "This is base, trained with" in card


def test_a_file_that_is_elsewhere_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = about_base("Qwen/Qwen3-0.6B", tmp_path, data__path="data/train.jsonl")
    assert "datasets" not in head
    head = about_base("Qwen/Qwen3-0.6B", tmp_path, data__path="openai/gsm8k")
    assert head["datasets"] == ["openai/gsm8k"]


def about_base(name: str, tmp_path: Path, **settings: object) -> dict:
    config = override(Config(), model__name=name, **settings)
    how = {"run_dir": None, "step": 0, "adapter": False, "hub_name": "me/x"}
    return parts_of(publish.card_of(config, name, **how)["README.md"])[0]


def test_a_base_of_the_hub_and_its_licence(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link = {"license": "other", "license_name": "qwen", "license_link": "https://x.org/l"}
    hub.cards = {"Qwen/Q": {"license": "apache-2.0"}, "Qwen/R": link, "Qwen/S": {"license": ["a"]}}
    hub.cards["Qwen/T"] = link | {"license_link": "LICENSE"}
    about = about_base("Qwen/Q", tmp_path, data__path="openai/gsm8k", data__name="main")
    assert about["base_model"] == "Qwen/Q"
    assert about["license"] == "apache-2.0"
    assert about["datasets"] == ["openai/gsm8k"]
    assert {k: v for k, v in about_base("Qwen/R", tmp_path).items() if k in link} == link
    assert "license" not in about_base("Qwen/S", tmp_path)
    assert "license_link" not in about_base("Qwen/T", tmp_path)
    assert "license" not in about_base("Qwen/none", tmp_path)
    hub.faults["/api/models"] = 500
    assert "license" not in about_base("Qwen/Q", tmp_path)


def test_a_base_in_a_folder_and_what_it_began_with(tmp_path):
    folder = tmp_path / "base"
    write_text(folder / "README.md", "---\nlicense: mit\n---\n# A base\n")
    write_text(folder / "gvpo_jax_export.json", "{}")
    assert about_base(str(folder), tmp_path)["license"] == "mit"
    for broken in ("---\nlicense: [\n---\n", "---\na: &a x\nlicense: *a\n---\n", "license: mit"):
        write_text(folder / "README.md", broken)
        assert "license" not in about_base(str(folder), tmp_path)
    write_text(folder / "gvpo_jax_export.json", '{"start_model": "Qwen/Q"}')
    assert publish.start_of(str(folder)) == "Qwen/Q"


def test_other_methods_are_not_called_gvpo():
    for name in ("grpo", "sft"):
        about = About("n", "b", False, False, name)
        front, text = parts_of(model_card(about, None, 0)["README.md"])
        assert front["tags"][0] == name
        assert "gvpo" not in [tag for tag in front["tags"] if tag != "gvpo-jax"]
        assert "2504.19599" not in text


def test_a_card_that_was_changed_by_hand_is_not_replaced(tmp_path):
    model = load_model("debug")
    texts = {"README.md": "# Mine\n"}
    folder = export_model(tmp_path / "out", model, model.params, texts=texts)
    export_model(folder, model, model.params, texts=texts)  # as it was written
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("Mine", "Yours"))
    with pytest.raises(UserError, match=r"README.md was written or changed by hand"):
        export_model(folder, model, model.params, texts=texts)
    assert "Yours" in (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    export_model(folder, model, jax.tree.map(np.zeros_like, model.params))
    assert not (folder / "README.md").exists()


def test_an_adapter_that_is_not_there(run, hub):
    folder, trainer = run
    with pytest.raises(UserError, match="there is no adapter"):
        trainer.push_to_hub("me/name", folder / "never", adapter=True)
    assert not hub.requests


def test_the_name_is_checked_as_the_hub_does():
    for name in ("name", "owner/name", "Qwen2.5-0.5B", "a_b.c"):
        check_repository(name)
