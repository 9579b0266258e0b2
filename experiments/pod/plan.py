"""What bounds an update of Qwen2.5-Math-7B on many chips, by arithmetic: planning.md's table.

    python experiments/pod/plan.py

Limits as if each were alone: FLOP at peak; weights gathered and gradients scattered over ICI, and
summed over DCN, in every micro-batch; decoding that reads weights and cache for each token.
"""

from gvpo_jax.models.known import KNOWN
from gvpo_jax.tpu_compile.roofline import CHIPS, Shape, train_work

MODEL = KNOWN["Qwen/Qwen2.5-Math-7B"]
K, P, T = 4, 1024, 1024  # completions of a prompt, tokens of both
UPDATES = 4  # whose prompts a rollout samples at once: train.steps_per_generation
PARAMETERS = 7.62e9
KV_BYTES = 2 * 2 * MODEL["num_hidden_layers"] * MODEL["num_key_value_heads"] * 128  # a token's

# name, chip, chips in a slice, slices, groups an update, chips that share weights to sample with
CASES = (
    ("v5e-64", "v5e", 64, 1, 256, 4),
    ("two v5e-256", "v5e", 256, 2, 256, 4),
    ("v5p-256", "v5p", 128, 1, 256, 1),
    ("v5p-2048", "v5p", 1024, 1, 256, 1),
    ("v5p-2048, 16 times the batch", "v5p", 1024, 1, 4096, 1),
)
TITLES = (
    "", "chips", "groups a chip", "compute", "ICI", "DCN", "decoding", "share of decoding",
    "if each update's were decoded alone",
)  # fmt: skip


def main() -> None:
    for cells in (TITLES, ["---"] * len(TITLES), *(row(*case) for case in CASES)):
        print(f"| {' | '.join(cells)} |")


def row(name: str, kind: str, chips: int, slices: int, groups: int, tensor: int) -> list[str]:
    chip, devices = CHIPS[kind], chips * slices
    here = groups / devices
    # Below one group a chip, its completions are spread, and the prompt is computed on each.
    group, single = (
        train_work(shape(), groups=1, k=k, p=P, t=T, remat=True, two_passes=False).executed
        for k in (K, 1)
    )
    compute = (here * group if here >= 1 else max(here * K, 1) * single) / chip.flops
    weights = 2 * PARAMETERS
    parts = max(here, 1)  # micro-batches of one group
    # Gathered forward, again to compute layers once more, and backward; gradients are scattered,
    # and summed over slices, once for the prompts and once for the completions.
    ici = parts * (3 + 2) * weights / chip.ici_bandwidth
    dcn = parts * 2 * weights / chips / chip.dcn_bandwidth if slices > 1 else 0.0
    decoding, alone = (decode(chip, here * n, tensor) / n for n in (UPDATES, 1))
    update = max(compute, ici, dcn)
    shares = [f"{x / (x + update):.0%}" for x in (decoding, alone)]
    seconds = [f"{value:.2g} s" for value in (compute, ici, dcn, decoding)]
    return [name, str(devices), f"{here:g}", *seconds, *shares]


def shape() -> Shape:
    width, hidden = MODEL["num_attention_heads"] * 128, MODEL["hidden_size"]
    keys = MODEL["num_key_value_heads"] * 128
    matmul = hidden * (2 * width + 2 * keys + 3 * MODEL["intermediate_size"])
    return Shape(MODEL["num_hidden_layers"], matmul, width, MODEL["vocab_size"] * hidden)


def decode(chip, groups: float, tensor: int) -> float:
    """Seconds to read weights and cache T times, with `groups` groups for each chip.

    Places of the cache are read whether there is a token yet or not.
    """
    weights = 2 * PARAMETERS / tensor
    cache = groups * (P + K * T) * KV_BYTES
    return T * (weights + cache) / chip.hbm_bandwidth


if __name__ == "__main__":
    main()
