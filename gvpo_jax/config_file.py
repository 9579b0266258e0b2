"""A config as a file: YAML with `key=value` on top, and what a resumed run may change."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from gvpo_jax.config import Config
from gvpo_jax.errors import UserError
from gvpo_jax.parallel.distributed import DistributedConfig
from gvpo_jax.rundir.claim import SETTINGS, check_not_foreign, has_begun, usable
from gvpo_jax.rundir.files import write_text
from gvpo_jax.settings import all_settings, describe

CONFIGS = Path(__file__).parent / "configs"  # where the wheel carries the files of configs/

# Settings that earlier versions had in the section `rollout`, and their names in `servers` today.
_MOVED = {
    "engine": "kind", "servers": "urls", "weights_dir": "weights_dir", "timeout": "timeout",
    "weights_dtype": "weights_dtype", "retries": "retries", "concurrency": "concurrency",
    "logp_tolerance": "logp_tolerance", "api_key_env": "api_key_env",
}  # fmt: skip


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file with `key=value` overrides on top.

    Data files that are not found from the working directory are looked for beside the config. A
    path that does not exist but names a config that came with the package (`quickstart`,
    `configs/quickstart.yaml`) is taken from there.

    Raises:
        UserError: no such file, no YAML, an unknown key, or a value out of range.
    """
    file = _find(Path(path))
    given = [_parse_override(override) for override in overrides]
    try:
        config = _merged(Config, OmegaConf.load(file), *given)
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from None
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise UserError(f"{path} is not a readable YAML config:{line} {error.problem}") from None
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable YAML config: {_one_line(error)}") from None
    names = ("path", "eval_path", "groups_path")
    found = {name: _beside(file, getattr(config.data, name)) for name in names}
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **found))


def override(config: Config, **values: Any) -> Config:
    """A copy with `section__key=value` changed, e.g. `override(config, loss__beta=0.2)`.

    Raises:
        UserError: an unknown key or a value out of range.
    """
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition("__")
        changes.setdefault(section, {})[key] = value
    try:
        return _merged(config, OmegaConf.create(changes))
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from None


def to_yaml(config: Config) -> str:
    """The whole config, resolved, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def difference(a: Config, b: Config) -> list[str]:
    """Keys, as `section.key`, in which two configs differ in a way that a resumed run must not."""
    pairs = zip(all_settings(a), all_settings(b), strict=True)
    return [x.key for x, y in pairs if x.value != y.value and not x.about["free"]]


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
`python -m gvpo_jax.config_file > docs/settings.md`."""


def settings_help() -> str:
    """All settings as `--help` shows them."""
    rows = [
        f"  {key}={default}  ({kind})\n      {meaning}"
        for key, kind, default, _, meaning in describe(Config())
    ]
    return "\n".join(["settings, each with its default:", *rows])


def claim(config: Config) -> Path:
    """The run folder, made and marked with the config, or found again with the same config in it.

    A run with a constant learning rate may be made longer: `train.steps` may grow.

    Raises:
        UserError: as for `check_claim`; nothing is written then.
    """
    folder = check_claim(config)
    # Where this session stops, and on which machines it runs, is not the run's business.
    kept = dataclasses.replace(
        override(config, train__stop_at=None), distributed=DistributedConfig()
    )
    with usable(folder):
        write_text(folder / SETTINGS, to_yaml(kept))
    return folder


def check_claim(config: Config) -> Path:
    """The run folder, nothing written yet.

    Raises:
        UserError: the folder holds something else, or a run of another config.
    """
    folder = Path(config.run.dir)
    with usable(folder):
        if not (folder / SETTINGS).is_file():
            check_not_foreign(folder)
            return folder
        old = load_config(folder / SETTINGS)
        keys = difference(old, config)
        longer = config.train.steps > old.train.steps and config.optimizer.schedule == "constant"
        if keys and not (keys == ["train.steps"] and longer) and has_begun(folder):
            raise UserError(
                f"{folder} holds a run with other settings ({', '.join(keys)}); "
                "give those, or choose another run.dir"
            )
    return folder


def open_run(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config of a run folder, overrides on top, with `run.dir` set to where it lies now.

    Raises:
        UserError: the folder is no run.
    """
    folder = Path(path)
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {SETTINGS}")
    return load_config(folder / SETTINGS, [*overrides, f"run.dir={folder}"])


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a config file")
    name = path.name if path.suffix else f"{path.name}.yaml"
    for folder in (CONFIGS, CONFIGS.parent.parent / "configs"):
        if path.parent in (Path(), Path("configs")) and (folder / name).is_file():
            return folder / name
    raise UserError(f"there is no config file {path}")


def _parse_override(override: str) -> Any:
    try:
        if "=" in override:
            return OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, YAMLError):
        pass
    raise UserError(f"'{override}' is not an override: write key=value, e.g. train.steps=10")


def _beside(file: Path, path: str | None) -> str | None:
    """A relative path, looked for from here and then beside the config, made absolute."""
    if path is None:
        return None
    places = (Path(path), file.parent / path)
    return next((str(place.absolute()) for place in places if place.exists()), path)


def _merged(base: Any, *layers: Any) -> Config:
    """The config that `base` is, or is the class of, with these layers on top."""
    layers = tuple(_with_new_names(layer) for layer in layers)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base), *layers))
    assert isinstance(config, Config)
    return config


def _with_new_names(layer: Any) -> Any:
    """Settings under the names that they have today, with what stands there as it is."""
    if not OmegaConf.is_dict(layer):
        return layer
    plain: Any = OmegaConf.to_container(layer)
    given = plain.get("rollout")
    for old, new in _MOVED.items():
        if isinstance(given, dict) and old in given:
            value = given.pop(old)
            value = "none" if (old, value) == ("engine", "in_process") else value
            plain["servers"] = (plain.get("servers") or {}) | {new: value}
    return OmegaConf.create(plain)


def _one_line(error: Exception) -> str:
    """OmegaConf's first sentence and the key it is about, without the lines on its own types."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else type(error).__name__
    if "is not a ListConfig" in message:
        message = "needs a list, e.g. [a, b]"
    if "incompatible container types" in message:
        message = "a list stands where a mapping belongs, or the reverse: sections are mappings, "
        message += "data.tasks and rewards.funcs are lists, with a dash before each entry"
    record = getattr(error, "object_type", None)
    if re.fullmatch(r"Key '.*' not in '\w+'", message) and dataclasses.is_dataclass(record):
        message += f", which has {', '.join(field.name for field in dataclasses.fields(record))}"
    key = getattr(error, "full_key", None)
    return f"{key}: {message}" if key and key not in message else message


if __name__ == "__main__":
    print(settings_page(), end="")
