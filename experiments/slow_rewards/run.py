"""What a judge on a slow server costs, and how much of it `rollout.lookahead` hides.

    python experiments/slow_rewards/run.py                     # results and README; a minute
    python experiments/slow_rewards/run.py --small --out FILE  # as in CI

The debug model trains with an `LLMJudge`, whose server takes a while for each answer. A round is a
rollout, its grades and its updates; its seconds are the mean time from the third batch of questions
to the last.
"""

import argparse
import json
import re
import statistics
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gvpo_jax.config_file import load_config
from gvpo_jax.rewards.judge import LLMJudge
from gvpo_jax.trainer import Trainer

HERE = Path(__file__).resolve().parent
UPDATES = (1, 4)  # of each rollout
DELAY = 0.25  # seconds that the slow judge takes for an answer
ROWS = [{"prompt": f"Write {i} letters."} for i in range(64)]
SETTINGS = [
    "train.batch_size=16",
    "rollout.num_generations=4",
    "rollout.max_completion_length=64",
    "eval.every=0",
    "data.eval_size=0",
    "mesh.fsdp=1",
    "checkpoint.every=1000",
]


class Server(ThreadingHTTPServer):
    """Answers each question after some seconds, as many at a time as are asked."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, seconds: float):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seconds = seconds
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(self.server.seconds)
        grade = sum(map(ord, body["messages"][-1]["content"])) % 11
        content = json.dumps({"choices": [{"message": {"content": f"Grade: {grade}"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="few updates, one round")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    options = parser.parse_args()
    rounds, times = (5, 1) if options.small else (8, 3)
    for lookahead in (0, 1):
        seconds_of_round(1, lookahead, 0.0, 5)  # compiles
    found: dict[str, list[float]] = {}
    for _ in range(times):
        for updates in UPDATES:
            for lookahead in (0, 1):
                for slow in (0.0, DELAY):
                    name = name_of(updates, lookahead, slow > 0)
                    seconds = seconds_of_round(updates, lookahead, slow, rounds)
                    found.setdefault(name, []).append(seconds)
                    print(name, f"{seconds:.3f} s", flush=True)
    results = {"delay": DELAY, "rounds": rounds, "seconds": found}
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    if options.out.parent == HERE:
        page = HERE / "README.md"
        marks = r"(<!-- table -->\n).*?(<!-- /table -->)"
        drawn = table(results)
        page.write_text(
            re.sub(marks, lambda m: m[1] + drawn + m[2], page.read_text(), flags=re.DOTALL)
        )


def name_of(updates: int, lookahead: int, slow: bool) -> str:
    return f"{updates} updates, lookahead {lookahead}, {'slow' if slow else 'fast'} judge"


def seconds_of_round(updates: int, lookahead: int, delay: float, rounds: int) -> float:
    """The mean, of a run with a judge that takes so many seconds and so many updates a rollout."""
    server = Server(delay)
    judge = TimedJudge(
        f"http://127.0.0.1:{server.server_address[1]}",
        "judge",
        "{prompt} {completion}",
        concurrency=64,
    )
    judge.times = []
    with tempfile.TemporaryDirectory(prefix="gvpo-jax-slow-") as folder:
        more = [f"rollout.lookahead={lookahead}", f"train.steps={updates * rounds}"]
        more += [f"train.num_iterations={updates}", f"run.dir={folder}/run"]
        config = load_config("debug", [*SETTINGS, *more])
        Trainer(config).train(ROWS, judge)
    server.shutdown()
    server.server_close()
    return (judge.times[-1] - judge.times[2]) / (len(judge.times) - 3)


class TimedJudge(LLMJudge):
    """One that notes when it is asked."""

    times: list[float]

    async def __call__(self, *arguments: Any, **columns: Any) -> list[Any]:
        self.times.append(time.perf_counter())
        return await super().__call__(*arguments, **columns)


def table(results: dict[str, Any]) -> str:
    lines = [
        "| updates a rollout | `rollout.lookahead` | fast judge, s | slow judge, s | costs, s |",
        "|---|---|---|---|---|",
    ]
    for updates in UPDATES:
        for lookahead in (0, 1):
            fast, slow = (
                results["seconds"][name_of(updates, lookahead, judge)] for judge in (False, True)
            )
            costs = [b - a for a, b in zip(fast, slow, strict=True)]
            cells = [
                f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})"
                for x in (fast, slow, costs)
            ]
            lines.append(f"| {updates} | {lookahead} | {' | '.join(cells)} |")
    lines += ["", f"The slow judge takes {results['delay']:.2f} s for an answer."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
