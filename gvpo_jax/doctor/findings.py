"""What was found, as text and as JSON, without what others should not read."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gvpo_jax.errors import Page, one_line

Level = Literal["ok", "note", "problem"]

_MARKS = {"ok": " ", "note": "-", "problem": "!"}
_TOKEN = re.compile(r"\b(hf_|sk-|ghp_|ya29\.)[\w.-]{8,}")
_LOGIN = re.compile(r"://[^/\s@]+@")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """One line of what was found.

    Attributes:
        section: what it belongs to.
        name: of what was looked at.
        value: how it is.
        level: ok; a note, which may be meant so; or a problem, which will not work.
        remedy: what to do about it.
        page: of the documentation that says more.
    """

    section: str
    name: str
    value: str
    level: Level = "ok"
    remedy: str = ""
    page: Page | None = None


def as_text(found: Sequence[Finding]) -> str:
    """What was found, as a person reads it; what will not work comes last, with remedies."""
    width = max(len(finding.name) for finding in found)
    lines, section = [], ""
    for finding in found:
        if finding.section != section:
            section = finding.section
            lines += ["", section] if lines else [section]
        mark = _MARKS[finding.level]
        lines.append(f"{mark} {finding.name:<{width}}  {one_line(finding.value)}".rstrip())
    for level, title in (("note", "- to know:"), ("problem", "! will not work:")):
        told = [f for f in found if f.level == level and (f.remedy or level == "problem")]
        lines += ["", title] if told else []
        for finding in told:
            what = f"{finding.name}: " + (finding.remedy or finding.value)
            lines.append(f"  {one_line(what)}")
            lines += [f"    see {finding.page.url}"] if finding.page else []
    if not any(finding.level == "problem" for finding in found):
        lines += ["", "no problem was found"]
    return "\n".join(lines)


def as_json(found: Sequence[Finding]) -> str:
    """The same for a program or a report of a fault: without names of users, homes and keys."""
    sections: dict[str, list[dict[str, str]]] = {}
    for finding in found:
        about = {"name": finding.name, "value": finding.value, "level": finding.level}
        about |= {"remedy": finding.remedy} if finding.remedy else {}
        about |= {"page": finding.page.url} if finding.page else {}
        sections.setdefault(finding.section, []).append(about)
    works = not any(finding.level == "problem" for finding in found)
    return json.dumps({"works": works, **sections}, indent=2, ensure_ascii=False)


def hide(text: str) -> str:
    """A text without the home folder, names of users in paths, keys and passwords."""
    secrets = {x for name, x in os.environ.items() if _SECRET.search(name) and len(x) >= 8}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "...")
    text = _LOGIN.sub("://...@", _TOKEN.sub("...", text))
    for home in {os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))}:
        if home.count("/") and home != "/":
            text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    names = {os.environ.get(name) for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    for user in filter(None, names):
        text = re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\:\s'\"]|$)", "USER", text)
    return re.sub(r"(/home/|/Users/)[^/\s:'\"]+", r"\1USER", text)
