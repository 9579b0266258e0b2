"""Compile the recipes in configs/ for the TPUs they are meant for, without a TPU; draw the tables.

    python experiments/tpu_compile/run.py                 # whatever has no report yet
    python experiments/tpu_compile/run.py --only 7b       # those whose names contain this
    python experiments/tpu_compile/run.py --tables        # the README's tables again
    python experiments/tpu_compile/run.py --small --reports /tmp/reports     # CI

Each report is `gvpo-jax compile`'s own, in reports/NAME.json.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from gvpo_jax.models.known import KNOWN

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs"
SEVEN, TWO = "qwen2.5-math-7b", ["--slices", "2"]
EIGHT = ["train.micro_batches=8"]  # as many groups a chip at once as on 64 chips, or twice
QWEN3 = ["model.name=Qwen/Qwen3-0.6B", "model.remat=layer", "train.micro_batches=8"]

# name -> config, topology, further arguments
RECIPES: dict[str, tuple[str, str, list[str]]] = {
    "smollm2_v5e-1": ("colab", "v5e:1x1", []),
    "qwen3-0.6b_v5e-1": ("colab", "v5e:1x1", QWEN3),
    "gemma3-1b-lora_v5e-1": ("colab_gemma3_1b_lora", "v5e:1x1", []),
    "qwen3-1.7b-qlora_v5e-1": ("colab_qwen3_1.7b_qlora", "v5e:1x1", []),
    "qwen3-30b-a3b_v5p-64": ("qwen3_30b_a3b_v5p", "v5p:2x4x4", []),
    "1.5b_v5e-8": ("qwen2.5-math-1.5b", "v5e:2x4", []),
    "7b_v5e-64": (SEVEN, "v5e:8x8", []),
    "7b_v6e-32": (SEVEN, "v6e:4x8", EIGHT),
    "7b_v5p-32": (SEVEN, "v5p:2x2x4", EIGHT),
    "7b_2xv5e-32": (SEVEN, "v5e:4x8", TWO),
}

# The 7B model's update with 4 of its 28 layers: what grows with the chips, and what does not.
LAYERS = 4
V5E = ((16, "4x4"), (64, "8x8"), (256, "16x16"))
V5P = ((64, "4x4x4"), (128, "4x4x8"))
SCALING: dict[str, tuple[str, int, list[str]]] = {
    **{f"weak_v5e-{n}": (f"v5e:{shape}", 4 * n, []) for n, shape in V5E},
    "weak_2xv5e-256": ("v5e:16x16", 4 * 512, TWO),
    **{f"weak_v5p-{2 * n}": (f"v5p:{shape}", 4 * n, []) for n, shape in V5P},
    # Its hidden size, 3584, does not divide over more.
    "weak_v5p-2048": ("v5p:8x8x16", 4 * 1024, ["mesh.data=8", "mesh.fsdp=128"]),
    **{f"strong_v5e-{n}": (f"v5e:{shape}", 256, []) for n, shape in V5E},
}
SMALL = {
    "debug_v5e-4": ("debug", "v5e:2x2", ["--only", "train", "model.dtype=bfloat16"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="reports whose names contain this")
    parser.add_argument("--reports", type=Path, default=HERE / "reports")
    parser.add_argument("--tables", action="store_true", help="only draw the tables")
    parser.add_argument("--small", action="store_true", help="the debug model alone")
    options = parser.parse_args()
    if options.small:
        for name, (config, topology, more) in SMALL.items():
            compile_one(options.reports / f"{name}.json", config, topology, more)
        return
    if not options.tables:
        missing = [
            name
            for name in (*RECIPES, *SCALING)
            if options.only in name and not (options.reports / f"{name}.json").exists()
        ]
        with tempfile.TemporaryDirectory() as scratch:
            for name in missing:
                print(name, flush=True)
                config, topology, more = arguments(name, Path(scratch))
                compile_one(options.reports / f"{name}.json", config, topology, more)
    page = HERE / "README.md"
    page.write_text(with_tables(page.read_text(), options.reports))


def arguments(name: str, scratch: Path) -> tuple[str, str, list[str]]:
    """Config, topology and further arguments of `gvpo-jax compile`."""
    if name in RECIPES:
        return RECIPES[name]
    topology, groups, more = SCALING[name]
    shape = scratch / f"qwen2.5-math-7b-{LAYERS}-layers.json"
    shape.write_text(json.dumps(KNOWN["Qwen/Qwen2.5-Math-7B"] | {"num_hidden_layers": LAYERS}))
    # One group, that is 5,120 tokens, on a chip at once; all chips busy in each micro-batch.
    parts = max(groups // (chips(topology) * (2 if more else 1)), 1)
    settings = [f"train.batch_size={groups}", f"train.micro_batches={parts}"]
    return SEVEN, topology, [*more, "--only", "train", "--model-config", str(shape), *settings]


def chips(topology: str) -> int:
    count = 1
    for size in topology.split(":")[1].split("x"):
        count *= int(size)
    return count


def compile_one(report: Path, config: str, topology: str, more: list[str]) -> None:
    command = [sys.executable, "-m", "gvpo_jax", "compile", str(CONFIGS / f"{config}.yaml")]
    done = subprocess.run([*command, "--topology", topology, *more, "--out", str(report)])
    if done.returncode not in (0, 1):  # 1: it does not fit, which the report says
        raise SystemExit(f"{report.stem}: status {done.returncode}")


def with_tables(page: str, reports: Path) -> str:
    """The page with the tables of the reports there are between its marks."""
    for mark, text in (("recipes", recipe_table(reports)), ("scaling", scaling_table(reports))):
        page = re.sub(
            rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
            lambda found, text=text: found[1] + text + found[2],
            page,
            flags=re.DOTALL,
        )
    return page


def read(reports: Path, names) -> dict[str, dict]:
    files = {name: reports / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def recipe_table(reports: Path) -> str:
    titles = ["recipe", "program", "GiB a chip", "seconds at least", "bound by", "MFU at most"]
    rows = [
        [name, program["name"], *fit(program), f"{gib(wire(program)):.1f}"]
        for name, report in read(reports, RECIPES).items()
        for program in report["programs"]
    ]
    return table([*titles, "received, GiB a chip"], rows)


def scaling_table(reports: Path) -> str:
    titles = ["", "chips", "groups", "TFLOP a chip", "seconds at least", "bound by", "MFU at most"]
    rows = []
    for name, report in read(reports, SCALING).items():
        program = report["programs"][0]
        rows.append(
            [
                name,
                str(report["devices"]),
                str(report["batch"]["train"]["groups"]),
                f"{program['flops']['executed'] / report['devices'] / 1e12:.1f}",
                *fit(program)[1:],
                f"{gib(wire(program, between_slices=False)):.1f}",
                f"{gib(wire(program, between_slices=True)):.2f}",
            ]
        )
    return table([*titles, "over ICI, GiB a chip", "over DCN, GiB a chip"], rows)


def fit(program: dict) -> list[str]:
    """Memory, seconds, what bounds them, MFU."""
    hbm, verdict = program["hbm"], "" if program["fits"] else " DOES NOT FIT"
    return [
        f"{gib(hbm['peak']):.1f} of {gib(hbm['usable']):.2f}{verdict}",
        f"{program['seconds']['estimate']:.3g}",
        program["bound"],
        f"{100 * (program['mfu'] or 0):.0f}%",
    ]


def wire(program: dict, between_slices: bool | None = None) -> float:
    """Bytes that a chip receives."""
    return sum(
        c["wire_bytes"]
        for c in program["collectives"]
        if between_slices in (None, c["between_slices"])
    )


def gib(size: float) -> float:
    return size / (1 << 30)


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows] if rows else []
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    main()
