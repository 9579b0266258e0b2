"""Files in buckets, through fsspec: read from copies on this machine, and kept level with them."""

import contextlib
import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
_RECORD = ".mirror.json"


def is_address(path: Any) -> bool:
    """Whether this is an address such as gs://bucket/folder, and no path on this machine."""
    match = _ADDRESS.match(str(path))
    return bool(match) and match[1] != "package"


def as_path(place: Any) -> "epath.Path":
    """An address, or a path on this machine, as Orbax takes it."""
    from etils import epath

    if is_address(place):
        _keep_no_listings()
        place = normal(str(place))
    return epath.Path(place)


def size_of(address: str) -> int:
    """Bytes of all that lies below an address. Raises UserError where it can't be reached."""
    with reaching(address):
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
    above, last, single = normal(address), "", False
    if glob.has_magic(address):
        above = re.split(r"[*?\[]", above)[0].rpartition("/")[0]
        last = normal(address).removeprefix(above).strip("/")
    else:
        with reaching(address):
            fs, path = _filesystem(above)
            if single := fs.isfile(path):
                above, _, last = above.rpartition("/")
    folder = copy_of(above, "fetched")
    mirror = Mirror(above, folder, [last] if single else None, only=last or None)
    mirror.pull()
    if not mirror.names():
        raise UserError(f"{address}: there is nothing")
    return folder / last if last else folder


def normal(address: str) -> str:
    """An address in the one form that all ways of writing it share."""
    scheme, _, path = address.partition("://")
    return f"{scheme}://{re.sub('/+', '/', path).strip('/')}"


def copy_of(address: str, kind: str) -> Path:
    """The folder on this machine for what lies below an address; of each kind one of its own."""
    address = normal(address)
    name = re.sub(r"[^\w.-]+", "-", address.partition("://")[2])[-60:]
    number = hashlib.sha256(address.encode()).hexdigest()[:8]
    return cache_folder() / kind / f"{name}-{number}"


@dataclass
class Mirror:
    """What lies below an address, and a folder here that is to hold the same.

    Of each file it is known what it was on both sides when they were last level. So a file that was
    changed on one side alone is copied to the other; changed on both, `pull` takes the bucket's and
    `push` the folder's. Nothing is removed that was not level before.

    Attributes:
        address: of a folder in a bucket.
        folder: here; the record of what was level lies in it.
        entries: the files and folders in it that are meant, by name; None: all.
        only: a name or pattern of files; the others are left alone.
    """

    address: str
    folder: Path
    entries: Sequence[str] | None = None
    only: str | None = None

    def pull(self) -> None:
        """Bring here what has changed there.

        Raises:
            UserError: the bucket can't be reached, or the folder not be written.
        """
        with reaching(self.address), self._record() as level:
            fs, root = _filesystem(self.address)
            there = self._there(fs, root)
            for name, mark in there.items():
                file = self.folder / name
                if file.is_file() and level.get(name, [None])[0] == mark:
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_name(f".{file.name}.{os.getpid()}.tmp")
                fs.get_file(f"{root}/{name}", str(part))
                part.replace(file)
                level[name] = [mark, _stamp(file)]
            for name in [x for x in level if self._counts(x) and x not in there]:
                (self.folder / name).unlink(missing_ok=True)
                del level[name]

    def push(self) -> None:
        """Bring there what has changed here.

        Raises:
            UserError: the bucket can't be reached.
        """
        with reaching(self.address), self._record() as level:
            fs, root = _filesystem(self.address)
            here = {name: _stamp(self.folder / name) for name in self.names()}
            for name, stamp in here.items():
                if level.get(name, [None, None])[1] != stamp:
                    fs.put_file(str(self.folder / name), f"{root}/{name}")
                    level[name] = [self._there(fs, root, name).get(name), stamp]
            for name in [x for x in level if self._counts(x) and x not in here]:
                if self._there(fs, root, name).get(name) == level[name][0]:
                    fs.rm_file(f"{root}/{name}")
                del level[name]

    def names(self) -> list[str]:
        """Of the files in the folder."""
        files = (x for x in self.folder.rglob("*") if x.is_file() and not x.is_symlink())
        names = (x.relative_to(self.folder).as_posix() for x in files)
        return [name for name in names if self._counts(name)]

    def _counts(self, name: str) -> bool:
        parts = name.split("/")
        # An empty part at the end is how a console or a mount keeps an empty folder.
        if {"", ".", ".."} & set(parts) or name.endswith(".tmp") or name == _RECORD:
            return False
        if self.entries is not None and parts[0] not in self.entries:
            return False
        return self.only is None or name == self.only or _matches(name, self.only)

    def _there(self, fs: Any, root: str, *names: str) -> dict[str, str]:
        """The files of the bucket, by what tells one version of each from another.

        names: of those that are asked for; default: all that are meant.
        """
        asked = names or self.entries
        parts = [root] if asked is None else [f"{root}/{name}" for name in asked]
        found = [item for part in parts for item in fs.find(part, detail=True).items()]
        named = {path.lstrip("/").removeprefix(f"{root.lstrip('/')}/"): x for path, x in found}
        return {name: _mark(about) for name, about in named.items() if self._counts(name)}

    @contextlib.contextmanager
    def _record(self) -> Iterator[dict[str, list[Any]]]:
        """What was level, held against other processes of this machine; kept also on failure."""
        import filelock

        self.folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.folder.with_name(f"{self.folder.name}.lock")):
            level: dict[str, list[Any]] = {}
            with contextlib.suppress(OSError, ValueError):
                read = json.loads((self.folder / _RECORD).read_text())
                level = read if isinstance(read, dict) else {}
            try:
                yield level
            finally:
                part = self.folder / f"{_RECORD}.{os.getpid()}.tmp"
                part.write_text(json.dumps(level))
                part.replace(self.folder / _RECORD)


def entries(address: str) -> list[str]:
    """The names of the files and folders right below an address; of a file none but its own.

    Raises:
        UserError: the bucket can't be reached.
    """
    with reaching(address):
        fs, path = _filesystem(address)
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        names = {x.rstrip("/").rpartition("/")[2] for x in found if x.rstrip("/") != path}
        return sorted(names) if names or not fs.isfile(path) else [path.rpartition("/")[2]]


def swap(address: str, old: bytes | None, new: bytes | None) -> bool:
    """Put `new` in the place of `old`, if that is what the object holds; None: there is no object.

    On Cloud Storage this is one operation: of several that try, one succeeds.

    Raises:
        UserError: the bucket can't be reached.
    """
    with reaching(address):
        if address.startswith("gs://"):
            return _swap_on_gcs(address, old, new)
        if read(address) != old:
            return False
        fs, path = _filesystem(address)
        if new is None:
            fs.rm_file(path)
        else:
            fs.pipe_file(path, new)
    return True


def _swap_on_gcs(address: str, old: bytes | None, new: bytes | None) -> bool:
    from google.api_core import exceptions
    from google.cloud import storage

    bucket, _, name = address.removeprefix("gs://").partition("/")
    blob = storage.Client().bucket(bucket).blob(name)
    try:
        generation = 0
        if old is not None:
            blob.reload()
            generation = blob.generation
            if blob.download_as_bytes(if_generation_match=generation) != old:
                return False
        if new is None:
            blob.delete(if_generation_match=generation)
        else:
            blob.upload_from_string(new, if_generation_match=generation)
    except (exceptions.PreconditionFailed, exceptions.NotFound):
        return False
    return True


def read(address: str) -> bytes | None:
    """What an object holds; None: there is none. Raises UserError."""
    with reaching(address):
        fs, path = _filesystem(address)
        with contextlib.suppress(FileNotFoundError):
            return fs.cat_file(path)
    return None


def remove(address: str) -> None:
    """Remove an object, or all that lies below an address. Raises UserError."""
    with reaching(address):
        fs, path = _filesystem(address)
        for file in fs.find(path):  # `rm` would take a name such as run[1] for a pattern
            fs.rm_file(file)


def _keep_no_listings() -> None:
    """Have fsspec ask the bucket each time: what it remembers may be gone, or not yet there."""
    from fsspec.config import conf

    conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


def _filesystem(address: str) -> tuple[Any, str]:
    import fsspec

    _keep_no_listings()
    fs, path = fsspec.url_to_fs(normal(address))
    return fs, path.rstrip("/")


@contextlib.contextmanager
def reaching(address: str) -> Iterator[None]:
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


def _mark(about: dict[str, Any]) -> str:
    names = ("size", "generation", "etag", "ETag", "md5Hash", "created", "mtime", "LastModified")
    return " ".join(str(about[x]) for x in (*names, "blob_id") if about.get(x) is not None)


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
