"""What the site takes from outside of docs/, and its links: a hook of mkdocs, see mkdocs.yml.

Pages link to each other as files of the repository, so that GitHub shows them too. Here a link to a
file that the site has becomes one to its page, and any other one to the repository.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository: where the site has them.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^(```.*?^```|~~~.*?^~~~)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the repository's own pages, those of experiments, and pictures."""
    found = [*ROOT.glob("experiments/*/README.md"), ROOT / "tests" / "faults" / "README.md"]
    for path in [*(ROOT / name for name in PAGES), *found, *ROOT.glob("experiments/*/*.svg")]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, _place(name), content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns the page's links into the site's."""
    here = page.file.src_uri
    source = {_place(name): name for name in PAGES}.get(here) or _source(here)

    def moved(match: re.Match[str]) -> str:
        target, hash_, anchor = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        name = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if files.get_file_from_path(_place(name)) is not None:
            there = posixpath.relpath(_place(name), posixpath.dirname(here) or ".")
        elif (ROOT / name).exists():
            kind = "tree" if (ROOT / name).is_dir() else "blob"
            there = f"{config.repo_url.rstrip('/')}/{kind}/main/{name}"
        else:  # mkdocs tells of it
            there = target
        return f"{match[1]}{there}{hash_}{anchor}{match[3]}"

    parts = FENCE.split(markdown)  # code as it is
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    return "".join(parts)


def _place(name: str) -> str:
    """Where the site has a file of the repository."""
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return re.sub(r"README\.md$", "index.md", name)


def _source(place: str) -> str:
    """The file of the repository that the site has there."""
    if place.startswith(("experiments/", "tests/")):
        return re.sub(r"index\.md$", "README.md", place)
    return f"docs/{place}"
