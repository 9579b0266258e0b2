"""Do the devices ever wait for the host between two updates? A trace of the loop tells.

    python experiments/trace/run.py --out experiments/trace/results.json      # a minute on 2 cores
    python experiments/trace/run.py --small --out FILE                        # what CI runs

Two runs of the debug model under JAX's profiler: one on given groups, which the reference has to
score, one that samples, with four updates on each rollout. For each pair of updates: how long the
devices did nothing between them, and whether the second was sent off while they were at work.
"""

import argparse
import glob
import gzip
import json
import platform
import random
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import jax

from gvpo_jax.config_file import load_config
from gvpo_jax.models.load import load_model
from gvpo_jax.rewards.debug import letter_share
from gvpo_jax.trainer import Trainer

PER_ROUND = 4  # updates on a rollout
GIVEN, SAMPLED = "given groups", "sampled groups"
Span = tuple[float, float]  # milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="few updates on short completions")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    # Updates before the trace and in it, which holds a million events: more are lost.
    warm, updates, letters = (8, 12, 100) if options.small else (16, 16, 200)
    rows = {
        kind: pairs_of_updates(*trace(kind, warm, updates, letters), kind)
        for kind in (GIVEN, SAMPLED)
    }
    report = {"machine": machine(), "jax": jax.__version__, "updates": updates, "runs": rows}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


def trace(
    kind: str, warm: int, updates: int, letters: int
) -> tuple[list[float], dict[str, list[Span]]]:
    """When updates were sent off, and program -> when it was running.

    Given completions have so many letters, sampled ones half of them: more would be lost.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            "debug",
            [
                f"run.dir={folder}/run",
                f"train.steps={warm + updates}",
                f"train.steps_per_generation={PER_ROUND if kind == SAMPLED else 1}",
                f"rollout.max_completion_length={letters + 1 if kind == GIVEN else letters // 2}",
                "train.packing=false",  # each size of a stream would be compiled first
                "rollout.num_generations=4",
                "optimizer.learning_rate=1e-9",  # lengths, and so programs, stay as they are
                "log.samples=0",
                "data.eval_size=0",
                "checkpoint.every=1000",
            ],
        )
        trainer = Trainer(config, load_model("debug"))
        update = trainer.policy.update
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0

        def traced(*arguments):
            if trainer.policy.updates == warm:
                jax.profiler.start_trace(folder, profiler_options=options)
            return update(*arguments)

        trainer.policy.update = traced
        draw = random.Random(0)
        if kind == GIVEN:  # each group once: every batch is new to the reference
            trainer.train_offline([group(draw, letters) for _ in range(8 * (warm + updates))])
        else:
            trainer.train([{"prompt": text(draw, 16)} for _ in range(64)], letter_share)
        jax.profiler.stop_trace()
        (file,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        return read(json.loads(gzip.open(file).read())["traceEvents"])


def text(draw: random.Random, length: int) -> str:
    return "".join(draw.choices("abcdef", k=length))


def group(draw: random.Random, letters: int) -> dict:
    completions = [text(draw, letters) for _ in range(4)]
    return {"prompt": text(draw, 16), "completions": completions, "rewards": [0, 1, 2, 3]}


def read(events: list[dict]) -> tuple[list[float], dict[str, list[Span]]]:
    sent, runs = [], defaultdict(list)
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        start, length = event.get("ts", 0) / 1e3, event.get("dur", 0) / 1e3
        inside = sent and start <= sent[-1][1]
        if event.get("name") == "PjitFunction(train_step)" and not inside:
            sent.append((start, start + length))
        details = event.get("args", {})
        if "hlo_module" in details and "dur" in event:
            run = details["hlo_module"], details["run_id"]
            runs[run].append((start, start + length))
    programs = defaultdict(list)
    for (program, _), spans in runs.items():
        programs[program].append((min(a for a, _ in spans), max(b for _, b in spans)))
    return [start for start, _ in sent], {
        program: sorted(spans) for program, spans in programs.items()
    }


def pairs_of_updates(sent: list[float], programs: dict[str, list[Span]], kind: str) -> dict:
    """Within rollouts and between them: idle milliseconds, and how many were sent off early."""
    steps = programs["jit_train_step"][-len(sent) :]  # the one before was under way when it began
    if len(steps) != len(sent):
        raise SystemExit(f"the trace has {len(sent)} updates sent and {len(steps)} run")
    every = sorted(span for spans in programs.values() for span in spans)
    seen: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for place in range(PER_ROUND, len(steps)):  # to begin the trace held the first ones up
        new_round = kind == SAMPLED and place % PER_ROUND == 0
        before, now = steps[place - 1], steps[place]
        early = any(start <= sent[place] < end for start, end in every)
        seen["over a rollout" if new_round else "one to the next"].append(
            (idle(every, before[1], now[0]), early)
        )
    result: dict = {"update_ms": statistics.median(end - start for start, end in steps)}
    for name, pairs in seen.items():
        gaps = [gap for gap, _ in pairs]
        result[name] = {
            "pairs": len(pairs),
            "idle_ms": statistics.median(gaps),
            "most_idle_ms": max(gaps),
            "sent_while_busy": sum(early for _, early in pairs),
        }
    return result


def idle(spans: list[Span], start: float, end: float) -> float:
    """Of the time from start to end, what no span covers."""
    gap, reached = 0.0, start
    for a, b in spans:
        if b > reached and a < end:
            gap += max(a - reached, 0.0)
            reached = max(reached, b)
    return gap + max(end - reached, 0.0)


def machine() -> str:
    models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return models[0].split(":")[1].strip() if models else platform.machine()


if __name__ == "__main__":
    main()
