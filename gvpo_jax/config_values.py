"""What people write as settings, in YAML, behind a command or in Python, as the settings' types.

A setting's type decides what its text means. A text is what was typed: `007`, `yes`, `${x}` and
`Answer: #` stay as they are, and a whole number is decimal. The environment is never read.
"""

import dataclasses
import difflib
import itertools
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from gvpo_jax.config_trl import OTHER_NAMES, TRL_NAMES
from gvpo_jax.errors import UserError

_MOST_VALUES = 100_000  # of a YAML text, each alias written out
_NULL = ("null", "~", "")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True}
_BOOLEANS |= {"false": False, "no": False, "off": False, "0": False}
_INFINITE = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}


class Bare(str):
    """A text that nobody put in quotes: it may stand for a number, null or a list."""


def read_yaml(text: str) -> Any:
    """Mappings, lists and texts, in which unquoted ones are `Bare`.

    Raises:
        yaml.YAMLError: it is no YAML.
        UserError: a tag, a key twice, a value that contains itself, or aliases that make a short
            text endless.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    return None if node is None else _plain(node, (), itertools.count())


def _plain(node: yaml.Node, inside: tuple[yaml.Node, ...], counter: Iterator[int]) -> Any:
    if next(counter) >= _MOST_VALUES:
        raise UserError(f"it holds more than {_MOST_VALUES} values; write it without aliases (*)")
    line = f"line {node.start_mark.line + 1}"
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise UserError(f"{line}: could not read the tag {node.tag}; put a text with ! in quotes")
    if node in inside:
        raise UserError(f"{line}: a value contains itself")
    below = partial(_plain, inside=(*inside, node), counter=counter)
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else Bare(node.value) or None
    if isinstance(node, yaml.SequenceNode):
        return [below(item) for item in node.value]
    values: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{line}: a key must be a text")
        if key.value in values:
            raise UserError(f"line {key.start_mark.line + 1}: found duplicate key {key.value}")
        values[key.value] = below(value)
    return values


def read_overrides(texts: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Of each the key's parts and the value, as `read_override` gives them.

    Raises:
        UserError: one is no override; where a shell took a list or mapping apart, it says so.
    """
    for place, text in enumerate(texts[1:], start=1):
        start = texts[place - 1]
        key, equals, value = start.partition("=")
        if "=" not in text and equals and _is_open(value):
            rest = itertools.takewhile(lambda x: "=" not in x, texts[place:])
            raise UserError(
                f"{key}: the shell took the value apart at its blanks; put it in quotes: "
                f"'{' '.join([start, *rest])}'"
            )
    return [read_override(text) for text in texts]


def _is_open(value: str) -> bool:
    """Whether it begins a list or mapping that it does not end."""
    pairs = {"{": "}", "[": "]"}
    close = pairs.get(value.lstrip()[:1])
    return close is not None and not value.rstrip().endswith(close)


def read_override(text: str) -> tuple[list[str], Any]:
    """The key's parts and the value of `section.key=value`; all behind the first `=` is value.

    Raises:
        UserError: it is no override.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"'{text}' is not an override: write key=value, e.g. train.steps=10")
    return key.strip().split("."), Bare(value)


def put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set one value in nested mappings and lists, where a number is a place in a list.

    Raises:
        UserError: something else stands on the way.
    """
    at: Any = values
    for place, part in enumerate(path):
        last, key = place == len(path) - 1, ".".join(path[:place])
        if isinstance(at, list):
            if not part.isdecimal() or int(part) >= len(at):
                raise UserError(f"{key} has {len(at)} entries, {key}.0 is the first; got '{part}'")
            at[int(part)] = value if last else at[int(part)]
            at = at[int(part)]
        elif not isinstance(at, dict):
            raise UserError(f"{key} is no section: it has no setting '{part}'")
        elif last:
            at[part] = value
        else:
            at[part] = {} if at.get(part) is None else at[part]
            at = at[part]


def as_record(kind: type, values: Any, key: str = "", base: Any = None) -> Any:
    """A dataclass from a mapping of its fields.

    Args:
        kind: the dataclass.
        values: what is given; its other fields keep their values.
        key: where it stands in the config.
        base: whose values those are; None: the defaults.

    Raises:
        UserError: an unknown field, or a value of the wrong type; names its key.
    """
    values = {} if values is None else values
    if isinstance(values, kind):
        return values
    if isinstance(values, Bare) and values.lstrip().startswith("{"):
        values = _structure(values, key)
    if not isinstance(values, Mapping):
        what = f"{key} is a section" if key else "a config is made of sections"
        raise UserError(f"{what}, a mapping like {{name: value}}; got {shown(values)}")
    hints = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    given: dict[str, Any] = {}
    for name, value in values.items():
        full = f"{key}.{name}" if key else str(name)
        if name not in known:
            hint = _hint(str(name), known, {} if key else hints)
            raise UserError(
                f"unknown setting {full}: {hint}{key or 'a config'} has {', '.join(known)}"
            )
        current = getattr(base, name) if base else None
        given[name] = as_type(hints[name], value, full, current)
    return dataclasses.replace(base, **given) if base else kind(**given)


def _hint(name: str, known: Sequence[str], sections: Mapping[str, Any]) -> str:
    """Where an unknown setting may be; sections: those that it could have been left out of."""
    if name in ("grpo", "gvpo", "ppo", "trainer", "args", "training", "algorithm") and sections:
        return "its settings are in the sections rollout, loss, optimizer and train; "
    if here := TRL_NAMES.get(name):
        return f"TRL's {name} is {here} here; "
    if here := OTHER_NAMES.get(name):
        return f"write {here}; "
    names = {
        section: [f.name for f in dataclasses.fields(kind)] for section, kind in sections.items()
    }
    homes = [f"{section}.{name}" for section, fields in names.items() if name in fields]
    section, _, rest = name.partition("_")
    if rest in names.get(section, ()):
        homes = [f"{section}.{rest}"]
    if homes:
        return f"write {' or '.join(homes)}; "
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"did you mean '{near[0]}'? "
    everywhere = {field: section for section, fields in names.items() for field in fields}
    near = difflib.get_close_matches(name, everywhere, 1)
    return f"did you mean {everywhere[near[0]]}.{near[0]}? " if near else ""


def as_type(kind: Any, value: Any, key: str, base: Any = None) -> Any:
    """A value as the type of its setting.

    Raises:
        UserError: it can't be; names its key.
    """
    if get_origin(kind) in (Union, types.UnionType):  # one type, or null
        (kind,) = (part for part in get_args(kind) if part is not type(None))
        nothing = ("null", "~") if kind is str else _NULL  # an empty text is a text
        if value is None or (isinstance(value, Bare) and value in nothing):
            return None
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return as_record(kind, value, key, base)
    number: Any = value
    if getattr(value, "ndim", None) == 0:
        value = number.item()  # NumPy's, jax's or PyTorch's
    if get_origin(kind) is dict and get_args(kind)[1] is str:
        pairs = _as_mapping(value, key, read=lambda item: item)
        return {name: _as_text(item, f"{key}.{name}") for name, item in pairs.items()}
    if get_origin(kind) is list:
        return _as_list(get_args(kind)[0], value, key)
    if get_origin(kind) is Literal:
        return _one_of(get_args(kind), value, key)
    return _READERS[get_origin(kind) or kind](value, key)


def _as_list(kind: Any, value: Any, key: str) -> list[Any]:
    """Brackets hold several; anything else is one entry, and nothing is none."""
    if isinstance(value, Bare) and value.lstrip().startswith("["):
        value = _structure(value, key)
    array: Any = value
    value = array.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        raise UserError(f"{key} must be a list: put a dash before each entry, or write [a, b]")
    if value is None or isinstance(value, str) or not isinstance(value, Sequence):
        value = [value] if value not in (None, "") else []
    return [as_type(kind, item, f"{key}.{place}") for place, item in enumerate(value)]


def _one_of(choices: tuple[str, ...], value: Any, key: str) -> str:
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"{key} must be one of {', '.join(choices)}, got {shown(value)}{hint}")
    return str(value)


def _as_text(value: Any, key: str) -> str:
    if not isinstance(value, str | Path):
        raise UserError(f"{key} must be a text, got {shown(value)}")
    return str(value)


def _as_bool(value: Any, key: str) -> bool:
    known = _BOOLEANS.get(str(value).strip().lower())
    if known is None or not isinstance(value, str | int):
        raise UserError(f"{key} must be true or false, got {shown(value)}")
    return known


def _as_int(value: Any, key: str) -> int:
    number = _number(value, key, "a whole number")
    if not (isinstance(number, int) or number.is_integer()):
        raise UserError(f"{key} must be a whole number, got {shown(value)}")
    return int(number)


def _as_float(value: Any, key: str) -> float:
    return float(_number(value, key, "a number"))


def _number(value: Any, key: str, what: str) -> int | float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        if isinstance(value, str):
            text = value.strip().lower()
            if re.fullmatch(r"[+-]?[0-9][0-9_]{0,99}", text):
                return int(text.replace("_", ""))
            return _INFINITE.get(text) or float(text)
    except ValueError:
        pass
    raise UserError(f"{key} must be {what}, got {shown(value)}")


def _as_mapping(value: Any, key: str, read: Callable[[Any], Any] | None = None) -> dict[str, Any]:
    if isinstance(value, Bare):
        value = _structure(value, key) if value not in _NULL else {}
    if not isinstance(value, Mapping):
        raise UserError(f"{key} must be a mapping like {{name: value}}, got {shown(value)}")
    return {str(name): (read or as_any)(item) for name, item in value.items()}


def shown(value: Any) -> str:
    """A value as messages show it: short, and a text in quotes."""
    text = "null" if value is None else repr(str(value)) if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def as_any(value: Any) -> Any:
    """What YAML takes an unquoted text for, where no setting's type says it."""
    if isinstance(value, Mapping):
        return {str(name): as_any(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_any(item) for item in value]
    if not isinstance(value, Bare):
        return value
    if value.lower() in _NULL:
        return None
    if value.lower() in _BOOLEANS and not value.isdecimal():
        return _BOOLEANS[value.lower()]
    try:
        return _number(value, "", "")
    except UserError:
        return str(value)


_READERS = {
    str: _as_text, bool: _as_bool, int: _as_int, float: _as_float, dict: _as_mapping,
}  # fmt: skip


def _structure(text: Bare, key: str) -> Any:
    """A list or mapping behind `key=`, written as in YAML."""
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        raise UserError(
            f"{key}: {shown(text)} is no list or mapping; write [a, b] or {{name: value}}, "
            "and put entries with other signs in quotes"
        ) from None
