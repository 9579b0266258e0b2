"""A setting is written once: name, type, default, limits and meaning, in one dataclass field."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from gvpo_jax.errors import UserError

_MAX = sys.float_info.max


def setting(
    default: Any,
    description: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    hint: str = "",
    free: bool = False,
) -> Any:
    """A field of a config section.

    Args:
        default: its value where nothing is given; a list or dict is copied.
        description: what it does, for `--help` and the documentation.
        least: the smallest value allowed.
        most: the largest value allowed.
        above: what the value must exceed.
        below: what the value must stay under.
        hint: what to do about a value out of range.
        free: a resumed run may change it: it touches neither what was computed nor what will be.
    """
    metadata = {"description": description, "free": free, "hint": hint}
    metadata |= {"least": least, "most": most, "above": above, "below": below}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_limits(sections: Mapping[str, Any]) -> None:
    """That every setting of these sections lies within its limits; NaN and infinities lie outside.

    Raises:
        UserError: one does not; names key, limit and value.
    """
    for name, section in sections.items():
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            problem = None if value is None else _problem(value, field.metadata)
            if problem:
                hint = field.metadata["hint"]
                text = f"{name}.{field.name} must be {problem}, got {value}"
                raise UserError(f"{text}; {hint}" if hint else text)


def _problem(value: Any, limits: Mapping[str, Any]) -> str | None:
    least, most, above, below = (limits.get(name) for name in ("least", "most", "above", "below"))
    low = above if least is None else least
    if most is not None and low is not None and not low <= value <= most:
        return f"between {low} and {most}"
    if least is not None and not least <= value <= _MAX:
        return f"at least {least}"
    if above is not None and not above < value <= _MAX:
        return f"> {above}"
    return f"< {below}" if below is not None and not value < below else None


class Setting(NamedTuple):
    """One setting as a person reads it."""

    key: str
    type: str
    default: str
    limits: str
    description: str


def describe(config: type) -> Iterator[Setting]:
    """All settings of a config class whose fields are sections, in order."""
    for section, cls in get_type_hints(config).items():
        types = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            words = {None: "null", True: "true", False: "false"}
            plain = default is None or isinstance(default, bool)
            yield Setting(
                f"{section}.{field.name}",
                _type_name(types[field.name]),
                words[default] if plain else str(default),
                _limits(field.metadata),
                field.metadata["description"],
            )


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
