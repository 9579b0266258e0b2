from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gvpo_jax.config import Config
from gvpo_jax.config_file import check_claim, claim, load_config, open_run, override
from gvpo_jax.errors import UserError
from gvpo_jax.rundir.claim import RunConfig, clear
from gvpo_jax.trainer import Trainer


@pytest.fixture
def config(tmp_path):
    return override(Config(), run__dir=str(tmp_path / "runs" / "one"), train__steps=4)


def contents(folder):
    """Every path below a folder with its bytes and time of writing; None for folders."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else None
        for path in folder.rglob("*")
    }


def refused(config, match):
    """Neither `claim` nor `check_claim` takes the folder, and nothing in or around it changes."""
    around = Path(config.run.dir).parent
    before = contents(around)
    for function in (claim, check_claim):
        with pytest.raises(UserError, match=match) as error:
            function(config)
        assert "\n" not in str(error.value)
    assert contents(around) == before


def test_a_new_folder_is_made_and_marked(config, tmp_path):
    assert check_claim(config) == tmp_path / "runs" / "one"
    assert not (tmp_path / "runs").exists()
    folder = claim(config)
    assert folder == tmp_path / "runs" / "one"
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert load_config(folder / "config.yaml") == config


def test_an_empty_folder_will_do(config, tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert (claim(config) / "config.yaml").is_file()


def test_the_same_config_finds_its_run_again(config):
    folder = claim(config)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    assert claim(config) == folder
    assert claim(override(config, train__stop_at=2, checkpoint__every=1, log__samples=0)) == folder
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_another_config_is_refused_and_nothing_is_touched(config):
    folder = claim(config)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "1").write_bytes(b"weights")
    refused(override(config, loss__beta=0.2), r"other settings \(loss.beta=0.1\); give those, or")
    refused(override(config, loss__beta=0.2, run__seed=1), r"\(run.seed=0, loss.beta=0.1\)")


def test_a_start_that_came_to_no_update_may_be_tried_again_with_other_settings(config):
    folder = claim(config)
    (folder / "checkpoints").mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.5}\n')
    other = override(config, loss__beta=0.2)
    assert claim(other) == folder
    assert load_config(folder / "config.yaml") == other


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    refused(config, "exists and is not a run folder; choose another run.dir")


def test_a_file_in_the_way_is_refused(config, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "one").write_text("years of work")
    refused(config, "exists and is not a run folder")
    below = override(config, run__dir=str(tmp_path / "runs" / "one" / "below"))
    with pytest.raises(UserError, match=r"can't use run.dir=.*below: "):
        claim(below)
    assert (tmp_path / "runs" / "one").read_text() == "years of work"


def test_a_run_whose_settings_are_broken_is_refused(config):
    folder = claim(config)
    (folder / "config.yaml").write_text("loss: {bata: 1}\n")
    refused(config, "config.yaml: unknown setting loss.bata: did you mean 'beta'")


def test_steps_may_grow_where_the_learning_rate_is_constant(config):
    folder = claim(config)
    longer = override(config, train__steps=6)
    claim(longer)
    assert load_config(folder / "config.yaml").train.steps == 6
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    refused(
        config, r"\(train.steps=6\); give those \(train.steps may only grow; train.stop_at ends"
    )  # 6 updates can't become 4
    refused(override(longer, train__steps=8, loss__beta=0.2), r"\(loss.beta=0.1\); give those, or")


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_steps_may_not_grow_where_the_schedule_counts_them(config, schedule):
    decaying = override(config, optimizer__schedule=schedule)
    (claim(decaying) / "metrics.jsonl").write_text('{"step": 1}\n')
    refused(override(decaying, train__steps=6), r"\(train.steps=4\)")


def test_open_run_gives_the_config_where_the_folder_lies_now(config, tmp_path):
    moved = claim(config).rename(tmp_path / "moved")
    opened = open_run(moved)
    assert opened == override(config, run__dir=str(moved))
    assert open_run(moved, ["loss.beta=0.3", "run.dir=elsewhere"]).loss.beta == 0.3
    assert open_run(moved, ["run.dir=elsewhere"]).run.dir == str(moved)
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.yaml"):
        open_run(tmp_path)
    with pytest.raises(UserError, match="is not a run folder"):
        open_run(tmp_path / "nowhere")


def test_python_too_keeps_compiled_programs(config, tmp_path):
    """Also where JAX has compiled something before, and so asked for a cache."""
    before, compiled = jax.config.jax_compilation_cache_dir, tmp_path / "compiled"
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        RunConfig(compilation_cache="/dev/null/compiled").keep_compiled()  # can't be written
        assert jax.config.jax_compilation_cache_dir is None
        jax.jit(lambda x: x + 17.25)(1.0)
        Trainer(override(config, run__compilation_cache=str(compiled), mesh__fsdp=1))
        jax.jit(lambda x: x + 18.25)(1.0)
        assert any(compiled.iterdir())
        RunConfig(compilation_cache=str(tmp_path / "other")).keep_compiled()
        assert jax.config.jax_compilation_cache_dir == str(compiled)  # the first one stays
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_overwriting_takes_a_run_with_other_settings_once(config):
    folder = claim(config)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    other = override(config, loss__beta=0.2)
    refused(other, "or start over with run.overwrite=true")
    assert claim(override(other, run__overwrite=True)) == folder
    assert open_run(folder) == other  # who goes on with it does not start over


def test_overwriting_refuses_a_folder_of_something_else(config, tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "notes.txt").write_text("mine")
    refused(override(config, run__overwrite=True), "not a run folder")


@pytest.mark.parametrize("name", ["exp[1]", "a]b", "a\\b"])
def test_a_folder_whose_checkpoints_could_not_be_read_is_refused_at_once(tmp_path, name):
    with pytest.raises(UserError, match="Orbax can't read checkpoints from a folder with"):
        check_claim(override(Config(), run__dir=str(tmp_path / name / "run")))
    assert not (tmp_path / name).exists()


def test_clearing_removes_what_a_run_writes_and_nothing_else(tmp_path):
    ours = ["checkpoints/4/params/x", "completions/step_000001.jsonl", "eval/after.jsonl"]
    ours += ["metrics.jsonl", "summary.json", "report.html", "weights/v1/x"]
    theirs = ["config.yaml", "notes.txt", "export/model.safetensors", "data/rows.jsonl"]
    for name in ours + theirs:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    clear(tmp_path)
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == sorted(theirs)
    clear(tmp_path)  # there is nothing to remove
