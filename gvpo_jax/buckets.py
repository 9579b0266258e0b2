"""Files in buckets, through fsspec: read from copies on this machine, and kept level with them."""

import contextlib
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

# What reading from an address needs.
_NEEDS = {
    "gs": "pip install 'gvpo-jax[gcs]'",
    "s3": "pip install s3fs",
    "az": "pip install adlfs",
    "hf": "pip install huggingface-hub",
}
SCHEMES = tuple(_NEEDS)
_ADDRESS = re.compile(r"([a-zA-Z][\w+.-]+)://")
_STATE = ".mirror.json"


def is_address(path: Any) -> bool:
    """Whether this is an address such as gs://bucket/folder, and no path on this machine."""
    match = _ADDRESS.match(str(path))
    return bool(match) and match[1] != "package"


def as_path(place: Any) -> "epath.Path":
    """An address, or a path on this machine, as Orbax takes it."""
    from etils import epath

    if is_address(place):
        _keep_no_listings()
    return epath.Path(place)


def size_of(address: str) -> int:
    """Bytes of all that lies below an address. Raises UserError where it can't be reached."""
    with _reaching(address):
        fs, path = _filesystem(address)
        return sum(about["size"] for about in fs.find(path, detail=True).values())


def cache_folder() -> Path:
    """Where copies are kept on this machine."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with contextlib.suppress(RuntimeError):  # there is no home
        return Path(base).expanduser() / "gvpo-jax"
    return Path(tempfile.gettempdir()) / "gvpo-jax"


def fetch(address: str) -> Path:
    """A copy on this machine of a file, a folder, or what a pattern such as gs://b/*.jsonl names.

    What is here and has not changed there is not copied again.

    Raises:
        UserError: there is nothing, it can't be reached, or the disk is full.
    """
    scheme = address.partition("://")[0]
    if scheme not in (*SCHEMES, "memory"):
        raise UserError(
            f"{address} is an address: only {', '.join(SCHEMES)} are read, not {scheme}"
        )
    above, last = address.rstrip("/"), ""
    if glob.has_magic(address):
        fixed = re.split(r"[*?\[]", address)[0].rpartition("/")[0]
        above, last = fixed, address.removeprefix(fixed).strip("/")
    else:
        with _reaching(address):
            fs, path = _filesystem(above)
            if fs.isfile(path):
                above, _, last = above.rpartition("/")
    folder = copy_of(above)
    mirror = Mirror(above, folder, only=last or None)
    with alone(folder):
        mirror.pull()
    if not mirror.names():
        raise UserError(f"{address}: there is nothing")
    return folder / last if last else folder


def copy_of(address: str) -> Path:
    """The folder on this machine for what lies below an address."""
    name = re.sub(r"[^\w.-]+", "-", address.partition("://")[2].strip("/"))[-60:]
    number = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:8]
    return cache_folder() / "buckets" / f"{name}-{number}"


@dataclass
class Mirror:
    """What lies below an address, and a folder here that is to hold the same.

    A file that was changed here since both were level stays as it is, unless it was changed there.

    Attributes:
        address: of a folder in a bucket.
        folder: here; its own record of what was level lies in it.
        entries: the files and folders in it that are meant, by name; None: all.
        only: a name or pattern of files; the others are left alone.
    """

    address: str
    folder: Path
    entries: Sequence[str] | None = None
    only: str | None = None
    _level: dict[str, list[Any]] = field(default_factory=dict)  # what a file was there, and here

    def pull(self) -> None:
        """Make the folder what the bucket is.

        Raises:
            UserError: the bucket can't be reached, or the folder not be written.
        """
        with _reaching(self.address):
            fs, root = _filesystem(self.address)
            self._read_state()
            there = self._there(fs, root)
            for name, mark in there.items():
                file = self.folder / name
                if file.is_file() and self._level.get(name, [None])[0] == mark:
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_name(f".{file.name}.{os.getpid()}.tmp")
                fs.get_file(f"{root}/{name}", str(part))
                part.replace(file)
                self._level[name] = [mark, _stamp(file)]
            for name in self._level.keys() - there.keys():
                (self.folder / name).unlink(missing_ok=True)
                del self._level[name]
            self._write_state()

    def push(self) -> None:
        """Make the bucket what the folder is.

        Raises:
            UserError: the bucket can't be reached.
        """
        with _reaching(self.address):
            fs, root = _filesystem(self.address)
            self._read_state()
            here = {name: _stamp(self.folder / name) for name in self.names()}
            for name, stamp in here.items():
                if self._level.get(name, [None, None])[1] != stamp:
                    fs.put_file(str(self.folder / name), f"{root}/{name}")
            for name in self._level.keys() - here.keys():
                with contextlib.suppress(FileNotFoundError):
                    fs.rm_file(f"{root}/{name}")
            there = self._there(fs, root)
            self._level = {name: [there.get(name), stamp] for name, stamp in here.items()}
            self._write_state()

    def names(self) -> list[str]:
        """Of the files in the folder."""
        files = (x for x in self.folder.rglob("*") if x.is_file() and not x.is_symlink())
        names = (x.relative_to(self.folder).as_posix() for x in files)
        return [name for name in names if self._counts(name)]

    def _counts(self, name: str) -> bool:
        if name.endswith(".tmp") or name == _STATE or ".." in name.split("/"):
            return False
        if self.entries is not None and name.partition("/")[0] not in self.entries:
            return False
        return self.only is None or name == self.only or _matches(name, self.only)

    def _there(self, fs: Any, root: str) -> dict[str, str]:
        """The files of the bucket, by what tells one version of each from another."""
        parts = [root] if self.entries is None else [f"{root}/{name}" for name in self.entries]
        found = [item for part in parts for item in fs.find(part, detail=True).items()]
        named = {path.removeprefix(root).strip("/"): about for path, about in found}
        return {name: _mark(about) for name, about in named.items() if name and self._counts(name)}

    def _read_state(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((self.folder / _STATE).read_text())
            self._level = state if isinstance(state, dict) else {}

    def _write_state(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{_STATE}.{os.getpid()}.tmp"
        part.write_text(json.dumps(self._level))
        part.replace(self.folder / _STATE)


def entries(address: str) -> list[str]:
    """The names of the files and folders right below an address.

    Raises:
        UserError: the bucket can't be reached.
    """
    with _reaching(address):
        fs, path = _filesystem(address)
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted({x.rstrip("/").rpartition("/")[2] for x in found} - {path.rpartition("/")[2]})


def create(address: str, content: bytes) -> bool:
    """Write an object if there is none; whether there was none.

    Raises:
        UserError: the bucket can't be reached.
    """
    with _reaching(address):
        fs, path = _filesystem(address)
        try:
            fs.pipe_file(path, content, mode="create")
        except FileExistsError:
            return False
    return True


def write(address: str, content: bytes) -> None:
    """Write an object, whether there is one or not. Raises UserError."""
    with _reaching(address):
        fs, path = _filesystem(address)
        fs.pipe_file(path, content)


def read(address: str) -> bytes | None:
    """What an object holds; None: there is none. Raises UserError."""
    with _reaching(address):
        fs, path = _filesystem(address)
        with contextlib.suppress(FileNotFoundError):
            return fs.cat_file(path)
    return None


def remove(address: str) -> None:
    """Remove an object, or all that lies below an address. Raises UserError."""
    with _reaching(address):
        fs, path = _filesystem(address)
        if fs.exists(path):
            fs.rm(path, recursive=True)


def _keep_no_listings() -> None:
    """Have fsspec ask the bucket each time: what it remembers may be gone, or not yet there."""
    from fsspec.config import conf

    conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


def _filesystem(address: str) -> tuple[Any, str]:
    import fsspec

    _keep_no_listings()
    fs, path = fsspec.url_to_fs(address)
    return fs, path.rstrip("/")


@contextlib.contextmanager
def _reaching(address: str) -> Iterator[None]:
    """Turns what an unreachable bucket, a missing package or a full disk raise into one line."""
    scheme = address.partition("://")[0]
    try:
        yield
    except UserError:
        raise
    except ImportError:
        need = _NEEDS.get(scheme, "a package that is not installed")
        raise UserError(f"{address}: {scheme}:// needs another package: {need}") from None
    except Exception as error:  # each filesystem has its own
        said = " ".join(str(error).split()) or "no reason given"
        raise UserError(
            f"can't use {address}: {type(error).__name__}: {said[:300]}; look at the address, the "
            "network and the credentials"
        ) from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Several processes of one machine fetch the same one after the other."""
    import filelock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(f"{folder.name}.lock")):
        yield


def _mark(about: dict[str, Any]) -> str:
    names = ("size", "generation", "etag", "ETag", "md5Hash", "created", "mtime", "LastModified")
    return " ".join(str(about[name]) for name in names if about.get(name) is not None)


def _stamp(file: Path) -> list[int]:
    about = file.stat()
    return [about.st_size, about.st_mtime_ns]


def _matches(name: str, pattern: str) -> bool:
    """As `glob` does: a star ends at a slash, two don't."""
    parts = re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", pattern)
    wild = {"**": ".*", "**/": "(.*/)?", "*": "[^/]*", "?": "[^/]"}
    text = "".join(
        wild.get(part) or (part.replace("[!", "[^") if part.startswith("[") else re.escape(part))
        for part in parts
    )
    return re.fullmatch(text, name) is not None
