"""What a release says of itself: versions that agree, and the oldest packages that it allows."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import gvpo_jax

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
FILES = ("CHANGELOG.md", "CITATION.cff", "gvpo_jax/__init__.py", ".ci/release")


def test_changelog_citation_and_package_have_the_same_version():
    (newest, *_) = re.findall(r"^## (\d+\.\d+\.\d+\S*)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    (cited,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert newest == cited == gvpo_jax.__version__


@pytest.fixture
def check(tmp_path):
    """Changes to files, as (file, old, new), and a tag -> status and lines of the script."""

    def check(*changes: tuple[str, str, str], tag: str = "") -> tuple[int, list[str]]:
        for name in FILES:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
        for name, old, new in changes:
            text = (tmp_path / name).read_text()
            assert old in text
            (tmp_path / name).write_text(text.replace(old, new, 1))
        command = [str(tmp_path / ".ci" / "release"), "--check", tag]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stderr.splitlines()

    return check


def test_a_release_is_refused_where_its_versions_differ(check):
    version = gvpo_jax.__version__
    assert check() == (0, [])
    status, lines = check(("CHANGELOG.md", f"## {version}", "## 9.9.9"))
    assert status == 1
    assert lines == [f"release: CHANGELOG.md has version 9.9.9, gvpo_jax/__init__.py has {version}"]
    status, lines = check(("CITATION.cff", f"version: {version}", "version: 9.9.9"))
    assert status == 1
    assert "CITATION.cff has version 9.9.9" in lines[0]


def test_a_release_is_refused_under_another_tag_or_with_changes_left(check):
    version = gvpo_jax.__version__
    text = (ROOT / "CHANGELOG.md").read_text()
    head, _, rest = text.partition("## Unreleased\n")
    left = rest.partition(f"## {version}")[0] if rest else ""
    moved = ("CHANGELOG.md", text, head + rest.replace(left, "", 1))
    assert check(moved, tag=f"v{version}") == (0, [])
    status, lines = check(moved, tag="v9.9.9")
    assert (status, len(lines)) == (1, 1)
    assert "the tag is v9.9.9" in lines[0]
    again = ("CHANGELOG.md", text, f"{head}## Unreleased\n\n- More.\n\n{moved[2][len(head) :]}")
    status, lines = check(again, tag=f"v{version}")
    assert (status, len(lines)) == (1, 1)
    assert "changes under Unreleased" in lines[0]


def test_the_oldest_packages_are_those_that_the_extra_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    pinned: dict[str, list[Requirement]] = {}
    for requirement in (Requirement(line) for line in lines if line[:1] not in ("", "#")):
        assert requirement.url is None
        pinned.setdefault(requirement.name, []).append(requirement)
    asked = {r.name: r for r in map(Requirement, project["optional-dependencies"]["train"])}
    assert pinned.keys() == asked.keys()
    for name, requirement in asked.items():
        least = next(Version(s.version) for s in requirement.specifier if s.operator == ">=")
        versions = sorted(Version(str(r.specifier).removeprefix("==")) for r in pinned[name])
        assert versions[0] == least, name
        for python in ("3.11", "3.12", "3.13"):
            for_it = [
                r
                for r in pinned[name]
                if r.marker is None or r.marker.evaluate({"python_version": python})
            ]
            assert len(for_it) == 1, (name, python)
