"""A setting is written once: name, type, default, limits and meaning, in one dataclass field."""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from gvpo_jax.buckets import SCHEMES, is_address
from gvpo_jax.errors import UserError

_MAX = sys.float_info.max


def setting(
    default: Any,  # where nothing is given; a list or dict is copied
    description: str,  # what it does, for `--help` and the documentation
    *,
    least: float | None = None,  # the smallest value allowed
    most: float | None = None,  # the largest
    above: float | None = None,  # what the value must exceed
    below: float | None = None,  # what it must stay under
    hint: str = "",  # what to do about a value out of range
    free: bool = False,
    # Of such a file; the run's folder may lie in a bucket.
    path: Literal[
        "", "input", "sets", "output", "run", "model", "function", "functions", "template"
    ] = "",
) -> Any:
    """A field of a config section.

    free: a resumed run may change it: it touches neither what was computed nor what will be.
    """
    metadata = {"description": description, "free": free, "hint": hint, "path": path}
    metadata |= {"least": least, "most": most, "above": above, "below": below}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Setting(NamedTuple):
    """One setting of a config: `section.name`, its value and type, and what `setting` was told.

    That of a section within a section is `section.inner.name`.
    """

    key: str
    value: Any
    type: Any
    about: Mapping[str, Any]


def all_settings(config: Any) -> Iterator[Setting]:
    """Every setting of a config, whose fields are sections, in order."""
    for part in dataclasses.fields(config):
        yield from _settings_of(getattr(config, part.name), part.name)


def _settings_of(section: Any, name: str) -> Iterator[Setting]:
    for field in dataclasses.fields(section):
        key, value = f"{name}.{field.name}", getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _settings_of(value, key)
        else:
            yield Setting(key, value, field.type, field.metadata)


def _in_lists(config: Any) -> Iterator[Setting]:
    """The settings of records that are entries of a list, as `section.name.0.inner`."""
    for key, value, _, _ in all_settings(config):
        for place, entry in enumerate(value if isinstance(value, list) else ()):
            if dataclasses.is_dataclass(entry):
                yield from _settings_of(entry, f"{key}.{place}")


def check_limits(config: Any) -> None:
    """Raise UserError, naming key, limit and value, where a setting lies outside its limits.

    NaN and infinities lie outside, and addresses in a path's place.
    """
    for key, value, _, about in [*all_settings(config), *_in_lists(config)]:
        if about["path"] in _SCHEMES and value is not None:
            check_path(value, key, _SCHEMES[about["path"]])
        problem = None if value is None else _problem(value, about)
        if problem:
            text = f"{key} must be {problem}, got {value}"
            raise UserError(f"{text}; {about['hint']}" if about["hint"] else text)


def check_path(path: Any, what: str, schemes: Sequence[str] = ()) -> None:
    """Raise UserError where a path is an address, of which `Path` would make a folder here.

    schemes: of addresses that are taken, as gs of gs://bucket/folder.
    """
    text = str(path)
    if not re.match(r"[a-zA-Z][\w+.-]+:/", text) or text.startswith("package://"):
        return
    if not is_address(text) or text.partition("://")[0] not in schemes:
        known = f", or one that begins with {'://, '.join(schemes)}://" if schemes else ""
        raise UserError(f"{what}={text} is an address: give a path on this machine{known}")
    plain = r"[^/\s*?\[\]]+" if schemes is RUN_SCHEMES else r"[^/\n]+"
    if not re.fullmatch(rf"\w+:/(/+{plain})+/*", text) or {".", ".."} & set(text.split("/")):
        raise UserError(
            f"{what}={text}: give a bucket and a path in it without blanks, dots alone and "
            "patterns, as in gs://bucket/folder"
        )


# Which addresses a setting takes. Orbax saves whole or not at all on disks and on gs:// alone.
RUN_SCHEMES = ("gs",)
_SCHEMES = {"input": SCHEMES, "model": SCHEMES, "run": RUN_SCHEMES, "output": ()}


def describe(config: Any) -> Iterator[tuple[str, str, str, str, str]]:
    """Key, type, value, limits and meaning of every setting, as a person reads them."""
    for key, value, kind, about in all_settings(config):
        shown = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
        yield key, _type_name(kind), shown, _limits(about), about["description"]


def _problem(value: Any, limits: Mapping[str, Any]) -> str | None:
    least, most, above, below = (limits[name] for name in ("least", "most", "above", "below"))
    low = above if least is None else least
    if most is not None and low is not None and not low <= value <= most:
        return f"between {low} and {most}"
    if least is not None and not least <= value <= _MAX:
        return f"at least {least}"
    if above is not None and not above < value <= _MAX:
        return f"> {above}"
    return f"< {below}" if below is not None and not value < below else None


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(get_args(hint))
    if get_origin(hint) in (list, dict):
        inside = ", ".join(_type_name(part) for part in get_args(hint))
        return f"{get_origin(hint).__name__}[{inside}]"
    parts = [part for part in get_args(hint) or (hint,) if part is not type(None)]
    names = [getattr(part, "__name__", "any") for part in parts]
    return " | ".join(names + ["null"] * (len(parts) < len(get_args(hint))))


def _limits(metadata: Mapping[str, Any]) -> str:
    signs = {"least": ">=", "above": ">", "most": "<=", "below": "<"}
    given = {sign: metadata[name] for name, sign in signs.items()}
    return ", ".join(f"{sign} {value}" for sign, value in given.items() if value is not None)
