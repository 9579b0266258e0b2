"""What a model's card says of the settings that it was trained with."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from gvpo_jax.buckets import is_address
from gvpo_jax.config import Config
from gvpo_jax.errors import UserError, hide, tell
from gvpo_jax.models.export import CARD, MARKER
from gvpo_jax.models.hf_files import read_json
from gvpo_jax.report.card import About, model_card
from gvpo_jax.rundir.bucket import pull
from gvpo_jax.rundir.trackers import without_secrets
from gvpo_jax.settings import all_settings

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_LICENSE = ("license", "license_name", "license_link")
# Of machines and places, which are nobody else's business.
_LEFT_OUT = ("run.", "log.", "checkpoint.", "mesh.", "distributed.", "servers.", "model.name")
_KEPT = ("run.seed", "servers.kind")
_FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".txt", ".gguf", ".py")
_LONGEST = 200  # characters of a value


def card_of(
    config: Config,
    model: str,
    *,
    run_dir: Path | str | None,
    step: int,
    adapter: bool,
    hub_name: str | None,
) -> dict[str, str]:
    """The files of a model's card, by name; without the curves where those can't be read.

    Args:
        config: what it was trained with.
        model: the name of what training began with.
        run_dir: the run that it comes from, a folder or an address; None: of none.
        step: updates of that run.
        adapter: whether it is an adapter alone.
        hub_name: of its repository, if it gets one: then the hub is asked for the base's licence.
    """
    base = start_of(model)
    on_hub = _on_hub(base)
    datasets = [
        name for name in (config.data.path, config.data.eval_path) if name and _on_hub(name)
    ]
    about = About(
        name=hub_name
        or (_last(str(run_dir)) if run_dir is not None else f"{_last(base)}-gvpo-jax"),
        base=base if on_hub or base.startswith("package://") else _last(base),
        base_on_hub=on_hub,
        adapter=adapter,
        loss=config.loss.name,
        data=list(_data(config)),
        datasets=list(dict.fromkeys(datasets)),
        rewards=[_last(spec) for spec in config.rewards.funcs],
        settings=dict(changed_settings(config)),
        license=_license(base, ask=hub_name is not None),
    )
    try:
        return model_card(about, None if run_dir is None else pull(run_dir), step)
    except UserError as error:
        tell(f"gvpo-jax: {error}; the card is written without curves and scores", error=True)
        return model_card(about, None, step)


def changed_settings(config: Config) -> Iterator[tuple[str, str]]:
    """Settings that differ from their defaults, as texts without places, logins and keys."""
    defaults = {s.key: s.value for s in all_settings(Config())}
    for key, value, _, about in all_settings(config):
        left_out = key.startswith(_LEFT_OUT) and key not in _KEPT
        if left_out or value == defaults[key]:
            continue
        if about["path"] == "template":
            text = f"a chat template of {len(value)} characters"
        elif about["path"]:
            several = value if isinstance(value, list) else [value]
            text = ", ".join(x if _on_hub(x) else _last(x) for x in several)
        else:
            # Hidden before the text is cut: half a key is known by nothing.
            text = _without_paths(hide(str(_shown(without_secrets(_records(value))))))
        yield key, text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def start_of(model: str) -> str:
    """What training began with, through the exports that were trained on from."""
    for _ in range(9):
        about = None if is_address(model) else read_json(Path(model) / MARKER)
        start = (about or {}).get("start_model")
        if not isinstance(start, str) or start == model:
            break
        model = start
    return model


def _on_hub(name: str) -> bool:
    """Whether it can only be OWNER/NAME: no file's name, and nothing lies there on this machine.

    A file may have been trained with in another folder than the one where this is asked.
    """
    is_file = name.lower().endswith(_FILES)
    return bool(_HUB_NAME.fullmatch(name)) and not is_file and not os.path.exists(name)


def _last(place: str) -> str:
    """A file's name without its folders, its address and a query."""
    place = re.split(r"[?#]", place)[0] if "://" in place else place
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1]


def _without_paths(text: str) -> str:
    """The files' names alone of absolute paths in a text; no addresses of the web."""
    return re.sub(r"(?<![\w:/.<])(?:/|~/)(?:[\w .-]+/)+([\w.-]+)", r"\1", text)


def _records(value: Any) -> Any:
    """Sections in lists as what differs from their defaults."""
    if isinstance(value, list):
        return [_records(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        default = type(value)()
        return {k: v for k, v in vars(value).items() if v != getattr(default, k)}
    return value


def _shown(value: Any) -> Any:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else value


def _data(config: Config) -> Iterator[str]:
    data = config.data
    for name in (data.path, data.groups_path):
        if name:
            yield name if _on_hub(name) else _last(name)
    for task in data.tasks:
        yield f"generated by reasoning-gym: {task.name}"


def _license(base: str, *, ask: bool) -> dict[str, str]:
    """The base's, as its own card tells it; nothing where it does not."""
    found: Mapping[str, Any] = {}
    if _on_hub(base):
        found = _asked(base) if ask else {}
    elif not is_address(base):
        found = _front_matter(Path(base) / CARD)
    told = {k: found[k] for k in _LICENSE if isinstance(found.get(k), str)}
    if not re.fullmatch(r"[\w.-]+", told.get("license", "")):
        return {}
    if not told.get("license_link", "https://").startswith("https://"):  # a file beside the base
        del told["license_link"]
    return told


def _asked(base: str) -> Mapping[str, Any]:
    import huggingface_hub

    try:
        card = huggingface_hub.HfApi(library_name="gvpo-jax").model_info(base, timeout=10).card_data
    except Exception:  # offline, gated, gone: then it is not known
        return {}
    return card.to_dict() if card else {}


def _front_matter(card: Path) -> Mapping[str, Any]:
    try:
        head = card.read_text("utf-8", errors="replace")[:20_000]
        match = re.match(r"---\n(.*?)\n---\s*\n", head, re.S)
        text = match[1] if match else ""
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            return {}
        values = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
