"""Our update and Tunix's, compiled for a TPU that is not there, by the clock of XLA's compiler.

    python experiments/tpu_peers/run.py                     # what has no result yet; half an hour
    python experiments/tpu_peers/run.py --only long_prompt
    python experiments/tpu_peers/run.py --tables            # the README's table again
    python experiments/tpu_peers/run.py --small --out /tmp/results.json        # CI

Every program is compiled by a process of its own, from shapes alone. Results are in results.json.
"""

import argparse
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
CHIP, TOPOLOGY = "v5e", "v5e:1x1"


class Work(NamedTuple):
    """One update: a model's first layers, groups, completions of each, and lengths."""

    model: str  # of `gvpo_jax.models.known.KNOWN`
    layers: int
    groups: int
    k: int
    prompt: int
    completion: int
    remat: str  # ours


SMOLLM2, QWEN = "HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-Math-1.5B"
WORKS = {
    "colab": Work(SMOLLM2, 6, 8, 16, 64, 32, "none"),
    "reasoning": Work(QWEN, 4, 1, 8, 512, 1024, "layer"),
    "long_prompt": Work(QWEN, 4, 2, 8, 1024, 128, "layer"),
}
SMALL = {"small": Work(SMOLLM2, 1, 2, 4, 16, 8, "none")}
# Tunix's Llama has no flash attention of its own to choose.
CONTESTANTS = {
    "colab": ("ours", "Tunix"),
    "reasoning": ("ours", "Tunix, flash", "Tunix, flash, remat", "Tunix"),
    "long_prompt": ("ours", "Tunix, flash", "Tunix, flash, remat", "Tunix"),
    "small": ("ours", "Tunix"),
}


def ours(work: Work) -> Any:
    """The update of `gvpo-jax train`, lowered."""
    from gvpo_jax.config import Config
    from gvpo_jax.config_file import override
    from gvpo_jax.tpu_compile.lowering import run_programs
    from gvpo_jax.tpu_compile.report import tpu_devices

    config = override(
        Config(),
        model__dtype="bfloat16",
        model__remat=work.remat,
        data__max_prompt_length=work.prompt,
        rollout__num_generations=work.k,
        rollout__max_completion_length=work.completion,
        train__batch_size=work.groups,
    )
    mesh = config.mesh.mesh(tpu_devices(TOPOLOGY)[1])
    return run_programs(config, shape_of(work), mesh)[0].lower()


def tunix(work: Work, *, flash: bool, remat: bool) -> Any:
    """A policy-gradient update of Tunix's model: its log-probs, AdamW, weights in bfloat16."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
    from tunix.rl.common import compute_per_token_logps

    from gvpo_jax.tpu_compile.report import tpu_devices

    mesh = Mesh([[tpu_devices(TOPOLOGY)[1][0]]], ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    whole = NamedSharding(mesh, PartitionSpec())
    graph, state = nnx.split(nnx.eval_shape(lambda: tunix_model(work, flash=flash, remat=remat)))

    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def narrow(x):
        wide = jnp.issubdtype(x.dtype, jnp.floating)
        return array(x.shape, jnp.bfloat16 if wide else x.dtype)

    state = jax.tree.map(narrow, state)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    moments = jax.tree.map(lambda x: array(x.shape, x.dtype), jax.eval_shape(optimizer.init, state))

    def step(state, moments, prompts, completions, mask, advantages):
        def loss(state):
            logps = compute_per_token_logps(
                graph, state, prompts, completions, pad_id=0, eos_id=1, stop_gradient=False
            )
            ratio = jnp.exp(logps - jax.lax.stop_gradient(logps))
            return -jnp.sum(ratio * advantages[:, None] * mask) / jnp.sum(mask)

        updates, after = optimizer.update(jax.grad(loss)(state), moments, state)
        return optax.apply_updates(state, updates), after

    rows, t = work.groups * work.k, work.completion
    prompts, completions = array((rows, work.prompt), jnp.int32), array((rows, t), jnp.int32)
    others = array((rows, t), jnp.float32), array((rows,), jnp.float32)
    with mesh if flash else jax.set_mesh(mesh):
        run = jax.jit(step, donate_argnums=(0, 1))
        return run.lower(state, moments, prompts, completions, *others)


def tunix_model(work: Work, *, flash: bool, remat: bool) -> Any:
    from flax import nnx

    shape = shape_of(work)
    module = importlib.import_module(
        f"tunix.models.{ {'llama': 'llama3', 'qwen2': 'qwen2'}[shape.family] }.model"
    )
    known = {field.name for field in dataclasses.fields(module.ModelConfig)}
    settings: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "vocab_size": shape.vocab_size,
        "embed_dim": shape.hidden_size,
        "hidden_dim": shape.intermediate_size,
        "num_heads": shape.num_heads,
        "head_dim": shape.head_dim,
        "num_kv_heads": shape.num_kv_heads,
        "rope_theta": shape.rope_theta,
        "norm_eps": shape.rms_norm_eps,
    }
    settings["use_tied_embedding" if "use_tied_embedding" in known else "weight_tying"] = True
    if flash:
        whole = work.prompt + work.completion  # which the blocks have to divide
        block = next(size for size in range(512, 0, -128) if whole % size == 0)
        settings |= {"use_flash_attention": True, "flash_attention_block_size": block}
    if remat:
        settings["remat_config"] = module.RematConfig.BLOCK
    model = {"llama": "Llama3", "qwen2": "Qwen2"}[shape.family]
    return getattr(module, model)(module.ModelConfig(**settings), rngs=nnx.Rngs(0))


def shape_of(work: Work) -> Any:
    from gvpo_jax.models.hf_config import decoder_config
    from gvpo_jax.models.known import KNOWN

    return decoder_config(KNOWN[work.model] | {"num_hidden_layers": work.layers})


def measure(work: Work, contestant: str) -> dict[str, Any]:
    """One program, compiled here."""
    from gvpo_jax.tpu_compile.clock import clock_of
    from gvpo_jax.tpu_compile.roofline import CHIPS, program_work

    options = {name: name in contestant for name in ("flash", "remat")}
    lowered = ours(work) if contestant == "ours" else tunix(work, **options)
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except Exception as error:  # jaxlib's own, where it does not fit
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"error": "does not fit"}
    seconds, held = time.monotonic() - start, compiled.memory_analysis()
    clock = clock_of(compiled.as_text(), CHIPS[CHIP])
    assert clock is not None, "this libtpu gives no cycles"
    sizes = {"groups": work.groups, "k": work.k, "p": work.prompt, "t": work.completion}
    flops = program_work(
        "train step", shape_of(work), {"train": sizes}, remat=False, two_passes=False, frozen=False
    ).model
    return {
        "ms": 1e3 * clock.seconds,
        "kernels, ms": 1e3 * sum(s for _, s in clock.kernels.values()),
        "mfu": flops / CHIPS[CHIP].flops / clock.seconds,
        "parts, ms": {part: 1e3 * s for part, s in clock.parts.items()},
        "temporaries, GiB": held.temp_size_in_bytes / 2**30,
        "arguments, GiB": held.argument_size_in_bytes / 2**30,
        "compile, s": seconds,
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| work | contestant | ms | of these kernels | times ours | MFU | layout, ms | GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        mine = rows.get("ours", {}).get("ms")
        for contestant, row in rows.items():
            if "error" in row:
                lines.append(f"| {name} | {contestant} | {row['error']} | | | | | |")
                continue
            ms, parts = row["ms"], row["parts, ms"]
            held = row["temporaries, GiB"] + row["arguments, GiB"]
            ratio = f"{ms / mine:.2f}" if mine else ""
            numbers = [f"{ms:.1f}", f"{row['kernels, ms']:.1f}", ratio, f"{100 * row['mfu']:.0f}%"]
            numbers += [f"{parts['layout']:.1f}", f"{held:.1f}"]
            lines.append(f"| {name} | {contestant} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="work whose name contains this")
    parser.add_argument("--small", action="store_true", help="a tiny size alone")
    parser.add_argument("--tables", action="store_true", help="only draw the table")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--one", nargs=2, metavar=("WORK", "CONTESTANT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work, contestant = options.one
        print(json.dumps(measure((WORKS | SMALL)[work], contestant)))
        return
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    works = SMALL if options.small else WORKS
    for name in [] if options.tables else [name for name in works if options.only in name]:
        for contestant in CONTESTANTS[name]:
            if contestant in results.setdefault(name, {}):
                continue
            command = [sys.executable, __file__, "--one", name, contestant]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit(f"{name}, {contestant}: status {done.returncode}")
            results[name][contestant] = json.loads(done.stdout.splitlines()[-1])
            options.out.write_text(json.dumps(results, indent=2) + "\n")
            print(table({name: {contestant: results[name][contestant]}}).splitlines()[-1])
    if options.out.parent == HERE:
        page, mark = HERE / "README.md", "results"
        text = re.sub(
            rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
            lambda found: f"{found[1]}{table(results)}\n{found[2]}",
            page.read_text(),
            flags=re.DOTALL,
        )
        page.write_text(text)


if __name__ == "__main__":
    main()
