"""A config as a file: YAML with `key=value` on top, and what a resumed run may change."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from gvpo_jax.config import Config, TaskConfig
from gvpo_jax.errors import UserError

CONFIGS = Path(__file__).parent / "configs"  # where the wheel carries the files of configs/


# A resumed run may change these: they touch neither what was computed nor what will be.
_FREE = (
    "run.dir",
    "run.compilation_cache",
    "model.attention",
    "model.remat",
    "rollout.tensor",
    "rollout.servers",
    "rollout.weights_dir",
    "rollout.timeout",
    "rollout.retries",
    "rollout.concurrency",
    "rollout.logp_tolerance",
    "rollout.api_key_env",
    "train.packing",
    "train.stop_at",
    "checkpoint",
    "log",
    "eval.batch_size",
    "mesh",
    "distributed",
)


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
        schema = OmegaConf.structured(Config)
        merged = OmegaConf.merge(schema, OmegaConf.load(file), *given)
        config = _as_config(merged)
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from None
    except MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise UserError(f"{path} is not a readable YAML config:{line} {error.problem}") from None
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable YAML config: {_one_line(error)}") from None
    data = dataclasses.replace(
        config.data,
        path=_beside(file, config.data.path),
        eval_path=_beside(file, config.data.eval_path),
        groups_path=_beside(file, config.data.groups_path),
    )
    return dataclasses.replace(config, data=data)


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
        return _as_config(OmegaConf.merge(OmegaConf.structured(config), changes))
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from None


def to_yaml(config: Config) -> str:
    """The whole config, resolved, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def difference(a: Config, b: Config) -> list[str]:
    """Keys, as `section.key`, in which two configs differ in a way that a resumed run must not."""
    flat_a, flat_b = _flatten(dataclasses.asdict(a)), _flatten(dataclasses.asdict(b))
    return [
        key
        for key in flat_a
        if flat_a[key] != flat_b.get(key)
        and not any(key == f or key.startswith(f + ".") for f in _FREE)
    ]


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


def _as_config(merged: Any) -> Config:
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


_RECORDS = {
    record.__name__: record
    for record in (Config, TaskConfig, *(type(getattr(Config(), f.name)) for f in fields(Config)))
}


def _one_line(error: Exception) -> str:
    """OmegaConf's first sentence and the key it is about, without the lines on its own types."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next(
        (line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), ""
    )
    message = lines[0] if lines else type(error).__name__
    if "is not a ListConfig" in message:
        message = "needs a list, e.g. [a, b]"
    if "incompatible container types" in message:
        message = "a list stands where a mapping belongs, or the reverse: sections are mappings, "
        message += "data.tasks and rewards.funcs are lists, with a dash before each entry"
    if (stranger := re.fullmatch(r"Key '.*' not in '(\w+)'", message)) and stranger[1] in _RECORDS:
        known = ", ".join(f.name for f in fields(_RECORDS[stranger[1]]))
        message += f", which has {known}"
    return f"{key}: {message}" if key and key not in message else message
