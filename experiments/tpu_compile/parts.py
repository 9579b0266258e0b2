"""Parts of an update, each computed in two ways, by the clock of XLA's TPU compiler.

python experiments/tpu_compile/parts.py --out experiments/tpu_compile/parts.json
python experiments/tpu_compile/parts.py --only attention --small     # a minute or so

Every row is one compiled program: a sum of the part's results, and its gradients. Needs no TPU, but
the extra `compile`. Pallas kernels have no cycles; what they add is a model, in a column.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gvpo_jax.logprobs import CHUNK_BYTES, token_logprobs
from gvpo_jax.models import rope
from gvpo_jax.ops.attention import Prefix, causal
from gvpo_jax.ops.kernels import on_tpu
from gvpo_jax.parallel.mesh import MeshConfig
from gvpo_jax.tpu_compile.clock import clock_of
from gvpo_jax.tpu_compile.report import tpu_devices
from gvpo_jax.tpu_compile.roofline import CHIPS

# rows of completions, their length, width, vocabulary
LOGITS = {
    "SmolLM2, 128 x 31": (128, 31, 576, 49152),
    "Qwen2.5-1.5B, 8 x 1024": (8, 1024, 1536, 151936),
    "Qwen2.5-7B, 4 x 1024": (4, 1024, 3584, 152064),
}
# groups, completions of each, their length, prompt, query heads, key heads, width of a head
ATTENTION = {
    "8 x 16 x 31, prompt 64": (8, 16, 31, 64, 9, 3, 64),
    "8 x 8 x 63, prompt 128": (8, 8, 63, 128, 12, 2, 128),
    "8 x 8 x 127, prompt 256": (8, 8, 127, 256, 12, 2, 128),
    "8 x 8 x 127, prompt 1024": (8, 8, 127, 1024, 12, 2, 128),
}
# groups, completions, their length, heads, width of a head
ROTATION = {"8 x 16 x 31": (8, 16, 31, 9, 64), "1 x 8 x 1023": (1, 8, 1023, 9, 64)}
SMALL = {
    "logits": {"small": (4, 64, 128, 4096)},
    "attention": {"small": (1, 2, 31, 64, 2, 1, 64)},
    "rotation": {"small": (1, 2, 31, 2, 64)},
}

Way = tuple[str, Callable[..., jax.Array]]


def logits(_, rows, t, d, v) -> tuple[list[Way], list[Any]]:
    limits = {"kept_bytes": CHUNK_BYTES} if v > 4096 else {"chunk_bytes": 2**18}
    ways = [
        (name, lambda h, w, y, b=blocks: token_logprobs(h, w, y, vocabulary_blocks=b, **limits))
        for name, blocks in (("chunks of positions", False), ("blocks of the vocabulary", True))
    ]
    shapes = [((1, rows, t, d), "bfloat16"), ((v, d), "float32"), ((1, rows, t), "int32")]
    return ways, shapes


def attention(devices, g, k, t, p, h, n, d) -> tuple[list[Way], list[Any]]:
    mesh = MeshConfig().mesh(devices)

    def behind_prompts(attend):
        return lambda q, keys, values, *prefix: attend(q, keys, values, Prefix(*prefix))

    ways = [("XLA", causal), ("splash", functools.partial(on_tpu, mesh))]
    own, shared = (g, k, n, t, d), (g, n, p, d)
    shapes = [(shape, "bfloat16") for shape in ((g, k, t, h, d), own, own, shared, shared)]
    return [(name, behind_prompts(way)) for name, way in ways], [*shapes, ((g, p), "bool")]


def rotation(_, g, k, t, h, d) -> tuple[list[Way], list[Any]]:
    def scores(rotate):
        def run(x, w, positions):
            queries = (x @ w).reshape(g, k, t, h, d)
            turns = rope.rotations(positions, 1e4, None, d)[:2]
            turned = rotate(queries, *(a.astype(x.dtype) for a in turns))
            return jnp.einsum("gkthd,gkshd->gkhts", turned, turned)

        return run

    ways = [("halves", rope._rotate_by_halves), ("a product", rope._rotate_by_product)]
    shapes = [((g, k, t, h * d), "bfloat16"), ((h * d, h * d), "bfloat16"), ((g, k, t), "int32")]
    return [(name, scores(way)) for name, way in ways], shapes


PARTS = {
    "logits": (logits, LOGITS),
    "attention": (attention, ATTENTION),
    "rotation": (rotation, ROTATION),
}


def rows(chip: str, only: str | None, small: bool) -> Iterator[dict[str, Any]]:
    _, devices = tpu_devices(f"{chip}:1x1")
    place = jax.sharding.SingleDeviceSharding(devices[0])
    for part, (build, sizes) in PARTS.items():
        if only not in (None, part):
            continue
        for name, size in (SMALL[part] if small else sizes).items():
            ways, shapes = build(devices, *size)
            args = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
            floats = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)]
            for way, function in ways:
                yield {"part": part, "size": name, "way": way} | measured(
                    function, args, floats, chip
                )


def measured(function, args, floats, chip) -> dict[str, Any]:
    def total(*args):
        out = function(*args).astype(jnp.float32)
        weights = jnp.cos(jax.lax.iota(jnp.float32, math.prod(out.shape))).reshape(out.shape)
        return jnp.sum(out * weights)

    compiled = jax.jit(jax.value_and_grad(total, argnums=floats)).lower(*args).compile()
    clock = clock_of(compiled.as_text(), CHIPS[chip])
    assert clock is not None, "this libtpu gives no cycles"
    return {
        "ms": 1e3 * clock.seconds,
        "of these kernels, by a model": 1e3 * sum(s for _, s in clock.kernels.values()),
        "temporaries, MiB": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| part | size | way | ms | of these kernels | temporaries, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        part, size, way, *numbers = row.values()
        lines.append(
            " | ".join(
                [f"| {part}", size, way, *(f"{x:.2f}" for x in numbers[:2]), f"{numbers[2]:.0f}"]
            )
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--small", action="store_true", help="one tiny size of each part")
    parser.add_argument("--chip", choices=("v5e", "v6e"), default="v5e")
    parser.add_argument("--out", type=Path, help="where to write the rows as JSON")
    options = parser.parse_args()
    found = []
    for row in rows(options.chip, options.only, options.small):
        found.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    if options.out:
        about = {"chip": options.chip, "jax": jax.__version__, "rows": found}
        options.out.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
