"""Files in buckets: fetched, mirrored, held; by fsspec's file system in memory."""

import json
import re
import socket
import threading
import time

import fsspec
import pytest

from gvpo_jax import buckets
from gvpo_jax.config import Config
from gvpo_jax.config_file import override
from gvpo_jax.data.rows import load_rows
from gvpo_jax.errors import UserError
from gvpo_jax.rundir import bucket

ROOT = "memory://bucket/run"


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """An empty file system in memory, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def put(fs, name, text):
    fs.pipe_file(f"/bucket/run/{name}", text.encode())


def there(fs):
    return {
        path.removeprefix("/bucket/run/"): fs.cat_file(path).decode() for path in fs.find("/bucket")
    }


def here(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".mirror.json"
    }


def test_both_sides_become_the_same(memory, tmp_path):
    mirror = buckets.Mirror(ROOT, tmp_path / "here")
    put(memory, "a.txt", "1")
    put(memory, "eval/b.txt", "2")
    mirror.pull()
    assert here(tmp_path / "here") == {"a.txt": "1", "eval/b.txt": "2"}
    (tmp_path / "here" / "a.txt").write_text("changed")
    (tmp_path / "here" / "eval" / "b.txt").unlink()
    (tmp_path / "here" / "c.txt").write_text("new")
    mirror.push()
    assert there(memory) == here(tmp_path / "here") == {"a.txt": "changed", "c.txt": "new"}


def test_only_what_has_changed_is_copied(memory, tmp_path, monkeypatch):
    copied = []
    get, store = type(memory).get_file, type(memory).put_file
    monkeypatch.setattr(
        type(memory), "get_file", lambda self, *a: (copied.append(a[0]), get(self, *a))
    )
    monkeypatch.setattr(
        type(memory), "put_file", lambda self, *a: (copied.append(a[1]), store(self, *a))
    )
    for name in ("a", "b"):
        put(memory, name, "1")
    mirror = buckets.Mirror(ROOT, tmp_path)
    mirror.pull()
    assert len(copied) == 2
    buckets.Mirror(ROOT, tmp_path).pull()
    buckets.Mirror(ROOT, tmp_path).push()
    assert len(copied) == 2
    (tmp_path / "a").write_text("22")
    buckets.Mirror(ROOT, tmp_path).push()
    assert len(copied) == 3
    put(memory, "b", "333")
    buckets.Mirror(ROOT, tmp_path).pull()
    assert len(copied) == 4
    assert here(tmp_path) == {"a": "22", "b": "333"}


def test_what_could_not_be_pushed_is_not_lost_by_the_next_pull(memory, tmp_path):
    put(memory, "metrics.jsonl", "1\n")
    buckets.Mirror(ROOT, tmp_path).pull()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    (tmp_path / "summary.json").write_text("{}")
    buckets.Mirror(ROOT, tmp_path).pull()  # a new session, after one whose bucket was away
    assert here(tmp_path) == {"metrics.jsonl": "1\n2\n", "summary.json": "{}"}
    buckets.Mirror(ROOT, tmp_path).push()
    assert there(memory) == here(tmp_path)


def test_names_that_lead_out_of_the_folder_are_not_taken(memory, tmp_path):
    put(memory, "a", "1")
    memory.store["/bucket/run/../../out.txt"] = memory.store["/bucket/run/a"]
    buckets.Mirror(ROOT, tmp_path / "in" / "here").pull()
    assert here(tmp_path) == {"in/here/a": "1"}


def test_a_run_copies_its_own_files_and_no_others(memory, monkeypatch):
    """A bucket may hold terabytes beside them."""
    for name in ("metrics.jsonl", "eval/before.jsonl", "checkpoints/4/params/x", "theirs/big"):
        put(memory, name, "{}")
    folder = bucket.pull(ROOT)
    assert sorted(here(folder)) == ["eval/before.jsonl", "metrics.jsonl"]
    (folder / "weights").mkdir()
    (folder / "weights" / "x").write_text("")
    (folder / "report.html").write_text("page")
    bucket.push(ROOT)
    assert "report.html" in there(memory)
    assert "weights/x" not in there(memory)
    assert sorted(bucket.entries(ROOT)) == [
        "checkpoints", "eval", "metrics.jsonl", "report.html", "theirs"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("rows/a.jsonl", ["a"]),
        ("rows", ["a", "b"]),
        ("rows/*.jsonl", ["a", "b"]),
        ("rows/[!a].jsonl", ["b"]),
        ("ro*/b.jsonl", ["b"]),
        ("**/a.jsonl", ["a"]),
    ],
)
def test_rows_are_read_from_a_file_a_folder_and_a_pattern(memory, monkeypatch, asked, found):
    for name in ("a", "b"):
        put(memory, f"rows/{name}.jsonl", json.dumps({"prompt": name}) + "\n")
    assert [row["prompt"] for row in load_rows(f"{ROOT}/{asked}")] == found
    put(memory, "rows/b.jsonl", json.dumps({"prompt": "changed"}) + "\n")
    expected = ["changed" if name == "b" else name for name in found]
    assert [row["prompt"] for row in load_rows(f"{ROOT}/{asked}")] == expected


@pytest.mark.parametrize("asked", ["rows/c.jsonl", "nothing", "rows/*.parquet"])
def test_what_is_not_there_is_said(memory, asked):
    put(memory, "rows/a.jsonl", "{}")
    with pytest.raises(UserError, match=r"nothing|parquet|c\.jsonl") as error:
        load_rows(f"{ROOT}/{asked}")
    assert ROOT in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_system_that_fails_is_one_line(memory, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no\ncredentials" + "x" * 1000)

    monkeypatch.setattr(type(memory), "find", fail)
    with pytest.raises(
        UserError, match="can't use memory://bucket/run: RuntimeError: no cred"
    ) as e:
        buckets.Mirror(ROOT, buckets.cache_folder()).pull()
    assert len(str(e.value)) < 500


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("run__dir", "s3://bucket/run", "run.dir=s3://bucket/run is an address: give a path on "
         "this machine, or one that begins with gs://"),
        ("run__dir", "gs:/bucket/run", "begins with gs://"),
        ("run__dir", "gs://", "give a bucket and a path in it, as in gs://bucket/folder"),
        ("data__path", "ftp://host/rows.jsonl", "begins with gs://, s3://, az://, hf://"),
        ("model__name", "https://host/model", "begins with gs://, s3://, az://, hf://"),
        ("servers__weights_dir", "gs://bucket/x", "give a path on this machine"),
    ],
)  # fmt: skip
def test_addresses_that_can_not_be_used_are_refused_at_once(key, value, said):
    with pytest.raises(UserError, match=re.escape(said)):
        override(Config(), **{key: value})


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(UserError, match="s3:// needs another package: pip install s3fs"):
        buckets.fetch("s3://bucket/rows.jsonl")


@pytest.fixture
def quick(monkeypatch):
    """Signs of life every 50 ms, and none for half a second where there is none."""
    monkeypatch.setattr(bucket, "BEAT", 0.05)
    monkeypatch.setattr(bucket, "SILENT", 0.5)


def test_a_run_is_held_and_free_again(memory, quick):
    with bucket.hold(ROOT):
        owner = json.loads(memory.cat_file("/bucket/run/.lock"))
        assert owner["host"] == socket.gethostname()
        time.sleep(0.2)
        assert json.loads(memory.cat_file("/bucket/run/.lock"))["beat"] > owner["beat"]
        with pytest.raises(UserError, match="is training in memory://bucket/run; wait for it"):
            bucket.hold(ROOT).__enter__()
    assert not memory.exists("/bucket/run/.lock")


@pytest.mark.parametrize("age", [1, 10_000])
def test_the_lock_of_a_killed_process_elsewhere_is_taken_when_it_is_silent(memory, quick, age):
    owner = {"host": "another", "pid": 1, "token": "x", "beat": 3, "time": time.time() - age}
    put(memory, ".lock", json.dumps(owner))
    notes, start = [], time.monotonic()
    with bucket.hold(ROOT, notes.append):
        assert (time.monotonic() - start > 0.5) or age == 10_000
        assert json.loads(memory.cat_file("/bucket/run/.lock"))["pid"] != 1
    assert len(notes) == (age == 1)
    assert all("another" in note and "sign of life" in note for note in notes)


def test_the_lock_of_a_killed_process_here_is_taken_at_once(memory):
    owner = {"host": socket.gethostname(), "pid": 2**22 + 1, "token": "x", "time": time.time()}
    put(memory, ".lock", json.dumps(owner))
    start = time.monotonic()
    with bucket.hold(ROOT):
        assert time.monotonic() - start < 10


def test_of_two_that_wait_for_a_silent_one_one_gets_the_run(memory, quick):
    owner = {"host": "another", "pid": 1, "token": "x", "beat": 3, "time": time.time()}
    put(memory, ".lock", json.dumps(owner))
    holding, most, refused = [], [], []

    def work():
        try:
            with bucket.hold(ROOT, lambda _: None):
                holding.append(1)
                most.append(len(holding))
                time.sleep(1.5)
                holding.pop()
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) + len(refused) == 2


def test_a_broken_lock_says_nothing_of_its_owner_and_is_waited_for(memory, quick):
    put(memory, ".lock", "not json")
    with bucket.hold(ROOT, lambda _: None):
        assert json.loads(memory.cat_file("/bucket/run/.lock"))["token"]
