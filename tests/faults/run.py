"""The fault matrix: what happens to a run, and whether it goes on as if nothing had.

    python tests/faults/run.py                    # the long form: results.json and README
    python tests/faults/run.py --only "kill -9"   # the faults whose names begin so
    python tests/faults/run.py --short --out FILE # one case of each fault, as in CI

A case passes if the run then goes on, by the same command, and its files and its last checkpoint
are bit for bit those of a run that nothing happened to; or if it is refused by one line, with
status 2 and nothing lost. Each case is a folder of its own; one that fails is kept, and named.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from gvpo_jax.rundir.files import read_jsonl, read_metrics

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STEPS = 6
SETTINGS = [
    f"train.steps={STEPS}", "train.batch_size=4", "checkpoint.every=2", "checkpoint.keep=3",
    "eval.every=2", "data.eval_size=4", "log.completions_every=1", "mesh.fsdp=1", "log.samples=0",
]  # fmt: skip
TRAIN = ["-m", "gvpo_jax", "train", "debug", *SETTINGS]
SIGNALS = {"SIGTERM": 143, "SIGINT": 130}


@dataclass
class Case:
    """What one trial has: a folder of its own, and the run that nothing happened to."""

    folder: Path
    whole: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def command(self) -> list[str]:
        return [sys.executable, *TRAIN, f"run.dir={self.run}"]

    def train(self, *settings: str, **options) -> subprocess.CompletedProcess:
        return python(*TRAIN, f"run.dir={self.run}", *settings, **options)

    def half(self) -> Path:
        """A run that stopped at 4 updates; all cases share it."""
        half = self.whole.parent / "half"
        if not half.exists():
            done = python(*TRAIN, f"run.dir={half}", "train.stop_at=4")
            assert done.returncode == 0, done.stderr
        return half

    def beside(self, name: str, train: Callable[["Case"], object]) -> "Case":
        """This case, whose run nothing happened to was trained in another way."""
        other = Case(self.whole.parent / name, self.whole)
        if not other.run.exists():
            train(other)
        return Case(self.folder, other.run)

    def disturbed(self, phase: str, when: str, count: int, what: str, *settings: str):
        script = [str(HERE / "disturbed.py"), phase, when, str(count), what, "--"]
        return python(*script, *TRAIN[2:], f"run.dir={self.run}", *settings)

    def goes_on(self) -> None:
        """By the same command, to the same end."""
        done = self.train()
        assert done.returncode == 0, done.stderr[-2000:]
        self.is_whole()

    def is_whole(self) -> None:
        for name in ("metrics.jsonl", "eval", "completions"):
            for file in sorted([self.whole / name, *(self.whole / name).glob("*")]):
                if file.is_file():
                    here = self.run / file.relative_to(self.whole)
                    assert without_clocks(here) == without_clocks(file), f"{here} differs"
        assert checksums(self.run) == checksums(self.whole), "another checkpoint"
        assert {x.name for x in self.run.iterdir()} == {x.name for x in self.whole.iterdir()}
        rubbish = [x for x in self.run.rglob("*") if x.name.endswith(".tmp") or "-tmp" in x.name]
        assert not rubbish, f"{rubbish} is left"

    def pair(self, *disturbed: str, of: int = 0) -> list[tuple[int, str]]:
        """Status and errors of two processes, the first first; `disturbed` is one of them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        both = []
        for i in (0, 1):
            script = [str(HERE / "disturbed.py"), *disturbed, "--"] if disturbed and i == of else []
            command = [*(script or TRAIN[:2]), *TRAIN[2:], f"run.dir={self.run}", "mesh.data=2"]
            command += [f"distributed.coordinator_address={address}", f"distributed.process_id={i}"]
            command += ["distributed.num_processes=2", "distributed.heartbeat_timeout=10"]
            both.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
                    cwd=ROOT,
                )
            )
        ended = {}
        for i in (1 - of, of):
            _, err = both[i].communicate(timeout=300)
            ended[i] = both[i].returncode, err
            if "SIGSTOP" in disturbed:  # it would wait for ever
                both[of].kill()
        return [ended[0], ended[1]]

    def is_refused(self, done: subprocess.CompletedProcess, *words: str) -> str:
        """By one line that says these words; below it may be the address of a page."""
        lines = done.stderr.strip().splitlines()
        lines = lines[:-1] if lines[-1].startswith("see https://") else lines
        assert done.returncode == 2, f"status {done.returncode}: {done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
        assert len(lines[-1]) <= 500
        for word in words:
            assert word in lines[-1], lines[-1]
        return lines[-1]


def python(*arguments: str, timeout: float = 300, **changes: str | None):
    """A Python program; `changes` are of its environment."""
    return run([sys.executable, *arguments], timeout, changes)


def run(command: list[str], timeout: float = 300, changes: dict[str, str | None] | None = None):
    """A command, with this environment."""
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | (changes or {})
    environment = {name: value for name, value in variables.items() if value is not None}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout, cwd=ROOT
    )


def mounting(mount: str, after: str = "true") -> list[str]:
    """Opens a command that has a file system of its own mounted; no rights are needed for it."""
    script = f'{mount} && "$@"; status=$?; {after}; exit $status'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"]


def without_clocks(file: Path) -> list[dict]:
    rows = read_metrics(file.parent) if file.name == "metrics.jsonl" else read_jsonl(file)
    clocks = ("time", "second", "memory")
    return [{k: v for k, v in row.items() if not any(x in k for x in clocks)} for row in rows]


def checksums(run: Path) -> dict:
    """Of every array in the last checkpoint."""
    (file,) = (run / "checkpoints" / str(STEPS) / "extra").glob("metadata")
    return json.loads(file.read_text())["checksums"]


# Faults: names, and their cases; a case is what tells it, and what is done.

Cases = Iterable[tuple[str, Callable[[Case], None]]]


def killed() -> Cases:
    """SIGKILL before and after a call, early and late in the run."""
    calls = {
        "rollout": (1, 3, 6), "reward": (1, 3, 6), "update": (1, 3, 6), "save": (1, 2, 3),
        "evaluation": (1, 3, 4), "summary": (1,), "report": (1,),
    }  # fmt: skip
    for phase, counts in calls.items():
        for count in counts:
            for when in ("before", "after"):

                def case(c: Case, phase=phase, when=when, count=count):
                    done = c.disturbed(phase, when, count, "SIGKILL")
                    assert done.returncode == -signal.SIGKILL, done.stderr[-500:]
                    c.goes_on()

                yield f"{when} {phase} {count}", case


def told() -> Cases:
    """SIGTERM and Ctrl-C, once and twice, in each phase."""
    for name, status in SIGNALS.items():
        for times in (1, 2):
            for phase in ("rollout", "reward", "update", "save", "evaluation", "report"):

                def case(c: Case, name=name, status=status, times=times, phase=phase):
                    count = {"report": 1, "save": 1}.get(phase, 2)
                    done = c.disturbed(phase, "before", count, "+".join([name] * times))
                    at_once = -getattr(signal, name)  # before the first update, or told twice
                    assert done.returncode in (status, at_once, 0), done.stderr[-500:]
                    assert "Traceback" not in done.stderr, done.stderr[-2000:]
                    c.goes_on()

                yield f"{name} x {times} in {phase}", case


def told_with_lookahead() -> Cases:
    """The same with rollouts that are drawn ahead by a thread."""
    ahead = "rollout.lookahead=1"
    for name, status in SIGNALS.items():
        for phase in ("rollout", "reward", "update", "save"):

            def case(c: Case, name=name, status=status, phase=phase):
                c = c.beside("ahead", lambda c: c.train(ahead))
                done = c.disturbed(phase, "before", 3 if phase != "save" else 1, name, ahead)
                at_once = -getattr(signal, name)  # before the first update
                assert done.returncode in (status, at_once), done.stderr[-500:]
                assert "Traceback" not in done.stderr, done.stderr[-2000:]
                assert c.train(ahead).returncode == 0
                c.is_whole()

            yield f"{name} in {phase}", case


def one_of_two() -> Cases:
    """One of two processes is killed, stopped or told to end; the other ends by a line, too."""
    line = "start the same command again on all hosts"
    for of in (0, 1):
        for name in ("SIGKILL", "SIGSTOP"):
            for phase in ("rollout", "update", "save"):

                def case(c: Case, of=of, name=name, phase=phase):
                    c = c.beside("two", lambda c: c.pair())
                    (status, _), (other, err) = c.pair(phase, "before", "2", name, of=of)[
                        :: 1 - 2 * of
                    ]
                    assert status == -signal.SIGKILL, status
                    assert other in (75, -signal.SIGABRT), f"status {other}: {err[-1000:]}"
                    assert line in err, err[-1000:]
                    assert [status for status, _ in c.pair()] == [0, 0]
                    c.is_whole()

                yield f"{name} to process {of} in {phase}", case
        for name, status in SIGNALS.items():

            def case(c: Case, of=of, name=name, status=status):
                c = c.beside("two", lambda c: c.pair())
                ended = c.pair("update", "before", "3", name, of=of)
                assert [x for x, _ in ended] == [status, status], ended
                assert [status for status, _ in c.pair()] == [0, 0]
                c.is_whole()

            def twice(c: Case, of=of, name=name, status=status):
                c = c.beside("two", lambda c: c.pair())
                both = c.pair("update", "before", "3", f"{name}+{name}", of=of)
                (told, err), (other, its) = both[:: 1 - 2 * of]
                # Told again it need not wait for the other, which may have been told by then, too.
                assert told in (status, -getattr(signal, name)), f"{told}: {err[-1000:]}"
                assert other in (status, 75, -signal.SIGABRT), f"status {other}: {its[-1000:]}"
                assert "Traceback" not in err + its, (err + its)[-2000:]
                assert [status for status, _ in c.pair()] == [0, 0]
                c.is_whole()

            yield f"{name} to process {of}", case
            yield f"{name} x 2 to process {of}", twice


def damaged() -> Cases:
    """Each file of the newest checkpoint: cut, removed, a bit flipped."""
    for number in range(30):
        for how in ("cut", "removed", "flipped"):

            def case(c: Case, number=number, how=how):
                shutil.copytree(c.half(), c.run)
                files = sorted(x for x in (c.run / "checkpoints" / "4").rglob("*") if x.is_file())
                damage(files[number % len(files)], how)
                c.goes_on()

            yield f"file {number} {how}", case


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "removed":
        file.unlink()
    elif how == "cut" or not content:
        file.write_bytes(content[: len(content) // 2])
    else:
        place = random.Random(str(file.name)).randrange(len(content))
        content[place] ^= 1 << place % 8
        file.write_bytes(content)


SIZES = (60, 400, 700, 1000, 1400)  # KiB
MOUNTING = ("read-only", *(f"a file system of {room} KiB" for room in SIZES))


def full() -> Cases:
    """Writing fails for want of room; what was trained stays."""
    for phase, count in (("metrics", 2), ("summary", 1), ("report", 1)):

        def case(c: Case, phase=phase, count=count):
            done = c.disturbed(phase, "before", count, "ENOSPC")
            assert done.returncode == 0, done.stderr[-2000:]
            assert "No space left" in done.stdout
            assert checksums(c.run) == checksums(c.whole)

        yield phase, case

    def saving(c: Case):
        done = c.disturbed("save", "before", 2, "ENOSPC")
        assert done.returncode in (1, 2), done.returncode
        c.goes_on()

    yield "save", saving

    for room in SIZES:

        def small(c: Case, room=room):
            """A file system of so many KiB, and then, with the same files, one with room."""
            c.run.mkdir()
            kept = c.folder / "kept"
            keep = f"cp -r '{c.run}' '{kept}'"
            done = run(
                [*mounting(f"mount -t tmpfs -o size={room}k none '{c.run}'", keep), *c.command]
            )
            assert done.returncode in (0, 2), f"status {done.returncode}: {done.stderr[-2000:]}"
            assert "Traceback" not in done.stderr, done.stderr[-2000:]
            assert "o space left" in done.stderr + done.stdout, done.stderr[-2000:]
            c.run.rmdir()
            kept.rename(c.run)
            c.goes_on()

        yield f"a file system of {room} KiB", small


REWARDS = {
    "raises": "the judge is away", "too_few": "too_few", "texts": "texts", "exits": "exits",
    "huge": "the mean reward is", "eats_memory": "MemoryError",
}  # fmt: skip


def rewards() -> Cases:
    """Reward functions that fail: a line with the reason, and the updates before are saved."""
    for name, word in REWARDS.items():

        def case(c: Case, name=name, word=word):
            done = c.train(f"rewards.funcs=[{HERE / 'rewards.py'}:{name}]")
            said = c.is_refused(done)
            assert word in said, said

        yield name, case

    def hangs(c: Case):
        function = f"rewards.funcs=[{HERE / 'rewards.py'}:hangs]"
        c.is_refused(c.train(function, "rewards.deadline=3"), "hangs")

    yield "hangs, with rewards.deadline", hangs
    for name in ("closes_output", "closes_descriptor", "forks", "moves_away"):

        def case(c: Case, name=name):
            done = c.train(f"rewards.funcs=[{HERE / 'rewards.py'}:{name}]")
            assert done.returncode == 0, done.stderr[-2000:]
            assert checksums(c.run) == checksums(c.whole)

        yield name, case


def folders() -> Cases:
    """Folders that are odd, or not to be had."""

    def twice(c: Case):
        arguments = [sys.executable, *TRAIN, f"run.dir={c.run}", "train.steps=400"]
        first = subprocess.Popen(
            arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
        )
        while not (c.run / "metrics.jsonl").exists() and first.poll() is None:
            time.sleep(0.1)
        c.is_refused(c.train("train.steps=400"), "another process is training")
        assert first.poll() is None
        first.kill()
        first.wait()

    yield "two runs in one", twice

    def odd(c: Case):
        c.folder = c.folder / "ein Ordner \u2713 mit #:'{*?} Namen"
        c.folder.mkdir()
        assert c.train("train.stop_at=3").returncode == 0
        c.goes_on()

    yield "spaces, signs and letters of all kinds", odd

    def moved(c: Case):
        assert c.train("train.stop_at=3").returncode == 0
        there = c.folder / "elsewhere"
        shutil.move(c.run, there)
        assert python("-m", "gvpo_jax", "train", str(there)).returncode == 0
        shutil.move(there, c.run)
        c.is_whole()

    yield "moved", moved

    def linked(c: Case):
        (c.folder / "disk").mkdir()
        c.run.symlink_to(c.folder / "disk")
        assert c.train("train.stop_at=3").returncode == 0
        c.goes_on()

    yield "a symbolic link", linked

    def read_only(c: Case):
        assert c.train("train.stop_at=3").returncode == 0
        c.is_refused(run([*mounting(f"mount -o bind,ro '{c.run}' '{c.run}'"), *c.command]), "can't")
        c.goes_on()

    yield "read-only", read_only

    def homeless(c: Case):
        done = c.train(HOME=None, XDG_CACHE_HOME=None, JAX_COMPILATION_CACHE_DIR=None)
        assert done.returncode == 0, done.stderr[-2000:]
        c.is_whole()

    yield "HOME unset", homeless

    def a_file(c: Case):
        c.run.write_text("mine")
        c.is_refused(c.train(), "is not a run folder")
        assert c.run.read_text() == "mine"

    yield "a file", a_file


OWN = """
def length(prompts, completions, **columns):
    return [len(text) / 20 for text in completions]


def keep(row):
    return not row["prompt"].endswith("7")
"""


def resumed() -> Cases:
    """Gone on with in another way: refused, or the same."""
    for setting in (
        "loss.beta=0.3", "rollout.num_generations=4", "run.seed=5", "model.dtype=bfloat16",
        "data.max_prompt_length=16", "optimizer.learning_rate=1e-4",
    ):  # fmt: skip

        def refused(c: Case, setting=setting):
            assert c.train("train.stop_at=3").returncode == 0
            c.is_refused(c.train(setting), "holds a run with other settings")
            c.goes_on()

        yield setting, refused

    def another_model(c: Case):
        assert c.train("train.stop_at=3").returncode == 0
        model = c.folder / "model"
        assert python("-m", "gvpo_jax", "export", str(c.run), str(model)).returncode == 0
        c.is_refused(c.train(f"model.name={model}"), "holds a run with other settings")
        c.goes_on()

    yield "another model", another_model

    def the_models_files(c: Case):
        """The model that the run began with, in the same place, but trained further."""
        assert c.train("train.stop_at=1").returncode == 0
        model, run = c.folder / "model", f"run.dir={c.folder / 'second'}"
        assert python("-m", "gvpo_jax", "export", str(c.run), str(model)).returncode == 0
        second = [*TRAIN, f"model.name={model}", run]
        assert python(*second, "train.stop_at=3").returncode == 0
        new, kept = c.folder / "new", c.folder / "kept"
        export = ["-m", "gvpo_jax", "export", str(c.folder / "second"), str(new)]
        assert python(*export).returncode == 0
        model.rename(kept)
        new.rename(model)
        c.is_refused(python(*second), "is not the model that this run started from")
        shutil.rmtree(model)
        kept.rename(model)
        assert python(*second).returncode == 0

    yield "another model in the same place", the_models_files

    def another_tokenizer(c: Case):
        """The model that the run began with, beside the files of another tokenizer."""
        model = c.folder / "model"
        assert python("-m", "gvpo_jax", "export", str(c.half()), str(model)).returncode == 0
        assert c.train(f"model.name={model}", "train.stop_at=3").returncode == 0
        file = model / "tokenizer.json"
        kept = file.read_text()
        tokenizer = json.loads(kept)
        ids = tokenizer["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]
        file.write_text(json.dumps(tokenizer))
        c.is_refused(c.train(f"model.name={model}"), "are not those of this run")
        file.write_text(kept)
        assert c.train(f"model.name={model}").returncode == 0

    yield "another tokenizer in the same place", another_tokenizer

    def edited_rows(c: Case):
        rows = c.folder / "rows.jsonl"
        settings = [f"data.path={rows}", "data.tasks=[]", "data.eval_size=0"]
        lines = [json.dumps({"prompt": f"abc {i}"}) + "\n" for i in range(16)]
        rows.write_text("".join(lines))
        assert c.train(*settings, "train.stop_at=3").returncode == 0
        rows.write_text("".join(lines[:-1]))
        c.is_refused(c.train(*settings), "are not those of this run; bring them back")
        rows.write_text("".join(lines))
        assert c.train(*settings).returncode == 0

    yield "rows that were edited", edited_rows

    def files_elsewhere(c: Case):
        """The same rows, filter, reward and model, in another folder."""
        here, there = c.folder / "here", c.folder / "there"
        here.mkdir()
        assert (
            python("-m", "gvpo_jax", "export", str(c.half()), str(here / "model")).returncode == 0
        )
        lines = [json.dumps({"prompt": f"abc {i}"}) + "\n" for i in range(16)]
        (here / "rows.jsonl").write_text("".join(lines))
        (here / "held_out.jsonl").write_text("".join(lines[:4]))
        (here / "own.py").write_text(OWN)

        def settings(folder: Path) -> list[str]:
            return [
                f"model.name={folder / 'model'}", "data.tasks=[]",
                f"data.path={folder / 'rows.jsonl'}", f"data.eval_path={folder / 'held_out.jsonl'}",
                f"data.filter={folder / 'own.py'}:keep",
                f"rewards.funcs=[{folder / 'own.py'}:length]",
            ]  # fmt: skip

        whole = Case(c.folder / "undisturbed", c.whole)
        assert whole.train(*settings(here)).returncode == 0
        assert c.train(*settings(here), "train.stop_at=3").returncode == 0
        here.rename(there)
        done = c.train(*settings(there))
        assert done.returncode == 0, done.stderr
        Case(c.folder, whole.run).is_whole()
        other = c.folder / "other.py"
        other.write_text(OWN.replace("20", "21"))
        c.is_refused(c.train(*settings(there), f"rewards.funcs=[{other}:length]"), "other settings")

    yield "its files in another folder", files_elsewhere

    def more_devices(c: Case):
        two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        assert c.train("train.stop_at=3").returncode == 0
        assert c.train("mesh.fsdp=2", "train.stop_at=5", **two).returncode == 0
        assert c.train().returncode == 0
        steps = [row["step"] for row in read_metrics(c.run) if "loss" in row]
        assert steps == list(range(1, STEPS + 1))

    yield "two devices, and one again", more_devices
    for setting in ("checkpoint.every=1", "log.samples=1", "model.attention=xla"):

        def allowed(c: Case, setting=setting):
            assert c.train("train.stop_at=3").returncode == 0
            assert c.train(setting).returncode == 0
            assert checksums(c.run) == checksums(c.whole)

        yield setting, allowed


FAULTS: dict[str, Callable[[], Cases]] = {
    "kill -9": killed,
    "signals": told,
    "signals, with lookahead": told_with_lookahead,
    "one of two processes": one_of_two,
    "checkpoint damaged": damaged,
    "disk full": full,
    "rewards that fail": rewards,
    "folders": folders,
    "gone on with in another way": resumed,
}


def undisturbed(folder: Path) -> Path:
    """The run that all are compared with."""
    done = python(*TRAIN, f"run.dir={folder / 'run'}")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def trial(case: Callable[[Case], None], whole: Path, folder: Path) -> str:
    """What went wrong; empty: it passed, and its folder is removed."""
    folder.mkdir(parents=True)
    try:
        case(Case(folder, whole))
    except (AssertionError, OSError, subprocess.TimeoutExpired, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    shutil.rmtree(folder)
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    options = parser.parse_args()
    # A shell starts what it runs in the background without Ctrl-C, and so would the runs here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="gvpo-jax-faults-"))
    whole = undisturbed(folder / "whole")
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    failed = 0
    for fault, cases in FAULTS.items():
        if not fault.startswith(options.only):
            continue
        found = {}
        every = list(cases())
        if options.short:  # none that mounts something, which not every container allows
            every = [case for case in every if case[0] not in MOUNTING]
            every = [every[len(every) // 2]]
        for name, case in every:
            problem = trial(case, whole, folder / fault / name.replace("/", "-"))
            failed += bool(problem)
            found[name] = problem
            print(f"{fault}: {name}: {problem or 'passed'}", flush=True)
        results[fault] = found
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    if options.out == HERE / "results.json":
        page = HERE / "README.md"
        page.write_text(with_table(page.read_text(), results))
    if failed:
        print(f"{failed} failed; their folders are in {folder}")
    else:
        shutil.rmtree(folder)
    return int(bool(failed))


def with_table(page: str, results: dict[str, dict[str, str]]) -> str:
    lines = ["| fault | what | cases | passed |", "|---|---|---|---|"]
    for fault, found in results.items():
        what = (FAULTS[fault].__doc__ or "").strip()
        passed = sum(not problem for problem in found.values())
        lines.append(f"| {fault} | {what} | {len(found)} | {passed} |")
    head, _, rest = page.partition("<!-- table -->")
    return (
        head + "<!-- table -->\n" + "\n".join(lines) + "\n" + rest[rest.index("<!-- /table -->") :]
    )


if __name__ == "__main__":
    sys.exit(main())
