"""Everything that `gvpo-jax doctor` looks at, in its order."""

from collections.abc import Callable, Iterator
from typing import Any

from gvpo_jax.doctor.about_config import about_config
from gvpo_jax.doctor.findings import Finding, hide
from gvpo_jax.doctor.system import devices, extras, this_machine, versions


def examine(load: Callable[[], Any] = lambda: None) -> list[Finding]:
    """Look at everything, and at a config if there is one.

    Args:
        load: gives the config, or None; may raise UserError.
    """
    found = [*_asked("versions", versions)]
    seen = list(_asked("devices", devices))
    found += [*seen, *_asked("machine", this_machine), *_asked("extras", extras)]
    usable = not any(x.name == "jax" and x.level == "problem" for x in seen)
    found += _asked("config", lambda: about_config(load, with_devices=usable))
    return [_without_secrets(finding) for finding in found]


def _asked(section: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a look finds until it fails, which is a finding too."""
    try:
        yield from look()
    except Exception as error:  # nothing may end the report
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        yield Finding(section, "not all is known", told, "note")


def _without_secrets(finding: Finding) -> Finding:
    return Finding(
        finding.section,
        finding.name,
        hide(finding.value),
        finding.level,
        hide(finding.remedy),
        finding.page,
    )
