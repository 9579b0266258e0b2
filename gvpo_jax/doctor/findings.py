"""What was found, as text and as JSON, without what others should not read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gvpo_jax.errors import Page, hide, one_line

Level = Literal["ok", "note", "problem"]

__all__ = ["Finding", "Level", "as_json", "as_text", "hide"]

_MARKS = {"ok": " ", "note": "-", "problem": "!"}


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
