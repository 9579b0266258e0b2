"""The wheel, built from the source distribution, is the whole program: nothing is left behind."""

import email
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from gvpo_jax.starter import FILES

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Source distribution and wheel in a folder; offline, with the tools that are installed."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (file,) = built.glob("*.whl")
    return file


def files_below(folder: Path, *patterns: str) -> set[str]:
    found = {path for pattern in patterns for path in folder.rglob(pattern)}
    return {path.relative_to(folder).as_posix() for path in found}


def test_every_module_template_and_config_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = files_below(ROOT / "gvpo_jax", "*.py", "*.html", "*.css")
    package = {f"gvpo_jax/{name}" for name in package}
    configs = {
        f"gvpo_jax/configs/{name}"
        for name in files_below(ROOT / "configs", "*.yaml", "*.jsonl", "*.py")
    }
    assert len(package) > 40
    assert {f"gvpo_jax/report/templates/{name}" for name in ("page.html", "style.css")} <= package
    assert {"gvpo_jax/configs/debug.jsonl", "gvpo_jax/configs/quickstart.yaml"} <= configs
    assert {f"gvpo_jax/configs/init/{name}" for name in FILES} <= configs
    typed = {"gvpo_jax/py.typed"}  # tells type checkers that the annotations may be relied on
    assert package | configs | typed <= names
    others = {name for name in names - package - configs - typed if ".dist-info/" not in name}
    assert not others


def test_licence_entry_point_and_version(wheel):
    import gvpo_jax

    archive = zipfile.ZipFile(wheel)
    info = f"gvpo_jax-{gvpo_jax.__version__}.dist-info"
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "gvpo-jax = gvpo_jax.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
    assert metadata["Name"] == "gvpo-jax"
    assert metadata["License-Expression"] == "MIT"
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text().strip()


def test_the_source_distribution_can_be_tested(built):
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/conftest.py"} <= names
    assert {".ci/oldest.txt", ".ci/release"} <= names  # test_release.py reads them
    assert {f"docs/{name}" for name in files_below(ROOT / "docs", "*.md")} <= names
    assert {
        f"tests/end_to_end/{Path(__file__).name}",
        "configs/debug.yaml",
        "gvpo_jax/loss.py",
    } <= names


def test_the_installed_wheel_trains_from_another_folder(wheel, tmp_path):
    site, run = tmp_path / "site", tmp_path / "run"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    (tmp_path / "elsewhere").mkdir()

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = python("-c", "import gvpo_jax.cli; print(gvpo_jax.cli.__file__)")
    assert Path(where.strip()) == site / "gvpo_jax" / "cli.py"
    settings = ["train.steps=2", "train.batch_size=2", "data.eval_size=2", "eval.every=0"]
    python("-m", "gvpo_jax", "train", "debug", f"run.dir={run}", "mesh.fsdp=1", *settings)
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    assert (run / "report.html").is_file()
    assert not any((tmp_path / "elsewhere").iterdir())
    assert str(site / "gvpo_jax" / "configs" / "debug.jsonl") in (run / "config.yaml").read_text()
