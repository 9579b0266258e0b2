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
from gvpo_jax.rundir.claim import check_not_foreign, clear, has_begun

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
    assert here(tmp_path / "in" / "here") == {"a": "1"}
    assert not list(tmp_path.rglob("out.txt"))


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
        ("run__dir", "gs://", "run.dir=gs://: give a bucket and a path"),
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


def owner(**changes):
    """A lock of a process that was killed on another machine."""
    return json.dumps({"host": "another", "pid": 1, "token": "x", "time": time.time()} | changes)


def test_a_run_is_held_and_free_again(memory, quick):
    with bucket.Hold(ROOT):
        first = json.loads(memory.cat_file("/bucket/run/.lock"))
        assert first["host"] == socket.gethostname()
        time.sleep(0.3)
        assert json.loads(memory.cat_file("/bucket/run/.lock"))["beat"] > first["beat"]
        with pytest.raises(UserError, match="is training in memory://bucket/run; wait for it"):
            bucket.Hold(ROOT).__enter__()
    assert not memory.exists("/bucket/run/.lock")


@pytest.mark.parametrize("age", [1, 10_000, -10_000])
def test_the_lock_of_a_killed_process_elsewhere_is_taken_when_it_is_silent(memory, quick, age):
    """Whatever its clock says."""
    put(memory, ".lock", owner(time=time.time() - age))
    notes, start = [], time.monotonic()
    with bucket.Hold(ROOT, notes.append):
        assert time.monotonic() - start > 0.5
        assert json.loads(memory.cat_file("/bucket/run/.lock"))["pid"] != 1
    (note,) = notes
    assert "process 1 on another" in note
    assert "sign of life" in note


def test_the_lock_of_a_killed_process_here_is_taken_at_once(memory):
    put(memory, ".lock", owner(pid=2**22 + 1, **bucket._here()))
    start = time.monotonic()
    with bucket.Hold(ROOT):
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("name", ["boot", "namespace", "host"])
def test_a_number_means_nothing_in_another_container(memory, quick, name):
    put(memory, ".lock", owner(pid=2**22 + 1, **(bucket._here() | {name: "another"})))
    start = time.monotonic()
    with bucket.Hold(ROOT, lambda _: None):
        assert time.monotonic() - start > 0.5


def test_of_several_that_wait_for_a_silent_one_one_gets_the_run(memory, quick):
    put(memory, ".lock", owner())
    holding, most, refused = [], [], []
    alone = threading.Lock()  # in memory, comparing and writing are two operations
    swap = buckets.swap

    def one_by_one(*arguments):
        with alone:
            return swap(*arguments)

    def work():
        try:
            with bucket.Hold(ROOT, lambda _: None):
                holding.append(1)
                most.append(len(holding))
                time.sleep(1.5)
                holding.pop()
        except UserError as error:
            refused.append(str(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket.buckets, "swap", one_by_one)
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(most) == 1
    assert len(most) + len(refused) == 3


def test_one_whose_run_was_taken_over_is_told_before_it_writes(memory):
    with bucket.Hold(ROOT) as held:
        held.check()
        put(memory, ".lock", owner())
        with pytest.raises(UserError, match="has been taken over by process 1 on another"):
            held.check()
    assert json.loads(memory.cat_file("/bucket/run/.lock"))["pid"] == 1  # is not removed


def test_a_broken_lock_says_nothing_of_its_owner_and_is_waited_for(memory, quick):
    put(memory, ".lock", "not json")
    with bucket.Hold(ROOT, lambda _: None):
        assert json.loads(memory.cat_file("/bucket/run/.lock"))["token"]


def test_rows_that_lie_in_a_run_leave_the_run_alone(memory):
    """Fetched files and a run's own are kept apart, on both sides."""
    for name in ("config.yaml", "metrics.jsonl", "checkpoints/10/x", "held_out.jsonl", ".lock"):
        put(memory, name, json.dumps({"prompt": "x"}) + "\n")
    before = there(memory)
    folder = bucket.pull(ROOT)
    load_rows(f"{ROOT}/held_out.jsonl")
    (folder / "eval").mkdir()
    (folder / "eval" / "latest.jsonl").write_text("{}")
    bucket.push(ROOT)
    assert there(memory) == before | {"eval/latest.jsonl": "{}"}
    assert (folder / "metrics.jsonl").exists()


def test_files_side_by_side_are_fetched_once_each(memory, monkeypatch):
    fetched = []
    get = type(memory).get_file
    monkeypatch.setattr(
        type(memory), "get_file", lambda self, *a: (fetched.append(a[0]), get(self, *a))
    )
    for name in ("train", "eval"):
        put(memory, f"{name}.jsonl", json.dumps({"prompt": name}) + "\n")
    put(memory, "big/model.bin", "x")
    for _ in range(3):
        for name in ("train", "eval"):
            assert load_rows(f"{ROOT}/{name}.jsonl") == [{"prompt": name}]
    assert len(fetched) == 2


def test_a_push_takes_nothing_over_that_it_did_not_bring(memory, tmp_path):
    """Two machines: one evaluates while the other trains on."""
    here_, there_ = (buckets.Mirror(ROOT, tmp_path / x) for x in ("here", "there"))
    put(memory, "metrics.jsonl", "1\n")
    here_.pull()
    there_.pull()
    (tmp_path / "there" / "metrics.jsonl").write_text("1\n2\n3\n")
    there_.push()
    (tmp_path / "here" / "latest.jsonl").write_text("{}")
    here_.push()
    here_.pull()
    assert (tmp_path / "here" / "metrics.jsonl").read_text() == "1\n2\n3\n"
    there_.pull()
    assert (tmp_path / "there" / "latest.jsonl").exists()


def test_a_push_that_breaks_off_is_gone_on_with(memory, tmp_path, monkeypatch):
    mirror = buckets.Mirror(ROOT, tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("1\n")
    store, calls = type(memory).put_file, []

    def once(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("away")
        return store(self, *arguments)

    monkeypatch.setattr(type(memory), "put_file", once)
    with pytest.raises(UserError, match="away"):
        mirror.push()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("1\n2\n")
    mirror.pull()
    assert set(here(tmp_path).values()) == {"1\n2\n"}
    mirror.push()
    assert there(memory) == {"a.jsonl": "1\n2\n", "b.jsonl": "1\n2\n"}


def test_a_file_that_is_open_is_not_replaced_under_its_writer(memory, tmp_path):
    """A report is drawn on the machine that trains: its pull leaves newer lines alone."""
    mirror = buckets.Mirror(ROOT, tmp_path)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for line in ("1", "2"):
            file.write(f"{line}\n")
            file.flush()
            mirror.push()
            mirror.pull()
        file.write("3\n")
    mirror.push()
    assert there(memory) == {"metrics.jsonl": "1\n2\n3\n"}


def test_a_name_that_looks_like_a_pattern_is_a_name(memory):
    for name in ("exp[a]/metrics.jsonl", "expa/metrics.jsonl", "expa/checkpoints/4/x"):
        memory.pipe_file(f"/bucket/{name}", b"{}")
    buckets.remove("memory://bucket/exp[a]")
    assert [path for path in memory.find("/bucket") if "metrics" in path] == [
        "/bucket/expa/metrics.jsonl"
    ]


@pytest.mark.parametrize("run_dir", [f"{ROOT}/", f"{ROOT}//", "memory://bucket//run"])
def test_slashes_more_or_less_are_the_same_run(memory, run_dir):
    put(memory, "checkpoints/4/x", "1")
    put(memory, "metrics.jsonl", '{"step": 4}')
    assert bucket.local(run_dir) == bucket.local(ROOT)
    assert has_begun(run_dir)
    assert bucket.pull(run_dir) == bucket.local(ROOT)
    clear(run_dir)
    assert not there(memory)


def test_empty_folders_of_a_console_or_a_mount_are_no_files(memory):
    put(memory, "eval/before.jsonl", "{}")
    memory.store["/bucket/run/eval/"] = memory.store["/bucket/run/eval/before.jsonl"]
    memory.store["/bucket/run/model//x"] = memory.store["/bucket/run/eval/before.jsonl"]
    assert list(here(bucket.pull(ROOT))) == ["eval/before.jsonl"]
    assert buckets.fetch(ROOT).is_dir()


def test_a_cache_that_can_not_be_written_is_one_line(memory, monkeypatch):
    put(memory, "metrics.jsonl", "{}")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(UserError, match=r"can't use memory://bucket/run: .*nowhere"):
        bucket.pull(ROOT)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("gs://bucket/exp[1]", "without blanks"),
        ("gs://bucket/my run", "without blanks"),
        ("gs://bucket/../run", "without blanks"),
    ],
)
def test_a_run_has_a_plain_address(address, said):
    with pytest.raises(UserError, match=said):
        override(Config(), run__dir=address)


def test_an_object_is_no_run_folder(memory):
    memory.pipe_file("/bucket/rows.jsonl", b"{}")
    with pytest.raises(UserError, match=r"rows\.jsonl exists and is not a run folder"):
        check_not_foreign("memory://bucket/rows.jsonl")
