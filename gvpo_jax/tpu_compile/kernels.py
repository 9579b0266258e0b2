"""What Pallas kernels take: the compiler gives them no cycles, so their work is counted here."""

import math
import re

from gvpo_jax.tpu_compile.hlo import array_bytes, arrays_of
from gvpo_jax.tpu_compile.roofline import Chip

EFFICIENCY = 0.5  # of the chip's peak, that a kernel's products are taken to reach
_LANES = 128  # to which the width of a head is filled up
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}  # products of queries and keys, or alike


def kernel_seconds(kernel: str, result: str, rest: str, chip: Chip) -> float:
    """Seconds of one run of a kernel: its products or its bytes, whichever takes longer.

    The products of splash attention are counted over the whole square, also where blocks of it are
    skipped. Those of other kernels than splash and grouped products are not known: bytes count.

    Args:
        kernel: its name.
        result: the text of what it returns.
        rest: the text behind its opcode, with the layouts of its operands.
        chip: that it runs on.
    """
    given = re.search(r"operand_layout_constraints=\{(.*?\})\}", rest)
    operands, results = arrays_of(given[1] if given else ""), arrays_of(result)
    moved = sum(array_bytes(*array) for array in (*operands, *results))
    flops = _flops(kernel, operands, results)
    return max(flops / (EFFICIENCY * chip.flops), moved / chip.hbm_bandwidth)


def _flops(kernel: str, operands, results) -> float:
    floats = [dims for dtype, dims in operands if dtype.startswith(("bf", "f")) and len(dims) > 1]
    if len(floats) < 2:
        return 0.0
    left, right = floats[:2]
    if found := re.search(r"splash_m[hq]a_(fwd|dq|dkv)", kernel):
        *batch, queries, width = left
        width = -(-width // _LANES) * _LANES
        return 2.0 * _SPLASH[found[1]] * math.prod(batch) * queries * right[-2] * width
    if kernel.startswith("tgmm"):
        return 2.0 * math.prod(left) * results[0][1][-1]
    if kernel.startswith("gmm"):
        return 2.0 * left[0] * math.prod(right[1:])
    return 0.0
