"""How fast a program could be at best: its floating-point work, and what a TPU chip can do."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gvpo_jax.models.decoder import DecoderConfig


@dataclass(frozen=True)
class Chip:
    """What one chip has, in bytes, FLOP and seconds."""

    hbm: int  # bytes of memory
    flops: float  # bfloat16 FLOP/s at peak
    hbm_bandwidth: float  # bytes/s
    # Bytes/s that a chip receives over all its links to its neighbours; half of the documented
    # figure, which counts both directions.
    ici_bandwidth: float
    # Bytes/s that a chip receives from other slices: its share of its host's network cards.
    dcn_bandwidth: float
    clock: float  # cycles/s


_GIB = 1 << 30
RESERVED = _GIB // 4  # of HBM, by the runtime: XLA:TPU offers 15.75 GiB of a v5e's 16

# From https://cloud.google.com/tpu/docs/v4, v5e, v5p and v6e (key specifications); dcn: network
# cards of a host (v4 and v5p: 200 Gbit/s for 4 chips; v5e: 2 x 100 Gbit/s for 8; v6e: 4 x 200
# Gbit/s for 8). clock: the peak over what the matrix units multiply and add in a cycle, which the
# compiler's own cycles of a large product show: four units of 128 x 128 in a v4's core and in a
# v5e, twice as many in a v5p, and of 256 x 256 in a v6e.
CHIPS: dict[str, Chip] = {
    "v4": Chip(32 * _GIB, 275e12, 1228e9, 150e9, 6.25e9, 1.05e9),
    "v5e": Chip(16 * _GIB, 197e12, 819e9, 200e9, 3.125e9, 1.5e9),
    "v5p": Chip(95 * _GIB, 459e12, 2765e9, 600e9, 6.25e9, 1.75e9),
    "v6e": Chip(32 * _GIB, 918e12, 1640e9, 400e9, 12.5e9, 1.75e9),
}


# bfloat16 FLOP/s at peak by JAX's name of a device; of GPUs without sparsity, from the data sheets
# of NVIDIA's A100, H100 and H200.
_PEAKS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


@dataclass(frozen=True)
class Work:
    """FLOP of one run of a program over all devices."""

    model: float  # what the mathematics asks for: counts for MFU
    executed: float  # with what is computed twice to save memory


@dataclass(frozen=True)
class Shape:
    """What of a decoder its products depend on."""

    layers: int
    matmul_params_per_layer: int
    attention_width: int  # query heads x head_dim
    head_params: int  # vocabulary x hidden size
    frozen: bool = False  # none of them has a gradient; an adapter's own work is not counted


@dataclass(frozen=True)
class Peak:
    """What the chips of one process could do at best, with a model."""

    shape: Shape
    flops: float  # bfloat16 FLOP/s of all its chips

    def seconds(self, prompt_lengths: Any, lengths: Any) -> float:
        """Of an update on this process's groups, see `update_flops`, if it only multiplied."""
        return update_flops(self.shape, prompt_lengths, lengths) / self.flops


def peak_of(devices: Sequence[Any], model: DecoderConfig, *, frozen: bool) -> Peak | None:
    """That of these devices; None: there is one that we know no peak of, such as a processor.

    frozen: the model is, and an adapter is trained.
    """
    peaks = [_PEAKS.get(device.device_kind) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    if not known or len(known) < len(peaks):
        return None
    return Peak(shape_of(model, frozen=frozen), sum(known))


def shape_of(model: DecoderConfig, *, frozen: bool) -> Shape:
    """Of a decoder; `frozen` as in `Shape`."""
    d = model.hidden_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return Shape(
        layers=model.num_layers,
        matmul_params_per_layer=d * (2 * queries + 2 * keys + 3 * model.inner_width),
        attention_width=queries,
        head_params=model.vocab_size * d,
        frozen=frozen,
    )


def program_work(
    name: str,
    model: DecoderConfig,
    batch: dict[str, dict[str, int]],
    *,
    remat: bool,
    two_passes: bool,
    frozen: bool,
) -> Work:
    """Of a run's program, by its name; batch: "train", "score" and "rollout" -> g, k, p and t."""
    shape = shape_of(model, frozen=frozen)
    match name:
        case "train step":
            return train_work(shape, **batch["train"], remat=remat, two_passes=two_passes)
        case "reference scoring":
            return score_work(shape, **batch["score"])
        case "rollout: prefill":
            return prefill_work(shape, groups=batch["rollout"]["groups"], p=batch["rollout"]["p"])
        case _:
            return decode_work(shape, **batch["rollout"])


def forward_flops(s: Shape, *, groups: int, k: int, p: int, t: int, tokens_scored: int) -> float:
    """FLOP of one forward pass over prompts of p and k completions of t - 1 tokens each.

    The prompt is computed once for its k completions. 2 FLOP per parameter and token in the
    layers, 4 x width per pair of a query and a key (the whole square, though blocks that the causal
    mask hides are skipped), 2 per parameter of the head and scored token.
    """
    tokens = groups * (p + k * (t - 1))
    pairs = groups * (p * p + k * (t - 1) * (p + t - 1))
    return _forward(s, tokens, pairs, tokens_scored)


def _forward(s: Shape, tokens: float, pairs: float, tokens_scored: float) -> float:
    layers = s.layers * (2 * s.matmul_params_per_layer * tokens + 4 * s.attention_width * pairs)
    return layers + 2 * s.head_params * tokens_scored


def update_flops(s: Shape, prompt_lengths: Any, lengths: Any) -> float:
    """FLOP that an update asks for on groups of prompts `[g]` and completions `[g, k]` tokens long.

    What `train_work` calls the model's, of tokens as they are, without padding: three times
    2 N T + 4 L w P + 2 V d S, with N parameters in the products of all L layers, T tokens computed,
    queries of width w, P pairs of a query and a key, a head of V x d and S completion tokens. For
    one text that is the 6 N + 12 L H Q T a token of PaLM (Chowdhery et al. 2022, appendix B). With
    an adapter backward through the products costs once what forward does, not twice.
    """
    lengths = np.asarray(lengths, np.float64)
    prompts = np.where(lengths.any(axis=1), np.asarray(prompt_lengths, np.float64), 0)
    fed = np.maximum(lengths - 1, 0)
    tokens = prompts.sum() + fed.sum()
    pairs = (prompts**2).sum() + (fed * (prompts[:, None] + fed)).sum()
    forward = _forward(s, tokens, pairs, lengths.sum())
    between_tokens = _forward(s, 0, pairs, 0)
    return float(3 * forward - (forward - between_tokens if s.frozen else 0))


def score_work(s: Shape, *, groups: int, k: int, p: int, t: int) -> Work:
    """One forward pass, and the head at every completion token."""
    flops = forward_flops(s, groups=groups, k=k, p=p, t=t, tokens_scored=groups * k * t)
    return Work(flops, flops)


def train_work(
    s: Shape, *, groups: int, k: int, p: int, t: int, remat: bool, two_passes: bool
) -> Work:
    """Forward, and backward at twice its price; the head, and with `remat` the layers, run twice.

    Backward through frozen parameters costs as much as forward: their gradients are not asked for.
    two_passes: whether every completion is scored once more beforehand (`completion_parts`).
    """
    forward = score_work(s, groups=groups, k=k, p=p, t=t).model
    pairs = dataclasses.replace(s, matmul_params_per_layer=0, head_params=0)
    between_tokens = score_work(pairs, groups=groups, k=k, p=p, t=t).model
    head = 2 * s.head_params * groups * k * t
    both = 3 * forward - (forward - between_tokens if s.frozen else 0)
    again = forward if remat else head
    return Work(both, both + again + (forward if two_passes else 0))


def prefill_work(s: Shape, *, groups: int, p: int) -> Work:
    """The prompts alone; the head comes with decoding."""
    flops = forward_flops(s, groups=groups, k=0, p=p, t=1, tokens_scored=0)
    return Work(flops, flops)


def decode_work(s: Shape, *, groups: int, k: int, p: int, t: int) -> Work:
    """T tokens of every completion; attention looks at the prompt and all t slots each time."""
    rows = groups * k
    layers = s.layers * 2 * s.matmul_params_per_layer * rows * (t - 1)
    head = 2 * s.head_params * rows * t
    seen, looked_at = rows * (t - 1) * (p + t / 2), rows * (t - 1) * (p + t)
    width = 4 * s.layers * s.attention_width
    return Work(layers + head + width * seen, layers + head + width * looked_at)


def estimate(
    chip: Chip, *, flops: float, hbm_bytes: float, ici_bytes: float, dcn_bytes: float
) -> tuple[dict[str, float], str]:
    """Seconds on one chip that each of its limits alone would allow, and which is the slowest."""
    seconds = {
        "compute": flops / chip.flops,
        "hbm": hbm_bytes / chip.hbm_bandwidth,
        "ici": ici_bytes / chip.ici_bandwidth,
        "dcn": dcn_bytes / chip.dcn_bandwidth,
    }
    return seconds, max(seconds, key=lambda limit: seconds[limit])
