"""gvpo-jax beside its peers on the same work: training steps and rollouts, tokens a second.

    python experiments/bench/run.py                    # all workloads on this machine's CPU
    python experiments/bench/run.py --only tiny        # one of them
    python experiments/bench/run.py --device gpu       # Qwen2.5's shapes
    python experiments/bench/run.py --tables           # only the README's tables and picture
    python experiments/bench/run.py --only small --rounds 1 --out FILE       # CI

Every contestant is a process of its own with the same weights, batch and cores. Ours runs beside
one peer after the other: both are warm before the rounds begin, in which they take turns, and no
turn begins before the other is at rest. `--python tunix_grpo=PATH` gives one another interpreter.
Results are added to those in --out, so workloads can be run one by one.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from page import draw, with_tables
from workloads import ON_CPU, ON_GPU, WORKLOADS, Workload, workload, write_model

HERE = Path(__file__).resolve().parent
CONTESTANTS = {
    "train": ("ours", "plain_pytorch", "trl_grpo", "tunix_grpo"),
    "rollout": ("ours", "plain_pytorch", "tunix_grpo"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=list(WORKLOADS))
    parser.add_argument("--task", action="append", choices=list(CONTESTANTS))
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", action="append", default=[], metavar="CONTESTANT=PATH")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--tables", action="store_true", help="only draw tables and picture")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    workloads = options.only or (ON_CPU if options.device == "cpu" else ON_GPU)
    for name in () if options.tables else workloads:
        with tempfile.TemporaryDirectory(prefix="gvpo-jax-bench-") as folder:
            write_model(WORKLOADS[name], Path(folder))
            ceilings = measured_ceilings(name, options)
            for task in options.task or CONTESTANTS:
                row = measure(name, task, folder, ceilings, options)
                print(as_text(name, task, row), flush=True)
                results[f"{name}/{task}/{options.device}"] = row
                options.out.write_text(json.dumps(results, indent=2) + "\n")
    draw(results, options.out.with_suffix(".svg"))
    if options.out.resolve().parent == HERE:
        page = HERE / "README.md"
        page.write_text(with_tables(page.read_text(), results))


def measure(name: str, task: str, folder: str, ceilings: dict, options: argparse.Namespace) -> dict:
    """A row for each contestant that ran, and why another did not."""
    w = workload(name, task)
    rows: dict[str, dict] = {}
    times: dict[str, list[dict]] = {}
    for peer in CONTESTANTS[task][1:]:
        said, rounds = side_by_side(("ours", peer), name, task, folder, options)
        for contestant, answers in said.items():
            most = max(answers.get("peak_gib", 0.0), rows.get(contestant, {}).get("peak_gib", 0.0))
            rows[contestant] = answers | ({"peak_gib": most} if most else {})
            times.setdefault(contestant, []).extend(rounds[contestant])
    for contestant, row in rows.items():
        if "error" not in row:
            row |= figures(w, times[contestant], row)
    check_same_work(w, rows)
    add_shares(task, w, rows, ceilings)
    here = {"machine": machine(options.device), "threads": options.threads, "ceilings": ceilings}
    if task == "train":
        here["ideal"] = w.ideal
    return here | {"rounds": options.rounds, "contestants": rows}


def side_by_side(
    contestants: Sequence[str], name: str, task: str, folder: str, options: argparse.Namespace
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """What each says, an error at least, and its rounds; only these are in memory meanwhile."""
    said: dict[str, dict] = {}
    workers: dict[str, Worker] = {}
    rounds: dict[str, list[dict]] = {contestant: [] for contestant in contestants}
    try:
        for contestant in contestants:
            workers[contestant] = Worker(contestant, task, name, folder, options)
            said[contestant] = workers[contestant].hear()
        for _ in range(options.rounds):
            for contestant, worker in workers.items():
                if "error" in said[contestant]:
                    continue
                settle(workers.values())
                took = worker.ask("go")
                if "error" in took:
                    said[contestant] = took
                else:
                    rounds[contestant].append(took)
        for contestant, worker in workers.items():
            if "error" not in said[contestant]:
                said[contestant] |= worker.ask("end")
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.wait()
    if "error" in said["ours"]:
        raise SystemExit(f"ours did not run: {said['ours']['error']}")
    return said, rounds


def measured_ceilings(name: str, options: argparse.Namespace) -> dict:
    command = [sys.executable, str(HERE / "ceilings.py"), options.device, WORKLOADS[name].dtype]
    done = subprocess.run(
        command,
        env=environment(options),
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: pin(options.threads),
    )
    return json.loads(done.stdout)


def add_shares(task: str, w: Workload, rows: dict[str, dict], ceilings: dict) -> None:
    """Of the measured ceilings, for the least work that the task can be done with."""
    for row in rows.values():
        if "error" in row:
            continue
        seconds = w.tokens / row["tokens_per_second"]
        if task == "train":
            row["share_of_matmul"] = w.training_flops / seconds / ceilings["matmul_flops"]
        else:
            bound = w.decoding_bytes / ceilings["copy_bytes_per_second"]
            row["share_of_bandwidth"] = bound / seconds


class Worker:
    """A contestant's process."""

    def __init__(self, contestant: str, task: str, name: str, folder: str, options):
        pythons = dict(item.split("=", 1) for item in options.python)
        self.log = Path(folder) / f"{contestant}-{task}.log"
        command = [pythons.get(contestant, sys.executable), str(HERE / "worker.py")]
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, contestant, task, name, folder, options.device],
                env=environment(options),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                preexec_fn=lambda: pin(options.threads),
            )

    def ask(self, word: str) -> dict:
        assert self.process.stdin
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.hear()

    def cpu_seconds(self) -> float:
        """That its process has taken so far; 0 when it has ended."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def hear(self) -> dict:
        """Its next line; where there is none, the last line of what it complained about."""
        assert self.process.stdout
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        said = [line for line in self.log.read_text().splitlines() if line.strip()]
        status = self.process.returncode
        if status < 0:
            return {"error": f"killed by signal {-status}: out of memory?"}
        return {"error": said[-1] if said else f"exit status {status}"}


def settle(workers: Iterable[Worker], window: float = 0.3, most: float = 60.0) -> None:
    """Waits until nobody is at work: some go on freeing their memory once they have answered."""
    end = time.monotonic() + most
    while time.monotonic() < end:
        before = sum(worker.cpu_seconds() for worker in workers)
        time.sleep(window)
        if sum(worker.cpu_seconds() for worker in workers) - before < window / 10:
            return
    raise SystemExit(f"a contestant is still at work {most:.0f} s after its answer")


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The same for all; on a GPU nobody takes memory that is not needed yet."""
    variables = {x: y for x, y in os.environ.items() if x != "JAX_COMPILATION_CACHE_DIR"} | {
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": os.pathsep.join(
            [str(HERE.parent.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    if options.device == "cpu":
        variables |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return variables


def pin(threads: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def figures(w: Workload, times: list[dict], first: dict) -> dict:
    rates = [w.tokens / round_["seconds"] for round_ in times]
    seconds = statistics.median(round_["seconds"] for round_ in times)
    cpu = statistics.median(round_["cpu_seconds"] for round_ in times)
    return {
        "tokens_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "tokens_per_cpu_second": w.tokens / cpu,
        "compile_seconds": max(first["first_seconds"] - seconds, 0.0),
    }


def check_same_work(w: Workload, rows: dict[str, dict]) -> None:
    """All give every completion of the batch the same log-prob: weights and tokens are the same.

    Removes the log-probs. They spread over nats; rollouts have none and are not compared.
    """
    checks = {x: row.pop("check") for x, row in rows.items() if row.get("check") is not None}
    rows["ours"].pop("check", None)
    bound = w.t * (1e-3 if w.dtype == "float32" else 0.1)
    for contestant, logps in checks.items():
        off = max(abs(a - b) for a, b in zip(logps, checks["ours"], strict=True))
        if off > bound:
            raise SystemExit(f"{contestant}'s log-probs are not ours: off by {off:.3g} nats")


def as_text(name: str, task: str, row: dict) -> str:
    lines = [f"{name}, {task} ({row['machine']}, {row['threads']} threads)"]
    rates = {}
    for contestant, figures in row["contestants"].items():
        if "error" in figures:
            lines.append(f"  {contestant:14s} did not run: {figures['error']}")
            continue
        rates[contestant] = figures["tokens_per_second"]
        lines.append(
            f"  {contestant:14s} {figures['tokens_per_second']:8.0f} tokens/s "
            f"({figures['slowest']:.0f} to {figures['fastest']:.0f}), "
            f"{figures['tokens_per_cpu_second']:.0f} per CPU-second, "
            f"compilation {figures['compile_seconds']:.1f} s, {figures['peak_gib']:.2f} GiB, "
            + ", ".join(f"{figures[x]:.0%} {x[9:]}" for x in figures if x.startswith("share_of"))
        )
    peers = [rate for contestant, rate in rates.items() if contestant != "ours"]
    if peers and "ours" in rates:
        ideal = f", ideal {row['ideal']:.2f}" if "ideal" in row else ""
        lines.append(f"  ours / best peer: {rates['ours'] / max(peers):.2f}{ideal}")
    return "\n".join(lines)


def machine(device: str) -> str:
    if device == "gpu":
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return models[0].split(":")[1].strip() if models else platform.machine()


if __name__ == "__main__":
    main()
