"""Gemma 3 270M from a GGUF file: the same as transformers has, and a short training by LoRA.

    python experiments/gemma3_270m/run.py gemma --out experiments/gemma3_270m/results.json
    python experiments/gemma3_270m/run.py FOLDER --out /tmp/gemma.json --small    # CI: a random one

The README says how the folder is made. A run that was stopped goes on where it was. `--small`
compares one short text, and does not train.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from gvpo_jax.models import load_model
from gvpo_jax.models.decoder import decoder_fns, full_logits
from gvpo_jax.rollout.engine import SamplingParams
from gvpo_jax.rollout.inprocess import InProcessEngine, SamplingModel
from gvpo_jax.training.step import token_logps

HERE = Path(__file__).parent
NEW_TOKENS = 12
TEXTS = (
    "The capital of France is Paris, and that of Italy is Rome. The capital of Japan is",
    "23 + 45 = 68\n61 + 17 = 78\n38 + 54 = 92\n12 + 34 =",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n",
    "Une tasse de café, s'il vous plaît.\nEine Tasse Kaffee, bitte.\nコーヒーをください。",
    "  two  spaces,\ttabs,\n\n\nempty lines 🙂 and 3.14159 != 1e-5",
)
KEPT = ("eval/accuracy_before", "eval/accuracy_after", "steps", "train_seconds", "peak_memory_gib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with one .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="results.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/gemma3_270m"))
    parser.add_argument("--small", action="store_true", help="one short text, no training")
    options = parser.parse_args()
    (file,) = options.folder.resolve().glob("*.gguf")
    report = {
        "model": file.name,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "transformers", "torch")},
        "texts": compare(file, [TEXTS[0][:20]] if options.small else TEXTS),
        "training": {} if options.small else train(file, options.runs),
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    for row in report["texts"]:
        print(row)
    print(report["training"])


def compare(file: Path, texts: Sequence[str]) -> list[dict]:
    """For each text how far we are from transformers' own reader of the same file."""
    ours, where = load_model(str(file)), {"gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
    if (file.parent / "config.json").exists():  # of a random one, which no reader knows of
        config = transformers.AutoConfig.from_pretrained(file.parent)
    else:
        config = transformers.AutoConfig.from_pretrained(file.parent, **where)
        # transformers reads this from no file; it is another number in Gemma 3 27B alone.
        config.query_pre_attn_scalar = config.head_dim
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, config=config, dtype=torch.float32, **where
    ).eval()
    params = jax.tree.map(jax.numpy.asarray, ours.params)
    rows = []
    for text in texts:
        ids = ours.tokenizer(text)["input_ids"]
        rows.append(
            {"tokens": len(ids), "same_ids": ids == tokenizer(text)["input_ids"]}
            | distance(ours.config, params, theirs, np.array(ids))
            | {"same_greedy": greedy(ours.config, params, ids) == torch_greedy(theirs, ids)}
        )
    return rows


def distance(config, params, theirs, ids) -> dict[str, float]:
    """Of logits, and of the log-probs of the text's second half, as a training step has them."""
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(ids[None])).logits[0]
    logits = jax.jit(functools.partial(full_logits, config))(params, ids[None])[0]
    half = len(ids) // 2
    prompt, completion = ids[None, :half], ids[None, None, half:]
    lengths = np.array([half]), np.array([[len(ids) - half]])
    logps = token_logps(decoder_fns(config), params, prompt, lengths[0], completion, lengths[1])
    of_theirs = torch.log_softmax(expected, -1)[half - 1 : -1]
    of_theirs = of_theirs.gather(1, torch.tensor(ids[half:, None]))[:, 0]
    return {
        "logits": float(np.abs(logits - expected.numpy()).max()),
        "largest_logit": float(expected.abs().max()),
        "log_probs": float(np.abs(logps[0, 0] - of_theirs.numpy()).max()),
        "nats": float(-of_theirs.mean()),
    }


def greedy(config, params, ids) -> list[int]:
    engine = InProcessEngine(SamplingModel(decoder_fns(config)), stop_ids=())
    groups = engine.generate(
        params,
        [ids],
        [0],
        num_generations=2,
        max_completion_length=NEW_TOKENS,
        sampling=SamplingParams(temperature=0.0),
        seed=0,
    )
    return groups.completions[0][0].tolist()


def torch_greedy(model, ids) -> list[int]:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    return model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()


def train(file: Path, run: Path) -> dict:
    """What the run's summary says."""
    if not (run / "summary.json").exists():
        settings = [f"model.name={file}", f"run.dir={run.resolve()}"]
        command = [sys.executable, "-m", "gvpo_jax", "train", str(HERE / "train.yaml"), *settings]
        subprocess.run(command, check=True)
    summary = json.loads((run / "summary.json").read_text())
    return {name: summary[name] for name in KEPT}


if __name__ == "__main__":
    main()
