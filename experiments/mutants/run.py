"""Break the code on purpose, one mistake at a time, and see which test notices.

    python experiments/mutants/run.py            # every mutant, about 15 minutes of CPU
    python experiments/mutants/run.py --small    # the first three, in seconds: what CI runs

The package and its tests are copied to a temporary folder. There each mutant is applied and taken
back, and its test files run until the first test fails. Exits with 1 if a mutant survives. At the
end all the tests that failed run once more, on the copy as it was: there they must pass.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from mutants import MUTANTS, SMALL, Mutant

ROOT = Path(__file__).parents[2]
CHECK_IMPORT = """\
from pathlib import Path


def pytest_collection_finish():
    import gvpo_jax

    where = Path(gvpo_jax.__file__)
    assert where.is_relative_to(Path(__file__).parent), f"the tests import {where}, not the copy"
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", default="", help="those with this text in their name or file")
    parser.add_argument("--out", type=Path, help="results as JSON; rows of others stay")
    options = parser.parse_args()
    mutants = SMALL if options.small else MUTANTS
    chosen = [m for m in mutants if options.only in f"{m.name} {m.file}"]
    with tempfile.TemporaryDirectory(prefix="gvpo-jax-mutants-") as folder:
        tree = copy_tree(Path(folder))
        if outdated := [m for m in chosen if occurrences(tree, m) != 1]:
            raise SystemExit("\n".join(explain(tree, m) for m in outdated))
        files = sorted({test.split("::")[0] for m in chosen for test in m.tests})
        expect_success(pytest(tree, ["--collect-only", *files]))
        rows = [measure(tree, mutant) for mutant in chosen]
        if caught := sorted({row["caught_by"] for row in rows} - {None}):
            expect_success(pytest(tree, caught))
    saved = save(options.out, rows) if options.out else rows
    print(table(saved))
    survivors = [row["name"] for row in rows if row["caught_by"] is None]
    for name in survivors:
        print(f"SURVIVED: {name}", file=sys.stderr)
    return 1 if survivors else 0


def copy_tree(tree: Path) -> Path:
    """What the tests need, and a check that they import this copy of the package."""
    for name in ("gvpo_jax", "tests", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "conftest.py").write_text(CHECK_IMPORT)
    return tree


def occurrences(tree: Path, mutant: Mutant) -> int:
    return (tree / "gvpo_jax" / mutant.file).read_text().count(mutant.old)


def explain(tree: Path, mutant: Mutant) -> str:
    return (
        f"{mutant.name}: {mutant.old!r} occurs {occurrences(tree, mutant)} times in "
        f"{mutant.file}, not once; the code has changed, so change the mutant in mutants.py too"
    )


@contextlib.contextmanager
def applied(tree: Path, mutant: Mutant) -> Iterator[None]:
    file = tree / "gvpo_jax" / mutant.file
    code = file.read_text()
    file.write_text(code.replace(mutant.old, mutant.new))
    try:
        yield
    finally:
        file.write_text(code)


def measure(tree: Path, mutant: Mutant) -> dict:
    """Which test fails first on the mutant; None if all pass."""
    start = time.perf_counter()
    with applied(tree, mutant):
        done = pytest(tree, mutant.tests)
    row = {"name": mutant.name, "file": mutant.file, "old": mutant.old, "new": mutant.new}
    row |= {"caught_by": caught_by(done), "seconds": round(time.perf_counter() - start, 1)}
    print(f"{row['seconds']:6.1f} s  {mutant.name}: {row['caught_by']}", file=sys.stderr)
    return row


def caught_by(done: subprocess.CompletedProcess[str]) -> str | None:
    """The test that found a result wrong; code that merely crashes has not been caught by one."""
    if done.returncode == 0:
        return None
    wrong = r"^FAILED (\S+) - (?:AssertionError|assert|Failed: DID NOT RAISE)"
    failed = re.search(wrong, done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return failed[1]
    print(f"the mutant does not run\n{done.stdout[-4000:]}{done.stderr[-2000:]}", file=sys.stderr)
    return None


def expect_success(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise SystemExit(f"the tests fail without any mutant\n{done.stdout[-4000:]}")


def pytest(tree: Path, tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # No bytecode: a file changed twice within a second can look unchanged to Python.
    env = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"}
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def table(rows: list[dict]) -> str:
    lines = ["| what is wrong | in | the first test that fails |", "|---|---|---|"]
    for row in rows:
        test = (row["caught_by"] or "NONE").removeprefix("tests/")
        lines.append(f"| {row['name']} | {row['file']} | `{test}` |")
    return "\n".join(lines)


def save(out: Path, rows: list[dict]) -> list[dict]:
    """In the order of the mutants; what stands there about mutants that did not run now stays."""
    saved = json.loads(out.read_text())["rows"] if out.exists() else []
    by_name = {row["name"]: row for row in [*saved, *rows]}
    rows = [by_name[m.name] for m in MUTANTS if m.name in by_name]
    machine = {"machine": platform.machine(), "jax": jax.__version__, "rows": rows}
    out.write_text(json.dumps(machine, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    sys.exit(main())
