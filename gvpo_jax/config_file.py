"""A config as a file: YAML with `key=value` on top, and what a resumed run may change."""

import dataclasses
import difflib
import functools
import glob
import itertools
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gvpo_jax.rundir  # noqa: F401  it says what to install where yaml is not there

# isort: split
import yaml

from gvpo_jax.buckets import is_address
from gvpo_jax.config import Config
from gvpo_jax.config_values import Bare, as_any, as_record, put, read_overrides, read_yaml, shown
from gvpo_jax.errors import Page, UserError
from gvpo_jax.installed import PACKAGED
from gvpo_jax.parallel.distributed import DistributedConfig
from gvpo_jax.rewards.load import is_reward_model
from gvpo_jax.rewards.trust import OWN_REWARDS, unknown
from gvpo_jax.rundir.bucket import entries, pull
from gvpo_jax.rundir.claim import (
    SETTINGS,
    RunConfig,
    check_name,
    check_not_foreign,
    has_begun,
    usable,
)
from gvpo_jax.rundir.files import write_text
from gvpo_jax.settings import RUN_SCHEMES, all_settings, check_path, describe

_DATE = "data.template_date"
WARM_START = "sft/model"  # in a run's folder: the model, or adapter, that it begins with

# Settings that earlier versions had in the section `rollout`, and their names in `servers` today.
_MOVED = {
    "engine": "kind", "servers": "urls", "weights_dir": "weights_dir", "timeout": "timeout",
    "weights_dtype": "weights_dtype", "retries": "retries", "concurrency": "concurrency",
    "logp_tolerance": "logp_tolerance", "api_key_env": "api_key_env",
}  # fmt: skip


def load_config(
    path: Path | str, overrides: Sequence[str] = (), *, sets: Path | str | None = None
) -> Config:
    """The config in a YAML file with `key=value` overrides on top.

    A config that does not exist but names one that came with the package (`quickstart`,
    `configs/quickstart.yaml`) is taken from there. Files that settings name are looked for from the
    working directory, then beside the config; `~` is the home folder.

    Args:
        path: the file.
        overrides: what goes before it.
        sets: another config, of how to evaluate, which goes before the file and not before the
            overrides: its sections are `data`, `rollout`, `rewards` and `eval`.

    Raises:
        UserError: no such file, no YAML, an unknown key, or a value out of range.
    """
    file = _find(Path(path))
    given = [*_settings_in(sets), *read_overrides(overrides)]
    try:
        text = file.read_text("utf-8-sig")
        config = _read(text, given)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise UserError(
            f"{path} is not a readable YAML config:{line} {error.problem}; indent with spaces, the "
            "same for all keys of a section, and put a text that holds ': ' or ' #' in quotes"
        ) from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a readable YAML config: {reason}") from None
    except UserError as error:
        try:
            _read(text, [])
        except UserError:  # the file is wrong without the overrides too
            raise UserError(f"{path}: {error}") from None
        raise
    return _with_paths(config, beside=file.parent)


def _settings_in(sets: Path | str | None) -> list[tuple[list[str], Any]]:
    """Each setting that a config of evaluation sets gives, by its key's parts."""
    if sets is None:
        return []
    config = load_config(sets)  # raises where the file is wrong
    values = read_yaml(_find(Path(sets)).read_text("utf-8-sig")) or {}
    if others := [name for name in values if name not in ("data", "rollout", "rewards", "eval")]:
        raise UserError(
            f"{sets}: {others[0]} is not about evaluation: leave it out, or give it behind the "
            "command"
        )
    if not config.eval.sets:
        raise UserError(f"{sets} has no eval.sets: name some, see docs/evaluation.md")
    given = [([section, name], x) for section, part in values.items() for name, x in part.items()]
    found = [dataclasses.asdict(each) for each in config.eval.sets]  # the files, too
    return [*given, (["eval", "sets"], found)]


def _read(text: str, overrides: Sequence[tuple[list[str], Any]]) -> Config:
    values = read_yaml(text)
    values = {} if values is None else values
    for key, value in overrides if isinstance(values, dict) else ():
        put(values, key, value)
    return as_record(Config, _with_new_names(values))


def override(config: Config, /, **values: Any) -> Config:
    """A copy with `section__key=value` changed, e.g. `override(config, loss__beta=0.2)`.

    Raises:
        UserError: an unknown key or a value out of range.
    """
    changes: dict[str, Any] = {}
    for name, value in values.items():
        put(changes, name.split("__"), value)
    try:
        return _with_paths(as_record(Config, _with_new_names(changes), base=config), beside=None)
    except UserError as error:
        if all("__" in name for name in values):
            raise
        raise UserError(f"{error}; as a keyword section.name is section__name") from None


def to_yaml(config: Config) -> str:
    """The whole config, resolved, as YAML that `load_config` reads as the same."""
    values = dataclasses.asdict(config)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Puts every text in quotes that would be something else without them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    quotes = None if as_any(Bare(text)) == text else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quotes)


_Dumper.add_representer(str, _text)


def difference(a: Config, b: Config) -> list[str]:
    """Keys, as `section.key`, in which two configs differ in a way that a resumed run must not.

    Files may lie elsewhere: a checkpoint knows the rows, the weights and the functions' code.
    """
    pairs = zip(all_settings(a), all_settings(b), strict=True)
    return [
        x.key
        for x, y in pairs
        if not x.about["free"]
        and _wherever(x.value, x.about["path"]) != _wherever(y.value, y.about["path"])
    ]


def _wherever(value: Any, kind: str) -> Any:
    """What is left of a setting that names files when they are moved."""
    if value is None or kind not in ("input", "sets", "function", "functions", "model"):
        return value
    if kind == "input":  # rows are told by what they are
        return True
    if kind == "sets":
        return [dataclasses.replace(each, path="") for each in value]
    if kind in ("function", "functions"):
        specs = [value] if kind == "function" else value
        files = [".py:" in spec or os.path.isabs(spec) for spec in specs]
        return [os.path.basename(x) if f else x for x, f in zip(specs, files, strict=True)]
    return os.path.basename(value.rstrip("/")) if os.path.isabs(value) else value


def settings_page() -> str:
    """All settings as a page of documentation; `python -m gvpo_jax.config_file` prints it."""
    lines = [_PAGE]
    for name, settings in itertools.groupby(describe(Config()), lambda s: s[0].split(".")[0]):
        about = (getattr(Config(), name).__doc__ or "").partition("\n")[0]
        lines += ["", f"## {name}", "", about, ""]
        lines += ["| setting | type | default | limits | meaning |", "|---|---|---|---|---|"]
        for key, kind, default, limits, meaning in settings:
            cells = f"`{key}`", kind, f"`{default}`" if default else "", limits, meaning
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


_PAGE = """# Settings

Give any of these in the YAML file, as `section.key=value` behind a command, or as
`section__key=value` to `Trainer.from_pretrained`. This page is made by
`python -m gvpo_jax.config_file > docs/settings.md`.

A text is what was typed behind the first `=`: `007`, `yes`, `${x}` and `Answer: #` stay the same.
Quote it for your shell alone. A list is written `[a, b]`, or as one entry without brackets, and
`data.tasks.0.weight=2` changes its first entry. `null` unsets a setting that may be null. A file is
looked for in the working directory, then beside the config; `~` is the home folder."""


def settings_help() -> str:
    """All settings as `--help` shows them."""
    rows = [
        f"  {key}={default}  ({kind})\n      {meaning}"
        for key, kind, default, _, meaning in describe(Config())
    ]
    return "\n".join(["settings, each with its default:", *rows])


def claim(config: Config) -> Path:
    """The run folder, made and marked with the config, or found again with the same config in it.

    A run with a constant learning rate may be made longer: `train.steps` may grow. `train.epochs`
    are written as the steps that they take, which `TrainConfig.settled` says.
    Where `check_claim` raises, nothing is written.
    """
    folder = check_claim(config)
    # Where this session stops, and on which machines it runs, is not the run's business.
    train = dataclasses.replace(config.train, stop_at=None)
    run = dataclasses.replace(config.run, overwrite=False)  # but once
    kept = dataclasses.replace(config, run=run, train=train, distributed=DistributedConfig())
    with usable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / SETTINGS, to_yaml(kept))
    return folder


def check_claim(config: Config) -> Path:
    """The run folder, nothing written yet.

    Raises:
        UserError: it holds something else, or a run of another config.
    """
    check_name(config.run.dir)
    folder = pull(config.run.dir)
    with usable(folder):
        if not (folder / SETTINGS).is_file():
            check_not_foreign(config.run.dir)
            return folder
        old = load_config(folder / SETTINGS)
        if (old.eval.success_reward, config.eval.success_reward) == (1.0, None):  # defaults, then
            old = override(old, eval__success_reward=None)  # and now
        train = config.train if config.train.epochs else config.train.settled(0, 1)
        keys = difference(old, dataclasses.replace(config, train=train))
        dates = old.data.template_date, config.data.template_date
        keys = [key for key in keys if key != _DATE or None not in dates]
        if train.epochs:  # how many steps, only the rows will say
            keys = [key for key in keys if key not in ("train.steps", "train.epochs")]
        longer = train.updates > old.train.updates and config.optimizer.schedule == "constant"
        if longer:
            keys = [key for key in keys if key != "train.steps"]
        if keys and has_begun(config.run.dir) and not config.run.overwrite:
            there = [f"{key}={shown(operator.attrgetter(key)(old))}" for key in keys]
            grows = config.optimizer.schedule == "constant" and "train.steps" in keys
            hint = " (train.steps may only grow; train.stop_at ends a session)" if grows else ""
            began = {str(operator.attrgetter(key)(old)) for key in keys if key.startswith("model.")}
            if any(name.endswith(f"/{WARM_START}") for name in began):
                hint += " (it began with a warm start: give the same sft.steps or sft.epochs)"
            raise UserError(
                f"{config.run.dir} holds a run with other settings ({', '.join(there)}); give "
                f"those{hint}, or choose another run.dir, or start over with run.overwrite=true",
                page=Page.RESUMING,
            )
    return folder


def with_run_date(config: Config, run_dir: str | Path) -> Config:
    """The config with a date for its chat template: its own, that of the run begun there, today."""
    day, folder = config.data.template_date, pull(run_dir)
    begun = (folder / SETTINGS).is_file() and has_begun(str(run_dir))
    goes_on = begun and not config.run.overwrite
    if day is None and goes_on:
        day = load_config(folder / SETTINGS).data.template_date
    data = dataclasses.replace(config.data, template_date=day or str(config.data.day()))
    return dataclasses.replace(config, data=data)


def open_run(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    to_train: bool = False,
    sets: Path | str | None = None,
) -> Config:
    """The config of a run folder, overrides on top, with `run.dir` set to where it lies now.

    to_train: else the folder does not say where compiled programs are read from, which may be
        somebody else's.
    sets: see `load_config`.

    Raises:
        UserError: the folder is no run.
    """
    if is_address(path):
        check_run_address(str(path))
    folder = pull(path)
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{path} is not a run folder: it has no {SETTINGS}")
    by_hand = (folder / SETTINGS).read_bytes().lstrip()[:1] == b"#"  # no run writes comments
    if by_hand and not has_begun(str(path)):  # training there would replace it
        raise UserError(
            f"{path} is not a run folder: its {SETTINGS} was written by hand; give the file, "
            f"{Path(path) / SETTINGS}"
        )
    # More epochs are in place of the steps that the first ones took.
    by_epochs = any(x.partition("=")[0].strip() == "train.epochs" for x in overrides)
    instead = ["train.steps=null"] if by_epochs else []
    there = load_config(folder / SETTINGS)
    cache = RunConfig().compilation_cache
    if not to_train and there.run.compilation_cache not in (None, cache):
        instead.append(f"run.compilation_cache={cache}")
    for key in ("model.name", "model.adapter"):  # of a folder that was moved since
        given = str(operator.attrgetter(key)(there))
        if given.endswith(f"/{WARM_START}") and entries(f"{path}/{WARM_START}"):
            absolute = path if is_address(path) else Path(path).absolute()
            instead.append(f"{key}={absolute}/{WARM_START}")
    return load_config(folder / SETTINGS, [*instead, *overrides, f"run.dir={path}"], sets=sets)


def check_run_address(address: str) -> None:
    """Raise UserError where an address can't be that of a run, or where there is none."""
    check_path(address, "the run", RUN_SCHEMES)
    if SETTINGS not in entries(address):
        raise UserError(f"{address} is not a run folder: it has no {SETTINGS}")


def check_trusted(
    path: Path | str, overrides: Sequence[str] = (), sets: Path | str | None = None
) -> None:
    """That a run folder names no code and no servers which this user has not trained with.

    See `rewards.trust`. Overrides and `sets` are the user's own, and so is what they name.

    Raises:
        UserError: it does.
    """
    own = {x.partition("=")[0].strip() for x in overrides}
    own |= {".".join(key) for key, _ in _settings_in(sets)}
    there = open_run(path)
    funcs = [] if "rewards.funcs" in own else there.rewards.funcs
    named = [
        ("reward function", spec)
        for spec in funcs
        if spec not in OWN_REWARDS and not is_reward_model(spec)  # which is no code
    ]
    for key in ("data.filter", "eval.checker"):
        spec = operator.attrgetter(key)(there)
        named += [(key, spec)] if spec is not None and key not in own else []
    for kind, spec in named:
        if unknown([spec]):
            raise UserError(
                f"{path} names the {kind} {spec}, which was not trained with here and would be "
                "run: read it, then give --trust-rewards"
            )
    own_servers = there.servers.kind == "none" or own & {"servers.kind", "servers.urls"}
    if not own_servers and unknown(servers_of(there)):
        raise UserError(
            f"{path} names servers ({', '.join(there.servers.urls)}), which were not trained with "
            "here and would be sent weights, prompts and a key: look at servers in its "
            f"{SETTINGS}, then give --trust-rewards, or sample here with servers.kind=none"
        )


def servers_of(config: Config) -> list[str]:
    """What `rewards.trust` remembers of a run's servers."""
    servers = config.servers
    return [f"{servers.kind} {sorted(servers.urls)} {servers.api_key_env} {servers.weights_dir}"]


def _find(path: Path) -> Path:
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        runs = sorted(file.parent.name for file in path.glob(f"*/{SETTINGS}"))
        hint = (
            f"; the runs in it are {', '.join(runs[:9])}{', ...' * (len(runs) > 9)}" if runs else ""
        )
        raise UserError(f"{path} is a folder, not a config file{hint}")
    inside = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    name = path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml"
    for folder in PACKAGED if inside.parent in (Path(), Path("eval")) else ():
        if os.path.isfile(file := folder / inside.parent / name):
            return file
    raise _no_such(path)


def no_run(path: Path) -> UserError:
    """The mistake of a command that is given no run folder, and takes nothing else."""
    what = "is a file" if os.path.isfile(path) else "is no folder"
    runs = [file.parent.name for file in path.parent.glob(f"*/{SETTINGS}")]
    hint = f"; did you mean {path.parent / near[0]}?" if (near := _near(path.name, runs)) else ""
    return UserError(
        f"{path} {what}; this command takes a run folder, the run.dir that training wrote, such as "
        f"runs/run{hint}"
    )


def _no_such(path: Path) -> UserError:
    """The mistake of a command that is given neither a config nor a run folder."""
    files = [
        file.relative_to(folder).with_suffix("").as_posix()
        for folder in PACKAGED
        for pattern in ("*.yaml", "eval/*.yaml")
        for file in folder.glob(pattern)
    ]
    packaged = sorted(set(files))
    beside = [file.name for file in path.parent.glob("*.yaml")]
    beside += [file.parent.name for file in path.parent.glob(f"*/{SETTINGS}")]
    found = [
        name for asked in (path.name, path.stem) for name in _near(asked, [*beside, *packaged])
    ]
    there = path.parent / found[0] if found and found[0] in beside else None
    hint = f"did you mean {there or found[0]}? " if found else ""
    return UserError(
        f"there is no config file {path} and no run folder: {hint}a run folder is the run.dir that "
        f"training wrote, such as runs/run; configs that come along: {', '.join(packaged)}"
    )


_near = functools.partial(difflib.get_close_matches, n=1)


def _with_paths(config: Config, beside: Path | None) -> Config:
    """Every setting that names a file: from here or beside the config, absolute if it is there."""
    changes: dict[str, Any] = {}
    for key, value, _, about in all_settings(config):
        if about["path"] and value is not None:
            put(changes, key.split("."), _RESOLVE[about["path"]](value, key, beside))
    return as_record(Config, changes, base=config)


def _input(path: str, key: str, beside: Path | None) -> str | None:
    if not path:
        return None
    if is_address(path):
        return path
    wanted = Path(path).expanduser()
    folders = [Path.cwd(), *([beside.absolute()] if beside else [])]
    # By os.path: for it a name that is too long is one that is not there.
    there = (str(folder / wanted) for folder in folders if os.path.exists(folder / wanted))
    if found := next(there, None):
        return found
    # Or the pattern of several files; the folder's own name is none.
    patterns = [os.path.join(glob.escape(str(folder)), wanted) for folder in folders]
    return next((p for p in patterns if any(glob.iglob(p, recursive=True))), str(wanted))


def _output(path: str, key: str, beside: Path | None) -> str:
    if not path:
        raise UserError(f"{key} is empty: give the path of a folder")
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _model(name: str, key: str, beside: Path | None) -> str:
    """A folder or file; `debug`, names of packages and of the hub stay as they are."""
    found = _input(name, key, beside) if name != "debug" and "://" not in name else None
    return found if found and os.path.exists(found) else name


def _functions(specs: list[str], key: str, beside: Path | None) -> list[str]:
    """`path/to/file.py:function` and folders of reward models; others stay as they are."""

    def resolved(spec: str) -> str:
        where, _, name = spec.rpartition(":")
        if where.endswith(".py"):
            return f"{_input(where, key, beside)}:{name}"
        return spec if where else _model(spec, key, beside)

    return [resolved(spec) for spec in specs]


def _template(text: str, key: str, beside: Path | None) -> str:
    """A text that puts nothing in is the path of a file with one."""
    if not text or "{" in text:
        return text
    file = _input(text, key, beside)
    try:
        assert file is not None
        return Path(file).read_text("utf-8-sig")
    except (OSError, ValueError):
        raise UserError(
            f"{key}={text}: neither a readable file nor a Jinja template, which puts the messages "
            "in with {{ }} or {% %}"
        ) from None


_RESOLVE = {
    "input": _input,
    "output": _output,
    "run": _output,
    "model": _model,
    "function": lambda spec, *where: _functions([spec], *where)[0],
    "functions": _functions,
    "template": _template,
    "sets": lambda sets, *where: [
        dataclasses.replace(each, path=_input(each.path, *where) or "") for each in sets
    ],
}


def _with_new_names(values: Any) -> Any:
    """Settings under the names that they have today."""
    given = values.get("rollout") if isinstance(values, dict) else None
    for old, new in _MOVED.items():
        if isinstance(given, dict) and old in given:
            value = given.pop(old)
            value = "none" if (old, value) == ("engine", "in_process") else value
            put(values, ["servers", new], value)
    return values


if __name__ == "__main__":
    print(settings_page(), end="")
