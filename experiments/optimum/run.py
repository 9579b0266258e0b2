"""Where each way of training ends, in a language whose optimum pi_ref exp(R / beta) / Z is known.

    python experiments/optimum/run.py            # the full size, some minutes on one core
    python experiments/optimum/run.py --small    # under a minute: what CI runs

Prints the table of the README and writes results.json and optimum.svg.
"""

import argparse
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import conditions
import jax
import jax.numpy as jnp
import language
import training
from conditions import Condition
from figure import draw, number
from language import BETA, Problem, divergence, optimum, text_logps

POINTS, ROUNDS = 100, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="one seed, fewer steps and conditions")
    parser.add_argument("--seeds", type=int, help="how many (default 5)")
    parser.add_argument("--steps", type=int, help="a multiple of 100 (default 20000)")
    parser.add_argument("--out", type=Path, help="folder for results and figure")
    options = parser.parse_args()
    seeds = options.seeds or (1 if options.small else 5)
    steps = options.steps or (3000 if options.small else 20000)
    if steps % POINTS:
        parser.error(f"--steps {steps} is no multiple of {POINTS}")
    jax.config.update("jax_enable_x64", True)
    start = time.perf_counter()
    report = measure_all(seeds, steps, small=options.small)
    report["seconds"] = round(time.perf_counter() - start, 1)
    print(markdown(report))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
        draw(report, options.out / "optimum.svg")


def measure_all(seeds: int, steps: int, *, small: bool) -> dict:
    chance = draw_chance(seeds, steps, 0)
    rows = {}
    for condition in conditions.SMALL if small else conditions.ALL:
        rows[condition.name] = measure(condition, chance)
    sweep = {
        name: {f"{kl_coef:.3g}": measure(c, chance)["worst"] for kl_coef, c in row.items()}
        for name, row in ({} if small else conditions.SWEEP).items()
    }
    settings = {"beta": BETA, "k": training.K, "prompts": language.PROMPTS, "steps": steps}
    settings |= {"learning_rate": training.LEARNING_RATE, "kl_coef": conditions.KL_COEF}
    settings |= {"seeds": seeds, "dtype": "float64"}
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "settings": settings,
        "conditions": rows,
        "previous": measure_rounds(seeds, steps),
        "kl_coef": sweep,
    }


def measure(condition: Condition, chance: jax.Array) -> dict:
    """Trains on every seed: KL(pi* || pi) at the end and, worst of the seeds, on the way."""
    start = time.perf_counter()
    given = problems(chance.shape[0], condition.width)
    logits = train(given, chance, condition.loss, condition.sources)
    kl = course(to_optimum, given, logits)
    row = {
        "kind": condition.kind,
        "sources": dict(condition.sources),
        "reference_width": condition.width,
        "kl": kl[:, -1].tolist(),
        "worst": float(jnp.max(kl[:, -1])),
    }
    if condition.own:
        row["own_kl"] = course(condition.own, given, logits)[:, -1].tolist()
    row["curve"] = [float(f"{x:.3g}") for x in jnp.max(kl, axis=0)]
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def measure_rounds(seeds: int, steps: int) -> list[dict]:
    """Reference = the policy after each round, which also samples: pi_0 exp(n R / beta) / Z."""
    first = now = problems(seeds, conditions.WIDTH)
    rounds = []
    for n in range(1, ROUNDS + 1):
        chance = draw_chance(seeds, steps, n)
        logits = train(now, chance, conditions.gvpo, conditions.OFFLINE)
        now = now._replace(reference=logits[:, -1])
        kl = course(functools.partial(to_optimum, rounds=n), first, logits)[:, -1]
        rounds.append({"round": n, "kl": kl.tolist(), "worst": float(jnp.max(kl))})
    return rounds


train = jax.jit(jax.vmap(training.train, in_axes=(0, 0, None, None)), static_argnums=(2, 3))


def problems(seeds: int, width: float) -> Problem:
    """A random reference and random rewards for each seed."""
    return _problems(jnp.arange(seeds), width)


def draw_chance(seeds: int, steps: int, round_: int) -> jax.Array:
    """The same for every condition: [seed, points, n, 2, p, k]."""
    return _chance(jnp.arange(seeds), round_, steps)


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def _problems(seed, width):
    return language.random_problem(jax.random.key(seed), width=width)


@functools.partial(jax.jit, static_argnums=2)
@functools.partial(jax.vmap, in_axes=(0, None, None))
def _chance(seed, round_, steps):
    key = jax.random.fold_in(jax.random.key(seed), 1 + round_)
    return training.draw_chance(key, steps=steps, points=POINTS)


def to_optimum(problem: Problem, logps: jax.Array, rounds: int = 1) -> jax.Array:
    return divergence(optimum(problem, rounds=rounds), logps)


@functools.partial(jax.jit, static_argnums=0)
def course(
    kl: Callable[[Problem, jax.Array], jax.Array], given: Problem, logits: jax.Array
) -> jax.Array:
    """kl at the reference and at each point, from logits [seed, points, p, s, v]."""

    def one(problem, logits):
        policies = jnp.concatenate([problem.reference[None], logits])
        return jax.vmap(lambda policy: kl(problem, text_logps(policy)))(policies)

    return jax.vmap(one)(given, logits)


def markdown(report: dict) -> str:
    """The tables of the README."""
    count = report["settings"]["seeds"]
    worst = f"worst of {count}"
    lines = [f"| | KL(pi* \\|\\| pi), {worst} | KL to where its loss leads |", "|---|---|---|"]
    for name, row in report["conditions"].items():
        own = number(max(row["own_kl"])) if "own_kl" in row else ""
        lines.append(f"| {name} | {number(row['worst'])} | {own} |")
    start = next(iter(report["conditions"].values()))["curve"][0]
    lines += ["", f"At the reference, where all begin: {number(start)}."]
    lines += ["", f"| rounds | KL(pi_0 exp(n R / beta) / Z \\|\\| pi), {worst} |", "|---|---|"]
    lines += [f"| {row['round']} | {number(row['worst'])} |" for row in report["previous"]]
    for n, (name, row) in enumerate(report["kl_coef"].items()):
        if not n:
            lines += ["", f"| kl_coef | {' | '.join(row)} |", "|---|" + "---|" * len(row)]
        lines.append(f"| {name} | {' | '.join(map(number, row.values()))} |")
    return "\n".join([*lines, "", f"{report['seconds']:.0f} s"])


if __name__ == "__main__":
    main()
